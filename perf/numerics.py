"""Whether results are right, asked before how fast they came: every output and gradient against float64.

`check_layer` judges one cell of the sweep, provider by provider. `check_engine` judges one engine on one odd shape,
with gradients by the final states, bit-for-bit repeatability, and a sequence's independence of the rest of its batch.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from .providers import DTYPES, Case, precision, runner

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
ENGINES = ("local", "resident", "streamed", "step")
CELLS = ("lstm", "gru", "rnn")
#: Every dtype reads NaN from bytes of this value.
NAN_BYTE = 255


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
    return Check(share <= 1, error, name, allowed, detail)


class LayerReference:
    """torch.nn in float64 on the same rounded weights and inputs; keeps the last results for the case's other mode."""

    def __init__(self) -> None:
        self.shape: tuple[object, ...] = ()
        self.results: dict[str, Tensor] = {}

    def __call__(self, case: Case, layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """What `case` should give, computed where x is; `layer` is the torch.nn layer that holds the weights."""
        shape = tuple(value for name, value in case.key.items() if name not in ("mode", "engine"))
        if shape != self.shape:
            self.shape, self.results = (), {}
            exact = copy.deepcopy(layer).to(x.device, x.dtype).to(reference_dtype(case, x))
            dtype = next(exact.parameters()).dtype
            with precision("fp32"):
                results = runner(exact, replace(case, mode="fwdbwd"), x.to(dtype), dy.to(dtype))()
            self.shape, self.results = shape, {name: value.detach() for name, value in results.items()}
        return {name: value for name, value in self.results.items() if case.mode == "fwdbwd" or name[0] != "d"}


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


def poison_free_memory(device: str) -> None:
    """Leave NaN in the memory that the next allocations will get: an element that nobody writes then shows."""
    if device == "cuda":
        sizes = 1 << 28, 1 << 22, 1 << 18
        blocks = [torch.full((size,), NAN_BYTE, dtype=torch.uint8, device=device) for size in sizes]
        del blocks


def check_layer(layer: nn.Module, case: Case, x: Tensor, dy: Tensor, want: dict[str, Tensor]) -> Check:
    """One provider's layer on one case, against the reference's results."""
    poison_free_memory(x.device.type)
    with timeouts_at_once():
        return compare(runner(layer, case, x, dy)(), want, case.dtype)


@dataclass(frozen=True)
class Problem:
    """One engine on one shape."""

    cell: str
    engine: str
    dtype: str
    seq: int
    batch: int
    hidden: int
    width: int  # of the input
    tile: tuple[int, int] | None = None
    bias: bool = True

    @property
    def name(self) -> str:
        tile = "" if self.tile is None else f" tile={self.tile[0]}x{self.tile[1]}"
        return f"{self.engine} {self.cell} {self.dtype} T={self.seq} B={self.batch} H={self.hidden}{tile}"


@dataclass(frozen=True)
class Tensors:
    """The arguments of one call of the functions, in their order, and the gradients by what it returns."""

    arguments: dict[str, Tensor | None]
    outer: list[Tensor]


def draw(problem: Problem, seed: int = 0) -> Tensors:
    """Random arguments on the CPU: weights and states uniform and normal as in a freshly made layer, then rounded."""
    p, generator = problem, torch.Generator().manual_seed(seed)
    rows = {"lstm": 4, "gru": 3, "rnn": 1}[p.cell] * p.hidden
    scale = p.hidden**-0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[p.dtype])

    def uniform(*shape: int) -> Tensor:
        return ((torch.rand(shape, generator=generator) * 2 - 1) * scale).to(DTYPES[p.dtype])

    states = 2 if p.cell == "lstm" else 1
    arguments: dict[str, Tensor | None] = {"x": normal(p.seq, p.batch, p.width)}
    arguments |= {name: normal(p.batch, p.hidden) for name in ("h0", "c0")[:states]}
    arguments |= {"w_ih": uniform(rows, p.width), "w_hh": uniform(rows, p.hidden)}
    arguments |= {name: uniform(rows) if p.bias else None for name in ("b_ih", "b_hh")}
    outer = [normal(p.seq, p.batch, p.hidden)] + [normal(p.batch, p.hidden) for _ in range(states)]
    return Tensors(arguments, outer)


def call(problem: Problem, tensors: Tensors, device: str, engine: str | None) -> dict[str, Tensor]:
    """Outputs, final states and all gradients; torch.nn's function in float64 on the CPU where `engine` is None."""
    dtype = torch.float64 if engine is None else DTYPES[problem.dtype]
    leaves = {
        name: None if value is None else value.to(device, dtype).requires_grad_()
        for name, value in tensors.arguments.items()
    }
    if engine is None:
        results = _torch_function(problem, leaves)
    else:
        import lstm_triton as lt

        with precision(problem.dtype):
            results = getattr(lt.functional, problem.cell)(*leaves.values(), engine=engine, tile=problem.tile)
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    outer = [gradient.to(device, dtype) for gradient in tensors.outer]
    with precision(problem.dtype):
        gradients = torch.autograd.grad(results, list(present.values()), outer)
    found = dict(zip(("y", "h_n", "c_n"), results, strict=False))
    found |= {f"d{name}": gradient for name, gradient in zip(present, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def _torch_function(problem: Problem, leaves: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    function = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh}[problem.cell]
    hx = [leaves[name].unsqueeze(0) for name in ("h0", "c0") if name in leaves]
    weights = [leaves[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if leaves[name] is not None]
    # (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    results = function(leaves["x"], hx if len(hx) == 2 else hx[0], weights, problem.bias, 1, 0.0, False, False, False)
    return results[0], *(state.squeeze(0) for state in results[1:])


@lru_cache(maxsize=1)
def expected(problem: Problem) -> dict[str, Tensor]:
    """What every engine should give; engines come one after another, so the last is worth keeping."""
    return call(problem, draw(problem), "cpu", None)


def check_engine(problem: Problem, device: str, *, repeat: bool = True) -> Check:
    """One engine against float64; with `repeat` also twice the same bits, and the same bits beside other sequences."""
    with timeouts_at_once():
        return _check_engine(problem, device, repeat)


def _check_engine(problem: Problem, device: str, repeat: bool) -> Check:
    tensors = draw(problem)
    poison_free_memory(device)
    got = call(problem, tensors, device, problem.engine)
    verdict = compare(got, expected(replace(problem, engine="", tile=None)), problem.dtype)
    if not verdict.passed or not repeat:
        return verdict
    again = call(problem, tensors, device, problem.engine)
    changed = [name for name in got if not torch.equal(got[name], again[name])]
    if changed:
        return Check(False, verdict.error, changed[0], 0.0, f"{', '.join(changed)}: other bits in a second run")
    if problem.batch > 1:
        changed = _changed_by_neighbours(problem, tensors, device, got)
        if changed:
            return Check(
                False, verdict.error, changed[0], 0.0, f"{', '.join(changed)}: depends on the rest of the batch"
            )
    return verdict


def _changed_by_neighbours(problem: Problem, tensors: Tensors, device: str, got: dict[str, Tensor]) -> list[str]:
    """Which results of the last sequence change when every other sequence of the batch becomes NaN."""
    row = problem.batch - 1
    arguments = dict(tensors.arguments)
    for name in {"x", "h0", "c0"} & arguments.keys():
        arguments[name] = arguments[name].clone()
        arguments[name][..., :row, :] = math.nan
    other = call(problem, Tensors(arguments, tensors.outer), device, problem.engine)
    own = [name for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0") if name in got]
    return [name for name in own if not torch.equal(got[name][..., row, :], other[name][..., row, :])]
