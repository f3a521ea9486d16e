"""Allocate and launch: from a LaunchPlan and tensors to the two sequence kernels. The only importer of the kernels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .devices import INTERPRETER, Device, device_like
from .kernels import cells, sync
from .kernels.backward import sequence_backward
from .kernels.forward import sequence_forward
from .plans import KernelPlan, LaunchPlan
from .spec import EPSILON, Activation, CellSpec, activation_of

#: True where TRITON_INTERPRET=1 was set when triton was imported: kernels run on the CPU, one program after another.
INTERPRETED = isinstance(sequence_forward, InterpretedFunction)

#: How often a program looks for a missing tile before it gives up: some ten seconds on a GPU, some seconds interpreted.
POLLS = 1 << 14 if INTERPRETED else 1 << 24

#: Triton's interpreter keeps its state in module globals; a GPU needs no such lock.
_one_at_a_time: AbstractContextManager = threading.Lock() if INTERPRETED else contextlib.nullcontext()

#: Triton from 3.7 on states an (empty) attribute for every constant of a kernel, before that for strings alone.
_STATES_CONSTANTS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)


class Options(NamedTuple):
    """OPT of the kernels: what a cell's functions and the sequence kernels have to know of a CellSpec."""

    has_c: bool  # a cell state beside h
    # Of the candidate, the gates, and the LSTM's c: (name, alpha, beta, is a gate kept by its value). Tuples are
    # constexpr here already, for Triton 3.6, which takes others apart where a function hands them on.
    activation: tl.constexpr
    recurrent: tl.constexpr
    output: tl.constexpr
    g: int  # where the LSTM's gate g stands; o comes after it
    peephole: bool
    coupled: bool
    cell_clip: float | None
    gate_clip: float | None
    projected: bool
    reset_before: bool
    two_products: bool  # either of these two
    keep_gates: bool  # gates are kept at all
    remake_cell: bool  # backward computes c[t] again, since the state is something else
    norm: bool
    norm_row: int  # the first row of params that is layer normalisation's
    epsilon: float
    params: int  # rows of params
    dparams: int  # of which there are gradients; with norm, those by b_hh come after
    masks: int  # by which h[t-1] is multiplied: none, one, or one a gate
    zone_h: tl.constexpr  # (zoneout's probability, and of 2^24)
    zone_state: tl.constexpr  # of the state: c, or h
    random: bool  # zoneout draws; else it takes the mean
    h_slot: int  # of a cell's slots the first of those by the recurrent product


class _Cell(NamedTuple):
    """A cell's functions, see kernels/cells.py."""

    forward: Any
    output: Any
    backward_output: Any
    candidate: Any
    backward: Any


_CELLS = {
    "lstm": _Cell(
        cells.lstm_forward, cells.lstm_output, cells.lstm_backward_output, cells.lstm_candidate, cells.lstm_backward
    ),
    "gru": _Cell(
        cells.gru_forward, cells.same_output, cells.same_backward_output, cells.same_candidate, cells.gru_backward
    ),
    "rnn": _Cell(
        cells.rnn_forward, cells.same_output, cells.same_backward_output, cells.same_candidate, cells.rnn_backward
    ),
}
_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def slots(spec: CellSpec) -> tuple[int, int]:
    """D and the first recurrent slot: the layout of what `backward` returns."""
    if spec.layer_norm:  # those by the recurrent product go through the normalisation
        return 2 * spec.gates, spec.gates
    return (4, 1) if spec.cell == "gru" and spec.reset_after else (spec.gates, 0)


def saves(spec: CellSpec) -> tuple[bool, bool]:
    """Whether training keeps the gates [T, B, G*H] and the extra tile [T, B, H]."""
    variant = spec.keeps_preactivations or spec.gate_clip is not None or spec.layer_norm or spec.zoneout[0] > 0
    gates = spec.cell != "rnn" or variant
    return gates, spec.cell == "lstm" or (spec.cell == "gru" and spec.reset_after)


def options(spec: CellSpec, masks: int, random: bool) -> Options:
    """What the kernels are told. masks: by how many h[t-1] is multiplied. random: zoneout has a seed."""
    lstm, rows = spec.cell == "lstm", len(spec.rows)
    zone_h, zone_c = (tl.constexpr((p, round(p * 2**24))) for p in spec.zoneout)

    def of_gate(activation: Activation) -> tl.constexpr:
        return tl.constexpr((*activation_of(activation), spec.keeps_value(activation)))

    return Options(
        has_c=lstm,
        activation=of_gate(spec.activation),
        recurrent=of_gate(spec.recurrent_activation),
        output=of_gate(spec.output_phi),
        g=1 if spec.coupled else 2,
        peephole=spec.peephole,
        coupled=spec.coupled,
        cell_clip=spec.cell_clip,
        gate_clip=spec.gate_clip,
        projected=spec.proj > 0,
        reset_before=not spec.reset_after,
        two_products=spec.two_products,
        keep_gates=saves(spec)[0],
        remake_cell=spec.remakes_cell,
        norm=spec.layer_norm,
        norm_row=len(spec.peepholes),
        epsilon=EPSILON,
        params=rows,
        dparams=rows + spec.gates * spec.layer_norm,
        masks=masks,
        zone_h=zone_h,
        zone_state=zone_c if lstm else zone_h,
        random=random and spec.zoneout != (0.0, 0.0),
        h_slot=1 if spec.cell == "gru" and spec.reset_after else 0,
    )


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
    high = _accumulator(gates.dtype)
    h = gates.new_empty(T, B, w_hh.shape[1])
    extra = gates.new_empty(T, B, plan.H) if save_extra else None
    rows = gates.new_empty(T, B, plan.H) if spec.two_products else None
    normed = gates.new_empty(gates.shape) if save_norm else None
    stats = gates.new_empty(T, B, 4, dtype=high) if save_norm else None
    # A copy even where the dtype fits: the kernel updates it.
    state = (h0 if c0 is None else c0).to(high, memory_format=torch.contiguous_format, copy=True)
    flags = {"REVERSE": reverse, "MASKED": steps is not None, "SAVE_EXTRA": save_extra}
    constants = _constants(plan, kernel, training, seed is not None) | flags
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
    constants = _constants(plan, kernel, True, seed is not None) | flags
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
    B, high = like.shape[1], _accumulator(like.dtype)
    sums = like.new_empty(4, B, kernel.n_h, 2, dtype=high)
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
    constants = _constants(plan, kernel_plan, training, random) | {"REVERSE": reverse, "MASKED": masked}
    if direction == "forward":
        constants["SAVE_EXTRA"] |= cells
    else:
        constants["HAS_DCELLS"] = cells
    opt: Options = constants["OPT"]
    high = str(_TRITON_DTYPES[_accumulator(plan.dtype)])
    types = {"counter_ptr": "i32", "error_ptr": "i32", "steps_ptr": "u8", "seed_ptr": "i64"}
    in_high = ("state_ptr", "dh_ptr", "dstate_ptr", "stats_ptr", "sums_ptr", "scratch_ptr", "dparams_ptr")
    types |= dict.fromkeys(in_high, high)
    types = {name: types.get(name, str(_TRITON_DTYPES[plan.dtype])) for name in kernel.arg_names}
    forward = direction == "forward"
    local, saved = constants["LOCAL"], constants["SAVE_GATES"] or not forward
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
        "counter_ptr": not constants["SYNC"],
        "error_ptr": not constants["SYNC"],
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


def _constants(plan: LaunchPlan, kernel: KernelPlan, training: bool, random: bool = False) -> dict[str, Any]:
    """The kernel's constexpr arguments, apart from those of one call: REVERSE, MASKED and the like."""
    spec = plan.spec
    cell = _CELLS[spec.cell]
    save_gates, save_extra = saves(spec)
    storage = _TRITON_DTYPES[plan.dtype]
    constants: dict[str, Any] = {
        "OPT": options(spec, plan.masks, random),
        "G": spec.gates,
        "H": plan.H,
        "P": spec.output(plan.H),
        "BLOCK_B": kernel.block_b,
        "BLOCK_H": kernel.block_h,
        "TILES": kernel.tiles,
        "TILES_P": kernel.tiles_p,
        "N_H": kernel.n_h,
        "CHUNK": min(16, 1 << (kernel.n_h - 1).bit_length()),
        "BLOCK_K": kernel.block_k,
        "BLOCK_K_R": kernel.block_k_r,
        "SPLIT_K": kernel.split_k,
        "AHEAD": kernel.ahead,
        "STAGES": kernel.stages,
        "LOCAL": kernel.engine == "local",
        "SYNC": kernel.synchronised,
        "RESIDENT": kernel.resident,
        "SAVE_GATES": training and save_gates,
        "SAVE_EXTRA": training and save_extra,
        # bf16 arithmetic is broken in the interpreter: multiply in fp32 there, which is exact for bf16 operands.
        "DOT": tl.float32 if INTERPRETED and storage == tl.bfloat16 else storage,
        "ACC": _TRITON_DTYPES[_accumulator(plan.dtype)],
        "PRECISION": plan.precision,
        "POLLS": POLLS,
    }
    if kernel.direction == "forward":
        lanes = 1 << (spec.gates - (0 if spec.reset_after else 1) - 1).bit_length()
        functions = {"CELL": cell.forward, "OUTPUT": cell.output}
        return constants | functions | {"LANES": lanes, "HAS_BIAS": spec.bias}
    D, h_slot = slots(spec)
    functions = {"CELL": cell.backward, "OUTPUT": cell.backward_output, "MADE": cell.candidate}
    return constants | functions | {"D": D, "H_SLOT": h_slot}


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


def parts(plan: KernelPlan, opt: Options) -> list[dict[str, bool]]:
    """Which parts of a step each launch does: all in one, but where programs cannot wait between two of them."""
    names = ("PRODUCT", "CELLS", "OUTPUTS", "SECOND")
    if plan.engine != "step":
        launches = [names]
    elif plan.direction == "forward":
        launches = [["PRODUCT"]]
        for name, apart in (("CELLS", opt.norm), ("OUTPUTS", opt.norm and opt.has_c), ("SECOND", opt.two_products)):
            launches += [[]] if apart else []
            launches[-1].append(name)
    else:
        launches = [["PRODUCT"]]
        for name, apart in (("SECOND", opt.two_products), ("CELLS", opt.norm and opt.has_c), ("OUTPUTS", opt.norm)):
            launches += [[]] if apart else []
            launches[-1].append(name)
    return [{name: name in launch for name in names} for launch in launches]


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
