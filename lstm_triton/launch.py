"""Allocate and launch: from a LaunchPlan and tensors to the two sequence kernels. The only importer of the kernels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .devices import INTERPRETER, Device, device_like
from .kernels import cells, sequence, sync
from .plans import KernelPlan, LaunchPlan
from .spec import CellSpec

#: True where TRITON_INTERPRET=1 was set when triton was imported: kernels run on the CPU, one program after another.
INTERPRETED = isinstance(sequence.sequence_forward, InterpretedFunction)

#: How often a program looks for a missing tile before it gives up: some ten seconds on a GPU, some seconds interpreted.
POLLS = 1 << 14 if INTERPRETED else 1 << 24

#: Triton's interpreter keeps its state in module globals; a GPU needs no such lock.
_one_at_a_time: AbstractContextManager = threading.Lock() if INTERPRETED else contextlib.nullcontext()

#: Triton from 3.7 on states an (empty) attribute for every constant of a kernel, before that for strings alone.
_STATES_CONSTANTS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)


@dataclass(frozen=True)
class _Cell:
    """What the kernels need to know of a cell, beyond its two functions."""

    forward: Any
    backward: Any
    slots: int  # D: gradients stored for each hidden unit
    h_slot: int  # where those by the recurrent product begin
    save_gates: bool  # backward reads the activated gates
    save_extra: bool  # and one more tile a unit


_CELLS = {
    ("lstm", "tanh"): _Cell(cells.lstm_forward, cells.lstm_backward, 4, 0, True, True),
    ("gru", "tanh"): _Cell(cells.gru_forward, cells.gru_backward, 4, 1, True, True),
    ("rnn", "tanh"): _Cell(cells.rnn_tanh_forward, cells.rnn_tanh_backward, 1, 0, False, False),
    ("rnn", "relu"): _Cell(cells.rnn_relu_forward, cells.rnn_relu_backward, 1, 0, False, False),
}
_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def slots(spec: CellSpec) -> tuple[int, int]:
    """D and the first recurrent slot: the layout of what `backward` returns."""
    cell = _CELLS[spec.cell, spec.activation]
    return cell.slots, cell.h_slot


def saves(spec: CellSpec) -> tuple[bool, bool]:
    """Whether training keeps the activated gates [T, B, G*H] and the extra tile [T, B, H]."""
    cell = _CELLS[spec.cell, spec.activation]
    return cell.save_gates, cell.save_extra


def device_of(tensor: Tensor) -> Device:
    """The planner's view of the device that holds `tensor`. Raises RuntimeError where no kernel runs."""
    if not (tensor.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"lstm_triton's kernels need CUDA tensors (or TRITON_INTERPRET=1 before triton is imported), got one on "
            f"{tensor.device}: a program made on kernels runs on kernels only"
        )
    return _cuda_device(tensor.device.index or 0) if tensor.is_cuda and not INTERPRETED else INTERPRETER


@cache
def _cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return device_like(
        p.name,
        p.major * 10 + p.minor,
        p.multi_processor_count,
        getattr(p, "shared_memory_per_block_optin", 99 << 10),
        getattr(p, "shared_memory_per_multiprocessor", 100 << 10),
    )


class Forward(NamedTuple):
    """What the forward kernel leaves."""

    h: Tensor  # [T, B, P] after each step; where a step does not count, as it was before
    state: Tensor  # [B, H] after the last step, in fp32 or fp64: c for the LSTM, h for the others
    extra: Tensor | None  # [T, B, H] what else backward reads: c of the LSTM, W_hn h[t-1] + b_hn of the GRU
    r: Tensor | None  # [T, B, H] what was projected


class Backward(NamedTuple):
    """What the backward kernel leaves."""

    da: Tensor  # [T, B, D*H] by the pre-activations, 0 where a step does not count
    dh: Tensor  # [B, P] by h0, without what goes through W_hh
    dstate: Tensor  # [B, H] by the first state
    dh_all: Tensor | None  # [T, B, P] by the projected h, all of it; 0 where a step does not count


def forward(
    plan: LaunchPlan,
    gates: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    *,
    w_hr: Tensor | None = None,
    steps: Tensor | None = None,
    reverse: bool,
    training: bool,
    save_states: bool = False,
) -> Forward:
    """Run the forward kernel. gates [T, B, G*H] holds the input product; in training it comes back activated.

    steps [T, B] says which steps count and which begin anew (spec.VALID, spec.RESET). save_states asks for c, where the
    cell has one, outside training as well.
    """
    T, B, _ = gates.shape
    cell = _CELLS[plan.spec.cell, plan.spec.activation]
    save_extra = (training and cell.save_extra) or (save_states and c0 is not None)
    h = gates.new_empty(T, B, w_hh.shape[1])
    extra = gates.new_empty(T, B, plan.H) if save_extra else None
    r = None if w_hr is None else gates.new_empty(T, B, plan.H)
    # A copy even where the dtype fits: the kernel updates it.
    state = (h0 if c0 is None else c0).to(_accumulator(gates.dtype), memory_format=torch.contiguous_format, copy=True)
    flags = {"REVERSE": reverse, "MASKED": steps is not None, "SAVE_EXTRA": save_extra}
    constants = _constants(plan, plan.forward, training) | flags
    tensors = (gates, w_hh, b_hh, w_hr, steps, h0, h, state, extra, r)
    with _synchronisation(plan.forward, gates) as waiting:
        for first, count in _launches(plan.forward, T):
            start = T - 1 - first if reverse else first
            sizes = (count, B, start, int(first > 0))
            _run(sequence.sequence_forward, plan.forward, (*tensors, *waiting), sizes, constants)
    return Forward(h, state, extra, r)


def backward(
    plan: LaunchPlan,
    dy: Tensor,
    dh_n: Tensor,
    dstate_n: Tensor,
    gates: Tensor | None,
    states: Tensor,
    state0: Tensor,
    extra: Tensor | None,
    w_hh: Tensor,
    *,
    w_hr: Tensor | None = None,
    steps: Tensor | None = None,
    dcells: Tensor | None = None,
    reverse: bool,
) -> Backward:
    """Run the backward kernel (back-propagation through time).

    dy [T, B, P] and, by the state after each step, dcells [T, B, H], both 0 where a step does not count; dh_n [B, P],
    dstate_n [B, H] in the accumulator's dtype, overwritten; gates and extra as `forward` left them; states [T, B, H]
    the state after each step and state0 [B, H] before the first.
    """
    T, B, _ = dy.shape
    cell = _CELLS[plan.spec.cell, plan.spec.activation]
    da = dy.new_empty(T, B, cell.slots * plan.H)
    dh_all = None if w_hr is None else dy.new_empty(dy.shape)
    flags = {"REVERSE": reverse, "MASKED": steps is not None, "HAS_DCELLS": dcells is not None}
    constants = _constants(plan, plan.backward, True) | flags
    tensors = (dy, dcells, gates, states, state0, extra, w_hh, w_hr, steps, da, dh_all, dh_n, dstate_n)
    with _synchronisation(plan.backward, dy) as waiting:
        for first, count in _launches(plan.backward, T):
            start = first if reverse else T - 1 - first
            sizes = (count, B, start, int(first > 0), int(first + count == T))
            _run(sequence.sequence_backward, plan.backward, (*tensors, *waiting), sizes, constants)
    return Backward(da, dh_n, dstate_n, dh_all)


def compile_ahead(
    plan: LaunchPlan,
    direction: str,
    *,
    training: bool = True,
    reverse: bool = False,
    masked: bool = False,
    cells: bool = False,
    part: int = 0,
) -> Any:
    """Compile one kernel of `plan` for plan.device, which need not be there; returns triton's CompiledKernel.

    masked: with step flags. cells: with every c[t] among the results. part: which of a step's two products, where the
    step engine projects. Exactly what a launch would compile: the same source, constants and options. Not under
    TRITON_INTERPRET=1.
    """
    kernel_plan: KernelPlan = getattr(plan, direction)
    kernel = sequence.sequence_forward if direction == "forward" else sequence.sequence_backward
    constants = _constants(plan, kernel_plan, training) | {"REVERSE": reverse, "MASKED": masked}
    if direction == "forward":
        constants["SAVE_EXTRA"] |= cells
    else:
        constants["HAS_DCELLS"] = cells
    types = {"counter_ptr": "i32", "error_ptr": "i32", "steps_ptr": "u8"}
    types |= dict.fromkeys(("state_ptr", "dh_ptr", "dstate_ptr"), str(_TRITON_DTYPES[_accumulator(plan.dtype)]))
    types = {name: types.get(name, str(_TRITON_DTYPES[plan.dtype])) for name in kernel.arg_names}
    absent = {
        "b_hh_ptr": direction == "forward" and not constants["HAS_BIAS"],
        "w_hr_ptr": not constants["PROJECTED"],
        "steps_ptr": not constants["MASKED"],
        "r_ptr": not constants["PROJECTED"],
        "dh_all_ptr": not constants["PROJECTED"],
        "dcells_ptr": direction == "backward" and not constants["HAS_DCELLS"],
        "extra_ptr": not constants["SAVE_EXTRA"],
        "gates_ptr": direction == "backward" and not constants["SAVE_GATES"],
        "counter_ptr": not constants["SYNC"],
        "error_ptr": not constants["SYNC"],
    }
    constants |= dict.fromkeys(name for name in kernel.arg_names if absent.get(name))
    constants |= _products(kernel_plan, constants)[part]
    return compile_kernel(kernel, types, constants, plan.device.capability, _options(kernel_plan))


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, options: Mapping[str, Any]
) -> Any:
    """Compile any kernel for a GPU that need not be there, as a launch with such arguments would.

    types: of what the arguments called *_ptr point to, which is 16-byte aligned; all others that are not among the
    constants are int32.
    """
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    # What a launch states of its arguments, so that the compilation cache knows the kernel again.
    attrs: dict[tuple[int], list] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[i,] = "constexpr", constants[name]
            if _STATES_CONSTANTS or isinstance(constants[name], str):
                attrs[i,] = []
        elif name.endswith("_ptr"):
            signature[name], attrs[i,] = f"*{types[name]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(options))


def _constants(plan: LaunchPlan, kernel: KernelPlan, training: bool) -> dict[str, Any]:
    """The kernel's constexpr arguments, apart from those of one call: REVERSE, MASKED and the like."""
    spec = plan.spec
    cell = _CELLS[spec.cell, spec.activation]
    storage = _TRITON_DTYPES[plan.dtype]
    constants: dict[str, Any] = {
        "G": spec.gates,
        "H": plan.H,
        "P": spec.output(plan.H),
        "BLOCK_B": kernel.block_b,
        "BLOCK_H": kernel.block_h,
        "TILES": kernel.tiles,
        "TILES_P": kernel.tiles_p,
        "N_H": kernel.n_h,
        "BLOCK_K": kernel.block_k,
        "BLOCK_K_R": kernel.block_k_r,
        "SPLIT_K": kernel.split_k,
        "AHEAD": kernel.ahead,
        "STAGES": kernel.stages,
        "LOCAL": kernel.engine == "local",
        "SYNC": kernel.synchronised,
        "RESIDENT": kernel.resident,
        "PROJECTED": spec.proj > 0,
        "SAVE_GATES": training and cell.save_gates,
        "SAVE_EXTRA": training and cell.save_extra,
        # bf16 arithmetic is broken in the interpreter: multiply in fp32 there, which is exact for bf16 operands.
        "DOT": tl.float32 if INTERPRETED and storage == tl.bfloat16 else storage,
        "ACC": _TRITON_DTYPES[_accumulator(plan.dtype)],
        "PRECISION": plan.precision,
        "POLLS": POLLS,
    }
    if kernel.direction == "forward":
        lanes = 1 << (spec.gates - 1).bit_length()
        return constants | {"CELL": cell.forward, "LANES": lanes, "HAS_BIAS": spec.bias}
    return constants | {"CELL": cell.backward, "D": cell.slots, "H_SLOT": cell.h_slot}


def _options(kernel: KernelPlan) -> dict[str, Any]:
    # Cooperative: an oversized grid of waiting programs is refused by the driver instead of never ending.
    # maxnreg: without it the assembler spills a little to fit more programs on an SM than are ever launched.
    return {
        "num_warps": kernel.num_warps,
        "maxnreg": 255,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": kernel.synchronised,
    }


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _launches(kernel: KernelPlan, T: int) -> Iterator[tuple[int, int]]:
    """First step and number of steps of each launch, in the order in which they run: all at once, or one by one."""
    if kernel.engine == "step":
        yield from ((step, 1) for step in range(T))
    else:
        yield 0, T


def _products(plan: KernelPlan, constants: Mapping[str, Any]) -> tuple[dict[str, bool], ...]:
    """Which of a step's products each launch does: all in one, but where programs cannot wait between two of them."""
    if constants["PROJECTED"] and plan.engine == "step":
        return {"FIRST": True, "SECOND": False}, {"FIRST": False, "SECOND": True}
    return ({"FIRST": True, "SECOND": True},)


def _run(
    kernel: Any,
    plan: KernelPlan,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    constants: dict[str, Any],
) -> None:
    with _one_at_a_time:
        for products in _products(plan, constants):
            for first_group in range(0, plan.n_b, plan.groups_at_once):
                groups = min(plan.groups_at_once, plan.n_b - first_group)
                kernel[(groups * plan.n_h,)](*tensors, *sizes, first_group, **constants, **products, **_options(plan))


@contextlib.contextmanager
def _synchronisation(kernel: KernelPlan, like: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Zeroed counters and the device's error word, under the tensors' own device.

    The word is looked at before a launch, when whatever an earlier launch had to say has arrived without anyone waiting
    for it; at once where that costs nothing (interpreted) or torch's anomaly detection asks for it.
    """
    with torch.cuda.device_of(like):
        if not kernel.synchronised:
            yield None, None
            return
        error = _error_word(like.device)
        _raise_if_set(error)
        yield torch.zeros(kernel.n_b * sync.COUNTER_STRIDE.value, dtype=torch.int32, device=like.device), error
        if INTERPRETED:
            _raise_if_set(error)
        elif torch.is_anomaly_enabled():
            torch.cuda.current_stream().synchronize()
            _raise_if_set(error)


@cache
def _error_word(device: torch.device) -> Tensor:
    """One int32 in host memory that a kernel sets when a wait runs out: reading it needs no synchronisation."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")


def raise_timeout(device: torch.device) -> None:
    """Raise if a wait ran out in a kernel that has ended on this device (and was not reported yet)."""
    _raise_if_set(_error_word(device))


def _raise_if_set(error: Tensor) -> None:
    if error.item():
        error.zero_()
        raise RuntimeError(
            "lstm_triton: a program waited in vain for its group, so an earlier result holds NaN. The programs of a "
            "group must run at the same time: another kernel may have held the GPU, or Triton's interpreter ran them "
            "one by one."
        )
