"""gpu-check as a whole: how its parts share the time, the report and the exit status, with a clock and a runner that
need no GPU; and one rehearsal with real processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_check_runner import Runner
from lstm_triton.perf import closing, engines, gpu_check, processes, sweep, table
from lstm_triton.perf.closing import Outcome
from lstm_triton.perf.gpu_check import Part
from lstm_triton.perf.processes import Setting


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


def test_report_fits_and_ends_with_the_verdict() -> None:
    outcomes = {
        "tests": Outcome("unfinished", ["5 passed"]),
        "numerics": Outcome("FAILED", [f"numerics {i}" for i in range(60)], keep=20),
        "sanitizer": Outcome("absent", ["not run"]),
        "sweep": Outcome("passed", [f"sweep {i}" for i in range(300)], keep=30),
    }
    lines = closing.report(outcomes, "a note").splitlines()
    assert len(lines) == closing.REPORT_LINES
    assert lines[0] == "gpu-check: a note"
    assert lines[-1] == "VERDICT: FAILED: numerics; unfinished: tests; absent: sanitizer (a note)"
    assert {"5 passed", "not run", "numerics 19", "sweep 29"} <= set(lines)
    assert "sweep 299" in closing.report(outcomes, limit=float("inf"))


def test_report_of_every_part_at_its_longest_fits() -> None:
    keeps = (8, 8, 22, 12, 12, 30)
    outcomes = {name: Outcome("FAILED", ["x"] * 200, keep) for name, keep in zip(gpu_check.PARTS, keeps, strict=True)}
    assert len(closing.report(outcomes).splitlines()) <= 110
    assert closing.report({"sweep": Outcome("passed")}).splitlines()[-1] == "VERDICT: all parts passed"


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["passed", "absent"], 0),
        (["unfinished", "FAILED"], 1),
        (["unfinished", "passed"], gpu_check.OUT_OF_TIME),
    ],
)
def test_exit_status(states: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = {f"part {state}": (0.5, lambda setting, seconds, state=state: Outcome(state, ["done"])) for state in states}
    monkeypatch.setattr(gpu_check, "PARTS", found)
    assert gpu_check.main(options("--out", str(tmp_path), "--minutes", "1")) == status
    assert "done" in (tmp_path / "summary.md").read_text()


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu_check.add_arguments(parser)
    return parser.parse_args(arguments)


def test_chosen_parts_have_the_whole_time_in_their_own_order(tmp_path: Path) -> None:
    setting = Setting(tmp_path, Runner())
    everything = gpu_check.chosen(list(gpu_check.PARTS), setting)
    assert [part.name for part in everything] == ["environment", "tests", "numerics", "sanitizer", "probe", "sweep"]
    assert sum(part.share for part in everything) == pytest.approx(1.0)
    some = gpu_check.chosen(["sweep", "probe"], setting)
    assert [part.name for part in some] == ["probe", "sweep"] and sum(part.share for part in some) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--only", "numerics,speed"], "--only: 'speed' is none of environment"),
        (["--only", ""], "--only: choose from environment"),
        (["--minutes", "0"], "--minutes: expected a number above zero, got 0"),
    ],
)
def test_bad_usage_is_named(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(gpu_check.main(options("--rehearse", *wrong)))
    assert stopped.value.code == 2 and message in capsys.readouterr().out


def test_process_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); "
    for then, status in (("time.sleep(60)", None), ("sys.exit(7)", 7)):
        log = tmp_path / f"log {status}"
        assert processes.run_process([sys.executable, "-c", child + then], 2.0, log) == status
        pid = log.read_text().split()[-1]
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(pid)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lstm_triton.perf", "gpu-check", "--out", str(tmp_path / "out")]
    # as if there were no device, whatever this machine has
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == gpu_check.NO_GPU
    assert "no CUDA device" in done.stdout and "nothing was measured" in done.stdout and "--rehearse" in done.stdout
    assert not (tmp_path / "out").exists()


def test_rehearsal_goes_through_the_motions(tmp_path: Path) -> None:
    """Real processes, real files, the real report; without probe, which compiles for a while."""
    command = [sys.executable, "-m", "lstm_triton.perf", "gpu-check", "--rehearse", "--minutes", "5"]
    command += ["--only", "environment,numerics,sanitizer,sweep", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / processes.LOG).read_text()[-3000:]
    assert "nothing was measured on a GPU" in lines[0] and "nothing was measured on a GPU" in lines[-1]
    assert lines[-1].startswith("VERDICT: all parts passed; absent: sanitizer")
    assert json.loads((tmp_path / "environment.json").read_text())["device"].startswith("CPU, ")
    assert any(line.startswith("CPU, ") for line in lines) and any("not here: " in line for line in lines)
    assert len(table.read(tmp_path / "numerics.csv", engines.FIELDS)) == len(engines.interpreted())
    timed = table.read(tmp_path / "sweep.csv", sweep.FIELDS)
    assert {(r["cell"], r["provider"]) for r in timed} == {(c, p) for c in ("lstm", "gru") for p in ("ours", "torch")}
    assert any(line.startswith("lstm fp32 forward+backward B2 H8 T4") for line in lines)
