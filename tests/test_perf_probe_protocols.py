"""`probe`'s waiting protocols under every interleaving tried: right and without races; and planted faults are found."""

from __future__ import annotations

from typing import Any

import pytest
import triton
import triton.language as tl
from concurrency import POLICIES, Livelock, concurrent
from lstm_triton.perf import probe_kernels
from lstm_triton.perf.probe_constants import PROTOCOLS
from lstm_triton.perf.probe_launches import Exchange

STEPS = 5


def exchange(protocol: str, programs: int, **options: Any) -> tuple[str, list[Any]]:
    """One launch with all programs at once: what its own check says, and the races."""
    launch = Exchange(protocol, programs, STEPS, "cpu")
    launch.prepare(STEPS)
    with concurrent(**options) as run:
        launch.run(STEPS)
    return launch.check(STEPS), run.races


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("programs", [2, 3, 4])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_are_right(protocol: str, programs: int, policy: str, seed: int) -> None:
    problem, races = exchange(protocol, programs, seed=seed, policy=policy)
    assert not problem
    # Nothing orders the poll of data behind its store but the data itself: a word is either empty or right.
    polls = [race for race in races if "(wait_data)" in race.first.place + race.second.place]
    assert races == (polls if protocol == "data" else [])
    assert all(race.where.startswith("tiles_ptr") for race in races)


@triton.jit
def publish_without_barrier(counter_ptr):
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for_one_less(counter_ptr, target, polls):
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while seen < target - 1:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return seen >= 0


@triton.jit
def flag_without_barrier(flag_ptr, step):
    tl.atomic_xchg(flag_ptr, step, sem="release", scope="gpu")


@triton.jit
def flag_without_release(flag_ptr, step):
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, step, sem="relaxed", scope="gpu")


@triton.jit
def flags_without_acquire(flag_ptrs, INTERPRETED):
    return tl.min(tl.load(flag_ptrs, volatile=True))


@triton.jit
def look_at_the_first_flag(flag_ptrs, INTERPRETED):
    return tl.max(tl.atomic_add(flag_ptrs, 0, sem="acquire", scope="gpu"))


@triton.jit
def wait_flags_without_barrier(flag_ptrs, step, polls, INTERPRETED):
    seen = probe_kernels.see_flags(flag_ptrs, INTERPRETED)
    while seen < step:
        seen = probe_kernels.see_flags(flag_ptrs, INTERPRETED)
    return seen >= step


@triton.jit
def look_at_data_once(ptrs, mask, polls):
    lowest = tl.min(tl.load(ptrs, mask=mask, other=probe_kernels.WORD_MASK, volatile=True))
    return tl.maximum(lowest, 0)


@pytest.mark.parametrize(
    ("protocol", "name", "fault"),
    [
        ("counter", "publish", publish_without_barrier),
        ("counter", "wait", wait_for_one_less),
        ("flag", "publish_flag", flag_without_barrier),
        ("flag", "publish_flag", flag_without_release),
        ("flag", "see_flags", flags_without_acquire),
        ("flag", "see_flags", look_at_the_first_flag),
        ("flag", "wait_flags", wait_flags_without_barrier),
        ("data", "wait_data", look_at_data_once),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_faults_are_found(protocol: str, name: str, fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_kernels, name, fault)
    for policy in POLICIES:
        try:
            problem, races = exchange(protocol, 3, policy=policy)
        except Livelock:
            continue
        assert "not ordered" in problem if protocol == "data" else races


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_wait_that_runs_out_ends_and_is_reported(protocol: str) -> None:
    launch = Exchange(protocol, 3, STEPS, "cpu", polls=20)
    launch.prepare(STEPS)
    launch.run(STEPS)  # interpreted one after another: the first waits for a second that has not begun
    assert "waited in vain" in launch.check(STEPS)


def test_the_exchange_notices_a_wrong_word_anywhere() -> None:
    launch = Exchange("counter", 2, STEPS, "cpu")
    launch.tiles.copy_(launch.expected[:-1])
    launch.last.copy_(launch.expected[-1])
    assert launch.check(STEPS) == ""
    launch.tiles[3, 7, 5] += 1
    assert "first at step 3" in launch.check(STEPS)
    assert launch.check(3) == "not ordered: the last tiles are wrong"
