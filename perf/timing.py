"""Timing several ways of doing one thing side by side, in turns: a drift of the clocks meets all of them alike.

What is timed is behind `Clock`: CUDA events on a GPU, the wall clock on the CPU.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

Run = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 5, 100
WARM_UPS = 2
#: About a millisecond in which the host gets ahead of the device.
HEAD_START_CLOCKS = 2_000_000
#: Calls timed between two waits for the device: few enough that its queue never fills.
BURST = 10


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median and the 20th and 80th percentiles."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        p20, median, p80 = np.percentile(samples, (20, 50, 80))
        return cls(float(median), float(p20), float(p80), len(samples))


class Clock(Protocol):
    """What times a run on one kind of device."""

    #: What the device's cache can hold before a run: "cold" (something else), "warm" (what the run itself left).
    states: tuple[str, ...]

    def laps(self, run: Run, states: Sequence[str]) -> list[float]:
        """Milliseconds of one run from each of the cache's states, in that order; what went wrong in them is raised."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def mhz(self) -> str:
        """The clock of the multiprocessors at this moment, empty where there is none."""


class CpuClock:
    """The wall clock; the caches are as they come."""

    states = ("cold",)

    def laps(self, run: Run, states: Sequence[str]) -> list[float]:
        taken = []
        for _ in states:
            start = time.perf_counter()
            run()
            taken.append((time.perf_counter() - start) * 1e3)
        return taken

    def synchronize(self) -> None:
        pass

    def mhz(self) -> str:
        return ""


class CudaClock:
    """Two events around a run, after the device was kept busy for about a millisecond.

    What the host takes to launch a run shows only as far as it exceeds that and the run's own time on the device.
    """

    states = ("cold", "warm")

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = max(4 * self.properties.L2_cache_size, 1 << 26)
        self.flush = torch.empty(size, dtype=torch.int8, device="cuda")

    def laps(self, run: Run, states: Sequence[str]) -> list[float]:
        events = []
        for state in states:
            if state == "cold":
                self.flush.zero_()
            torch.cuda._sleep(HEAD_START_CLOCKS)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mhz(self) -> str:
        command = ["nvidia-smi", f"--id=GPU-{self.properties.uuid}", "--query-gpu=clocks.sm"]
        try:
            done = subprocess.run(
                [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        found = done.stdout.strip()
        return found if found.isdecimal() else ""


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


@dataclass
class _Series:
    """The samples of one run so far."""

    run: Run
    samples: dict[str, list[float]]
    spent: float = 0.0  # seconds
    error: Exception | None = None

    def unfinished(self, seconds: float) -> bool:
        rounds = min(map(len, self.samples.values()))
        return self.error is None and rounds < MAX_ROUNDS and (rounds < MIN_ROUNDS or self.spent < seconds)


def race(
    runs: Mapping[str, Run],
    clock: Clock,
    seconds: float,
    states: Sequence[str] = (),
    alive: Callable[[], bool] = lambda: True,
    check: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, Timing] | Exception]:
    """Time each of `runs` from each of the cache's states, spending about `seconds` on it and at least MIN_ROUNDS.

    The runs take turns, every second round backwards. One that raises drops out, and its exception is its result; if
    the device is not `alive` after that, the rest have no result. After each lap `check` may raise for the run.
    """
    states = states or clock.states
    series = {name: _Series(run, {state: [] for state in states}) for name, run in runs.items()}
    for turn in range(WARM_UPS + MAX_ROUNDS):
        names = [name for name, one in series.items() if one.unfinished(seconds)]
        if not names:
            break
        for name in names if turn % 2 == 0 else names[::-1]:
            one = series[name]
            start = time.perf_counter()
            try:
                taken = clock.laps(one.run, states)
                check(name)
            except Exception as error:
                one.error = error.with_traceback(None)  # whose frames would hold the run's tensors
                if not alive():
                    return {name: one.error}
                continue
            if turn >= WARM_UPS:
                one.spent += time.perf_counter() - start
                for state, sample in zip(states, taken, strict=True):
                    one.samples[state].append(sample)
    return {
        name: one.error or {state: Timing.of(samples) for state, samples in one.samples.items()}
        for name, one in series.items()
    }


def host_us(run: Run, clock: Clock, seconds: float = 0.05) -> float:
    """Wall time (us) of a call that is not waited for, as its caller sees it: median over many.

    Wall and not processor time: a thread that spins while autograd's own thread works would count twice.
    """
    run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        clock.synchronize()
        for _ in range(BURST):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    clock.synchronize()
    return float(np.median(taken)) * 1e6


@dataclass(frozen=True)
class Replay:
    """A captured run: what replays it, and where its results are after that."""

    run: Run
    results: Any


#: Graphs whose capture failed: PyTorch may still ask them where to allocate, so they must not go away.
_failed: list[object] = []


def capture(run: Run) -> Replay:
    """Capture a run as a CUDA graph, as PyTorch says to: warmed up on the side stream that it is then captured on.

    What a failed capture leaves is put right as far as it can be; whether the device still works is for the caller to
    ask. The exception is that of the run, not the one about ending its capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    cause: Exception | None = None
    try:
        # The outer context restores the stream also where torch.cuda.graph cannot end the capture.
        with torch.cuda.stream(side), torch.cuda.graph(graph, pool=pool, stream=side):
            try:
                results = run()
            except Exception as error:
                cause = error
                raise
    except Exception as error:
        if error is not cause:  # the capture could not be ended
            _failed.append(graph)
            _put_right(pool)
        raise (cause or error) from None
    return Replay(graph.replay, results)


def _put_right(pool: Any) -> None:
    """Before PyTorch 2.12 the allocator and the random generator believe that such a capture is still under way."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    with contextlib.suppress(RuntimeError):
        word = torch.empty(1, device="cuda")
        # One that ends tells the generator so, for all of them.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=torch.cuda.graph_pool_handle(), stream=torch.cuda.Stream()):
            word.zero_()
