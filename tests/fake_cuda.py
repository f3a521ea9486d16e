"""Stands in for torch.cuda where there is no GPU: what is asked of it is logged, and tensors stay on the CPU.

`install` puts it in torch's place for one test, so that the lines only a GPU runs are walked through in their order.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from lstm_triton.perf import judge, providers
from lstm_triton.perf.cases import Case, inputs
from torch import nn


class FakeCuda:
    """The part of torch.cuda that the harness uses. `log` holds what happened, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams = ["default"]
        self.allocated = 0
        self.ends_captures = True  # whether a capture can be ended after its body raised
        self.sound = True  # whether the device still works

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(
            L2_cache_size=1 << 20, uuid="12-34", major=9, minor=0, multi_processor_count=132, name="fake"
        )

    def current_device(self) -> int:
        return 0

    def synchronize(self) -> None:
        self.log.append("synchronize")
        if not self.sound:
            raise RuntimeError("an illegal memory access was encountered")

    def empty_cache(self) -> None:
        self.log.append("empty_cache")

    def _sleep(self, clocks: int) -> None:
        self.log.append("sleep")

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        return SimpleNamespace(record=lambda: self.log.append("event"), elapsed_time=lambda end: 1.5)

    # memory: a run that wants to be seen adds to `allocated`
    def reset_peak_memory_stats(self) -> None:
        self.log.append("reset peak")

    def memory_stats(self) -> dict[str, int]:
        before = 100 << 20
        return {"requested_bytes.all.current": before, "requested_bytes.all.peak": before + self.allocated}

    # streams and graphs
    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(name="side", wait_stream=lambda other: self.log.append(f"side waits for {other.name}"))

    def current_stream(self) -> SimpleNamespace:
        name = self.streams[-1]
        return SimpleNamespace(name=name, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"))

    @contextlib.contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        depth = len(self.streams)
        self.streams.append(stream.name)
        try:
            yield
        finally:
            del self.streams[depth:]

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 7)

    def graph(self, graph: object, pool: tuple[int, int], stream: SimpleNamespace) -> contextlib.AbstractContextManager:
        assert pool == (0, 7) and stream.name == "side"
        return _Capture(self)

    def end_allocate_to_pool(self, device: int, pool: tuple[int, int]) -> None:
        self.log.append(f"end pool {pool}")
        if self.ends_captures:
            raise RuntimeError("not recording to this pool")


class _Capture:
    """torch.cuda.graph, which leaves its stream current where it cannot end the capture."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def __enter__(self) -> None:
        self.cuda.streams.append("capturing")
        self.cuda.log.append("capture")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None and not self.cuda.ends_captures:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.streams.pop()


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Put a FakeCuda in the place of torch.cuda's functions; tensors for "cuda" are made on the CPU."""
    cuda = FakeCuda()
    for name in dir(FakeCuda):
        if hasattr(torch.cuda, name) and not name.startswith("__"):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate_to_pool, raising=False)
    real = torch.empty

    def empty(*size: object, device: object = None, **options: object) -> object:
        if device == "cuda":  # the buffer that overwrites the cache
            return SimpleNamespace(zero_=lambda: cuda.log.append("flush"))
        return real(*size, device=device, **options)

    monkeypatch.setattr(torch, "empty", empty)
    return cuda


def rehearse(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A Judge for "cuda" then runs through: torch.nn on the CPU stands for every provider, with plans made up."""
    cuda = install(monkeypatch)
    monkeypatch.setattr(judge, "raise_timeout", lambda device: None)
    monkeypatch.setattr(judge, "inputs", lambda case, device: inputs(case, "cpu"))
    monkeypatch.setattr(judge, "build", built())
    monkeypatch.setattr(judge, "label", lambda name, case, device: f"plan of {name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="1755\n"))
    return cuda


def built(**wrong: str) -> Callable[..., nn.Module]:
    """`build` with torch.nn for every provider; those named differ in one weight ("off", "nan"), in all or raise."""

    def build(provider: str, case: Case, weights: dict[str, torch.Tensor], device: str) -> nn.Module:
        how = wrong.get(provider.replace(":", "_"), "")
        if how not in ("", "off", "nan", "other"):
            raise RuntimeError(how)
        layer = providers.build("torch", case, weights, "cpu")
        with torch.no_grad():
            if how == "off":
                layer.weight_hh_l0[0, 0] += 0.1
            elif how == "nan":
                layer.weight_hh_l0[0, 0] = math.nan
            elif how == "other":
                layer.weight_hh_l0 += torch.linspace(-9, 9, layer.weight_hh_l0.numel()).view_as(layer.weight_hh_l0)
        return layer

    return build


def when(
    monkeypatch: pytest.MonkeyPatch, provider: str, condition: Callable[[], bool], action: Callable[[], None]
) -> None:
    """Have a provider's layer do something in each run of which the condition is true."""

    def build(name: str, *arguments: object) -> nn.Module:
        layer = built()(name, *arguments)
        if name == provider:
            layer.register_forward_pre_hook(lambda *_: action() if condition() else None)
        return layer

    monkeypatch.setattr(judge, "build", build)


def fail(message: str = "cannot") -> None:
    raise RuntimeError(message)
