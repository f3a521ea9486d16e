"""`python -m lstm_triton.perf.engines`: every engine, cell and dtype against float64, on a GPU or interpreted."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from . import environment, table
from .numerics import CELLS, ENGINES, Problem, alive, check_engine, draw
from .precompile import Kernel, ahead
from .providers import precision

FIELDS = (
    "engine", "cell", "dtype", "seq", "batch", "hidden", "tile",
    "status", "error", "worst", "allowed", "detail", "source",
)  # fmt: skip
KEY = FIELDS[:7]
#: Exit status when a CUDA error has made this process's device unusable; another process can go on with --resume.
DEVICE_LOST = 75
#: Problems whose kernels are compiled at a time, before the first of them runs: two kernels each, for 16 cores.
BATCH = 8


def interpreted() -> list[Problem]:
    """Engine by cell, at a size that takes the interpreter a moment.

    Its programs run one after another, so an engine that waits gets a tile that leaves one program a group.
    """
    tile = {"resident": (16, 32), "streamed": (16, 32)}
    return [Problem(cell, engine, "fp32", 4, 3, 20, 12, tile.get(engine)) for engine in ENGINES for cell in CELLS]


def on_gpu() -> list[Problem]:
    """Engine by cell by dtype by odd shape, each engine and dtype met early."""
    # T, B, H, I
    shapes = [(7, 3, 37, 24), (33, 17, 72, 40), (64, 16, 256, 256), (5, 65, 130, 33), (12, 20, 1000, 100)]
    dtypes = ("bf16", "fp16", "tf32", "fp32", "fp64")
    problems = [
        Problem(cell, engine, dtype, *shape)
        for shape, cell, dtype, engine in itertools.product(shapes, CELLS, dtypes, ENGINES)
    ]
    # One hidden unit saturates: in 16 bits its gradient by a gate near 1 has no correct digit.
    single = [Problem(cell, engine, dtype, 1, 1, 1, 1) for cell in CELLS for dtype in dtypes[3:] for engine in ENGINES]
    return problems[:60] + single + problems[60:]


def kernels(problem: Problem) -> list[Kernel]:
    """What a problem compiles on this GPU."""
    import torch

    import lstm_triton as lt

    tensors = draw(problem).arguments
    with precision(problem.dtype):
        on_device = [None if value is None else torch.empty_like(value, device="cuda") for value in tensors.values()]
        plan = lt.plan(problem.cell, *on_device, engine=problem.engine, tile=problem.tile)
    return [(plan, "forward", True), (plan, "backward", True)]


def run(problems: Iterable[Problem], device: str, rows: table.Rows, source: str, minutes: float | None) -> bool:
    """Check each problem that is not among the rows yet; False if the device was lost on the way."""
    deadline = math.inf if minutes is None else time.monotonic() + minutes * 60
    done = {tuple(row[name] for name in KEY) for row in rows.rows if row["source"] == source}
    todo = [problem for problem in problems if _key(problem) not in done]
    prepared = ahead(todo, kernels, BATCH, deadline) if device == "cuda" else iter(todo)
    for problem in table.progress(prepared, len(todo), "numerics"):
        if time.monotonic() > deadline:
            break
        row = {**dict(zip(KEY, _key(problem), strict=True)), **_judged(problem, device), "source": source}
        rows.add(row)
        if row["status"] == "error" and not alive(device):
            return False
    return True


def unreached(rows: Iterable[dict[str, str]]) -> list[str]:
    """Which engines and dtypes of `on_gpu` no row speaks of, an engine a string: "step fp32 fp64"."""
    reached = {(row["engine"], row["dtype"]) for row in rows}
    missing: dict[str, list[str]] = {}
    for engine, dtype in dict.fromkeys((problem.engine, problem.dtype) for problem in on_gpu()):
        if (engine, dtype) not in reached:
            missing.setdefault(engine, []).append(dtype)
    return [" ".join([engine, *dtypes]) for engine, dtypes in missing.items()]


def _judged(problem: Problem, device: str) -> dict[str, object]:
    try:
        check = check_engine(problem, device, repeat=device == "cuda")
    except ValueError as error:
        return {"status": "refused", "detail": " ".join(str(error).split())[:300]}
    except Exception as error:
        return {"status": "error", "detail": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    return check.columns


def check_in_interpreter() -> tuple[list[str], bool]:
    """Run the interpreter's problems in a process of their own; the report's lines, and whether all passed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engines.csv"
        command = [sys.executable, "-m", "lstm_triton.perf.engines", "--out", str(path)]
        done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, stderr=subprocess.PIPE, text=True)
        rows = table.read(path, FIELDS) if path.exists() else []
    lines = [
        "Every engine's kernels in Triton's interpreter, forward and all gradients, against float64. Programs run one "
        "after another there, so the engines that wait (resident, streamed) ran with one program a group:",
        "",
        table.markdown(rows, FIELDS[:-1]),
    ]
    passed = len(rows) == len(interpreted()) and all(row["status"] == "ok" for row in rows)
    if len(rows) != len(interpreted()):
        lines += ["", f"the process ended with status {done.returncode} before it was done:", done.stderr[-1000:]]
    return lines, passed


def _key(problem: Problem) -> tuple[str, ...]:
    tile = "" if problem.tile is None else f"{problem.tile[0]}x{problem.tile[1]}"
    values = (problem.engine, problem.cell, problem.dtype, problem.seq, problem.batch, problem.hidden, tile)
    return tuple(str(value) for value in values)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lstm_triton.perf.engines", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: Triton's interpreter")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment")
    rows = table.Rows(options.out, FIELDS, resume=options.resume)
    problems = on_gpu() if options.device == "cuda" else interpreted()
    source = environment.source_hash()
    if not run(problems, options.device, rows, source, options.minutes):
        return DEVICE_LOST
    mine = [row for row in rows.rows if row["source"] == source]
    return 1 if any(row["status"] in ("failed", "error") for row in mine) else 0


if __name__ == "__main__":
    raise SystemExit(main())
