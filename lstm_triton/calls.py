"""One call of a function: its tensors and settings, what is wrong with them, and where it runs.

CUDA tensors on the kernels; CPU tensors on torch's own layers where these have the cell and on `reference` otherwise
(engine="auto", see host.py), or on the kernels too where Triton interprets them (TRITON_INTERPRET=1).
engine="reference" is eager PyTorch anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from . import autograd, host, launch, reference
from .planner import DTYPES, ENGINES, check_tile
from .reference import check_memory, step_masks
from .spec import EPSILON, KINDS, RESET, VALID, CellSpec

#: Weight and bias of one layer normalisation.
Norm = tuple[Tensor, Tensor]

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


def run(cell: str, tensors: Tensors, settings: Settings) -> tuple[Tensor, ...]:
    """-> y, h_n, then c_n and cells, None where there are none."""
    x = tensors.x
    if autocasts(x):
        # As torch.nn: everything in autocast's dtype, and no autocast inside.
        with torch.autocast(x.device.type, enabled=False):
            return run(cell, autocast(tensors), settings)
    spec = check(cell, tensors, settings)
    reverse, memory, engine, tile, return_cells = settings[1:]
    if engine == "reference":
        return _reference(cell, tensors, settings)
    kernels = on_kernels(x)
    if engine != "auto" and not kernels:
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
    kernels = kernels and 0 not in x.shape[:2]
    prepared = spec.layer_norm or tensors.input_mask is not None
    if kernels or prepared:
        counts, zeroed = step_masks(x, lengths, mask, reset)
        if counts is not None:
            x = x.masked_fill(~counts[..., None], 0)
    if prepared:
        spec = as_run(spec, tensors)
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
    if not kernels:
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


def as_run(spec: CellSpec, tensors: Tensors) -> CellSpec:
    """The cell of which `_run` leaves the rest to run: bias says whether b_hh is among that."""
    if spec.layer_norm:  # whose own is added to b_hh
        return spec if spec.bias else replace(spec, bias=True)
    if gates_of(tensors.input_mask) > 1 and spec.bias and tensors.b_hh is None:
        return replace(spec, bias=False)  # b_ih is in the input part
    return spec


def gates_of(mask: Tensor | None) -> int:
    """How many dropout masks there are: none, one for all gates, or G."""
    return 0 if mask is None else 1 if mask.dim() == 2 else mask.shape[0]


def _input_part(spec: CellSpec, tensors: Tensors) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> x, w_ih, b_ih for the rest to multiply; or W_ih x + b_ih [T, B, G*H], None, None where more is to be done."""
    x, w_ih, b_ih, mask = tensors.x, tensors.w_ih, tensors.b_ih, tensors.input_mask
    if gates_of(mask) == 1:
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


def autocasts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(x.device.type)


def autocast(tensors: Tensors) -> Tensors:
    """To autocast's dtype, what autocast would cast: floating tensors except float64."""
    dtype = torch.get_autocast_dtype(tensors.x.device.type)

    def cast(given: Any) -> Any:
        if isinstance(given, (tuple, list)):
            return tuple(map(cast, given))
        eligible = isinstance(given, Tensor) and given.is_floating_point() and given.dtype != torch.float64
        return given.to(dtype) if eligible else given

    return Tensors(*map(cast, tensors))


def on_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or (launch.INTERPRETED and x.device.type == "cpu")


def check_engine(engine: str) -> None:
    """ValueError unless `engine` is one that exists."""
    if engine not in ("auto", "reference", *ENGINES):
        expected = ", ".join(map(repr, ("auto", *ENGINES, "reference")))
        raise ValueError(f"engine must be one of {expected}, got {engine!r}")


def check(cell: str, tensors: Tensors, settings: Settings) -> CellSpec:
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
