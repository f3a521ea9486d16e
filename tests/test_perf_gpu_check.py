"""gpu-check's orchestration, with a clock and a runner that need no GPU."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from lstm_triton.perf import engines, environment, gpu_check, sweep, table
from lstm_triton.perf.gpu_check import Outcome, Part
from lstm_triton.perf.numerics import Problem


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def part(name: str, share: float, clock: Clock, takes: float, log: list[tuple[str, float]]) -> Part:
    def run(seconds: float) -> Outcome:
        log.append((name, seconds))
        clock.now += min(takes, seconds)
        return Outcome("passed", [f"{name} ran"])

    return Part(name, share, run)


def test_parts_share_the_budget_and_inherit_what_is_left() -> None:
    clock, log = Clock(), []
    todo = [part("a", 0.25, clock, 20, log), part("b", 0.25, clock, 1000, log), part("c", 0.5, clock, 1000, log)]
    outcomes = gpu_check.orchestrate(todo, 210.0, clock)
    # 200 s to share: a may take 50 and takes 20, so b gets 80; c its own 100
    assert log == [("a", 50.0), ("b", 80.0), ("c", 100.0)]
    assert clock.now <= 1000.0 + 210.0 - gpu_check.RESERVE
    assert all(outcome.state == "passed" for outcome in outcomes.values())


def test_a_part_that_raises_fails_alone() -> None:
    clock, log = Clock(), []

    def broken(seconds: float) -> Outcome:
        raise RuntimeError("device gone")

    outcomes = gpu_check.orchestrate([Part("a", 0.5, broken), part("b", 0.5, clock, 1, log)], 100.0, clock)
    assert outcomes["a"].state == "FAILED" and "device gone" in outcomes["a"].lines[0]
    assert outcomes["b"].state == "passed" and [name for name, _ in log] == ["b"]


def test_a_part_without_time_is_unfinished() -> None:
    clock, log = Clock(), []

    def greedy(seconds: float) -> Outcome:
        clock.now += 500
        return Outcome("passed")

    outcomes = gpu_check.orchestrate([Part("a", 0.5, greedy), part("b", 0.5, clock, 1, log)], 100.0, clock)
    assert not log and outcomes["b"].state == "unfinished" and "no time" in outcomes["b"].lines[0]


class Runner:
    """Writes what a part's process would have left, and returns the statuses it is given, one a call."""

    def __init__(self, *statuses: int | None, rows: list[dict[str, object]] | None = None, output: str = "") -> None:
        self.statuses = list(statuses)
        self.output = output
        self.rows = rows or []
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], seconds: float, log: Path) -> int | None:
        self.commands.append(list(command))
        with log.open("a") as file:
            file.write(self.output)
        source = {"source": environment.source_hash()}
        if "sweep" in command:
            table.Rows(log.parent / "sweep.csv", sweep.FIELDS).add(*(row | source for row in self.rows))
        if "lstm_triton.perf.engines" in command:
            table.Rows(log.parent / "numerics.csv", engines.FIELDS).add(*(row | source for row in self.rows))
        return self.statuses.pop(0)


def row(status: str = "ok", provider: str = "ours", **more: object) -> dict[str, object]:
    case = sweep.telling()[0]
    time = {"median_ms": "1.0000", "ratio": "2.000"} if status == "ok" else {}
    return {**case.key, "provider": provider, "status": status, "error": "1e-3", **time, **more}


def test_sweep_restarts_with_resume_when_its_device_is_lost(tmp_path: Path) -> None:
    runner = Runner(engines.DEVICE_LOST, -11, 0, rows=[row()])
    outcome = gpu_check.sweep_part(tmp_path, False, runner, 60.0)
    assert outcome.state == "passed"
    assert ["--resume" in command for command in runner.commands] == [False, True, True]
    assert "lost its process 2 times" in outcome.lines[0]


def test_sweep_with_a_failed_row_of_ours_fails(tmp_path: Path) -> None:
    outcome = gpu_check.sweep_part(tmp_path, False, Runner(1, rows=[row("failed"), row(provider="torch")]), 60.0)
    assert outcome.state == "FAILED"
    assert any("failed" in line and "1.0000" in line for line in outcome.lines[2:])


def test_sweep_with_torch_out_of_tolerance_passes_and_shows_its_error(tmp_path: Path) -> None:
    loose = row("loose", "torch", median_ms="3.0000", error="5e-2")
    outcome = gpu_check.sweep_part(tmp_path, False, Runner(0, rows=[row(), loose]), 60.0)
    assert outcome.state == "passed"
    assert any("3.0000" in line and "torch.nn's error: 5e-2" in line for line in outcome.lines[2:])


def test_sweep_without_any_result_does_not_pass(tmp_path: Path) -> None:
    assert gpu_check.sweep_part(tmp_path, False, Runner(None), 60.0).state == "unfinished"
    assert gpu_check.sweep_part(tmp_path, False, Runner(0), 60.0).state == "FAILED"
    assert gpu_check.sweep_part(tmp_path, False, Runner(0, rows=[row(provider="torch")]), 60.0).state == "FAILED"


def test_failed_numerics_fail_and_are_named(tmp_path: Path) -> None:
    good = [judged(problem) for problem in engines.on_gpu()]
    bad = {
        "engine": "resident",
        "cell": "gru",
        "dtype": "fp16",
        "status": "failed",
        "error": "inf",
        "detail": "dx: inf",
    }
    outcome = gpu_check.numerics_part(tmp_path, False, Runner(1, rows=[*good, bad]), 60.0)
    assert outcome.state == "FAILED"
    assert any("resident gru fp16" in line and "dx: inf" in line for line in outcome.lines)
    assert gpu_check.numerics_part(tmp_path, False, Runner(0, rows=good), 60.0).state == "passed"


def judged(problem: Problem) -> dict[str, object]:
    return {"engine": problem.engine, "cell": problem.cell, "dtype": problem.dtype, "status": "ok", "error": "2e-3"}


@pytest.mark.parametrize("status", [0, None])
def test_numerics_that_did_not_reach_every_engine_and_dtype_are_unfinished(status: int | None, tmp_path: Path) -> None:
    missed = {("step", "fp64"), ("step", "fp32"), ("local", "tf32")}
    rows = [judged(problem) for problem in engines.on_gpu() if (problem.engine, problem.dtype) not in missed]
    outcome = gpu_check.numerics_part(tmp_path, False, Runner(status, rows=rows), 60.0)
    assert outcome.state == "unfinished"
    assert outcome.lines[1] == "not reached: local tf32; step fp32 fp64"
    assert sum("not reached" in line for line in outcome.lines[2:]) == 2


def test_numerics_that_lose_the_device_for_good_fail(tmp_path: Path) -> None:
    runner = Runner(*[engines.DEVICE_LOST] * 4, rows=[judged(problem) for problem in engines.on_gpu()])
    assert gpu_check.numerics_part(tmp_path, False, runner, 60.0).state == "FAILED"


def test_rows_of_other_sources_do_not_count(tmp_path: Path) -> None:
    table.Rows(tmp_path / "sweep.csv", sweep.FIELDS).add(row() | {"source": "other"})

    def fails(command: Sequence[str], seconds: float, log: Path) -> int | None:
        return 1

    assert gpu_check.sweep_part(tmp_path, True, fails, 60.0).state == "FAILED"


def test_failed_gpu_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / gpu_check.LOG).write_text("tests/test_gpu.py::test_of_another_run FAILED [ 50%]\n")
    outcome = gpu_check.tests_part(tmp_path / "test_gpu.py", tmp_path, Runner(1, output=BEGUN + FAILED), 60.0)
    assert outcome.state == "FAILED"
    assert outcome.lines == ["1 failed, 1 passed in 1s", "  FAILED test_x[(9, 17) bf16]: assert 0"]


@pytest.mark.parametrize(
    ("status", "output", "state", "shown"),
    [
        (None, "", "unfinished", "none"),
        (None, "BEGUN", "unfinished", "1 PASSED; last line: tests/test_gpu.py::test_x[(9, 17) bf16]"),
        (None, "BEGUN FAILED", "FAILED", "1 PASSED, 1 FAILED"),
        (0, "BEGUN", "passed", ""),
        (5, "", "FAILED", ""),
        (-11, "BEGUN", "FAILED", ""),
    ],
)
def test_tests_that_run_out_of_time_are_told_from_tests_that_fail(
    status: int | None, output: str, state: str, shown: str, tmp_path: Path
) -> None:
    texts = {"": "", "BEGUN": BEGUN, "BEGUN FAILED": BEGUN + "FAILED   [ 99%]\n"}
    (tmp_path / gpu_check.LOG).touch()
    outcome = gpu_check.tests_part(tmp_path / "test_gpu.py", tmp_path, Runner(status, output=texts[output]), 60.0)
    assert outcome.state == state and shown in outcome.lines[0]


#: What pytest -v prints, up to a test in hand; and how that one fails.
BEGUN = "collected 2 items\n\ntests/test_gpu.py::test_a PASSED [ 50%]\ntests/test_gpu.py::test_x[(9, 17) bf16] "
FAILED = "FAILED [100%]\n\nFAILED tests/test_gpu.py::test_x[(9, 17) bf16] - assert 0\n1 failed, 1 passed in 1s\n"


def test_what_pytest_prints_is_understood(tmp_path: Path) -> None:
    """Its real output, of a test that passes and one that fails."""
    (tmp_path / "conftest.py").write_text(
        "def pytest_configure(config):\n    config.addinivalue_line('markers', 'gpu: x')\n"
    )
    tests = tmp_path / "test_gpu.py"
    tests.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "@pytest.mark.parametrize('shape', [(9, 17), (1, 2)], ids=str)\n"
        "def test_x(shape):\n    assert shape == (1, 2), 'too large'\n"
    )
    outcome = gpu_check.tests_part(tests, tmp_path, gpu_check.run_process, 100.0)
    assert outcome.state == "FAILED" and "1 failed, 1 passed" in outcome.lines[0]
    assert outcome.lines[1:] == ["  FAILED test_x[(9, 17)]: AssertionError: too large"]


def test_report_fits_and_ends_with_the_verdict() -> None:
    outcomes = {
        "tests": Outcome("unfinished", ["5 passed"]),
        "numerics": Outcome("FAILED", [f"numerics {i}" for i in range(30)]),
        "sweep": Outcome("passed", [f"sweep {i}" for i in range(300)]),
    }
    lines = gpu_check.closing_report("head", outcomes).splitlines()
    assert len(lines) <= gpu_check.REPORT_LINES
    assert lines[-1] == "VERDICT: FAILED: numerics; unfinished: tests"
    assert {"5 passed", "numerics 29", "sweep 0"} <= set(lines)


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["passed", "passed"], 0),
        (["unfinished", "FAILED"], 1),
        (["unfinished", "passed"], gpu_check.UNFINISHED),
    ],
)
def test_exit_status(states: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(environment, "collect", lambda device: environment_of_a_gpu())
    parts = [
        Part(f"{i} {state}", 0.5, lambda seconds, state=state: Outcome(state, ["done"]))
        for i, state in enumerate(states)
    ]
    monkeypatch.setattr(gpu_check, "parts", lambda *arguments: parts)
    assert gpu_check.main(argparse.Namespace(minutes=1.0, out=tmp_path, resume=False)) == status
    assert "done" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "environment.json").exists()


def environment_of_a_gpu() -> dict[str, object]:
    return dict.fromkeys((*environment.COLUMNS, "python"), "recorded")


def test_process_that_hangs_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert gpu_check.run_process(command, 1.0, tmp_path / "log") is None
    assert "begun" in (tmp_path / "log").read_text()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lstm_triton.perf", "gpu-check", "--out", str(tmp_path / "out")]
    # as if there were no device, whatever this machine has
    done = subprocess.run(command, capture_output=True, text=True, env=environment_without_gpu())
    assert done.returncode == gpu_check.NO_GPU
    assert "no CUDA device" in done.stdout and "nothing was measured" in done.stdout
    assert not (tmp_path / "out").exists()


def environment_without_gpu() -> dict[str, str]:
    import os

    return os.environ | {"CUDA_VISIBLE_DEVICES": ""}
