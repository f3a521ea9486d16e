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


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def part(
    name: str, share: float, clock: Clock, takes: float, log: list[tuple[str, float]], passed: bool = True
) -> Part:
    def run(seconds: float) -> Outcome:
        log.append((name, seconds))
        clock.now += min(takes, seconds)
        return Outcome(passed, [f"{name} ran"])

    return Part(name, share, run)


def test_parts_share_the_budget_and_inherit_what_is_left() -> None:
    clock, log = Clock(), []
    todo = [part("a", 0.25, clock, 20, log), part("b", 0.25, clock, 1000, log), part("c", 0.5, clock, 1000, log)]
    outcomes = gpu_check.orchestrate(todo, 210.0, clock)
    # 200 s to share: a may take 50 and takes 20, so b gets 80; c its own 100
    assert log == [("a", 50.0), ("b", 80.0), ("c", 100.0)]
    assert clock.now <= 1000.0 + 210.0 - gpu_check.RESERVE
    assert all(outcome.passed for outcome in outcomes.values())


def test_a_part_that_raises_fails_alone() -> None:
    clock, log = Clock(), []

    def broken(seconds: float) -> Outcome:
        raise RuntimeError("device gone")

    outcomes = gpu_check.orchestrate([Part("a", 0.5, broken), part("b", 0.5, clock, 1, log)], 100.0, clock)
    assert not outcomes["a"].passed and "device gone" in outcomes["a"].lines[0]
    assert outcomes["b"].passed and [name for name, _ in log] == ["b"]


def test_a_part_without_time_is_not_run_and_does_not_pass() -> None:
    clock, log = Clock(), []

    def greedy(seconds: float) -> Outcome:
        clock.now += 500
        return Outcome(True)

    outcomes = gpu_check.orchestrate([Part("a", 0.5, greedy), part("b", 0.5, clock, 1, log)], 100.0, clock)
    assert not log and not outcomes["b"].passed and "no time" in outcomes["b"].lines[0]


class Runner:
    """Writes what a part's process would have left, and returns the statuses it is given, one a call."""

    def __init__(self, *statuses: int | None, rows: list[dict[str, object]] | None = None) -> None:
        self.statuses = list(statuses)
        self.rows = rows or []
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], seconds: float, log: Path) -> int | None:
        self.commands.append(list(command))
        log.write_text("....F\nFAILED tests/test_kernels.py::test_x - assert 0\n1 failed, 4 passed in 1s\n")
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
    assert outcome.passed
    assert ["--resume" in command for command in runner.commands] == [False, True, True]
    assert "lost its process 2 times" in outcome.lines[0]


def test_sweep_with_a_failed_row_fails(tmp_path: Path) -> None:
    outcome = gpu_check.sweep_part(tmp_path, False, Runner(1, rows=[row(), row("failed", "torch")]), 60.0)
    assert not outcome.passed
    assert any("failed" in line and "2.000" in line for line in outcome.lines[2:])


def test_sweep_without_any_result_fails(tmp_path: Path) -> None:
    assert not gpu_check.sweep_part(tmp_path, False, Runner(None), 60.0).passed


def test_failed_numerics_fail_and_are_named(tmp_path: Path) -> None:
    good = {"engine": "local", "cell": "lstm", "dtype": "bf16", "status": "ok", "error": "2e-3"}
    bad = {
        "engine": "resident",
        "cell": "gru",
        "dtype": "fp16",
        "status": "failed",
        "error": "inf",
        "detail": "dx: inf",
    }
    outcome = gpu_check.numerics_part(tmp_path, False, Runner(1, rows=[good, bad]), 60.0)
    assert not outcome.passed
    assert any("resident gru fp16" in line and "dx: inf" in line for line in outcome.lines)
    assert gpu_check.numerics_part(tmp_path, False, Runner(0, rows=[good]), 60.0).passed


def test_rows_of_other_sources_do_not_count(tmp_path: Path) -> None:
    table.Rows(tmp_path / "sweep.csv", sweep.FIELDS).add(row() | {"source": "other"})

    def fails(command: Sequence[str], seconds: float, log: Path) -> int | None:
        return 1

    assert not gpu_check.sweep_part(tmp_path, True, fails, 60.0).passed


def test_failed_gpu_tests_are_named(tmp_path: Path) -> None:
    outcome = gpu_check.tests_part(tmp_path, tmp_path, Runner(1), 60.0)
    assert not outcome.passed
    assert outcome.lines[0].startswith("1 failed") and any("test_x" in line for line in outcome.lines)
    assert not gpu_check.tests_part(tmp_path, tmp_path, Runner(None), 60.0).passed
    assert gpu_check.tests_part(tmp_path, tmp_path, Runner(0), 60.0).passed


def test_report_fits_and_ends_with_the_verdict() -> None:
    outcomes = {
        "tests": Outcome(True, ["5 passed"]),
        "numerics": Outcome(False, [f"numerics {i}" for i in range(30)]),
        "sweep": Outcome(True, [f"sweep {i}" for i in range(300)]),
    }
    lines = gpu_check.closing_report("head", outcomes).splitlines()
    assert len(lines) <= gpu_check.REPORT_LINES
    assert lines[-1] == "VERDICT: FAILED in numerics"
    assert {"5 passed", "numerics 29", "sweep 0"} <= set(lines)


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_exit_status(passed: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(environment, "collect", lambda device: environment_of_a_gpu())
    parts = [Part("numerics", 1.0, lambda seconds: Outcome(passed, ["done"]))]
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
