"""The parts of gpu-check: each runs a command in a process of its own and makes an Outcome of what it left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import lstm_triton
from lstm_triton import devices

from . import closing, engines, environment, presets, sweep, table
from .closing import ABSENT, FAILED, PASSED, UNFINISHED, Outcome
from .options import NO_GPU, OUT_OF_TIME
from .processes import MARGIN, Setting, last_line, minutes

#: MARGIN under the memory checker, which says what it found at its very end.
SANITIZER_MARGIN = 30.0
#: A line of `pytest -v`, and one of its closing summary.
RESULT = re.compile(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)(?: |$)")
SUMMARY = re.compile(r"(?:FAILED|ERROR) (\S+::.+?)(?: - (.*))?$")

COLLECT = """
import sys
from pathlib import Path
from lstm_triton.perf import environment
environment.write(environment.collect(sys.argv[1]), Path(sys.argv[2]))
"""
SANITIZER = "compute-sanitizer"
#: Our kernels alone; each tensor an allocation of its own with some bytes behind it that belong to none.
SANITIZER_OPTIONS = (
    "--tool", "memcheck", "--kernel-name", "kernel_substring=sequence_", "--padding", "64",
    "--report-api-errors", "no", "--check-exit-code", "no", "--error-exitcode", "86",
    "--print-limit", "20", "--show-backtrace", "device",
)  # fmt: skip
ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error")
#: What the tool says of a wrong access, and what it says where it cannot work.
ACCESS = re.compile(r"Invalid __|Misaligned|[Oo]ut[- ]of[- ](range|bounds)|Illegal|[Ss]tack overflow")
CANNOT = re.compile(
    r"not supported|[Uu]nable to|[Ff]ailed to initialize|[Ii]nternal .*[Ee]rror|before first instrumented"
)


def environment_part(setting: Setting, seconds: float) -> Outcome:
    """What this machine is; environment.json beside the results."""
    device = "cpu" if setting.rehearse else "cuda"
    status, output = setting.logged([sys.executable, "-c", COLLECT, device, str(setting.out)], seconds)
    if status != 0:
        state = UNFINISHED if status is None else FAILED
        return Outcome(state, [f"exit status {status}: {last_line(output)}"])
    found = json.loads((setting.out / "environment.json").read_text())
    modules = {name: bool(find_spec(name)) for name in ("pytest", "pandas", "matplotlib", "tqdm", "tabulate")}
    tools = {name: bool(shutil.which(name)) for name in ("nvidia-smi", "ncu")} | {SANITIZER: bool(_sanitizer())}
    missing = [name for name, there in (modules | tools).items() if not there]
    gpu = ("capability", "sms", "memory_gib", "clocks")
    more = [f"{name} {found[name]}" for name in (*gpu, "cpus") if name in found]
    more.append(f"not here: {', '.join(missing) or 'nothing'}")
    return Outcome(PASSED, [environment.summary(found), "; ".join(more)])


def tests_file() -> Path:
    """The repository's tests, which an installed package does not bring along."""
    return Path(lstm_triton.__file__).resolve().parent.parent / "tests" / "test_gpu.py"


def tests_part(setting: Setting, seconds: float, tests: Path | None = None) -> Outcome:
    """The tests marked gpu, one after another; failures stand in the report by name, also of a run that was ended."""
    tests = tests or tests_file()
    if not tests.exists():
        return Outcome(ABSENT, ["not run: an installed package has no tests beside it"])
    if find_spec("pytest") is None:
        return Outcome(ABSENT, ["not run: pytest is not installed here"])
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    status, output = setting.logged([*command, "-p", "no:xdist", str(tests)], seconds)
    results = pytest_results(output)
    bad = [name for name, result in results.items() if result in ("FAILED", "ERROR")]
    reasons = {found[1]: found[2] for found in map(SUMMARY.match, output) if found}
    named = [f"  FAILED {name.rpartition('::')[2]}: {reasons.get(name) or 'see the log'}"[:150] for name in bad]
    last = last_line(output).strip("= ")
    if status is None:
        counts = closing.counted(Counter(results.values()))
        last = f"ended after {seconds:.0f} s: {counts}; last line: {last}"
    # Without a GPU every test is skipped.
    complete = status is not None and ("SKIPPED" if setting.rehearse else "PASSED") in results.values()
    return Outcome(FAILED if status or bad else PASSED if complete else UNFINISHED, [last, *named[:12]])


def pytest_results(output: Iterable[str]) -> dict[str, str]:
    """Each test's result, from as much as `pytest -v` has printed."""
    return {found[1]: found[2] for found in map(RESULT.match, output) if found}


def numerics_part(setting: Setting, seconds: float) -> Outcome:
    """The package's own numerics: variant, engine, dtype and odd shapes against float64."""
    path = setting.out / "numerics.csv"
    problems, wanted = engines.on_gpu(), engines.first()
    command, variables = _engines("cuda", path), {}
    if setting.rehearse:
        problems = wanted = engines.interpreted()
        command, variables = _engines("cpu", path), {"TRITON_INTERPRET": "1"}
    status, ending = setting.restarting(command, seconds, path, **variables)
    rows = _read(path, engines.FIELDS)
    lines = closing.numerics_lines(rows, len(problems), wanted)
    lines[0] += ending
    if any(row["status"] in engines.FAULTY for row in rows) or status not in (0, None):
        return Outcome(FAILED, lines, keep=22)
    right = any(row["status"] == "ok" for row in rows)
    complete = right and status is not None and not engines.unreached(rows, wanted)
    return Outcome(PASSED if complete else UNFINISHED, lines, keep=22)


def sanitizer_part(setting: Setting, seconds: float) -> Outcome:
    """Small problems again under NVIDIA's memory checker, where it is there and works."""
    tool = _sanitizer()
    if tool is None or setting.rehearse:
        why = f"{SANITIZER} is not on the PATH" if tool is None else "it needs a GPU"
        return Outcome(ABSENT, [f"not run: {why}"])
    start = time.monotonic()
    problems, path = engines.sanitized(), setting.out / "sanitizer.csv"
    keys = {tuple(row[name] for name in engines.KEY) for row in _read(setting.out / "numerics.csv", engines.FIELDS)}
    if not {tuple(problem.key.values()) for problem in problems} <= keys:
        # Under the tool every process is slow, the compiler's too: the kernels are compiled before.
        before = _engines("cuda", setting.out / "before.csv", "--list", "sanitized", *minutes(seconds / 4))
        setting.run(before, seconds / 3)
    left = seconds - (time.monotonic() - start)
    command = _engines("cuda", path, "--list", "sanitized", "--no-ahead", *minutes(left - SANITIZER_MARGIN))
    path.unlink(missing_ok=True)
    # Without PyTorch's cache every tensor is an allocation that the tool knows the ends of.
    status, output = setting.logged([tool, *SANITIZER_OPTIONS, *command], left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    rows = _read(path, engines.FIELDS)
    for name in ("before", "sanitizer"):  # what is worth keeping of these stands in the report
        for suffix in (".csv", ".running"):
            (setting.out / name).with_suffix(suffix).unlink(missing_ok=True)
    return sanitized_outcome(status, output, rows, len(problems))


def sanitized_outcome(status: int | None, output: Sequence[str], rows: Sequence[closing.Row], total: int) -> Outcome:
    """The tool's findings, told from its own failures."""
    said = [line.lstrip("= ") for line in output if line.startswith("====")]
    summaries = [int(found[1]) for found in map(ERRORS.search, said) if found]
    accesses = [line for line in said if ACCESS.search(line)]
    cannot = next((line for line in said if CANNOT.search(line)), None)
    bad = [row for row in rows if row["status"] in engines.FAULTY]
    counts = closing.counted(Counter(row["status"] for row in rows))
    line = f"memcheck: {len(rows)} of {total} problems ({counts}), "
    line += f"{summaries[-1]} errors" if summaries else "ended before its summary" if status is None else "no summary"
    if accesses:
        found = said[said.index(accesses[0]) :]
        return Outcome(FAILED, [line, *(text[:150] for text in found if text)][:12])
    if summaries == [0] and len(rows) == total and not bad:
        return Outcome(PASSED, [line])
    if cannot:
        return Outcome(ABSENT, [f"the tool does not work here: {cannot[:150]}"])
    if bad or any(summaries):
        named = [" ".join(row[name] for name in engines.KEY if row[name]) + f": {row['detail'][:100]}" for row in bad]
        return Outcome(FAILED, [line, *(text[:150] for text in (*said, *named) if text)][:12])
    return Outcome(UNFINISHED, [line, f"last line: {last_line(output)}"])


def probe_part(setting: Setting, seconds: float) -> Outcome:
    """The constants of the planner's model, measured on this GPU."""
    if not setting.resume:
        for path in _constants(setting.out):
            path.unlink()
    command = [sys.executable, "-m", "lstm_triton.perf", "probe", "--out", str(setting.out)]
    command += minutes(seconds - MARGIN)
    status, output = setting.logged(command, seconds)
    if setting.rehearse:  # without a GPU it compiles what it would measure with
        return Outcome(PASSED if status == NO_GPU else FAILED, [f"exit status {status}: {last_line(output)}"])
    path, why = constants(setting.out)
    telling = [line for line in output if line.startswith(("FAILED", "NOT MEASURED")) or "bound by the host" in line]
    lines = [line[:150] for line in telling]
    lines += closing.probe_lines(json.loads(path.read_text())) if path else [f"no constants: {why}"]
    if status in (None, OUT_OF_TIME):
        return Outcome(UNFINISHED, [f"time was up after {seconds:.0f} s", *lines], keep=12)
    if status or not path:
        return Outcome(FAILED, [f"exit status {status}: {last_line(output)}", *lines], keep=12)
    return Outcome(PASSED, lines, keep=12)


def constants(folder: Path) -> tuple[Path | None, str]:
    """The file of device constants in probe's folder, or why there is none that can be used."""
    why = "none were written"
    for path in _constants(folder):
        try:
            devices.check(json.loads(path.read_text()))
        except ValueError as error:
            why = f"{path.name}: {error}"
        else:
            return path, ""
    return None, why


def _constants(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.name != "environment.json")


def sweep_part(setting: Setting, seconds: float) -> Outcome:
    """The timed sweep, most telling cases first, planned by what probe measured."""
    path = setting.out / "sweep.csv"
    command = [sys.executable, "-m", "lstm_triton.perf", "sweep", "--out", str(setting.out)]
    if setting.rehearse:
        sizes = {"cells": "lstm,gru", "dtype": "fp32", "hidden": "8", "batch": "2", "seq": "4", "seconds": "0.01"}
        command += ["--device", "cpu", *(word for name, value in sizes.items() for word in (f"--{name}", value))]
    else:
        command += ["--device", "cuda", "--preset", "telling"]
    measured, why = constants(setting.out)
    command += ["--constants", str(measured)] if measured else []
    status, ending = setting.restarting(command, seconds, path)
    rows = _read(path, sweep.FIELDS)
    cases = closing.by_case(rows)
    timed = [case for case in cases.values() if case.get("ours", {}).get("median_ms")]
    total = len(cases) if setting.rehearse else len(presets.telling())
    counts = closing.counted(Counter(row["status"] for row in rows))
    lines = [f"ours timed in {len(timed)} of {total} cases; {len(rows)} results: {counts}{ending}"]
    lines.append(f"planned by measured constants, {measured.name}" if measured else f"planned by estimates: {why}")
    lines += closing.sweep_lines(rows)
    (setting.out / "sweep.md").unlink(missing_ok=True)  # the report has it
    if sweep.faults(rows) or status not in (0, None) or (status == 0 and not timed):
        return Outcome(FAILED, lines, keep=30)
    # The list is longer than any budget: some of it is what the sweep is for.
    return Outcome(PASSED if timed else UNFINISHED, lines, keep=30)


def _sanitizer() -> str | None:
    """The tool, on the PATH or where CUDA's toolkit lies."""
    return shutil.which(SANITIZER, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def _engines(device: str, path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "lstm_triton.perf.engines", "--device", device, "--out", str(path), *more]


def _read(path: Path, fields: Sequence[str]) -> list[closing.Row]:
    """The rows of these sources."""
    source = environment.source_hash()
    return [row for row in table.read(path, fields) if row["source"] == source] if path.exists() else []
