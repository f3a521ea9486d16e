"""LSTM, GRU and RNN against torch.nn's: the same numbers, gradients, state dicts, random draws and errors."""

from __future__ import annotations

import copy
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from itertools import chain, product

import pytest
import torch
from torch import Tensor, nn

import lstm_triton as lt

pytestmark = pytest.mark.both

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
PAIRS = {"LSTM": (lt.LSTM, nn.LSTM), "GRU": (lt.GRU, nn.GRU), "RNN": (lt.RNN, nn.RNN)}
# relative error ||a - b|| / ||b|| against torch.nn in float64
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
T, B, I, H = 3, 2, 4, 5  # noqa: E741


@dataclass(frozen=True)
class Case:
    cell: str
    nonlinearity: str | None
    layers: int
    bidirectional: bool
    bias: bool
    layout: str
    with_state: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        words = [self.nonlinearity or self.cell, f"{self.layers}layers", self.layout, str(self.dtype).split(".")[1]]
        flags = ("bidirectional", "bias", "with_state")
        return "-".join(words + [flag for flag in flags if getattr(self, flag)])

    def build(self) -> tuple[nn.Module, nn.Module]:
        """Ours, and torch.nn's in float64 with the same weights."""
        options = {"nonlinearity": self.nonlinearity} if self.nonlinearity else {}
        options |= {"bias": self.bias, "batch_first": self.layout == "batch_first", "dtype": self.dtype}
        options |= {"bidirectional": self.bidirectional}
        built = []
        for layer in PAIRS[self.cell]:
            torch.manual_seed(0)
            built.append(layer(I, H, self.layers, **options))
        ours, theirs = built
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)
        return ours, theirs.double()

    def inputs(self) -> list[Tensor]:
        """Input, then the initial states if any."""
        directions = 2 if self.bidirectional else 1
        x = {"time_major": (T, B, I), "batch_first": (B, T, I), "unbatched": (T, I)}[self.layout]
        state = (self.layers * directions, B, H) if self.layout != "unbatched" else (self.layers * directions, H)
        shapes = [x] + [state] * ((2 if self.cell == "LSTM" else 1) if self.with_state else 0)
        generator = torch.Generator().manual_seed(12)
        return [torch.randn(shape, generator=generator, dtype=self.dtype) for shape in shapes]


CELLS = [("LSTM", None), ("GRU", None), ("RNN", "tanh"), ("RNN", "relu")]
CASES = [
    Case(cell, nonlinearity, *rest)
    for (cell, nonlinearity), *rest in product(
        CELLS,
        (1, 2, 3),
        (False, True),
        (True, False),
        ("time_major", "batch_first", "unbatched"),
        (False, True),
        (torch.float32, torch.float64),
    )
]
# the interpreter is slow: a stride prime to every axis still meets each value of each
CASES = CASES[::17] if INTERPRETED else CASES


def flatten(result: tuple) -> list[Tensor]:
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


def call(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    x, *state = inputs
    if not state:
        return flatten(module(x))
    return flatten(module(x, tuple(state) if len(state) == 2 else state[0]))


def results(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, final states, and every gradient of a fixed random combination of them, by name."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    found = dict(zip(("output", "h_n", "c_n"), call(module, inputs), strict=False))
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in found.values()]
    names = [name for name, _ in module.named_parameters()]
    leaves = dict(zip(("input", "h_0", "c_0"), inputs, strict=False)) | {n: module.get_parameter(n) for n in names}
    grads = torch.autograd.grad(
        sum((t * w).sum() for t, w in zip(found.values(), weights, strict=True)), list(leaves.values())
    )
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error, size = (found[name].double() - value).norm(), value.norm()
        # not a quotient: a relu layer may be dead, and all its gradients zero
        assert error <= tolerance * size, f"{name}: error {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    ours, theirs = case.build()
    inputs = case.inputs()
    found = results(ours, inputs)
    assert all(value.dtype == case.dtype for value in found.values())
    assert_close(found, results(theirs, [t.double() for t in inputs]), TOLERANCE[case.dtype])


@pytest.mark.parametrize("cell", PAIRS)
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_draws_what_torch_draws(cell: str, p: float, batch_first: bool) -> None:
    case = Case(cell, None, 3, True, True, "batch_first" if batch_first else "time_major", True, torch.float64)
    ours, theirs = case.build()
    outputs = {}
    for name, module in (("ours", ours), ("theirs", theirs)):
        module.dropout = p
        torch.manual_seed(3)
        outputs[name] = results(module, case.inputs())
        module.eval()
        outputs[name]["eval"] = call(module, case.inputs())[0]
    for name, value in outputs["theirs"].items():
        torch.testing.assert_close(outputs["ours"][name], value, rtol=1e-11, atol=1e-13)
    assert not torch.equal(outputs["ours"]["output"], outputs["ours"]["eval"])


@pytest.mark.parametrize("cell", PAIRS)
def test_state_dicts_load_both_ways(cell: str) -> None:
    mine, other = PAIRS[cell]
    for source, target in ((mine, other), (other, mine)):
        torch.manual_seed(4)
        donor, taker = source(I, H, 2, bidirectional=True), target(I, H, 2, bidirectional=True)
        assert list(donor.state_dict()) == list(taker.state_dict())
        taker.load_state_dict(donor.state_dict())
        x = torch.randn(T, B, I)
        torch.testing.assert_close(call(taker, [x]), call(donor, [x]))


@pytest.mark.parametrize("cell", PAIRS)
def test_all_weights_have_torchs_order(cell: str) -> None:
    for bias in (True, False):
        layers = []
        for layer in PAIRS[cell]:
            torch.manual_seed(5)
            layers.append(layer(I, H, 2, bias=bias, bidirectional=True))
            layers[-1].flatten_parameters()
        ours, theirs = (layer.all_weights for layer in layers)
        assert [len(group) for group in ours] == [len(group) for group in theirs]
        assert all(torch.equal(a, b) for a, b in zip(chain(*ours), chain(*theirs), strict=True))


@pytest.mark.parametrize("cell", PAIRS)
def test_reset_parameters_draws_anew(cell: str) -> None:
    ours, theirs = (layer(I, H, 2) for layer in PAIRS[cell])
    for layer in (ours, theirs):
        torch.manual_seed(6)
        layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("cell", PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "dropout": 0.25, "bidirectional": True},
        {"bias": False, "batch_first": True},
    ],
    ids=str,
)
def test_repr(cell: str, options: dict) -> None:
    ours, theirs = (layer(I, H, **options) for layer in PAIRS[cell])
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("cell", PAIRS)
def test_copies(cell: str) -> None:
    layer = PAIRS[cell][0](I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    expected = call(layer, [x])
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert all(torch.equal(a, b) for a, b in zip(call(twin, [x]), expected, strict=True))
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
        assert layer.weight_hh_l0.abs().sum() > 0


@pytest.mark.parametrize("cell", PAIRS)
def test_functional_call_uses_the_weights_it_is_given(cell: str) -> None:
    layer = PAIRS[cell][0](I, H)
    other = PAIRS[cell][0](I, H)
    x = torch.randn(T, B, I)
    found = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))[0]
    assert torch.equal(found, other(x)[0])


@pytest.mark.parametrize("cell", PAIRS)
def test_compiles_as_one_graph(cell: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, I)
            self.layer = PAIRS[cell][0](I, H, 2, bidirectional=True)
            self.head = nn.Linear(2 * H, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.embed(x).tanh())[0])

    torch.manual_seed(7)
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for steps in (T, T + 2):
        x = torch.randn(steps, B, 2)
        expected = model(x)
        expected_grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        found = compiled(x)
        found_grads = torch.autograd.grad(found.square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_grads, expected_grads)


def outcome(function) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", ""


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
    ((I, H), {"proj_size": -1}),
    ((I, H), {"proj_size": H}),
]


@pytest.mark.parametrize("cell", PAIRS)
@pytest.mark.parametrize("arguments", CONSTRUCTIONS, ids=str)
def test_wrong_arguments(cell: str, arguments: tuple) -> None:
    args, kwargs = arguments
    mine, other = (outcome(lambda layer=layer: layer(*args, **kwargs)) for layer in PAIRS[cell])
    assert other[0] != "no error"
    assert mine == other


def test_unknown_nonlinearity() -> None:
    mine, other = (outcome(lambda layer=layer: layer(I, H, nonlinearity="sin")) for layer in PAIRS["RNN"])
    assert mine == other == ("ValueError", "Unknown nonlinearity 'sin'. Select from 'tanh' or 'relu'.")


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


@pytest.mark.parametrize("cell", PAIRS)
@pytest.mark.parametrize("what", CALLS)
def test_wrong_inputs(cell: str, what: str) -> None:
    x, state = CALLS[what]
    hx = (state, state) if cell == "LSTM" and state is not None else state
    mine, other = (outcome(lambda layer=layer: layer(I, H)(x, hx)) for layer in PAIRS[cell])
    assert other[0] != "no error"
    assert mine == other


def test_wrong_cell_state() -> None:
    hx = (torch.zeros(1, B, H), torch.zeros(1, B, H + 1))
    mine, other = (outcome(lambda layer=layer: layer(I, H)(torch.zeros(T, B, I), hx)) for layer in PAIRS["LSTM"])
    assert other[0] == "RuntimeError"
    assert mine == other


def test_dropout_warning_names_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as caught:
        lt.GRU(I, H, dropout=0.5)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("cell", PAIRS)
def test_empty_batch(cell: str) -> None:
    x = torch.zeros(T, 0, I, requires_grad=True)
    mine, other = (flatten(layer(I, H, 2)(x)) for layer in PAIRS[cell])
    assert [t.shape for t in mine] == [t.shape for t in other]


COMMON = {
    "recurrent_activation": "hard_sigmoid",
    "layer_norm": True,
    "zoneout": 0.1,
    "recurrent_dropout": 0.1,
    "input_dropout": 0.1,
    "dropout_per_gate": True,
    "gate_clip": 5.0,
    "memory": "recompute",
    "activation": "softsign",
}
OWN = {
    "LSTM": {"proj_size": 3, "peephole": True, "coupled": True, "cell_clip": 3.0, "output_activation": "relu"},
    "GRU": {"reset_after": False},
    "RNN": {},
}


@pytest.mark.parametrize("cell", PAIRS)
def test_later_options_are_refused_by_name(cell: str) -> None:
    layer = PAIRS[cell][0]
    for name, value in (COMMON | OWN[cell]).items():
        with pytest.raises(NotImplementedError, match=name):
            layer(I, H, **{name: value})
    for stranger in {"peephole", "reset_after", "wings"} - OWN[cell].keys():
        with pytest.raises(TypeError, match=stranger):
            layer(I, H, **{stranger: True})
    x = torch.zeros(T, B, I)
    every = torch.ones(T, B, dtype=torch.bool)
    calls = {"lengths": torch.full((B,), T), "mask": every, "reset": every, "return_cells": True}
    for name, value in calls.items():
        with pytest.raises(NotImplementedError, match=name):
            layer(I, H)(x, **{name: value})
    with pytest.raises(NotImplementedError, match="PackedSequence"):
        layer(I, H)(nn.utils.rnn.pack_sequence([x[:, 0]]))


@pytest.mark.parametrize("cell", PAIRS)
def test_later_options_at_their_defaults_are_taken(cell: str) -> None:
    options = {
        "LSTM": {"peephole": False, "cell_clip": None, "zoneout": (0.0, 0.0)},
        "GRU": {"reset_after": True, "memory": "store"},
        "RNN": {"gate_clip": None, "layer_norm": False},
    }
    assert PAIRS[cell][0](I, H, **options[cell])(torch.zeros(T, B, I))[0].shape == (T, B, H)


@pytest.mark.parametrize("cell", PAIRS)
def test_engine_is_handed_on(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PAIRS[cell][0](I, H, engine="reference")
    assert "engine=reference" in repr(layer)
    handed = []
    function = getattr(lt.functional, cell.lower())
    monkeypatch.setattr(
        lt.functional,
        cell.lower(),
        lambda *args, **options: handed.append(options["engine"]) or function(*args, **options),
    )
    layer(torch.zeros(T, B, I))
    assert handed == ["reference"]
    with pytest.raises(ValueError, match=r"engine must be one of 'auto'.*got 'treadmill'"):
        PAIRS[cell][0](I, H, engine="treadmill")


@pytest.mark.parametrize("bad", [1, 3])
def test_lstm_takes_two_states(bad: int) -> None:
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        lt.LSTM(I, H)(torch.zeros(T, B, I), (torch.zeros(1, B, H),) * bad)


@pytest.mark.native
@pytest.mark.parametrize("cell", PAIRS)
def test_traced_on_the_cpu_as_plain_operations(cell: str) -> None:
    """Not as ATen's layer, which inductor turns into an oneDNN operator and miscompiles in inference."""
    layer = PAIRS[cell][0](I, H).eval()
    called = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(T, B, I)
    with torch.no_grad():
        y, _ = torch.compile(layer, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(y, layer(x)[0])
    assert any("tanh" in name or "relu" in name for name in called)
    assert not any(re.search(r"\b(lstm|gru|rnn_tanh|rnn_relu)\b", name) for name in called)
