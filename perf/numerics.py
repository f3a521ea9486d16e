"""Whether results are right, asked before how fast they came: every output and gradient against float64.

`check_layer` judges one cell of the sweep, provider by provider; `problems.check_engine` an engine on an odd shape.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .cases import MODES, Case, precision, runner

#: Largest relative error ||a - b|| / ||b|| by dtype, of outputs and states and of gradients. Rounding nothing but what
#: is stored (h, gates, their gradients) costs an LSTM a fifth of this in 16 bits (2.1e-3 and 4.0e-3 in bf16, 2.6e-4 and
#: 5e-4 in fp16; H = 64 to 1024 and T = 64 to 512 alike), and 3e-7 and 5e-7 in fp32.
TOLERANCE = {
    "fp64": (1e-12, 1e-11),
    "fp32": (2e-6, 5e-6),
    "tf32": (1.5e-3, 3e-3),
    "fp16": (1.25e-3, 2.5e-3),
    "bf16": (1e-2, 2e-2),
}
#: What one element may be off by, as a multiple of what the whole may: rounding reaches about 7, a wrong row hundreds.
LOCALLY = 30


@dataclass(frozen=True)
class Check:
    """The verdict on one result: its worst error as a multiple of what is allowed, and what went wrong if it failed."""

    passed: bool
    error: float  # of the worst tensor
    worst: str  # its name
    allowed: float
    detail: str = ""

    @property
    def columns(self) -> dict[str, object]:
        """As a table shows it."""
        return {
            "status": "ok" if self.passed else "failed",
            "error": f"{self.error:.2e}",
            "worst": self.worst,
            "allowed": f"{self.allowed:.0e}",
            "detail": self.detail,
        }


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; infinite if anything is NaN, or nonzero where all of `want` is zero."""
    got, want = got.detach().to(want.device, torch.float64), want.detach().to(torch.float64)
    if got.shape != want.shape:
        return math.inf
    difference, norm = float((got - want).norm()), float(want.norm())
    if not math.isfinite(difference) or not math.isfinite(norm):
        return math.inf
    return difference / norm if norm > 0 else (0.0 if difference == 0 else math.inf)


def local_error(got: Tensor, want: Tensor) -> float:
    """The largest error of one element, over its own size and the root mean square of all: a row left out shows."""
    got, want = got.detach().to(want.device, torch.float64), want.detach().to(torch.float64)
    scale = want.abs() + want.square().mean().sqrt()
    return float(((got - want).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).max()) if want.numel() else 0.0


def compare(got: dict[str, Tensor], want: dict[str, Tensor], dtype: str) -> Check:
    """Judge tensors by name; names that begin with d are gradients."""
    if got.keys() != want.keys():
        return Check(False, math.inf, "", 0.0, f"results {sorted(got)} where {sorted(want)} were expected")
    verdicts = []
    for name in want:
        allowed = TOLERANCE[dtype][name.startswith("d")]
        error = relative_error(got[name], want[name])
        verdicts.append((error / allowed, error, name, allowed))
    share, error, name, allowed = max(verdicts)
    detail = "" if share <= 1 else f"{name}: error {error:.2e}, allowed {allowed:.0e}"
    if not detail:
        locally = {name: local_error(got[name], want[name]) / TOLERANCE[dtype][name.startswith("d")] for name in want}
        name = max(locally, key=locally.__getitem__)
        if locally[name] > LOCALLY:
            detail = f"{name}: one element is off by {locally[name]:.0f} times what all are on average allowed"
    return Check(not detail, error, name, allowed, detail)


class LayerReference:
    """torch.nn in float64 on the same rounded weights and inputs; keeps the last results for the case's other modes.

    On ATen's own kernels, step by step: cuDNN is among those that are judged.
    """

    def __init__(self) -> None:
        self.shape: tuple[object, ...] = ()
        self.results: dict[str, Tensor] = {}

    def __call__(self, case: Case, layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """What `case` should give, computed where x is; `layer` is the torch.nn layer that holds the weights."""
        shape = tuple(value for name, value in case.key.items() if name != "mode")
        if shape != self.shape:
            self.shape, self.results = (), {}
            exact = copy.deepcopy(layer).to(x.device, x.dtype).to(reference_dtype(case, x))
            dtype = next(exact.parameters()).dtype
            with precision("fp32"), without_cudnn():
                results = runner(exact, replace(case, mode=MODES[-1]), x.to(dtype), dy.to(dtype))()
            self.shape, self.results = shape, {name: value.detach() for name, value in results.items()}
        return {name: value for name, value in self.results.items() if case.gradients or name[0] != "d"}


@contextmanager
def without_cudnn() -> Iterator[None]:
    """In here PyTorch does not use cuDNN."""
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def reference_dtype(case: Case, x: Tensor) -> torch.dtype:
    """float64, or float32 where its buffers would not fit in a third of the free device memory."""
    if x.device.type != "cuda" or case.dtype in ("fp32", "fp64"):
        return torch.float64
    directions = case.layers * (1 + case.bidirectional)
    needed = case.seq * case.batch * case.hidden * directions * 14 * 8
    return torch.float64 if needed < torch.cuda.mem_get_info()[0] / 3 else torch.float32


def alive(device: str) -> bool:
    """Whether the device still works; an illegal access ends it for the whole process."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def timeouts_at_once() -> AbstractContextManager:
    """In here ours waits for each kernel and raises if a wait ran out in it, not at some later call."""
    return torch.autograd.set_detect_anomaly(True, check_nan=False)


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """In here memory that is asked for and not zeroed holds NaN: what nobody writes, or is read too early, shows.

    Else it might hold the right results of the run before.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_layer(layer: nn.Module, case: Case, x: Tensor, dy: Tensor, want: dict[str, Tensor]) -> Check:
    """One provider's layer on one case, against the reference's results."""
    with timeouts_at_once(), nan_in_new_memory():
        return compare(runner(layer, case, x, dy)(), want, case.dtype)
