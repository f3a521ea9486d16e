"""The oracle itself: `reference` against torch.nn in float64, and both its derivatives against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lstm_triton import reference

# cell, activation, function, torch.nn's layer
CELLS = {
    "lstm": (reference.lstm, nn.LSTM, {}),
    "gru": (reference.gru, nn.GRU, {}),
    "rnn-tanh": (reference.rnn, nn.RNN, {"nonlinearity": "tanh"}),
    "rnn-relu": (reference.rnn, nn.RNN, {"nonlinearity": "relu"}),
}
SHAPES = [(1, 1, 1, 1), (5, 3, 4, 6), (7, 2, 3, 37)]


def problem(cell: str, shape: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float64) -> tuple:
    """torch.nn's layer, x [T, B, I], the states [B, H] and the layer's weights."""
    steps, batch, inputs, hidden = shape
    _, layer, options = CELLS[cell]
    torch.manual_seed(0)
    module = layer(inputs, hidden, bias=bias, dtype=dtype, **options)
    x = torch.randn(steps, batch, inputs, dtype=dtype, requires_grad=True)
    states = [torch.randn(batch, hidden, dtype=dtype, requires_grad=True) for _ in range(2 if cell == "lstm" else 1)]
    return module, x, states, list(module.parameters())


def run(cell: str, x: Tensor, states: list, weights: list[Tensor], **options: object) -> tuple[Tensor, ...]:
    function, _, cell_options = CELLS[cell]
    if cell_options:
        options["activation"] = cell_options["nonlinearity"]
    return function(x, *states, *weights, **options)


def run_torch(module: nn.Module, x: Tensor, states: list[Tensor] | None, reverse: bool) -> tuple[Tensor, ...]:
    hx = None
    if states is not None:
        hx = tuple(s.unsqueeze(0) for s in states)
        hx = hx if len(hx) == 2 else hx[0]
    y, final = module(x.flip(0) if reverse else x, hx)
    final = final if isinstance(final, tuple) else (final,)
    return (y.flip(0) if reverse else y, *(s.squeeze(0) for s in final))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_against_torch(cell: str, shape: tuple[int, ...], bias: bool, reverse: bool) -> None:
    module, x, states, weights = problem(cell, shape, bias)
    found = run(cell, x, states, weights, reverse=reverse)
    expected = run_torch(module, x, states, reverse)
    leaves = [x, *states, *weights]
    cotangents = [torch.randn_like(t) for t in expected]
    found += torch.autograd.grad(found, leaves, cotangents)
    expected += torch.autograd.grad(expected, leaves, cotangents)
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() <= 1e-13 * other.norm().clamp(min=1.0)


@pytest.mark.parametrize("cell", CELLS)
def test_states_default_to_zero(cell: str) -> None:
    _, x, states, weights = problem(cell, (4, 2, 3, 5), True)
    found = run(cell, x, [None] * len(states), weights)
    expected = run(cell, x, [torch.zeros_like(s) for s in states], weights)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_split_sequence_equals_the_whole(cell: str) -> None:
    _, x, states, weights = problem(cell, (7, 2, 3, 5), True)
    whole = run(cell, x, states, weights)
    first = run(cell, x[:3], states, weights)
    second = run(cell, x[3:], list(first[1:]), weights)
    joined = (torch.cat([first[0], second[0]]), *second[1:])
    torch.testing.assert_close(joined, whole, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cell", CELLS)
def test_keeps_the_dtype(cell: str, dtype: torch.dtype) -> None:
    _, x, states, weights = problem(cell, (3, 2, 3, 5), True)
    exact = run(cell, x, states, weights)
    found = run(cell, x.to(dtype), [s.to(dtype) for s in states], [w.to(dtype) for w in weights])
    # a few roundings of the storage dtype
    tolerance = 16 * torch.finfo(dtype).eps
    for mine, other in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_derivatives(cell: str, reverse: bool) -> None:
    _, x, states, weights = problem(cell, (3, 2, 2, 3), True)
    leaves = [x, *states, *weights]
    count = 1 + len(states)

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        return run(cell, args[0], list(args[1:count]), list(args[count:]), reverse=reverse)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
