"""The recurrence as PyTorch operators, opaque to torch.compile, with fakes; and the gradients that they lead to.

    lstm_triton::forward              one layer in one direction
    lstm_triton::backward             back-propagation through time, to the gradients by the pre-activations
    lstm_triton::backward_recompute   the same where the gates were not kept, to the gradients by all inputs

Everything that is one product over all time steps (dx, the weight gradients; products.py) is plain torch: outside the
operators, where the compiler sees it, if the gates were kept; chunk by chunk inside the operator that computes them
again.

Names and shapes throughout, with I inputs, H hidden units, G gates, P columns of h (those of w_hr, else H):
    tensors: x [T, B, I], or without w_ih the input product [T, B, G*H]; h0 [B, P], c0 [B, H], w_ih [G*H, I], w_hh
        [G*H, P], b_ih and b_hh [G*H], w_hr [P, H], params [K, H] (CellSpec.rows), recurrent_mask [B, P] or [G, B, P],
        steps [T, B] (spec.VALID, spec.RESET), seed [1]; None where the cell has none
    results: y [T, B, P], h_n [B, P], c_n [B, H], cells [T, B, H]
    kept: products.Kept, and h [T, B, P]
What does not apply is None outside the operators and an empty tensor where an operator must return one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import constexprs, launch
from .planner import make_plan
from .plans import LaunchPlan
from .products import (
    Kept,
    Weights,
    by_recurrent_product,
    carries,
    input_gradient,
    masked,
    previous,
    remade,
    weight_gradients,
)
from .spec import CellSpec
from .transforms import refuse_forward_mode

#: The tensors of a call in the order of every operator and Function, and how many of them have gradients.
TENSORS = (
    "x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "params", "recurrent_mask", "steps", "seed",
)  # fmt: skip
DIFFERENTIABLE = 10
#: Those that do not change with time, products.Weights, among them.
WEIGHTS = slice(3, DIFFERENTIABLE)

_TENSORS = (
    "Tensor x, Tensor h0, Tensor? c0, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
    "Tensor? params, Tensor? recurrent_mask, Tensor? steps, Tensor? seed"
)
_SETTINGS = "str cell, bool reverse, str engine, int[] tile"
_GRADIENTS = "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells"
library = torch.library.Library("lstm_triton", "DEF")
library.define(
    f"forward({_TENSORS}, {_SETTINGS}, bool training, str memory, bool return_cells) -> ({', '.join(['Tensor'] * 9)})"
)
library.define(
    f"backward({_GRADIENTS}, Tensor? gates, Tensor? extra, Tensor? normed, Tensor? stats, Tensor h, Tensor h0, "
    "Tensor? c0, Tensor w_hh, Tensor? w_hr, Tensor? params, Tensor? recurrent_mask, Tensor? steps, Tensor? seed, "
    f"{_SETTINGS}, bool bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"backward_recompute({_GRADIENTS}, Tensor? extra, Tensor h, {_TENSORS}, {_SETTINGS}, bool[] needs, int samples) "
    f"-> ({', '.join(['Tensor'] * DIFFERENTIABLE)})"
)


@dataclass(frozen=True)
class Run:
    """What is to be run, apart from what the tensors tell: the cell and lt.functional's arguments.

    Nothing that the tensors tell, such as the size of a projection: torch.compile may not know it as a number.
    """

    spec: CellSpec  # its biases and projection aside
    reverse: bool
    engine: str
    tile: tuple[int, int] | None
    memory: str
    return_cells: bool

    @property
    def settings(self) -> tuple[str, bool, str, list[int]]:
        """As the operators take them."""
        return str(self.spec), self.reverse, self.engine, list(self.tile or ())


def plan_for(spec: CellSpec, x: Tensor, H: int, engine: str, tile: Sequence[int] | None, masks: int = 0) -> LaunchPlan:
    """The plan for x [T, B, any] where it lives. fp32 products follow torch's switch for cuDNN's RNNs."""
    T, B, _ = x.shape
    return make_plan(
        spec, T, B, H, x.dtype, launch.device_of(x),
        engine=engine, tile=tuple(tile or ()) or None, precision=fp32_precision(), masks=masks,
    )  # fmt: skip


def fp32_precision() -> str:
    """How torch.backends.cudnn wants fp32 products in recurrent layers: "tf32" or "ieee"."""
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"


def forward(run: Run, training: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """lstm_triton::forward -> y, h_n, c_n, cells, and, if training, what `gradients` reads again: Kept's four, h.

    extra is None where it is cells, and h where it is y: no two results are one tensor.
    """
    results = torch.ops.lstm_triton.forward(*tensors, *run.settings, training, run.memory, run.return_cells)
    return results_of(run, training, tensors[TENSORS.index("steps")], results)


def results_of(
    run: Run, training: bool, steps: Tensor | None, results: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """What `forward` returns, from what lstm_triton::forward does, or the gradients by it from those by that."""
    y, h_n, c_n, cells, gates, extra, normed, stats, h = results
    spec = run.spec
    store = training and run.memory == "store"
    if run.return_cells and steps is None:
        cells, extra = extra, None
    save_gates, save_extra = constexprs.saves(spec)
    return (
        y,
        h_n,
        c_n if spec.has_c else None,
        cells if run.return_cells else None,
        gates if store and save_gates else None,
        extra if training and (spec.has_c or (store and save_extra)) else None,
        normed if store and spec.layer_norm else None,
        stats if store and spec.layer_norm else None,
        h if training and steps is not None else None,
    )


def gradients(
    run: Run, needs: Sequence[bool], samples: int, grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients by the DIFFERENTIABLE tensors, None where `needs` has False.

    grads: dy, dh_n, dc_n, dcells, which may be None, for zero. kept: Kept's four and h. The gradients by the weights
    come as [samples, ...]: the batch is that many parts of one size, and each has its own, summed over its rows alone.
    Plain torch around one operator, so that the compiler sees the products.
    """
    x, h0, c0, w_ih, w_hh, _, b_hh, w_hr, params, recurrent_mask, steps, seed = tensors
    gates, extra, normed, stats, h = kept
    if run.memory == "recompute":
        found = torch.ops.lstm_triton.backward_recompute(
            *grads, extra, h, *tensors, *run.settings, list(needs), samples
        )  # fmt: skip
        return [d if need else None for d, need in zip(found, needs, strict=True)]
    da, dh0, dc0, dh_all, dparams = torch.ops.lstm_triton.backward(
        *grads, gates, extra, normed, stats, h, h0, c0, w_hh, w_hr, params, recurrent_mask, steps, seed,
        *run.settings, b_hh is not None,
    )  # fmt: skip
    spec = run.spec
    dx = input_gradient(spec, da, w_ih) if needs[0] else None
    weights = weight_gradients(
        spec, run.reverse, needs[WEIGHTS], samples, da, dh_all if w_hr is not None else None,
        dparams if constexprs.options(spec, 0, False).dparams else None, x, h, h0, c0, steps,
        Kept(gates, extra, normed, stats), Weights(*tensors[WEIGHTS]),
    )  # fmt: skip
    return [dx, dh0 if needs[1] else None, dc0 if needs[2] else None, *weights]


def chunk_steps(T: int) -> int:
    """Steps that backward_recompute holds gates and their gradients of at a time: sqrt(T), in whole sixteens, or 64.

    With the root the number of launches and the memory of a chunk grow alike; below 64 steps the host would take longer
    to launch a chunk than the device to run it. Whole sixteens, so that a chunk begins at a multiple of 16 bytes in
    every tensor [T, ...] and the kernels read it where it is.
    """
    return max(64, 16 * math.ceil(math.sqrt(T) / 16))


def _forward(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    steps: Tensor | None, seed: Tensor | None, cell: str, reverse: bool, engine: str, tile: list[int], training: bool,
    memory: str, return_cells: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> y, h_n, c_n, cells, Kept's four, h. Without steps cells is empty, being extra, and so is h, being y.

    Of Kept only extra is there where `memory` is "recompute".
    """
    refuse_forward_mode()
    spec = _spec(cell, b_hh, w_hr)
    T, B, _ = x.shape
    if w_ih is None:  # the kernel writes over it
        gates = x.clone(memory_format=torch.contiguous_format)
    else:
        gates = linear(x.reshape(T * B, -1), w_ih, b_ih).view(T, B, -1)
    plan = plan_for(spec, x, w_hh.shape[0] // spec.gates, engine, tile, masks_of(recurrent_mask))
    keep = training and memory == "store"
    h, state, extra, normed, stats = launch.forward(
        plan, gates, _aligned(w_hh), _aligned(b_hh), _aligned(h0), c0, w_hr=_aligned(w_hr), params=_aligned(params),
        mask=_planes(recurrent_mask), steps=_aligned(steps), seed=_aligned(seed), reverse=reverse,
        training=keep, save_states=training or return_cells,
    )  # fmt: skip
    save_gates, _ = constexprs.saves(spec)
    skips = steps is not None
    results = (
        masked(h, steps),
        h[0 if reverse else -1].clone(),
        None if c0 is None else state.to(x.dtype, copy=True),
        masked(extra, steps) if skips and return_cells else None,
        gates if keep and save_gates else None,
        extra if training or not skips else None,
        normed,
        stats,
        h if training and skips else None,
    )
    return tuple(x.new_empty(0) if t is None else t for t in results)


def _fake_forward(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    steps: Tensor | None, seed: Tensor | None, cell: str, reverse: bool, engine: str, tile: list[int], training: bool,
    memory: str, return_cells: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    T, B, _ = x.shape
    spec = CellSpec.parse(cell)
    save_gates, save_extra = constexprs.saves(spec)
    keep, skips = training and memory == "store", steps is not None
    extra = (keep and save_extra) or (c0 is not None and (training or (return_cells and not skips)))
    rows, units = w_hh.shape[0], w_hh.shape[0] // spec.gates

    def given(there: bool, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return x.new_empty(T, B, columns, dtype=dtype) if there else x.new_empty(0)

    return (
        x.new_empty(T, B, w_hh.shape[1]),
        x.new_empty(h0.shape),
        x.new_empty(0 if c0 is None else c0.shape),
        given(skips and return_cells, units),
        given(keep and save_gates, rows),
        given(extra, units),
        given(keep and spec.layer_norm, rows),
        given(keep and spec.layer_norm, 4, torch.promote_types(x.dtype, torch.float32)),
        given(skips and training, w_hh.shape[1]),
    )


def _backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    gates: Tensor | None, extra: Tensor | None, normed: Tensor | None, stats: Tensor | None, h: Tensor, h0: Tensor,
    c0: Tensor | None, w_hh: Tensor, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    steps: Tensor | None, seed: Tensor | None, cell: str, reverse: bool, engine: str, tile: list[int], bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> da [T, B, D*H] by the pre-activations (constexprs.slots), dh0, dc0 (empty without c0), dh_all [T, B, P] by the
    projected h (empty without w_hr), and dparams [B, options.dparams, H] by params and, normalised, b_hh, in the
    accumulator's dtype (or empty).
    """
    spec = CellSpec.parse(cell).of_tensors(bias, 0 if w_hr is None else w_hr.shape[0])
    H = w_hh.shape[0] // spec.gates
    plan = plan_for(spec, h, H, engine, tile, masks_of(recurrent_mask))
    dh, dstate = _last_gradients(h0, H, dh_n, dc_n)
    dparams = _no_gradients(spec, h, H)
    h = _aligned(h)
    da, dh, dstate, dh_all = _walk_back(
        plan, reverse, dy, dh, dstate, dparams, dcells, Kept(gates, extra, normed, stats), h, h0,
        h0 if c0 is None else c0, Weights(None, w_hh, None, None, w_hr, params, recurrent_mask), w_hh, steps, seed,
    )  # fmt: skip
    return (
        da,
        dh.to(h.dtype),
        h.new_empty(0) if c0 is None else dstate.to(h.dtype),
        h.new_empty(0) if dh_all is None else dh_all,
        h.new_empty(0, dtype=dh.dtype) if dparams is None else dparams,
    )


def _fake_backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    gates: Tensor | None, extra: Tensor | None, normed: Tensor | None, stats: Tensor | None, h: Tensor, h0: Tensor,
    c0: Tensor | None, w_hh: Tensor, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    steps: Tensor | None, seed: Tensor | None, cell: str, reverse: bool, engine: str, tile: list[int], bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    T, B, P = h.shape
    spec = CellSpec.parse(cell)
    D, _ = constexprs.slots(spec)
    H = w_hh.shape[0] // spec.gates
    rows = constexprs.options(spec, 0, False).dparams
    return (
        h.new_empty(T, B, D * H),
        h.new_empty(h0.shape),
        h.new_empty(0 if c0 is None else c0.shape),
        h.new_empty(0) if w_hr is None else h.new_empty(T, B, P),
        h.new_empty((B, rows, H) if rows else 0, dtype=torch.promote_types(h.dtype, torch.float32)),
    )


def _backward_recompute(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None, extra: Tensor | None, h: Tensor,
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    steps: Tensor | None, seed: Tensor | None, cell: str, reverse: bool, engine: str, tile: list[int],
    needs: list[bool], samples: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> what `gradients` says, empty where not needed.

    From the last chunk of steps to the first, in the order of processing: the chunk's gates from the states, all steps
    at once; then back through its steps; then its part of the products over time, which are summed in fp32 (fp64).
    """
    spec = _spec(cell, b_hh, w_hr)
    T, H = len(h), w_hh.shape[0] // spec.gates
    plan = plan_for(spec, h, H, engine, tile, masks_of(recurrent_mask))
    extra, h, w_hh, w_hr, steps = (_aligned(t) for t in (extra, h, w_hh, w_hr, steps))
    weights = Weights(w_ih, w_hh, b_ih, b_hh, w_hr, params, recurrent_mask)
    high = torch.promote_types(h.dtype, torch.float32)
    dh, dstate = _last_gradients(h0, H, dh_n, dc_n)
    dparams = _no_gradients(spec, h, H)
    dx = h.new_empty(x.shape if needs[0] else 0)
    of_weights = list(needs[WEIGHTS])
    shapes = [None if w is None else (samples, *w.shape) for w in weights[:-1]]
    shapes.append(None if recurrent_mask is None else recurrent_mask.shape)
    sums = [dh.new_zeros(s) if need else None for s, need in zip(shapes, of_weights, strict=True)]
    # params' gradients are summed over all chunks in the kernel: of no chunk its own
    in_kernel = (5, 3) if spec.layer_norm else (5,)
    of_chunk = [need and i not in in_kernel for i, need in enumerate(of_weights)]

    length = chunk_steps(T)
    starts = range(0, T, length)
    for start in starts if reverse else reversed(starts):
        chunk = slice(start, start + length)
        dy_t, dcells_t, extra_t, h_t, x_t, steps_t = (
            None if t is None else t[chunk] for t in (dy, dcells, extra, h, x, steps)
        )
        before = start + length if reverse else start - 1
        given = not 0 <= before < T
        h_first = h0 if given else h[before]
        c_first = None if c0 is None else c0 if given else extra[before]
        c_before = None if c0 is None or spec.plain else previous(extra_t, c_first, steps_t, reverse)
        again = _kept_again if spec.registered else remade
        kept = again(spec, x_t, previous(h_t, h_first, steps_t, reverse), extra_t, c_before, weights)
        da, dh, dstate, dh_all = _walk_back(
            plan, reverse, dy_t, dh, dstate, dparams, dcells_t, kept, h_t, h_first,
            h_first if c0 is None else c_first, weights, w_hh.to(high), steps_t, seed, start,
        )  # fmt: skip
        if needs[0]:
            dx[chunk] = input_gradient(spec, da, w_ih)
        parts = weight_gradients(
            spec, reverse, of_chunk, samples, da, dh_all, None, x_t, h_t, h_first, c_first, steps_t, kept, weights
        )
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total += part
    if any(of_weights[i] for i in in_kernel):
        only = [need and i in in_kernel for i, need in enumerate(of_weights)]
        for i, part in enumerate(weight_gradients(
            spec, reverse, only, samples, da, dh_all, dparams, x_t, h_t, h_first, c_first, steps_t, kept, weights
        )):  # fmt: skip
            sums[i] = part if part is not None else sums[i]

    found = (dh if needs[1] else None, dstate if needs[2] else None, *sums)
    return dx, *(h.new_empty(0) if d is None else d.to(h.dtype) for d in found)


def _fake_backward_recompute(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None, extra: Tensor | None, h: Tensor,
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    steps: Tensor | None, seed: Tensor | None, cell: str, reverse: bool, engine: str, tile: list[int],
    needs: list[bool], samples: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = [h.new_empty(t.shape if need else 0) for t, need in zip((x, h0, c0), needs[:3], strict=True)]
    weights = zip((w_ih, w_hh, b_ih, b_hh, w_hr, params), needs[3:9], strict=True)
    of_weights = [h.new_empty((samples, *w.shape) if need else 0) for w, need in weights]
    return *rows, *of_weights, h.new_empty(recurrent_mask.shape if needs[9] else 0)


def _kept_again(
    spec: CellSpec, x: Tensor, h_before: Tensor, c: Tensor | None, c_before: Tensor | None, weights: Weights
) -> Kept:
    """As products.remade, where the cell's device functions alone tell what forward keeps.

    One step of the forward kernel, of which all these steps are rows: x [T, B, any] -> [1, T*B, any].
    """
    T, B, P = h_before.shape
    if weights.w_ih is None:
        gates = x.clone(memory_format=torch.contiguous_format)
    else:
        gates = linear(x, weights.w_ih, weights.b_ih)
    gates, masks = gates.view(1, T * B, -1), _planes(weights.mask)
    plan = plan_for(spec, gates, weights.w_hh.shape[0] // spec.gates, "step", None, masks_of(weights.mask))
    made = launch.forward(
        plan, gates, _aligned(weights.w_hh), _aligned(weights.b_hh), _aligned(h_before.reshape(T * B, P)),
        None if c_before is None else c_before.reshape(T * B, -1), params=_aligned(weights.params),
        mask=None if masks is None else masks.repeat(1, T, 1), reverse=False, training=True,
    )  # fmt: skip
    extra = made.extra if c is None else c
    return Kept(*(None if t is None else t.view(T, B, -1) for t in (gates, extra, made.normed, made.stats)))


def _walk_back(
    plan: LaunchPlan, reverse: bool, dy: Tensor | None, dh: Tensor, dstate: Tensor, dparams: Tensor | None,
    dcells: Tensor | None, kept: Kept, h: Tensor, h0: Tensor, state0: Tensor, weights: Weights, carry: Tensor,
    steps: Tensor | None, seed: Tensor | None, first_step: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Back through consecutive steps -> da, and the gradients by h and the state before them, complete; dh_all.

    dh and dstate, by h and the state after them, are overwritten; dparams is added to. carry is w_hh in the dtype in
    which the gradient by h is carried to the steps before: the accumulator's, but where that gradient is rounded
    anyway. first_step: where the steps begin in the sequence.
    """
    spec = plan.spec
    save_gates, save_extra = constexprs.saves(spec)
    steps = _aligned(steps)
    da, dh, dstate, dh_all = launch.backward(
        plan,
        h.new_zeros(h.shape) if dy is None else _aligned(masked(dy, steps)),
        dh,
        dstate,
        dparams,
        _aligned(kept.gates) if save_gates else None,
        _aligned(kept.extra) if spec.has_c else h,
        _aligned(state0),
        _aligned(kept.extra) if save_extra else None,
        _aligned(weights.w_hh),
        normed=_aligned(kept.normed),
        stats=_aligned(kept.stats),
        w_hr=_aligned(weights.w_hr),
        params=_aligned(weights.params),
        mask=_planes(weights.mask),
        steps=steps,
        seed=_aligned(seed),
        dcells=None if dcells is None else _aligned(masked(dcells, steps)),
        reverse=reverse,
        first_step=first_step,
    )
    first = -1 if reverse else 0
    through_w_hh = _through_w_hh(spec, by_recurrent_product(spec, da[first]).to(carry.dtype), carry, weights.mask)
    through_w_hh = through_w_hh.to(dh.dtype)
    if steps is not None:
        through_w_hh = torch.where(carries(steps[first]), through_w_hh, 0)
    return da, dh + through_w_hh, dstate, dh_all


def _through_w_hh(spec: CellSpec, by_h: Tensor, w_hh: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient by the h [B, P] that the recurrent product was of, from that by the product [B, G*H].

    What goes through n where the reset comes first is the kernel's.
    """
    H = w_hh.shape[0] // spec.gates
    count = spec.gates if spec.reset_after else 2
    if mask is None or mask.dim() == 2:
        found = by_h[:, : count * H] @ w_hh[: count * H]
        return found if mask is None else found * mask
    return sum(by_h[:, i * H : (i + 1) * H] @ w_hh[i * H : (i + 1) * H] * mask[i] for i in range(count))


def masks_of(recurrent_mask: Tensor | None) -> int:
    """How many dropout masks there are: none, one for all gates, or one a gate."""
    return 0 if recurrent_mask is None else 1 if recurrent_mask.dim() == 2 else recurrent_mask.shape[0]


def _planes(mask: Tensor | None) -> Tensor | None:
    """[B, P] or [G, B, P] -> [masks, B, P]"""
    return None if mask is None else _aligned(mask if mask.dim() == 3 else mask.unsqueeze(0))


def _no_gradients(spec: CellSpec, h: Tensor, H: int) -> Tensor | None:
    """Zeros that the kernel adds the gradients by params to, row by row of the batch: [B, options.dparams, H]."""
    rows = constexprs.options(spec, 0, False).dparams
    return h.new_zeros(h.shape[1], rows, H, dtype=torch.promote_types(h.dtype, torch.float32)) if rows else None


def _last_gradients(h0: Tensor, H: int, dh_n: Tensor | None, dc_n: Tensor | None) -> tuple[Tensor, Tensor]:
    """dh [B, P] and dstate [B, H] after the last step, of their own and in the accumulator's dtype."""
    high = torch.promote_types(h0.dtype, torch.float32)
    zeros = {"dh": (h0.shape, dh_n), "dstate": ((h0.shape[0], H), dc_n)}
    dh, dstate = (
        h0.new_zeros(shape, dtype=high) if d is None else d.to(high, memory_format=torch.contiguous_format, copy=True)
        for shape, d in zeros.values()
    )
    return dh, dstate


def _spec(cell: str, b_hh: Tensor | None, w_hr: Tensor | None) -> CellSpec:
    return CellSpec.parse(cell).of_tensors(b_hh is not None, 0 if w_hr is None else w_hr.shape[0])


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, and beginning at a multiple of 16 bytes: for others Triton would compile variants of the kernels."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


for _name, _function, _fake in (
    ("forward", _forward, _fake_forward),
    ("backward", _backward, _fake_backward),
    ("backward_recompute", _backward_recompute, _fake_backward_recompute),
):
    for _key in ("CUDA", "CPU"):
        library.impl(_name, _function, _key)
    torch.library.register_fake(f"lstm_triton::{_name}", _fake, lib=library)
