"""The oracle's activations against ONNX's formulas, with numbers other than the defaults where they have any."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cell_equations import FORMULAS
from torch import Tensor

from lstm_triton import reference
from lstm_triton.spec import ACTIVATIONS, activation_of

# Activations, with numbers other than the defaults where they have any: ONNX's formulas.
SCALARS: dict[Any, Callable[[float], float]] = {
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "hard_sigmoid": lambda x: max(0.0, min(1.0, 0.2 * x + 0.5)),
    ("hard_sigmoid", 1 / 6, 0.5): lambda x: max(0.0, min(1.0, x / 6 + 0.5)),
    "linear": lambda x: x,
    "affine": lambda x: x,
    ("affine", 2.0, -1.0): lambda x: 2 * x - 1,
    "elu": lambda x: x if x >= 0 else math.exp(x) - 1,
    ("elu", 0.3): lambda x: x if x >= 0 else 0.3 * (math.exp(x) - 1),
    "leaky_relu": lambda x: x if x >= 0 else 0.01 * x,
    ("leaky_relu", 0.3): lambda x: x if x >= 0 else 0.3 * x,
    "scaled_tanh": math.tanh,
    ("scaled_tanh", 1.7159, 2 / 3): lambda x: 1.7159 * math.tanh(2 / 3 * x),
    "softplus": lambda x: math.log(math.exp(x) + 1),
    "softsign": lambda x: x / (1 + abs(x)),
    "thresholded_relu": lambda x: x if x > 1 else 0.0,
    ("thresholded_relu", 0.25): lambda x: x if x > 0.25 else 0.0,
}
POINTS = [-7.3, -3.1, -2.0, -0.4, 0.0, 0.2, 0.25, 0.3, 0.9, 1.0, 1.4, 2.9, 4.0, 17.0, 25.0, 30.0]


def test_every_activation_has_its_formula() -> None:
    assert {activation_of(a)[0] for a in SCALARS} == set(ACTIVATIONS) == set(FORMULAS)


@pytest.mark.parametrize("activation", SCALARS, ids=str)
def test_activations(activation: Any) -> None:
    x = torch.tensor(POINTS, dtype=torch.float64)
    expected = torch.tensor([SCALARS[activation](point) for point in POINTS], dtype=torch.float64)
    torch.testing.assert_close(reference.activate(x, activation), expected, rtol=1e-13, atol=1e-15)
    name, alpha, beta = activation_of(activation)
    torch.testing.assert_close(FORMULAS[name](x, alpha, beta), expected, rtol=1e-13, atol=1e-15)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = reference.activate(x.to(dtype), activation)
        assert found.dtype == dtype
        # two roundings where the value is large, more of 1 where it is a difference
        torch.testing.assert_close(
            found.double(), reference.activate(x.to(dtype).double(), activation),
            rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps,
        )  # fmt: skip


@pytest.mark.parametrize("activation", SCALARS, ids=str)
def test_derivatives_of_activations(activation: Any) -> None:
    """Three of them, off the kinks; finite far out; NaN stays NaN."""
    x = torch.tensor(POINTS, dtype=torch.float64).add(0.01).requires_grad_()

    def slope(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda point: reference.activate(point, activation)))(x)

    assert torch.autograd.gradcheck(lambda x: reference.activate(x, activation), x)
    assert torch.autograd.gradcheck(slope, x)
    if activation_of(activation)[0] in ("tanh", "sigmoid", "elu", "scaled_tanh", "softplus", "softsign"):
        assert torch.autograd.gradgradcheck(slope, x)
    else:  # pieces of lines
        assert not torch.autograd.functional.vjp(slope, x, torch.ones_like(x))[1].any()
    far = torch.tensor([-800.0, 800.0], dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(reference.activate(far, activation).sum(), far, create_graph=True)[0]
    assert first.isfinite().all()
    if first.requires_grad:
        assert torch.autograd.grad(first.sum(), far)[0].isfinite().all()
    assert reference.activate(torch.tensor(torch.nan), activation).isnan()


@pytest.mark.parametrize(
    ("activation", "kink", "slope"),
    [
        ("relu", 0.0, 0.0), ("leaky_relu", 0.0, 0.01), (("elu", 0.3), 0.0, 0.3), ("thresholded_relu", 1.0, 0.0),
        ("hard_sigmoid", 2.5, 0.2), ("hard_sigmoid", -2.5, 0.2), ("softsign", 0.0, 1.0),
    ],
)  # fmt: skip
def test_slopes_at_kinks(activation: Any, kink: float, slope: float) -> None:
    x = torch.tensor(kink, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(reference.activate(x, activation), x)[0].item() == slope
