"""What the kernel tests share: random problems, and ours against the fp64 reference, output by output."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import lstm_triton as lt
from lstm_triton.spec import GATES

CELLS = ("lstm", "gru", "rnn")
ENGINES = ("local", "resident", "streamed", "step")

#: Whether torch.nn.LSTM runs under bfloat16 autocast on this CPU: where oneDNN has no bfloat16, torch raises.
ONEDNN_HAS_BFLOAT16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()

#: ||ours - reference|| / ||reference||, reference in float64 from the same (rounded) inputs. The accumulators are fp32
#: (fp64); what is left in the 16-bit types is the rounding of what is stored.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def problem(
    cell: str, T: int, B: int, H: int, features: int = 5, dtype: torch.dtype = torch.float32, bias: bool = True,
    seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    """x, h0, (c0,) w_ih, w_hh, (b_ih, b_hh), as the functions take them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    G = len(GATES[cell])
    states = [draw(B, H) for _ in range(2 if cell == "lstm" else 1)]
    biases = [draw(G * H, scale=0.3), draw(G * H, scale=0.3)] if bias else []
    return [draw(T, B, features), *states, draw(G * H, features, scale=0.5), draw(G * H, H, scale=H**-0.5), *biases]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||; NaN where either is NaN, so that no comparison with a tolerance passes.

    A single number below 0.1 counts as 0.1: it can be a sum that all but cancels, of which no fp32 computation, torch's
    included, keeps all digits.
    """
    reference = reference.detach().double().cpu()
    norm = reference.norm().clamp_min(0.1 if reference.numel() <= 1 else 1e-30)
    return float((ours.detach().double().cpu() - reference).norm() / norm)


def differentiate(cell: str, inputs: list[Tensor], grads: list[Tensor] | None, module: Any, **options: Any) -> Any:
    """Outputs, and gradients of all inputs for the output gradients `grads` (drawn if None)."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = getattr(module, cell)(*inputs, **options)
    if grads is None:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    gradients = torch.autograd.grad(outputs, inputs, [g.to(o) for g, o in zip(grads, outputs, strict=True)])
    return list(outputs), list(gradients), grads


def worst_error(cell: str, inputs: list[Tensor], *, context: Any = None, **options: Any) -> float:
    """The largest relative error over outputs, final states and all gradients of lt.functional's `cell`."""
    plain = {name: value for name, value in options.items() if name in ("activation", "reverse")}
    wanted, wanted_gradients, grads = differentiate(
        cell, [t.double().cpu() for t in inputs], None, lt.reference, **plain
    )
    # The gradients go in rounded as ours will see them.
    grads = [g.to(inputs[0].dtype).double() for g in grads]
    wanted, wanted_gradients, _ = differentiate(cell, [t.double().cpu() for t in inputs], grads, lt.reference, **plain)
    with context or nullcontext():
        ours, our_gradients, _ = differentiate(cell, inputs, grads, lt.functional, **options)
    errors = [relative_error(*pair) for pair in zip(ours + our_gradients, wanted + wanted_gradients, strict=True)]
    return max(errors, key=lambda e: float("inf") if e != e else e)
