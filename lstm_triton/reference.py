"""The oracle: every cell in eager PyTorch, written from the equations, any float dtype, differentiable to any order.

It knows nothing of the kernels. The signatures are those of lstm_triton.functional; `engine`, `tile` and `memory` say
how to compute and not what, so they are taken and not used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from .spec import Activation, CellSpec, refuse_later_options

#: What `memory` may be: keep for the backward pass what it reads, or compute it again there.
MEMORY = ("store", "recompute")


def lstm(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    peephole: Tensor | None = None, coupled: bool = False, w_hr: Tensor | None = None,
    activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    output_activation: Activation | None = None, cell_clip: float | None = None, gate_clip: float | None = None,
    input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None, lengths: Tensor | None = None,
    mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False, return_cells: bool = False,
    memory: str = "store", engine: str = "reference", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """c[t] = f c[t-1] + i g, h[t] = o tanh(c[t]); i, f, g, o from W_ih x[t] + b_ih + W_hh h[t-1] + b_hh.

    x [T, B, I], h0 and c0 [B, H], w_ih [4H, I], w_hh [4H, H], biases [4H] -> y [T, B, H], h_n [B, H], c_n [B, H], and
    with return_cells all c[t], [T, B, H]. With w_hr [P, H], h[t] = W_hr (o tanh(c[t])): h0, y, h_n have P columns, and
    so has w_hh. lengths [B], mask and reset [T, B]: see `step_masks`.

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000; w_hr: Sak et
    al., "Long short-term memory based recurrent neural network architectures", 2014.
    """
    CellSpec("lstm", activation)
    refuse_later_options(
        peephole=peephole, coupled=coupled, recurrent_activation=recurrent_activation,
        output_activation=output_activation, cell_clip=cell_clip, gate_clip=gate_clip, input_mask=input_mask,
        recurrent_mask=recurrent_mask,
    )  # fmt: skip
    check_memory(memory)

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = state
        i, f, g, o = (x_t + linear(h, w_hh, b_hh)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h if w_hr is None else linear(h, w_hr), c

    state = (_initial(h0, x, w_hh.shape[1]), _initial(c0, x, w_hh.shape[0] // 4))
    (y, cells), (h_n, c_n) = _scan(step, x, w_ih, b_ih, state, lengths, mask, reset, reverse)
    return (y, h_n, c_n, cells) if return_cells else (y, h_n, c_n)


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
        recurrent_mask=recurrent_mask,
    )  # fmt: skip
    check_memory(memory)

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = state
        x_r, x_z, x_n = x_t.chunk(3, dim=-1)
        h_r, h_z, h_n = linear(h, w_hh, b_hh).chunk(3, dim=-1)
        z = (x_z + h_z).sigmoid()
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return ((1 - z) * n + z * h,)

    state = (_initial(h0, x, w_hh.shape[1]),)
    (y,), (h_n,) = _scan(step, x, w_ih, b_ih, state, lengths, mask, reset, reverse)
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
    refuse_later_options(gate_clip=gate_clip, input_mask=input_mask, recurrent_mask=recurrent_mask)
    check_memory(memory)
    phi = torch.tanh if activation == "tanh" else torch.relu

    def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (phi(x_t + linear(state[0], w_hh, b_hh)),)

    state = (_initial(h0, x, w_hh.shape[1]),)
    (y,), (h_n,) = _scan(step, x, w_ih, b_ih, state, lengths, mask, reset, reverse)
    return y, h_n


def check_memory(memory: str) -> None:
    """ValueError unless `memory` is one that exists."""
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}, got {memory!r}")


def step_masks(
    x: Tensor, lengths: Tensor | None, mask: Tensor | None, reset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which steps of x [T, B, I] count, and before which the state is zeroed: bool [T, B], None for all and for none.

    A step counts if it lies within its row's `lengths` [B] (negative: 0; beyond T: T) and `mask` [T, B] is true there.
    One that does not count holds the state, and its output is zero. `reset` [T, B] zeroes the state before the step in
    the order of processing, also at steps that `mask` skips, but not past `lengths`, where the row has no steps at all.
    """
    if lengths is None:
        return mask, reset
    within = torch.arange(x.shape[0], device=x.device)[:, None] < lengths.long()
    return within if mask is None else within & mask, None if reset is None else within & reset


def sequence(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, w_hr: Tensor | None, lengths: Tensor | None, mask: Tensor | None, reset: Tensor | None,
    *, spec: CellSpec, reverse: bool, return_cells: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The cell that `spec` names, with every tensor that some cell takes -> y, h_n, c_n or None, cells or None."""
    options = {"lengths": lengths, "mask": mask, "reset": reset, "reverse": reverse}
    if spec.cell == "lstm":
        outputs = lstm(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh,
            w_hr=w_hr, activation=spec.activation, return_cells=return_cells, **options,
        )  # fmt: skip
    else:
        function = {"gru": gru, "rnn": rnn}[spec.cell]
        outputs = function(x, h0, w_ih, w_hh, b_ih, b_hh, activation=spec.activation, **options)
    return (*outputs, None, None)[:4]


def _initial(given: Tensor | None, x: Tensor, columns: int) -> Tensor:
    return x.new_zeros(x.shape[1], columns) if given is None else given


def _scan(
    step: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    x: Tensor, w_ih: Tensor, b_ih: Tensor | None, state: tuple[Tensor, ...],
    lengths: Tensor | None, mask: Tensor | None, reset: Tensor | None, reverse: bool,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:  # fmt: skip
    """Run `step` over the input product of x [T, B, I], last step first if reverse.

    Returns what each state [B, ...] was after each step [T, B, ...], zero where the step does not count, and the last.
    """
    T = x.shape[0]
    counts, zeroed = step_masks(x, lengths, mask, reset)
    skipped = None if counts is None else ~counts[..., None]
    zeroed = None if zeroed is None else zeroed[..., None]
    if skipped is not None:
        x = x.masked_fill(skipped, 0)
    inputs = [[None] * T if m is None else m.unbind(0) for m in (linear(x, w_ih, b_ih), skipped, zeroed)]
    steps = list(zip(*inputs, strict=True))
    outputs = []
    for x_t, skipped_t, zeroed_t in reversed(steps) if reverse else steps:
        if zeroed_t is not None:
            state = tuple(s.masked_fill(zeroed_t, 0) for s in state)
        if skipped_t is None:
            state = step(x_t, state)
            outputs.append(state)
        else:
            # A step that does not count runs on zeros, so that its gradients are zeros too, whatever state it holds.
            stepped = step(x_t, tuple(s.masked_fill(skipped_t, 0) for s in state))
            state = tuple(torch.where(skipped_t, s, new) for s, new in zip(state, stepped, strict=True))
            outputs.append(tuple(new.masked_fill(skipped_t, 0) for new in stepped))
    if not outputs:
        return [s.new_empty(0, *s.shape) for s in state], state
    return [torch.stack(s) for s in zip(*(outputs[::-1] if reverse else outputs), strict=True)], state
