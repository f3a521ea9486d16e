"""Compiling ahead on all cores what a GPU run is about to launch: time on a GPU machine is for the GPU.

The kernels land in Triton's own cache, where the launch finds them. Nothing is compiled while something is timed: a
batch of plans is compiled, then used. Where nothing is timed, the next batch is compiled meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from lstm_triton.plans import KernelPlan, LaunchPlan

Item = TypeVar("Item")


class Kernel(NamedTuple):
    """What is compiled: one kernel of a plan, and what `launch.compile_ahead` has to be told of it."""

    plan: LaunchPlan
    direction: str
    training: bool
    reverse: bool = False
    masked: bool = False
    cells: bool = False
    random: bool = False
    part: int = 0


@contextlib.contextmanager
def pool(jobs: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes in which the compiler runs."""
    # It does not in a process that interprets, and the children decide that when they import triton.
    interpreting = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as processes:
            yield processes
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


def identity(plan: LaunchPlan, kernel: KernelPlan) -> object:
    """Equal for what compiles to the same: batch, length and grid are arguments at run time, not other kernels."""
    free = {"n_b": 0, "groups_at_once": 0, "shared_bytes": 0, "step_us": 0.0, "parts": (), "measured_us": None}
    device = plan.device.capability, plan.device.shared_per_program
    return device, plan.spec, plan.masks, plan.H, plan.dtype, plan.precision, replace(kernel, **free)


def ahead(
    items: Sequence[Item],
    kernels: Callable[[Item], Iterable[Kernel | tuple[LaunchPlan, str, bool]]],
    batch: int,
    deadline: float = math.inf,
    *,
    overlap: bool = False,
) -> Iterator[Item]:
    """Yield the items, those of each batch only once all kernels of that batch are compiled.

    With `overlap` the batch after it is compiled meanwhile. No batch is begun after `deadline` (by time.monotonic).
    """
    batches = [items[first : first + batch] for first in range(0, len(items), batch)]
    with pool() as processes:
        begun: dict[int, list[Future[None]]] = {}
        try:
            for i, current in enumerate(batches):
                if time.monotonic() > deadline:
                    return
                for j in range(i, min(i + 1 + overlap, len(batches))):
                    if j not in begun:
                        begun[j] = []
                        # Where no compiler runs ahead, the launch compiles.
                        with contextlib.suppress(BrokenProcessPool):
                            begun[j] += [
                                processes.submit(compile_kernel, each) for each in _distinct(batches[j], kernels)
                            ]
                with contextlib.suppress(BrokenProcessPool):
                    for future in begun.pop(i):
                        future.result()
                yield from current
        finally:
            processes.shutdown(wait=False, cancel_futures=True)


def _distinct(items: Sequence[Item], kernels: Callable[[Item], Iterable[Kernel]]) -> Iterable[Kernel]:
    wanted: dict[object, Kernel] = {}
    for item in items:
        # What cannot be planned says so when it is launched.
        with contextlib.suppress(Exception):
            for kernel in (Kernel(*each) for each in kernels(item)):
                key = identity(kernel.plan, getattr(kernel.plan, kernel.direction)), *kernel[2:]
                wanted[key] = kernel
    return wanted.values()


def compile_kernel(kernel: Kernel | tuple[LaunchPlan, str, bool]) -> None:
    """Compile one kernel into the cache; one that cannot be compiled is left for its launch to say so."""
    from lstm_triton.launch import compile_ahead

    plan, direction, *rest = Kernel(*kernel)
    with contextlib.suppress(Exception):
        compile_ahead(plan, direction, **dict(zip(Kernel._fields[2:], rest, strict=True)))
