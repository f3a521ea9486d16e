"""lstm(), gru(), rnn(): one layer, one direction, as functions of tensors. And plan(): what they would run.

The functions of registered cells (registry.py) are attributes of this module too.

Where they run: CUDA tensors on the kernels; CPU tensors on torch's own layers where these have the cell and on
`reference` otherwise (engine="auto", see host.py), or on the kernels too where Triton interprets them
(TRITON_INTERPRET=1). engine="reference" is eager PyTorch anywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from . import autograd, host, launch, ops, reference
from .devices import device_named
from .planner import DTYPES, ENGINES, check_tile, make_plan
from .plans import LaunchPlan
from .reference import check_memory, step_masks
from .spec import EPSILON, GATES, KINDS, RESET, VALID, Activation, CellSpec

#: Weight and bias of one layer normalisation.
Norm = tuple[Tensor, Tensor]

#: What `lengths` may hold.
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


# Defaults of numbers are ints or None: torch.compile(dynamic=True) takes a float for a variable, and starts again when
# it turns out to decide what is run.


class Tensors(NamedTuple):
    """The tensors of one call, None where there is none: what varies between problems of one kind."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None = None
    peephole: Tensor | None = None
    norm_ih: Norm | None = None
    norm_hh: Norm | None = None
    norm_c: Norm | None = None
    input_mask: Tensor | None = None
    recurrent_mask: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    reset: Tensor | None = None
    seed: Tensor | None = None
    params: Tensor | None = None  # of a registered cell


class Settings(NamedTuple):
    """The other arguments of one call. options: those of the CellSpec."""

    options: dict[str, Any]
    reverse: bool
    memory: str
    engine: str
    tile: tuple[int, int] | None
    return_cells: bool = False


def lstm(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    peephole: Tensor | None = None, coupled: bool = False, w_hr: Tensor | None = None,
    activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    output_activation: Activation | None = None, cell_clip: float | None = None, gate_clip: float | None = None,
    input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None,
    norm_ih: Norm | None = None, norm_hh: Norm | None = None, norm_c: Norm | None = None,
    zoneout: float | tuple[float, float] = 0, seed: Tensor | None = None, lengths: Tensor | None = None,
    mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False, return_cells: bool = False,
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Long short-term memory: c[t] = f c[t-1] + i g, h[t] = o tanh(c[t]), gates W_ih x[t] + b_ih + W_hh h[t-1] + b_hh.

    Shapes: x [T, B, I]; h0, c0 [B, H] or None (zeros); w_ih [4H, I], w_hh [4H, H], b_ih, b_hh [4H] or None, gates in
    the order i, f, g, o. Returns y [T, B, H], h_n [B, H], c_n [B, H], in x's dtype: float16, bfloat16, float32 or
    float64; gates, states and sums are float32 (float64 for float64) inside. fp32 recurrent products use TF32 where
    torch.backends.cudnn allows it for RNNs; the products over all time steps follow torch.backends.cuda.matmul.

    Other cells, in any combination:
        w_hr: [P, H], 0 < P < H, projects: h[t] = w_hr (o tanh(c[t])). h0, h_n and y have P columns, and so has w_hh.
        peephole: [3, H], p_i, p_f, p_o: p c[t-1] is added to the gates i and f, p_o c[t] to o.
        coupled: f = 1 - i. w_ih, w_hh and the biases hold three gates, i, g, o; peephole [2, H] p_i, p_o.
        activation, recurrent_activation, output_activation: of g; of i, f, o; of c[t] (None: as activation). A name,
            (name, alpha) or (name, alpha, beta), as ONNX has them: "tanh", "sigmoid", "relu", "hard_sigmoid" (0.2,
            0.5: max(0, min(1, alpha x + beta))), "linear", "affine" (1, 0: alpha x + beta), "elu" (1), "leaky_relu"
            (0.01), "scaled_tanh" (1, 1: alpha tanh(beta x)), "softplus", "softsign", "thresholded_relu" (1).
        cell_clip: c[t] is held within +- this, before o's peephole reads it. gate_clip: so is every gate before its
            activation, peephole included. The gradient through either is 1 within and on the bound, 0 beyond.
        norm_ih, norm_hh, norm_c: layer normalisation, a pair (weight, bias) each, [G*H], [G*H] and [H], all or none: of
            W_ih x[t] and of W_hh h[t-1], over all gates and before the biases are added, and of what the step makes of
            c, which o's peephole reads before. c[t], as it is carried on and returned, is the normalised one.

    Regularisation, its random numbers drawn by the caller:
        input_mask, recurrent_mask: [B, I] and [B, H] (or P), or [G, B, ...] for each of the G gates its own, in x's
            dtype: x[t] and h[t-1] are multiplied by them at every step before the products.
        zoneout: probability, or a pair of them for h and c, with which a unit keeps its state instead of what the step
            made of it. seed: int64, one element, on x's device, decides by Philox 4x32-10 which; None takes the
            expectation, z times the old state and 1 - z times the new one, as evaluation does: in training as well.

    Steps that do not count hold the state and give zeros, and NaN in x there, or in their gradients, reaches nothing:
        lengths: [B], any integer dtype, on x's device. Row b ends after lengths[b] steps; the reverse direction begins
            there. Beyond T counts as T, below 0 as 0. On CUDA the values are not looked at, so that nothing waits.
        mask: bool [T, B]. Where false the step is skipped.
        reset: bool [T, B]. Where true the state is zeroed before the step, in the order of processing; also where mask
            is false, but not past a row's length.

    reverse runs from the last step to the first. return_cells adds c of every step, [T, B, H], to what is returned.
    memory="recompute" keeps less for the backward pass, which computes it again.
    engine is "auto", "local", "resident", "streamed", "step" or "reference"; tile=(block_b, block_h) overrides the
    plan's tile.
    Raises ValueError or TypeError naming the argument for wrong shapes, dtypes, devices, options, engines and tiles.

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000. w_hr: Sak et
    al., "Long short-term memory based recurrent neural network architectures", 2014. peephole: Gers and Schmidhuber,
    "Recurrent nets that time and count", 2000. coupled: Greff et al., "LSTM: a search space odyssey", 2017. norm_*: Ba
    et al., "Layer normalization", 2016. Masks: Gal and Ghahramani, "A theoretically grounded application of dropout in
    recurrent neural networks", 2016. zoneout: Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden
    activations", 2017.
    """
    tensors = Tensors(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, peephole, norm_ih, norm_hh, norm_c,
        input_mask, recurrent_mask, lengths, mask, reset, seed,
    )  # fmt: skip
    options = {
        "activation": activation, "recurrent_activation": recurrent_activation, "output_activation": output_activation,
        "coupled": coupled, "cell_clip": cell_clip, "gate_clip": gate_clip, "zoneout": zoneout,
    }  # fmt: skip
    outputs = _run("lstm", tensors, Settings(options, reverse, memory, engine, tile, return_cells))
    return outputs if return_cells else outputs[:3]


def gru(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    reset_after: bool = True, activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    gate_clip: float | None = None, input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None,
    norm_ih: Norm | None = None, norm_hh: Norm | None = None, zoneout: float = 0, seed: Tensor | None = None,
    lengths: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated recurrent unit, reset after the product: n = tanh(x_n + r (W_hn h[t-1] + b_hn)), h[t] = (1-z) n + z h[t-1].

    With reset_after=False before it: n = tanh(x_n + W_hn (r h[t-1]) + b_hn), which layer normalisation cannot go with.
    recurrent_mask is for the h[t-1] of the products alone, and for r h[t-1]; z h[t-1] takes the state as it is.

    Shapes, dtypes, options and errors as `lstm`, with 3H for 4H, gates in the order r, z, n, and no cell state.
    recurrent_activation is of r and z. Returns y [T, B, H], h_n [B, H].

    Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014, which has the reset before the
    product; after it as in cuDNN and torch.nn. The options' papers: see `lstm`.
    """
    tensors = Tensors(
        x, h0, None, w_ih, w_hh, b_ih, b_hh, norm_ih=norm_ih, norm_hh=norm_hh, input_mask=input_mask,
        recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, seed=seed,
    )  # fmt: skip
    options = {
        "activation": activation, "recurrent_activation": recurrent_activation, "reset_after": reset_after,
        "gate_clip": gate_clip, "zoneout": zoneout,
    }  # fmt: skip
    return _run("gru", tensors, Settings(options, reverse, memory, engine, tile))[:2]


def rnn(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    activation: Activation = "tanh", gate_clip: float | None = None, input_mask: Tensor | None = None,
    recurrent_mask: Tensor | None = None, norm_ih: Norm | None = None, norm_hh: Norm | None = None,
    zoneout: float = 0, seed: Tensor | None = None, lengths: Tensor | None = None, mask: Tensor | None = None,
    reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Elman network: h[t] = activation(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh).

    Shapes, dtypes, options and errors as `lstm`, with H for 4H and no cell state. Returns y [T, B, H], h_n [B, H].

    Elman, "Finding structure in time", 1990. The options' papers: see `lstm`.
    """
    tensors = Tensors(
        x, h0, None, w_ih, w_hh, b_ih, b_hh, norm_ih=norm_ih, norm_hh=norm_hh, input_mask=input_mask,
        recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, seed=seed,
    )  # fmt: skip
    options = {"activation": activation, "gate_clip": gate_clip, "zoneout": zoneout}
    return _run("rnn", tensors, Settings(options, reverse, memory, engine, tile))[:2]


def function_of(cell: str) -> Callable[..., tuple[Tensor, ...]]:
    """The function of a registered cell, which `plan` then knows too."""

    def without_c(
        x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
        b_ih: Tensor | None = None, b_hh: Tensor | None = None, *, params: Tensor | None = None,
        input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None, norm_ih: Norm | None = None,
        norm_hh: Norm | None = None, zoneout: float = 0, seed: Tensor | None = None, lengths: Tensor | None = None,
        mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False,
        memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None, **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tensors = Tensors(
            x, h0, None, w_ih, w_hh, b_ih, b_hh, norm_ih=norm_ih, norm_hh=norm_hh, input_mask=input_mask,
            recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, seed=seed, params=params,
        )  # fmt: skip
        reference.check_options(cell, options)
        settings = Settings(options | {"zoneout": zoneout}, reverse, memory, engine, tile)
        return _run(cell, tensors, settings)[:2]

    def with_c(
        x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
        b_ih: Tensor | None = None, b_hh: Tensor | None = None, *, params: Tensor | None = None,
        input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None,
        zoneout: float | tuple[float, float] = 0, seed: Tensor | None = None, lengths: Tensor | None = None,
        mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False, return_cells: bool = False,
        memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tensors = Tensors(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, input_mask=input_mask, recurrent_mask=recurrent_mask, lengths=lengths,
            mask=mask, reset=reset, seed=seed, params=params,
        )  # fmt: skip
        reference.check_options(cell, options)
        settings = Settings(options | {"zoneout": zoneout}, reverse, memory, engine, tile, return_cells)
        outputs = _run(cell, tensors, settings)
        return outputs if return_cells else outputs[:3]

    _FUNCTIONS[cell] = reference.named(cell, with_c if KINDS[cell].has_c else without_c)
    return _FUNCTIONS[cell]


_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lstm": lstm, "gru": gru, "rnn": rnn}


def plan(cell: str, *args: Any, target: str | None = None, **kwargs: Any) -> LaunchPlan:
    """The LaunchPlan that the cell's function would use for the same arguments; nothing runs, meta tensors do.

    target names a GPU that need not be there ("H200", "A100", "sm_90", ...); without it the plan is for the tensors'
    own device, and ValueError is raised where no kernel would run on it.
    """
    if not isinstance(cell, str) or cell not in _FUNCTIONS:
        raise ValueError(f"cell must be one of {', '.join(map(repr, _FUNCTIONS))}, got {cell!r}")
    bound = inspect.signature(_FUNCTIONS[cell]).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    tensors = Tensors(*(given.pop(name, None) for name in Tensors._fields))
    options = given.pop("options", {})
    called = {name: given.pop(name) for name in Settings._fields if name in given}
    settings = Settings(options=given | options, **called)
    if _autocasts(tensors.x):
        tensors = _autocast(tensors)
    if cell not in GATES:
        reference.check_options(cell, options)
    spec = _as_run(_check(cell, tensors, settings), tensors)
    x, engine, tile = tensors.x, settings.engine, settings.tile
    T, B, _ = x.shape
    H = tensors.w_ih.shape[0] // spec.gates
    masks = _gates_of(tensors.recurrent_mask)
    if target is None:
        if engine == "reference" or not _on_kernels(x):
            raise ValueError(f"no kernel runs with engine={engine!r} and x on {x.device}: name a target to plan for")
        return ops.plan_for(spec, x, H, engine, tile, masks=masks)
    return make_plan(
        spec, T, B, H, x.dtype, device_named(target),
        engine=engine, tile=tile, precision=ops.fp32_precision(), masks=masks,
    )  # fmt: skip


def _run(cell: str, tensors: Tensors, settings: Settings) -> tuple[Tensor, ...]:
    """-> y, h_n, then c_n and cells, None where there are none."""
    x = tensors.x
    if _autocasts(x):
        # As torch.nn: everything in autocast's dtype, and no autocast inside.
        with torch.autocast(x.device.type, enabled=False):
            return _run(cell, _autocast(tensors), settings)
    spec = _check(cell, tensors, settings)
    reverse, memory, engine, tile, return_cells = settings[1:]
    if engine == "reference":
        return _reference(cell, tensors, settings)
    on_kernels = _on_kernels(x)
    if engine != "auto" and not on_kernels:
        raise ValueError(
            f"engine={engine!r} needs CUDA tensors (or TRITON_INTERPRET=1 before triton is imported), "
            f"got x on {x.device}"
        )
    h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = tensors[1:8]
    H = w_ih.shape[0] // spec.gates
    h0 = x.new_zeros(x.shape[1], spec.output(H)) if h0 is None else h0
    if spec.has_c:
        c0 = x.new_zeros(x.shape[1], H) if c0 is None else c0
    lengths, mask, reset = tensors.lengths, tensors.mask, tensors.reset
    on_kernels = on_kernels and 0 not in x.shape[:2]
    prepared = spec.layer_norm or tensors.input_mask is not None
    if on_kernels or prepared:
        counts, zeroed = step_masks(x, lengths, mask, reset)
        if counts is not None:
            x = x.masked_fill(~counts[..., None], 0)
    if prepared:
        spec = _as_run(spec, tensors)
        x, w_ih, b_ih = _input_part(spec, tensors._replace(x=x))
        if spec.layer_norm:
            b_hh = tensors.norm_hh[1] if b_hh is None else tensors.norm_hh[1] + b_hh
    if spec.bias and w_ih is not None:
        b_ih = w_ih.new_zeros(w_ih.shape[0]) if b_ih is None else b_ih
        b_hh = w_hh.new_zeros(w_hh.shape[0]) if b_hh is None else b_hh
    params, recurrent_mask = _params(spec, tensors, H), tensors.recurrent_mask
    # without zoneout it decides nothing
    seed = tensors.seed.reshape(1) if tensors.seed is not None and any(spec.zoneout) else None
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, params, recurrent_mask)
    if not on_kernels:
        return host.sequence(*inputs, lengths, mask, reset, seed, spec=spec, reverse=reverse, return_cells=return_cells)
    return autograd.sequence(
        *inputs, step_flags(counts, zeroed), seed,
        spec=spec, reverse=reverse, engine=engine, tile=tile, memory=memory, return_cells=return_cells,
    )  # fmt: skip


def _reference(cell: str, tensors: Tensors, settings: Settings) -> tuple[Tensor, ...]:
    """As `_run`, by the function of lt.reference."""
    given = {name: tensor for name, tensor in tensors._asdict().items() if tensor is not None}
    options = settings.options | {"reverse": settings.reverse}
    states: dict[str, None] = {"h0": None}
    if KINDS[cell].has_c:
        options["return_cells"] = settings.return_cells
        states["c0"] = None
    outputs = getattr(reference, cell)(**(states | given | options))
    return (*outputs, None, None)[:4]


def _as_run(spec: CellSpec, tensors: Tensors) -> CellSpec:
    """The cell of which `_run` leaves the rest to run: bias says whether b_hh is among that."""
    if spec.layer_norm:  # whose own is added to b_hh
        return spec if spec.bias else replace(spec, bias=True)
    if _gates_of(tensors.input_mask) > 1 and spec.bias and tensors.b_hh is None:
        return replace(spec, bias=False)  # b_ih is in the input part
    return spec


def _gates_of(mask: Tensor | None) -> int:
    """How many dropout masks there are: none, one for all gates, or G."""
    return 0 if mask is None else 1 if mask.dim() == 2 else mask.shape[0]


def _input_part(spec: CellSpec, tensors: Tensors) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> x, w_ih, b_ih for the rest to multiply; or W_ih x + b_ih [T, B, G*H], None, None where more is to be done."""
    x, w_ih, b_ih, mask = tensors.x, tensors.w_ih, tensors.b_ih, tensors.input_mask
    if _gates_of(mask) == 1:
        x, mask = x * mask, None
    if mask is None and not spec.layer_norm:
        return x, w_ih, b_ih
    if mask is None:
        product = linear(x, w_ih)
    else:
        weights = w_ih.unflatten(0, (spec.gates, -1)).unbind(0)
        product = torch.cat([linear(x * m, w) for m, w in zip(mask.unbind(0), weights, strict=True)], dim=-1)
    if spec.layer_norm:
        product = layer_norm(product, product.shape[-1:], *tensors.norm_ih, EPSILON)
    return product if b_ih is None else product + b_ih, None, None


def _params(spec: CellSpec, tensors: Tensors, H: int) -> Tensor | None:
    """[K, H]: what spec.rows names, None where that is nothing."""
    rows = [vectors for vectors in (tensors.peephole, tensors.params) if vectors is not None]
    if spec.layer_norm:
        rows.append(tensors.norm_hh[0].view(-1, H))
        rows += [] if tensors.norm_c is None else [row[None] for row in tensors.norm_c]
    return torch.cat(rows) if rows else None


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

    def cast(given: Any) -> Any:
        if isinstance(given, (tuple, list)):
            return tuple(map(cast, given))
        eligible = isinstance(given, Tensor) and given.is_floating_point() and given.dtype != torch.float64
        return given.to(dtype) if eligible else given

    return Tensors(*map(cast, tensors))


def _on_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or (launch.INTERPRETED and x.device.type == "cpu")


def check_engine(engine: str) -> None:
    """ValueError unless `engine` is one that exists."""
    if engine not in ("auto", "reference", *ENGINES):
        expected = ", ".join(map(repr, ("auto", *ENGINES, "reference")))
        raise ValueError(f"engine must be one of {expected}, got {engine!r}")


def _check(cell: str, tensors: Tensors, settings: Settings) -> CellSpec:
    """Every argument, tensors against the shapes, dtype and device that x and weights imply, before anything runs."""
    x, _, _, w_ih, w_hh, b_ih, b_hh, w_hr = tensors[:8]
    check_engine(settings.engine)
    check_memory(settings.memory)
    if settings.tile is not None:
        check_tile(settings.tile)
    for name in ("reverse", "return_cells"):
        if type(flag := getattr(settings, name)) is not bool:
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    for name, tensor, dims in (("x", x, 3), ("w_ih", w_ih, 2), ("w_hh", w_hh, 2), ("w_hr", w_hr, 2)):
        if name == "w_hr" and tensor is None:
            continue
        _check_dense(name, tensor, "a Tensor")
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if w_hr is not None and not 0 < w_hr.shape[0] < w_hr.shape[1]:
        raise ValueError(f"w_hr must be [P, H] with 0 < P < H, got shape {tuple(w_hr.shape)}")
    norms = _norms(cell, tensors)
    bias = b_ih is not None or b_hh is not None
    proj = 0 if w_hr is None else w_hr.shape[0]
    spec = _spec(cell, bias, proj, tensors.peephole is not None, bool(norms), settings.options)
    # H comes from w_hh, which has to fit itself before others are held against it.
    G = spec.gates
    H = w_hh.shape[1] if w_hr is None else w_hh.shape[0] // G
    if H == 0:
        raise ValueError(f"w_hh must be [{G}*H, H] with H >= 1, got shape {tuple(w_hh.shape)}")
    T, B, I = x.shape  # noqa: E741
    own = spec.parameters(I, H)
    wanted = {"w_hh": own["w_hh"], **own, **spec.state_shapes(B, H), "lengths": (B,), "mask": (T, B), "reset": (T, B)}
    if tensors.params is None and "params" in own:
        raise TypeError(f"params must be a Tensor {own['params']}, rows {', '.join(spec.vectors)}, got None")
    if tensors.params is not None and "params" not in own:
        raise TypeError(f"params is of cells registered with vectors, which {cell!r} was not")
    given = [(name, tensor, shape) for name, shape in wanted.items() if (tensor := getattr(tensors, name)) is not None]
    given += [(name, tensor, (H if name.startswith("norm_c") else G * H,)) for name, tensor in norms.items()]
    others: dict[str, tuple[int, ...]] = {}
    for name, shape, other in (
        ("input_mask", (B, I), (G, B, I)),
        ("recurrent_mask", (B, spec.output(H)), (G, B, spec.output(H))),
        ("seed", (1,), ()),
    ):
        if (tensor := getattr(tensors, name)) is not None:
            given.append((name, tensor, shape))
            others[name] = other
    for name, tensor, shape in given:
        _check_dense(name, tensor, "a Tensor" if name in norms else "a Tensor or None")
        found, other = tuple(tensor.shape), others.get(name, shape)
        if found != shape and found != other:  # torch.compile finds no symbolic sizes by "in"
            # Formatted here alone: under torch.compile a size that becomes text is a constant from then on.
            sizes = f"{G} gate(s), T={T}, B={B}, I={I}, H={H}" + (f", P={spec.proj}" if spec.proj else "")
            expected = f"{shape}" if other == shape else f"{shape} or {other}"
            raise ValueError(f"{name} must have shape {expected} ({sizes}), got {found}")
        if name == "lengths":
            if tensor.dtype not in INTEGERS:
                raise ValueError(f"lengths must have an integer dtype, got {tensor.dtype}")
        elif name in _DTYPES:
            if tensor.dtype != _DTYPES[name]:
                raise ValueError(f"{name} must have dtype {_DTYPES[name]}, got {tensor.dtype}")
        elif tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    return spec


def _spec(cell: str, bias: bool, proj: int, peephole: bool, layer_norm: bool, options: Mapping[str, Any]) -> CellSpec:
    """The cell that tensors and options make, built anew only where that is new: each call would feel it."""
    told = {"bias": bias, "proj": proj, "peephole": peephole, "layer_norm": layer_norm, **options}
    if torch.compiler.is_compiling():  # which looks through caches, and warns that it does
        options = {name: _constant(value) for name, value in options.items()}
        return CellSpec(cell, **(told | options))
    try:
        return _known_spec(cell, **told)
    except TypeError:  # an option that cannot be hashed; or one of a wrong type, of which this tells
        return CellSpec(cell, **told)


def _constant(value: Any) -> Any:
    """An option's numbers as constants: torch.compile may take them for variables, of which no cell can be made."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_constant, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float.fromhex(float(value).hex())
    return value


# typed: to Python 1.0 and True are equal
_known_spec = lru_cache(maxsize=256, typed=True)(CellSpec)

#: Of those tensors that have neither x's nor a choice.
_DTYPES = {"mask": torch.bool, "reset": torch.bool, "seed": torch.int64}


def _norms(cell: str, tensors: Tensors) -> dict[str, Any]:
    """Weights and biases of layer normalisation, by name for errors, which has to be there as a whole or not at all."""
    names = ("norm_ih", "norm_hh", "norm_c") if KINDS[cell].has_c else ("norm_ih", "norm_hh")
    given = [name for name in names if getattr(tensors, name) is not None]
    if not given:
        return {}
    for name in names:
        pair = getattr(tensors, name)
        if pair is None:
            raise ValueError(f"{name} must be given where {given[0]} is: {', '.join(names)} go together, got None")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            what = f"{len(pair)} of them" if isinstance(pair, (tuple, list)) else type(pair).__name__
            raise TypeError(f"{name} must be a pair of Tensors (weight, bias) or None, got {what}")
    return {f"{name}[{i}]": getattr(tensors, name)[i] for name in names for i in range(2)}


def _check_dense(name: str, tensor: Any, expected: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {expected}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
