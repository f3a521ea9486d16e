"""One command for a GPU machine that is there for some minutes: what is wrong, then what is fast, most telling first.

Each part runs in a process of its own: an illegal access in one does not take the next part's device away, and a part
that hangs is ended when its time is up. What a part had found by then is in its CSV and counts.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import lstm_triton

from . import engines, environment, sweep, table
from .providers import DTYPES

NO_GPU = 3
#: Exit status when nothing failed but time ran out before everything was seen.
UNFINISHED = 4
#: Seconds kept back for the closing report.
RESERVE = 10.0
#: Lines of the closing report at most, so that it survives whole where only the end of the output is kept.
REPORT_LINES = 95
#: In --out: the output of every part's process.
LOG = "log.txt"
#: Seconds before the end of its time at which a part is to begin nothing new: the end itself is for one that hangs.
MARGIN = 15.0
#: A line of `pytest -v`, and one of its closing summary.
RESULT = re.compile(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)(?: |$)")
SUMMARY = re.compile(r"(?:FAILED|ERROR) (\S+::.+?)(?: - (.*))?$")

Runner = Callable[[Sequence[str], float, Path], "int | None"]


@dataclass
class Outcome:
    """What became of one part: "passed", "unfinished" (nothing wrong in what was seen, but not all was) or "FAILED"."""

    state: str
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A part of the check: its share of the whole time, and how to run it in that many seconds."""

    name: str
    share: float
    run: Callable[[float], Outcome]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget in all (default 9)")
    parser.add_argument("--out", type=Path, default=Path("results/gpu-check"), help="folder for results and logs")
    parser.add_argument("--resume", action="store_true", help="keep the rows in --out made from the same sources")


def main(options: argparse.Namespace) -> int:
    """0 if all parts passed, 1 if any failed, else UNFINISHED; NO_GPU without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        print(
            "gpu-check: no CUDA device is available here. It cannot run the kernels on a GPU, check their numerics "
            "there or time them; nothing was measured. `sweep` runs the CPU path and interprets, `resources` compiles."
        )
        return NO_GPU
    found = environment.collect("cuda")
    options.out.mkdir(parents=True, exist_ok=True)
    environment.write(found, options.out)
    (options.out / LOG).unlink(missing_ok=True)
    print(environment.summary(found), flush=True)
    outcomes = orchestrate(parts(options.out, options.resume, run_process), options.minutes * 60)
    text = closing_report(environment.summary(found), outcomes)
    (options.out / "summary.md").write_text(text + "\n")
    print(text, flush=True)
    states = {outcome.state for outcome in outcomes.values()}
    return 1 if "FAILED" in states else UNFINISHED if "unfinished" in states else 0


def orchestrate(
    todo: Sequence[Part], seconds: float, clock: Callable[[], float] = time.monotonic
) -> dict[str, Outcome]:
    """Run the parts in turn within `seconds`. A part that raises has failed; the next one runs all the same.

    A part may use its share of the whole and whatever earlier parts left over of theirs.
    """
    start = clock()
    allotted = 0.0
    outcomes: dict[str, Outcome] = {}
    for part in todo:
        allotted += part.share * (seconds - RESERVE)
        available = start + allotted - clock()
        if available <= 0:
            outcomes[part.name] = Outcome("unfinished", ["not run: no time was left"])
            continue
        try:
            outcomes[part.name] = part.run(available)
        except Exception as error:
            outcomes[part.name] = Outcome("FAILED", [f"{type(error).__name__}: {error}"])
        print(f"{part.name}: {outcomes[part.name].state}, {clock() - start:.0f} s since the start", flush=True)
    return outcomes


def parts(out: Path, resume: bool, runner: Runner) -> list[Part]:
    """Tests if the repository's are there, the package's own numerics, the sweep."""
    tests = Path(lstm_triton.__file__).resolve().parent.parent / "tests" / "test_gpu.py"
    found = [
        Part("numerics", 0.3, lambda seconds: numerics_part(out, resume, runner, seconds)),
        Part("sweep", 0.45 if tests.exists() else 0.7, lambda seconds: sweep_part(out, resume, runner, seconds)),
    ]
    if tests.exists():
        found.insert(0, Part("tests", 0.25, lambda seconds: tests_part(tests, out, runner, seconds)))
    return found


def run_process(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """Run `command`, its output appended to `log`; its exit status, or None if it was ended as its time was up."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # What it says arrives before it is ended, and pytest does not cut the reasons short.
    environ |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    with log.open("ab", buffering=0) as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        # A session of its own: whatever the process started ends with it.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def tests_part(tests: Path, out: Path, runner: Runner, seconds: float) -> Outcome:
    """The tests marked gpu, one after another; failures stand in the report by name, also of a run that was ended."""
    if find_spec("pytest") is None:
        return Outcome("unfinished", ["not run: pytest is not installed here"])
    log = out / LOG
    begin = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    status = runner([*command, "-p", "no:xdist", str(tests)], seconds, log)
    output = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    results = pytest_results(output)
    bad = [name for name, result in results.items() if result in ("FAILED", "ERROR")]
    reasons = {found[1]: found[2] for found in map(SUMMARY.match, output) if found}
    named = [f"  FAILED {name.rpartition('::')[2]}: {reasons.get(name) or 'see the log'}"[:150] for name in bad]
    last = next((line for line in reversed(output) if line.strip()), "no output").strip("= ")[:150]
    if status is None:
        last = f"ended after {seconds:.0f} s: {_counted(Counter(results.values()))}; last line: {last}"
    complete = status is not None and "PASSED" in results.values()
    return Outcome("FAILED" if status or bad else "passed" if complete else "unfinished", [last, *named[:12]])


def pytest_results(output: Iterable[str]) -> dict[str, str]:
    """Each test's result, from as much as `pytest -v` has printed."""
    return {found[1]: found[2] for found in map(RESULT.match, output) if found}


def numerics_part(out: Path, resume: bool, runner: Runner, seconds: float) -> Outcome:
    """The package's own numerics: engine, cell, dtype and odd shapes against float64."""
    path = out / "numerics.csv"
    command = [sys.executable, "-m", "lstm_triton.perf.engines", "--device", "cuda", "--out", str(path)]
    command += ["--minutes", f"{max(seconds - MARGIN, 1.0) / 60:.2f}"]
    status, ending = _restarting(command, resume, runner, seconds, out / LOG)
    rows = _read(path, engines.FIELDS)
    counts = Counter(row["status"] for row in rows)
    bad = [row for row in rows if row["status"] in ("failed", "error")]
    lines = [f"{len(rows)} of {len(engines.on_gpu())} problems: {_counted(counts)}{ending}"]
    missing = engines.unreached(rows)
    if missing:
        lines.append(f"not reached: {'; '.join(missing)}")
    lines += table.markdown(_worst_errors(rows), ("engine", *DTYPES)).splitlines()
    for row in bad[:12]:
        lines.append("  " + " ".join(row[name] for name in engines.KEY if row[name]) + f": {row['detail'][:100]}")
    if bad or status not in (0, None):
        return Outcome("FAILED", lines)
    return Outcome("unfinished" if missing or not counts["ok"] else "passed", lines)


def _read(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of these sources."""
    source = environment.source_hash()
    return [row for row in table.read(path, fields) if row["source"] == source] if path.exists() else []


def _worst_errors(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """For each engine and dtype: passed of judged, and the largest relative error among those that passed."""
    found = []
    for engine in engines.ENGINES:
        row: dict[str, object] = {"engine": engine}
        for dtype in DTYPES:
            reached = [r for r in rows if r["engine"] == engine and r["dtype"] == dtype]
            judged = [r for r in reached if r["status"] != "refused"]
            passed = [r for r in judged if r["status"] == "ok"]
            worst = max((float(r["error"]) for r in passed), default=0.0)
            none = "refused" if reached else "not reached"
            row[dtype] = f"{len(passed)}/{len(judged)} {worst:.0e}" if judged else none
        found.append(row)
    return found


def sweep_part(out: Path, resume: bool, runner: Runner, seconds: float) -> Outcome:
    """The timed sweep, in the order of `sweep.telling`."""
    path = out / "sweep.csv"
    # The sweep starts nothing that might outlast its minutes; the process limit is for one that hangs.
    command = [sys.executable, "-m", "lstm_triton.perf", "sweep", "--device", "cuda", "--preset", "telling"]
    command += ["--out", str(out), "--minutes", f"{max(seconds - MARGIN, 1.0) / 60:.2f}"]
    status, ending = _restarting(command, resume, runner, seconds, out / LOG)
    path.with_suffix(".running").unlink(missing_ok=True)
    rows = _read(path, sweep.FIELDS)
    timed = [row for row in rows if row["provider"] == "ours" and row["median_ms"]]
    lines = [f"ours timed in {len(timed)} of {len(sweep.telling())} cases; {len(rows)} results: "]
    lines[0] += f"{_counted(Counter(row['status'] for row in rows))}{ending}"
    lines += _sweep_lines(rows)
    if sweep.faults(rows) or status not in (0, None) or (status == 0 and not timed):
        return Outcome("FAILED", lines)
    # The list is longer than any budget: some of it is what the sweep is for.
    return Outcome("passed" if timed else "unfinished", lines)


def _sweep_lines(rows: list[dict[str, str]]) -> list[str]:
    """A line a case: ours, torch.nn's, the ratio, and what the plan was."""
    cases: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in sweep.KEY[:-1]), {})[row["provider"]] = row
    lines = [f"{'case':<44} {'ours ms':>9} {'torch ms':>9} {'us/step':>8} {'ratio':>6} {'error':>8}  plan"]
    for case, by_provider in cases.items():
        cell, dtype, mode, layers, both, batch, hidden, seq, _ = case
        name = f"{cell} {dtype} {mode} B{batch} H{hidden} T{seq}"
        name += f" L{layers}" * (layers != "1") + " bi" * (both == "True")
        ours, other = by_provider.get("ours", {}), by_provider.get("torch", {})
        shown = [row.get("median_ms") or row.get("status", "-") for row in (ours, other)]
        line = f"{name:<44} {shown[0]:>9} {shown[1]:>9} {ours.get('us_per_step', ''):>8} {ours.get('ratio', ''):>6}"
        note = f" (torch.nn's error: {other['error']})" if other.get("status") == "loose" else ""
        line += f" {ours.get('error', ''):>8}  {ours.get('plan') or ''}{note} {ours.get('detail', '')[:60]}"
        lines.append(line.rstrip())
    return lines


def _restarting(command: list[str], resume: bool, runner: Runner, seconds: float, log: Path) -> tuple[int | None, str]:
    """Run a command that can --resume, and again where it lost its device or died, while time is left.

    The last status, None if it was ended as its time was up, and in words what is worth saying about it.
    """
    deadline = time.monotonic() + seconds
    for attempt in range(4):
        again = ["--resume"] if resume or attempt else []
        left = deadline - time.monotonic()
        status = runner([*command, *again], max(left, 1.0), log)
        if status is None:
            return None, "; ended when its time was up"
        if status in (0, 1):
            return status, f"; lost its process {attempt} times on the way" if attempt else ""
    return status, f"; lost its process {attempt + 1} times, gave up"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"


def closing_report(head: str, outcomes: dict[str, Outcome]) -> str:
    """The whole story in at most REPORT_LINES lines; the sweep is what is cut, from its least telling end."""
    lines = ["", "gpu-check", head]
    room = REPORT_LINES - len(lines) - 2 * len(outcomes) - 1
    for i, (name, outcome) in enumerate(outcomes.items()):
        later = sum(min(len(o.lines), 8) for o in list(outcomes.values())[i + 1 :])
        kept = outcome.lines[: max(room - later, 1)]
        room -= len(kept)
        lines += ["", f"{name}: {outcome.state}", *kept]
    named = {state: [name for name, o in outcomes.items() if o.state == state] for state in ("FAILED", "unfinished")}
    found = [f"{state}: {', '.join(names)}" for state, names in named.items() if names]
    return "\n".join([*lines, f"VERDICT: {'; '.join(found) or 'all parts passed'}"])
