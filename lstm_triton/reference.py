"""The oracle: every cell in eager PyTorch, written from the equations, any float dtype, differentiable to any order.

It knows nothing of the kernels. The signatures are those of lstm_triton.functional; `engine` and `tile` say how to
compute and not what, so they are taken and not used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from .spec import Activation, CellSpec, refuse_later_options


def lstm(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    peephole: Tensor | None = None, coupled: bool = False, w_hr: Tensor | None = None,
    activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    output_activation: Activation | None = None, cell_clip: float | None = None, gate_clip: float | None = None,
    input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None, lengths: Tensor | None = None,
    mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False, return_cells: bool = False,
    memory: str = "store", engine: str = "reference", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """c[t] = f c[t-1] + i g, h[t] = o tanh(c[t]); i, f, g, o from W_ih x[t] + b_ih + W_hh h[t-1] + b_hh.

    x [T, B, I], h0 and c0 [B, H], w_ih [4H, I], w_hh [4H, H], biases [4H] -> y [T, B, H], h_n [B, H], c_n [B, H].
    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000.
    """
    CellSpec("lstm", activation)
    refuse_later_options(
        peephole=peephole, coupled=coupled, w_hr=w_hr, recurrent_activation=recurrent_activation,
        output_activation=output_activation, cell_clip=cell_clip, gate_clip=gate_clip, input_mask=input_mask,
        recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, return_cells=return_cells,
        memory=memory,
    )  # fmt: skip

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = state
        i, f, g, o = (x_t + linear(h, w_hh, b_hh)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    y, (h_n, c_n) = _scan(step, linear(x, w_ih, b_ih), (_initial(h0, x, w_hh), _initial(c0, x, w_hh)), reverse)
    return y, h_n, c_n


def gru(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    reset_after: bool = True, activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    gate_clip: float | None = None, input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None,
    lengths: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "reference", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """n = tanh(x_n + r (W_hn h[t-1] + b_hn)), h[t] = (1 - z) n + z h[t-1]; gates r, z, n. Shapes: lstm's, 3H for 4H.

    Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014, with the reset after the product.
    """
    CellSpec("gru", activation)
    refuse_later_options(
        reset_after=reset_after, recurrent_activation=recurrent_activation, gate_clip=gate_clip, input_mask=input_mask,
        recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, memory=memory,
    )  # fmt: skip

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = state
        x_r, x_z, x_n = x_t.chunk(3, dim=-1)
        h_r, h_z, h_n = linear(h, w_hh, b_hh).chunk(3, dim=-1)
        z = (x_z + h_z).sigmoid()
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return ((1 - z) * n + z * h,)

    y, (h_n,) = _scan(step, linear(x, w_ih, b_ih), (_initial(h0, x, w_hh),), reverse)
    return y, h_n


def rnn(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    activation: Activation = "tanh", gate_clip: float | None = None, input_mask: Tensor | None = None,
    recurrent_mask: Tensor | None = None, lengths: Tensor | None = None, mask: Tensor | None = None,
    reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "reference", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h[t] = activation(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh), "tanh" or "relu". Shapes: lstm's, H for 4H.

    Elman, "Finding structure in time", 1990.
    """
    CellSpec("rnn", activation)
    refuse_later_options(
        gate_clip=gate_clip, input_mask=input_mask, recurrent_mask=recurrent_mask, lengths=lengths, mask=mask,
        reset=reset, memory=memory,
    )  # fmt: skip
    phi = torch.tanh if activation == "tanh" else torch.relu

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (phi(x_t + linear(state[0], w_hh, b_hh)),)

    y, (h_n,) = _scan(step, linear(x, w_ih, b_ih), (_initial(h0, x, w_hh),), reverse)
    return y, h_n


def _initial(given: Tensor | None, x: Tensor, w_hh: Tensor) -> Tensor:
    return x.new_zeros(x.shape[1], w_hh.shape[1]) if given is None else given


def _scan(
    step: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    x_gates: Tensor,
    state: tuple[Tensor, ...],
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run `step` over x_gates [T, B, G*H], last step first if reverse -> y [T, B, H] (state[0] of each), last state."""
    outputs = []
    for x_t in x_gates.flip(0) if reverse else x_gates:
        state = step(x_t, state)
        outputs.append(state[0])
    if not outputs:
        return state[0].new_empty(0, *state[0].shape), state
    return torch.stack(outputs[::-1] if reverse else outputs), state
