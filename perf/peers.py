"""Other ways to run a layer with torch.nn's weights: eager loops, and the kernels of other libraries, if installed.

A peer gives a function for one layer in one direction; `Layered` makes a layer of it, with torch.nn's parameter names,
so that the same weights go into all and the same check judges them. What a peer cannot do raises ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import DTYPES, Case

#: x [T, B, I], w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H] -> y [T, B, H] and the final states [B, H].
Sequence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
#: The inputs of a step [B, G*H], W_hh transposed, b_hh, and the states [B, H] -> the states after it.
Step = Callable[..., tuple[Tensor, ...]]


class Layered(nn.Module):
    """Layers and directions of `sequence`, one after another, with the parameters of a torch.nn layer."""

    def __init__(self, like: nn.RNNBase, sequence: Sequence) -> None:
        super().__init__()
        self.sequence, self.num_layers = sequence, like.num_layers
        self.suffixes = ("", "_reverse") if like.bidirectional else ("",)
        for name, parameter in like.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """x [T, B, I] -> y [T, B, D*H] and the final states [L*D, B, H]."""
        finals = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in self.suffixes:
                kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                weights = [getattr(self, f"{kind}_l{layer}{suffix}") for kind in kinds]
                y, *final = self.sequence(x.flip(0) if suffix else x, *weights)
                outputs.append(y.flip(0) if suffix else y)
                finals.append(final)
            x = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        states = tuple(torch.stack(state) for state in zip(*finals, strict=True))
        return x, states if len(states) > 1 else states[0]


def lstm_step(x: Tensor, w: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = torch.addmm(x, h, w).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(x: Tensor, w: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    x_r, x_z, x_n = x.chunk(3, dim=1)
    h_r, h_z, h_n = torch.addmm(b, h, w).chunk(3, dim=1)
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (torch.lerp(n, h, (x_z + h_z).sigmoid()),)


def rnn_step(x: Tensor, w: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return (torch.addmm(x, h, w).tanh(),)


STEPS: dict[str, Step] = {"lstm": lstm_step, "gru": gru_step, "rnn": rnn_step}


def loop(case: Case) -> Sequence:
    """Eager PyTorch as a careful user writes it: the input product, and what bias there can be, before the loop."""
    return _looped(case, STEPS[case.cell])


def compiled(case: Case) -> Sequence:
    """The same loop over a step that torch.compile made."""
    torch.compiler.reset()  # or the steps of earlier shapes count towards a limit on recompilation
    return _looped(case, torch.compile(STEPS[case.cell], fullgraph=True, dynamic=False))


def _looped(case: Case, step: Step) -> Sequence:
    states = 2 if case.cell == "lstm" else 1
    separate = case.cell == "gru"  # its reset gate acts on W_hn h + b_hn

    def sequence(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
        state = (x.new_zeros(x.shape[1], w_hh.shape[1]),) * states
        outputs = []
        for x_t in F.linear(x, w_ih, b_ih if separate else b_ih + b_hh).unbind():
            state = step(x_t, w_hh.t(), b_hh, *state)
            outputs.append(state[0])
        return torch.stack(outputs), *state

    return sequence


def flashrnn(case: Case) -> Sequence:
    """FlashRNN with one head. It takes [B, T, G, heads, D], R [G, heads, D, D] and one bias for each gate."""
    from flashrnn import flashrnn as run

    if case.dtype == "fp64":
        raise ValueError("flashrnn has no float64")
    function = {"lstm": "lstm", "gru": "gru", "rnn": "elman"}[case.cell]
    dtype = str(DTYPES[case.dtype]).removeprefix("torch.")

    def sequence(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
        hidden = w_hh.shape[1]
        if function == "gru":  # its recurrent gates lie in the order n, r, z, and n's two biases stand at the ends
            w_hh = torch.cat((w_hh[2 * hidden :], w_hh[: 2 * hidden]))
            both = b_ih[: 2 * hidden] + b_hh[: 2 * hidden]
            b = torch.cat((b_hh[2 * hidden :], both, b_ih[2 * hidden :]))
        else:
            b = b_ih + b_hh
        gates = F.linear(x, w_ih).unflatten(-1, (-1, 1, hidden)).transpose(0, 1)
        recurrent = w_hh.view(-1, 1, hidden, hidden)
        states, last = run(
            gates, recurrent, b.view(-1, 1, hidden), function=function, backend="cuda_fused", dtype=dtype
        )
        return states[0, :, :, 0].transpose(0, 1), *last[:, :, 0, 0]

    return sequence


def torchrl(case: Case) -> Sequence:
    """TorchRL's Triton backend: batch first, with a state for each step to reset to (zeros here, and no resets)."""
    from torchrl.modules.tensordict_module import _rnn_triton

    if case.cell == "rnn" or DTYPES[case.dtype] != torch.float32:
        raise ValueError(f"torchrl's kernels are LSTM and GRU in float32, not {case.cell} in {case.dtype}")
    run = _rnn_triton.lstm_triton if case.cell == "lstm" else _rnn_triton.gru_triton
    states = 2 if case.cell == "lstm" else 1

    @cache
    def resets(batch: int, seq: int, hidden: int, device: torch.device) -> tuple[Tensor, Tensor]:
        never = torch.zeros(batch, seq, dtype=torch.bool, device=device)
        return torch.zeros(batch, seq, hidden, device=device), never

    def sequence(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x = x.transpose(0, 1)
        zeros, never = resets(*x.shape[:2], weights[1].shape[1], x.device)
        found = run(x, *[zeros] * states, *weights, never, input_precision="tf32" if case.dtype == "tf32" else "ieee")
        return found[0].transpose(0, 1), *found[states:]

    return sequence


def gru_qat(case: Case) -> Sequence:
    """gru-qat's dense persistent scan, without quantization."""
    from gru_qat.triton_kernels.scan import gru_scan_persistent

    if case.cell != "gru" or DTYPES[case.dtype] != torch.float32:
        raise ValueError(f"gru-qat is a GRU in float32, not {case.cell} in {case.dtype}")

    def sequence(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
        y = gru_scan_persistent(F.linear(x, w_ih, b_ih), x.new_zeros(x.shape[1], w_hh.shape[1]), w_hh, b_hh)
        return y, y[-1]

    return sequence
