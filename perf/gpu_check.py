"""One command for a GPU machine that is there for some minutes: what is wrong, then what is fast, most telling first.

Each part runs in a process of its own: an illegal access in one does not take the next part's device away, and a part
that hangs is ended when its time is up. What a part had found by then is in its CSV and counts.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lstm_triton

from . import engines, environment, sweep, table
from .providers import DTYPES

NO_GPU = 3
#: Seconds kept back for the closing report.
RESERVE = 10.0
#: Lines of the closing report at most, so that it survives whole where only the end of the output is kept.
REPORT_LINES = 95

Runner = Callable[[Sequence[str], float, Path], "int | None"]


@dataclass
class Outcome:
    """What became of one part."""

    passed: bool
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
    """0 if everything that ran passed, 1 if anything failed, NO_GPU without a CUDA device."""
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
    print(environment.summary(found), flush=True)
    outcomes = orchestrate(parts(options.out, options.resume, run_process), options.minutes * 60)
    text = closing_report(environment.summary(found), outcomes)
    (options.out / "summary.md").write_text(text + "\n")
    print(text, flush=True)
    return 0 if all(outcome.passed for outcome in outcomes.values()) else 1


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
            outcomes[part.name] = Outcome(False, ["not run: no time was left"])
            continue
        try:
            outcomes[part.name] = part.run(available)
        except Exception as error:
            outcomes[part.name] = Outcome(False, [f"{type(error).__name__}: {error}"])
        state = "passed" if outcomes[part.name].passed else "FAILED"
        print(f"{part.name}: {state}, {clock() - start:.0f} s since the start", flush=True)
    return outcomes


def parts(out: Path, resume: bool, runner: Runner) -> list[Part]:
    """Tests if the repository's are there, the package's own numerics, the sweep."""
    tests = Path(lstm_triton.__file__).resolve().parent.parent / "tests"
    found = [
        Part("numerics", 0.3, lambda seconds: numerics_part(out, resume, runner, seconds)),
        Part("sweep", 0.45 if tests.is_dir() else 0.7, lambda seconds: sweep_part(out, resume, runner, seconds)),
    ]
    if tests.is_dir():
        found.insert(0, Part("tests", 0.25, lambda seconds: tests_part(tests, out, runner, seconds)))
    return found


def run_process(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """Run `command` with its output in `log`; its exit status, or None if it was ended because its time was up."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with log.open("ab") as file:
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
    """`pytest -m gpu`; failures stand in the report by name."""
    log = out / "tests.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", str(tests)]
    status = runner(command, seconds, log)
    output = log.read_text(errors="replace").splitlines() if log.exists() else []
    last = next((line for line in reversed(output) if line.strip()), "no output")
    if status is None:
        return Outcome(False, [f"ended after {seconds:.0f} s; last line: {last[:150]}"])
    named = [line[:150] for line in output if line.startswith(("FAILED", "ERROR"))]
    # pytest's 5: nothing is marked gpu.
    return Outcome(status in (0, 5), [last[:150], *named[:12]])


def numerics_part(out: Path, resume: bool, runner: Runner, seconds: float) -> Outcome:
    """The package's own numerics: engine, cell, dtype and odd shapes against float64."""
    path = out / "numerics.csv"
    command = [sys.executable, "-m", "lstm_triton.perf.engines", "--device", "cuda", "--out", str(path)]
    command += ["--minutes", f"{seconds / 60:.2f}"]
    ending = _restarting(command, resume, runner, seconds, out / "numerics.log")
    rows = _read(path, engines.FIELDS)
    counts = Counter(row["status"] for row in rows)
    bad = [row for row in rows if row["status"] in ("failed", "error")]
    lines = [f"{len(rows)} of {len(engines.on_gpu())} problems: {_counted(counts)}{ending}"]
    lines += table.markdown(_worst_errors(rows), ("engine", *DTYPES)).splitlines()
    for row in bad[:12]:
        lines.append("  " + " ".join(row[name] for name in engines.KEY if row[name]) + f": {row['detail'][:100]}")
    return Outcome(bool(counts["ok"]) and not bad and "lost" not in ending, lines)


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
            judged = [r for r in rows if r["engine"] == engine and r["dtype"] == dtype and r["status"] != "refused"]
            passed = [r for r in judged if r["status"] == "ok"]
            worst = max((float(r["error"]) for r in passed), default=0.0)
            row[dtype] = f"{len(passed)}/{len(judged)} {worst:.0e}" if judged else ""
        found.append(row)
    return found


def sweep_part(out: Path, resume: bool, runner: Runner, seconds: float) -> Outcome:
    """The timed sweep, in the order of `sweep.telling`."""
    path = out / "sweep.csv"
    # The sweep starts nothing that might outlast its minutes; the process limit is for one that hangs.
    command = [sys.executable, "-m", "lstm_triton.perf", "sweep", "--device", "cuda", "--preset", "telling"]
    command += ["--out", str(out), "--minutes", f"{seconds / 60:.2f}"]
    ending = _restarting(command, resume, runner, seconds, out / "sweep.log")
    rows = _read(path, sweep.FIELDS)
    counts = Counter(row["status"] for row in rows)
    lines = [f"{len(rows)} results: {_counted(counts)}{ending}", *_sweep_lines(rows)]
    return Outcome(bool(counts["ok"]) and not counts["failed"] and not counts["error"], lines)


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
        lines.append(
            f"{line} {ours.get('error', ''):>8}  {ours.get('plan') or ''} {ours.get('detail', '')[:60]}".rstrip()
        )
    return lines


def _restarting(command: list[str], resume: bool, runner: Runner, seconds: float, log: Path) -> str:
    """Run a command that can --resume, and again where it lost its device or died, while time is left."""
    log.unlink(missing_ok=True)
    deadline = time.monotonic() + seconds
    for attempt in range(4):
        again = ["--resume"] if resume or attempt else []
        left = deadline - time.monotonic()
        status = runner([*command, *again], max(left, 1.0), log)
        if status is None:
            return "; ended when its time was up"
        if status in (0, 1):
            return f"; lost its process {attempt} times on the way" if attempt else ""
    return f"; lost its process {attempt + 1} times, gave up"


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
        lines += ["", f"{name}: {'passed' if outcome.passed else 'FAILED'}", *kept]
    bad = [name for name, outcome in outcomes.items() if not outcome.passed]
    return "\n".join([*lines, f"VERDICT: {'FAILED in ' + ', '.join(bad) if bad else 'all parts passed'}"])
