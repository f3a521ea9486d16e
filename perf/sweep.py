"""The sweep: ours, torch.nn and others over cells, dtypes, sizes and modes. Numerics first, then times, a row each."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import environment, presets, table
from .cases import CELLS, DTYPES, Case
from .engines import DEVICE_LOST, check_in_interpreter
from .judge import Judge, is_ours
from .options import choose, refuse, split, use_constants
from .precompile import ahead
from .presets import PRESETS
from .providers import PROVIDERS, absence, kernels

if TYPE_CHECKING:
    from lstm_triton.devices import Device

KEY = ("cell", "dtype", "mode", "layers", "bidirectional", "batch", "hidden", "seq", "provider")
FIELDS = (
    *KEY,
    # ok; loose (another's numerics, timed all the same); failed (numerics); refused (no such plan);
    # absent (not importable); error
    "status",
    "median_ms", "p20_ms", "p80_ms", "rounds",  # the L2 cache overwritten before each run
    "warm_ms", "warm_p20_ms", "warm_p80_ms",  # the L2 cache as the last run left it
    "graph_ms", "graph_p20_ms", "graph_p80_ms",  # replay of a CUDA graph, the L2 cache overwritten
    "us_per_step",  # median / T / layers
    "ratio",  # torch.nn's median over this one: above 1 is faster than torch.nn
    "floor_us", "to_floor",  # floor.py's floor for a step, and the median over that of the whole run
    "host_us",  # of a call with T = 1 that is not waited for
    "peak_mib", "saved_mib",  # on the device during a run; from a training forward until its backward
    "clock_mhz",  # of the multiprocessors, right after the timing
    "error", "worst", "allowed",  # largest relative error, whose, and what is allowed
    "plan",  # ours: engines and tiles; torch.nn: cuDNN's algorithm, inferred
    "version",  # the provider's
    "detail",
    "constants",  # what planner and floor went by
    *environment.COLUMNS,
)  # fmt: skip
#: What the terminal and sweep.md show of it: the name there, the column.
SHOWN = {
    "provider": "provider", "status": "status", "ms": "median_ms", "graph": "graph_ms", "us/step": "us_per_step",
    "ratio": "ratio", "floor x": "to_floor", "plan": "plan",
}  # fmt: skip

#: Cases whose kernels are compiled at a time, before the first of them runs: enough for 16 cores.
BATCH = 16

CPU_LINE = (
    "CPU path: ATen against ATen at small sizes, no GPU in use. Nothing here says anything about GPU speed, and GPU "
    "columns (warm, graph, floor, host, peak, clock) stay empty."
)


class DeviceLostError(RuntimeError):
    """The CUDA context is beyond use."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lists = "comma-separated"
    parser.add_argument("--cells", help=f"{lists}: {', '.join(CELLS)} (rnn is tanh)")
    parser.add_argument("--layers", help=f"{lists} numbers of layers")
    parser.add_argument("--bidirectional", help=f"{lists}: no, yes")
    parser.add_argument("--dtype", help=f"{lists}: {', '.join(DTYPES)} (tf32: fp32 storage, tf32 products)")
    parser.add_argument("--batch", help=f"{lists} batch sizes")
    parser.add_argument("--hidden", help=f"{lists} hidden sizes; the input is as wide")
    parser.add_argument("--seq", help=f"{lists} sequence lengths")
    parser.add_argument(
        "--mode",
        help=f"{lists}: inference (no autograd), forward (of training), forward+backward; all three by default",
    )
    meanings = [f"  {name}: {preset.meaning}" for name, preset in PRESETS.items()]
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="\n".join(["a list of cases, of which the options above keep what matches them all;", *meanings]),
    )
    sentences = [f"  {name}: {provider.includes}" for name, provider in PROVIDERS.items()]
    parser.add_argument(
        "--providers",
        help="\n".join([f"{lists}, or all that are importable (ours,torch); what their times include:", *sentences]),
    )
    parser.add_argument(
        "--graph", action="store_true", help="also capture each run as a CUDA graph and time its replay"
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent timing each result (0.3)")
    parser.add_argument("--minutes", type=float, help="start nothing new after this long")
    parser.add_argument("--constants", type=Path, help="file of device constants (of probe) for planner and floor")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/sweep"), help="folder for CSV, JSON and Markdown")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows in --out made from the same sources by the same software; --graph fills no old rows",
    )


def main(options: argparse.Namespace) -> int:
    """Run the sweep; 0 if all of ours passed their numerics, 1 if any did not, DEVICE_LOST if the device went away."""
    start = time.monotonic()
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    if device == "cuda" and not torch.cuda.is_available():
        refuse("--device: 'cuda' needs a CUDA device, and none is available; leave it out for the CPU path")
    if os.environ.get("TRITON_INTERPRET") == "1":
        refuse("the sweep times compiled code: run it without TRITON_INTERPRET")
    for name in ("seconds", "minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            refuse(f"--{name}: expected a number above zero, got {value:g}")
    if device == "cpu":
        print(CPU_LINE)
    preset = PRESETS.get(options.preset)
    cases = presets.cases(options, device)
    default = preset.providers if preset else "ours,torch"
    providers = chosen(default if options.providers is None else options.providers)
    use_constants(options.constants)
    found = environment.collect(device)
    print(environment.summary(found), flush=True)
    try:
        rows = table.Rows(options.out / "sweep.csv", FIELDS, resume=options.resume)
    except (OSError, ValueError) as error:
        refuse(f"--out: {error}")
    environment.write(found, options.out)

    minutes = options.minutes or (preset.minutes if preset else None)
    deadline = math.inf if minutes is None else start + minutes * 60
    judge = Judge(device, options.seconds, graph=options.graph, model=_model(device))

    def prepare(todo: list[Case]) -> Iterable[Case]:
        wanted = partial(kernels, names=providers, device=device)
        return ahead(todo, wanted, BATCH, deadline) if device == "cuda" else iter(todo)

    try:
        unreached = run(cases, providers, rows, found, judge, deadline=deadline, prepare=prepare)
    except DeviceLostError as error:
        print(f"the device is lost: {error}\n--resume goes on in another process")
        return DEVICE_LOST
    lines, engines_passed = check_in_interpreter() if device == "cpu" else ([], True)
    mine = current(rows.rows, found)
    shown = "\n".join([terminal(mine), "", *lines])
    head = [environment.summary(found), "", *described(providers, device)]
    (options.out / "sweep.md").write_text("\n".join([*head, "", shown, ""]))
    print(shown)
    if unreached:
        print(f"{unreached} of {len(cases)} cases were not reached in time; --resume goes on with them")
    for row in mine:
        if row["status"] in ("failed", "error", "loose"):
            print(f"{row['status'].upper()}: {' '.join(row[name] for name in KEY)}: {row['detail']}")
    if not engines_passed:
        print("FAILED: an engine in the interpreter")
    return 0 if engines_passed and not faults(mine) and any(row["median_ms"] for row in mine) else 1


def chosen(text: str) -> list[str]:
    """The providers asked for; "all" leaves out, and names, those that are not importable."""
    if split(text) != ["all"]:
        return choose("providers", text, tuple(PROVIDERS))
    absent = [name for name in PROVIDERS if absence(name)]
    if absent:
        print(f"not importable here, so left out: {', '.join(absent)}")
    return [name for name in PROVIDERS if name not in absent]


def described(providers: list[str], device: str) -> list[str]:
    """What the times of each provider include, and what the columns are, for the head of the report."""
    lines = [f"- {name} {PROVIDERS[name].version}: {PROVIDERS[name].includes}" for name in providers]
    if device == "cpu":
        return [CPU_LINE, "", *lines]
    columns = (
        "ms: median, the L2 cache overwritten before each run; +-: half of p20 to p80; graph: of CUDA-graph replays. "
        "ratio: torch.nn's ms over this one's, above 1 is faster than torch.nn. floor x: ms over the floor of the "
        "model. Warm caches, host time, memory, clock and errors stand beside these in sweep.csv."
    )
    return [*lines, "", columns]


def _model(device: str) -> Device | None:
    """The constants of this GPU, for the floor."""
    if device != "cuda":
        return None
    import torch

    from lstm_triton.launch import device_of

    return device_of(torch.empty(0, device=device))


Judgement = Callable[[Case, list[str]], dict[str, dict[str, Any]]]


def run(
    cases: Iterable[Case],
    providers: list[str],
    rows: table.Rows,
    found: dict[str, object],
    judge: Judgement,
    *,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    prepare: Callable[[list[Case]], Iterable[Case]] = iter,
) -> int:
    """Judge each case that is not among the rows yet and write its rows; returns how many were left for want of time.

    The case in hand stands in a file beside the rows, a line an attempt. A resumed sweep tries again a case in which
    the process ended, once: a case that ends the process twice gets rows that say so. Where the device was lost, those
    providers are tried again that have no row yet, beside torch.nn.
    """
    stamp = {name: found[name] for name in environment.COLUMNS}
    marker = rows.path.with_suffix(".running")
    attempts = marker.read_text().splitlines() if rows.resumed and marker.exists() else []
    done = {tuple(row[name] for name in KEY): row for row in current(rows.rows, found)}
    todo = [case for case in cases if any(_key(case, name) not in done for name in providers)]
    longest, judged = 0.0, 0
    for case in table.progress(prepare(todo), len(todo), "sweep"):
        started = clock()
        if started + longest > deadline:
            break
        before = [line for line in attempts if line == str(case)]
        wanted = [name for name in providers if _key(case, name) not in done]
        if "torch" in providers and done.get(_key(case, "torch"), {}).get("median_ms"):
            wanted.insert(0, "torch")  # a ratio is between times taken in turns
        if len(before) < 2:
            marker.write_text("\n".join([*before, str(case)]))
            try:
                verdicts = judge(case, wanted)
            except KeyboardInterrupt:  # no fault of the case
                marker.unlink()
                raise
        else:
            verdicts = {name: {"status": "error", "detail": "the process ended in this case"} for name in wanted}
        lost = [str(verdict["detail"]) for verdict in verdicts.values() if verdict.pop("lost", False)]
        rows.add(*({**case.key, "provider": name, **verdict, **stamp} for name, verdict in verdicts.items()))
        marker.unlink(missing_ok=True)
        if lost:
            raise DeviceLostError(lost[0])
        longest, judged = max(longest, clock() - started), judged + 1
    return len(todo) - judged


def faults(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of ours that are wrong or raised; what others do is reported, not judged."""
    return [row for row in rows if is_ours(row["provider"]) and row["status"] in ("failed", "error")]


def current(rows: list[dict[str, str]], found: dict[str, object]) -> list[dict[str, str]]:
    """The rows made from the same sources by the same software on the same kind of device; of two alike, the later."""
    same = ("commit", "source", "device", "driver", "torch", "triton", "cudnn")
    mine = [row for row in rows if all(row[name] == str(found[name]) for name in same)]
    return list({tuple(row[name] for name in KEY): row for row in mine}.values())


def _key(case: Case, provider: str) -> tuple[str, ...]:
    row = {**case.key, "provider": provider}
    return tuple(str(row[name]) for name in KEY)


def terminal(rows: list[dict[str, str]]) -> str:
    """The rows as a table without the columns that are empty here; a case is named once."""
    shown = []
    last = ""
    for row in rows:
        extra = f" L{row['layers']}" * (row["layers"] != "1") + " both" * (row["bidirectional"] == "True")
        case = f"{row['cell']} {row['dtype']} {row['mode']} B{row['batch']} H{row['hidden']} T{row['seq']}{extra}"
        line = {"case": case if case != last else "", **{name: row[column] for name, column in SHOWN.items()}}
        if row["median_ms"]:
            half = (float(row["p80_ms"]) - float(row["p20_ms"])) / 2
            line["+-"] = f"{half / float(row['median_ms']):.0%}"
        shown.append(line)
        last = case
    names = list(SHOWN)
    names.insert(names.index("ms") + 1, "+-")
    return table.markdown(shown, ["case", *(name for name in names if any(line.get(name) for line in shown))])
