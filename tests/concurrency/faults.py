"""Faults to plant in how programs wait for one another: kernels/sync.py's functions, each with one thing spoilt."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl
from lstm_triton.kernels import backward, forward, norm, sync


def plant(patch: pytest.MonkeyPatch, name: str, fault: object) -> None:
    """A fault in place of what sync.py calls `name`, for the kernels that run from now on."""
    for module in (sync, norm, forward, backward):
        if hasattr(module, name):
            patch.setattr(module, name, fault)


@triton.jit
def no_wait(counter_ptr, target, polls):
    return tl.full((), 1, tl.int1)


@triton.jit
def wait_for_one_less(counter_ptr, target, polls):
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while seen < target - 1:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return seen >= target - 1


@triton.jit
def wait_without_barrier(counter_ptr, target, polls):
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while seen < target:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    return seen >= target


@triton.jit
def publish_without_barrier(counter_ptr):
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def publish_relaxed(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def publish_by_store(counter_ptr):
    tl.debug_barrier()
    tl.store(counter_ptr, tl.load(counter_ptr) + 1)
