"""Tuned schedules: the table against its schema, and the planner that follows it as far as it can."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lstm_triton as lt
from lstm_triton import tuning
from lstm_triton.devices import SCHEMA, devices
from lstm_triton.planner import KernelProblem, candidates, make_plan, neighbours
from lstm_triton.plans import LaunchPlan
from lstm_triton.spec import CellSpec
from lstm_triton.tuning import Choice, Key

pytestmark = pytest.mark.both
H200 = devices()["H200"]
KEY = Key.of("lstm", "tanh", "forward", "half", 1024, 16)
CHOICE = Choice("streamed", 16, 16, 128, 4, 2, 3, 8, us_per_step=2.5, model_us=3.0)
MEASURED = {name: "recorded" for name in SCHEMA["measured"]}


def plan(B: int = 16, engine: str = "auto", **options: Any) -> LaunchPlan:
    return make_plan(CellSpec("lstm"), 9, B, 1024, torch.bfloat16, H200, engine=engine, **options)


def test_key_puts_batches_together_that_a_tile_serves_alike() -> None:
    rows = [Key.of("gru", "tanh", "backward", "tf32", 512, batch).rows for batch in (1, 16, 17, 32, 100, 8000)]
    assert rows == [16, 16, 32, 32, 128, 8192]


def test_planner_follows_the_table() -> None:
    before = plan()
    with tuning.using({KEY: CHOICE}):
        tuned = plan()
        assert (
            plan(engine="resident") == plan(engine="resident", tile=None) and not plan(engine="resident").forward.tuned
        )
        assert not plan(tile=(16, 8)).forward.tuned and not plan(B=64).forward.tuned
        assert plan(engine="streamed").forward == tuned.forward and plan(B=3).forward.tuned
    assert plan() == before and not before.forward.tuned
    kernel = tuned.forward
    assert (kernel.engine, kernel.block_b, kernel.block_h, kernel.block_k, kernel.split_k) == (
        "streamed",
        16,
        16,
        128,
        4,
    )
    assert (kernel.stages, kernel.num_warps, kernel.measured_us) == (3, 8, 2.5)
    assert tuned.backward == before.backward
    assert "tuned" in tuned.label and "tuned" not in before.label
    assert "where it took 2.50 us a step" in tuned.explain() and "model's choice took 3.00 us" in tuned.explain()


def test_tuned_schedule_that_cannot_run_is_said_and_left() -> None:
    with tuning.using({KEY: replace(CHOICE, engine="resident", block_b=64, block_h=64)}):
        left = plan()
    assert not left.forward.tuned and left.forward == plan().forward
    assert "the tuned schedule was not taken: " in left.explain()


def test_interpreter_and_unknown_gpus_have_no_table() -> None:
    with tuning.using({KEY: CHOICE}):
        assert tuning.lookup("", KEY) is None and tuning.lookup("H200", KEY) is CHOICE


def test_round_trip() -> None:
    table = {KEY: CHOICE, replace(KEY, direction="backward"): replace(CHOICE, engine="resident")}
    assert tuning.read(tuning.write(table, "H200", MEASURED), "H200") == table


def spoilt(**changes: Any) -> str:
    content = json.loads(tuning.write({KEY: CHOICE}, "H200", MEASURED))
    for name, value in changes.items():
        place = content if name in content else content["plans"][0]
        place[name] = value
        if value is ...:
            del place[name]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "A100"}, "it is for A100"),
        ({"triton": "2.0"}, "Triton 2.0"),
        ({"measured": {}}, "measured must have the fields date"),
        ({"plans": {}}, "plans is {}, of the wrong type"),
        ({"block_k": ...}, r"plans\[0\] must have the fields cell"),
        ({"block_k": "64"}, r"plans\[0\]: block_k is '64', of the wrong type"),
        ({"block_k": 48}, r"plans\[0\]: block_k must be a power of two, got 48"),
        ({"block_k": 32}, "a slice of K must hold 16 columns"),
        ({"engine": "fast"}, "engine must be local, resident, streamed or step, got 'fast'"),
        ({"ahead": 0}, "above zero"),
        ({"us_per_step": -1.0}, "above zero"),
        ({"speed": 1}, "must have the fields"),
    ],
)
def test_table_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuning.read(spoilt(**changes), "H200")


def test_twice_the_same_problem_is_refused() -> None:
    content = json.loads(spoilt())
    content["plans"] *= 2
    with pytest.raises(ValueError, match="same problem"):
        tuning.read(json.dumps(content), "H200")


@pytest.mark.parametrize("family", devices())
def test_every_table_in_the_package_is_read_and_followed(family: str) -> None:
    folder = Path(lt.__file__).parent / "tuned" / "plans"
    stem = tuning.path_name(family, "")
    for path in folder.glob(f"{stem.removesuffix('.json')}*.json"):
        version = path.stem.removeprefix(stem.removesuffix(".json"))
        table = tuning.read(path.read_text(), family, version)
        assert table
        for choice in table.values():
            assert choice.us_per_step < choice.model_us


def problem(direction: str = "forward", **changes: Any) -> KernelProblem:
    base = KernelProblem(CellSpec("lstm"), direction, 16, 1024, torch.bfloat16, H200, "tf32", True)
    return replace(base, **changes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_search_begins_with_the_models_choice(direction: str) -> None:
    found = candidates(problem(direction), near=2.0)
    assert found[0] == getattr(plan(), direction)
    assert len(found) > 2 and len(found) == len(set(found))
    assert all(found[0].step_us <= other.step_us <= 2 * found[0].step_us for other in found)
    assert len(candidates(problem(direction), near=1.0)) < len(found)


@pytest.mark.parametrize("engine", ["local", "resident", "streamed"])
def test_neighbours_differ_in_the_product_alone(engine: str) -> None:
    start = make_plan(CellSpec("lstm"), 9, 16, 64, torch.bfloat16, H200, engine=engine).forward
    found = neighbours(problem(H=64), start)
    assert found and start not in found
    for other in found:
        same = ("engine", "block_b", "block_h", "tiles", "n_b", "n_h")
        assert all(getattr(other, name) == getattr(start, name) for name in same)
        assert other.shared_bytes <= H200.shared_per_program
        assert engine == "local" or other.block_k >= 16 * other.split_k
