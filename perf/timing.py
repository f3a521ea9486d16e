"""Timing several ways of doing one thing side by side, in turns: a drift of the clocks meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 100
#: About half a millisecond in which the host gets ahead of the device.
HEAD_START_CLOCKS = 1_000_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median and the 20th and 80th percentiles."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def measure(runs: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, Timing]:
    """Time each of `runs`, spending about `seconds` on each and at least MIN_ROUNDS rounds.

    On CUDA between two events around the run, after the L2 cache is overwritten and the device kept busy for about half
    a millisecond: what the host takes to launch a run shows only as far as it exceeds that and the run's own time on
    the device. On the CPU by the wall clock.
    """
    once = _cuda_timer() if device == "cuda" else _cpu_timer
    for _ in range(2):
        once(list(runs.values()))
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - start > seconds * len(names):
            break
        order = names if turn % 2 == 0 else names[::-1]
        for name, sample in zip(order, once([runs[name] for name in order]), strict=True):
            samples[name].append(sample)
    return {name: _summary(samples[name]) for name in names}


def _summary(samples: list[float]) -> Timing:
    p20, median, p80 = np.percentile(samples, (20, 50, 80))
    return Timing(float(median), float(p20), float(p80), len(samples))


def _cpu_timer(runs: list[Callable[[], object]]) -> list[float]:
    taken = []
    for run in runs:
        start = time.perf_counter()
        run()
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


def _cuda_timer() -> Callable[[list[Callable[[], object]]], list[float]]:
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(max(4 * cache_bytes, 1 << 26), dtype=torch.int8, device="cuda")

    def timer(runs: list[Callable[[], object]]) -> list[float]:
        events = []
        for run in runs:
            flush.zero_()
            torch.cuda._sleep(HEAD_START_CLOCKS)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    return timer
