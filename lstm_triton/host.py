"""One layer in one direction where no kernel runs: on torch's own layers (ATen) where they have it, else `reference`.

What runs where:
    plain, projection (w_hr)    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu
    lengths alone               the same on a packed sequence, as torch.nn.utils.rnn packs it; reads the lengths, so
                                `reference` on the meta device
    mask, reset, return_cells   `reference`, step by step in eager PyTorch
    any option of the cell      the same, since torch.nn has none of them
    torch.func, forward mode    `reference`: ATen has no batching rules for its layers and no tangents for packing
    torch.compile and export    any of these inside one operator, lstm_triton::host_forward, so that the time loop is
                                not unrolled and compiled again for every T; its backward runs forward a second time
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import reference
from .spec import CellSpec
from .transforms import forward_mode, refuse_forward_mode, transformed

_TENSORS = (
    "Tensor x, Tensor h0, Tensor? c0, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
    "Tensor? params, Tensor? recurrent_mask, Tensor? lengths, Tensor? mask, Tensor? reset, Tensor? seed"
)
#: How many of them have gradients, and come first.
_DIFFERENTIABLE = 10
#: cell: CellSpec.untold. Under torch.compile a size that becomes text is a constant from then on.
_SETTINGS = "str cell, bool reverse, bool return_cells"
_library = torch.library.Library("lstm_triton", "FRAGMENT")
_library.define(f"host_forward({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"host_backward(Tensor dy, Tensor dh_n, Tensor? dc_n, Tensor? dcells, {_TENSORS}, {_SETTINGS}) "
    f"-> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})"
)


def sequence(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, reset: Tensor | None, seed: Tensor | None,
    *, spec: CellSpec, reverse: bool, return_cells: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """-> y [T, B, P|H], h_n [B, P|H], c_n [B, H] or None, cells [T, B, H] or None. Shapes, semantics: functional.lstm.

    w_ih None: x is [T, B, G*H], the finished input part of the pre-activations. params [K, H]: what spec.rows names.
    T = 0 raises torch.nn's RuntimeError.
    """
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, params, recurrent_mask, lengths, mask, reset, seed)
    if not torch.compiler.is_compiling() or transformed() or forward_mode():
        return _run(spec, reverse, return_cells, *tensors)
    y, h_n, c_n, cells = torch.ops.lstm_triton.host_forward(*tensors, spec.untold, reverse, return_cells)
    return y, h_n, None if c0 is None else c_n, cells if return_cells else None


def _run(
    spec: CellSpec, reverse: bool, return_cells: bool,
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, reset: Tensor | None, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`sequence`, eagerly."""
    T, B, _ = x.shape
    of_torch = spec.plain and recurrent_mask is None and w_ih is not None
    if not of_torch and T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    unreadable = lengths is not None and (lengths.is_meta or isinstance(lengths, FakeTensor))
    stepwise = mask is not None or reset is not None or return_cells or unreadable
    # ATen's layers know neither forward mode nor torch.func.
    if not of_torch or ((stepwise or transformed() or forward_mode()) and T > 0):
        return reference.sequence(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, params, recurrent_mask, lengths, mask, reset, seed,
            spec=spec, reverse=reverse, return_cells=return_cells,
        )  # fmt: skip
    states = [h0] if c0 is None else [h0, c0]
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    # Packing refuses an empty batch, whose lengths say nothing anyway.
    if lengths is not None and T > 0 and B > 0:
        y, *last = _run_packed(spec, x, states, weights, lengths, reverse)
    else:
        y, *last = _layer(spec, (x.flip(0) if reverse else x,), states, weights)
        y = y.flip(0) if reverse else y
    return (y, *last, None, None)[:4]


def _run_packed(
    spec: CellSpec, x: Tensor, states: list[Tensor], weights: list[Tensor], lengths: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    """-> y [T, B, P|H] and the last states."""
    T = x.shape[0]
    lengths = lengths.long().clamp(0, T)
    # Packing has no rows without a step: they take one, on zeros, and what comes of it is dropped.
    unused = (lengths == 0)[:, None]
    if reverse:
        # Every row back to front within its own length.
        t = torch.arange(T, device=x.device)[:, None]
        order = torch.where(t < lengths, lengths - 1 - t, t)[..., None]
        x = x.gather(0, order.expand_as(x))
    x = x.masked_fill(unused, 0)
    packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), enforce_sorted=False)
    ordered = [s.masked_fill(unused, 0)[packed.sorted_indices] for s in states]
    data, *last = _layer(spec, packed[:2], ordered, weights)
    y, _ = pad_packed_sequence(PackedSequence(data, *packed[1:]), total_length=T)
    y = y.masked_fill(unused, 0)
    if reverse:
        y = y.gather(0, order.expand_as(y))
    return y, *(torch.where(unused, s, n[packed.unsorted_indices]) for s, n in zip(states, last, strict=True))


def _layer(
    spec: CellSpec, inputs: tuple[Tensor, ...], states: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, ...]:
    """ATen's layer on x [T, B, I], or on packed data and batch sizes -> outputs, last states."""
    # biases, layers, dropout, training, bidirectional, and without packing batch_first
    settings = (len(weights) >= 4, 1, 0.0, False, False, *([False] if len(inputs) == 1 else []))
    initial = [s[None] for s in states]
    if spec.cell == "lstm":
        y, *last = torch.lstm(*inputs, initial, weights, *settings)
    else:
        rnn = torch.rnn_relu if spec.activation == "relu" else torch.rnn_tanh
        function = {"gru": torch.gru, "rnn": rnn}[spec.cell]
        y, *last = function(*inputs, *initial, weights, *settings)
    return y, *(s[0] for s in last)


def _run_operator(*args: Any) -> tuple[Tensor | None, ...]:
    """`_run` of what the operators take."""
    *tensors, cell, reverse, return_cells = args
    b_hh, w_hr = tensors[6:8]
    spec = CellSpec.parse(cell).of_tensors(bias=b_hh is not None, proj=0 if w_hr is None else w_hr.shape[0])
    return _run(spec, reverse, return_cells, *tensors)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    """What does not apply (c_n of a GRU, cells where not asked for) is an empty tensor."""
    refuse_forward_mode()
    x = args[0]
    with torch.no_grad():
        return tuple(x.new_empty(0) if t is None else t.contiguous() for t in _run_operator(*args))


def _fake_forward(x: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return_cells = rest[-1]
    T = x.shape[0]
    return (
        x.new_empty(T, *h0.shape),
        x.new_empty(h0.shape),
        x.new_empty(0) if c0 is None else x.new_empty(c0.shape),
        x.new_empty(T, *c0.shape) if return_cells else x.new_empty(0),
    )


def _backward(
    dy: Tensor, dh_n: Tensor, dc_n: Tensor | None, dcells: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients by all up to recurrent_mask, empty for those that are None. Runs forward again."""
    tensors, rest = args[:_DIFFERENTIABLE], args[_DIFFERENTIABLE:]
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    with _recording():
        outputs = _run_operator(*leaves, *rest)
    found = iter(_vjp(outputs, leaves, (dy, dh_n, dc_n, dcells), create_graph=False))
    # Copies: an operator's results must not share memory with each other or its arguments, as autograd's may.
    return tuple(
        dy.new_empty(0) if t is None else next(found).clone(memory_format=torch.contiguous_format) for t in leaves
    )


def _vjp(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None],
    create_graph: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients by those inputs that require one."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = [(y, d) for y, d in zip(outputs, grads, strict=True) if y is not None]
    return torch.autograd.grad([y for y, _ in found], wanted, [d for _, d in found], create_graph=create_graph)


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd records, also inside an operator's implementation.

    There PyTorch may have excluded autograd's keys from dispatch (under any TorchDispatchMode it has), and then
    enable_grad() alone records nothing. Nothing public includes them again. torch.utils.checkpoint uses the same guard,
    and should it ever fail, torch.autograd.grad raises: no wrong gradient can come of it.
    """
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


def _fake_backward(
    dy: Tensor, dh_n: Tensor, dc_n: Tensor | None, dcells: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(dy.new_empty(0 if t is None else t.shape) for t in args[:_DIFFERENTIABLE])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, cell, reverse, return_cells = inputs
    ctx.settings = (cell, reverse, return_cells)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor, dh_n: Tensor, dc_n: Tensor, dcells: Tensor) -> tuple[Tensor | None, ...]:
    tensors, (*_, return_cells) = ctx.saved_tensors, ctx.settings
    inputs = tensors[:_DIFFERENTIABLE]
    grads = (dy, dh_n, None if tensors[2] is None else dc_n, dcells if return_cells else None)
    if torch.is_grad_enabled():  # for derivatives of the gradients, which the operator has none of
        found = iter(_vjp(_run_operator(*tensors, *ctx.settings), inputs, grads, create_graph=True))
        by_tensor = [next(found) if t is not None and t.requires_grad else None for t in inputs]
    else:
        found = torch.ops.lstm_triton.host_backward(*grads, *tensors, *ctx.settings)
        by_tensor = [None if t is None else d for t, d in zip(inputs, found, strict=True)]
    return *by_tensor, *(None,) * (len(tensors) - len(inputs) + len(ctx.settings))


for _name, _function, _fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    _library.impl(f"host_{_name}", _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lstm_triton::host_{_name}", _fake, lib=_library)
torch.library.register_autograd("lstm_triton::host_forward", _differentiate, setup_context=_save, lib=_library)
