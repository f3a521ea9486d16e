"""The search for schedules: with a timer that needs no GPU, and its runs on interpreted kernels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lstm_triton.perf import environment, table, trial, tune
from lstm_triton.perf.timing import Timing
from lstm_triton.perf.trial import Result, Task

from lstm_triton import tuning
from lstm_triton.devices import INTERPRETER, devices
from lstm_triton.planner import KernelProblem, candidates, make_plan, neighbours
from lstm_triton.plans import KernelPlan
from lstm_triton.spec import CellSpec

H200 = devices()["H200"]
TASK = Task("lstm", "forward", "bf16", 1024, 16)
PROBLEM = TASK.problem(H200)
MODEL = candidates(PROBLEM, 2.0)[0]
FOUND = dict.fromkeys(environment.COLUMNS, "recorded")


class Timer:
    """Gives each schedule the time it is told, and keeps what it was asked."""

    def __init__(self, times: dict[KernelPlan, float], spread: float = 0.01, default: float = 5.0) -> None:
        self.times, self.spread, self.default = times, spread, default
        self.asked: list[list[KernelPlan]] = []

    def __call__(
        self, task: Task, problem: KernelProblem, plans: Sequence[KernelPlan], longer: float
    ) -> dict[KernelPlan, Result]:
        assert (task, problem) == (TASK, PROBLEM)
        self.asked.append(list(plans))
        return {plan: self.result(plan) for plan in plans}

    def result(self, plan: KernelPlan) -> Result:
        us = self.times.get(plan, self.default)
        if us < 0:
            return Result("failed", detail="dx: error 1")
        return Result("ok", us, us * (1 - self.spread), us * (1 + self.spread))


def search(timer: Timer, tmp_path: Path, near: float = 2.0) -> tuple[tuning.Choice | None, list[dict[str, str]]]:
    rows = table.Rows(tmp_path / "tune.csv", tune.FIELDS)
    choice = tune.search(TASK, PROBLEM, near, timer, rows, FOUND)
    on_disk = table.read(tmp_path / "tune.csv", tune.FIELDS)
    assert on_disk == rows.rows
    return choice, on_disk


def test_search_walks_from_the_best_tile_to_the_best_product(tmp_path: Path) -> None:
    tile = candidates(PROBLEM, 2.0)[2]
    step = neighbours(PROBLEM, tile)[0]
    last = next(plan for plan in neighbours(PROBLEM, step) if plan not in neighbours(PROBLEM, tile) and plan != tile)
    timer = Timer({MODEL: 4.0, tile: 3.5, step: 3.0, last: 2.0})
    choice, rows = search(timer, tmp_path)
    assert timer.asked[0] == candidates(PROBLEM, 2.0) and timer.asked[-1] == [MODEL, last]
    tried = [plan for plans in timer.asked[:-1] for plan in plans]
    assert len(tried) == len(set(tried))  # none twice
    assert choice is not None and (choice.us_per_step, choice.model_us) == (2.0, 4.0)
    assert {name: getattr(choice, name) for name in trial.SCHEDULE} == {n: getattr(last, n) for n in trial.SCHEDULE}
    assert [row["us_per_step"] for row in rows if row["kept"]] == ["2.000"]
    assert f"{len(tried)} tried, kept {last.engine}" in tune.summary(rows)
    with tuning.using({PROBLEM.key: choice}):
        assert trial.launch_plan(PROBLEM, last).forward.engine == last.engine


@pytest.mark.parametrize(
    ("times", "spread", "kept"),
    [
        ({MODEL: 4.0}, 0.01, False),  # the model was right
        ({MODEL: 4.0, "other": 3.95}, 0.001, False),  # not worth it
        ({MODEL: 4.0, "other": 3.5}, 0.1, False),  # within the spread
        ({MODEL: 4.0, "other": 3.5}, 0.01, True),
        ({MODEL: -1.0, "other": 3.5}, 0.01, False),  # nothing to compare with
        ({MODEL: 4.0, "other": -1.0}, 0.01, False),  # wrong results are no winner
    ],
)
def test_what_is_kept(times: dict[object, float], spread: float, kept: bool, tmp_path: Path) -> None:
    other = candidates(PROBLEM, 2.0)[1]
    timer = Timer({other if key == "other" else key: us for key, us in times.items()}, spread)
    choice, rows = search(timer, tmp_path)
    assert (choice is not None) == kept == any(row["kept"] for row in rows)
    text = tune.summary(rows)
    assert kept or "the model's choice stands" in text
    assert ("FAILED" in text) == (-1.0 in times.values())


def test_nothing_right_is_nothing_kept(tmp_path: Path) -> None:
    choice, rows = search(Timer({}, default=-1.0), tmp_path)
    assert choice is None and {row["status"] for row in rows} == {"failed"}
    assert not any(row["us_per_step"] for row in rows)


def test_a_plan_goes_through_a_choice_and_back() -> None:
    for plan in [*candidates(PROBLEM, 3.0), *neighbours(PROBLEM, MODEL)]:
        found = trial.launch_plan(PROBLEM, plan).forward
        assert replace(found, measured_us=None) == plan and found.tuned
    with pytest.raises(ValueError, match="was to be tried"):
        trial.launch_plan(PROBLEM, replace(MODEL, block_b=128, block_h=64))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("cell", tune.CELLS)
def test_runs_are_the_kernels_own(cell: str, direction: str) -> None:
    """What a trial times, on interpreted kernels: every tensor is there, and the results are finite."""
    plan = make_plan(CellSpec(cell), 4, 3, 20, torch.float32, INTERPRETER)
    run = trial.Data(Task(cell, direction, "fp32", 20, 3), plan, device="cpu", seq=4).run(plan)
    for _ in range(2):
        first, *_ = run()
        assert first.shape[:2] == (4, 3) and first.isfinite().all()


def test_trial_judges_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a trial but the GPU: compile, check, time; wrong, refused and broken schedules never get a time."""
    plans = candidates(PROBLEM, 2.0)[:4]
    compiled: list[object] = []
    fate = {plans[1]: "dx: error 1", plans[2]: trial.OutOfResources(1, 2, "shared memory"), plans[3]: RuntimeError("x")}

    class Processes:
        def map(self, function: object, kernels: list[object]) -> list[None]:
            assert function is trial.compile_kernel
            compiled.extend(kernels)
            return []

    class Data:
        def __init__(self, *arguments: object) -> None:
            pass

        def run(self, plan: object) -> object:
            return lambda: (torch.ones(1),)

    def wrong(task: Task, problem: KernelProblem, plan: KernelPlan) -> str:
        found = fate.get(plan, "")
        if isinstance(found, Exception):
            raise found
        return found

    def race(
        runs: dict[str, object], clock: str, seconds: float, states: tuple[str], check: object
    ) -> dict[str, object]:
        assert clock == "clock of cuda" and seconds == pytest.approx(0.2) and states == ("cold",)
        return {name: {"cold": Timing(trial.SEQ / 1e3, 0.1, 9.0, 5)} for name in runs}

    for name, value in (
        ("Data", Data),
        ("wrong", wrong),
        ("race", race),
        ("clock_for", "clock of {}".format),
        ("alive", lambda device: True),
    ):
        monkeypatch.setattr(trial, name, value)
    tried = trial.Trial(0.1)
    tried._processes = Processes()
    results = tried(TASK, PROBLEM, plans, 2.0)
    assert [results[plan].status for plan in plans] == ["ok", "failed", "refused", "error"]
    assert results[plans[0]].us == pytest.approx(1.0)
    assert [results[plan].us for plan in plans[1:]] == [float("inf")] * 3
    assert len(compiled) == 4
    monkeypatch.setattr(Data, "run", lambda self, plan: lambda: (torch.full((1,), torch.nan),))
    assert tried(TASK, PROBLEM, plans[:1], 2.0)[plans[0]].detail.endswith("not finite after it was timed")
    monkeypatch.setattr(trial, "alive", lambda device: False)
    with pytest.raises(RuntimeError, match="x"):
        tried(TASK, PROBLEM, plans, 2.0)


def options(tmp_path: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(["--out", str(tmp_path / "out"), *arguments])


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert tune.main(options(tmp_path, "--cells", "gru", "--hidden", "512", "--batch", "16")) == tune.NO_GPU
    text = capsys.readouterr().out
    assert "nothing was measured" in text and "gru backward tf32 H=512 B=16" in text and "estimated" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--near", "0.5"], "--near: expected 1 or more"),
        (["--near", "nan"], "--near: expected 1 or more"),
        (["--seconds", "-1"], "--seconds: expected a number above zero"),
        (["--minutes", "nan"], "--minutes: expected a number above zero"),
        (["--direction", "up"], "--direction: 'up' is none of forward, backward"),
        (["--target", "TPU"], "target must be one of"),
        (["--constants", "/nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_options_are_named(
    wrong: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit) as stopped:
        tune.main(options(tmp_path, *wrong))
    assert message in f"{stopped.value}{capsys.readouterr().out}"


def test_whole_command_with_a_stand_in_for_the_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From options to table on disk: the second problem finds something better, the third is not reached."""
    better = candidates(PROBLEM, 2.0)[1]

    class Trial:
        def __init__(self, seconds: float) -> None:
            pass

        def __enter__(self) -> Trial:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def __call__(self, task: Task, problem: KernelProblem, plans: Sequence[KernelPlan], longer: float) -> object:
            times = Timer({better: 2.0} if task.direction == "forward" else {})
            return {plan: times.result(plan) for plan in plans}

    monkeypatch.setattr(tune, "Trial", Trial)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch, "empty", lambda *arguments, **more: None)
    monkeypatch.setattr("lstm_triton.launch.device_of", lambda tensor: H200)
    monkeypatch.setattr(environment, "collect", lambda device: FOUND | {"python": "recorded"})
    some = options(tmp_path, "--cells", "lstm", "--dtype", "bf16", "--hidden", "1024", "--batch", "16")
    assert tune.main(some) == 0
    path = tmp_path / "out" / tuning.path_name("H200")
    (found,) = tuning.read(path.read_text(), "H200").values()
    assert (found.engine, found.block_h, found.us_per_step) == (better.engine, better.block_h, 2.0)
    text = capsys.readouterr().out
    assert "lstm forward bf16 1024 16" in text and "kept" in text and "the model's choice stands" in text
