"""What the compiler made of each plan's kernels, for any GPU, none needed: registers, spills, the budget of a step.

Exits with status 1 if a kernel spills, needs more shared memory than the target has, breaks the order of publish and
wait, or with --baseline is worse than it was. Instructions are those that one warp executes in one time step; cycles
are an estimate (`budget`).
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterable
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lstm_triton.planner import ENGINES

from . import baseline, environment, sass, table
from .budget import budget
from .cases import CELLS, DTYPES
from .options import choose, numbers, split, target
from .precompile import identity, pool
from .ptx import products_per_tile, ptx_order

if TYPE_CHECKING:
    from lstm_triton.plans import KernelPlan, LaunchPlan

#: "forward" is the one of training, "inference" the same without what backward needs.
DIRECTIONS = ("forward", "backward", "inference")
#: What each kernel's programs publish to one another, as far as it is there; instead of h, h times dropout's masks.
PUBLISHED = {name: ("h_ptr", "r_ptr", "drop_ptr", "sums_ptr") for name in ("forward", "inference")}
PUBLISHED["backward"] = ("slots_ptr", "dh_all_ptr", "sums_ptr")
#: What each program stores to and loads from for itself alone.
OWN = {name: ("gates_ptr", "state_ptr") for name in ("forward", "inference")}
OWN["backward"] = ("dh_ptr", "dstate_ptr", "dparams_ptr")
#: Nominal; the kernels are the same for every length.
SEQ = 512


@dataclass(frozen=True)
class Row:
    """One kernel: what it is, what it takes, and what one step of it is made of."""

    target: str
    cell: str
    direction: str
    dtype: str
    hidden: int
    batch: int
    engine: str
    block_b: int
    block_h: int
    tiles: int
    block_k: int
    split_k: int
    ahead: int
    stages: int
    warps: int
    grid: int
    shared_plan: int  # the plan's estimate
    registers: int = 0
    spill_bytes: int = 0  # stack a thread
    shared_bytes: int = 0
    counted: str = ""  # "time step"; "launch", where a step is one; "whole kernel" where the compiler left no loop
    k_trips: int = 0  # of the loop over K tiles as compiled, 0 where none is left
    all: int = 0
    BAR: int = 0
    WAIT: int = 0
    SHFL: int = 0
    LDS: int = 0
    STS: int = 0
    LDSM: int = 0
    MMA: int = 0
    TMEM: int = 0
    LDG: int = 0
    STG: int = 0
    ATOM: int = 0
    LDL: int = 0
    MUFU: int = 0
    CVT: int = 0
    MOVE: int = 0
    FP: int = 0
    PRED: int = 0
    INT: int = 0
    BRA: int = 0
    OTHER: int = 0
    est_cycles: int = 0
    problems: str = ""


COLUMNS = tuple(field.name for field in fields(Row))
#: The CSV has all columns; the table on the screen and in Markdown has these, and `problems` where there are any.
SHOWN = (
    *("target", "cell", "direction", "dtype", "hidden", "batch", "engine", "tile", "warps", "grid"),
    *("registers", "spill_bytes", "shared_bytes", "all", "BAR", "MMA", "LDSM", "LDS", "STS", "LDG", "STG", "MUFU"),
    *("FP", "INT", "est_cycles"),
)
NOTE = (
    "Instructions of one warp in one time step (of engine step: one launch), waiting loops once: all of them, and some "
    "classes; the CSV has every class. est_cycles is an estimate for a program alone on its SM, and no measurement."
)


def planned(plan: LaunchPlan, direction: str) -> Row:
    """What is known of a kernel before it is compiled."""
    kernel = _kernel(plan, direction)
    return Row(
        target=plan.device.name,
        cell=plan.spec.cell,
        direction=direction,
        dtype=_dtype_name(plan),
        hidden=plan.H,
        batch=plan.B,
        engine=kernel.engine,
        block_b=kernel.block_b,
        block_h=kernel.block_h,
        tiles=kernel.tiles,
        block_k=kernel.block_k,
        split_k=kernel.split_k,
        ahead=kernel.ahead,
        stages=kernel.stages,
        warps=kernel.num_warps,
        grid=kernel.grid,
        shared_plan=kernel.shared_bytes,
    )


def inspect(compiled: Any, plan: LaunchPlan, direction: str) -> Row:
    """Read one compiled kernel (of `launch.compile_ahead`); `problems` is empty if nothing is wrong with it."""
    kernel = _kernel(plan, direction)
    code = sass.read_cubin(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    depth = plan.H * (plan.spec.gates if direction == "backward" else 1)
    step = budget(
        code,
        launched=kernel.engine == "step",
        k_tiles=-(-depth // kernel.block_k),
        products_per_tile=0 if kernel.resident else products_per_tile(compiled.asm["ptx"]),
        warps=kernel.num_warps,
        capability=plan.device.capability,
    )
    problems = []
    if code.stack_bytes:
        problems.append(f"spills {code.stack_bytes} bytes a thread")
    if shared > plan.device.shared_per_program:
        problems.append(f"needs {shared} bytes of shared memory, the target has {plan.device.shared_per_program}")
    if kernel.synchronised:
        problems += ptx_order(compiled.asm["ptx"], *pointers(compiled, direction))
    return replace(
        planned(plan, direction),
        registers=code.registers,
        spill_bytes=code.stack_bytes,
        shared_bytes=shared,
        counted=step.counted,
        k_trips=step.k_trips,
        **step.counts,
        est_cycles=step.est_cycles,
        problems="; ".join(problems),
    )


def pointers(compiled: Any, direction: str) -> tuple[set[int], set[int], dict[int, str]]:
    """Of the PTX parameters: those to what programs publish, those to what is each program's own, the names of all."""
    names = _parameters(compiled)
    own = {i for i, name in enumerate(names) if name in OWN[direction]}
    return published(compiled, direction), own, dict(enumerate(names))


def published(compiled: Any, direction: str) -> set[int]:
    """Which PTX parameters point to what programs publish."""
    names = _parameters(compiled)
    unread = ("h_ptr",) if "drop_ptr" in names else ()
    return {i for i, name in enumerate(names) if name in PUBLISHED[direction] and name not in unread}


def _parameters(compiled: Any) -> list[str]:
    """Arguments that are constexpr, or None, are no parameters."""
    return [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lists = "comma-separated"
    parser.add_argument(
        "--target", default="sm_80,sm_90,sm_100", help=f"{lists}: sm_80, sm_90, sm_100, A100, H200, ..."
    )
    parser.add_argument("--cells", default="lstm,gru,rnn", help=f"{lists}: lstm, gru, rnn")
    parser.add_argument("--dtype", default="bf16,fp16,tf32,fp32", help=f"{lists}: fp16, bf16, tf32, fp32, fp64")
    parser.add_argument("--hidden", default="64,128,256,512,768,1024,1536,2048", help=f"{lists} hidden sizes")
    parser.add_argument("--batch", default="1,16,64,256", help=f"{lists} batch sizes")
    parser.add_argument("--engine", default="auto", help=f"{lists}: auto, {', '.join(ENGINES)}; default auto")
    parser.add_argument("--direction", default="forward,backward", help=f"{lists}: {', '.join(DIRECTIONS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default: all cores)")
    parser.add_argument(
        "--variants",
        action="store_true",
        help="not this grid, but each option of each cell beside the plain cell: variants.csv; of the other arguments "
        "only --jobs and --out count",
    )
    parser.add_argument("--baseline", type=Path, help="resources.csv to compare with; status 1 where a row got worse")
    parser.add_argument("--out", type=Path, default=Path("results/resources"), help="folder for CSV and Markdown")


def main(options: argparse.Namespace) -> int:
    """Compile, print the table, write it; 1 if any kernel has a problem, cannot be compiled or got worse."""
    if options.variants:
        from . import variants

        return variants.main(options)
    before = _baseline(options)
    wanted, refused = plans(options)
    for line in refused:
        print(line)
    jobs = deduplicate(wanted)
    print(f"{len(wanted)} kernels in the grid, {len(jobs)} different ones to compile", flush=True)
    path = options.out / "resources.csv"
    rows = table.Rows(path, COLUMNS)
    broken = []
    for results in table.progress(compile_all(list(jobs.values()), options.jobs), len(jobs), "compiled"):
        if isinstance(results, str):
            broken.append(results)
        else:
            rows.add(*(asdict(row) for row in results))
    found = sorted(rows.rows, key=lambda row: [int(v) if v.isdigit() else v for v in (row[name] for name in COLUMNS)])
    table.Rows(path, COLUMNS).add(*found)  # in the grid's order, whichever was compiled first
    environment.write(baseline.compiler(), options.out)
    text = markdown(found)
    (options.out / "resources.md").write_text(f"{NOTE}\n\n{text}\n")
    print(f"{text}\n{NOTE}")
    bad = [row for row in found if row["problems"]]
    for line in broken:
        print(f"FAILED to compile: {line}")
    print(f"{len(found)} kernels: {len(bad)} with problems, {len(broken)} not compiled")
    worse = before.report(found) if before else False
    return 1 if bad or broken or worse or not found else 0


def _baseline(options: argparse.Namespace) -> baseline.Baseline | None:
    """The table to compare with, if one is asked for; a message and exit status 2 for what is none."""
    if options.baseline is None:
        return None
    if options.engine != "auto":
        print(f"--engine: expected auto beside --baseline, which holds the planner's choices, got {options.engine!r}")
        raise SystemExit(2)
    try:
        return baseline.read(options.baseline)
    except (OSError, ValueError) as error:
        print(f"--baseline: {error}")
        raise SystemExit(2) from None


def markdown(rows: list[dict[str, str]]) -> str:
    """The table that people read."""
    shown = [*SHOWN, *["problems"] * any(row["problems"] for row in rows)]
    tiles = ({"tile": f"{row['block_b']}x{int(row['block_h']) * int(row['tiles'])}"} for row in rows)
    return table.markdown([row | tile for row, tile in zip(rows, tiles, strict=True)], shown)


Job = tuple["LaunchPlan", str]


def plans(options: argparse.Namespace) -> tuple[list[Job], list[str]]:
    """Every plan and direction of the grid, and a line for each that the planner refuses."""
    from lstm_triton.planner import make_plan
    from lstm_triton.spec import CellSpec

    targets = [target("target", name) for name in split(options.target)]
    directions = choose("direction", options.direction, DIRECTIONS)
    found: list[Job] = []
    refused = []
    for device, cell, dtype, hidden, batch, engine in itertools.product(
        targets,
        choose("cells", options.cells, CELLS),
        choose("dtype", options.dtype, DTYPES),
        numbers("hidden", options.hidden),
        numbers("batch", options.batch),
        choose("engine", options.engine, ("auto", *ENGINES)),
    ):
        precision = "ieee" if dtype in ("fp32", "fp64") else "tf32"
        try:
            spec, storage = CellSpec(cell), DTYPES[dtype]
            plan = make_plan(spec, SEQ, batch, hidden, storage, device, engine=engine, precision=precision)
        except ValueError as error:
            refused.append(f"no plan for {device.name} {cell} {dtype} H={hidden} B={batch} {engine}: {error}")
            continue
        found += [(plan, direction) for direction in directions]
    return found, refused


def _kernel(plan: LaunchPlan, direction: str) -> KernelPlan:
    return plan.backward if direction == "backward" else plan.forward


def deduplicate(wanted: Iterable[Job]) -> dict[object, list[Job]]:
    """Jobs by the kernel they need."""
    found: dict[object, list[Job]] = {}
    for plan, direction in wanted:
        found.setdefault((direction, identity(plan, _kernel(plan, direction))), []).append((plan, direction))
    return found


def compile_all(groups: list[list[Job]], jobs: int) -> Iterable[list[Row] | str]:
    """Compile one job of each group on a pool of processes; the rows of the whole group, or what went wrong."""
    with pool(jobs) as processes:
        for future in as_completed([processes.submit(compile_group, group) for group in groups]):
            yield future.result()


def compile_group(group: list[Job]) -> list[Row] | str:
    """The rows of plans that share one kernel, or what went wrong with it."""
    from lstm_triton.launch import compile_ahead

    plan, direction = group[0]
    try:
        training = direction != "inference"
        compiled = compile_ahead(plan, "backward" if direction == "backward" else "forward", training=training)
        row = inspect(compiled, plan, direction)
    except Exception as error:
        what = f"{plan.device.name} {plan.spec.cell} {plan.dtype} H={plan.H} B={plan.B} {direction}"
        return f"{what}: {type(error).__name__}: {error}"
    return [_of_plan(row, *job) for job in group]


def _of_plan(row: Row, plan: LaunchPlan, direction: str) -> Row:
    """The row of another plan that needs the same kernel."""
    known = planned(plan, direction)
    return replace(row, **{name: getattr(known, name) for name in (*baseline.KEY, *baseline.PLANNED)})


def _dtype_name(plan: LaunchPlan) -> str:
    name = {"float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(str(plan.dtype).removeprefix("torch."))
    return name or ("fp32" if plan.precision == "ieee" else "tf32")
