"""The waiting engines under the race check: clean under many schedules, found out when a wait or publish is spoilt."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cell_problems import CellProblem
from concurrency import POLICIES, Livelock, concurrent
from concurrency.faults import (
    no_wait,
    plant,
    publish_by_store,
    publish_relaxed,
    publish_without_barrier,
    wait_for_one_less,
    wait_without_barrier,
)
from lstm_triton.kernels import backward as backward_text
from lstm_triton.kernels import forward as forward_text
from numerics import differentiate, problem

import lstm_triton as lt
from lstm_triton import constexprs
from lstm_triton.spec import CellSpec

ENGINES = ("resident", "streamed")


def train(cell: str, engine: str, T: int = 4, **options: Any) -> None:
    """Forward and backward: two groups of three programs."""
    differentiate(cell, problem(cell, T, 18, 20), None, lt.functional, engine=engine, tile=(16, 8), **options)


#: What goes round the group more than once a step: a second product, the sums of layer normalisation, both.
SEVERAL_WAITS = {
    "reset before": CellSpec("gru", reset_after=False),
    "layer norm": CellSpec("gru", layer_norm=True),
    "layer norm of c": CellSpec("lstm", layer_norm=True),
    "projected layer norm": CellSpec("lstm", layer_norm=True, proj=12),
}


def train_cell(spec: CellSpec, engine: str, T: int = 3, tile: tuple[int, int] = (16, 8), **options: Any) -> None:
    """Forward and backward of any cell: two groups of three programs."""
    problem = CellProblem(spec, T, 18, 2, 20, **options)
    problem.differentiate(lt.functional, problem.tensors(), engine=engine, tile=tile)


def projected(T: int) -> list[torch.Tensor]:
    """An LSTM's x, states, weights and w_hr: two products a step, of which the third program has no part in one."""
    generator = torch.Generator().manual_seed(0)
    shapes = (T, 18, 5), (18, 12), (18, 20), (80, 5), (80, 12), (12, 20)
    return [torch.randn(shape, generator=generator) * 0.5 for shape in shapes]


def project(inputs: list[torch.Tensor], engine: str, **options: Any) -> tuple[torch.Tensor, ...]:
    *rest, w_hr = inputs
    return lt.functional.lstm(*rest, w_hr=w_hr, engine=engine, tile=(16, 8), **options)


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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_no_race_with_two_products_or_skipped_steps(engine: str, policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask, reset = (torch.rand(3, 18, generator=generator) < share for share in (0.7, 0.3))
    for cell in ("lstm", "gru"):
        with concurrent(0, policy=policy) as run:
            train(cell, engine, T=3, mask=mask, reset=reset)
        assert run.launches == 2 and run.switches > 20
        assert not run.races, run.describe()
    inputs = [t.requires_grad_() for t in projected(3)]
    for options in ({}, {"mask": mask, "reset": reset, "return_cells": True}):
        with concurrent(0, policy=policy) as run:
            results = project(inputs, engine, **options)
            torch.autograd.grad(sum(t.sum() for t in results), inputs)
        assert run.launches == 2 and run.switches > 40
        assert not run.races, run.describe()


@pytest.mark.parametrize(
    ("policy", "options"), [("random", {}), ("priority", {"masks": 1, "skips": True, "reverse": True})], ids=str
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SEVERAL_WAITS)
def test_no_race_with_several_waits(name: str, engine: str, policy: str, options: dict[str, Any]) -> None:
    with concurrent(0, policy=policy) as run:
        train_cell(SEVERAL_WAITS[name], engine, **options)
    assert run.launches == 2 and run.switches > 40
    assert not run.races, run.describe()


@pytest.mark.parametrize("masks", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_race_with_recurrent_dropout(engine: str, masks: int) -> None:
    """The programs read h times the masks of one another, which is stored beside h."""
    with concurrent(0) as run:
        train_cell(CellSpec("lstm"), engine, masks=masks)
    assert run.launches == 2 and not run.races, run.describe()


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
@pytest.mark.parametrize(("engine", "products"), [("resident", 1), ("streamed", 1), ("resident", 2)])
@pytest.mark.parametrize("backward", [False, True])
def test_planted_faults_are_found(
    engine: str, products: int, backward: bool, name: str, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in the forward kernel alone and, behind a sound forward, in the backward kernel alone."""
    kernel = backward_text.sequence_backward if backward else forward_text.sequence_forward
    found = []
    for policy in ("random", "priority"):
        if found:
            break
        with concurrent(0, policy=policy, max_idle=500) as run:
            inputs = [t.requires_grad_() for t in (problem("lstm", 6, 18, 20) if products == 1 else projected(4))]
            call = project if products == 2 else lambda inputs, e: lt.functional.lstm(*inputs, engine=e, tile=(16, 8))
            try:
                if backward:
                    y, *_ = call(inputs, engine)
                    assert not run.races
                with monkeypatch.context() as patch:
                    plant(patch, name, fault)
                    if backward:
                        y.sum().backward()
                    else:
                        call(inputs, engine)
            except (Livelock, RuntimeError):
                pass  # a lost count can also leave everybody waiting: that is noticed, too, but the race must be
        found += run.races
    assert found
    assert {race.kernel for race in found} == {kernel.fn.__name__}


@triton.jit
def wait_once_a_step(counter_ptr, target, polls):
    """Sound between two steps, not between the two products of one: a group is three programs."""
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while (seen < target) & (target // 3 % 2 == 0):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return target >= 0


@triton.jit
def wait_between_products_alone(counter_ptr, target, polls):
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while (seen < target) & (target // 3 % 2 == 1):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return target >= 0


@pytest.mark.parametrize("fault", [wait_once_a_step, wait_between_products_alone], ids=lambda fault: fault.fn.__name__)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backward", [False, True])
def test_each_of_two_waits_is_needed(
    engine: str, backward: bool, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for policy in ("random", "priority"):
        if found:
            break
        inputs = [t.requires_grad_() for t in projected(3)]
        with concurrent(0, policy=policy) as run, monkeypatch.context() as patch:
            if not backward:
                plant(patch, "wait", fault)
            y, *_ = project(inputs, engine)
            plant(patch, "wait", fault)
            if backward:
                y.sum().backward()
        found += run.races
    assert found and {race.kernel for race in found} == {"sequence_backward" if backward else "sequence_forward"}


#: Which of how many waits of a step lets everybody through.
NUMBER, WAITS = 0, 1


@triton.jit
def wait_left_out(counter_ptr, target, polls):
    """Sound but for one wait of each step; a group is three programs."""
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while (seen < target) & (target // 3 % WAITS != NUMBER):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return target >= 0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, spec in SEVERAL_WAITS.items() for n in range(spec.waits)]
)
def test_every_wait_of_a_step_is_needed(
    name: str, number: int, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them left out alone, in the forward kernel, or in the backward kernel behind a sound forward."""
    spec, found = SEVERAL_WAITS[name], []
    problem = CellProblem(spec, 3, 3, 2, 20)
    for seed, policy in ((0, "random"), *((seed, "priority") for seed in range(8))):
        if found:
            break
        leaves = {n: t.requires_grad_() for n, t in problem.tensors().items()}
        with concurrent(seed, policy=policy, max_idle=500) as run, monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "NUMBER", number)
            patch.setattr(sys.modules[__name__], "WAITS", spec.waits)
            if not backward:
                plant(patch, "wait", wait_left_out)
            results = problem.run(lt.functional, leaves, engine="streamed", tile=(16, 8))
            if backward:
                assert not run.races  # of the sound forward
                plant(patch, "wait", wait_left_out)
                sum(t.sum() for t in results).backward()
        found += run.races
    assert found and {race.kernel for race in found} == {"sequence_backward" if backward else "sequence_forward"}


def test_a_wait_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, the first program waits for a second that has not begun: bounded, NaN, and said so."""
    monkeypatch.setattr(constexprs, "POLLS", 50)
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
