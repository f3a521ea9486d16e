"""What the kernels are told at compile time: a cell's functions and options (OPT), sizes and schedule (PLAN)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .kernels import cells
from .plans import KernelPlan, LaunchPlan
from .spec import EPSILON, Activation, CellSpec, activation_of

#: True where TRITON_INTERPRET=1 was set when triton was imported: kernels run on the CPU, one program after another.
INTERPRETED = isinstance(cells.gate, InterpretedFunction)

#: How often a program looks for a missing tile before it gives up: some ten seconds on a GPU, some seconds interpreted.
POLLS = 1 << 14 if INTERPRETED else 1 << 24

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


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


class Plan(NamedTuple):
    """PLAN of the kernels: sizes, and the schedule as a KernelPlan has it."""

    G: int  # gates
    LANES: int  # gates of the first product, rounded up to a power of two
    D: int  # gradients that backward keeps for each unit
    H_SLOT: int  # of which those by the recurrent product begin here
    H: int
    P: int  # columns of h
    BLOCK_B: int
    BLOCK_H: int
    TILES: int
    TILES_P: int
    N_H: int
    CHUNK: int  # programs whose sums are read at a time
    BLOCK_K: int
    BLOCK_K_R: int  # of the second product
    SPLIT_K: int
    AHEAD: int
    STAGES: int
    LOCAL: bool
    SYNC: bool
    RESIDENT: bool
    DOT: tl.dtype
    ACC: tl.dtype
    PRECISION: str
    POLLS: int


class Cell(NamedTuple):
    """A cell's functions, see kernels/cells.py. The last three are there for those with a cell state."""

    forward: Any
    backward: Any
    output: Any = cells.same_output
    backward_output: Any = cells.same_backward_output
    candidate: Any = cells.same_candidate


#: Every cell's, with those that registry.py adds by `add_cell`.
_CELLS = {
    "lstm": Cell(
        cells.lstm_forward, cells.lstm_backward, cells.lstm_output, cells.lstm_backward_output, cells.lstm_candidate
    ),
    "gru": Cell(cells.gru_forward, cells.gru_backward),
    "rnn": Cell(cells.rnn_forward, cells.rnn_backward),
}


def add_cell(name: str, cell: Cell) -> None:
    """Make the kernels know a kind of cell that is in spec.KINDS."""
    _CELLS[name] = cell


def slots(spec: CellSpec) -> tuple[int, int]:
    """D and the first recurrent slot: the layout of what `backward` returns."""
    if spec.layer_norm:  # those by the recurrent product go through the normalisation
        return 2 * spec.gates, spec.gates
    return len(spec.kind.slots), spec.kind.h_slot


def saves(spec: CellSpec) -> tuple[bool, bool]:
    """Whether training keeps the gates [T, B, G*H] and the extra tile [T, B, H]."""
    variant = spec.keeps_preactivations or spec.gate_clip is not None or spec.layer_norm or spec.zoneout[0] > 0
    return spec.kind.keeps or variant, spec.kind.extra


def options(spec: CellSpec, masks: int, random: bool) -> Options:
    """What the kernels are told. masks: by how many h[t-1] is multiplied. random: zoneout has a seed."""
    rows = len(spec.rows)
    zone_h, zone_c = (tl.constexpr((p, round(p * 2**24))) for p in spec.zoneout)

    def of_gate(activation: Activation) -> tl.constexpr:
        return tl.constexpr((*activation_of(activation), spec.keeps_value(activation)))

    return Options(
        has_c=spec.has_c,
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
        norm_row=len(spec.vectors),
        epsilon=EPSILON,
        params=rows,
        dparams=rows + spec.gates * spec.layer_norm,
        masks=masks,
        zone_h=zone_h,
        zone_state=zone_c if spec.has_c else zone_h,
        random=random and spec.zoneout != (0.0, 0.0),
        h_slot=spec.kind.h_slot,
    )


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


def constexprs_of(plan: LaunchPlan, kernel: KernelPlan, training: bool, random: bool = False) -> dict[str, Any]:
    """The kernel's constexpr arguments, apart from those of one call: REVERSE, MASKED and the like."""
    spec = plan.spec
    cell = _CELLS[spec.cell]
    save_gates, save_extra = saves(spec)
    storage = TRITON_DTYPES[plan.dtype]
    D, h_slot = slots(spec)
    shape = Plan(
        G=spec.gates,
        LANES=1 << (spec.gates - (0 if spec.reset_after else 1) - 1).bit_length(),
        D=D,
        H_SLOT=h_slot,
        H=plan.H,
        P=spec.output(plan.H),
        BLOCK_B=kernel.block_b,
        BLOCK_H=kernel.block_h,
        TILES=kernel.tiles,
        TILES_P=kernel.tiles_p,
        N_H=kernel.n_h,
        CHUNK=min(16, 1 << (kernel.n_h - 1).bit_length()),
        BLOCK_K=kernel.block_k,
        BLOCK_K_R=kernel.block_k_r,
        SPLIT_K=kernel.split_k,
        AHEAD=kernel.ahead,
        STAGES=kernel.stages,
        LOCAL=kernel.engine == "local",
        SYNC=kernel.synchronised,
        RESIDENT=kernel.resident,
        # bf16 arithmetic is broken in the interpreter: multiply in fp32 there, which is exact for bf16 operands.
        DOT=tl.float32 if INTERPRETED and storage == tl.bfloat16 else storage,
        ACC=TRITON_DTYPES[accumulator(plan.dtype)],
        PRECISION=plan.precision,
        POLLS=POLLS,
    )
    told: dict[str, Any] = {
        "OPT": options(spec, plan.masks, random),
        "PLAN": shape,
        "SAVE_GATES": training and save_gates,
        "SAVE_EXTRA": training and save_extra,
    }
    if kernel.direction == "forward":
        return told | {"CELL": cell.forward, "OUTPUT": cell.output, "HAS_BIAS": spec.bias}
    made = cell.candidate if spec.remakes_cell else cells.same_candidate
    return told | {"CELL": cell.backward, "OUTPUT": cell.backward_output, "MADE": made}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
