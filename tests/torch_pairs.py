"""torch.nn's recurrent modules beside ours: built alike, called alike, compared in outputs and every gradient."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_triton as lt

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
LAYERS = {"LSTM": (lt.LSTM, nn.LSTM), "GRU": (lt.GRU, nn.GRU), "RNN": (lt.RNN, nn.RNN)}
CELLS = {
    "LSTMCell": (lt.LSTMCell, nn.LSTMCell),
    "GRUCell": (lt.GRUCell, nn.GRUCell),
    "RNNCell": (lt.RNNCell, nn.RNNCell),
}
PAIRS = LAYERS | CELLS
# for what all layers do alike: one of them, where the interpreter takes its time
ALIKE = ["GRU"] if INTERPRETED else list(LAYERS)
# relative error ||a - b|| / ||b||
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torch.nn's with the same arguments, after the same seed and so with the same weights."""
    built = []
    for kind in PAIRS[name]:
        torch.manual_seed(0)
        built.append(kind(*args, **kwargs))
    ours, theirs = built
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    return ours, theirs


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating tensors of nested tuples and lists, of a PackedSequence its data, each with its place."""
    if isinstance(tree, PackedSequence):
        yield name + ".data", tree.data
    elif isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield name, tree
    elif isinstance(tree, (tuple, list)):
        for i, branch in enumerate(tree):
            yield from tensors(branch, f"{name}[{i}]")


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree with `function` of each of its floating tensors."""
    if isinstance(tree, PackedSequence):
        return PackedSequence(function(tree.data), *tree[1:])
    if isinstance(tree, Tensor):
        return function(tree) if tree.is_floating_point() else tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(function, branch) for branch in tree)
    return tree


def results(
    module: nn.Module, *args: Any, seed: int | None = None, by_inputs: bool = True, **kwargs: Any
) -> dict[str, Tensor]:
    """Outputs of a call, and the gradients of a fixed random combination of them by every parameter and input.

    seed: of the random numbers drawn in the call. by_inputs: whether the inputs require gradients.
    """
    args = mapped(lambda t: t.detach().clone().requires_grad_(by_inputs), args)
    if seed is not None:
        torch.manual_seed(seed)
    found = dict(tensors(module(*args, **kwargs), "output"))
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in found.values()]
    leaves = dict(tensors(args, "input") if by_inputs else ()) | dict(module.named_parameters())
    total = sum((t * w).sum() for t, w in zip(found.values(), weights, strict=True))
    grads = torch.autograd.grad(total, list(leaves.values()))
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, others: dict[str, Tensor] | None = None
) -> None:
    """||found - expected|| <= tolerance ||expected|| for each, beyond the error that `others`, if given, have there."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error, size = (found[name].double() - value.double()).norm(), value.double().norm()
        excused = 0.0 if others is None else (others[name].double() - value.double()).norm()
        # not a quotient: a relu layer may be dead, and all its gradients zero
        assert error <= tolerance * size + excused, f"{name}: error {error:.2e} of {size:.2e}"


def outcome(function: Callable[[], Any]) -> tuple[str, str]:
    """What a call raised or warned of, and in which words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", ""
