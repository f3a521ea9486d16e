"""gpu-check's orchestration, with a clock and a runner that need no GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest
from lstm_triton.perf import closing, engines, environment, gpu_check, parts, presets, processes, sweep, table
from lstm_triton.perf.closing import Outcome
from lstm_triton.perf.gpu_check import Part
from lstm_triton.perf.problems import Problem
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


class Runner:
    """Writes what a part's process would have left, and returns the statuses it is given, one a call."""

    def __init__(
        self, *statuses: int | None, rows: Iterable[dict[str, object]] = (), output: str = "", entry: object = None
    ) -> None:
        self.statuses = list(statuses)
        self.output, self.rows, self.entry = output, list(rows), entry
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], seconds: float, log: Path) -> int | None:
        self.commands.append(list(command))
        with log.open("a") as file:
            file.write(self.output)
        fields = {"lstm_triton.perf.engines": engines.FIELDS, "sweep": sweep.FIELDS}
        for name in fields.keys() & command:
            out = Path(command[command.index("--out") + 1])
            path = out / "sweep.csv" if name == "sweep" else out
            source = {"source": environment.source_hash()}
            table.Rows(path, fields[name], resume="--resume" in command).add(*(row | source for row in self.rows))
        if self.entry is not None:
            (log.parent / "h200.json").write_text(json.dumps(self.entry))
        return self.statuses.pop(0)

    def options(self, i: int = -1) -> argparse.Namespace:
        """A command's options, as the command itself understands them."""
        command = self.commands[i]
        command = command[command.index("-m") + 1 :]
        if command[0] == "lstm_triton.perf.engines":
            return engines.parser().parse_args(command[1:])
        assert command[0] == "lstm_triton.perf"
        parser = argparse.ArgumentParser()
        import_module(f"lstm_triton.perf.{command[1]}").add_arguments(parser)
        return parser.parse_args(command[2:])


def row(status: str = "ok", provider: str = "ours", case: int = 0, **more: object) -> dict[str, object]:
    time = {"median_ms": "1.0000", "ratio": "2.000", "to_floor": "1.50"} if status == "ok" else {}
    return {**presets.telling()[case].key, "provider": provider, "status": status, "error": "1e-3", **time, **more}


def sweep_part(folder: Path, runner: Runner, **options: bool) -> Outcome:
    return parts.sweep_part(Setting(folder, runner, **options), 60.0)


def test_sweep_restarts_with_resume_when_its_device_is_lost(tmp_path: Path) -> None:
    runner = Runner(engines.DEVICE_LOST, -11, 0, rows=[row()])
    outcome = sweep_part(tmp_path, runner)
    assert outcome.state == "passed"
    assert [runner.options(i).resume for i in range(3)] == [False, True, True]
    assert "lost its process 2 times" in outcome.lines[0]


def test_bad_usage_is_not_tried_again(tmp_path: Path) -> None:
    outcome = sweep_part(tmp_path, Runner(2, output="--constants: cell_us is missing\n"))
    assert outcome.state == "FAILED" and "bad usage: --constants: cell_us is missing" in outcome.lines[0]


def test_what_was_in_hand_when_time_was_up_is_named(tmp_path: Path) -> None:
    class Hanging(Runner):
        def __call__(self, command: Sequence[str], seconds: float, log: Path) -> int | None:
            (log.parent / "sweep.running").write_text("lstm bf16\nB=16")
            return super().__call__(command, seconds, log)

    outcome = sweep_part(tmp_path, Hanging(None, rows=[row()]))
    assert outcome.state == "passed" and "time was up at lstm bf16 B=16" in outcome.lines[0]
    assert not (tmp_path / "sweep.running").exists()


def test_sweep_with_a_failed_row_of_ours_fails(tmp_path: Path) -> None:
    outcome = sweep_part(tmp_path, Runner(1, rows=[row("failed"), row(provider="torch")]))
    assert outcome.state == "FAILED"
    assert any("failed" in line and "1.0000" in line for line in outcome.lines[2:])


def test_sweep_with_torch_out_of_tolerance_passes_and_shows_its_error(tmp_path: Path) -> None:
    loose = row("loose", "torch", median_ms="3.0000", error="5e-2")
    outcome = sweep_part(tmp_path, Runner(0, rows=[row(), loose]))
    assert outcome.state == "passed"
    assert any("3.0000" in line and "torch.nn's error: 5e-2" in line for line in outcome.lines[2:])


def test_sweep_without_any_result_does_not_pass(tmp_path: Path) -> None:
    assert sweep_part(tmp_path, Runner(None)).state == "unfinished"
    assert sweep_part(tmp_path, Runner(0)).state == "FAILED"
    assert sweep_part(tmp_path, Runner(0, rows=[row(provider="torch")])).state == "FAILED"


def test_sweep_is_summed_up_before_its_cases(tmp_path: Path) -> None:
    same = presets.telling()[0].key
    assert presets.telling()[1].key == same | {"mode": "forward+backward"}
    rows = [
        row(ratio="2.000", peak_mib="50", saved_mib=""),
        row(provider="torch", peak_mib="100", saved_mib=""),
        row(case=1, ratio="8.000", peak_mib="200", saved_mib="10"),
        row(provider="torch", case=1, peak_mib="100", saved_mib="40"),
        row("failed", case=2),
    ]
    lines = sweep_part(tmp_path, Runner(0, rows=rows[:4])).lines
    head, _, means = (line for line in lines if line.startswith("|"))
    names, values = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, means))
    found = dict(zip(names, values, strict=True))
    assert (found["inference"], found["forward"], found["forward+backward"]) == ("2.00 (1)", "-", "8.00 (1)")
    assert (found["x floor"], found["saved"], found["peak"]) == ("1.50", "0.25", "1.00")
    assert lines.index(means) < next(i for i, line in enumerate(lines) if " B16 " in line)
    assert "failed" in sweep_part(tmp_path, Runner(1, rows=rows)).lines[-1]


def entry() -> dict[str, object]:
    return json.loads(files("lstm_triton").joinpath("tuned", "h200.json").read_text())


@pytest.mark.parametrize(("there", "used"), [(True, True), (False, False)])
def test_sweep_goes_by_measured_constants_that_are_sound(there: bool, used: bool, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "h200.json").write_text(json.dumps(entry() | ({} if there else {"cell_us": -1})))
    runner = Runner(0, rows=[row()])
    lines = sweep_part(tmp_path, runner).lines
    assert (runner.options().constants is not None) == used
    assert lines[1].startswith("planned by measured" if used else "planned by estimates: h200.json: cell_us")


def test_failed_numerics_fail_and_are_named(tmp_path: Path) -> None:
    good = [judged(problem) for problem in engines.first()]
    bad = judged(engines.on_gpu()[-1]) | {"status": "failed", "error": "inf", "detail": "dx: inf"}
    setting = Setting(tmp_path, Runner(1, rows=[*good, bad]))
    outcome = parts.numerics_part(setting, 60.0)
    assert outcome.state == "FAILED"
    assert any(f"{bad['engine']} {bad['cell']} {bad['dtype']}" in line and "dx: inf" in line for line in outcome.lines)
    assert parts.numerics_part(Setting(tmp_path, Runner(0, rows=good)), 60.0).state == "passed"


def judged(problem: Problem) -> dict[str, object]:
    return {**problem.key, "status": "ok", "error": "2e-3"}


@pytest.mark.parametrize("status", [0, None])
def test_numerics_that_did_not_reach_every_engine_and_dtype_are_unfinished(status: int | None, tmp_path: Path) -> None:
    missed = {("step", "fp64"), ("step", "fp32"), ("local", "tf32")}
    rows = [judged(problem) for problem in engines.first() if (problem.engine, problem.dtype) not in missed]
    outcome = parts.numerics_part(Setting(tmp_path, Runner(status, rows=rows)), 60.0)
    assert outcome.state == "unfinished"
    assert sorted(outcome.lines[1].removeprefix("not reached: ").split("; ")) == [
        "local tf32",
        "step fp32",
        "step fp64",
    ]
    assert sum("not reached" in line for line in outcome.lines[2:]) == 2


def test_numerics_that_lose_the_device_for_good_fail(tmp_path: Path) -> None:
    runner = Runner(*[engines.DEVICE_LOST] * 4, rows=[judged(problem) for problem in engines.first()])
    assert parts.numerics_part(Setting(tmp_path, runner), 60.0).state == "FAILED"
    assert {runner.options(i).device for i in range(4)} == {"cuda"}


def test_rows_of_other_sources_or_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    def fails(command: Sequence[str], seconds: float, log: Path) -> int | None:
        log.touch()
        return 1

    for resume, source in ((True, "other"), (False, environment.source_hash())):
        table.Rows(tmp_path / "sweep.csv", sweep.FIELDS).add(row() | {"source": source})
        outcome = parts.sweep_part(Setting(tmp_path, fails, resume), 60.0)
        assert outcome.state == "FAILED" and outcome.lines[0].startswith("ours timed in 0")


# The memory checker's own words, as versions 2025.2 and 2025.3 print them.
WRONG_ACCESS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at sequence_forward+0x1a30
=========     by thread (33,0,0) in block (0,0,0)
=========     Access to 0x7f60d6a00046 is out of bounds
========= ERROR SUMMARY: 1 error
"""
NO_DRIVER = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
========= Error: couldn't find exit code.
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
RuntimeError: CUDA error: unknown error
========= ERROR SUMMARY: 1 error
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("status", "output", "seen", "state", "shown"),
    [
        (0, CLEAN, "ok ok", "passed", "2 of 2 problems (2 ok), 0 errors"),
        (86, WRONG_ACCESS, "ok ok", "FAILED", "Invalid __global__ write of size 2 bytes"),
        (None, WRONG_ACCESS[:120], "ok", "FAILED", "Invalid __global__ write"),
        (86, REFUSED, "error", "absent", "does not work here: Error: Device not supported"),
        (255, NO_DRIVER, "", "absent", "terminated before first instrumented"),
        (86, "========= Program hit an error\n========= ERROR SUMMARY: 3 errors\n", "ok ok", "FAILED", "3 errors"),
        (0, CLEAN, "ok", "unfinished", "1 of 2 problems"),
        (1, CLEAN, "ok failed", "FAILED", "y: error 1e-1"),
        (None, "========= COMPUTE-SANITIZER\n", "ok", "unfinished", "ended before its summary"),
        (1, "Traceback\nModuleNotFoundError: torch\n", "", "unfinished", "ModuleNotFoundError"),
    ],
)
def test_findings_of_the_memory_checker_are_told_from_its_own_failures(
    status: int | None, output: str, seen: str, state: str, shown: str
) -> None:
    rows = [
        {**problem.key, "status": found, "detail": "y: error 1e-1" * (found != "ok")}
        for problem, found in zip(engines.sanitized(), seen.split(), strict=False)
    ]
    outcome = parts.sanitized_outcome(status, output.splitlines(), rows, 2)
    assert outcome.state == state and any(shown in line for line in outcome.lines), outcome


def test_the_memory_checker_finds_its_kernels_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    rows = [judged(problem) for problem in engines.sanitized()]
    runner = Runner(0, 0, rows=rows, output=CLEAN)
    setting = Setting(tmp_path, runner)
    assert parts.sanitizer_part(setting, 60.0).state == "passed"
    before, checked = (runner.options(i) for i in range(2))
    assert (before.no_ahead, checked.no_ahead) == (False, True)
    assert before.list == checked.list == "sanitized" and before.out != checked.out
    assert runner.commands[1][:3] == ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "/usr/bin/compute-sanitizer"]
    # After the numerics there is nothing to compile.
    table.Rows(tmp_path / "numerics.csv", engines.FIELDS).add(
        *(row | {"source": environment.source_hash()} for row in rows)
    )
    runner.statuses = [0]
    assert parts.sanitizer_part(setting, 60.0).state == "passed" and len(runner.commands) == 3


def test_without_the_memory_checker_the_part_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os.path, "exists", lambda path, real=os.path.exists: "cuda" not in str(path) and real(path))
    outcome = parts.sanitizer_part(Setting(tmp_path, Runner()), 60.0)
    assert outcome.state == "absent" and "not on the PATH" in outcome.lines[0]


@pytest.mark.parametrize(
    ("status", "written", "state", "shown"),
    [
        (0, True, "passed", "us a launch: plain"),
        (1, True, "FAILED", "exit status 1"),
        (4, True, "unfinished", "NOT MEASURED, no time was left: cell_us"),
        (None, False, "unfinished", "no constants: none were written"),
        (0, False, "FAILED", "no constants"),
        (3, False, "FAILED", "exit status 3"),
    ],
)
def test_probe_is_summed_up(status: int | None, written: bool, state: str, shown: str, tmp_path: Path) -> None:
    output = "NOT MEASURED, no time was left: cell_us\n" if status == 4 else "measured\n"
    (tmp_path / "old.json").write_text(json.dumps(entry()))  # an earlier run's
    runner = Runner(status, output=output, entry=entry() if written else None)
    outcome = parts.probe_part(Setting(tmp_path, runner), 60.0)
    assert outcome.state == state and any(shown in line for line in outcome.lines), outcome
    assert runner.options().out == tmp_path and runner.options().minutes == pytest.approx(0.67)


def test_failed_gpu_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / processes.LOG).write_text("tests/test_gpu.py::test_of_another_run FAILED [ 50%]\n")
    outcome = gpu_tests(tmp_path, Runner(1, output=BEGUN + FAILED))
    assert outcome.state == "FAILED"
    assert outcome.lines == ["1 failed, 1 passed in 1s", "  FAILED test_x[(9, 17) bf16]: assert 0"]


def gpu_tests(folder: Path, runner: processes.Runner, **options: bool) -> Outcome:
    tests = folder / "test_gpu.py"
    tests.touch()
    return parts.tests_part(Setting(folder, runner, **options), 60.0, tests)


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
    outcome = gpu_tests(tmp_path, Runner(status, output=texts[output]))
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
    outcome = gpu_tests(tmp_path, processes.run_process)
    assert outcome.state == "FAILED" and "1 failed, 1 passed" in outcome.lines[0]
    assert outcome.lines[1:] == ["  FAILED test_x[(9, 17)]: AssertionError: too large"]


def test_an_installed_package_has_no_tests(tmp_path: Path) -> None:
    assert parts.tests_part(Setting(tmp_path, Runner()), 60.0, tmp_path / "test_gpu.py").state == "absent"
    assert parts.tests_file() == Path(__file__).with_name("test_gpu.py")


def test_an_environment_that_cannot_be_had_fails_alone(tmp_path: Path) -> None:
    runner = Runner(1, output="RuntimeError: no driver\n")
    outcome = parts.environment_part(Setting(tmp_path, runner), 60.0)
    assert outcome == Outcome("FAILED", ["exit status 1: RuntimeError: no driver"])
    assert runner.commands[0][-2:] == ["cuda", str(tmp_path)]


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


def test_every_part_rehearses_with_what_needs_no_gpu(tmp_path: Path) -> None:
    every = [problem for problem in engines.interpreted()]
    runner = Runner(0, 0, 3, 0, rows=[], output="tests/test_gpu.py::test_a SKIPPED [100%]\n1 skipped\n")
    setting = Setting(tmp_path, runner, rehearse=True)
    assert gpu_tests(tmp_path, runner, rehearse=True).state == "passed"
    runner.rows = [judged(problem) for problem in every]
    assert parts.numerics_part(setting, 60.0).state == "passed" and runner.options().device == "cpu"
    assert parts.probe_part(setting, 60.0).state == "passed"
    runner.rows = [row()]
    assert parts.sweep_part(setting, 60.0).state == "passed" and runner.options().device == "cpu"
    assert all(command[0] == "env" and "CUDA_VISIBLE_DEVICES=" in command for command in runner.commands)
    assert [command for command in runner.commands if "TRITON_INTERPRET=1" in command] == [runner.commands[1]]
