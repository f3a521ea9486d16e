"""The sweep: ours against torch.nn over cells, dtypes and sizes. Numerics first, then time, a row a result."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import environment, table
from .engines import DEVICE_LOST, check_in_interpreter
from .judge import Judge
from .numerics import CELLS, ENGINES
from .options import choose, numbers
from .precompile import ahead
from .providers import DTYPES, PROVIDERS, Case, kernels

KEY = ("cell", "dtype", "mode", "layers", "bidirectional", "batch", "hidden", "seq", "engine", "provider")
FIELDS = (
    *KEY,
    "status",  # ok; loose (torch.nn's numerics, timed all the same); failed (numerics); refused (no such plan); error
    "median_ms", "p20_ms", "p80_ms", "rounds",
    "us_per_step",  # median / T / layers
    "ratio",  # torch.nn's median over this one: above 1 is faster than torch.nn
    "error", "worst", "allowed",  # largest relative error, whose, and what is allowed
    "plan",
    "detail",
    *environment.COLUMNS,
)  # fmt: skip
SHOWN = (
    "cell", "dtype", "mode", "layers", "bidirectional", "batch", "hidden", "seq", "provider", "status",
    "median_ms", "p20_ms", "p80_ms", "us_per_step", "ratio", "error", "plan",
)  # fmt: skip

#: What runs where nothing else is asked for.
DEFAULTS = {
    "cuda": {
        "cells": "lstm,gru,rnn",
        "batch": "1,16,64",
        "hidden": "256,512,768,1024",
        "seq": "512",
        "dtype": "bf16,fp16",
    },
    "cpu": {"cells": "lstm,gru,rnn", "batch": "1,16", "hidden": "64,128", "seq": "64", "dtype": "fp32"},
}


#: Cases whose kernels are compiled at a time, before the first of them runs.
BATCH = 8


class DeviceLostError(RuntimeError):
    """The CUDA context is beyond use."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lists = "comma-separated"
    parser.add_argument("--cells", help=f"{lists}: lstm, gru, rnn")
    parser.add_argument("--batch", help=f"{lists} batch sizes")
    parser.add_argument("--hidden", help=f"{lists} hidden sizes; the input is as wide")
    parser.add_argument("--seq", help=f"{lists} sequence lengths")
    parser.add_argument("--dtype", help=f"{lists}: {', '.join(DTYPES)} (tf32: fp32 storage, tf32 products)")
    parser.add_argument("--mode", default="fwd,fwdbwd", help="fwd (inference), fwdbwd (training step); default both")
    parser.add_argument("--layers", default="1", help=f"{lists} numbers of layers")
    parser.add_argument("--bidirectional", default="no", help=f"{lists}: no, yes")
    parser.add_argument("--engine", default="auto", help=f"{lists}: auto, local, resident, streamed, step")
    parser.add_argument("--providers", default="ours,torch", help=f"{lists}: ours, torch")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--preset", choices=("telling",), help="gpu-check's list, most telling first, instead of a grid"
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent measuring each result (default 0.3)")
    parser.add_argument("--minutes", type=float, help="start nothing new after this long")
    parser.add_argument("--out", type=Path, default=Path("results/sweep"), help="folder for CSV, JSON and Markdown")
    parser.add_argument("--resume", action="store_true", help="keep the rows in --out made from the same sources")


def grid(options: argparse.Namespace, device: str) -> list[Case]:
    """The cells of the sweep, in the order of the options, mode innermost."""
    asked = vars(options) | {name: getattr(options, name) or text for name, text in DEFAULTS[device].items()}
    product = itertools.product(
        choose("cells", asked["cells"], CELLS),
        choose("dtype", asked["dtype"], DTYPES),
        numbers("layers", asked["layers"]),
        choose("bidirectional", asked["bidirectional"], ("no", "yes")),
        numbers("hidden", asked["hidden"]),
        numbers("batch", asked["batch"]),
        numbers("seq", asked["seq"]),
        choose("engine", asked["engine"], ("auto", *ENGINES)),
        choose("mode", asked["mode"], ("fwd", "fwdbwd")),
    )
    return [
        Case(cell, dtype, mode, batch, hidden, seq, layers, both == "yes", engine)
        for cell, dtype, layers, both, hidden, batch, seq, engine, mode in product
    ]


def telling() -> list[Case]:
    """What says most about a GPU, first: gpu-check walks down this list until its time is up."""
    # cell, dtype, batch, hidden, sequence, layers, both directions
    shapes: list[tuple[Any, ...]] = [
        # Where cuDNN is strongest: fp16 or bf16, one layer, batches of 8s, 128s of hidden units.
        ("lstm", "bf16", 16, 1024, 512),
        ("lstm", "fp16", 16, 1024, 512),
        ("lstm", "fp16", 16, 768, 1024),
        ("lstm", "bf16", 16, 768, 1024),
        ("gru", "bf16", 16, 1024, 512),
        ("gru", "fp16", 16, 1024, 512),
        ("lstm", "bf16", 64, 512, 512),
        ("lstm", "fp16", 64, 512, 512),
        ("lstm", "bf16", 16, 128, 512),
        ("lstm", "bf16", 16, 256, 512),
        ("rnn", "bf16", 16, 1024, 512),
        ("lstm", "tf32", 16, 512, 512),
        ("lstm", "bf16", 1, 1024, 512),
        ("lstm", "bf16", 16, 2048, 256),
        ("lstm", "bf16", 16, 512, 512, 2),
        ("lstm", "bf16", 16, 512, 512, 1, True),
        ("lstm", "fp32", 32, 512, 64),
        ("gru", "bf16", 64, 256, 512),
        ("lstm", "bf16", 256, 512, 256),
    ]
    for cell, dtype in itertools.product(("lstm", "gru", "rnn"), ("bf16", "fp16", "tf32")):
        shapes += [(cell, dtype, batch, hidden, 512) for hidden in (512, 1024, 256, 1536) for batch in (16, 64, 1)]
    cases = [Case(cell, dtype, mode, *rest) for cell, dtype, *rest in shapes for mode in ("fwd", "fwdbwd")]
    return list(dict.fromkeys(cases))


def main(options: argparse.Namespace) -> int:
    """Run the sweep; 0 if all of ours passed their numerics, 1 if any did not, DEVICE_LOST if the device went away."""
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device is available")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("the sweep times compiled code: run it without TRITON_INTERPRET")
    if device == "cpu":
        print("CPU path: ATen against ATen at small sizes, no GPU in use. Nothing here says anything about GPU speed.")
    providers = choose("providers", options.providers, PROVIDERS)
    cases = telling() if options.preset else grid(options, device)
    found = environment.collect(device)
    print(environment.summary(found), flush=True)
    rows = table.Rows(options.out / "sweep.csv", FIELDS, resume=options.resume)
    environment.write(found, options.out)

    deadline = math.inf if options.minutes is None else time.monotonic() + options.minutes * 60
    judge = Judge(device, options.seconds)

    def prepare(todo: list[Case]) -> Iterable[Case]:
        return ahead(todo, lambda case: kernels(case, device), BATCH, deadline) if device == "cuda" else iter(todo)

    try:
        unreached = run(cases, providers, rows, found, judge, deadline=deadline, prepare=prepare)
    except DeviceLostError as error:
        print(f"the device is lost: {error}")
        return DEVICE_LOST
    lines, engines_passed = check_in_interpreter() if device == "cpu" else ([], True)
    mine = current(rows.rows, found)
    text = "\n".join([table.markdown(mine, SHOWN), "", *lines])
    (options.out / "sweep.md").write_text(f"{environment.summary(found)}\n\n{text}\n")
    print(text)
    if unreached:
        print(f"{unreached} of {len(cases)} cells were not reached in time; --resume goes on with them")
    for row in mine:
        if row["status"] in ("failed", "error", "loose"):
            print(f"{row['status'].upper()}: {' '.join(row[name] for name in KEY)}: {row['detail']}")
    if not engines_passed:
        print("FAILED: an engine in the interpreter")
    return 0 if engines_passed and not faults(mine) and any(row["median_ms"] for row in mine) else 1


Judgement = Callable[[Case, list[str]], dict[str, dict[str, object]]]


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
    the process ended, once: a case that ends the process twice gets a row that says so.
    """
    stamp = {name: found[name] for name in environment.COLUMNS}
    marker = rows.path.with_suffix(".running")
    attempts = marker.read_text().splitlines() if rows.resumed and marker.exists() else []
    done = {tuple(row[name] for name in KEY) for row in current(rows.rows, found)}
    todo = [case for case in cases if any(_key(case, name) not in done for name in providers)]
    longest, judged = 0.0, 0
    for case in table.progress(prepare(todo), len(todo), "sweep"):
        started = clock()
        if started + longest > deadline:
            break
        before = [line for line in attempts if line == str(case)]
        if len(before) < 2:
            marker.write_text("\n".join([*before, str(case)]))
            verdicts = judge(case, providers)
        else:
            verdicts = {name: {"status": "error", "detail": "the process ended in this cell"} for name in providers}
        lost = [str(verdict["detail"]) for verdict in verdicts.values() if verdict.pop("lost", False)]
        rows.add(*({**case.key, "provider": name, **verdicts[name], **stamp} for name in providers))
        marker.unlink(missing_ok=True)
        if lost:
            raise DeviceLostError(lost[0])
        longest, judged = max(longest, clock() - started), judged + 1
    return len(todo) - judged


def faults(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of ours that are wrong or raised; what torch.nn does is reported, not judged."""
    return [row for row in rows if row["provider"] == "ours" and row["status"] in ("failed", "error")]


def current(rows: list[dict[str, str]], found: dict[str, object]) -> list[dict[str, str]]:
    """The rows made from the same sources, at the same commit, on the same kind of device; of two alike, the later."""
    same = ("commit", "source", "device")
    mine = [row for row in rows if all(row[name] == str(found[name]) for name in same)]
    return list({tuple(row[name] for name in KEY): row for row in mine}.values())


def _key(case: Case, provider: str) -> tuple[str, ...]:
    row = {**case.key, "provider": provider}
    return tuple(str(row[name]) for name in KEY)
