"""What the tests of derivatives share: a loss that every derivative matters to, gradients, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numerics import TOLERANCE, relative_error
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_leaves

Function = Callable[..., tuple[Tensor, ...]]


def assert_close(ours: Any, wanted: Any, tolerance: float = TOLERANCE[torch.float64]) -> None:
    """Every tensor of two trees, by shape and relative error."""
    pairs = list(zip(tree_leaves(ours), tree_leaves(wanted), strict=True))
    assert pairs and all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    assert max(relative_error(a, b) for a, b in pairs) <= tolerance


def loss(outputs: Any) -> Tensor:
    """A number that every derivative of the outputs matters to."""
    return sum((t.double().sin() * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in outputs)


def square_norm(tensors: Any) -> Tensor:
    return sum(t.double().square().sum() for t in tensors)


def every(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def gradients(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
    """By all arguments, as a transform."""
    return grad(lambda *t: loss(function(*t)), every(tensors))(*tensors)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]
