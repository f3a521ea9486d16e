"""weights() and to(): one layer's weights from other libraries' arrays, and back: gate order, transposition, biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .spec import GATES, CellSpec

#: The order in which each library keeps the gates of each cell that it has, in our letters.
_ORDERS = {
    "torch": {"lstm": "ifgo", "gru": "rzn", "rnn": "h"},
    "lstm_triton": {"lstm": "ifgo", "gru": "rzn", "rnn": "h"},
    "keras": {"lstm": "ifgo", "gru": "zrn", "rnn": "h"},
    "onnx": {"lstm": "iofg", "gru": "zrn", "rnn": "h"},
    "cs231n": {"lstm": "ifog", "rnn": "h"},
}
_ONNX_PEEPHOLES = "iof"

#: What may be said of the layout, with its default; and the cells that some of it is for.
_LAYOUT: dict[str, dict[str, Any]] = {
    "torch": {"layer": 0, "reverse": False},
    "lstm_triton": {"layer": 0, "reverse": False, "coupled": False},
    "keras": {"reset_after": True},
    "onnx": {"direction": None, "input_forget": 0, "linear_before_reset": 0},
    "cs231n": {},
}
_FOR_CELL = {"coupled": "lstm", "input_forget": "lstm", "reset_after": "gru", "linear_before_reset": "gru"}

#: The arrays in a sequence of them, the first two of which are always there.
_NAMES = {
    "torch": ("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    "lstm_triton": ("weight_ih", "weight_hh"),
    "keras": ("kernel", "recurrent_kernel", "bias"),
    "onnx": ("W", "R", "B", "P"),
    "cs231n": ("Wx", "Wh", "b"),
}
_OURS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "peephole")
_PEEPHOLE_NAMES = ("weight_ci", "weight_cf", "weight_co")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Arrays = Sequence[Any] | Mapping[str, Any]


def weights(arrays: Arrays, source: str, cell: str = "lstm", **layout: Any) -> dict[str, Tensor]:
    """One layer and direction of another library, as tensors that lt.functional's `cell` takes.

    Returns a dict of weight_ih [G*H, I], weight_hh [G*H, H] and, where `arrays` has them, bias_ih and bias_hh [G*H]
    (both or neither), peephole [3, H] (i, f, o; for a coupled cell [2, H], i and o) and weight_hr [P, H]. Gates are in
    our order: i, f, g, o (coupled: i, g, o); r, z, n. The tensors are contiguous, in the arrays' dtype, on their
    device, and share no memory with them. Where the other library has one bias, it is bias_ih; bias_hh is zeros then.

    source, what `arrays` is then (numpy arrays or tensors), and the keywords of `layout`:
        "torch": torch.nn's state dict, of which layer=0 (None for the names of a cell, weight_ih) and reverse=False
            say what to read; or [weight_ih, weight_hh], [.., bias_ih, bias_hh], either with weight_hr after it.
        "lstm_triton": the state dict of one of our layers or cells: as "torch", and weight_ci, weight_cf, weight_co are
            the rows of peephole; coupled=False. ValueError if it has layer normalisation, which has no place here.
        "keras": [kernel, recurrent_kernel, bias], as get_weights() of an LSTM (gates i, f, c, o), GRU (z, r, h;
            reset_after=True with bias [2, 3H], False with [3H]) or SimpleRNN returns them.
        "onnx": [W, R, B, P], inputs of an LSTM (i, o, f, c; P: i, o, f), GRU (z, r, h) or RNN node. Axis num_directions
            may be there: direction=0 or 1 chooses where it is two. input_forget=1 is the coupled cell, of which the
            rows for f are left out. linear_before_reset=0 or 1 is the function's reset_after; the arrays are the same.
        "cs231n": [Wx, Wh, b], of the course's lstm (i, f, o, g) or rnn.
    Biases and P may be missing at the end, or None. What arrays do not hold has to be said to the function or layer:
    activations (Keras 3's hard_sigmoid is ("hard_sigmoid", 1/6, 0.5)), reset_after, ONNX's clip as gate_clip.

    Raises ValueError or TypeError naming the array, what was expected and what it is.
    """
    layout = _layout("source", source, cell, layout, taken=True)
    spec = _spec(cell, layout)
    given = {name: _tensor(name, array) for name, array in _named(arrays, source, cell, layout).items()}
    _check_alike(given)
    if source == "onnx":
        given = {name: _direction(name, array, layout["direction"]) for name, array in given.items()}
    # the coupled cell has all four gates in ONNX, and three in a state dict of ours
    theirs = spec.gate_names if source == "lstm_triton" else _ORDERS[source][cell]
    _check_shapes(given, _NAMES[source], len(theirs), layout, source)
    rows = _read(given, source)
    if ("bias_ih" in rows) != ("bias_hh" in rows):
        bias = rows.get("bias_ih", rows.get("bias_hh"))
        rows = {"bias_ih": torch.zeros_like(bias), "bias_hh": torch.zeros_like(bias)} | rows
    if "peephole" in rows:
        have = _ONNX_PEEPHOLES if source == "onnx" else spec.peepholes
        rows["peephole"] = _reordered(rows["peephole"], have, spec.peepholes)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        if name in rows:
            rows[name] = _reordered(rows[name], theirs, spec.gate_names)
    return {name: _copy(rows[name]) for name in _OURS if name in rows}


def to(tensors: Mapping[str, Any], target: str, cell: str = "lstm", **layout: Any) -> Any:
    """The inverse of `weights`: what it returns, as the arrays of another library.

    target and layout are source and layout there. Returns a state dict's entries, tensors, for "torch" and
    "lstm_triton"; [kernel, recurrent_kernel, bias] or without bias for "keras"; [W, R, B, P] for "onnx" ([W, R, B] for
    gru and rnn), with a first axis of one direction, and None for what is not there; [Wx, Wh, b] or without b for
    "cs231n": numpy arrays, these three. In the tensors' dtype, none of their memory shared, gradients left behind.

    Two biases become their sum where the other library has one: "cs231n", and "keras" but for the GRU with
    reset_after=True. (With reset_after=False both only ever are added, here too.) The rows for f that ONNX keeps in a
    coupled cell, and does not read, are zeros.

    Raises ValueError or TypeError naming what is wrong, and ValueError where the target cannot hold the weights: a
    peephole elsewhere than in "onnx" and "lstm_triton", a coupled cell likewise, a projection elsewhere than in "torch"
    and "lstm_triton", a gru in "cs231n", bfloat16 in numpy.
    """
    layout = _layout("target", target, cell, layout, taken=False)
    spec = _spec(cell, layout)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors must be a dict, as weights() returns it, got {type(tensors).__name__}")
    if unknown := [name for name in tensors if name not in _OURS]:
        raise ValueError(f"tensors may hold {', '.join(_OURS)}, got {', '.join(map(repr, unknown))}")
    rows = {name: _tensor(name, tensors[name]) for name in _OURS if tensors.get(name) is not None}
    _check_alike(rows)
    _check_held(rows, target, spec)
    _check_shapes(rows, _OURS, spec.gates, layout, target)
    if target not in ("torch", "lstm_triton") and rows["weight_ih"].dtype == torch.bfloat16:
        raise ValueError(f"numpy has no bfloat16: {target!r} needs another dtype")
    theirs = spec.gate_names if target == "lstm_triton" else _ORDERS[target][cell]
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        if name in rows:
            rows[name] = _reordered(rows[name], spec.gate_names, theirs)
    if "peephole" in rows and target == "onnx":
        rows["peephole"] = _reordered(rows["peephole"], spec.peepholes, _ONNX_PEEPHOLES)
    return _write(rows, target, cell, layout)


def _layout(argument: str, library: Any, cell: Any, given: dict[str, Any], taken: bool) -> dict[str, Any]:
    """The layout with its defaults; `taken`: arrays are taken from the library, and not made for it."""
    if library not in tuple(_ORDERS):
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, _ORDERS))}, got {library!r}")
    if cell not in tuple(GATES):
        raise ValueError(f"cell must be one of {', '.join(map(repr, GATES))}, got {cell!r}")
    if cell not in _ORDERS[library]:
        raise ValueError(f"{library!r} has the cells {', '.join(map(repr, _ORDERS[library]))}, got cell={cell!r}")
    known = {name: value for name, value in _LAYOUT[library].items() if _FOR_CELL.get(name, cell) == cell}
    if not taken:
        known.pop("direction", None)
    for name, value in given.items():
        if name not in known:
            raise TypeError(
                f"{argument}={library!r} and cell={cell!r} go with {', '.join(known) or 'no other keywords'}, "
                f"got {name}={value!r}"
            )
        if name == "layer":
            fits = value is None or (type(value) is int and value >= 0)
            wanted = "a number of a layer, from 0, or None"
        elif name == "direction":
            fits, wanted = value is None or (type(value) is int and value in (0, 1)), "0, 1 or None"
        else:
            flags = (0, 1) if library == "onnx" else (False, True)
            fits = isinstance(value, (bool, int) if library == "onnx" else bool) and value in flags
            wanted = f"{flags[0]} or {flags[1]}"
        if not fits:
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    layout = known | given
    if layout.get("layer", 0) is None and layout["reverse"]:
        raise ValueError("reverse=True is of a layer, and layer=None of a cell, which has no directions")
    return layout


def _spec(cell: str, layout: dict[str, Any]) -> CellSpec:
    """The cell as far as it tells the order of the gates, and of those that may have peepholes."""
    coupled = bool(layout.get("coupled") or layout.get("input_forget"))
    return CellSpec(cell, coupled=coupled, peephole=cell == "lstm")


def _named(arrays: Any, source: str, cell: str, layout: dict[str, Any]) -> dict[str, Any]:
    """The arrays by name, those that are there."""
    if source in ("torch", "lstm_triton") and isinstance(arrays, Mapping):
        return _of_state_dict(arrays, source, cell, layout)
    if source == "lstm_triton" or not isinstance(arrays, (list, tuple)):
        expected = "a state dict" if source == "lstm_triton" else f"a list or tuple of {', '.join(_NAMES[source])}"
        expected += ", or a state dict" if source == "torch" else ""
        raise TypeError(f"arrays must be {expected}, got {type(arrays).__name__}")
    names = _NAMES[source] if cell == "lstm" else tuple(name for name in _NAMES[source] if name != "P")
    if source == "torch":
        if len(arrays) in (3, 5) and cell == "lstm":
            names = (*names[: len(arrays) - 1], "weight_hr")
        fits = len(arrays) == len(names) or len(arrays) == 2
    else:
        fits = 2 <= len(arrays) <= len(names)
    if not fits:
        raise ValueError(f"arrays must be {', '.join(names)}, the first two at least, got {len(arrays)}")
    named = dict(zip(names, arrays, strict=False))
    needed = (*names[:2], "weight_hr")
    return {name: array for name, array in named.items() if array is not None or name in needed}


def _of_state_dict(arrays: Mapping[str, Any], source: str, cell: str, layout: dict[str, Any]) -> dict[str, Any]:
    """One layer and direction of a state dict, by names without their suffix."""
    suffix = "" if layout["layer"] is None else f"_l{layout['layer']}" + "_reverse" * layout["reverse"]
    known = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"} | ({"weight_hr"} if cell == "lstm" else set())
    if source == "lstm_triton" and cell == "lstm":
        known |= {"weight_ci", "weight_co"} if layout["coupled"] else set(_PEEPHOLE_NAMES)
    found = {}
    for name, array in arrays.items():
        if not isinstance(name, str) or not name.partition(".")[0].endswith(suffix):
            continue
        if (stem := name.removesuffix(suffix)) in known:
            found[stem] = array
        else:
            raise ValueError(
                f"arrays has {name!r}, and only {', '.join(stem + suffix for stem in sorted(known))} can be converted "
                f"from {source!r}"
            )
    needed = [("weight_ih", "weight_hh"), ("bias_ih", "bias_hh")]
    needed.append(("weight_ci", "weight_co") if layout.get("coupled") else _PEEPHOLE_NAMES)
    for index, names in enumerate(needed):
        missing = [name + suffix for name in names if name not in found]
        if missing and (index == 0 or len(missing) < len(names)):
            raise ValueError(f"arrays must have {', '.join(missing)}, got {', '.join(map(repr, arrays)) or 'none'}")
    return found


def _tensor(name: str, array: Any) -> Tensor:
    """An array as a tensor, checked for what it is; a tensor as it is."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise TypeError(f"{name} must be of a floating dtype of at most 64 bits, got {array.dtype}")
        # copied: torch has no byte order but the machine's, no negative strides and no read-only memory
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    if not isinstance(array, Tensor):
        raise TypeError(f"{name} must be a numpy array or a tensor, got {type(array).__name__}")
    if array.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {array.layout}")
    if array.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {array.dtype}")
    return array.detach()


def _check_alike(arrays: dict[str, Tensor]) -> None:
    """ValueError unless all have the dtype and the device of the first."""
    (first, model), *others = arrays.items() or [("", torch.empty(0))]
    for name, array in others:
        if (array.dtype, array.device) != (model.dtype, model.device):
            raise ValueError(
                f"{name} must be {model.dtype} on {model.device} as {first} is, got {array.dtype} on {array.device}"
            )


def _direction(name: str, array: Tensor, direction: int | None) -> Tensor:
    """One direction of an input of an ONNX node, whether or not it has that axis."""
    dims = {"W": 2, "R": 2, "B": 1, "P": 1}[name]
    if array.dim() == dims and not direction:
        return array
    directions = array.shape[0] if array.dim() == dims + 1 else 0
    if directions == 2 and direction is None:
        raise ValueError(f"{name} has two directions, shape {tuple(array.shape)}: direction must be 0 or 1")
    if directions not in (1, 2) or (direction or 0) >= directions:
        wanted = f"{dims} dimensions, or {dims + 1} with the first one of 1 or 2" if not direction else "two directions"
        raise ValueError(f"{name} must have {wanted}, got shape {tuple(array.shape)}")
    return array[direction or 0]


def _check_held(rows: dict[str, Tensor], target: str, spec: CellSpec) -> None:
    """ValueError where the target has no place for something."""
    for name, what, places in (
        ("peephole", "peepholes", ("onnx", "lstm_triton")),
        ("weight_hr", "projection", ("torch", "lstm_triton")),
    ):
        if name in rows and spec.cell != "lstm":
            raise ValueError(f"{name} is of an lstm, got it for a {spec.cell}")
        if name in rows and target not in places:
            raise ValueError(f"{target!r} has no {what}: {name} cannot be converted")


def _check_shapes(
    arrays: dict[str, Tensor], names: tuple[str, ...], gates: int, layout: dict[str, Any], library: str
) -> None:
    """ValueError naming the first array that does not fit; the first two names are those of the matrices."""
    first, second = names[:2]
    transposed = first in ("kernel", "Wx")
    for name in (first, second, "weight_hr"):
        if name not in arrays and name != "weight_hr":
            raise ValueError(f"tensors must have {name}, got {', '.join(arrays) or 'none'}")
        if name in arrays and arrays[name].dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(arrays[name].shape)}")
    axis = 0 if transposed else 1
    inputs, columns = arrays[first].shape[axis], arrays[second].shape[axis]
    hidden, sizes = columns, ""
    if "weight_hr" in arrays:
        columns, hidden = arrays["weight_hr"].shape
        sizes = f", P={columns}"
        if not 0 < columns < hidden:
            raise ValueError(f"weight_hr must be [P, H] with 0 < P < H, got shape {(columns, hidden)}")
    if hidden == 0:
        raise ValueError(f"{second} must be of one hidden unit or more, got shape {tuple(arrays[second].shape)}")
    n = gates * hidden
    doubled = bool(layout.get("reset_after"))
    wanted: dict[str, tuple[int, ...]] = {
        second: (columns, n) if transposed else (n, columns),
        first: (inputs, n) if transposed else (n, inputs),
        "bias_ih": (n,),
        "bias_hh": (n,),
        "bias": (2, n) if doubled else (n,),
        "b": (n,),
        "B": (2 * n,),
        "P": (3 * hidden,),
        "weight_hr": (columns, hidden),
        "peephole": (2 if gates == 3 else 3, hidden),
        **dict.fromkeys(_PEEPHOLE_NAMES, (hidden,)),
    }
    for name in wanted:
        if name in arrays and tuple(arrays[name].shape) != wanted[name]:
            shape = tuple(arrays[name].shape)
            sizes = f"{gates} gate(s), I={inputs}, H={hidden}{sizes}" + ", reset_after=True" * doubled
            hint = ""
            if name == second and gates == 4 and shape[1 if transposed else 0] == 3 * hidden:
                keywords = {"onnx": "input_forget=1", "lstm_triton": "coupled=True"}
                coupled = keywords.get(library, f"which {library!r} has not")
                hint = f": three gates are a gru's, or a coupled lstm's, {coupled}"
            raise ValueError(f"{name} must have shape {wanted[name]} ({sizes}), got {shape}{hint}")


def _read(given: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Checked arrays by our names and with our axes, gates still in the library's order."""
    if source in ("torch", "lstm_triton"):
        rows = {name: array for name, array in given.items() if name not in _PEEPHOLE_NAMES}
        if peepholes := [given[name] for name in _PEEPHOLE_NAMES if name in given]:
            rows["peephole"] = torch.stack(peepholes)
        return rows
    if source == "onnx":
        rows = {"weight_ih": given["W"], "weight_hh": given["R"]}
        if "B" in given:
            rows["bias_ih"], rows["bias_hh"] = given["B"].chunk(2)
        if "P" in given:
            rows["peephole"] = given["P"].reshape(len(_ONNX_PEEPHOLES), -1)
        return rows
    kernel, recurrent, *bias = given.values()
    rows = {"weight_ih": kernel.mT, "weight_hh": recurrent.mT}
    if bias:
        rows["bias_ih"], rows["bias_hh"] = bias[0] if bias[0].dim() == 2 else (bias[0], torch.zeros_like(bias[0]))
    return rows


def _write(rows: dict[str, Tensor], target: str, cell: str, layout: dict[str, Any]) -> Any:
    """Our names and axes, gates in the library's order, as the library has them."""
    w_ih, w_hh = rows["weight_ih"], rows["weight_hh"]
    biases = None
    if "bias_ih" in rows or "bias_hh" in rows:
        zeros = w_ih.new_zeros(len(w_ih))
        biases = torch.stack([rows.get("bias_ih", zeros), rows.get("bias_hh", zeros)])
    if target in ("torch", "lstm_triton"):
        if biases is not None:
            rows["bias_ih"], rows["bias_hh"] = biases
        if "peephole" in rows:
            names = _PEEPHOLE_NAMES[::2] if layout["coupled"] else _PEEPHOLE_NAMES
            rows |= dict(zip(names, rows.pop("peephole"), strict=True))
        suffix = "" if layout["layer"] is None else f"_l{layout['layer']}" + "_reverse" * layout["reverse"]
        order = (*_OURS[:5], *_PEEPHOLE_NAMES)
        return {name + suffix: _copy(rows[name]) for name in order if name in rows}
    if target == "onnx":
        optional = [biases, rows.get("peephole")][: 2 if cell == "lstm" else 1]
        arrays = [w_ih[None], w_hh[None], *(None if a is None else a.reshape(1, -1) for a in optional)]
    else:
        arrays = [w_ih.mT, w_hh.mT]
        if biases is not None:
            arrays.append(biases if layout.get("reset_after") else biases.sum(0))
    return [None if array is None else _copy(array).cpu().numpy() for array in arrays]


def _reordered(rows: Tensor, have: Sequence[str], want: Sequence[str]) -> Tensor:
    """Blocks of rows, one a gate, in another order: those not wanted left out, zeros for those that were not there."""
    blocks = dict(zip(have, rows.chunk(len(have)), strict=True))
    return torch.cat([blocks.get(gate, torch.zeros_like(blocks[have[0]])) for gate in want])


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
