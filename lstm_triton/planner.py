"""(spec, shape, dtype, device) -> a frozen LaunchPlan, by a model of one time step. The only place with tile numbers.

The model is a floor, not a measurement: what a step must at least wait for, read, multiply and store. It ranks the
schedules; the constants it needs are in tuned/*.json, one file for each GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from .devices import INTERPRETER, Device
from .spec import CellSpec

ENGINES = ("local", "resident", "streamed", "step")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DIRECTIONS = ("forward", "backward")

#: Waiting programs are counted, all of a group at every step, in less than 2^30 (kernels/sync.py).
MAX_COUNTED_STEPS = 1 << 20
MAX_COUNTED_PROGRAMS = 1 << 10

#: A local program's tiles of hidden units: its product is unrolled over their square.
MAX_LOCAL_TILES = 8


@dataclass(frozen=True)
class KernelPlan:
    """One of the two kernels, scheduled."""

    engine: str
    direction: str  # "forward" or "backward"
    block_b: int  # rows of the batch a program owns
    block_h: int  # hidden units a tile
    tiles: int  # tiles a program owns; more than one in local alone
    block_k: int  # K tile of the recurrent product
    split_k: int  # slices of a K tile, one on each warp or pair of warps
    ahead: int  # K tiles of h or da loaded ahead of their product, where the weights are resident
    stages: int  # software pipeline of the K loop, where the weights are read at every step
    num_warps: int
    resident: bool  # W_hh is loaded once
    n_b: int  # groups: ceil(B / block_b)
    n_h: int  # programs a group
    groups_at_once: int  # groups of one launch; n_b, unless waiting programs must all fit on the GPU
    shared_bytes: int  # upper estimate
    step_us: float  # the model's estimate for one time step
    parts: tuple[tuple[str, float], ...]  # of step_us, by cause

    @property
    def grid(self) -> int:
        """Programs of one launch."""
        return self.groups_at_once * self.n_h

    @property
    def synchronised(self) -> bool:
        """Programs wait for one another, so all of a launch must be on the GPU at once."""
        return self.engine in ("resident", "streamed")


@dataclass(frozen=True)
class LaunchPlan:
    """How one layer and direction would run: the forward kernel, the backward kernel, and why."""

    spec: CellSpec
    T: int
    B: int
    H: int
    dtype: torch.dtype
    device: Device
    precision: str  # of fp32 products: "tf32" or "ieee"
    forward: KernelPlan
    backward: KernelPlan
    others: tuple[str, ...]  # what else was considered, in words

    @property
    def engine(self) -> str:
        return self.forward.engine

    @property
    def label(self) -> str:
        """Short: engine and tile of both kernels."""
        return " / ".join(f"{k.engine} {k.block_b}x{k.block_h * k.tiles}" for k in (self.forward, self.backward))

    def explain(self) -> str:
        """In words: what runs, what the model makes of it, and why not another engine."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            dtype += f" ({self.precision} products)"
        lines = [f"{self.spec.cell}, T={self.T}, B={self.B}, H={self.H}, {dtype} on {self.device.name}"]
        for kernel in (self.forward, self.backward):
            where = "on chip for the whole sequence" if kernel.resident else "read again at every step"
            parts = " + ".join(f"{us:.2f} {name}" for name, us in kernel.parts)
            lines += [
                f"{kernel.direction}: {kernel.engine}, {kernel.n_b} group(s) of {kernel.n_h} program(s), "
                f"{kernel.groups_at_once} group(s) a launch, {kernel.num_warps} warps a program",
                f"  a program owns {kernel.block_b} rows x {kernel.block_h * kernel.tiles} hidden units; "
                f"its part of W_hh is {where}",
                f"  product in K tiles of {kernel.block_k}, {kernel.split_k} slice(s) each; "
                f"at most {kernel.shared_bytes / 1024:.0f} KiB of shared memory",
                f"  estimated {kernel.step_us:.2f} us a step by the model, not measured: {parts}",
            ]
        return "\n".join([*lines, *self.others])


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
) -> LaunchPlan:
    """The cheapest schedule under the model. ValueError, saying why, where `engine` or `tile` cannot run the problem.

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
    countable = T <= MAX_COUNTED_STEPS
    (forward, why_forward), (backward, why_backward) = (
        _choose(_Problem(spec, direction, max(B, 1), H, dtype, device, precision, countable), engine, tile)
        for direction in DIRECTIONS
    )
    return LaunchPlan(spec, T, B, H, dtype, device, precision, forward, backward, why_forward + why_backward)


def check_tile(tile: tuple[int, int]) -> None:
    """ValueError unless `tile` is a pair that the kernels can take."""
    pair = isinstance(tile, (tuple, list)) and len(tile) == 2 and all(type(n) is int and n > 0 for n in tile)
    if not pair or not (16 <= tile[0] <= 128 and 8 <= tile[1] <= 256) or any(n & (n - 1) for n in tile):
        raise ValueError(
            "tile must be (block_b, block_h), powers of two with block_b from 16 to 128 and block_h from 8 to 256, "
            f"got {tile!r}"
        )


@dataclass(frozen=True)
class _Problem:
    """What one kernel has to do, and where."""

    spec: CellSpec
    direction: str
    B: int
    H: int
    dtype: torch.dtype
    device: Device
    precision: str
    countable: bool  # few enough steps to be counted

    @property
    def forward(self) -> bool:
        return self.direction == "forward"

    @property
    def k(self) -> int:
        """Depth of the recurrent product."""
        return self.H if self.forward else self.spec.gates * self.H

    @property
    def columns(self) -> int:
        """Columns of the product for each hidden unit."""
        return _pow2(self.spec.gates) if self.forward else 1

    @property
    def kind(self) -> str:
        """Of arithmetic: half, tf32, fp32 or fp64."""
        single = "fp32" if self.precision == "ieee" else "tf32"
        return {torch.float64: "fp64", torch.float32: single}.get(self.dtype, "half")

    @property
    def scalar(self) -> bool:
        """No matrix instructions for it there."""
        return self.kind == "fp32" or (self.kind == "fp64" and not self.device.fp64_matrix_products)


@lru_cache(maxsize=4096)
def _choose(problem: _Problem, engine: str, tile: tuple[int, int] | None) -> tuple[KernelPlan, tuple[str, ...]]:
    """The cheapest candidate, and in words what became of the other engines."""
    best: dict[str, KernelPlan] = {}
    reasons: dict[str, str] = {}
    for name in ENGINES if engine == "auto" else (engine,):
        for block_b, block_h in [tile] if tile else _tiles(name, problem.B, problem.H):
            plan = _schedule(problem, name, block_b, block_h)
            if isinstance(plan, str):
                reasons.setdefault(name, plan)
            elif name not in best or plan.step_us < best[name].step_us:
                best[name] = plan
    if not best:
        what = f"{problem.spec.cell} with B={problem.B}, H={problem.H} on {problem.device.name}"
        raise ValueError(f"engine={engine!r} cannot run {what}: {reasons[name]}")
    chosen = min(best.values(), key=lambda plan: plan.step_us)
    others = [f"{name} {plan.step_us:.2f} us a step" for name, plan in best.items() if plan is not chosen]
    others += [f"{name} not possible: {reason}" for name, reason in reasons.items() if name not in best]
    return chosen, (f"{problem.direction}, the other engines: {'; '.join(others)}",) if others else ()


def _tiles(engine: str, B: int, H: int) -> Iterator[tuple[int, int]]:
    for block_b in (16, 32, 64, 128):
        if block_b > 16 and block_b >= 2 * B:
            continue  # half of the rows or more would be empty
        if block_b > 32 and engine in ("local", "resident"):
            continue  # addresses of the operands on chip would fill the registers
        for block_h in (16, 32, 64) if engine == "local" else (8, 16, 32, 64):
            if block_h < 2 * max(H, 16 if engine == "local" else 8):
                yield block_b, block_h


def _schedule(problem: _Problem, engine: str, block_b: int, block_h: int) -> KernelPlan | str:
    """One candidate with its cost, or in words why it cannot run."""
    B, H, k, device, itemsize = problem.B, problem.H, problem.k, problem.device, problem.dtype.itemsize
    local = engine == "local"
    n = block_h * problem.columns
    n_b = _ceil(B, block_b)
    n_h = 1 if local else _ceil(H, block_h)
    tiles = _ceil(H, block_h) if local else 1
    if tiles > MAX_LOCAL_TILES:
        return f"H={H} in tiles of {block_h} is {tiles} tiles a program, more than {MAX_LOCAL_TILES}: raise block_h"
    block_k, split_k, stages, num_warps = _product(problem, engine, block_b, block_h, tiles)
    if device is not INTERPRETER:
        too_large = _registers(problem, engine, block_b, block_h, tiles, split_k, num_warps * 32)
        if too_large:
            return f"with tile {block_b}x{block_h} {too_large}"

    # Shared memory: the weights, the K tiles of the rows on their way, and what the sum over the K slices takes.
    segment = H if local else k  # a run of K that K tiles do not cross
    slice_bytes = k // segment * _ceil(segment, block_k) * block_k * n * tiles * itemsize
    row_tile = block_b * block_k * itemsize
    reduction = max(2 if local else 1, split_k) * block_b * n * max(itemsize, 4)
    ahead = min(3, _ceil(k, block_k))
    while ahead > 1 and slice_bytes + (ahead + 1) * row_tile + 1024 > device.shared_per_program:
        ahead -= 1
    staged = 0 if local else min(ahead + 1, _ceil(k, block_k)) * row_tile
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
    parts = _step_parts(problem, engine, block_b, n * tiles, tiles, resident, waves, sharing)
    return KernelPlan(
        engine=engine,
        direction=problem.direction,
        block_b=block_b,
        block_h=block_h,
        tiles=tiles,
        block_k=block_k,
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


def _product(problem: _Problem, engine: str, block_b: int, block_h: int, tiles: int) -> tuple[int, int, int, int]:
    """K tile, K slices, pipeline stages and warps of the gate product.

    Chosen by reading registers, spills and instructions of the compiled kernels (python -m lstm_triton.perf resources):
    16 rows are one matrix instruction high, so a slice of K goes to each warp; from 32 rows on a plain product has no
    redundant work, but from 64 on it needs its operands streamed.
    """
    n, itemsize, shared = block_h * problem.columns, problem.dtype.itemsize, problem.device.shared_per_program
    if engine == "local":
        # Forward's product is wide enough for all warps; backward's is deep, so its K is sliced.
        split_k = 1 if problem.forward or problem.scalar else max(1, min(4, block_h // 16))
        return block_h, split_k, 1, 8 if block_b * block_h * tiles > 1024 else 4
    if problem.scalar:  # FMA on operands in registers, and a short K tile, since it is unrolled
        return 32 if problem.k >= 32 else 16, 1, 2, 8 if block_b * n * itemsize > 2048 else 4
    if block_b == 16:
        block_k, split_k, num_warps = 1024 // itemsize, 4, 4
    elif block_b == 32 and n < 32:
        block_k, split_k, num_warps = 1024 // itemsize, 4, 8
    else:
        block_k, split_k, num_warps = 128 // itemsize if block_b > 32 else 256 // itemsize, 1, 8
    block_k = min(block_k, max(16, _pow2(problem.k)))
    stages = 3 if shared > 128 << 10 else 2
    if engine != "resident":
        while stages * block_k * (n + block_b) * itemsize > shared // 2 and block_k > 64:
            block_k //= 2
    return block_k, min(split_k, max(1, block_k // 16)), stages, num_warps


def _registers(
    problem: _Problem, engine: str, block_b: int, block_h: int, tiles: int, split_k: int, threads: int
) -> str:
    """What would not fit the registers, by the same reading; empty where all does."""
    kind, scalar = problem.kind, problem.scalar
    narrow = kind != "half" if engine == "local" else split_k > 1 or kind == "fp64"
    held = 4 if narrow else 8  # of each of the cell's tiles, values in a thread
    if block_b * block_h * tiles > threads * held:
        return "the cell's tiles would not fit the registers"
    if scalar and (engine == "resident" or (engine == "local" and problem.H > 32)):
        return (
            f"{kind} products are scalar, and unrolled would not fit the registers: allow TF32, or stream the weights"
        )
    if scalar and block_b * block_h * problem.columns > threads * (2 if kind == "fp64" else 4):
        return f"the scalar {kind} products would not fit the registers"
    return ""


def _step_parts(
    problem: _Problem, engine: str, block_b: int, n: int, tiles: int, resident: bool, waves: int, sharing: float
) -> tuple[tuple[str, float], ...]:
    """The model: us of one step by cause. To wait is a store, a fence and add, and a poll: an L2 round trip each."""
    device, k, itemsize = problem.device, problem.k, problem.dtype.itemsize
    cycles_per_us = device.clock_ghz * 1e3
    rate = getattr(device, f"flops_{problem.kind}")
    if problem.kind != "fp32" and block_b < 64:
        rate /= 2  # small tiles use the older matrix instructions
    weights = k * n * itemsize
    shared_bytes_per_clock = 128
    parts = {}
    if engine == "step":
        parts["launch"] = device.launch_us
    elif engine != "local":
        parts["wait"] = 3 * device.l2_round_trip_us
    if engine != "local":
        parts["rows"] = block_b * k * itemsize / device.l2_bytes_per_clock / cycles_per_us
    parts["weights"] = weights / (shared_bytes_per_clock if resident else device.l2_bytes_per_clock) / cycles_per_us
    parts["product"] = 2 * block_b * k * n / rate / cycles_per_us
    parts["cell"] = (300 + 300 * tiles + block_b * n / 4) / cycles_per_us
    return tuple((name, us * waves * (1 if name in ("wait", "launch") else sharing)) for name, us in parts.items())


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pow2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
