"""What each option of a cell takes beside the plain cell, as compiled: registers, and instructions of one time step.

`python -m lstm_triton.perf resources --variants`. Like for like: one option at a time, both kernels on the engine and
tile of the plain cell's plan or, where the option cannot run there, of its own. Exits with status 1 if a kernel has a
problem, as `resources` says, or takes more than LIMIT percent and nothing here tells why.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lstm_triton.spec import ACTIVATIONS, GATES, CellSpec

from . import baseline, environment, resources, table
from .cases import CELLS, DTYPES
from .options import target
from .precompile import pool

if TYPE_CHECKING:
    from lstm_triton.plans import LaunchPlan

#: Percent of the plain cell's instructions above which a row says why.
LIMIT = 10.0
TARGET, DTYPE = "sm_90", "bf16"
#: H and B: of programs that wait for one another, with W_hh on chip; and of one that has all units.
SHAPES = ((512, 64), (64, 64))
DIRECTIONS = ("forward", "backward")
#: What some activations take more than tanh does.
COSTLY = {"elu": "exp(x) - 1 without its cancellation is a quotient", "softplus": "a logarithm and two quotients"}


class Variant(NamedTuple):
    """One option."""

    name: str
    spec: CellSpec
    masks: int = 0  # of recurrent dropout
    random: bool = False  # zoneout draws


class Job(NamedTuple):
    """One kernel."""

    variant: Variant
    direction: str
    hidden: int
    batch: int


@dataclass(frozen=True)
class Row:
    """One kernel with an option, and what of the plain cell's it is compared with."""

    target: str
    dtype: str
    hidden: int
    batch: int
    cell: str
    variant: str
    direction: str
    engine: str
    block_b: int
    block_h: int
    tiles: int
    warps: int
    plain_warps: int
    registers: int
    plain_registers: int
    spill_bytes: int
    shared_bytes: int
    plain_shared: int
    BAR: int
    plain_BAR: int
    all: int  # instructions of one warp in one time step
    plain_all: int
    more: float  # percent, of all warps together
    remark: str  # why, where it is more than LIMIT
    problems: str


COLUMNS = tuple(field.name for field in fields(Row))
KEY = COLUMNS[: COLUMNS.index("engine")]
#: Of the table that people read; and `problems` where there are any.
SHOWN = (
    *("cell", "variant", "direction", "hidden", "engine", "tile", "warps", "plain_warps", "registers"),
    *("plain_registers", "spill_bytes", "shared_bytes", "BAR", "plain_BAR", "all", "plain_all", "more", "remark"),
)
NOTE = (
    f"Each option alone beside the plain cell on the same engine and tile, {TARGET}, {DTYPE}, batch "
    f"{' and '.join(sorted({str(batch) for _, batch in SHAPES}))}: `all` and `plain_all` are the instructions of one "
    f"warp in one time step, `more` how many percent the option adds to those of all warps, and why where that is "
    f"above {LIMIT:.0f}. Counted in what was compiled; nothing was timed."
)


def variants(cell: str, hidden: int) -> Iterator[Variant]:
    """Every option of a cell, alone."""
    plain, gates = CellSpec(cell), len(GATES[cell])
    if cell == "lstm":
        yield Variant("peephole", replace(plain, peephole=True))
        yield Variant("coupled", replace(plain, coupled=True))
        yield Variant("cell_clip", replace(plain, cell_clip=3.0))
        yield Variant("projection", replace(plain, proj=hidden // 2))
        yield Variant("output_activation=sigmoid", replace(plain, output_activation="sigmoid"))
    if cell == "gru":
        yield Variant("reset_after=False", replace(plain, reset_after=False))
    yield Variant("gate_clip", replace(plain, gate_clip=5.0))
    for name in ACTIVATIONS:
        if name != "tanh":
            yield Variant(f"activation={name}", replace(plain, activation=name))
    if gates > 1:
        yield Variant("recurrent_activation=hard_sigmoid", replace(plain, recurrent_activation="hard_sigmoid"))
    zoned = replace(plain, zoneout=(0.1, 0.1 if cell == "lstm" else 0.0))
    yield Variant("zoneout, expectation", zoned)
    yield Variant("zoneout, random", zoned, random=True)
    yield Variant("recurrent dropout, shared mask", plain, masks=1)
    if gates > 1:
        yield Variant("recurrent dropout, mask per gate", plain, masks=gates)
    yield Variant("layer_norm", replace(plain, layer_norm=True))


def jobs() -> list[Job]:
    """All of the table, in its order."""
    return [
        Job(variant, direction, hidden, batch)
        for hidden, batch in SHAPES
        for cell in CELLS
        for variant in variants(cell, hidden)
        for direction in DIRECTIONS
    ]


def key(job: Job) -> dict[str, str]:
    """What a job's row is about, as the table has it."""
    spec = job.variant.spec
    found = target("target", TARGET).name, DTYPE, job.hidden, job.batch, spec.cell, job.variant.name, job.direction
    return dict(zip(KEY, map(str, found), strict=True))


def plans(job: Job) -> tuple[LaunchPlan, LaunchPlan]:
    """The plan with the option and the plain one, on the same engine and tile."""
    from lstm_triton.planner import make_plan

    spec, device = job.variant.spec, target("target", TARGET)
    problem = resources.SEQ, job.batch, job.hidden, DTYPES[DTYPE], device
    plain = CellSpec(spec.cell)
    held = _held(make_plan(plain, *problem), job.direction)
    try:
        found = make_plan(spec, *problem, masks=job.variant.masks, **held)
    except ValueError:
        held = _held(make_plan(spec, *problem, masks=job.variant.masks), job.direction)
        found = make_plan(spec, *problem, masks=job.variant.masks, **held)
    return found, make_plan(plain, *problem, **held)


def _held(plan: LaunchPlan, direction: str) -> dict[str, object]:
    kernel = getattr(plan, direction)
    return {"engine": kernel.engine, "tile": (kernel.block_b, kernel.block_h)}


def measure(job: Job) -> Row | str:
    """The row of one kernel, or what went wrong."""
    try:
        with_option, plain = plans(job)
        found = _compiled(with_option, job.direction, job.variant.random)
        beside = _compiled(plain, job.direction, False)
    except Exception as error:
        return f"{' '.join(key(job).values())}: {type(error).__name__}: {error}"
    more = round((found.all * found.warps / (beside.all * beside.warps) - 1) * 100, 1)
    told = list(reasons(job.variant, job.direction, found.engine))
    if found.warps > beside.warps:
        told.append(f"{found.warps} warps instead of {beside.warps}, for their registers, share less of the work")
    return Row(
        target=found.target,
        dtype=DTYPE,
        hidden=job.hidden,
        batch=job.batch,
        cell=found.cell,
        variant=job.variant.name,
        direction=job.direction,
        engine=found.engine,
        block_b=found.block_b,
        block_h=found.block_h,
        tiles=found.tiles,
        warps=found.warps,
        plain_warps=beside.warps,
        registers=found.registers,
        plain_registers=beside.registers,
        spill_bytes=found.spill_bytes,
        shared_bytes=found.shared_bytes,
        plain_shared=beside.shared_bytes,
        BAR=found.BAR,
        plain_BAR=beside.BAR,
        all=found.all,
        plain_all=beside.all,
        more=more,
        remark="; ".join(told) if more > LIMIT else "",
        problems=found.problems,
    )


@lru_cache(maxsize=64)
def _compiled(plan: LaunchPlan, direction: str, random: bool) -> resources.Row:
    from lstm_triton.launch import compile_ahead

    return resources.inspect(compile_ahead(plan, direction, random=random), plan, direction)


def reasons(variant: Variant, direction: str, engine: str) -> Iterator[str]:
    """Why an option may take more than LIMIT percent."""
    spec, backward = variant.spec, direction == "backward"
    alone = engine == "local"
    if variant.random:
        yield "Philox, ten rounds for every unit and row"
    if variant.masks > 1:
        yield f"{variant.masks} products, each gate's of rows of its own"
    if spec.two_products:
        yield "a second product" + ("" if alone else " and a wait before it")
    if spec.layer_norm:
        times = "twice" if spec.cell == "lstm" else "once"
        yield "each row's sums, between the warps" if alone else f"each row's sums go round the group, {times} a step"
    if backward and spec.keeps_preactivations:
        yield "gates whose value does not tell the derivative are activated again"
    if not backward and spec.activation in COSTLY:
        yield COSTLY[spec.activation]
    if not backward and spec.cell == "rnn" and (spec.gate_clip or any(spec.zoneout) or spec.keeps_preactivations):
        yield "the gate is kept too, which the plain rnn's h tells"
    if spec.gate_clip:
        yield "every gate is compared with both bounds" + (", and opened again" if backward else "")
    if backward and spec.peephole:
        yield "gradients by the peepholes are summed over time"


def main(options: argparse.Namespace) -> int:
    """Compile, print the table, write it; 1 for a problem, a kernel that cannot be compiled or is large unexplained."""
    todo = jobs()
    rows: dict[Job, Row] = {}
    broken = []
    for job, found in table.progress(measure_all(todo, options.jobs), len(todo), "compiled"):
        if isinstance(found, str):
            broken.append(found)
        else:
            rows[job] = found
    ordered = [rows[job] for job in todo if job in rows]
    path = options.out / "variants.csv"
    table.Rows(path, COLUMNS).add(*(asdict(row) for row in ordered))
    environment.write(baseline.compiler(), options.out)
    text = markdown(table.read(path, COLUMNS))
    (options.out / "variants.md").write_text(f"{NOTE}\n\n{text}\n")
    print(f"{text}\n{NOTE}")
    bad = [row for row in ordered if row.problems]
    untold = [row for row in ordered if row.more > LIMIT and not row.remark]
    for line in broken:
        print(f"FAILED to compile: {line}")
    for row in untold:
        print(f"UNEXPLAINED: {row.cell} {row.variant} {row.direction} H={row.hidden}: {row.more} % more instructions")
    print(f"{len(ordered)} kernels: {len(bad)} with problems, {len(broken)} not compiled, {len(untold)} unexplained")
    return 1 if bad or broken or untold else 0


def measure_all(todo: list[Job], processes: int) -> Iterable[tuple[Job, Row | str]]:
    """Each job's row, or what went wrong, as they come."""
    with pool(processes) as workers:
        begun = {workers.submit(measure, job): job for job in todo}
        for future in as_completed(begun):
            yield begun[future], future.result()


def markdown(rows: list[dict[str, str]]) -> str:
    """The table that people read."""
    shown = [*SHOWN, *["problems"] * any(row["problems"] for row in rows)]
    return table.markdown(
        [row | {"tile": f"{row['block_b']}x{int(row['block_h']) * int(row['tiles'])}"} for row in rows], shown
    )
