"""Timing without a GPU: turns, budgets and failures on a clock made up here, and CUDA's lines on a stand-in for it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda, install
from lstm_triton.perf import memory, timing
from lstm_triton.perf.cases import CELLS, Case, inputs, oracle

CASE = Case("lstm", "fp32", "forward+backward", 2, 8, 5)


class FakeClock:
    """Gives each run the milliseconds that it returns, twice as many where the cache is cold; keeps the order."""

    states = ("cold", "warm")

    def __init__(self, now: list[float] | None = None) -> None:
        self.order: list[float] = []
        self.now = now

    def laps(self, run: Callable[[], float], states: Sequence[str]) -> list[float]:
        taken = []
        for state in states:
            self.order.append(run())
            taken.append(self.order[-1] * (2 if state == "cold" else 1))
            if self.now:
                self.now[0] += self.order[-1] / 1e3
        return taken

    def synchronize(self) -> None:
        pass

    def mhz(self) -> str:
        return "1755"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch)


def test_runs_take_turns_and_every_second_round_backwards() -> None:
    clock = FakeClock()
    found = timing.race({"a": lambda: 1.0, "b": lambda: 3.0}, clock, seconds=0.0)
    assert found["a"]["cold"] == timing.Timing(2.0, 2.0, 2.0, timing.MIN_ROUNDS)
    assert found["b"]["warm"].median_ms == 3.0
    assert clock.order[:8] == [1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 1.0, 1.0]
    assert len(clock.order) == 4 * (timing.WARM_UPS + timing.MIN_ROUNDS)


def test_each_run_has_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = timing.race({"fast": lambda: 1.0, "slow": lambda: 100.0}, FakeClock(now), seconds=0.1)
    # both states count: 2 ms a round and 200 ms a round
    assert found["fast"]["cold"].rounds in (50, 51) and found["slow"]["cold"].rounds == timing.MIN_ROUNDS
    endless = timing.race({"fast": lambda: 0.0}, FakeClock(now), seconds=0.1)
    assert endless["fast"]["cold"].rounds == timing.MAX_ROUNDS


def test_warm_up_is_not_counted() -> None:
    samples = iter([50.0] * timing.WARM_UPS + [1.0] * timing.MIN_ROUNDS)
    found = timing.race({"a": lambda: next(samples)}, FakeClock(), 0.0, ("warm",))
    assert found["a"]["warm"].p80_ms == 1.0 and found["a"].keys() == {"warm"}


def test_a_run_that_raises_drops_out_and_the_others_go_on() -> None:
    turns = iter(range(4))
    found = timing.race({"a": lambda: float(next(turns)), "b": lambda: 1.0}, FakeClock(), 0.0)
    assert isinstance(found["a"], StopIteration)
    assert found["b"]["cold"].rounds == timing.MIN_ROUNDS


def test_a_lost_device_ends_it_and_names_the_run() -> None:
    def lose() -> float:
        raise RuntimeError("illegal access")

    clock = FakeClock()
    found = timing.race({"a": lambda: 1.0, "b": lose, "c": lambda: 2.0}, clock, 0.0, alive=lambda: False)
    assert found.keys() == {"b"} and str(found["b"]) == "illegal access"
    assert clock.order == [1.0, 1.0]


def test_percentiles() -> None:
    found = timing.Timing.of([float(n) for n in range(101)])
    assert (found.p20_ms, found.median_ms, found.p80_ms, found.rounds) == (20.0, 50.0, 80.0, 101)


def test_on_a_gpu_the_host_gets_ahead_before_the_first_event(cuda: FakeCuda) -> None:
    clock = timing.clock_for("cuda")
    assert isinstance(clock, timing.CudaClock) and isinstance(timing.clock_for("cpu"), timing.CpuClock)
    cuda.log.clear()
    assert clock.laps(lambda: cuda.log.append("run"), clock.states) == [1.5, 1.5]
    once = ["sleep", "event", "run", "event"]
    assert cuda.log == ["flush", *once, *once, "synchronize"]


def test_flush_is_several_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    cuda = install(monkeypatch)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cuda.get_device_properties)
    monkeypatch.setattr(torch, "empty", lambda size, **options: sizes.append((size, options)))
    timing.CudaClock()
    assert sizes == [(200 << 20, {"dtype": torch.int8, "device": "cuda"})]


@pytest.mark.parametrize(
    ("answer", "mhz"),
    [("1980\n", "1980"), ("[N/A]\n", ""), ("", ""), (OSError(), ""), (subprocess.TimeoutExpired("", 20), "")],
)
def test_clock_of_the_gpu(answer: object, mhz: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        commands.append(command)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    assert timing.CudaClock().mhz() == mhz and timing.CpuClock().mhz() == ""
    assert "--id=GPU-12-34" in commands[0] and "--query-gpu=clocks.sm" in commands[0]


def test_host_time_is_of_single_calls_and_the_queue_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    calls = []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def run() -> None:
        calls.append("run")
        now[0] += 0.001 if len(calls) > 1 else 5.0  # the first call is not counted

    clock = SimpleNamespace(synchronize=lambda: calls.append("wait"))
    assert timing.host_us(run, clock, seconds=0.025) == pytest.approx(1000.0)
    burst = ["wait", *["run"] * timing.BURST]
    assert calls == ["run", *burst * 3, "wait"]


def test_capture_warms_up_on_the_stream_it_captures_on(cuda: FakeCuda) -> None:
    seen = []
    replay = timing.capture(lambda: seen.append(cuda.streams[-1]) or len(seen))
    assert seen == ["side"] * 3 + ["capturing"]
    assert cuda.log == ["side waits for default", "default waits for side", "capture"]
    assert replay.results == 4 and cuda.streams == ["default"]
    replay.run()
    assert cuda.log[-1] == "replay"


@pytest.mark.parametrize("ends", [True, False])
def test_failed_capture_leaves_the_stream_and_says_what_the_run_raised(ends: bool, cuda: FakeCuda) -> None:
    cuda.ends_captures = ends
    calls = []

    def run() -> None:
        calls.append(None)
        if len(calls) == 4:
            raise ValueError("cannot be captured")

    with pytest.raises(ValueError, match="cannot be captured"):
        timing.capture(run)
    assert cuda.streams == ["default"]
    # One that could not be ended has left marks on the allocator and the generator.
    left = ["capture"] if ends else ["capture", "end pool (0, 7)", "capture", "flush"]
    assert cuda.log[cuda.log.index("capture") :] == left


def test_run_that_fails_before_its_capture_is_not_captured(cuda: FakeCuda) -> None:
    with pytest.raises(ZeroDivisionError):
        timing.capture(lambda: 1 / 0)
    assert cuda.streams == ["default"] and "capture" not in cuda.log


def test_peak_memory_is_over_what_was_there(cuda: FakeCuda) -> None:
    def run() -> None:
        assert cuda.log[-1] == "reset peak"
        cuda.allocated = 3 << 20

    assert memory.peak_mib(run) == 3.0
    assert cuda.log == ["synchronize", "reset peak", "synchronize"]


def test_saved_memory_counts_each_storage_once_and_no_parameters() -> None:
    class Doubling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1 << 18))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = (x * self.weight).exp()  # saves x and weight, which are there anyway, and its result
            z = y * y  # saves that result again, twice, by two views
            return z.sin(), z[:1]  # saves z

    x = torch.ones(1 << 18)
    assert memory.saved_mib(Doubling(), CASE, x, x) == 2.0
    forward = Case("lstm", "fp32", "forward", 2, 8, 5)
    assert memory.saved_mib(Doubling(), forward, x, x) == 2.0
    assert memory.saved_mib(Doubling(), Case("lstm", "fp32", "inference", 2, 8, 5), x, x) == 0.0


@pytest.mark.parametrize("cell", CELLS)
def test_saved_memory_of_a_layer_grows_with_its_length(cell: str) -> None:
    short, long = (
        memory.saved_mib(oracle(case), case, *inputs(case, "cpu"))
        for case in (Case(cell, "fp32", "forward", 4, 8, seq) for seq in (8, 64))
    )
    assert 0 < 4 * short < long
