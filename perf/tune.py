"""Search on a GPU, near the model's choice, for the schedule that is fastest there, and keep the winners.

For each problem and direction: every engine and tile that the model puts within --near of its best, then the winner's
product with one number changed at a time until nothing is faster, then a duel with the model's choice. Every candidate
passes its numerics before it is timed. A winner is kept where it is faster by more than the spread and by 2 %.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import lstm_triton
from lstm_triton import tuning

from . import environment, table
from .cases import CELLS, DTYPES
from .options import NO_GPU, choose, numbers, refuse, target, use_constants
from .trial import SCHEDULE, Result, Task, Trial

if TYPE_CHECKING:
    from lstm_triton.devices import Device
    from lstm_triton.planner import KernelProblem
    from lstm_triton.plans import KernelPlan

#: A winner is faster than the model's choice by this factor at least.
WORTH = 1.02

KEY = ("cell", "direction", "dtype", "hidden", "batch")
FIELDS = (
    *KEY, *SCHEDULE,
    "status",  # ok; failed (numerics); refused (the GPU has not the resources); error
    "stage",  # search, or duel: beside the model's choice, the last word
    "us_per_step", "p20_us", "p80_us", "model_us",
    "kept",  # yes where it went into the table
    "detail", *environment.COLUMNS,
)  # fmt: skip


Timer = Callable[[Task, "KernelProblem", Sequence["KernelPlan"], float], "dict[KernelPlan, Result]"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lists = "comma-separated"
    parser.add_argument("--cells", default="lstm,gru", help=f"{lists}: {', '.join(CELLS)}")
    parser.add_argument("--dtype", default="bf16,tf32", help=f"{lists}: {', '.join(DTYPES)}")
    parser.add_argument(
        "--batch", default="16,64", help=f"{lists} batch sizes; each stands for all up to it, from half"
    )
    parser.add_argument("--hidden", default="256,512,768,1024", help=f"{lists} hidden sizes")
    parser.add_argument("--direction", default="forward,backward", help=f"{lists}: forward, backward")
    parser.add_argument("--near", type=float, default=2.0, help="how far from the model's best to search (default 2)")
    parser.add_argument("--seconds", type=float, default=0.05, help="time spent measuring each schedule (default 0.05)")
    parser.add_argument("--minutes", type=float, help="start no further problem after this long")
    parser.add_argument("--constants", type=Path, help="device constants (of probe) to start from")
    parser.add_argument("--target", default="H200", help="without a GPU: for which one to list what would be searched")
    parser.add_argument("--save", action="store_true", help="also put the table into the package, beside what is there")
    parser.add_argument("--out", type=Path, default=Path("results/tune"), help="folder for CSV and table")


def main(options: argparse.Namespace) -> int:
    """Search; 0 if every candidate's numerics were right, 1 if any failed, NO_GPU without a GPU."""
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        refuse("tune times compiled kernels: run it without TRITON_INTERPRET")
    if not options.near >= 1:
        refuse(f"--near: expected 1 or more, got {options.near:g}")
    for name in ("seconds", "minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            refuse(f"--{name}: expected a number above zero, got {value:g}")
    tasks = wanted(options)
    use_constants(options.constants)
    if not torch.cuda.is_available():
        device = target("target", options.target)
        print(
            f"tune: no CUDA device is available here, so nothing was measured. On a {device.name} the search would "
            "begin with these schedules (estimated by the model, not measured):"
        )
        for task in tasks:
            found = candidates(task, device, options.near)
            model = f"the model's choice {_named(found[0])}, {found[0].step_us:.2f} us a step"
            print(f"  {task}: {len(found)} schedules, {model}")
        return NO_GPU
    from lstm_triton.launch import device_of

    device = device_of(torch.empty(0, device="cuda"))
    if not device.family:
        print(f"tune: {device.name} has no file of constants, so a table for it would not be found; probe it first")
        return 1
    found = environment.collect("cuda")
    print(environment.summary(found), flush=True)
    rows = table.Rows(options.out / "tune.csv", FIELDS)
    environment.write(found, options.out)
    deadline = math.inf if options.minutes is None else time.monotonic() + options.minutes * 60
    kept: tuning.Table = {}
    unreached = 0
    with Trial(options.seconds) as trial:
        for task in table.progress(tasks, len(tasks), "tune"):
            if time.monotonic() > deadline:
                unreached += 1
                continue
            problem = task.problem(device)
            choice = search(task, problem, options.near, trial, rows, found)
            if choice is not None:
                kept[problem.key] = choice
                _write(kept, device.family, found, options.out)
    print(summary(rows.rows))
    if unreached:
        print(f"{unreached} of {len(tasks)} problems were not reached in time")
    if kept and options.save:
        folder = Path(lstm_triton.__file__).parent / "tuned" / "plans"
        path = folder / tuning.path_name(device.family)
        before = tuning.read(path.read_text(), device.family) if path.exists() else {}
        print(f"kept: {_write(before | kept, device.family, found, folder)}")
    return 1 if any(row["status"] in ("failed", "error") for row in rows.rows) else 0


def wanted(options: argparse.Namespace) -> list[Task]:
    """The problems of the command line."""
    grid = itertools.product(
        numbers("hidden", options.hidden),
        numbers("batch", options.batch),
        choose("cells", options.cells, CELLS),
        choose("dtype", options.dtype, DTYPES),
        choose("direction", options.direction, ("forward", "backward")),
    )
    return [Task(cell, direction, dtype, hidden, batch) for hidden, batch, cell, dtype, direction in grid]


def candidates(task: Task, device: Device, near: float) -> list[KernelPlan]:
    """Where the search of a problem begins, the model's choice first."""
    from lstm_triton import planner

    return planner.candidates(task.problem(device), near)


def search(
    task: Task, problem: KernelProblem, near: float, timer: Timer, rows: table.Rows, found: dict[str, object]
) -> tuning.Choice | None:
    """The schedule that beat the model's choice, if one did. Every result is on disk before the next is measured."""
    from lstm_triton import planner

    results: dict[KernelPlan, Result] = {}

    def measure(plans: Iterable[KernelPlan], stage: str, longer: float = 1.0) -> dict[KernelPlan, Result]:
        new = timer(task, problem, list(plans), longer)
        rows.add(*(_row(task, plan, result, stage, found) for plan, result in new.items()))
        return new

    todo = planner.candidates(problem, near)
    model = todo[0]
    while todo:
        results |= measure(todo, "search")
        best = min(results, key=lambda plan: results[plan].us)
        if results[best].us == math.inf:
            return None
        todo = [plan for plan in planner.neighbours(problem, best) if plan not in results]
    if best == model:
        return None
    duel = measure((model, best), "duel", longer=4.0)
    mine, other = duel[best], duel[model]
    if mine.us * WORTH > other.us or mine.p80 > other.p20 or other.us == math.inf:
        return None
    rows.add(_row(task, best, mine, "duel", found) | {"kept": "yes", "model_us": f"{other.us:.3f}"})
    return tuning.Choice(
        **{name: getattr(best, name) for name in SCHEDULE}, us_per_step=round(mine.us, 3), model_us=round(other.us, 3)
    )


def _row(task: Task, plan: KernelPlan, result: Result, stage: str, found: dict[str, object]) -> dict[str, object]:
    times = {"us_per_step": result.us, "p20_us": result.p20, "p80_us": result.p80}
    return {
        **asdict(task),
        **{name: getattr(plan, name) for name in SCHEDULE},
        "status": result.status,
        "stage": stage,
        **{name: f"{us:.3f}" for name, us in times.items() if us < math.inf},
        "detail": result.detail,
        **_stamp(found),
    }


def _stamp(found: dict[str, object]) -> dict[str, object]:
    return {name: found[name] for name in environment.COLUMNS}


def _write(kept: tuning.Table, family: str, found: dict[str, object], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tuning.path_name(family)
    path.write_text(tuning.write(kept, family, {name: str(value) for name, value in found.items()}))
    return path


def summary(rows: list[dict[str, str]]) -> str:
    """A line a problem: how many schedules were tried, the best of them, and whether it was kept."""
    lines = []
    for key in dict.fromkeys(tuple(row[name] for name in KEY) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in KEY) == key]
        tried = [row for row in mine if row["stage"] == "search"]
        bad = sum(row["status"] != "ok" for row in mine)
        kept = [row for row in mine if row["kept"]]
        what = f"{len(tried)} tried" + f", {bad} FAILED" * bool(bad)
        if kept:
            row = kept[0]
            shape = f"{row['engine']} {row['block_b']}x{row['block_h']}"
            what += f", kept {shape} at {row['us_per_step']} us a step, the model's choice {row['model_us']}"
        else:
            what += ", the model's choice stands"
        lines.append(f"{' '.join(key)}: {what}")
    return "\n".join(lines) or "nothing was searched"


def _named(plan: KernelPlan) -> str:
    return f"{plan.engine} {plan.block_b}x{plan.block_h * plan.tiles}"
