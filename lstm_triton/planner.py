"""(spec, shape, dtype, device) -> a frozen LaunchPlan, by a model of one time step. The only place with tile numbers.

The model is a floor, not a measurement: what a step must at least wait for, read, multiply and store. It ranks the
schedules; the constants it needs are in tuned/*.json, one file for each GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import torch

from . import costs, tuning
from .devices import INTERPRETER, Device
from .plans import KernelPlan, LaunchPlan
from .spec import CellSpec

ENGINES = ("local", "resident", "streamed", "step")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DIRECTIONS = ("forward", "backward")

#: Waiting programs are counted, all of a group at every step, in less than 2^30 (kernels/sync.py).
MAX_COUNTED_STEPS = 1 << 20
MAX_COUNTED_PROGRAMS = 1 << 10

#: K tiles of h or da on their way at any time, where the weights are on chip.
AHEAD = 3

#: A local program's tiles of hidden units: its product is unrolled over their square.
MAX_LOCAL_TILES = 8


def make_plan(
    spec: CellSpec,
    T: int,
    B: int,
    H: int,
    dtype: torch.dtype,
    device: Device,
    *,
    engine: str = "auto",
    tile: tuple[int, int] | None = None,
    precision: str = "tf32",
    masks: int = 0,
) -> LaunchPlan:
    """The cheapest schedule under the model. ValueError, saying why, where `engine` or `tile` cannot run the problem.

    masks: by how many h[t-1] is multiplied before W_hh is, none, one, or one a gate.

    T does not enter the choice: a plan, and so a compiled kernel, serves every length (that can be counted).
    """
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"engine must be 'auto' or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    if tile is not None:
        check_tile(tile)
        tile = tuple(tile)
    if engine == "auto" and device is INTERPRETER:
        engine = "step"
    precision = precision if dtype == torch.float32 else "ieee"
    countable = T * spec.waits <= MAX_COUNTED_STEPS
    problems = (
        KernelProblem(spec, direction, max(B, 1), H, dtype, device, precision, countable, masks)
        for direction in DIRECTIONS
    )
    tunable = tile is None and spec.plain and not spec.proj and masks < 2
    (forward, why_forward), (backward, why_backward) = (
        _choose(problem, engine, tile, tuning.lookup(device.family, problem.key) if tunable else None)
        for problem in problems
    )
    return LaunchPlan(spec, T, B, H, dtype, device, precision, forward, backward, why_forward + why_backward, masks)


def check_tile(tile: tuple[int, int]) -> None:
    """ValueError unless `tile` is a pair that the kernels can take."""
    pair = isinstance(tile, (tuple, list)) and len(tile) == 2 and all(type(n) is int and n > 0 for n in tile)
    if not pair or not (16 <= tile[0] <= 128 and 8 <= tile[1] <= 256) or any(n & (n - 1) for n in tile):
        raise ValueError(
            "tile must be (block_b, block_h), powers of two with block_b from 16 to 128 and block_h from 8 to 256, "
            f"got {tile!r}"
        )


@dataclass(frozen=True)
class KernelProblem:
    """What one kernel has to do, and where."""

    spec: CellSpec
    direction: str
    B: int
    H: int
    dtype: torch.dtype
    device: Device
    precision: str
    countable: bool  # few enough steps to be counted
    masks: int = 0  # of recurrent dropout: with one a gate, every gate has rows of its own

    @property
    def forward(self) -> bool:
        return self.direction == "forward"

    @property
    def k(self) -> int:
        """Depth of the recurrent product."""
        return self.spec.output(self.H) if self.forward else self.first_gates * self.H

    @property
    def first_gates(self) -> int:
        """Gates in the recurrent product; where the reset comes before it, n has one of its own."""
        return self.spec.gates if self.spec.reset_after else 2

    @property
    def heavy(self) -> bool:
        """The cell holds more tiles than the plain one, up to twice as many."""
        return self.spec.layer_norm or self.masks > 1

    @property
    def segment(self) -> int:
        """The run of that depth which one product goes through: with a mask for each gate, backward's are apart."""
        return self.H if self.masks > 1 and not self.forward else self.k

    @property
    def row_factor(self) -> int:
        """How often the rows of h are read: once, or for each gate."""
        return self.masks if self.forward and self.masks > 1 else 1

    @property
    def k_r(self) -> int:
        """Depth of the second product, 0 without one."""
        if not self.spec.reset_after:
            return self.H
        return (self.H if self.forward else self.spec.proj) if self.spec.proj else 0

    @property
    def columns(self) -> int:
        """Columns of the product for each hidden unit."""
        return _pow2(self.first_gates) if self.forward else 1

    @property
    def kind(self) -> str:
        """Of arithmetic: half, tf32, fp32 or fp64."""
        single = "fp32" if self.precision == "ieee" else "tf32"
        return {torch.float64: "fp64", torch.float32: single}.get(self.dtype, "half")

    @property
    def scalar(self) -> bool:
        """No matrix instructions for it there."""
        return self.kind == "fp32" or (self.kind == "fp64" and not self.device.fp64_matrix_products)

    @property
    def key(self) -> tuning.Key:
        """Under which a tuned schedule for it is kept."""
        return tuning.Key.of(self.spec.cell, self.spec.activation, self.direction, self.kind, self.H, self.B)


@dataclass(frozen=True)
class Product:
    """How the gate product of one step is walked through."""

    block_k: int
    split_k: int
    ahead: int
    stages: int
    num_warps: int


@lru_cache(maxsize=4096)
def _choose(
    problem: KernelProblem, engine: str, tile: tuple[int, int] | None, choice: tuning.Choice | None
) -> tuple[KernelPlan, tuple[str, ...]]:
    """The tuned schedule if there is one, else the cheapest candidate; and in words what became of the others."""
    notes: tuple[str, ...] = ()
    if choice is not None and engine in ("auto", choice.engine):
        plan = scheduled(problem, choice)
        if isinstance(plan, KernelPlan):
            return plan, (f"{problem.direction}, the model's choice took {choice.model_us:.2f} us a step beside it",)
        notes = (f"{problem.direction}, the tuned schedule was not taken: {plan}",)
    best: dict[str, KernelPlan] = {}
    reasons: dict[str, str] = {}
    for name in ENGINES if engine == "auto" else (engine,):
        for block_b, block_h in [tile] if tile else _tiles(name, problem.B, problem.H):
            plan = _schedule(problem, name, block_b, block_h)
            if isinstance(plan, str):
                reasons.setdefault(name, plan)
            elif name not in best or _cheaper(plan, best[name]):
                best[name] = plan
    if not best:
        what = f"{problem.spec.cell} with B={problem.B}, H={problem.H} on {problem.device.name}"
        raise ValueError(f"engine={engine!r} cannot run {what}: {reasons[name]}")
    chosen = reduce(lambda a, b: b if _cheaper(b, a) else a, best.values())
    others = [f"{name} {plan.step_us:.2f} us a step" for name, plan in best.items() if plan is not chosen]
    others += [f"{name} not possible: {reason}" for name, reason in reasons.items() if name not in best]
    if others:
        notes += (f"{problem.direction}, the other engines: {'; '.join(others)}",)
    return chosen, notes


def scheduled(problem: KernelProblem, choice: tuning.Choice) -> KernelPlan | str:
    """The plan of a tuned schedule, or in words why it cannot run."""
    product = Product(choice.block_k, choice.split_k, choice.ahead, choice.stages, choice.num_warps)
    plan = _schedule(problem, choice.engine, choice.block_b, choice.block_h, product)
    return plan if isinstance(plan, str) else replace(plan, measured_us=choice.us_per_step)


def candidates(problem: KernelProblem, near: float) -> list[KernelPlan]:
    """Every engine and tile that the model puts within a factor `near` of its best, best first: where to search."""
    found = [
        plan
        for engine in ENGINES
        for tile in _tiles(engine, problem.B, problem.H)
        if isinstance(plan := _schedule(problem, engine, *tile), KernelPlan)
    ]
    found.sort(key=lambda plan: plan.step_us)
    return [plan for plan in found if plan.step_us <= near * found[0].step_us]


def neighbours(problem: KernelProblem, plan: KernelPlan) -> list[KernelPlan]:
    """The same tile with one number of its product changed."""
    here = Product(plan.block_k, plan.split_k, plan.ahead, plan.stages, plan.num_warps)
    steps = [replace(here, num_warps=warps) for warps in (4, 8) if warps != here.num_warps]
    if plan.engine != "local":
        steps += [replace(here, block_k=k) for k in (here.block_k // 2, here.block_k * 2)]
        steps += [replace(here, split_k=k) for k in (1, 2, 4, 8) if k != here.split_k]
        if plan.resident:
            steps += [replace(here, ahead=n) for n in (here.ahead - 1, here.ahead + 1, here.ahead + 2)]
        else:
            steps += [replace(here, stages=n) for n in (here.stages - 1, here.stages + 1)]
    sound = [p for p in steps if p.block_k >= 16 * p.split_k and min(p.ahead, p.stages) > 0]
    plans = [_schedule(problem, plan.engine, plan.block_b, plan.block_h, product) for product in sound]
    return [other for other in dict.fromkeys(plans) if isinstance(other, KernelPlan) and other != plan]


def _cheaper(a: KernelPlan, b: KernelPlan) -> bool:
    """By more than rounding: of equals the first stays, whatever the last digits of the constants."""
    return a.step_us < b.step_us * (1 - 1e-5)


def _tiles(engine: str, B: int, H: int) -> Iterator[tuple[int, int]]:
    for block_b in (16, 32, 64, 128):
        if block_b > 16 and block_b >= 2 * B:
            continue  # half of the rows or more would be empty
        if block_b > 32 and engine in ("local", "resident"):
            continue  # addresses of the operands on chip would fill the registers
        for block_h in (16, 32, 64) if engine == "local" else (8, 16, 32, 64):
            if block_h < 2 * max(H, 16 if engine == "local" else 8):
                yield block_b, block_h


def _schedule(
    problem: KernelProblem, engine: str, block_b: int, block_h: int, product: Product | None = None
) -> KernelPlan | str:
    """One candidate with its cost, or in words why it cannot run."""
    B, H, k, device, itemsize = problem.B, problem.H, problem.k, problem.device, problem.dtype.itemsize
    k_r, P = problem.k_r, problem.spec.output(problem.H)
    local = engine == "local"
    n = block_h * problem.columns
    n_b = _ceil(B, block_b)
    n_h = 1 if local else _ceil(H, block_h)
    tiles = _ceil(H, block_h) if local else 1
    tiles_p = _ceil(P, block_h) if local else 1
    # Tiles of columns of the recurrent product and of the projection's.
    wide, wide_r = (tiles, tiles_p) if problem.forward else (tiles_p, tiles)
    if tiles > MAX_LOCAL_TILES:
        return f"H={H} in tiles of {block_h} is {tiles} tiles a program, more than {MAX_LOCAL_TILES}: raise block_h"
    product = product or _product(problem, engine, block_b, block_h, tiles)
    block_k, split_k, stages, num_warps = product.block_k, product.split_k, product.stages, product.num_warps
    block_k_r = block_h if local else min(block_k, max(16 * split_k, _pow2(k_r)))
    if device is not INTERPRETER:
        too_large = _registers(problem, engine, block_b, block_h, tiles, split_k, num_warps * 32)
        if too_large:
            return f"with tile {block_b}x{block_h} {too_large}"

    # Shared memory: the weights, the K tiles of the rows on their way, and what the sum over the K slices takes.
    segment = H if local and not problem.forward else problem.segment  # a run of K that K tiles do not cross
    slice_bytes = k // segment * _ceil(segment, block_k) * block_k * n * wide * itemsize
    slice_bytes += _ceil(k_r, block_k_r) * block_k_r * block_h * wide_r * itemsize
    row_tile = block_b * block_k * itemsize
    reduction = max(2 if local else 1, split_k) * block_b * n * max(itemsize, 4)
    k_tiles = max(_ceil(k, block_k), _ceil(k_r, block_k_r))
    ahead = min(product.ahead, k_tiles)
    while ahead > 1 and slice_bytes + (ahead + 1) * row_tile + 1024 > device.shared_per_program:
        ahead -= 1
    staged = 0 if local else min(ahead + 1, k_tiles) * row_tile
    shared = slice_bytes + max(staged, reduction) + 1024
    resident = engine == "resident" or (local and shared <= device.shared_per_program)
    if not resident:
        staged = 0 if local else row_tile
        shared = (2 if local else stages) * (block_k * n * itemsize + staged) + max(staged, reduction) + 1024
    if shared > device.shared_per_program:
        what = f"the slice of W_hh, {slice_bytes // 1024} KiB," if resident else "the K tiles"
        return f"with tile {block_b}x{block_h} {what} would not fit the {device.shared_per_program // 1024} KiB on chip"

    at_once = n_b
    capacity = 1 << 30 if device is INTERPRETER else device.sms * device.occupancy(num_warps, shared)
    if engine in ("resident", "streamed"):
        if not problem.countable or n_h >= MAX_COUNTED_PROGRAMS:
            return f"more than {MAX_COUNTED_STEPS} steps or {MAX_COUNTED_PROGRAMS} programs a group cannot be counted"
        if n_h > capacity:
            return f"with tile {block_b}x{block_h} a group is {n_h} programs, and only {capacity} surely run at once"
        at_once = min(n_b, capacity // n_h)
    waves = _ceil(n_b, at_once) if at_once < n_b else _ceil(n_b * n_h, capacity)
    sharing = max(1.0, min(at_once * n_h, capacity) / device.sms)  # programs that share one SM
    how = "batched" if split_k > 1 else "plain"
    step = costs.step(
        device, problem.kind, itemsize, engine,
        block_b=block_b, k=k, n=n * wide, tiles=tiles, programs=n_h, how=how, resident=resident,
    )  # fmt: skip
    if k_r:
        projection = costs.step(
            device, problem.kind, itemsize, engine,
            block_b=block_b, k=k_r, n=block_h * wide_r, tiles=0, programs=n_h, how=how, resident=resident,
        )  # fmt: skip
        step = {name: us + projection.get(name, 0.0) for name, us in step.items()}
    if "rows" in step:
        step["rows"] *= problem.row_factor
    for name in ("wait", "launch"):
        if name in step:  # of the products above, and of layer normalisation
            step[name] *= problem.spec.waits / (2 if k_r else 1)
    parts = tuple((name, us * waves * (1 if name in ("wait", "launch") else sharing)) for name, us in step.items())
    return KernelPlan(
        engine=engine,
        direction=problem.direction,
        block_b=block_b,
        block_h=block_h,
        tiles=tiles,
        tiles_p=tiles_p,
        block_k=block_k,
        block_k_r=block_k_r,
        split_k=split_k,
        ahead=ahead,
        stages=stages,
        num_warps=num_warps,
        resident=resident,
        n_b=n_b,
        n_h=n_h,
        groups_at_once=at_once,
        shared_bytes=shared,
        step_us=sum(us for _, us in parts),
        parts=parts,
    )


def _product(problem: KernelProblem, engine: str, block_b: int, block_h: int, tiles: int) -> Product:
    """How the gate product is walked through, where no search has found better.

    Chosen by reading registers, spills and instructions of the compiled kernels (python -m lstm_triton.perf resources):
    16 rows are one matrix instruction high, so a slice of K goes to each warp; from 32 rows on a plain product has no
    redundant work, but from 64 on it needs its operands streamed.
    """
    n, itemsize, shared = block_h * problem.columns, problem.dtype.itemsize, problem.device.shared_per_program
    if engine == "local":
        # Forward's product is wide enough for all warps; backward's is deep, so its K is sliced.
        split_k = 1 if problem.forward or problem.scalar else max(1, min(4, block_h // 16))
        return Product(block_h, split_k, AHEAD, 1, 8 if problem.heavy or block_b * block_h * tiles > 1024 else 4)
    if problem.scalar:  # FMA on operands in registers, and a short K tile, since it is unrolled
        return Product(32 if problem.segment >= 32 else 16, 1, AHEAD, 2, 8 if block_b * n * itemsize > 2048 else 4)
    if block_b == 16:
        block_k, split_k, num_warps = 1024 // itemsize, 4, 4
    elif block_b == 32 and n < 32:
        block_k, split_k, num_warps = 1024 // itemsize, 4, 8
    else:
        block_k, split_k, num_warps = 128 // itemsize if block_b > 32 else 256 // itemsize, 1, 8
    if problem.k_r and engine == "resident" and split_k > 1:
        block_k //= 2  # the addresses of two products leave fewer registers for their tiles
    block_k = min(block_k, max(16, _pow2(problem.segment)))
    stages = 3 if shared > 128 << 10 else 2
    if engine != "resident":
        while stages * block_k * (n + block_b) * itemsize > shared // 2 and block_k > 64:
            block_k //= 2
    return Product(block_k, min(split_k, max(1, block_k // 16)), AHEAD, stages, num_warps)


def _registers(
    problem: KernelProblem, engine: str, block_b: int, block_h: int, tiles: int, split_k: int, threads: int
) -> str:
    """What would not fit the registers, by the same reading; empty where all does."""
    kind, scalar = problem.kind, problem.scalar
    narrow = kind != "half" if engine == "local" else split_k > 1 or kind == "fp64"
    norm = problem.spec.layer_norm
    held = 4 if narrow or norm else 8  # of each of the cell's tiles, values in a thread
    if block_b * block_h * tiles > threads * held:
        return "the cell's tiles would not fit the registers"
    if norm and engine == "local" and block_h < 32:
        return "what is normalised would not fit the registers in tiles of less than 32 units"
    if scalar and (engine == "resident" or (engine == "local" and problem.H > 32)):
        return (
            f"{kind} products are scalar, and unrolled would not fit the registers: allow TF32, or stream the weights"
        )
    two_products = problem.k_r and engine == "resident"
    if two_products and (kind == "fp64" or block_b * block_h * problem.columns > (1024 if problem.forward else 512)):
        return "the operands of two products would not fit the registers"
    if scalar and block_b * block_h * problem.columns > threads * (2 if kind == "fp64" else 4):
        return f"the scalar {kind} products would not fit the registers"
    return ""


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pow2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
