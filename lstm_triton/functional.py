"""lstm(), gru(), rnn(): one layer, one direction, as functions of tensors. And plan(): what they would run.

Where they run: CUDA tensors on the kernels; CPU tensors on torch's own layers (engine="auto", see host.py), or on the
kernels too where Triton interprets them (TRITON_INTERPRET=1). engine="reference" is eager PyTorch anywhere.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, host, launch, ops, reference
from .devices import device_named
from .planner import DTYPES, ENGINES, check_tile, make_plan
from .plans import LaunchPlan
from .reference import check_memory, step_masks
from .spec import LATER, RESET, VALID, Activation, CellSpec, refuse_later_options

#: What `lengths` may hold.
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


class Tensors(NamedTuple):
    """The tensors of one call, None where there is none: what varies between problems of one kind."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    reset: Tensor | None


def lstm(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    peephole: Tensor | None = None, coupled: bool = False, w_hr: Tensor | None = None,
    activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    output_activation: Activation | None = None, cell_clip: float | None = None, gate_clip: float | None = None,
    input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None, lengths: Tensor | None = None,
    mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False, return_cells: bool = False,
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Long short-term memory: c[t] = f c[t-1] + i g, h[t] = o tanh(c[t]), gates W_ih x[t] + b_ih + W_hh h[t-1] + b_hh.

    Shapes: x [T, B, I]; h0, c0 [B, H] or None (zeros); w_ih [4H, I], w_hh [4H, H], b_ih, b_hh [4H] or None, gates in
    the order i, f, g, o. Returns y [T, B, H], h_n [B, H], c_n [B, H], in x's dtype: float16, bfloat16, float32 or
    float64; gates, states and sums are float32 (float64 for float64) inside. fp32 recurrent products use TF32 where
    torch.backends.cudnn allows it for RNNs; the products over all time steps follow torch.backends.cuda.matmul.

    w_hr [P, H], 0 < P < H, projects: h[t] = w_hr (o tanh(c[t])). h0, h_n and y then have P columns, and so has w_hh.

    Steps that do not count hold the state and give zeros, and NaN in x there, or in their gradients, reaches nothing:
        lengths: [B], any integer dtype, on x's device. Row b ends after lengths[b] steps; the reverse direction begins
            there. Beyond T counts as T, below 0 as 0. On CUDA the values are not looked at, so that nothing waits.
        mask: bool [T, B]. Where false the step is skipped.
        reset: bool [T, B]. Where true the state is zeroed before the step, in the order of processing; also where mask
            is false, but not past a row's length.

    reverse runs from the last step to the first. return_cells adds c of every step, [T, B, H], to what is returned.
    memory="recompute" keeps less for the backward pass, which computes it again; the default "store" is faster.
    engine is "auto", "local", "resident", "streamed", "step" or "reference"; tile=(block_b, block_h) overrides the
    plan's tile. The remaining options raise NotImplementedError.
    Raises ValueError or TypeError naming the argument for wrong shapes, dtypes, devices, engines and tiles.

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000; w_hr: Sak et
    al., "Long short-term memory based recurrent neural network architectures", 2014.
    """
    refuse_later_options(
        peephole=peephole, coupled=coupled, recurrent_activation=recurrent_activation,
        output_activation=output_activation, cell_clip=cell_clip, gate_clip=gate_clip, input_mask=input_mask,
        recurrent_mask=recurrent_mask,
    )  # fmt: skip
    tensors = Tensors(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, mask, reset)
    outputs = _run("lstm", activation, tensors, reverse, return_cells, memory, engine, tile)
    return outputs if return_cells else outputs[:3]


def gru(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    reset_after: bool = True, activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    gate_clip: float | None = None, input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None,
    lengths: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated recurrent unit, reset after the product: n = tanh(x_n + r (W_hn h[t-1] + b_hn)), h[t] = (1-z) n + z h[t-1].

    Shapes, dtypes, options and errors as `lstm`, with 3H for 4H, gates in the order r, z, n, and no cell state.
    Returns y [T, B, H], h_n [B, H].

    Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014; the reset as in cuDNN and torch.nn.
    """
    refuse_later_options(
        reset_after=reset_after, recurrent_activation=recurrent_activation, gate_clip=gate_clip, input_mask=input_mask,
        recurrent_mask=recurrent_mask,
    )  # fmt: skip
    tensors = Tensors(x, h0, None, w_ih, w_hh, b_ih, b_hh, None, lengths, mask, reset)
    return _run("gru", activation, tensors, reverse, False, memory, engine, tile)[:2]


def rnn(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    activation: Activation = "tanh", gate_clip: float | None = None, input_mask: Tensor | None = None,
    recurrent_mask: Tensor | None = None, lengths: Tensor | None = None, mask: Tensor | None = None,
    reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Elman network: h[t] = activation(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh), activation "tanh" or "relu".

    Shapes, dtypes, options and errors as `lstm`, with H for 4H and no cell state. Returns y [T, B, H], h_n [B, H].

    Elman, "Finding structure in time", 1990.
    """
    refuse_later_options(gate_clip=gate_clip, input_mask=input_mask, recurrent_mask=recurrent_mask)
    tensors = Tensors(x, h0, None, w_ih, w_hh, b_ih, b_hh, None, lengths, mask, reset)
    return _run("rnn", activation, tensors, reverse, False, memory, engine, tile)[:2]


_FUNCTIONS = {"lstm": lstm, "gru": gru, "rnn": rnn}


def plan(cell: str, *args: Any, target: str | None = None, **kwargs: Any) -> LaunchPlan:
    """The LaunchPlan that lstm(), gru() or rnn() would use for the same arguments; nothing runs, meta tensors do.

    target names a GPU that need not be there ("H200", "A100", "sm_90", ...); without it the plan is for the tensors'
    own device, and ValueError is raised where no kernel would run on it.
    """
    if not isinstance(cell, str) or cell not in _FUNCTIONS:
        raise ValueError(f"cell must be one of {', '.join(map(repr, _FUNCTIONS))}, got {cell!r}")
    bound = inspect.signature(_FUNCTIONS[cell]).bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    refuse_later_options(**{name: value for name, value in a.items() if name in LATER})
    tensors = Tensors(**{name: a.get(name) for name in Tensors._fields})
    if _autocasts(tensors.x):
        tensors = _autocast(tensors)
    x, engine, tile = tensors.x, a["engine"], a["tile"]
    spec = _check(
        cell, a["activation"], tensors, a["reverse"], a.get("return_cells", False), a["memory"], engine, tile
    )  # fmt: skip
    T, B, _ = x.shape
    H = tensors.w_ih.shape[0] // spec.gates
    if target is None:
        if engine == "reference" or not _on_kernels(x):
            raise ValueError(f"no kernel runs with engine={engine!r} and x on {x.device}: name a target to plan for")
        return ops.plan_for(spec, x, H, engine, tile)
    return make_plan(
        spec, T, B, H, x.dtype, device_named(target),
        engine=engine, tile=tile, precision=ops.fp32_precision(),
    )  # fmt: skip


def _run(
    cell: str, activation: Activation, tensors: Tensors, reverse: bool, return_cells: bool, memory: str, engine: str,
    tile: tuple[int, int] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> y, h_n, then c_n and cells, None where there are none."""
    if _autocasts(tensors.x):
        # As torch.nn: everything in autocast's dtype, and no autocast inside.
        with torch.autocast(tensors.x.device.type, enabled=False):
            return _run(cell, activation, _autocast(tensors), reverse, return_cells, memory, engine, tile)
    spec = _check(cell, activation, tensors, reverse, return_cells, memory, engine, tile)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, mask, reset = tensors
    if engine == "reference":
        return reference.sequence(*tensors, spec=spec, reverse=reverse, return_cells=return_cells)
    on_kernels = _on_kernels(x)
    if engine != "auto" and not on_kernels:
        raise ValueError(
            f"engine={engine!r} needs CUDA tensors (or TRITON_INTERPRET=1 before triton is imported), "
            f"got x on {x.device}"
        )
    H = w_ih.shape[0] // spec.gates
    h0 = x.new_zeros(x.shape[1], spec.output(H)) if h0 is None else h0
    if cell == "lstm":
        c0 = x.new_zeros(x.shape[1], H) if c0 is None else c0
    if spec.bias:
        b_ih = w_ih.new_zeros(w_ih.shape[0]) if b_ih is None else b_ih
        b_hh = w_hh.new_zeros(w_hh.shape[0]) if b_hh is None else b_hh
    if not on_kernels or 0 in x.shape[:2]:
        return host.sequence(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, mask, reset,
            spec=spec, reverse=reverse, return_cells=return_cells,
        )  # fmt: skip
    counts, zeroed = step_masks(x, lengths, mask, reset)
    if counts is not None:
        x = x.masked_fill(~counts[..., None], 0)
    return autograd.sequence(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, step_flags(counts, zeroed),
        spec=spec, reverse=reverse, engine=engine, tile=tile, memory=memory, return_cells=return_cells,
    )  # fmt: skip


def step_flags(counts: Tensor | None, zeroed: Tensor | None) -> Tensor | None:
    """The two bool [T, B] of `step_masks` as the bits VALID and RESET of one uint8 tensor, None without either."""
    if counts is None and zeroed is None:
        return None
    flags = VALID if counts is None else counts.to(torch.uint8) * VALID
    if zeroed is not None:
        flags = zeroed.to(torch.uint8) * RESET + flags
    return flags


def _autocasts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(x.device.type)


def _autocast(tensors: Tensors) -> Tensors:
    """To autocast's dtype, what autocast would cast: floating tensors except float64."""
    dtype = torch.get_autocast_dtype(tensors.x.device.type)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return Tensors(*map(cast, tensors))


def _on_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or (launch.INTERPRETED and x.device.type == "cpu")


def check_engine(engine: str) -> None:
    """ValueError unless `engine` is one that exists."""
    if engine not in ("auto", "reference", *ENGINES):
        expected = ", ".join(map(repr, ("auto", *ENGINES, "reference")))
        raise ValueError(f"engine must be one of {expected}, got {engine!r}")


def _check(
    cell: str, activation: Activation, tensors: Tensors, reverse: bool, return_cells: bool, memory: str, engine: str,
    tile: tuple[int, int] | None,
) -> CellSpec:  # fmt: skip
    """Every argument, tensors against the shapes, dtype and device that x and weights imply, before anything runs."""
    x, _, _, w_ih, w_hh, b_ih, b_hh, w_hr, *_ = tensors
    spec = CellSpec(cell, activation, b_ih is not None or b_hh is not None)
    check_engine(engine)
    check_memory(memory)
    if tile is not None:
        check_tile(tile)
    for name, flag in (("reverse", reverse), ("return_cells", return_cells)):
        if type(flag) is not bool:
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    for name, tensor, dims in (("x", x, 3), ("w_ih", w_ih, 2), ("w_hh", w_hh, 2), ("w_hr", w_hr, 2)):
        if name == "w_hr" and tensor is None:
            continue
        _check_dense(name, tensor, "a Tensor")
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    G, H = spec.gates, w_hh.shape[1]
    if w_hr is not None:
        P, units = w_hr.shape
        if not 0 < P < units:
            raise ValueError(f"w_hr must be [P, H] with 0 < P < H, got shape {tuple(w_hr.shape)}")
        spec, H = replace(spec, proj=P), w_hh.shape[0] // G
    if H == 0:
        raise ValueError(f"w_hh must be [{G}*H, H] with H >= 1, got shape {tuple(w_hh.shape)}")
    T, B, I = x.shape  # noqa: E741
    wanted = {**spec.parameters(I, H), **spec.state_shapes(B, H), "lengths": (B,), "mask": (T, B), "reset": (T, B)}
    # H comes from w_hh, which has to fit itself before others are held against it.
    wanted = {"w_hh": wanted["w_hh"]} | wanted
    for name, shape in wanted.items():
        tensor = getattr(tensors, name)
        if tensor is None:
            continue
        _check_dense(name, tensor, "a Tensor or None")
        if tuple(tensor.shape) != shape:
            # Formatted here alone: under torch.compile a size that becomes text is a constant from then on.
            sizes = f"{G} gate(s), T={T}, B={B}, I={I}, H={H}" + (f", P={spec.proj}" if spec.proj else "")
            raise ValueError(f"{name} must have shape {shape} ({sizes}), got {tuple(tensor.shape)}")
        if name == "lengths":
            if tensor.dtype not in INTEGERS:
                raise ValueError(f"lengths must have an integer dtype, got {tensor.dtype}")
        elif name in ("mask", "reset"):
            if tensor.dtype != torch.bool:
                raise ValueError(f"{name} must have dtype torch.bool, got {tensor.dtype}")
        elif tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    return spec


def _check_dense(name: str, tensor: Any, expected: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {expected}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
