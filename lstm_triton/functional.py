"""lstm(), gru(), rnn(): one layer, one direction, as functions of tensors. And plan(): what they would run.

Where they run: CUDA tensors on the kernels; CPU tensors on ATen (engine="auto"), or on the kernels too where Triton
interprets them (TRITON_INTERPRET=1). engine="reference" is eager PyTorch anywhere.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import launch, ops, reference
from .devices import device_named
from .planner import DTYPES, ENGINES, check_tile, make_plan
from .plans import LaunchPlan
from .spec import LATER, Activation, CellSpec, refuse_later_options


def lstm(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    peephole: Tensor | None = None, coupled: bool = False, w_hr: Tensor | None = None,
    activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    output_activation: Activation | None = None, cell_clip: float | None = None, gate_clip: float | None = None,
    input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None, lengths: Tensor | None = None,
    mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False, return_cells: bool = False,
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Long short-term memory: c[t] = f c[t-1] + i g, h[t] = o tanh(c[t]), gates W_ih x[t] + b_ih + W_hh h[t-1] + b_hh.

    Shapes: x [T, B, I]; h0, c0 [B, H] or None (zeros); w_ih [4H, I], w_hh [4H, H], b_ih, b_hh [4H] or None, gates in
    the order i, f, g, o. Returns y [T, B, H], h_n [B, H], c_n [B, H], in x's dtype: float16, bfloat16, float32 or
    float64; gates, states and sums are float32 (float64 for float64) inside. fp32 recurrent products use TF32 where
    torch.backends.cudnn allows it for RNNs; the products over all time steps follow torch.backends.cuda.matmul.

    reverse runs from the last step to the first. engine is "auto", "local", "resident", "streamed", "step" or
    "reference"; tile=(block_b, block_h) overrides the plan's tile. The remaining options raise NotImplementedError.
    Raises ValueError or TypeError naming the argument for wrong shapes, dtypes, devices, engines and tiles.

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000.
    """
    spec = CellSpec("lstm", activation, b_ih is not None or b_hh is not None)
    refuse_later_options(
        peephole=peephole, coupled=coupled, w_hr=w_hr, recurrent_activation=recurrent_activation,
        output_activation=output_activation, cell_clip=cell_clip, gate_clip=gate_clip, input_mask=input_mask,
        recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, return_cells=return_cells,
        memory=memory,
    )  # fmt: skip
    return _run(spec, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, engine, tile)


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
    spec = CellSpec("gru", activation, b_ih is not None or b_hh is not None)
    refuse_later_options(
        reset_after=reset_after, recurrent_activation=recurrent_activation, gate_clip=gate_clip, input_mask=input_mask,
        recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, memory=memory,
    )  # fmt: skip
    return _run(spec, x, h0, None, w_ih, w_hh, b_ih, b_hh, reverse, engine, tile)[:2]


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
    spec = CellSpec("rnn", activation, b_ih is not None or b_hh is not None)
    refuse_later_options(
        gate_clip=gate_clip, input_mask=input_mask, recurrent_mask=recurrent_mask, lengths=lengths, mask=mask,
        reset=reset, memory=memory,
    )  # fmt: skip
    return _run(spec, x, h0, None, w_ih, w_hh, b_ih, b_hh, reverse, engine, tile)[:2]


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
    spec = CellSpec(cell, a["activation"], a["b_ih"] is not None or a["b_hh"] is not None)
    refuse_later_options(**{name: value for name, value in a.items() if name in LATER})
    x, w_hh, engine, tile = a["x"], a["w_hh"], a["engine"], a["tile"]
    _check(spec, x, a["h0"], a.get("c0"), a["w_ih"], w_hh, a["b_ih"], a["b_hh"], engine, tile)
    T, B, _ = x.shape
    if target is None:
        if engine == "reference" or not _on_kernels(x):
            raise ValueError(f"no kernel runs with engine={engine!r} and x on {x.device}: name a target to plan for")
        return ops.plan_for(spec, x, w_hh.shape[1], engine, tile)
    return make_plan(
        spec, T, B, w_hh.shape[1], x.dtype, device_named(target),
        engine=engine, tile=tile, precision=ops.fp32_precision(),
    )  # fmt: skip


def _run(
    spec: CellSpec, x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, reverse: bool, engine: str, tile: tuple[int, int] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if _autocasts(x):
        # As torch.nn: everything in autocast's dtype, and no autocast inside.
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [_cast(t, dtype) for t in (x, h0, c0, w_ih, w_hh, b_ih, b_hh)]
        with torch.autocast(x.device.type, enabled=False):
            return _run(spec, *tensors, reverse, engine, tile)
    _check(spec, x, h0, c0, w_ih, w_hh, b_ih, b_hh, engine, tile)
    if type(reverse) is not bool:
        raise TypeError(f"reverse must be True or False, got {reverse!r}")
    # Traced, ATen's CPU layers become this very loop, but in inference an oneDNN operator that inductor miscompiles.
    traced_on_cpu = engine == "auto" and torch.compiler.is_compiling() and not _on_kernels(x)
    if engine == "reference" or traced_on_cpu:
        states = (h0, c0) if spec.cell == "lstm" else (h0,)
        function = getattr(reference, spec.cell)
        return function(x, *states, w_ih, w_hh, b_ih, b_hh, activation=spec.activation, reverse=reverse)
    H = w_hh.shape[1]
    h0 = x.new_zeros(x.shape[1], H) if h0 is None else h0
    if spec.cell == "lstm":
        c0 = x.new_zeros(x.shape[1], H) if c0 is None else c0
    if spec.bias:
        b_ih = w_ih.new_zeros(w_ih.shape[0]) if b_ih is None else b_ih
        b_hh = w_hh.new_zeros(w_hh.shape[0]) if b_hh is None else b_hh
    if _on_kernels(x) and 0 not in x.shape[:2]:
        return ops.sequence(x, h0, c0, w_ih, w_hh, b_ih, b_hh, spec=spec, reverse=reverse, engine=engine, tile=tile)
    if engine != "auto" and not _on_kernels(x):
        raise ValueError(
            f"engine={engine!r} needs CUDA tensors (or TRITON_INTERPRET=1 before triton is imported), "
            f"got x on {x.device}"
        )
    return _aten(spec, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse)


def _autocasts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(x.device.type)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    """To autocast's dtype, what autocast would cast: floating tensors except float64."""
    eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def _on_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or (launch.INTERPRETED and x.device.type == "cpu")


def _aten(
    spec: CellSpec, x: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, reverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same layer by torch's own operator: on devices without the kernels, and for T = 0 or B = 0."""
    weights = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
    if reverse:
        x = x.flip(0)
    # has_biases, num_layers, dropout, train, bidirectional, batch_first
    settings = (spec.bias, 1, 0.0, False, False, False)
    if spec.cell == "lstm":
        y, h_n, c_n = torch.lstm(x, (h0[None], c0[None]), weights, *settings)
        rest = (h_n[0], c_n[0])
    else:
        function = {"gru": torch.gru, "rnn": torch.rnn_relu if spec.activation == "relu" else torch.rnn_tanh}[spec.cell]
        y, h_n = function(x, h0[None], weights, *settings)
        rest = (h_n[0], None)
    return (y.flip(0) if reverse else y), *rest


def check_engine(engine: str) -> None:
    """ValueError unless `engine` is one that exists."""
    if engine not in ("auto", "reference", *ENGINES):
        expected = ", ".join(map(repr, ("auto", *ENGINES, "reference")))
        raise ValueError(f"engine must be one of {expected}, got {engine!r}")


def _check(
    spec: CellSpec, x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, engine: str, tile: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Every argument against the shapes, dtype and device that x and w_hh imply, before anything runs."""
    check_engine(engine)
    if tile is not None:
        check_tile(tile)
    for name, tensor, dims in (("x", x, 3), ("w_ih", w_ih, 2), ("w_hh", w_hh, 2)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    G, H = spec.gates, w_hh.shape[1]
    if H == 0:
        raise ValueError(f"w_hh must be [{G}*H, H] with H >= 1, got shape {tuple(w_hh.shape)}")
    _, B, I = x.shape  # noqa: E741
    shapes = {
        "w_ih": (w_ih, (G * H, I)),
        "w_hh": (w_hh, (G * H, H)),
        "b_ih": (b_ih, (G * H,)),
        "b_hh": (b_hh, (G * H,)),
        "h0": (h0, (B, H)),
        "c0": (c0, (B, H)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} ({G} gate(s), H={H}, B={B}, I={I}), got {tuple(tensor.shape)}"
            )
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
