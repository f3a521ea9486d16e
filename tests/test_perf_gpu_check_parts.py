"""Each part of gpu-check, sweep, numerics, sanitizer, probe, tests and environment: what it makes of the statuses,
files and words that its process leaves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pytest
from gpu_check_runner import Runner
from lstm_triton.perf import engines, environment, parts, presets, processes, sweep, table
from lstm_triton.perf.closing import Outcome
from lstm_triton.perf.problems import Problem
from lstm_triton.perf.processes import Setting


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
