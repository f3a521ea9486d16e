"""Compiling ahead on all cores what a GPU run is about to launch: time on a GPU machine is for the GPU.

The kernels land in Triton's own cache, where the launch finds them. Nothing is compiled while something is timed: a
batch of plans is compiled, then used.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from lstm_triton.planner import KernelPlan, LaunchPlan

Item = TypeVar("Item")
#: A plan, a direction, and whether the kernel saves for backward.
Kernel = tuple["LaunchPlan", str, bool]


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
    compiled = replace(kernel, n_b=0, groups_at_once=0, shared_bytes=0, step_us=0.0, parts=())
    device = plan.device.capability, plan.device.shared_per_program
    return device, plan.spec, plan.H, plan.dtype, plan.precision, compiled


def ahead(
    items: Sequence[Item], kernels: Callable[[Item], Iterable[Kernel]], batch: int, deadline: float = math.inf
) -> Iterator[Item]:
    """Yield the items, those of each batch only once all kernels of that batch are compiled.

    No batch is begun after `deadline` (by time.monotonic).
    """
    with pool() as processes:
        for first in range(0, len(items), batch):
            if time.monotonic() > deadline:
                return
            wanted: dict[object, Kernel] = {}
            # What cannot be planned or compiled says so when it is launched.
            for item in items[first : first + batch]:
                with contextlib.suppress(Exception):
                    for plan, direction, training in kernels(item):
                        key = identity(plan, getattr(plan, direction)), training
                        wanted[key] = plan, direction, training
            with contextlib.suppress(Exception):
                list(processes.map(_compile, wanted.values()))
            yield from items[first : first + batch]


def _compile(kernel: Kernel) -> None:
    from lstm_triton.launch import compile_ahead

    plan, direction, training = kernel
    with contextlib.suppress(Exception):
        compile_ahead(plan, direction, training=training)
