"""What layers draw in training and only then, for each layer, direction and call: dropout masks and zoneout's seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from option_problems import CELLS, LAYERS, B, H, I, P, T, assert_close, seeded
from torch import nn

import lstm_triton as lt
from lstm_triton import launch

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]


def record(monkeypatch: pytest.MonkeyPatch, cell: str) -> list[dict[str, Any]]:
    """The keyword arguments of every call of the function from here on."""
    calls: list[dict[str, Any]] = []
    function = getattr(lt.functional, cell)
    monkeypatch.setattr(
        lt.functional, cell, lambda *args, **options: calls.append(options) or function(*args, **options)
    )
    return calls


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize(
    ("cell", "own", "gates"),
    [("lstm", {"proj_size": P}, 4), ("lstm", {"coupled": True}, 3), ("gru", {}, 3), ("rnn", {}, 1)],
)
def test_training_draws_masks(
    cell: str, own: dict[str, Any], gates: int, per_gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each layer, direction and call, scaled; in evaluation none."""
    calls = record(monkeypatch, cell)
    layer = LAYERS[cell](
        I,
        H,
        num_layers=2,
        bidirectional=True,
        input_dropout=0.5,
        recurrent_dropout=0.2,
        dropout_per_gate=per_gate,
        **own,
    )
    rows, x = 16, torch.randn(1, 16, I, generator=seeded())
    torch.manual_seed(0)
    first, _ = layer(x)
    second, _ = layer(x)
    torch.manual_seed(0)
    again, _ = layer(x)
    assert torch.equal(first, again) and not torch.equal(first, second)
    outputs = own.get("proj_size", H)
    lead = (gates, rows) if per_gate else (rows,)
    assert [c["input_mask"].shape for c in calls[:4]] == [(*lead, n) for n in (I, I, 2 * outputs, 2 * outputs)]
    assert [c["recurrent_mask"].shape for c in calls[:4]] == [(*lead, outputs)] * 4
    for name, p in (("input_mask", 0.5), ("recurrent_mask", 0.2)):
        drawn = [c[name] for c in calls[:4]]
        assert all(set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()} for mask in drawn)
        assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[2], drawn[3])
        kept = torch.cat([mask.flatten() for mask in drawn]).bool().double()
        assert abs(kept.mean() - (1 - p)) <= 4 * (p * (1 - p) / kept.numel()) ** 0.5
    calls.clear()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert not any({"input_mask", "recurrent_mask", "seed"} & c.keys() for c in calls)


@pytest.mark.parametrize("cell", CELLS)
def test_dropped_altogether(cell: str) -> None:
    """With probability 1 only biases are left: every step the same, and no gradient by the weights."""
    layer = LAYERS[cell](I, H, input_dropout=1.0, recurrent_dropout=1)
    y, _ = layer(torch.randn(T, B, I, generator=seeded()))
    assert y.isfinite().all() and torch.equal(y[:, 0], y[:, 1])
    by_weights = torch.autograd.grad(y.sum(), [layer.weight_ih_l0, layer.weight_hh_l0])
    assert not any(g.any() for g in by_weights)


@pytest.mark.parametrize("cell", CELLS)
def test_training_draws_seeds(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, cell)
    layer = LAYERS[cell](I, H, num_layers=2, bidirectional=True, zoneout=0.5)
    x = torch.randn(T, B, I, generator=seeded())
    torch.manual_seed(0)
    first, _ = layer(x)
    second, _ = layer(x)
    torch.manual_seed(0)
    assert torch.equal(first, layer(x)[0]) and not torch.equal(first, second)
    seeds = [c["seed"] for c in calls[:8]]
    assert all(s.shape == (1,) and s.dtype == torch.int64 for s in seeds)
    assert len({int(s) for s in seeds}) == 8 and any(abs(int(s)) > 2**32 for s in seeds)
    calls.clear()
    layer.eval()(x)
    assert len(calls) == 4 and not any("seed" in c for c in calls)


def test_nothing_is_drawn_without_an_option() -> None:
    layer = lt.LSTM(I, H, zoneout=(0.0, 0.0))
    state = torch.get_rng_state()
    layer(torch.zeros(1, 1, I))
    assert torch.equal(torch.get_rng_state(), state)


def test_regularisation_trains() -> None:
    """The mean over masks of a linear network is that without them."""
    layer = lt.RNN(I, H, activation="linear", recurrent_dropout=0.3, input_dropout=0.3, dtype=torch.float64)
    rows = 256 if launch.INTERPRETED else 4096
    x = torch.randn(2, 1, I, generator=seeded(), dtype=torch.float64).expand(2, rows, I)
    torch.manual_seed(0)
    y, _ = layer(x)
    wanted = layer.eval()(x[:, :1])[0][:, 0]
    deviation = y.std(dim=1) / rows**0.5
    assert ((y.mean(dim=1) - wanted).abs() <= 5 * deviation).all() and (deviation > 0).all()


@pytest.mark.parametrize("cell", CELLS)
def test_layers_under_autocast(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, cell)
    layer = LAYERS[cell](I, H, num_layers=2, layer_norm=True, recurrent_dropout=0.5, zoneout=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(torch.randn(2, B, I, generator=seeded()))
    assert y.dtype == torch.bfloat16
    assert [c["recurrent_mask"].dtype for c in calls] == [torch.float32, torch.bfloat16]
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dropout_between_layers_is_drawn_as_before(p: float) -> None:
    """torch.nn's draws where no option asks for others."""
    torch.manual_seed(0)
    ours = lt.GRU(I, H, num_layers=2, dropout=p, dtype=torch.float64)
    theirs = nn.GRU(I, H, num_layers=2, dropout=p, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, generator=seeded(), dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(layer(x))
    assert_close(*results)
