"""Derivatives of a sequence of any order and kind: autograd Functions around the operators of ops.py.

    _Sequence              forward on the kernels, and its gradients by backward on the kernels
    lstm_triton::forward   the same, of the bare operator: what compiled, exported and traced programs are made of
    _SequenceGradients     the same backward where derivatives of it are wanted, which come from `reference`
    _TransformedSequence   forward under the transforms of torch.func

The rules for vmap of these two run the kernels on a larger batch, or once for each set of weights. Forward-mode
derivatives are all computed by `reference`: where transforms are nested, PyTorch silently drops what comes of a
Function's own rule for them, `jvp`.

What is kept for backward: the inputs, which exist anyway, and beside them
    LSTM   y, c and the gates: 6 numbers a step and unit; with memory="recompute" y and c: 2
    GRU    y, the gates and W_hn h[t-1] + b_hn: 5; with memory="recompute" y: 1
    RNN    y: 1; with zoneout, layer norm, or an activation whose value does not tell its derivative, the gate: 2
    others (registry.py)    y, and of the gates, c and one tile more what their backward reads
    layer norm    the normalised recurrent product too: G more, none with memory="recompute"
and where `steps` are given h, in which the steps that do not count hold their state, instead of y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .ops import Run
from .products import per_sample
from .spec import RESET, VALID, CellSpec
from .transforms import forward_mode, transformed

#: Where the batch lies: in ops.TENSORS; in y, h_n, c_n, cells; in Kept's four and h; and in the gradients by what is
#: differentiable, where those by the weights come with the samples first. recurrent_mask: see _with_mask.
_INPUTS = (1, 0, 0, None, None, None, None, None, None, 0, 1, None)
_RESULTS = (1, 0, 0, 1)
_KEPT = (1, 1, 1, 1, 1)
_GRADIENTS = (1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
_STEPS, _SEED, _MASK = (ops.TENSORS.index(name) for name in ("steps", "seed", "recurrent_mask"))


def sequence(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    steps: Tensor | None, seed: Tensor | None,
    *, spec: CellSpec, reverse: bool, engine: str, tile: tuple[int, int] | None, memory: str, return_cells: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Run one layer in one direction on the kernels, with derivatives of any order.

    x [T, B, I], h0 [B, P], c0 [B, H] for the LSTM, w_ih [G*H, I], w_hh [G*H, P], biases [G*H], both or neither, w_hr
    [P, H] or None (then P = H), params [K, H] with the rows that spec.rows names, recurrent_mask [B, P] or [G, B, P],
    all of one dtype; without w_ih and b_ih x is the input product [T, B, G*H]. steps [T, B] uint8 of spec.VALID and
    spec.RESET, or None: every step counts. seed [1] int64, or None: zoneout takes the mean. x is zero where a step does
    not count. The other arguments are lt.functional's.

    Returns y [T, B, P], h_n [B, P], c_n [B, H] or None, and with return_cells cells [T, B, H], otherwise None.
    """
    run = Run(spec.of_tensors(True, 0), reverse, engine, tile, memory, return_cells)
    seed = seed if spec.zoneout != (0.0, 0.0) else None
    tensors = [x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, params, recurrent_mask, steps, seed]
    compiling, under_transforms = torch.compiler.is_compiling(), transformed()
    if forward_mode() or (under_transforms and (compiling or seed is not None)):
        # What zoneout draws goes by the row of the batch, which the rules for vmap would change.
        return _by_reference(run, *tensors)
    if under_transforms:
        return _results(run, False, *tensors)[:4]
    # A program holds the operator, which can be written to a file; elsewhere a Function of our own costs less.
    # torch.jit.trace runs once more without gradients, and wants to find the same.
    tracing = torch.jit.is_tracing()
    training = _wanted(tensors) and not tracing
    if compiling or tracing or not training:
        return ops.forward(run, training, *tensors)[:4]
    return _Sequence.apply(*tensors, run)


def _results(run: Run, training: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """ops.forward under transforms, or once they are dealt with; `training` where one of these may want gradients."""
    training = training or (torch.is_grad_enabled() and transformed())
    if training or transformed():
        return _TransformedSequence.apply(*tensors, run, training)
    return ops.forward(run, False, *tensors)


def _gradients(run: Run, needs: tuple[bool, ...], samples: int, *tensors: Tensor | None) -> Sequence[Tensor | None]:
    """ops.gradients of the gradients by the results, the inputs, and what was kept; differentiable."""
    recorded = torch.is_grad_enabled()
    if forward_mode() or (recorded and _batched_grads(tensors[:4])):
        return _gradients_by_reference(run, needs, samples, *tensors[: 4 + len(_INPUTS)])
    if recorded or transformed():
        return _SequenceGradients.apply(*tensors, run, needs, samples)
    return _on_kernels(run, needs, samples, tensors)


def _on_kernels(
    run: Run, needs: tuple[bool, ...], samples: int, tensors: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    inputs = 4 + len(_INPUTS)
    return ops.gradients(run, needs, samples, tensors[:4], tensors[4:inputs], tensors[inputs:])


def _wanted(tensors: Sequence[Tensor | None]) -> bool:
    """Gradients are: in inference mode nothing can be kept for them, whatever the grad mode in it."""
    # Dynamo does not trace the question, and compiled code does not change the answer.
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    recording = torch.is_grad_enabled() and not inference
    return recording and any(t is not None and t.requires_grad for t in tensors)


def _batched_grads(grads: Sequence[Tensor | None]) -> bool:
    """torch.autograd.grad's is_grads_batched is about: PyTorch would forget what a Function in it was computed from."""
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


class _Sequence(torch.autograd.Function):
    """ops.forward of run and its tensors, in another order, outside transforms."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        *tensors, ctx.run = args
        output = ops.forward(ctx.run, True, *tensors)
        ctx.save_for_backward(*tensors, *_kept(output))
        ctx.set_materialize_grads(False)
        return output[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_input_gradients(ctx, grads, ctx.saved_tensors), None, None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The same of lstm_triton::forward. `training` was settled when the program was made, and may be False."""
    *tensors, cell, reverse, engine, tile, ctx.training, memory, return_cells = inputs
    ctx.run = Run(CellSpec.parse(cell), reverse, engine, tuple(tile) or None, memory, return_cells)
    kept = _kept(ops.results_of(ctx.run, ctx.training, tensors[_STEPS], output)) if ctx.training else ()
    ctx.save_for_backward(*tensors, *kept)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors[: len(_INPUTS)]
    kept = ctx.saved_tensors[len(_INPUTS) :] or _kept(ops.forward(ctx.run, True, *tensors))
    grads = ops.results_of(ctx.run, False, tensors[_STEPS], grads)[:4]
    return *_input_gradients(ctx, grads, (*tensors, *kept)), *(None,) * 9


torch.library.register_autograd("lstm_triton::forward", _differentiate, setup_context=_save, lib=ops.library)


class _TransformedSequence(torch.autograd.Function):
    """ops.forward of run, training and its tensors, in another order. What is kept for backward is among the results,
    so that the transforms can hand it on; no derivatives go through it.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        *tensors, run, training = args
        return ops.forward(run, training, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.run, _ = inputs
        ctx.save_for_backward(*tensors, *_kept(output))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_input_gradients(ctx, grads[:4], ctx.saved_tensors), *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor | None, ...], Any]:
        *tensors, run, training = args
        dims, size = in_dims[:-2], info.batch_size
        if any(dim is not None for dim in dims[3:_MASK]):
            return _one_by_one(lambda *some: _results(run, training, *some), size, dims, tensors)
        where = _with_mask(_INPUTS, tensors[_MASK], dims[_MASK])
        found = _results(run, training, *_fold(size, tensors, dims, where))
        return _unfold(size, found, (*_RESULTS, *_KEPT))


class _SequenceGradients(torch.autograd.Function):
    """ops.gradients of run, needs, samples and its tensors, in another order; differentiable in the gradients by the
    results and in the inputs, `reference` saying how.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        *tensors, run, needs, samples = args
        return tuple(_on_kernels(run, needs, samples, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.run, ctx.needs, ctx.samples = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: 4 + len(_INPUTS)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[: 4 + ops.DIFFERENTIABLE]) if need]
        saved = ctx.saved_tensors
        with _no_autocast(saved[4]):
            found = _vjp(
                lambda *tensors: _gradients_by_reference(ctx.run, ctx.needs, ctx.samples, *tensors),
                saved, wanted, grads,
            )  # fmt: skip
        return *found, *(None,) * (len(_KEPT) + 3)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor | None, ...], Any]:
        *tensors, run, needs, samples = args
        dims, size = in_dims[:-3], info.batch_size
        if any(dim is not None for dim in dims[7 : 4 + _MASK]):
            return _one_by_one(lambda *some: _gradients(run, needs, samples, *some), size, dims, tensors)
        inputs = _with_mask(_INPUTS, tensors[4 + _MASK], dims[4 + _MASK])
        folded = _fold(size, tensors, dims, (*_RESULTS, *inputs, *_KEPT))
        found = _gradients(run, needs, size * samples, *folded)
        return _unfold(size, found, (*_GRADIENTS[:-1], inputs[_MASK]))


def _kept(output: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """gates, extra, normed, stats, h, from what ops.forward returned."""
    y, _, _, cells, gates, extra, normed, stats, h = output
    return gates, cells if extra is None else extra, normed, stats, y if h is None else h


def _with_mask(where: tuple[int | None, ...], mask: Tensor | None, dim: int | None) -> tuple[int | None, ...]:
    """`where` the batch lies in the inputs, recurrent_mask [B, P] or [G, B, P] among them, which `dim` more vmaps."""
    dims = 2 if mask is None else mask.dim() - (dim is not None)
    return tuple(dims - 2 if i == _MASK else at for i, at in enumerate(where))


def _input_gradients(
    ctx: Any, grads: Sequence[Tensor | None], saved: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The gradients by the differentiable inputs, from those by y, h_n, c_n, cells and what was saved."""
    if all(g is None for g in grads):
        return (None,) * ops.DIFFERENTIABLE
    with _no_autocast(saved[0]):
        found = _gradients(ctx.run, ctx.needs_input_grad[: ops.DIFFERENTIABLE], 1, *grads, *saved)
    return [d if d is None or i < 3 or i == _MASK else d.squeeze(0) for i, d in enumerate(found)]


def _no_autocast(x: Tensor) -> AbstractContextManager:
    """A region that autocasts around backward is none of ours: the forward pass has settled the dtypes."""
    return torch.autocast(x.device.type, enabled=False)


def _fold(
    size: int, tensors: Sequence[Tensor | None], dims: Sequence[int | None], where: Sequence[int | None]
) -> list[Tensor | None]:
    """The vmapped dimension, at `dims`, into the batch, at `where`: the batches of all one after the other."""

    def fold(tensor: Tensor, dim: int | None, at: int) -> Tensor:
        parts = (
            tensor.movedim(dim, at)
            if dim is not None
            else tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
        )
        return parts.flatten(at, at + 1)

    return [t if t is None or at is None else fold(t, dim, at) for t, dim, at in zip(tensors, dims, where, strict=True)]


def _unfold(
    size: int, tensors: Sequence[Tensor | None], where: tuple[int, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """The batch, at `where`, in `size` parts: what a rule for vmap returns."""
    parts = (None if t is None else t.unflatten(at, (size, -1)) for t, at in zip(tensors, where, strict=True))
    return tuple(parts), where


def _one_by_one(
    function: Callable[..., Sequence[Tensor | None]], size: int, dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:  # fmt: skip
    """function() of each of `size` along `dims`: what a rule for vmap returns."""
    found = [
        function(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)))
        for i in range(size)
    ]
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in zip(*found, strict=True))
    return stacked, (0,) * len(stacked)


def _by_reference(run: Run, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """y, h_n, c_n, cells by `reference`, in fp32 or fp64 inside as on the kernels."""
    *tensors, steps, seed = tensors
    dtype = tensors[0].dtype
    high = torch.promote_types(dtype, torch.float32)
    tensors = [None if t is None else t.to(high) for t in tensors]
    mask, reset = (None, None) if steps is None else ((steps & VALID).bool(), (steps & RESET).bool())
    b_hh, w_hr = tensors[6:8]
    results = reference.sequence(
        *tensors, None, mask, reset, seed, spec=run.spec.of_tensors(b_hh is not None, 0 if w_hr is None else len(w_hr)),
        reverse=run.reverse, return_cells=run.return_cells,
    )  # fmt: skip
    return tuple(None if t is None else t.to(dtype) for t in results)


def _gradients_by_reference(
    run: Run, needs: tuple[bool, ...], samples: int, *tensors: Tensor | None
) -> list[Tensor | None]:
    """ops.gradients by `reference`, from the gradients by the results and the inputs."""

    def of_one(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        wanted = [i for i, need in enumerate(needs) if need]
        found = _vjp(lambda *inputs: _by_reference(run, *inputs), tensors[4:], wanted, tensors[:4])
        return tuple(d for d in found if d is not None)

    inputs = _with_mask(_INPUTS, tensors[4 + _MASK], None)
    out_dims = tuple(at for at, need in zip((*_GRADIENTS[:-1], inputs[_MASK]), needs, strict=True) if need)
    found = iter(per_sample(of_one, samples, tensors, (*_RESULTS, *inputs), out_dims))
    gradients = [next(found) if need else None for need in needs]
    # By x, h0, c0 and the mask the samples are rows of the batch again.
    of_rows = (0, 1, 2, _MASK)
    return [d if d is None or i not in of_rows else d.reshape(tensors[4 + i].shape) for i, d in enumerate(gradients)]


def _vjp(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None], wanted: Sequence[int],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of function(*inputs) by the inputs at `wanted`, None for the others; differentiable again.

    grads: by the results, None for zero; if all are, so are the gradients.
    """
    if all(g is None for g in grads):
        return [None] * len(inputs)

    def of_wanted(*some: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(wanted, some, strict=True))
        results = function(*(given.get(i, t) for i, t in enumerate(inputs)))
        return tuple(r for r, g in zip(results, grads, strict=True) if g is not None)

    _, pull = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))
    found = dict(zip(wanted, pull(tuple(g for g in grads if g is not None)), strict=True))
    return [found.get(i) for i in range(len(inputs))]
