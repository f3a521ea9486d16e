"""`python -m lstm_triton.perf.engines`: every variant, engine and dtype against float64, on a GPU or interpreted."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lstm_triton.planner import ENGINES
from lstm_triton.spec import GATES, OPTIONS, CellSpec, variants

from . import environment, table
from .cases import DTYPES, precision
from .interpreting import take_shortcuts
from .kinks import has_kinks
from .numerics import alive
from .precompile import Kernel, ahead
from .problems import Problem, check_engine, paired

KEY = ("engine", "cell", "dtype", "seq", "batch", "hidden", "width", "tile", "form")
FIELDS = (*KEY, "status", "error", "worst", "allowed", "detail", "source")
#: Exit status when a CUDA error has made this process's device unusable; another process can go on with --resume.
DEVICE_LOST = 75
#: Problems whose kernels are compiled at a time, while those before them run: three kernels each, for 16 cores.
BATCH = 16
#: An engine whose waits ran out so often is left: each costs some ten seconds, and says no more than the first.
TIMEOUTS = 3
#: Statuses of what is wrong. Others: ok; refused (no such plan); left (see TIMEOUTS).
FAULTY = ("failed", "error")

DTYPES_IN_ORDER = ("bf16", "fp32", "fp16", "tf32", "fp64")
# T, B, H, I. fp32 products are scalar: the local engine has them up to H = 32 alone.
SMALL = (7, 3, 29, 21)
ONE = (1, 1, 37, 10)
#: In 16 bits a single unit saturates: its gradient by a gate near 1 has no correct digit.
SINGLE = (1, 1, 1, 1)
SIZES = ((33, 70, 72, 40), (12, 20, 1000, 100), (200, 17, 130, 33), (64, 16, 256, 256))
#: Of cells with options, at which each engine has several groups, and several programs in one where it can.
OPTIONAL = (9, 40, 130, 33)
#: Forms of dropout, and the cells whose recurrent products differ, so that their masks come in at different places.
MASKED = ("shared", "per gate")
PRODUCTS = (
    CellSpec("lstm"),
    CellSpec("lstm", proj=3),
    CellSpec("gru"),
    CellSpec("rnn"),
    CellSpec("gru", reset_after=False),
)
#: Groups of 125 programs, of which only one or two fit on a GPU at a time: the rest comes in further launches.
WAVES, WAVES_TILE = (4, 40, 1000, 20), (16, 8)
#: With a tile a sequence is also checked alone in its batch.
TILED, TILE = (5, 40, 24, 7), (16, 16)


def interpreted() -> list[Problem]:
    """Engine by cell, with skipped steps and a projection, and each option by one engine, at a size that takes the
    interpreter a moment.

    Its programs run one after another, so an engine that waits gets a tile that leaves one program a group.
    """
    tile = {"resident": (16, 32), "streamed": (16, 32)}
    plain = [CellSpec(cell) for cell in GATES]
    found = [Problem(spec, engine, "fp32", 4, 3, 20, 12, tile.get(engine)) for engine in ENGINES for spec in plain]
    projected = next(spec for spec in variants() if spec.proj)
    found += [replace(problem, spec=projected, ragged=True) for problem in found if problem.spec == plain[0]]
    for i, spec in enumerate(OPTIONS):
        engine = ENGINES[i % len(ENGINES)]
        small = Problem(spec, engine, "fp32", 2, 3, 10, 6, tile.get(engine), seeded=any(spec.zoneout))
        found.append(replace(small, masks=("", *MASKED)[i % 3]))
    return found


def first() -> list[Problem]:
    """Every variant by every engine, at a small size: those that torch.nn has too in every dtype, with biases forward
    from given states, without reversed from none, then the same with skipped steps. Then the options.
    """
    whole = _every([spec for spec in variants() if spec not in OPTIONS], DTYPES_IN_ORDER, SMALL, swap=False)
    return [*whole, *(replace(problem, ragged=True) for problem in whole), *options()]


def options() -> list[Problem]:
    """Each option by every engine: alone in one dtype; in another reversed, with skipped steps and dropout masks, and
    zoneout in expectation. And the masks with the cells whose products differ.
    """
    alone = [replace(problem, seeded=any(problem.spec.zoneout)) for problem in _every(OPTIONS, ("bf16",), SMALL)]
    others = [
        replace(problem, masks=MASKED[OPTIONS.index(problem.spec) % 2], ragged=True)
        for problem in _every(OPTIONS, ("tf32",), SMALL, swap=True)
    ]
    dropped = _every([spec for spec in variants() if spec in PRODUCTS], ("bf16",), SMALL)
    return [*alone, *others, *(replace(problem, masks=masks) for masks in MASKED for problem in dropped)]


def on_gpu() -> list[Problem]:
    """`first`, then modules, other sizes, other forms, and at last everything in every dtype."""
    biased = [spec for spec in variants() if spec.bias]
    plain = [spec for spec in biased if spec not in OPTIONS]
    modules = [
        Problem(spec, "auto", dtype, 9, 5, 40, 24, module=True)
        for dtype, spec in itertools.product(("fp32", "fp16"), biased)
        # Above the first layer nothing keeps 16 bits from the kinks of gradients.
        if dtype == "fp32" or not has_kinks(spec)
    ]
    waves = [
        Problem(spec, engine, "bf16", *WAVES, tile=WAVES_TILE) for spec in plain for engine in ("resident", "streamed")
    ]
    tiled = _every(biased, ("bf16", "tf32"), TILED, tile=TILE)
    edges = _every(plain, ("bf16", "fp32"), ONE) + _every(plain, ("fp32", "fp64"), SINGLE)
    sizes = [problem for shape in SIZES for problem in _every(plain, ("bf16",), shape)]
    rest = [problem for shape in SIZES for problem in _every(plain, DTYPES_IN_ORDER, shape)]
    optional = _every(OPTIONS, ("bf16",), OPTIONAL) + _every(OPTIONS, ("fp64",), ONE)
    optional += [replace(problem, seeded=True) for problem in tiled if any(problem.spec.zoneout)]
    optional += [replace(problem, masks="per gate") for problem in tiled if problem.spec in PRODUCTS]
    swapped = _every([spec for spec in variants() if spec not in OPTIONS], DTYPES_IN_ORDER, SMALL, swap=True)
    ragged = [replace(problem, ragged=True) for problem in (*modules, *tiled, *sizes)]
    recomputed = [replace(problem, recompute=True) for problem in (*modules, *ragged, *first())]
    found = [*first(), *modules, *waves, *tiled, *optional, *edges, *ragged, *recomputed, *sizes, *swapped, *rest]
    return [problem for problem in dict.fromkeys(found) if problem.spec.proj < problem.hidden]


def _every(
    specs: Iterable[CellSpec],
    dtypes: Sequence[str],
    shape: tuple[int, int, int, int],
    *,
    swap: bool = False,
    tile: tuple[int, int] | None = None,
) -> list[Problem]:
    """In every dtype by every engine: with biases forward from given states, without reversed from none, or swapped."""
    return [
        Problem(spec, engine, dtype, *shape, tile, reverse=spec.bias == swap, states=spec.bias != swap)
        for spec, dtype, engine in itertools.product(specs, dtypes, ENGINES)
    ]


def sanitized() -> list[Problem]:
    """Those of `first` in one dtype, for a memory checker: all is slow under it, and these are compiled by then."""
    return [problem for problem in first() if problem.dtype == "bf16" and problem.spec.bias and not problem.masks]


LISTS = {"all": on_gpu, "sanitized": sanitized, "interpreted": interpreted}


def kernels(problem: Problem, device: str) -> list[Kernel]:
    """What a problem compiles on this device."""
    import torch

    import lstm_triton as lt
    from lstm_triton import constexprs

    shapes = problem.shapes
    tensors = {name: torch.empty(size, dtype=DTYPES[problem.dtype], device=device) for name, size in shapes.items()}
    asked = {**problem.spec.options, "engine": problem.engine, "tile": problem.tile}
    with precision(problem.dtype):
        plan = lt.plan(problem.spec.cell, **paired(tensors), **asked)
    kinds = (("forward", True), ("forward", False), ("backward", True))
    directions = (False, True) if problem.module else (problem.reverse,)
    flags = problem.ragged, problem.cells, problem.seeded
    options = constexprs.options(plan.spec, plan.masks, problem.seeded)
    return [
        Kernel(plan, name, training, reverse, *flags, part)
        for reverse, (name, training) in itertools.product(directions, kinds)
        for part in range(len(constexprs.parts(getattr(plan, name), options)))
    ]


def run(
    problems: Iterable[Problem], device: str, rows: table.Rows, source: str, minutes: float | None, *, early: bool
) -> bool:
    """Check each problem that is not among the rows yet; False if the device was lost on the way.

    With `early` kernels are compiled on all cores before they are launched. The problem in hand stands in a file beside
    the rows: one that ended its process gets a row that says so.
    """
    deadline = math.inf if minutes is None else time.monotonic() + minutes * 60
    marker = rows.path.with_suffix(".running")
    if rows.resumed and marker.exists():
        key = dict(zip(KEY, marker.read_text().split("\n"), strict=True))
        rows.add(key | {"status": "error", "detail": "the process ended in this problem", "source": source})
    done = {tuple(row[name] for name in KEY) for row in rows.rows if row["source"] == source}
    todo = [problem for problem in problems if tuple(problem.key.values()) not in done]
    prepared = ahead(todo, partial(kernels, device=device), BATCH, deadline, overlap=True) if early else iter(todo)
    timeouts: Counter[str] = Counter()
    for problem in table.progress(prepared, len(todo), "numerics"):
        if time.monotonic() > deadline:
            break
        marker.write_text("\n".join(problem.key.values()))
        if timeouts[problem.engine] < TIMEOUTS:
            # Not early is under a memory checker, to which a second run is nothing new.
            verdict = _judged(problem, device, repeat=device == "cuda" and early)
        else:
            verdict = {"status": "left", "detail": "its engine's waits keep running out"}
        timeouts[problem.engine] += "waited in vain" in str(verdict["detail"])
        rows.add(problem.key | verdict | {"source": source})
        marker.unlink()
        if verdict["status"] == "error" and not alive(device):
            return False
    return True


#: Engine and dtype that the planner may refuse whatever the shape.
EXPECTED_REFUSALS = {("resident", "fp32"), ("local", "fp32"), ("resident", "fp64"), ("local", "fp64")}


def unreached(rows: Iterable[dict[str, str]], problems: Iterable[Problem]) -> list[str]:
    """Which engines, dtypes and variants of `problems` no row speaks of, an engine and dtype a string.

    A refusal is no answer where one is not expected: exact fp32 products alone do not fit resident kernels.
    """
    reached = {
        tuple(row[name] for name in ("engine", "dtype", "cell"))
        for row in rows
        if row["status"] != "refused" or (row["engine"], row["dtype"]) in EXPECTED_REFUSALS
    }
    wanted: dict[tuple[str, str], set[str]] = {}
    for problem in problems:
        wanted.setdefault((problem.engine, problem.dtype), set()).add(str(problem.spec))
    missing = []
    for (engine, dtype), cells in wanted.items():
        left = [cell for cell in cells if (engine, dtype, cell) not in reached]
        if left:
            missing.append(f"{engine} {dtype}" + f" ({len(left)} of {len(cells)} variants)" * (len(left) < len(cells)))
    return missing


def _judged(problem: Problem, device: str, *, repeat: bool) -> dict[str, object]:
    try:
        check = check_engine(problem, device, repeat=repeat)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and "cannot run" in text:
            return {"status": "refused", "detail": text}
        return {"status": "error", "detail": f"{type(error).__name__}: {text}"}
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
        table.markdown(rows, [name for name in FIELDS if name not in ("form", "source")]),
    ]
    passed = len(rows) == len(interpreted()) and all(row["status"] == "ok" for row in rows)
    if len(rows) != len(interpreted()):
        lines += ["", f"the process ended with status {done.returncode} before it was done:", done.stderr[-1000:]]
    return lines, passed


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m lstm_triton.perf.engines", description=__doc__)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: Triton's interpreter")
    found.add_argument("--list", choices=tuple(LISTS), help="which problems; as the device by default")
    found.add_argument("--out", type=Path, required=True, help="CSV file")
    found.add_argument("--minutes", type=float, help="begin no further problem after this long")
    found.add_argument("--resume", action="store_true", help="keep the rows in --out made from the same sources")
    found.add_argument("--no-ahead", action="store_true", help="compile kernels as they are launched, not before")
    return found


def main(arguments: list[str] | None = None) -> int:
    """0 if all that was met is right or refused, 1 if not, DEVICE_LOST if the device went away."""
    options = parser().parse_args(arguments)
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser().error("--device cpu needs TRITON_INTERPRET=1 in the environment")
    if options.device == "cpu":
        take_shortcuts()
    if options.device == "cuda":
        import torch

        torch.set_num_threads(1)  # enough for the oracle; the other cores compile
    rows = table.Rows(options.out, FIELDS, resume=options.resume)
    problems = LISTS[options.list or ("all" if options.device == "cuda" else "interpreted")]()
    source = environment.source_hash()
    early = options.device == "cuda" and not options.no_ahead
    if not run(problems, options.device, rows, source, options.minutes, early=early):
        return DEVICE_LOST
    mine = [row for row in rows.rows if row["source"] == source]
    return 1 if any(row["status"] in FAULTY for row in mine) else 0


if __name__ == "__main__":
    raise SystemExit(main())
