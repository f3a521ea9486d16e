"""The recurrence as PyTorch operators, opaque to torch.compile, with fakes; and the gradients that they lead to.

    lstm_triton::forward              one layer in one direction
    lstm_triton::backward             back-propagation through time, to the gradients by the pre-activations
    lstm_triton::backward_recompute   the same where the gates were not kept, to the gradients by all inputs

Everything that is one product over all time steps (dx, the weight gradients) is plain torch: outside the operators,
where the compiler sees it, if the gates were kept; chunk by chunk inside the operator that computes them again.

Names and shapes throughout, with I inputs, H hidden units, G gates, P columns of h (those of w_hr, else H):
    tensors: x [T, B, I], h0 [B, P], c0 [B, H], w_ih [G*H, I], w_hh [G*H, P], b_ih and b_hh [G*H], w_hr [P, H], steps
        [T, B] (spec.VALID, spec.RESET); None where the cell has none
    results: y [T, B, P], h_n [B, P], c_n [B, H], cells [T, B, H]
    kept: gates [T, B, G*H] activated, extra [T, B, H] (c of the LSTM, W_hn h[t-1] + b_hn of the GRU), h [T, B, P]
What does not apply is None outside the operators and an empty tensor where an operator must return one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import launch
from .planner import make_plan
from .plans import LaunchPlan
from .spec import RESET, VALID, Activation, CellSpec
from .transforms import refuse_forward_mode

_STATES = "Tensor h0, Tensor? c0"
_SETTINGS = "str cell, str activation, bool reverse, str engine, int[] tile"
_GRADIENTS = "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells"
_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? steps"
library = torch.library.Library("lstm_triton", "DEF")
library.define(
    f"forward(Tensor x, {_STATES}, {_WEIGHTS}, {_SETTINGS}, bool training, str memory, bool return_cells) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"backward({_GRADIENTS}, Tensor? gates, Tensor? extra, Tensor h, {_STATES}, Tensor w_hh, Tensor? w_hr, "
    f"Tensor? steps, {_SETTINGS}, bool bias) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"backward_recompute({_GRADIENTS}, Tensor? extra, Tensor h, Tensor x, {_STATES}, {_WEIGHTS}, {_SETTINGS}, "
    "bool[] needs, int samples) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True)
class Run:
    """What is to be run, apart from what the tensors tell: the cell's name and lt.functional's arguments.

    Nothing that the tensors tell, such as the size of a projection: torch.compile may not know it as a number.
    """

    cell: str
    activation: Activation
    reverse: bool
    engine: str
    tile: tuple[int, int] | None
    memory: str
    return_cells: bool

    @property
    def spec(self) -> CellSpec:
        """The cell, its biases and projection aside."""
        return CellSpec(self.cell, self.activation)

    @property
    def settings(self) -> tuple[str, Activation, bool, str, list[int]]:
        """As the operators take them."""
        return self.cell, self.activation, self.reverse, self.engine, list(self.tile or ())


def plan_for(spec: CellSpec, x: Tensor, H: int, engine: str, tile: Sequence[int] | None) -> LaunchPlan:
    """The plan for x [T, B, any] where it lives. fp32 products follow torch's switch for cuDNN's RNNs."""
    T, B, _ = x.shape
    device, precision = launch.device_of(x), fp32_precision()
    return make_plan(spec, T, B, H, x.dtype, device, engine=engine, tile=tuple(tile or ()) or None, precision=precision)


def fp32_precision() -> str:
    """How torch.backends.cudnn wants fp32 products in recurrent layers: "tf32" or "ieee"."""
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"


def forward(
    run: Run, training: bool,
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, steps: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """lstm_triton::forward -> y, h_n, c_n, cells, and, if training, what `gradients` reads again: gates, extra, h.

    extra is None where it is cells, and h where it is y: no two results are one tensor.
    """
    results = torch.ops.lstm_triton.forward(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, steps, *run.settings, training, run.memory, run.return_cells
    )
    return results_of(run, training, steps, results)


def results_of(
    run: Run, training: bool, steps: Tensor | None, results: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """What `forward` returns, from what lstm_triton::forward does, or the gradients by it from those by that."""
    y, h_n, c_n, cells, gates, extra, h = results
    lstm, store = run.cell == "lstm", run.memory == "store"
    if run.return_cells and steps is None:
        cells, extra = extra, None
    save_gates, save_extra = launch.saves(run.spec)
    return (
        y,
        h_n,
        c_n if lstm else None,
        cells if run.return_cells else None,
        gates if training and store and save_gates else None,
        extra if training and (lstm or (store and save_extra)) else None,
        h if training and steps is not None else None,
    )


def gradients(
    run: Run, needs: Sequence[bool], samples: int,
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, steps: Tensor | None, gates: Tensor | None, extra: Tensor | None, h: Tensor,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients by x, h0, c0, w_ih, w_hh, b_ih, b_hh and w_hr, None where `needs` has False.

    Those by the results may be None, for zero. Those by the weights come as [samples, ...]: the batch is that many
    parts of one size, and each has its own, summed over its rows alone. Plain torch around one operator, so that the
    compiler sees the products.
    """
    if run.memory == "recompute":
        found = torch.ops.lstm_triton.backward_recompute(
            dy, dh_n, dc_n, dcells, extra, h, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, steps, *run.settings,
            list(needs), samples,
        )  # fmt: skip
        return [d if need else None for d, need in zip(found, needs, strict=True)]
    da, dh0, dc0, dh_all = torch.ops.lstm_triton.backward(
        dy, dh_n, dc_n, dcells, gates, extra, h, h0, c0, w_hh, w_hr, steps, *run.settings, b_hh is not None
    )
    spec = run.spec
    dx = _input_gradient(spec, da, w_ih) if needs[0] else None
    projected = (dh_all, _unprojected(gates, extra, steps)) if needs[7] else (None, None)
    weights = _weight_gradients(spec, run.reverse, needs[3:], samples, da, x, h, h0, steps, *projected)
    return [dx, dh0 if needs[1] else None, dc0 if needs[2] else None, *weights]


def per_sample(
    function: Callable[..., tuple[Tensor, ...]], samples: int, tensors: Sequence[Tensor | None],
    dims: Sequence[int | None], out_dims: tuple[int, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """function() of each of `samples` parts of the batch, which lies at `dims`; stacked at `out_dims`."""
    if samples == 1:
        return tuple(found.unsqueeze(at) for found, at in zip(function(*tensors), out_dims, strict=True))
    dims = tuple(None if t is None else at for t, at in zip(tensors, dims, strict=True))
    parts = (t if at is None else t.unflatten(at, (samples, -1)) for t, at in zip(tensors, dims, strict=True))
    return torch.vmap(function, dims, out_dims)(*parts)


def chunk_steps(T: int) -> int:
    """Steps that backward_recompute holds gates and their gradients of at a time: sqrt(T), in whole sixteens, or 64.

    With the root the number of launches and the memory of a chunk grow alike; below 64 steps the host would take longer
    to launch a chunk than the device to run it. Whole sixteens, so that a chunk begins at a multiple of 16 bytes in
    every tensor [T, ...] and the kernels read it where it is.
    """
    return max(64, 16 * math.ceil(math.sqrt(T) / 16))


def _forward(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, steps: Tensor | None, cell: str, activation: str, reverse: bool, engine: str,
    tile: list[int], training: bool, memory: str, return_cells: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> y, h_n, c_n, cells, gates, extra, h. Without steps cells is empty, being extra, and so is h, being y.

    gates is empty where `memory` is "recompute".
    """
    refuse_forward_mode()
    spec = _spec(cell, activation, b_hh, w_hr)
    T, B, _ = x.shape
    gates = linear(x.reshape(T * B, -1), w_ih, b_ih).view(T, B, -1)
    plan = plan_for(spec, x, w_hh.shape[0] // spec.gates, engine, tile)
    keep = training and memory == "store"
    h, state, extra, _ = launch.forward(
        plan, gates, _aligned(w_hh), _aligned(b_hh), _aligned(h0), c0,
        w_hr=_aligned(w_hr), steps=_aligned(steps), reverse=reverse,
        training=keep, save_states=training or return_cells,
    )  # fmt: skip
    save_gates, _ = launch.saves(spec)
    masked = steps is not None
    results = (
        _masked(h, steps),
        h[0 if reverse else -1].clone(),
        None if c0 is None else state.to(x.dtype, copy=True),
        _masked(extra, steps) if masked and return_cells else None,
        gates if keep and save_gates else None,
        extra if training or not masked else None,
        h if training and masked else None,
    )
    return tuple(x.new_empty(0) if t is None else t for t in results)


def _fake_forward(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, steps: Tensor | None, cell: str, activation: str, reverse: bool, engine: str,
    tile: list[int], training: bool, memory: str, return_cells: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    T, B, _ = x.shape
    spec = CellSpec(cell, activation)
    save_gates, save_extra = launch.saves(spec)
    keep, masked = training and memory == "store", steps is not None
    extra = (keep and save_extra) or (c0 is not None and (training or (return_cells and not masked)))
    sequences = (
        (masked and return_cells, w_hh.shape[0] // spec.gates),
        (keep and save_gates, w_hh.shape[0]),
        (extra, w_hh.shape[0] // spec.gates),
        (masked and training, w_hh.shape[1]),
    )
    return (
        x.new_empty(T, B, w_hh.shape[1]),
        x.new_empty(h0.shape),
        x.new_empty(0 if c0 is None else c0.shape),
        *(x.new_empty(T, B, columns) if there else x.new_empty(0) for there, columns in sequences),
    )


def _backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    gates: Tensor | None, extra: Tensor | None, h: Tensor, h0: Tensor, c0: Tensor | None, w_hh: Tensor,
    w_hr: Tensor | None, steps: Tensor | None, cell: str, activation: str, reverse: bool, engine: str,
    tile: list[int], bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> da [T, B, D*H] by the pre-activations (launch.slots), dh0, dc0 (empty without c0), and dh_all [T, B, P] by
    the projected h (empty without w_hr).
    """
    spec = CellSpec(cell, activation, bias, 0 if w_hr is None else w_hr.shape[0])
    H = w_hh.shape[0] // spec.gates
    plan = plan_for(spec, h, H, engine, tile)
    gates, extra, h, w_hh, w_hr, steps = (_aligned(t) for t in (gates, extra, h, w_hh, w_hr, steps))
    dh, dstate = _last_gradients(h0, H, dh_n, dc_n)
    da, dh, dstate, dh_all = _walk_back(
        plan, reverse, dy, dh, dstate, dcells, gates, extra, h, h0 if c0 is None else c0, w_hh, w_hh, w_hr, steps
    )
    return (
        da,
        dh.to(h.dtype),
        h.new_empty(0) if c0 is None else dstate.to(h.dtype),
        h.new_empty(0) if dh_all is None else dh_all,
    )


def _fake_backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    gates: Tensor | None, extra: Tensor | None, h: Tensor, h0: Tensor, c0: Tensor | None, w_hh: Tensor,
    w_hr: Tensor | None, steps: Tensor | None, cell: str, activation: str, reverse: bool, engine: str,
    tile: list[int], bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    T, B, P = h.shape
    spec = CellSpec(cell, activation)
    D, _ = launch.slots(spec)
    return (
        h.new_empty(T, B, D * (w_hh.shape[0] // spec.gates)),
        h.new_empty(h0.shape),
        h.new_empty(0 if c0 is None else c0.shape),
        h.new_empty(0) if w_hr is None else h.new_empty(T, B, P),
    )


def _backward_recompute(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None, extra: Tensor | None, h: Tensor,
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, steps: Tensor | None, cell: str, activation: str, reverse: bool, engine: str,
    tile: list[int], needs: list[bool], samples: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> what `gradients` says, empty where not needed.

    From the last chunk of steps to the first, in the order of processing: the chunk's gates from the states, all steps
    at once; then back through its steps; then its part of the products over time, which are summed in fp32 (fp64).
    """
    spec = _spec(cell, activation, b_hh, w_hr)
    T, H = len(h), w_hh.shape[0] // spec.gates
    plan = plan_for(spec, h, H, engine, tile)
    extra, h, w_hh, w_hr, steps = (_aligned(t) for t in (extra, h, w_hh, w_hr, steps))
    carry = w_hh.to(torch.promote_types(h.dtype, torch.float32))
    dh, dstate = _last_gradients(h0, H, dh_n, dc_n)
    dx = h.new_empty(x.shape if needs[0] else 0)
    weights = (w_ih, w_hh, b_ih, b_hh, w_hr)
    sums = [dh.new_zeros(samples, *w.shape) if need else None for w, need in zip(weights, needs[3:], strict=True)]

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
        state_first = h_first if c0 is None else c0 if given else extra[before]
        gates, product = _activated_gates(spec, x_t, _previous(h_t, h_first, steps_t, reverse), w_ih, w_hh, b_ih, b_hh)
        da, dh, dstate, dh_all = _walk_back(
            plan, reverse, dy_t, dh, dstate, dcells_t, gates, extra_t if product is None else product, h_t,
            state_first, w_hh, carry, w_hr, steps_t,
        )  # fmt: skip
        if needs[0]:
            dx[chunk] = _input_gradient(spec, da, w_ih)
        projected = (dh_all, _unprojected(gates, extra_t, steps_t)) if needs[7] else (None, None)
        parts = _weight_gradients(spec, reverse, needs[3:], samples, da, x_t, h_t, h_first, steps_t, *projected)
        for total, part in zip(sums, parts, strict=True):
            if total is not None:
                total += part

    found = (dh if needs[1] else None, dstate if needs[2] else None, *sums)
    return dx, *(h.new_empty(0) if d is None else d.to(h.dtype) for d in found)


def _fake_backward_recompute(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None, extra: Tensor | None, h: Tensor,
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, steps: Tensor | None, cell: str, activation: str, reverse: bool, engine: str,
    tile: list[int], needs: list[bool], samples: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    states = [h.new_empty(t.shape if need else 0) for t, need in zip((x, h0, c0), needs[:3], strict=True)]
    weights = zip((w_ih, w_hh, b_ih, b_hh, w_hr), needs[3:], strict=True)
    return *states, *(h.new_empty((samples, *w.shape) if need else 0) for w, need in weights)


def _walk_back(
    plan: LaunchPlan, reverse: bool, dy: Tensor | None, dh: Tensor, dstate: Tensor, dcells: Tensor | None,
    gates: Tensor | None, extra: Tensor | None, h: Tensor, state0: Tensor, w_hh: Tensor, carry: Tensor,
    w_hr: Tensor | None, steps: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Back through consecutive steps -> da, and the gradients by h and the state before them, complete; dh_all.

    dh and dstate, by h and the state after them, are overwritten. carry is w_hh in the dtype in which the gradient by h
    is carried to the steps before: the accumulator's, but where that gradient is rounded anyway.
    """
    spec = plan.spec
    save_gates, save_extra = launch.saves(spec)
    da, dh, dstate, dh_all = launch.backward(
        plan,
        h.new_zeros(h.shape) if dy is None else _aligned(_masked(dy, steps)),
        dh,
        dstate,
        gates if save_gates else None,
        extra if spec.cell == "lstm" else h,
        _aligned(state0),
        extra if save_extra else None,
        w_hh,
        w_hr=w_hr,
        steps=steps,
        dcells=None if dcells is None else _aligned(_masked(dcells, steps)),
        reverse=reverse,
    )
    first = -1 if reverse else 0
    through_w_hh = (_by_recurrent_product(spec, da[first]).to(carry.dtype) @ carry).to(dh.dtype)
    if steps is not None:
        through_w_hh = torch.where(_carries(steps[first]), through_w_hh, 0)
    return da, dh + through_w_hh, dstate, dh_all


def _activated_gates(
    spec: CellSpec, x: Tensor, h_before: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the forward kernel keeps for backward beside the states, from x[t] and h[t-1] of all steps at once.

    -> gates, and of the GRU W_hn h[t-1] + b_hn.
    """
    if spec.cell == "rnn":
        return None, None
    H = w_hh.shape[0] // spec.gates
    high = torch.promote_types(x.dtype, torch.float32)
    x_gates, h_gates = linear(x, w_ih, b_ih).to(high), linear(h_before, w_hh, b_hh)
    if spec.cell == "lstm":
        gates = x_gates.add_(h_gates)
        gates[..., : 2 * H].sigmoid_()
        gates[..., 2 * H : 3 * H].tanh_()
        gates[..., 3 * H :].sigmoid_()
        return gates.to(x.dtype), None
    gates, product = x_gates, h_gates[..., 2 * H :]
    r = gates[..., : 2 * H].add_(h_gates[..., : 2 * H]).sigmoid_()[..., :H]
    gates[..., 2 * H :].addcmul_(r, product.to(high)).tanh_()
    return gates.to(x.dtype), product.contiguous()


def _input_gradient(spec: CellSpec, da: Tensor, w_ih: Tensor) -> Tensor:
    """dx [T, B, I]."""
    if spec.cell == "gru":
        w_ih = w_ih.roll(w_ih.shape[0] // spec.gates, 0)
    T, B, _ = da.shape
    return (_rows(_by_input_product(spec, da)) @ w_ih).view(T, B, -1)


def _weight_gradients(
    spec: CellSpec, reverse: bool, needs: Sequence[bool], samples: int, da: Tensor, x: Tensor, h: Tensor, h0: Tensor,
    steps: Tensor | None, dh_all: Tensor | None, r: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """Those by w_ih, w_hh, b_ih, b_hh and w_hr, [samples, ...], where `needs` says so."""

    def of_one(
        da: Tensor, x: Tensor, h: Tensor, h0: Tensor, steps: Tensor | None, dh_all: Tensor | None, r: Tensor | None
    ) -> tuple[Tensor, ...]:
        by_x, by_h = _by_input_product(spec, da), _by_recurrent_product(spec, da)
        found = (
            _in_gate_order(spec, _summed_product(by_x, x)) if needs[0] else None,
            _recurrent_weight_gradient(by_h, h, h0, steps, reverse) if needs[1] else None,
            _in_gate_order(spec, by_x.sum((0, 1))) if needs[2] else None,
            by_h.sum((0, 1)) if needs[3] else None,
            _summed_product(dh_all, r) if needs[4] else None,
        )
        return tuple(d for d in found if d is not None)

    if not any(needs):
        return [None] * len(needs)
    tensors, dims = (da, x, h, h0, steps, dh_all, r), (1, 1, 1, 0, 1, 1, 1)
    found = iter(per_sample(of_one, samples, tensors, dims, (0,) * sum(needs)))
    return [next(found) if need else None for need in needs]


def _recurrent_weight_gradient(by_h: Tensor, h: Tensor, h0: Tensor, steps: Tensor | None, reverse: bool) -> Tensor:
    """sum over t of by_h[t]^T h[t-1], h[t-1] in the order of processing and zero where the step starts from zeros."""
    T = h.shape[0]
    if isinstance(T, torch.SymInt):
        # For compilers, to which T-1 steps would make T = 2 a case of its own.
        return _summed_product(by_h, _previous(h, h0, steps, reverse))
    first, rest, before = (T - 1, slice(0, T - 1), slice(1, T)) if reverse else (0, slice(1, T), slice(0, T - 1))
    h_before = h[before]
    if steps is not None:
        carries = _carries(steps)
        h0, h_before = torch.where(carries[first], h0, 0), torch.where(carries[rest], h_before, 0)
    found = by_h[first].t() @ h0
    return found if T == 1 else torch.addmm(found, _rows(by_h[rest]).t(), _rows(h_before))


def _summed_product(left: Tensor, right: Tensor) -> Tensor:
    """sum over t of left[t]^T right[t]."""
    return _rows(left).t() @ _rows(right)


def _rows(tensor: Tensor) -> Tensor:
    """[T, B, any] -> [T*B, any]. `reshape` has a batching rule for is_grads_batched too, which `flatten` lacks."""
    T, B, columns = tensor.shape
    return tensor.reshape(T * B, columns)


def _unprojected(gates: Tensor, cells: Tensor, steps: Tensor | None) -> Tensor:
    """r = o * tanh(c), what an LSTM projects: cheaper to compute again than to keep."""
    return _masked(gates[..., -cells.shape[-1] :] * cells.tanh(), steps)


def _by_input_product(spec: CellSpec, da: Tensor) -> Tensor:
    """The slots of da by the input product: of the GRU in the order n, r, z."""
    return da[..., : da.shape[-1] // 4 * 3] if spec.cell == "gru" else da


def _by_recurrent_product(spec: CellSpec, da: Tensor) -> Tensor:
    """The slots of da by the recurrent product, in torch.nn's order."""
    return da[..., da.shape[-1] // 4 :] if spec.cell == "gru" else da


def _in_gate_order(spec: CellSpec, by_x: Tensor) -> Tensor:
    """From the order of _by_input_product along the rows to torch.nn's."""
    return by_x.roll(-(by_x.shape[0] // spec.gates), 0) if spec.cell == "gru" else by_x


def _previous(h: Tensor, h_first: Tensor, steps: Tensor | None, reverse: bool) -> Tensor:
    """h[t-1] of each of these steps, in the order of processing; zero where a step starts from zeros."""
    T = h.shape[0]
    shifted = torch.cat((h, h_first[None]))[1:] if reverse else torch.cat((h_first[None], h))[:T]
    return shifted if steps is None else torch.where(_carries(steps), shifted, 0)


def _carries(steps: Tensor) -> Tensor:
    """Where the state before a step matters to it: it counts and is not reset. [..., B, 1]"""
    return (steps & (VALID | RESET) == VALID).unsqueeze(-1)


def _masked(tensor: Tensor, steps: Tensor | None) -> Tensor:
    """Zero where a step does not count. tensor [T, B, any]"""
    return tensor if steps is None else torch.where((steps & VALID).bool().unsqueeze(-1), tensor, 0)


def _last_gradients(h0: Tensor, H: int, dh_n: Tensor | None, dc_n: Tensor | None) -> tuple[Tensor, Tensor]:
    """dh [B, P] and dstate [B, H] after the last step, of their own and in the accumulator's dtype."""
    high = torch.promote_types(h0.dtype, torch.float32)
    zeros = {"dh": (h0.shape, dh_n), "dstate": ((h0.shape[0], H), dc_n)}
    dh, dstate = (
        h0.new_zeros(shape, dtype=high) if d is None else d.to(high, memory_format=torch.contiguous_format, copy=True)
        for shape, d in zeros.values()
    )
    return dh, dstate


def _spec(cell: str, activation: str, b_hh: Tensor | None, w_hr: Tensor | None) -> CellSpec:
    return CellSpec(cell, activation, b_hh is not None, 0 if w_hr is None else w_hr.shape[0])


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
