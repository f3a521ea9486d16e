"""What the tests of the oracle share: problems beside torch.nn and for every CellSpec, and the comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lstm_triton import reference
from lstm_triton.spec import CellSpec, variants

# cell, activation, function, torch.nn's layer
CELLS = {
    "lstm": (reference.lstm, nn.LSTM, {}),
    "gru": (reference.gru, nn.GRU, {}),
    "rnn-tanh": (reference.rnn, nn.RNN, {"nonlinearity": "tanh"}),
    "rnn-relu": (reference.rnn, nn.RNN, {"nonlinearity": "relu"}),
}


def problem(cell: str, shape: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float64) -> tuple:
    """torch.nn's layer, x [T, B, I], the states [B, H] and the layer's weights."""
    steps, batch, inputs, hidden = shape
    _, layer, options = CELLS[cell]
    torch.manual_seed(0)
    module = layer(inputs, hidden, bias=bias, dtype=dtype, **options)
    x = torch.randn(steps, batch, inputs, dtype=dtype, requires_grad=True)
    states = [torch.randn(batch, hidden, dtype=dtype, requires_grad=True) for _ in range(2 if cell == "lstm" else 1)]
    return module, x, states, list(module.parameters())


def run(cell: str, x: Tensor, states: list, weights: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    function, _, cell_options = CELLS[cell]
    if cell_options:
        options["activation"] = cell_options["nonlinearity"]
    return function(x, *states, *weights, **options)


def run_torch(module: nn.Module, x: Tensor, states: list[Tensor] | None, reverse: bool) -> tuple[Tensor, ...]:
    hx = None
    if states is not None:
        hx = tuple(s.unsqueeze(0) for s in states)
        hx = hx if len(hx) == 2 else hx[0]
    y, final = module(x.flip(0) if reverse else x, hx)
    final = final if isinstance(final, tuple) else (final,)
    return (y.flip(0) if reverse else y, *(s.squeeze(0) for s in final))


# a row without a step, one beyond T and one that says nothing
LENGTHS = torch.tensor([3, 0, 9, 5, -2, 1])
MASK = torch.tensor(
    [[1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1]]
)
RESET = torch.tensor(
    [[0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]]
)
STEP_OPTIONS = [
    {"lengths": LENGTHS},
    {"mask": MASK.bool()},
    {"reset": RESET.bool()},
    {"lengths": LENGTHS, "mask": MASK.bool()},
    {"lengths": LENGTHS, "reset": RESET.bool()},
    {"mask": MASK.bool(), "reset": RESET.bool()},
    {"lengths": LENGTHS, "mask": MASK.bool(), "reset": RESET.bool()},
]


def assert_same(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], leaves: list[Tensor], bound: float = 1e-13
) -> None:
    """Outputs and their gradients by the leaves."""
    cotangents = [torch.randn_like(t) for t in expected]
    found += torch.autograd.grad(found, leaves, cotangents)
    expected += torch.autograd.grad(expected, leaves, cotangents)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() <= bound * other.norm().clamp(min=1.0)


# What torch.nn has no words for: every variant of spec.py, and options that have to get on with each other.
TOGETHER = (
    CellSpec("lstm", ("elu", 0.7), True, 3, "hard_sigmoid", "softsign", True, cell_clip=1.0, gate_clip=2.0,
             layer_norm=True, zoneout=(0.3, 0.2)),
    CellSpec("lstm", ("thresholded_relu", 0.1), False, peephole=True, coupled=True, layer_norm=True, zoneout=(0, 0.5)),
    CellSpec("lstm", "softplus", proj=2, coupled=True, gate_clip=0.5, zoneout=(0.4, 0.0)),
    CellSpec("gru", ("scaled_tanh", 1.7, 0.6), recurrent_activation=("hard_sigmoid", 1 / 6, 0.5), reset_after=False,
             gate_clip=1.5, zoneout=0.4),
    CellSpec("gru", "linear", False, recurrent_activation=("affine", 0.1, 0.4), layer_norm=True, zoneout=0.2),
    CellSpec("rnn", ("leaky_relu", 0.2), False, gate_clip=3.0, layer_norm=True, zoneout=0.3),
)  # fmt: skip
SPECS = (*variants(), *TOGETHER)

ALL_STEPS = STEP_OPTIONS[-1]
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])

every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def tensors_of(spec: CellSpec, shape: tuple[int, ...], masks: str = "none") -> dict[str, Tensor]:
    """All float tensors of a call, a normalisation's as norm_hh.weight and norm_hh.bias."""
    T, B, I, H = shape  # noqa: E741
    shapes = {"x": (T, B, I), **spec.state_shapes(B, H), **spec.parameters(I, H)}
    if spec.layer_norm:
        norms = {"norm_ih": spec.gates * H, "norm_hh": spec.gates * H, "norm_c": H}
        for name, columns in norms.items():
            if name != "norm_c" or spec.cell == "lstm":
                shapes |= {f"{name}.weight": (columns,), f"{name}.bias": (columns,)}
    if masks != "none":
        own = (spec.gates,) if masks == "gate" else ()
        shapes |= {"input_mask": (*own, B, I), "recurrent_mask": (*own, B, spec.output(H))}
    torch.manual_seed(0)
    return {name: torch.randn(s, dtype=torch.float64, requires_grad=True) for name, s in shapes.items()}


def call(spec: CellSpec, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """The public function, which gives all cells too if it is the LSTM's."""
    arguments: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for name in {name.partition(".")[0] for name in tensors if "." in name}:
        arguments[name] = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if spec.cell == "lstm":
        options["return_cells"] = True
    return getattr(reference, spec.cell)(**arguments, **spec.options, **options)
