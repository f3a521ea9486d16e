"""The recurrence as PyTorch operators: opaque to torch.compile, with fakes, and the autograd function around them.

lstm_triton::forward and lstm_triton::backward run one layer in one direction. Everything that is one product over all
time steps (dx, the weight gradients) stays outside, in torch.matmul, where the compiler sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch
from .planner import make_plan
from .plans import LaunchPlan
from .spec import CellSpec

_library = torch.library.Library("lstm_triton", "DEF")
_library.define(
    "forward(Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, str cell, "
    "str activation, bool reverse, str engine, int[] tile, bool training) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor dy, Tensor dh_n, Tensor? dc_n, Tensor gates, Tensor y, Tensor extra, Tensor h0, Tensor? c0, "
    "Tensor w_hh, str cell, str activation, bool bias, bool reverse, str engine, int[] tile) "
    "-> (Tensor, Tensor, Tensor)"
)


def plan_for(spec: CellSpec, x: Tensor, H: int, engine: str, tile: Sequence[int] | None) -> LaunchPlan:
    """The plan for x [T, B, any] where it lives. fp32 products follow torch's switch for cuDNN's RNNs."""
    T, B, _ = x.shape
    device, precision = launch.device_of(x), fp32_precision()
    return make_plan(spec, T, B, H, x.dtype, device, engine=engine, tile=tuple(tile or ()) or None, precision=precision)


def fp32_precision() -> str:
    """How torch.backends.cudnn wants fp32 products in recurrent layers: "tf32" or "ieee"."""
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"


def _forward(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    cell: str, activation: str, reverse: bool, engine: str, tile: list[int], training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y [T, B, H], h_n [B, H], c_n [B, H], and for backward the activated gates [T, B, G*H] and extra [T, B, H].

    What does not apply (c_n of a GRU, gates and extra outside training) is an empty tensor.
    """
    spec = CellSpec(cell, activation, b_hh is not None)
    T, B, _ = x.shape
    x2 = x.reshape(T * B, -1)
    gates = (x2 @ w_ih.t() if b_ih is None else torch.addmm(b_ih, x2, w_ih.t())).view(T, B, -1)
    plan = plan_for(spec, x, w_hh.shape[1], engine, tile)
    w_hh, h0 = w_hh.contiguous(), h0.contiguous()
    b_hh = None if b_hh is None else b_hh.contiguous()
    y, state, extra = launch.forward(plan, gates, w_hh, b_hh, h0, c0, reverse=reverse, training=training)
    save_gates, _ = launch.saves(spec)
    return (
        y,
        y[0 if reverse else -1].clone(),
        x.new_empty(0) if c0 is None else state.to(x.dtype, copy=True),
        gates if training and save_gates else x.new_empty(0),
        x.new_empty(0) if extra is None else extra,
    )


def _fake_forward(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    cell: str, activation: str, reverse: bool, engine: str, tile: list[int], training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, B, _ = x.shape
    H = w_hh.shape[1]
    save_gates, save_extra = launch.saves(CellSpec(cell, activation))
    return (
        x.new_empty(T, B, H),
        x.new_empty(B, H),
        x.new_empty(0) if c0 is None else x.new_empty(B, H),
        x.new_empty(T, B, w_hh.shape[0]) if training and save_gates else x.new_empty(0),
        x.new_empty(T, B, H) if training and save_extra else x.new_empty(0),
    )


def _backward(
    dy: Tensor, dh_n: Tensor, dc_n: Tensor | None, gates: Tensor, y: Tensor, extra: Tensor, h0: Tensor,
    c0: Tensor | None, w_hh: Tensor, cell: str, activation: str, bias: bool, reverse: bool, engine: str,
    tile: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> da [T, B, D*H] by the pre-activations (launch.slots), dh0 [B, H] complete, dc0 [B, H] (empty without c0)."""
    spec = CellSpec(cell, activation, bias)
    H = w_hh.shape[1]
    plan = plan_for(spec, dy, H, engine, tile)
    save_gates, save_extra = launch.saves(spec)
    high = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dh = dh_n.to(high, memory_format=torch.contiguous_format, copy=True)
    dstate = torch.zeros_like(dh) if dc_n is None else dc_n.to(high, memory_format=torch.contiguous_format, copy=True)
    w_hh = w_hh.contiguous()
    da, dh, dstate = launch.backward(
        plan,
        dy.contiguous(),
        dh,
        dstate,
        gates if save_gates else None,
        y if c0 is None else extra,
        (h0 if c0 is None else c0).contiguous(),
        extra if save_extra else None,
        w_hh,
        reverse=reverse,
    )
    _, h_slot = launch.slots(spec)
    da0 = da[-1 if reverse else 0][:, h_slot * H :][:, : spec.gates * H]
    dh0 = (dh + (da0 @ w_hh).to(high)).to(dy.dtype)
    return da, dh0, dy.new_empty(0) if c0 is None else dstate.to(dy.dtype, copy=True)


def _fake_backward(
    dy: Tensor, dh_n: Tensor, dc_n: Tensor | None, gates: Tensor, y: Tensor, extra: Tensor, h0: Tensor,
    c0: Tensor | None, w_hh: Tensor, cell: str, activation: str, bias: bool, reverse: bool, engine: str,
    tile: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    T, B, H = dy.shape
    D, _ = launch.slots(CellSpec(cell, activation))
    return dy.new_empty(T, B, D * H), dy.new_empty(B, H), dy.new_empty(0) if c0 is None else dy.new_empty(B, H)


for _key in ("CUDA", "CPU"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)
torch.library.register_fake("lstm_triton::forward", _fake_forward, lib=_library)
torch.library.register_fake("lstm_triton::backward", _fake_backward, lib=_library)


class _Sequence(torch.autograd.Function):
    """One layer in one direction. Inputs and gradients as lstm_triton::forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, spec: CellSpec, reverse: bool, engine: str, tile: list[int],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        y, h_n, c_n, gates, extra = torch.ops.lstm_triton.forward(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, spec.cell, spec.activation, reverse, engine, tile, True
        )
        ctx.save_for_backward(x, h0, c0, w_ih, w_hh, y, gates, extra)
        ctx.spec, ctx.reverse, ctx.engine, ctx.tile = spec, reverse, engine, tile
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh_n: Tensor, dc_n: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Without this, the gradients would come back detached, and a penalty on them would count for nothing.
            raise NotImplementedError("create_graph=True needs engine='reference' in this version of lstm_triton")
        x, h0, c0, w_ih, w_hh, y, gates, extra = ctx.saved_tensors
        spec, reverse = ctx.spec, ctx.reverse
        da, dh0, dc0 = torch.ops.lstm_triton.backward(
            dy, dh_n, None if c0 is None else dc_n, gates, y, extra, h0, c0, w_hh,
            spec.cell, spec.activation, spec.bias, reverse, ctx.engine, ctx.tile,
        )  # fmt: skip
        T, B, I = x.shape  # noqa: E741
        G, H = spec.gates, w_hh.shape[1]
        _, h_slot = launch.slots(spec)
        # Views of one buffer: the first G slots are by the input product, the last G by the recurrent one.
        dx_gates = da.view(T * B, -1)[:, : G * H]
        dh_gates = da[..., h_slot * H :]
        if h_slot:  # the GRU's slots by the input lie in the order n, r, z
            w_ih = torch.cat((w_ih[2 * H :], w_ih[: 2 * H]))
        needs_x, needs_h0, needs_c0, needs_w_ih, needs_w_hh, needs_b_ih, needs_b_hh = ctx.needs_input_grad[:7]
        dx = dw_ih = dw_hh = db_ih = db_hh = None
        if needs_x:
            dx = (dx_gates @ w_ih).view(T, B, I)
        if needs_w_ih:
            dw_ih = dx_gates.t() @ x.reshape(T * B, I)
            if h_slot:
                dw_ih = torch.cat((dw_ih[H:], dw_ih[:H]))
        if needs_b_ih:
            db_ih = dx_gates.sum(0)
            if h_slot:
                db_ih = torch.cat((db_ih[H:], db_ih[:H]))
        if needs_w_hh:
            first, rest, before = (
                (T - 1, slice(0, T - 1), slice(1, T)) if reverse else (0, slice(1, T), slice(0, T - 1))
            )
            dw_hh = dh_gates[first].t() @ h0
            if T > 1:
                dw_hh = torch.addmm(dw_hh, dh_gates[rest].flatten(0, 1).t(), y[before].reshape((T - 1) * B, H))
        if needs_b_hh:
            db_hh = dh_gates.flatten(0, 1).sum(0)
        return (
            dx,
            dh0 if needs_h0 else None,
            dc0 if needs_c0 else None,
            dw_ih,
            dw_hh,
            db_ih,
            db_hh,
            None,
            None,
            None,
            None,
        )


def _transformed() -> bool:
    """Forward-mode tangents or a torch.func transform are about: the autograd function refuses them by name, where the
    bare operator would drop them.
    """
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def sequence(
    x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    *, spec: CellSpec, reverse: bool, engine: str, tile: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Run one layer in one direction on the kernels -> y [T, B, H], h_n [B, H], c_n [B, H] or None."""
    tensors = [x, h0, c0, w_ih, w_hh, b_ih, b_hh]
    tile_list = list(tile or ())
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if wanted or _transformed():
        # A tensor given twice (one zero state for h0 and c0, say) goes in as a view the second time.
        for i, tensor in enumerate(tensors):
            if tensor is not None and any(tensor is other for other in tensors[:i]):
                tensors[i] = tensor.view_as(tensor)
        y, h_n, c_n = _Sequence.apply(*tensors, spec, reverse, engine, tile_list)
    else:
        y, h_n, c_n, _, _ = torch.ops.lstm_triton.forward(
            *tensors, spec.cell, spec.activation, reverse, engine, tile_list, False
        )
    return y, h_n, None if c0 is None else c_n
