"""The waiting engines under the race check: clean under many schedules, found out when a wait or publish is spoilt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from concurrency import POLICIES, Livelock, concurrent
from lstm_triton.kernels import sequence
from numerics import differentiate, problem

import lstm_triton as lt
from lstm_triton import launch

ENGINES = ("resident", "streamed")


def train(cell: str, engine: str, T: int = 4) -> None:
    """Forward and backward: two groups of three programs."""
    differentiate(cell, problem(cell, T, 18, 20), None, lt.functional, engine=engine, tile=(16, 8))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_no_race(cell: str, engine: str, policy: str, seed: int) -> None:
    with concurrent(seed, policy=policy) as run:
        train(cell, engine)
    assert run.launches == 2
    assert run.switches > 20
    assert not run.races, run.describe()


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


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("wait", no_wait),
        ("wait", wait_for_one_less),
        ("wait", wait_without_barrier),
        ("publish", publish_without_barrier),
        ("publish", publish_relaxed),
        ("publish", publish_by_store),
    ],
    ids=["no wait", "one less", "no barrier after", "no barrier before", "relaxed", "store"],
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backward", [False, True])
def test_planted_faults_are_found(
    engine: str, backward: bool, name: str, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in the forward kernel alone and, behind a sound forward, in the backward kernel alone."""
    kernel = sequence.sequence_backward if backward else sequence.sequence_forward
    found = []
    for policy in ("random", "priority"):
        with concurrent(0, policy=policy) as run:
            inputs = [t.requires_grad_() for t in problem("lstm", 6, 18, 20)]
            try:
                if backward:
                    y, *_ = lt.functional.lstm(*inputs, engine=engine, tile=(16, 8))
                    assert not run.races
                with monkeypatch.context() as patch:
                    patch.setattr(sequence, name, fault)
                    if backward:
                        y.sum().backward()
                    else:
                        lt.functional.lstm(*inputs, engine=engine, tile=(16, 8))
            except (Livelock, RuntimeError):
                pass  # a lost count can also leave everybody waiting: that is noticed, too, but the race must be
        found += run.races
    assert found
    assert {race.kernel for race in found} == {kernel.fn.__name__}


def test_a_wait_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, the first program waits for a second that has not begun: bounded, NaN, and said so."""
    monkeypatch.setattr(launch, "POLLS", 50)
    inputs = problem("gru", 3, 2, 20)
    made = []
    allocate = torch.Tensor.new_empty

    def remember(self: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
        made.append(allocate(self, *shape, **options))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", remember)
    with torch.no_grad(), pytest.raises(RuntimeError, match="waited in vain"):
        lt.functional.gru(*inputs, engine="resident", tile=(16, 8))
    y = next(t for t in made if t.shape == (3, 2, 20))
    assert y[0, :, :8].isfinite().all()  # the first program's first step: all that was computed soundly
    assert y[0, :, 8:].isnan().all()
    assert y[1:].isnan().all()
    with concurrent(0), torch.no_grad():  # the error was said once; the next call is sound
        y, _ = lt.functional.gru(*inputs, engine="resident", tile=(16, 8))
    assert y.isfinite().all()
