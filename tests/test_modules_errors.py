"""What the layers refuse, when they are built and when they are called: torch.nn's exceptions, in its words."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_pairs import INTERPRETED, LAYERS, outcome

import lstm_triton as lt

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]

# the interpreter takes its time at every step
T, B, I, H, P = 2 if INTERPRETED else 3, 2, 4, 5, 4  # noqa: E741

CONSTRUCTIONS = [
    ((I, 0), {}),
    ((0, H), {}),
    ((I, -1), {}),
    ((I, 5.0), {}),
    (("4", H), {}),
    ((I, H, 0), {}),
    ((I, H), {"bias": 1}),
    ((I, H), {"batch_first": 1}),
    ((I, H, 2), {"dropout": 1.5}),
    ((I, H, 2), {"dropout": -0.1}),
    ((I, H, 2), {"dropout": True}),
    ((I, H, 2), {"dropout": "much"}),
    ((I, H, 1), {"dropout": 0.5}),
    ((I, H, 1.0), {}),
    ((I, H, "2"), {}),
    ((I, H, 2), {"dropout": None}),
    ((I, H, 2), {"dropout": float("nan")}),
    ((I, H, 2), {"dropout": torch.tensor(0.5)}),
    ((I, H), {"dtype": torch.int64}),
    ((I, H), {"device": "treadmill"}),
    ((I, H), {"proj_size": -1}),
    ((I, H), {"proj_size": H}),
    ((I, H), {"proj_size": 2.0}),
    ((I, H), {"proj_size": None}),
]


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("arguments", CONSTRUCTIONS, ids=str)
def test_wrong_arguments(cell: str, arguments: tuple) -> None:
    args, kwargs = arguments
    mine, other = (outcome(lambda layer=layer: layer(*args, **kwargs)) for layer in LAYERS[cell])
    assert other[0] != "no error"
    assert mine == other


def test_unknown_nonlinearity() -> None:
    mine, other = (outcome(lambda layer=layer: layer(I, H, nonlinearity="sin")) for layer in LAYERS["RNN"])
    assert mine == other == ("ValueError", "Unknown nonlinearity 'sin'. Select from 'tanh' or 'relu'.")


@pytest.mark.parametrize("cell", LAYERS)
def test_names_that_are_no_argument(cell: str) -> None:
    for args, kwargs in (((), {}), ((I,), {}), ((I, H), {"wings": 2}), ((I, H), {"mode": cell})):
        mine, other = (outcome(lambda layer=layer: layer(*args, **kwargs)) for layer in LAYERS[cell])  # noqa: B023
        assert mine[0] == other[0] == "TypeError"
        assert mine[1].startswith(f"{cell}.__init__() ")
    mine, other = (outcome(lambda layer=layer: layer(I, H, 1, "relu", nonlinearity="tanh")) for layer in LAYERS["RNN"])
    assert mine[0] == other[0] == "TypeError"


def test_dropout_warning_names_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as caught:
        lt.GRU(I, H, dropout=0.5)
    assert caught[0].filename == __file__


# input and the shape of each state; the layer has one layer and one direction
CALLS = {
    "1-D input": (torch.zeros(I), None),
    "4-D input": (torch.zeros(1, T, B, I), None),
    "input size": (torch.zeros(T, B, I + 1), None),
    "input dtype": (torch.zeros(T, B, I, dtype=torch.float64), None),
    "integer input": (torch.zeros(T, B, I, dtype=torch.int64), None),
    "no steps": (torch.zeros(0, B, I), None),
    "input on another device": (torch.zeros(T, B, I, device="meta"), None),
    "unbatched input, batched state": (torch.zeros(T, I), torch.zeros(1, 1, H)),
    "batched input, unbatched state": (torch.zeros(T, B, I), torch.zeros(1, H)),
    "state's layers": (torch.zeros(T, B, I), torch.zeros(2, B, H)),
    "state's batch": (torch.zeros(T, B, I), torch.zeros(1, B + 1, H)),
    "state's size": (torch.zeros(T, B, I), torch.zeros(1, B, H + 1)),
    "unbatched state's size": (torch.zeros(T, I), torch.zeros(1, H + 1)),
    "state on another device": (torch.zeros(T, B, I), torch.zeros(1, B, H, device="meta")),
}


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("what", CALLS)
def test_wrong_inputs(cell: str, what: str) -> None:
    x, state = CALLS[what]
    hx = (state, state) if cell == "LSTM" and state is not None else state
    mine, other = (outcome(lambda layer=layer: layer(I, H)(x, hx)) for layer in LAYERS[cell])
    assert other[0] != "no error"
    assert mine == other


def test_wrong_cell_state() -> None:
    hx = (torch.zeros(1, B, H), torch.zeros(1, B, H + 1))
    mine, other = (outcome(lambda layer=layer: layer(I, H)(torch.zeros(T, B, I), hx)) for layer in LAYERS["LSTM"])
    assert other[0] == "RuntimeError"
    assert mine == other


@pytest.mark.parametrize("dims", [3, 2])
@pytest.mark.parametrize("shapes", [(H, H), (P, P), (P - 1, H), (H, P), (P, H + 1)], ids=str)
def test_wrong_states_with_projections(shapes: tuple[int, int], dims: int) -> None:
    x = torch.zeros(T, B, I) if dims == 3 else torch.zeros(T, I)
    hx = tuple(torch.zeros(1, *([B] if dims == 3 else []), size) for size in shapes)
    mine, other = (outcome(lambda layer=layer: layer(I, H, proj_size=P)(x, hx)) for layer in LAYERS["LSTM"])
    assert other[0] == "RuntimeError"
    assert mine == other


@pytest.mark.parametrize("what", ["state", "parameter"])
@pytest.mark.parametrize("cell", LAYERS)
def test_mixed_dtypes(cell: str, what: str) -> None:
    """RuntimeError as in torch.nn, where the words are those of the kernel that met the wrong tensor first."""
    h = torch.zeros(1, B, H, dtype=torch.float64 if what == "state" else torch.float32)
    for layer in LAYERS[cell]:
        layer = layer(I, H)
        if what == "parameter":
            layer.bias_hh_l0 = nn.Parameter(layer.bias_hh_l0.double())
        kind = "hidden" if what == "state" else "parameter"
        words = f"Input and {kind} tensors are not the same dtype, found input tensor with Float and {kind} tensor with"
        with pytest.raises(RuntimeError, match=f"{words} Double" if isinstance(layer, LAYERS[cell][0]) else None):
            layer(torch.zeros(T, B, I), (h, h) if cell == "LSTM" else h)


@pytest.mark.parametrize("cell", LAYERS)
def test_states_of_wrong_structure(cell: str) -> None:
    h, c = torch.zeros(2, 1, B, H)
    structures = [3, (h,), (h, c, h), (h, None), torch.zeros(1, 1, B, H)]
    if cell != "LSTM":
        structures += [(h, c), [h]]
    for hx in structures:
        mine, other = (outcome(lambda layer=layer: layer(I, H)(torch.zeros(T, B, I), hx)) for layer in LAYERS[cell])  # noqa: B023
        assert other[0] != "no error"
        assert mine == other
    for x in ([1.0], (torch.zeros(T, B, I), h)):
        mine, other = (outcome(lambda layer=layer: layer(I, H)(x)) for layer in LAYERS[cell])  # noqa: B023
        assert other[0] == "AttributeError"
        assert mine == other


@pytest.mark.parametrize("hx", [torch.zeros(2, 1, B, H), {0: torch.zeros(1, B, H), 1: torch.zeros(1, B, H)}], ids=type)
def test_both_states_in_another_container(hx: object) -> None:
    """Not for batched input: TypeError, of which torch.nn's text lists every signature."""
    for layer in LAYERS["LSTM"]:
        with pytest.raises(TypeError, match=r"^lstm\(\)"):
            layer(I, H)(torch.zeros(T, B, I), hx)


@pytest.mark.parametrize("cell", LAYERS)
def test_parameters_and_attributes_that_no_longer_fit(cell: str) -> None:
    layer = LAYERS[cell][0](I, H, 2)
    x = torch.zeros(T, B, I)
    layer.num_layers = 1
    with pytest.raises(RuntimeError, match=r"num_layers=1, bidirectional=False do not fit .* 2 layers"):
        layer(x)
    layer.num_layers, layer.bias_hh_l0 = 2, None
    with pytest.raises(TypeError, match="bias_hh_l0 must be a Tensor, got None"):
        layer(x)
