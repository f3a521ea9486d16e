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
    RNN    y: 1
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
from .spec import RESET, VALID, CellSpec
from .transforms import forward_mode, transformed

#: Where the batch lies: in x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, steps; in y, h_n, c_n, cells; in gates, extra, h;
#: and in the gradients of all inputs but steps, where those by the weights come with the samples first.
_INPUTS = (1, 0, 0, None, None, None, None, None, 1)
_RESULTS = (1, 0, 0, 1)
_KEPT = (1, 1, 1)
_GRADIENTS = (1, 0, 0, 0, 0, 0, 0, 0)


def sequence(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, steps: Tensor | None,
    *, spec: CellSpec, reverse: bool, engine: str, tile: tuple[int, int] | None, memory: str, return_cells: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Run one layer in one direction on the kernels, with derivatives of any order.

    x [T, B, I], h0 [B, P], c0 [B, H] for the LSTM, w_ih [G*H, I], w_hh [G*H, P], biases [G*H], both or neither, w_hr
    [P, H] or None (then P = H), all of one dtype; steps [T, B] uint8 of spec.VALID and spec.RESET, or None: every step
    counts. x is zero where a step does not count. The other arguments are lt.functional's.

    Returns y [T, B, P], h_n [B, P], c_n [B, H] or None, and with return_cells cells [T, B, H], otherwise None.
    """
    run = Run(spec.cell, spec.activation, reverse, engine, tile, memory, return_cells)
    tensors = [x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, steps]
    compiling, under_transforms = torch.compiler.is_compiling(), transformed()
    if forward_mode() or (compiling and under_transforms):
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
    """ops.gradients, differentiable."""
    recorded = torch.is_grad_enabled()
    if forward_mode() or (recorded and _batched_grads(tensors[:4])):
        return _gradients_by_reference(run, needs, samples, *tensors[:-3])
    if recorded or transformed():
        return _SequenceGradients.apply(*tensors, run, needs, samples)
    return ops.gradients(run, needs, samples, *tensors)


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
        return *_input_gradients(ctx, grads, ctx.saved_tensors), None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The same of lstm_triton::forward. `training` was settled when the program was made, and may be False."""
    *tensors, cell, activation, reverse, engine, tile, ctx.training, memory, return_cells = inputs
    ctx.run = Run(cell, activation, reverse, engine, tuple(tile) or None, memory, return_cells)
    kept = _kept(ops.results_of(ctx.run, ctx.training, tensors[8], output)) if ctx.training else ()
    ctx.save_for_backward(*tensors, *kept)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors[:9]
    kept = ctx.saved_tensors[9:] or _kept(ops.forward(ctx.run, True, *tensors))
    grads = ops.results_of(ctx.run, False, tensors[8], grads)[:4]
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
        return *_input_gradients(ctx, grads[:4], ctx.saved_tensors), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor | None, ...], Any]:
        *tensors, run, training = args
        dims, size = in_dims[:-2], info.batch_size
        if any(dim is not None for dim in dims[3:8]):
            return _one_by_one(lambda *some: _results(run, training, *some), size, dims, tensors)
        found = _results(run, training, *_fold(size, tensors, dims, _INPUTS))
        return _unfold(size, found, (*_RESULTS, *_KEPT))


class _SequenceGradients(torch.autograd.Function):
    """ops.gradients of run, needs, samples and its tensors, in another order; differentiable in the gradients by the
    results and in the inputs, `reference` saying how.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        *tensors, run, needs, samples = args
        return tuple(ops.gradients(run, needs, samples, *tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.run, ctx.needs, ctx.samples = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:13])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[:12]) if need]
        saved = ctx.saved_tensors
        with _no_autocast(saved[4]):
            found = _vjp(
                lambda *tensors: _gradients_by_reference(ctx.run, ctx.needs, ctx.samples, *tensors),
                saved, wanted, grads,
            )  # fmt: skip
        return *found, *(None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor | None, ...], Any]:
        *tensors, run, needs, samples = args
        dims, size = in_dims[:-3], info.batch_size
        if any(dim is not None for dim in dims[7:12]):
            return _one_by_one(lambda *some: _gradients(run, needs, samples, *some), size, dims, tensors)
        folded = _fold(size, tensors, dims, (*_RESULTS, *_INPUTS, *_KEPT))
        return _unfold(size, _gradients(run, needs, size * samples, *folded), _GRADIENTS)


def _kept(output: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """gates, extra, h, from what ops.forward returned."""
    y, _, _, cells, gates, extra, h = output
    return gates, cells if extra is None else extra, y if h is None else h


def _input_gradients(
    ctx: Any, grads: Sequence[Tensor | None], saved: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The gradients by all inputs but steps, from those by y, h_n, c_n, cells and what was saved."""
    if all(g is None for g in grads):
        return (None,) * 8
    with _no_autocast(saved[0]):
        found = _gradients(ctx.run, ctx.needs_input_grad[:8], 1, *grads, *saved)
    return [d if d is None or i < 3 else d.squeeze(0) for i, d in enumerate(found)]


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
    *tensors, steps = tensors
    dtype = tensors[0].dtype
    high = torch.promote_types(dtype, torch.float32)
    tensors = [None if t is None else t.to(high) for t in tensors]
    mask, reset = (None, None) if steps is None else ((steps & VALID).bool(), (steps & RESET).bool())
    results = reference.sequence(
        *tensors, None, mask, reset, spec=run.spec, reverse=run.reverse, return_cells=run.return_cells
    )
    return tuple(None if t is None else t.to(dtype) for t in results)


def _gradients_by_reference(
    run: Run, needs: tuple[bool, ...], samples: int, *tensors: Tensor | None
) -> list[Tensor | None]:
    """ops.gradients by `reference`, from the gradients by the results and the inputs."""

    def of_one(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        wanted = [i for i, need in enumerate(needs) if need]
        found = _vjp(lambda *inputs: _by_reference(run, *inputs), tensors[4:], wanted, tensors[:4])
        return tuple(d for d in found if d is not None)

    out_dims = tuple(at for at, need in zip(_GRADIENTS, needs, strict=True) if need)
    found = iter(ops.per_sample(of_one, samples, tensors, (*_RESULTS, *_INPUTS), out_dims))
    gradients = [next(found) if need else None for need in needs]
    # By x, h0 and c0 the samples are rows of the batch again.
    return [d if d is None or i >= 3 else d.reshape(tensors[4 + i].shape) for i, d in enumerate(gradients)]


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
