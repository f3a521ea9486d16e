"""What the compiler made of each plan's kernels, for any GPU, none needed: registers, spills, instructions.

Exits with status 1 if a kernel spills, needs more shared memory than the target has, or breaks the order of publish and
wait. Instruction counts are of the time loop, static: each once, those of nested loops not multiplied by their trips.
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

from . import sass, table
from .numerics import CELLS, ENGINES
from .options import choose, numbers, split
from .precompile import identity, pool
from .providers import DTYPES
from .ptx import ptx_order

if TYPE_CHECKING:
    from lstm_triton.planner import KernelPlan, LaunchPlan

#: "forward" is the one of training, "inference" the same without what backward needs.
DIRECTIONS = ("forward", "backward", "inference")
#: What each kernel's programs publish to one another.
PUBLISHED = {"forward": "y_ptr", "backward": "slots_ptr", "inference": "y_ptr"}
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
    stages: int
    warps: int
    grid: int
    registers: int
    spill_bytes: int  # stack a thread
    shared_bytes: int
    shared_plan: int  # the plan's estimate
    counted: str  # "time loop", or "whole kernel" where the compiler left no loop
    all: int
    BAR: int
    SHFL: int
    LDS: int
    LDSM: int
    MMA: int
    LDG: int
    STG: int
    ATOM: int
    MUFU: int
    problems: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


def inspect(compiled: Any, plan: LaunchPlan, direction: str) -> Row:
    """Read one compiled kernel (of `launch.compile_ahead`); `problems` is empty if nothing is wrong with it."""
    kernel = _kernel(plan, direction)
    code = sass.read_cubin(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    problems = []
    if code.stack_bytes:
        problems.append(f"spills {code.stack_bytes} bytes a thread")
    if shared > plan.device.shared_per_program:
        problems.append(f"needs {shared} bytes of shared memory, the target has {plan.device.shared_per_program}")
    if kernel.synchronised:
        problems += ptx_order(compiled.asm["ptx"], {parameter_index(compiled, PUBLISHED[direction])})
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
        stages=kernel.stages,
        warps=kernel.num_warps,
        grid=kernel.grid,
        registers=code.registers,
        spill_bytes=code.stack_bytes,
        shared_bytes=shared,
        shared_plan=kernel.shared_bytes,
        counted="time loop" if code.in_time_loop else "whole kernel",
        **code.counts,
        problems="; ".join(problems),
    )


def parameter_index(compiled: Any, name: str) -> int:
    """Which PTX parameter a kernel's argument became: constexpr ones, and those given as None, are no parameters."""
    names = [key for key, kind in compiled.src.signature.items() if kind != "constexpr"]
    return names.index(name)


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
    parser.add_argument("--out", type=Path, default=Path("results/resources"), help="folder for CSV and Markdown")


def main(options: argparse.Namespace) -> int:
    """Compile, print the table, write it; 1 if any kernel has a problem or cannot be compiled."""
    wanted, refused = plans(options)
    for line in refused:
        print(line)
    jobs = deduplicate(wanted)
    print(f"{len(wanted)} kernels in the grid, {len(jobs)} different ones to compile", flush=True)
    rows = table.Rows(options.out / "resources.csv", COLUMNS)
    broken = []
    for results in table.progress(compile_all(list(jobs.values()), options.jobs), len(jobs), "compiled"):
        if isinstance(results, str):
            broken.append(results)
        else:
            rows.add(*(asdict(row) for row in results))
    rows.rows.sort(key=lambda row: [int(v) if v.isdigit() else v for v in (row[name] for name in COLUMNS[:7])])
    shown = [name for name in COLUMNS if name != "problems" or any(row["problems"] for row in rows.rows)]
    text = table.markdown(rows.rows, shown)
    (options.out / "resources.md").write_text(text + "\n")
    print(text)
    print(f"Instructions are counted once each, nested loops (over K, the spin) included: {', '.join(sass.MIX)}.")
    bad = [row for row in rows.rows if row["problems"]]
    for line in broken:
        print(f"FAILED to compile: {line}")
    print(f"{len(rows.rows)} kernels: {len(bad)} with problems, {len(broken)} not compiled")
    return 1 if bad or broken or not rows.rows else 0


Job = tuple["LaunchPlan", str]


def plans(options: argparse.Namespace) -> tuple[list[Job], list[str]]:
    """Every plan and direction of the grid, and a line for each that the planner refuses."""
    from lstm_triton.devices import device_named
    from lstm_triton.planner import make_plan
    from lstm_triton.spec import CellSpec

    targets = [device_named(name) for name in split(options.target)]
    directions = choose("direction", options.direction, DIRECTIONS)
    found: list[Job] = []
    refused = []
    for target, cell, dtype, hidden, batch, engine in itertools.product(
        targets,
        choose("cells", options.cells, CELLS),
        choose("dtype", options.dtype, DTYPES),
        numbers("hidden", options.hidden),
        numbers("batch", options.batch),
        choose("engine", options.engine, ("auto", *ENGINES)),
    ):
        precision = "ieee" if dtype in ("fp32", "fp64") else "tf32"
        try:
            plan = make_plan(
                CellSpec(cell),
                SEQ,
                batch,
                hidden,
                DTYPES[dtype],
                target,
                engine=engine,
                precision=precision,
            )
        except ValueError as error:
            refused.append(f"no plan for {target.name} {cell} {dtype} H={hidden} B={batch} {engine}: {error}")
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
    kernels = [(other, _kernel(other, direction)) for other, _ in group]
    return [replace(row, target=other.device.name, batch=other.B, grid=kernel.grid) for other, kernel in kernels]


def _dtype_name(plan: LaunchPlan) -> str:
    name = {"float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(str(plan.dtype).removeprefix("torch."))
    return name or ("fp32" if plan.precision == "ieee" else "tf32")
