"""Cells whose gradients jump are checked away from the jumps, and on both sides of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstm_triton.perf import kinks, problems
from lstm_triton.perf.numerics import TOLERANCE, local_error
from lstm_triton.perf.problems import Problem, Tensors, call, draw

from lstm_triton.spec import OPTIONS, CellSpec, variants

KINKED = [spec for spec in variants() if kinks.has_kinks(spec)]


def problem(spec: CellSpec) -> Problem:
    return Problem(spec, "", "bf16", 12, 16, 30, 20)


def moved_gradient(spec: CellSpec) -> float:
    """How far one element of a gradient moves, as a share of what it may be off by, when what was drawn is rounded
    otherwise: every number by up to a last place of bf16.
    """
    asked, tensors = problem(spec), draw(problem(spec))
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: tensor.double() * (1 + 2**-8 * (torch.rand(tensor.shape, generator=generator) - 0.5))
        for name, tensor in tensors.arguments.items()
    }
    here = call(asked, tensors, "cpu", "reference", torch.float64)
    there = call(asked, Tensors(moved, tensors.outer, {}), "cpu", "reference", torch.float64)
    allowed = TOLERANCE["bf16"][1]
    return max(local_error(there[name], here[name]) / allowed for name in ("dx", "dh0", *here) if name[0] == "d")


def test_those_with_kinks_are_known() -> None:
    assert {str(spec) for spec in KINKED if spec.bias} == {
        "rnn activation=relu",
        "lstm peephole=True coupled=True cell_clip=0.5",
        "lstm cell_clip=0.5 gate_clip=1.0",
        "lstm activation=softsign recurrent_activation=hard_sigmoid output_activation=('scaled_tanh',1.5,0.5)",
        "gru activation=elu recurrent_activation=hard_sigmoid gate_clip=2.0",
        "rnn activation=leaky_relu gate_clip=2.0",
    }
    assert kinks.kinks(CellSpec("rnn", ("elu", 0.5, 0.0)), ("elu", 0.5)) == [0.0]
    assert kinks.kinks(CellSpec("gru"), ("hard_sigmoid", 0.25, 0.5)) == [2.0]
    assert kinks.kinks(CellSpec("gru"), ("hard_sigmoid", 0.0, 0.5)) == []
    assert kinks.kinks(CellSpec("rnn", "thresholded_relu", gate_clip=3.0), "thresholded_relu") == [1.0, 3.0]


@pytest.mark.parametrize(
    ("found", "levels"), [([0.0], [4.0]), ([1.0], [0.5, 5.0]), ([0.0, 2.0], [1.0, 6.0]), ([1.0, 3.0], [0.5, 2.0, 7.0])]
)
def test_levels_are_far_from_every_kink(found: list[float], levels: list[float]) -> None:
    assert kinks.levels(found) == levels


@pytest.mark.parametrize("spec", KINKED, ids=str)
def test_rounding_decides_about_no_gradient(spec: CellSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert moved_gradient(spec) < 1
    # a fresh layer's gates do not come as far as where hard_sigmoid ends
    if "hard_sigmoid" not in str(spec):
        monkeypatch.setattr(problems.kinks, "avoid", lambda *arguments: None)
        assert moved_gradient(spec) > 5


@pytest.mark.parametrize("spec", [spec for spec in OPTIONS if spec.gate_clip or spec.cell_clip], ids=str)
def test_clips_are_met_and_not_met(spec: CellSpec) -> None:
    asked = replace(problem(spec), ragged=spec.cell == "lstm")  # which gives the cell states
    found = call(asked, draw(asked), "cpu", "reference", torch.float64)
    if spec.gate_clip:
        by_gate = found["db_ih"].unflatten(0, (spec.gates, -1))
        for gate in by_gate:
            assert 0.2 < (gate == 0).double().mean() < 0.8
    if spec.cell_clip:
        cells = found["cells"][found["cells"] != 0].abs()
        assert cells.max() == spec.cell_clip and 0.3 < (cells == spec.cell_clip).double().mean() < 0.7


def test_cells_without_kinks_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem(CellSpec("lstm", peephole=True))
    drawn = draw(asked)
    monkeypatch.setattr(problems.kinks, "avoid", lambda *arguments: None)
    assert all(torch.equal(drawn.arguments[name], tensor) for name, tensor in draw(asked).arguments.items())
