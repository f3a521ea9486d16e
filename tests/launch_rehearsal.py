"""Triton's own launch path up to the launch, with no GPU: it binds, specialises, looks up and compiles kernels.

For a process of its own: the driver that it puts in place of the missing one stays.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from lstm_triton.kernels.backward import sequence_backward
from lstm_triton.kernels.forward import sequence_forward
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lstm_triton import constexprs, launch
from lstm_triton.devices import devices
from lstm_triton.planner import make_plan
from lstm_triton.spec import CellSpec


class Driver:
    """Of an H200, as far as compiling for it goes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def train(spec: CellSpec, masks: int, T: int, B: int, H: int = 64) -> None:
    """The launches of forward and backward on the resident engine, on tensors of the right shapes and dtypes."""
    G, rows, zeros = spec.gates, len(spec.rows), torch.zeros
    dparams = constexprs.options(spec, masks, True).dparams
    plan = make_plan(spec, T, B, H, torch.float32, devices()["H200"], engine="resident", masks=masks)
    w_hh, state = zeros(G * H, H), zeros(B, H)
    same: dict[str, Any] = {
        "params": zeros(rows, H) if rows else None,
        "mask": zeros(masks, B, H) if masks else None,
        "steps": torch.ones(T, B, dtype=torch.uint8),
        "seed": torch.tensor([3]),
        "reverse": False,
    }
    kept = launch.forward(
        plan, zeros(T, B, G * H), w_hh, zeros(G * H), state, state if spec.cell == "lstm" else None,
        training=True, **same,
    )  # fmt: skip
    launch.backward(
        plan, zeros(T, B, H), zeros(B, H), zeros(B, H), zeros(B, dparams, H) if dparams else None,
        zeros(T, B, G * H), kept.h if kept.extra is None else kept.extra, state, kept.extra, w_hh,
        normed=kept.normed, stats=kept.stats, **same,
    )  # fmt: skip


def compiled() -> list[int]:
    """Kernels so far: forward, backward."""
    return [sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in (sequence_forward, sequence_backward)]


def rehearse(specs: list[tuple[CellSpec, int]]) -> None:
    """Each spec with its number of masks: one kernel for each direction, whatever the length and the batch."""

    def warm_up(kernel: Any, plan: Any, tensors: Any, sizes: Any, constants: Any) -> None:
        for part in constexprs.parts(plan, constants["OPT"]):
            kernel.warmup(*tensors, *sizes, 0, grid=(1,), **constants, **part, **launch._options(plan))

    words = torch.zeros(1024, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_run", warm_up)
        patch.setattr(launch, "_synchronisation", lambda *_: contextlib.nullcontext(words))
        driver.set_active(Driver())
        for i, (spec, masks) in enumerate(specs):
            for T, B in ((3, 4), (7, 6)):
                train(spec, masks, T, B)
                assert compiled() == [i + 1, i + 1], spec
