"""What a layer is told beyond torch.nn's arguments, under which names, and which cell it comes to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .spec import CellSpec

Device = torch.device | str | int | None
#: The initial or final state as the layers take and return it: of LSTM the pair (h, c).
State = Tensor | tuple[Tensor, Tensor]

#: torch.nn's names of a layer's parameters, by the functions' names of them.
PARAMETER_NAMES = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "w_hr": "weight_hr"}

#: Options that change what a layer computes, by their defaults. Those from recurrent_dropout on are the layers' alone,
#: the others the cell's, under their names in CellSpec.
OPTIONS: dict[str, object] = {
    "peephole": False,
    "coupled": False,
    "cell_clip": None,
    "output_activation": None,
    "reset_after": True,
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "layer_norm": False,
    "zoneout": 0.0,
    "gate_clip": None,
    "recurrent_dropout": 0.0,
    "input_dropout": 0.0,
    "dropout_per_gate": False,
}
_OF_THE_CELL = tuple(OPTIONS)[:-3]


def spec_of(layer: nn.Module) -> CellSpec:
    """The cell of all of a layer's layers and directions. Raises ValueError or TypeError naming a wrong option."""
    options = {name: getattr(layer, name) for name in _OF_THE_CELL if hasattr(layer, name)}
    return CellSpec(layer.cell, bias=layer.bias, proj=layer.proj_size, **options)


def shown_options(module: nn.Module, **defaults: object) -> str:
    """ ", name=value" for each of a module's attributes that is not at its default."""
    options = {name: (getattr(module, name), default) for name, default in defaults.items()}
    # torch.nn shows a flag that is not a bool, whatever its value
    changed = [n for n, (v, d) in options.items() if (v is not d if isinstance(d, bool) else v != d)]
    return "".join(f", {name}={options[name][0]}" for name in changed)
