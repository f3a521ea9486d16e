"""Arguments of a cell that keep it from the points where a gradient jumps: relu's at zero, where a clip sets in.

There the last bit decides about the gradient of a unit: 16 bits would decide some otherwise than float64 does and be no
less right. So one input drives every gate far to one side or the other, and all else that goes into it is made small.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lstm_triton.spec import Activation, CellSpec, activation_of

#: How far from the last of its kinks a gate is driven.
BEYOND = 4.0
#: What goes into a gate beside what drives it is this much smaller than it would be.
SMALLER = 8
#: Where no kink of the gates' says how far: gates that are hardly open, or all but wide.
LITTLE, MUCH = 0.5, 5.0


def kinks(spec: CellSpec, activation: Activation) -> list[float]:
    """Sizes of pre-activations at which the gradient of a gate with this activation jumps."""
    name, alpha, beta = activation_of(activation)
    found: list[float] = []
    if name in ("relu", "leaky_relu") or (name == "elu" and alpha != 1):
        found = [0.0]
    elif name == "thresholded_relu":
        found = [alpha]
    elif name == "hard_sigmoid" and alpha != 0:
        found = [-beta / alpha, (1 - beta) / alpha]
    clip = spec.gate_clip
    found = [abs(kink) for kink in found if clip is None or abs(kink) < clip]
    return sorted({*found, *([] if clip is None else [clip])})


def levels(found: list[float]) -> list[float]:
    """Sizes far from these kinks: half-way between each two of them, and beyond the last."""
    return [(low + high) / 2 for low, high in pairwise([0.0, *found]) if low < high] + [found[-1] + BEYOND]


def has_kinks(spec: CellSpec) -> bool:
    return spec.cell_clip is not None or any(kinks(spec, activation) for activation in _activations(spec).values())


def avoid(spec: CellSpec, arguments: dict[str, Tensor | None], generator: torch.Generator) -> None:
    """Change the arguments of a function, or of a module with its parameters' names, in place; none without kinks.

    In a module it is the first layer that is driven: the others' inputs are not so large. A clip of the cell state is
    met by every second unit, of which gate g is large, and kept from by the others; i and f are held by their biases.
    """
    if not has_kinks(spec):
        return
    for name, tensor in arguments.items():
        if tensor is None:
            continue
        if name == "x":
            tensor[..., 0] = torch.where(tensor[..., 0] < 0, -1, 1)
        elif name == "c0" and spec.cell_clip is not None:
            tensor /= 2 * SMALLER
        elif name.startswith(("w_ih", "weight_ih")):
            tensor /= SMALLER
            _drive(spec, tensor.unflatten(0, (spec.gates, -1))[..., 0], generator)
        elif name.startswith(("w_hh", "weight_hh", "b_", "bias_", "peephole", "weight_c")):
            tensor /= SMALLER
            if spec.cell_clip is not None and name.startswith(("b_ih", "bias_ih")):
                _hold(spec, tensor.unflatten(0, (spec.gates, -1)))


def _drive(spec: CellSpec, column: Tensor, generator: torch.Generator) -> None:
    """column [G, H]: the weights of the input that is 1 or -1."""
    for row, (gate, activation) in zip(column, _activations(spec).items(), strict=True):
        found = kinks(spec, activation)
        if spec.cell_clip is not None and gate in "if":
            row.zero_()
        elif spec.cell_clip is not None and gate == "g":
            little, much = _sizes(spec, activation)
            row[0::2], row[1::2] = much, min(little, LITTLE / 2)
        elif found:
            sizes = torch.tensor(levels(found), dtype=row.dtype)
            which = torch.randint(2 * len(sizes), row.shape, generator=generator)
            row.copy_(torch.cat((sizes, -sizes))[which])


def _hold(spec: CellSpec, biases: Tensor) -> None:
    """biases [G, H] of an LSTM whose cell state is clipped: i g is all of it in every second unit, little in others."""
    little, much = _sizes(spec, spec.recurrent_activation)
    for row, gate in zip(biases, spec.gate_names, strict=True):
        if gate in "if":
            row[0::2], row[1::2] = much if gate == "i" else -much, -little


def _sizes(spec: CellSpec, activation: Activation) -> tuple[float, float]:
    found = kinks(spec, activation)
    sizes = levels(found) if found else [LITTLE, MUCH]
    return sizes[0], sizes[-1]


def _activations(spec: CellSpec) -> dict[str, Activation]:
    return {name: spec.activation if name in "gnh" else spec.recurrent_activation for name in spec.gate_names}
