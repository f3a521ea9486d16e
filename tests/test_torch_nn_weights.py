"""PyTorch's tests of what is done to the weights of recurrent modules, on ours, everything beside torch.nn: normed,
parametrized, pruned, dropped, tied, moved, saved and loaded.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch_pairs import (
    ALIKE,
    CELLS,
    INTERPRETED,
    PAIRS,
    TOLERANCE,
    assert_close,
    build,
    outcome,
    results,
    seeded,
    tensors,
)

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]

# the interpreter takes its time at every step of every layer
T, B, I, H, DEPTH = (2, 2, 4, 5, 1) if INTERPRETED else (3, 2, 4, 5, 2)  # noqa: E741


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", ALIKE)
def test_weight_norm(name: str) -> None:
    """The old one, which puts a plain tensor in the parameter's place."""
    found, of = [], "weight_hh_l0_reverse"
    for layer in build(name, I, H, bidirectional=True, dtype=torch.float64):
        assert all(isinstance(w, nn.Parameter) for w in layer._flat_weights)
        torch.nn.utils.weight_norm(layer, name=of)
        assert sum(isinstance(w, nn.Parameter) for w in layer._flat_weights) == len(layer._flat_weights) - 1
        found.append(results(layer, torch.randn(T, B, I, dtype=torch.float64, generator=seeded())))
        torch.nn.utils.remove_weight_norm(layer, name=of)
        assert all(isinstance(w, nn.Parameter) for w in layer._flat_weights)
        assert of in layer._parameters
        assert not {f"{of}_g", f"{of}_v"} & layer._parameters.keys()
    assert_close(*found, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ALIKE)
def test_parametrizations(name: str) -> None:
    """weight_norm, a mask on each weight (pruning), and a parametrization of one's own."""

    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    found = []
    for layer in build(name, I, H, 2, dtype=torch.float64):
        parametrizations.weight_norm(layer, "weight_ih_l0")
        parametrize.register_parametrization(layer, "weight_hh_l1", Halved())
        for of in ("weight_hh_l0", "bias_ih_l1"):
            prune.l1_unstructured(layer, of, amount=0.5)
        assert len(layer.all_weights) == 2
        found.append(results(layer, torch.randn(T, B, I, dtype=torch.float64, generator=seeded())))
    assert_close(*found, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", PAIRS)
def test_a_parametrization_runs_once_for_a_call(name: str) -> None:
    """All but the one that check_input looks at, once more."""
    module = PAIRS[name][0](I, H)
    calls = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(weight)
            return weight

    parametrize.register_parametrization(module, "weight_hh" if name in CELLS else "weight_hh_l0", Counted())
    calls.clear()
    module(torch.randn(B, I) if name in CELLS else torch.randn(1, B, I))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ALIKE)
def test_weights_dropped_for_a_time(name: str) -> None:
    """A parameter removed, the module moved without it, a plain tensor put in its place, as weight dropping does."""
    layer = PAIRS[name][0](I, H)
    x = torch.randn(T, B, I)
    expected = layer.double()(x.double())[0]
    layer.float()
    weight = layer.weight_hh_l0
    del layer.weight_hh_l0
    assert not hasattr(layer, "weight_hh_l0")
    assert layer._flat_weights.count(None) == 1
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        layer(x)
    layer.double()
    layer.weight_hh_l0 = weight.detach().double() * 1
    torch.testing.assert_close(layer(x.double())[0], expected, rtol=1e-6, atol=1e-7)
    assert "weight_hh_l0" not in dict(layer.named_parameters())
    raw = weight.detach().double().requires_grad_()
    layer.weight_hh_l0 = torch.nn.functional.dropout(raw, 0.5)
    layer(x.double())[0].sum().backward()
    assert raw.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", ALIKE)
def test_tied_weights_train_together(name: str) -> None:
    found = []
    for layer in build(name, I, H, bidirectional=True, dtype=torch.float64):
        layer.weight_hh_l0_reverse = layer.weight_hh_l0
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(DEPTH):
            optimizer.zero_grad()
            layer(torch.randn(T, B, I, dtype=torch.float64, generator=seeded()))[0].square().sum().backward()
            optimizer.step()
        assert layer.weight_hh_l0_reverse is layer.weight_hh_l0
        found.append(dict(layer.named_parameters()))
    assert_close(*found, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", PAIRS)
def test_factories_and_moves(name: str) -> None:
    for dtype in (torch.float64, torch.float16):
        layer = PAIRS[name][0](I, H, device="meta", dtype=dtype)
        assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(dtype, "meta")}
        layer.to_empty(device="cpu").reset_parameters()
        assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(dtype, "cpu")}
        assert all(p.abs().max() <= H**-0.5 for p in layer.parameters())
    with torch.device("meta"):
        assert all(p.is_meta for p in PAIRS[name][0](I, H).parameters())
    x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)
    layer = PAIRS[name][0](I, H)
    for dtype in (torch.float64, torch.float32):
        assert all(t.dtype == dtype for _, t in tensors(layer.to(dtype)(x.to(dtype))))


@pytest.mark.parametrize("name", PAIRS)
def test_saved_and_copied(name: str) -> None:
    model = nn.ModuleDict({"inner": nn.Sequential(PAIRS[name][0](I, H, bias=False))})
    x = torch.randn(B, I) if name in CELLS else torch.randn(1, B, I)
    expected = [t for _, t in tensors(model["inner"](x))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert repr(twin) == repr(model)
        assert list(twin.state_dict()) == list(model.state_dict())
        assert all(torch.equal(a, b) for (_, a), b in zip(tensors(twin["inner"](x)), expected, strict=True))
        with torch.no_grad():
            next(twin.parameters()).zero_()
    assert next(model.parameters()).count_nonzero() > 0


@pytest.mark.parametrize("name", PAIRS)
def test_state_dicts_that_do_not_fit(name: str) -> None:
    for state in (PAIRS[name][1](I, H + 1).state_dict(), PAIRS[name][1](I, H, bias=False).state_dict(), {}):
        mine, other = (outcome(lambda kind=kind: kind(I, H).load_state_dict(state)) for kind in PAIRS[name])  # noqa: B023
        assert other[0] == "RuntimeError"
        assert mine == other
