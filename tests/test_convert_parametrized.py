"""Layers whose weights are computed, by pruning, weight norm or parametrizations, replaced and turned back: they go on
being computed, and are not by the conversion.
"""

from __future__ import annotations

import copy
import warnings
from itertools import cycle

import pytest
import torch
from convert_cases import LAYERS, TOLERANCE, B, H, I, T, assert_same, flatten, in_float64, results
from numerics import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lstm_triton as lt

pytestmark = pytest.mark.both
float64 = pytest.fixture(autouse=True)(in_float64)


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight_hh_l0", amount=0.4)
    prune.l1_unstructured(layer, "weight_ih_l0", amount=3)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer, "weight_hh_l0")
        nn.utils.weight_norm(layer, "weight_ih_l0", dim=1)


def new_weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer, "weight_hh_l0")
    parametrizations.weight_norm(layer, "weight_ih_l0", dim=1)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class PerGate(nn.Module):
    """Each gate's [H, H] block symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.symmetric = Symmetric()

    def forward(self, w: Tensor) -> Tensor:
        return torch.cat([self.symmetric(block) for block in w.split(H)])


def two_in_a_row(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight_hh_l0", PerGate())
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Tanh())
    parametrize.register_parametrization(layer, "bias_hh_l0", nn.Softplus())


def orthogonal(layer: nn.Module) -> None:
    parametrizations.orthogonal(layer, "weight_ih_l0")


CHANGES = {
    "pruned": pruned,
    "old-weight-norm": old_weight_norm,
    "weight-norm": new_weight_norm,
    "parametrized": two_in_a_row,
    "orthogonal": orthogonal,
    "spectral-norm": lambda layer: parametrizations.spectral_norm(layer, "weight_hh_l0").eval(),
    "pruned-and-parametrized": lambda layer: (prune.l1_unstructured(layer, "bias_hh_l0", 2), new_weight_norm(layer)),
}


def changed(cell: str, change: str) -> nn.Module:
    torch.manual_seed(5)
    layer = LAYERS[cell][0](I, H)
    CHANGES[change](layer)
    return layer


@pytest.mark.parametrize("run_before", [False, True], ids=["fresh", "run"])
@pytest.mark.parametrize(("change", "cell"), list(zip(CHANGES, cycle(LAYERS), strict=False)))
def test_weights_that_are_computed(change: str, cell: str, run_before: bool) -> None:
    """Pruning, weight norm and parametrizations, replaced and turned back, in either order."""
    theirs, ours = LAYERS[cell]
    x = torch.randn(T, B, I)
    wanted = results(changed(cell, change), x)
    layer = changed(cell, change)
    if run_before:
        results(layer, x)
    parameters = {name: id(p) for name, p in layer.named_parameters()}
    name = type(layer).__name__
    lt.replace(layer)
    back = lt.to_torch(layer)
    again = lt.replace(lt.to_torch(layer))
    for converted, kind, other in ((layer, ours, theirs), (back, theirs, ours), (again, ours, theirs)):
        assert isinstance(converted, kind)
        assert not isinstance(converted, other)
        assert type(converted).__name__ == name
        assert {name: id(p) for name, p in converted.named_parameters()} == parameters
        assert_same(results(converted, x), wanted)


def test_parametrizations_go_on_working() -> None:
    """Added, assigned to, cached and removed after the change of class, on one of two layers that shared a class."""
    pair = nn.ModuleList([changed("LSTM", "weight-norm")])
    pair.append(copy.deepcopy(pair[0]))
    assert type(pair[0]) is type(pair[1])
    lt.replace(pair)
    first, second = pair
    x = torch.randn(T, B, I)
    wanted = results(second, x)
    with parametrize.cached():
        assert first.weight_hh_l0 is first.weight_hh_l0
        assert_same(results(first, x), wanted)
    weight = first.weight_hh_l0.detach().clone()
    first.weight_hh_l0 = weight * 2
    torch.testing.assert_close(first.weight_hh_l0, weight * 2)
    parametrize.register_parametrization(first, "bias_ih_l0", nn.Tanh())
    assert first.bias_ih_l0.abs().max() < second.bias_ih_l0.abs().max()
    for name in list(first.parametrizations):
        parametrize.remove_parametrizations(first, name)
    assert type(first) is lt.LSTM
    torch.testing.assert_close(first.weight_hh_l0, weight * 2)
    assert_same(results(second, x), wanted)
    assert type(lt.to_torch(first)) is nn.LSTM


def test_pruning_and_weight_norm_can_be_removed() -> None:
    for change, undo in (
        ("pruned", lambda layer: prune.remove(layer, "weight_hh_l0")),
        ("old-weight-norm", lambda layer: nn.utils.remove_weight_norm(layer, "weight_hh_l0")),
    ):
        layer = lt.replace(changed("GRU", change))
        x = torch.randn(T, B, I)
        wanted = flatten(layer(x))
        for converted in (lt.to_torch(layer), layer):
            undo(converted)
            assert isinstance(converted.weight_hh_l0, nn.Parameter)
            for found, value in zip(flatten(converted(x)), wanted, strict=True):
                assert relative_error(found, value) <= TOLERANCE


def test_conversion_evaluates_no_parametrization() -> None:
    """It may cost, draw random numbers, or, as spectral norm does in training, take a step."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, w: Tensor) -> Tensor:
            Counting.calls += 1
            return w * 1

    layer = nn.LSTM(I, H)
    parametrize.register_parametrization(layer, "weight_hh_l0", Counting())
    x = torch.randn(T, B, I)
    wanted = results(layer, x)
    Counting.calls = 0
    lt.replace(layer)
    back = lt.to_torch(layer)
    lt.replace(lt.to_torch(layer))
    assert Counting.calls == 0
    assert_same(results(copy.deepcopy(back), x), wanted)
    assert_same(results(back, x), wanted)
