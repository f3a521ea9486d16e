"""The NumPy layers of Stanford's CS231n (2016, assignment 3): numbers that its notebooks print, and its equations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from interop import GATES, assert_close, call, engines

from lstm_triton import convert

pytestmark = pytest.mark.both


def course_step(cell: str, x: np.ndarray, h: np.ndarray, c: np.ndarray, w: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    Wx, Wh, b = w
    a = x @ Wx + h @ Wh + b
    if cell == "rnn":
        return np.tanh(a), c
    i, f, o, g = np.split(a, 4, axis=1)
    i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
    c = f * c + i * np.tanh(g)
    return o * np.tanh(c), c


def course(
    cell: str, x: np.ndarray, h: np.ndarray, c: np.ndarray, w: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """x [N, T, D] -> all h [N, T, H], and the last c."""
    steps = []
    for t in range(x.shape[1]):
        h, c = course_step(cell, x[:, t], h, c, w)
        steps.append(h)
    return np.stack(steps, axis=1), c


def spaced(low: float, high: float, *shape: int) -> np.ndarray:
    return np.linspace(low, high, num=int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True)
class Printed:
    """What a notebook computes: x [N, T, D], h0, c0 [N, H], Wx, Wh, b; and what it prints, [N, T, H] and [N, H]."""

    cell: str
    x: np.ndarray
    h0: np.ndarray
    c0: np.ndarray
    weights: list[np.ndarray]
    h: list[Any]
    c_n: list[Any] | None = None


PRINTED = {
    "rnn_step_forward": Printed(
        "rnn", spaced(-0.4, 0.7, 3, 1, 10), spaced(-0.2, 0.5, 3, 4), np.zeros((3, 4)),
        [spaced(-0.1, 0.9, 10, 4), spaced(-0.3, 0.7, 4, 4), spaced(-0.2, 0.4, 4)],
        [[[-0.58172089, -0.50182032, -0.41232771, -0.31410098]],
         [[0.66854692, 0.79562378, 0.87755553, 0.92795967]],
         [[0.97934501, 0.99144213, 0.99646691, 0.99854353]]],
    ),
    "rnn_forward": Printed(
        "rnn", spaced(-0.1, 0.3, 2, 3, 4), spaced(-0.3, 0.1, 2, 5), np.zeros((2, 5)),
        [spaced(-0.2, 0.4, 4, 5), spaced(-0.4, 0.1, 5, 5), spaced(-0.7, 0.1, 5)],
        [[[-0.42070749, -0.27279261, -0.11074945, 0.05740409, 0.22236251],
          [-0.39525808, -0.22554661, -0.0409454, 0.14649412, 0.32397316],
          [-0.42305111, -0.24223728, -0.04287027, 0.15997045, 0.35014525]],
         [[-0.55857474, -0.39065825, -0.19198182, 0.02378408, 0.23735671],
          [-0.27150199, -0.07088804, 0.13562939, 0.33099728, 0.50158768],
          [-0.51014825, -0.30524429, -0.06755202, 0.17806392, 0.40333043]]],
    ),
    "lstm_step_forward": Printed(
        "lstm", spaced(-0.4, 1.2, 3, 1, 4), spaced(-0.3, 0.7, 3, 5), spaced(-0.4, 0.9, 3, 5),
        [spaced(-2.1, 1.3, 4, 20), spaced(-0.7, 2.2, 5, 20), spaced(0.3, 0.7, 20)],
        [[[0.24635157, 0.28610883, 0.32240467, 0.35525807, 0.38474904]],
         [[0.49223563, 0.55611431, 0.61507696, 0.66844003, 0.7159181]],
         [[0.56735664, 0.66310127, 0.74419266, 0.80889665, 0.858299]]],
        [[0.32986176, 0.39145139, 0.451556, 0.51014116, 0.56717407],
         [0.66382255, 0.76674007, 0.87195994, 0.97902709, 1.08751345],
         [0.74192008, 0.90592151, 1.07717006, 1.25120233, 1.42395676]],
    ),
    "lstm_forward": Printed(
        "lstm", spaced(-0.4, 0.6, 2, 3, 5), spaced(-0.4, 0.8, 2, 4), np.zeros((2, 4)),
        [spaced(-0.2, 0.9, 5, 16), spaced(-0.3, 0.6, 4, 16), spaced(0.2, 0.7, 16)],
        [[[0.01764008, 0.01823233, 0.01882671, 0.0194232],
          [0.11287491, 0.12146228, 0.13018446, 0.13902939],
          [0.31358768, 0.33338627, 0.35304453, 0.37250975]],
         [[0.45767879, 0.4761092, 0.4936887, 0.51041945],
          [0.6704845, 0.69350089, 0.71486014, 0.7346449],
          [0.81733511, 0.83677871, 0.85403753, 0.86935314]]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_course_prints_what_its_equations_give(name: str) -> None:
    case = PRINTED[name]
    h, c_n = course(case.cell, case.x, case.h0, case.c0, case.weights)
    assert_close(h, np.array(case.h), 1e-8)
    if case.c_n is not None:
        assert_close(c_n, np.array(case.c_n), 1e-8)


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PRINTED)
def test_course_forward(name: str, dtype: torch.dtype, engine: str) -> None:
    case = PRINTED[name]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-8
    weights = {n: w.to(dtype) for n, w in convert.weights(case.weights, "cs231n", case.cell).items()}
    x = torch.from_numpy(case.x).to(dtype).transpose(0, 1).contiguous()
    states = [torch.from_numpy(state).to(dtype) for state in (case.h0, case.c0)[: 2 if case.cell == "lstm" else 1]]
    y, *final = call(case.cell, x, states, weights, engine=engine)
    assert_close(y.transpose(0, 1), np.array(case.h), tolerance)
    if case.c_n is not None:
        assert_close(final[1], np.array(case.c_n), tolerance)


def differences(function: Callable[[], np.ndarray], array: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """d sum(function() grad) / d array, from central differences: array is changed in place, and restored."""
    found = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        sums = []
        for step in (1e-5, -1e-5):
            array[index] = kept + step
            sums.append((function() * grad).sum())
        array[index] = kept
        found[index] = (sums[0] - sums[1]) / 2e-5
    return found


@engines
@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_course_backward(cell: str, engine: str) -> None:
    """Gradients of all inputs, those of the weights converted back, against differences of the course's equations."""
    N, T, D, H = 2, 4, 3, 5
    G = GATES[cell]
    rng = np.random.default_rng(0)
    x, h0, c0, dh = (rng.standard_normal(shape) for shape in ((N, T, D), (N, H), (N, H), (N, T, H)))
    course_weights = [rng.standard_normal(shape) * 0.5 for shape in ((D, G * H), (H, G * H), (G * H,))]
    states = [h0, c0][: 2 if cell == "lstm" else 1]

    weights = convert.weights(course_weights, "cs231n", cell)
    inputs = [torch.from_numpy(x).transpose(0, 1).contiguous(), *map(torch.from_numpy, states), *weights.values()]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    x_ours, *states_ours = inputs[: 1 + len(states)]
    ours = dict(zip(weights, inputs[1 + len(states) :], strict=True))
    y = call(cell, x_ours, states_ours, ours, engine=engine)[0]
    dx, *grads = torch.autograd.grad(y, inputs, torch.from_numpy(dh).transpose(0, 1))

    def function() -> np.ndarray:
        return course(cell, x, h0, c0, course_weights)[0]

    assert_close(dx.transpose(0, 1), differences(function, x, dh), 1e-8)
    for found, state in zip(grads, states, strict=False):
        assert_close(found, differences(function, state, dh), 1e-8)
    of_weights = dict(zip(weights, grads[len(states) :], strict=True))
    assert_close(of_weights.pop("bias_hh"), of_weights["bias_ih"].numpy(), 1e-12)
    for found, array in zip(convert.to(of_weights, "cs231n", cell), course_weights, strict=True):
        assert_close(found, differences(function, array, dh), 1e-8)
