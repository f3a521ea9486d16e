"""Allocate and launch: from a LaunchPlan and tensors to the two sequence kernels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .constexprs import INTERPRETED, TRITON_DTYPES, Options, accumulator, constexprs_of, parts, saves, slots
from .devices import INTERPRETER, Device, device_like
from .kernels import sync
from .kernels.backward import sequence_backward
from .kernels.forward import sequence_forward
from .plans import KernelPlan, LaunchPlan

#: Triton's interpreter keeps its state in module globals; a GPU needs no such lock.
_one_at_a_time: AbstractContextManager = threading.Lock() if INTERPRETED else contextlib.nullcontext()

#: Triton from 3.7 on states an (empty) attribute for every constant of a kernel, before that for strings alone.
_STATES_CONSTANTS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)


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
    normed: Tensor | None  # [T, B, G*H] the recurrent product, normalised
    stats: Tensor | None  # [T, B, 4] mean and 1 / standard deviation of the recurrent product, and of c


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
    params: Tensor | None = None,
    mask: Tensor | None = None,
    steps: Tensor | None = None,
    seed: Tensor | None = None,
    reverse: bool,
    training: bool,
    save_states: bool = False,
) -> Forward:
    """Run the forward kernel. gates [T, B, G*H] holds the input product; in training it comes back as backward reads
    it.

    params [K, H]: the rows that spec.rows names. mask [plan.masks, B, P]: what h[t-1] is multiplied by. steps [T, B]
    says which steps count and which begin anew (spec.VALID, spec.RESET). seed [1] int64: zoneout draws. save_states
    asks for c, where the cell has one, outside training as well.
    """
    T, B, _ = gates.shape
    spec, kernel = plan.spec, plan.forward
    _, save_extra = saves(spec)
    save_extra = (training and save_extra) or (save_states and c0 is not None)
    save_norm = training and spec.layer_norm
    high = accumulator(gates.dtype)
    h = gates.new_empty(T, B, w_hh.shape[1])
    extra = gates.new_empty(T, B, plan.H) if save_extra else None
    rows = gates.new_empty(T, B, plan.H) if spec.two_products else None
    normed = gates.new_empty(gates.shape) if save_norm else None
    stats = gates.new_empty(T, B, 4, dtype=high) if save_norm else None
    # A copy even where the dtype fits: the kernel updates it.
    state = (h0 if c0 is None else c0).to(high, memory_format=torch.contiguous_format, copy=True)
    flags = {"REVERSE": reverse, "MASKED": steps is not None, "SAVE_EXTRA": save_extra}
    constants = constexprs_of(plan, kernel, training, seed is not None) | flags
    tensors = (
        gates, w_hh, b_hh, w_hr, params, mask, steps, seed if constants["OPT"].random else None, h0, h, state, extra,
        rows, _dropped(plan, h, h0, mask, reverse), normed, stats, *_exchange(plan, kernel, gates),
    )  # fmt: skip
    with _synchronisation(kernel, gates) as waiting:
        for first, count in _launches(kernel, T):
            start = T - 1 - first if reverse else first
            sizes = (count, B, start, int(first > 0))
            _run(sequence_forward, kernel, (*tensors, *waiting), sizes, constants)
    return Forward(h, state, extra, normed, stats)


def backward(
    plan: LaunchPlan,
    dy: Tensor,
    dh_n: Tensor,
    dstate_n: Tensor,
    dparams: Tensor | None,
    gates: Tensor | None,
    states: Tensor,
    state0: Tensor,
    extra: Tensor | None,
    w_hh: Tensor,
    *,
    normed: Tensor | None = None,
    stats: Tensor | None = None,
    w_hr: Tensor | None = None,
    params: Tensor | None = None,
    mask: Tensor | None = None,
    steps: Tensor | None = None,
    seed: Tensor | None = None,
    dcells: Tensor | None = None,
    reverse: bool,
    first_step: int = 0,
) -> Backward:
    """Run the backward kernel (back-propagation through time).

    dy [T, B, P] and, by the state after each step, dcells [T, B, H], both 0 where a step does not count; dh_n [B, P],
    dstate_n [B, H] in the accumulator's dtype, overwritten; dparams [B, options.dparams, H], likewise, to be added to;
    gates, extra, normed and stats as `forward` left them; states [T, B, H] the state after each step and state0 [B, H]
    before the first. first_step: where these steps begin in the whole sequence, which zoneout's draws go by.
    """
    T, B, _ = dy.shape
    kernel = plan.backward
    da = dy.new_empty(T, B, slots(plan.spec)[0] * plan.H)
    dh_all = None if w_hr is None else dy.new_empty(dy.shape)
    flags = {"REVERSE": reverse, "MASKED": steps is not None, "HAS_DCELLS": dcells is not None}
    constants = constexprs_of(plan, kernel, True, seed is not None) | flags
    tensors = (
        dy, dcells, gates, states, state0, extra, normed, stats, w_hh, w_hr, params, mask, steps,
        seed if constants["OPT"].random else None, da, dh_all, dh_n, dstate_n, dparams, *_exchange(plan, kernel, dy),
    )  # fmt: skip
    with _synchronisation(kernel, dy) as waiting:
        for first, count in _launches(kernel, T):
            start = first if reverse else T - 1 - first
            sizes = (count, B, start, first_step, int(first > 0), int(first + count == T))
            _run(sequence_backward, kernel, (*tensors, *waiting), sizes, constants)
    return Backward(da, dh_n, dstate_n, dh_all)


def _dropped(plan: LaunchPlan, h: Tensor, h0: Tensor, mask: Tensor | None, reverse: bool) -> Tensor | None:
    """Room for h[t] times the masks, with that of h0 before the first step: [T + 1, B, masks * P]."""
    if mask is None or plan.forward.engine == "local":
        return None
    T, B, P = h.shape
    rows = h.new_empty(T + 1, B, len(mask) * P)
    rows[T if reverse else 0] = (h0 * mask).transpose(0, 1).reshape(B, -1)
    return rows


def _exchange(plan: LaunchPlan, kernel: KernelPlan, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where programs send one another the sums of a row, and a launch leaves tiles for the next one."""
    if not plan.spec.layer_norm or kernel.engine == "local":
        return None, None
    B, high = like.shape[1], accumulator(like.dtype)
    sums = like.new_empty(2, B, kernel.n_h, 2, dtype=high)
    handed_over = kernel.engine == "step"
    return sums, like.new_empty(B, (plan.spec.gates + 2) * plan.H, dtype=high) if handed_over else None


def compile_ahead(
    plan: LaunchPlan,
    direction: str,
    *,
    training: bool = True,
    reverse: bool = False,
    masked: bool = False,
    cells: bool = False,
    random: bool = False,
    part: int = 0,
) -> Any:
    """Compile one kernel of `plan` for plan.device, which need not be there; returns triton's CompiledKernel.

    masked: with step flags. cells: with every c[t] among the results. random: zoneout draws. part: which of a step's
    launches, where the step engine needs several. Exactly what a launch would compile: the same source, constants and
    options. Not under TRITON_INTERPRET=1.
    """
    kernel_plan: KernelPlan = getattr(plan, direction)
    kernel = sequence_forward if direction == "forward" else sequence_backward
    constants = constexprs_of(plan, kernel_plan, training, random) | {"REVERSE": reverse, "MASKED": masked}
    if direction == "forward":
        constants["SAVE_EXTRA"] |= cells
    else:
        constants["HAS_DCELLS"] = cells
    opt: Options = constants["OPT"]
    high = str(TRITON_DTYPES[accumulator(plan.dtype)])
    types = {"counter_ptr": "i32", "error_ptr": "i32", "steps_ptr": "u8", "seed_ptr": "i64"}
    in_high = ("state_ptr", "dh_ptr", "dstate_ptr", "stats_ptr", "sums_ptr", "scratch_ptr", "dparams_ptr")
    types |= dict.fromkeys(in_high, high)
    types = {name: types.get(name, str(TRITON_DTYPES[plan.dtype])) for name in kernel.arg_names}
    forward = direction == "forward"
    local, saved = constants["PLAN"].LOCAL, constants["SAVE_GATES"] or not forward
    absent = {
        "b_hh_ptr": forward and not constants["HAS_BIAS"],
        "w_hr_ptr": not opt.projected,
        "params_ptr": not opt.params,
        "mask_ptr": not opt.masks,
        "steps_ptr": not constants["MASKED"],
        "seed_ptr": not opt.random,
        "r_ptr": not opt.two_products,
        "drop_ptr": not opt.masks or local,
        "normed_ptr": not (opt.norm and saved),
        "stats_ptr": not (opt.norm and saved),
        "sums_ptr": not opt.norm or local,
        "scratch_ptr": not opt.norm or kernel_plan.engine != "step",
        "dh_all_ptr": not opt.projected,
        "dparams_ptr": not opt.dparams,
        "dcells_ptr": not forward and not constants["HAS_DCELLS"],
        "extra_ptr": not constants["SAVE_EXTRA"],
        "gates_ptr": not forward and not constants["SAVE_GATES"],
        "counter_ptr": not constants["PLAN"].SYNC,
        "error_ptr": not constants["PLAN"].SYNC,
    }
    constants |= dict.fromkeys(name for name in kernel.arg_names if absent.get(name))
    constants |= parts(kernel_plan, opt)[part]
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


def _options(kernel: KernelPlan) -> dict[str, Any]:
    # Cooperative: an oversized grid of waiting programs is refused by the driver instead of never ending.
    # maxnreg: without it the assembler spills a little to fit more programs on an SM than are ever launched.
    return {
        "num_warps": kernel.num_warps,
        "maxnreg": 255,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": kernel.synchronised,
    }


def _launches(kernel: KernelPlan, T: int) -> Iterator[tuple[int, int]]:
    """First step and number of steps of each launch, in the order in which they run: all at once, or one by one."""
    if kernel.engine == "step":
        yield from ((step, 1) for step in range(T))
    else:
        yield 0, T


def _run(
    kernel: Any,
    plan: KernelPlan,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    constants: dict[str, Any],
) -> None:
    with _one_at_a_time:
        for part in parts(plan, constants["OPT"]):
            for first_group in range(0, plan.n_b, plan.groups_at_once):
                groups = min(plan.groups_at_once, plan.n_b - first_group)
                kernel[(groups * plan.n_h,)](*tensors, *sizes, first_group, **constants, **part, **_options(plan))


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
