"""What `probe` launches: kernels of probe_kernels, cuBLAS, a whole recurrence; their tensors, and what must come out.

Each can be run for any number of steps, so that the difference between a long run and a short one is free of what a
launch costs; `check` says after a run what is wrong with its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

import lstm_triton
from lstm_triton.launch import INTERPRETED, compile_kernel

from . import probe_kernels
from .cases import precision
from .timing import capture

#: How often a program looks before it gives up: about a second.
POLLS = 1 << 20
ROWS, WORDS = probe_kernels.ROWS.value, probe_kernels.WORDS.value
#: read_l2: loads of 16 bytes by 16 warps, 8 of them under way; 64 KiB a repeat, from a tile of 128 KiB.
BLOCK, LOADS, CHUNKS = 2048, 8, 2
BYTES_READ = BLOCK * LOADS * 4
#: Storage and accumulator of each kind of product, as Triton names them.
DTYPES = {"half": ("bf16", "fp32"), "tf32": ("fp32", "fp32"), "fp64": ("fp64", "fp64")}
#: Relative errors of a large product.
TOLERANCE = {"half": 1e-2, "tf32": 2e-3, "fp32": 1e-5, "fp64": 1e-12}
_TORCH = {"i32": torch.int32, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_TRITON = {"fp32": tl.float32, "fp64": tl.float64}


@dataclass(frozen=True)
class Form:
    """One compiled form of a kernel: what a process can compile ahead, and a launch then finds in Triton's cache."""

    kernel: str
    constants: tuple[tuple[str, Any], ...] = ()
    pointers: tuple[tuple[str, str], ...] = ()  # element types other than int32
    num_warps: int = 4
    cooperative: bool = False
    pdl: bool = False

    def launch(self, programs: int, *arguments: Any) -> None:
        getattr(probe_kernels, self.kernel)[(programs,)](*arguments, **self._constants(), **self._options())

    def compile_ahead(self, capability: int) -> Any:
        """Triton's CompiledKernel for a GPU that need not be there. Not under TRITON_INTERPRET=1."""
        kernel = getattr(probe_kernels, self.kernel)
        types = dict.fromkeys(kernel.arg_names, "i32") | dict(self.pointers)
        return compile_kernel(kernel, types, self._constants(), capability, self._options())

    def __str__(self) -> str:
        values = (f"{name}={value}" for name, value in self.constants)
        return " ".join([self.kernel, *values, *(["cooperative"] if self.cooperative else [])])

    def _constants(self) -> dict[str, Any]:
        found = {name: _TRITON.get(value, value) if name == "ACC" else value for name, value in self.constants}
        return found | ({"INTERPRETED": INTERPRETED} if self.kernel == "exchange" else {})

    def _options(self) -> dict[str, Any]:
        options = {"num_warps": self.num_warps, "maxnreg": 255, "enable_fp_fusion": True}
        return options | {"launch_cooperative_grid": self.cooperative, "launch_pdl": self.pdl}


class Launch(Protocol):
    """Something to time."""

    def prepare(self, count: int) -> None:
        """What has to be done before each run, and is not timed."""

    def run(self, count: int) -> None:
        """So many steps."""

    def check(self, count: int) -> str:
        """What is wrong with the result of the run before, empty if nothing."""


def exchange_form(protocol: str, programs: int) -> Form:
    members = 2 if protocol == "counter" else triton.next_power_of_2(programs)
    return Form("exchange", (("PROTOCOL", protocol), ("MEMBERS", members)), cooperative=True)


class Exchange:
    """Programs that wait for one another, step after step."""

    def __init__(self, protocol: str, programs: int, steps: int, device: str, polls: int = POLLS) -> None:
        self.form, self.programs, self.polls = exchange_form(protocol, programs), programs, polls
        found = exchanged(protocol, programs, steps).reshape(steps + 1, ROWS, programs * WORDS)
        self.expected = torch.from_numpy(found).to(device)
        self.tiles = torch.empty_like(self.expected[:-1])
        self.last = torch.empty_like(self.expected[0])
        self.sync = torch.empty(max(32, programs), dtype=torch.int32, device=device)
        self.error = torch.zeros(1, dtype=torch.int32, device=device)

    def prepare(self, count: int) -> None:
        self.tiles[:count].fill_(probe_kernels.EMPTY.value)
        self.sync.zero_()
        self.error.zero_()

    def run(self, count: int) -> None:
        self.form.launch(self.programs, self.tiles, self.last, self.sync, self.error, count, self.polls)

    def check(self, count: int) -> str:
        if self.error.item():
            return f"a program waited in vain, {self.polls} looks long"
        wrong = (self.tiles[:count] != self.expected[:count]).flatten(1).any(1).nonzero()
        if len(wrong):
            return f"not ordered: programs made wrong tiles of what they read, first at step {wrong[0].item()}"
        return "" if torch.equal(self.last, self.expected[count]) else "not ordered: the last tiles are wrong"


def exchanged(protocol: str, programs: int, steps: int) -> np.ndarray:
    """[steps + 1, ROWS, programs, WORDS] what `exchange` stores at each step, and its tiles after the last."""
    tiles = np.empty((steps + 1, ROWS, programs, WORDS), np.int32)
    tile = np.arange(ROWS * programs * WORDS).reshape(tiles.shape[1:]) % 1021
    for step in range(steps + 1):
        tiles[step] = tile
        seen = tile.min() if protocol == "data" else np.roll(tile, -(step + 1), axis=1)
        tile = (3 * tile + seen + 1) & probe_kernels.WORD_MASK.value
    return tiles


READ_FORM = Form("read_l2", (("BLOCK", BLOCK), ("LOADS", LOADS), ("CHUNKS", CHUNKS)), num_warps=16)


class ReadL2:
    """Every program reads a tile over and over: all the same one, or each its own."""

    def __init__(self, same: bool, programs: int, device: str) -> None:
        self.apart, self.programs = 0 if same else 1, programs
        shape = (1 if same else programs, CHUNKS, LOADS, BLOCK)
        found = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, shape, np.int32)
        self.chunk_sums = found.sum(2, dtype=np.int64)  # [tiles, CHUNKS, BLOCK]
        self.x = torch.from_numpy(found).to(device)
        self.sums = torch.empty(programs, BLOCK, dtype=torch.int32, device=device)

    def prepare(self, count: int) -> None:
        self.sums.fill_(-1)

    def run(self, count: int) -> None:
        READ_FORM.launch(self.programs, self.x, self.sums, count, self.apart)

    def check(self, count: int) -> str:
        times = np.array([(count + CHUNKS - 1 - chunk) // CHUNKS for chunk in range(CHUNKS)])
        expected = (self.chunk_sums * times[:, None]).sum(1).astype(np.int32)  # wraps as the kernel's does
        return "" if (self.sums.cpu().numpy() == expected).all() else "the sums of what was read are wrong"


def touch_form(kind: str) -> Form:
    return Form("touch", (("PDL", kind == "pdl"),), cooperative=kind == "cooperative", pdl=kind == "pdl")


class LaunchRow:
    """A row of launches, each of which does next to nothing; with "graph" as nodes of a captured graph."""

    def __init__(self, kind: str, programs: int, device: str) -> None:
        self.form, self.programs, self.graph = touch_form(kind), programs, kind == "graph"
        self.touched = torch.zeros(programs, dtype=torch.int32, device=device)
        self.replays: dict[int, Callable[[], Any]] = {}

    def prepare(self, count: int) -> None:
        if self.graph and count not in self.replays:
            self.replays[count] = capture(lambda: self._launch(count)).run
        self.touched.zero_()

    def run(self, count: int) -> None:
        if self.graph:
            self.replays[count]()
        else:
            self._launch(count)

    def check(self, count: int) -> str:
        wrong = self.touched[self.touched != count].tolist()
        return f"of {count} launches in a row {wrong[0]} left their mark" if wrong else ""

    def _launch(self, count: int) -> None:
        for _ in range(count):
            self.form.launch(self.programs, self.touched)


def multiply_form(how: str, kind: str, n: int) -> Form:
    """A K tile as long as the planner's for 16 rows."""
    storage, acc = DTYPES[kind]
    constants = (("K", depth(kind)), ("N", n), ("SPLIT_K", 4 if how == "batched" else 1), ("ACC", acc))
    pointers = (("rows_ptr", storage), ("weights_ptr", storage), ("out_ptr", acc))
    return Form("multiply", (*constants, ("PRECISION", "tf32" if kind == "tf32" else "ieee")), pointers)


def depth(kind: str) -> int:
    return 1024 // _TORCH[DTYPES[kind][0]].itemsize


class Multiply:
    """Products of 16 rows out of shared memory, on every SM."""

    def __init__(self, how: str, kind: str, n: int, programs: int, device: str) -> None:
        self.form, self.programs = multiply_form(how, kind, n), programs
        storage, acc = (_TORCH[name] for name in DTYPES[kind])
        generator = torch.Generator().manual_seed(0)
        # Exact in every dtype, also as tf32: only the sums are rounded.
        rows, weights = (torch.randn(m, depth(kind), generator=generator).bfloat16() for m in (ROWS, n))
        self.product = rows.double() @ weights.double().T
        self.rows, self.weights = (t.to(device, storage) for t in (rows, weights))
        self.out = torch.empty(programs, ROWS, n, dtype=acc, device=device)

    def prepare(self, count: int) -> None:
        self.out.fill_(float("nan"))

    def run(self, count: int) -> None:
        self.form.launch(self.programs, self.rows, self.weights, self.out, count)

    def check(self, count: int) -> str:
        # Every matrix instruction may cut off a last place of the growing sum.
        return _compare(self.out.cpu(), count * self.product.expand_as(self.out), 2e-5 * (1 + count))


class LargeProduct:
    """torch.matmul, that is cuBLAS, on square matrices."""

    def __init__(self, kind: str, size: int, device: str) -> None:
        self.kind = kind
        dtype = _TORCH[DTYPES[kind][0] if kind in DTYPES else "fp32"]
        generator = torch.Generator(device).manual_seed(0)
        self.a, self.b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
        self.out = torch.empty_like(self.a)

    def prepare(self, count: int) -> None:
        self.out.fill_(float("nan"))

    def run(self, count: int) -> None:
        with precision(self.kind):
            for _ in range(count):
                torch.matmul(self.a, self.b, out=self.out)

    def check(self, count: int) -> str:
        return _compare(self.out[:ROWS], self.a[:ROWS].double() @ self.b.double(), TOLERANCE[self.kind])


class Recurrence:
    """The smallest local recurrence: an LSTM of 16 rows and 16 hidden units."""

    def __init__(self, steps: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = (steps, 16, 16), (64, 16), (64, 16)
        x, *weights = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
        self.x, self.weights = x, [0.25 * w for w in weights]

    def prepare(self, count: int) -> None:
        self.y = None

    def run(self, count: int) -> None:
        with torch.no_grad():
            self.y, *_ = lstm_triton.functional.lstm(self.x[:count], None, None, *self.weights, engine="local")

    def check(self, count: int) -> str:
        first = min(count, 8)  # a later step does not change an earlier one
        inputs = [t.double() for t in (self.x[:first], *self.weights)]
        expected, *_ = lstm_triton.reference.lstm(inputs[0], None, None, *inputs[1:])
        wrong = "" if self.y.isfinite().all() else "not finite"
        return wrong or _compare(self.y[:first], expected, 2e-2)


def _compare(found: Tensor, expected: Tensor, allowed: float) -> str:
    error = ((found.double() - expected).norm() / expected.norm()).item()
    return "" if error <= allowed else f"wrong result: relative error {error:.1e}, allowed {allowed:.1e}"
