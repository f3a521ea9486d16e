"""LSTM, GRU and RNN give torch.nn's numbers: outputs, gradients, random draws, eager, compiled and under autocast."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_pairs import ALIKE, INTERPRETED, LAYERS, TOLERANCE, assert_close, build, mapped, results, seeded, tensors

import lstm_triton as lt

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]

# the interpreter takes its time at every step
T, B, I, H, P = 2 if INTERPRETED else 3, 2, 4, 5, 4  # noqa: E741


@dataclass(frozen=True)
class Case:
    cell: str
    own: tuple[tuple[str, Any], ...]
    layers: int
    bidirectional: bool
    bias: bool
    layout: str
    with_state: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        words = [self.cell, *(str(value) for _, value in self.own)]
        words += [f"{self.layers}layers", self.layout, str(self.dtype).split(".")[1]]
        flags = ("bidirectional", "bias", "with_state")
        return "-".join(words + [flag for flag in flags if getattr(self, flag)])

    def build(self) -> tuple[nn.Module, nn.Module]:
        options = {"batch_first": self.layout == "batch_first", "dtype": self.dtype, **dict(self.own)}
        return build(self.cell, I, H, self.layers, bias=self.bias, bidirectional=self.bidirectional, **options)

    def inputs(self) -> tuple[Tensor, Any]:
        """Input, and the initial state or None."""
        generator = torch.Generator().manual_seed(12)
        shapes = {"time_major": (T, B, I), "batch_first": (B, T, I), "unbatched": (T, I)}
        x = torch.randn(shapes[self.layout], generator=generator, dtype=self.dtype)
        if not self.with_state:
            return x, None
        rows = (self.layers * (2 if self.bidirectional else 1), *([B] if self.layout != "unbatched" else []))
        sizes = (dict(self.own).get("proj_size", H), H)
        h, c = (torch.randn(*rows, size, generator=generator, dtype=self.dtype) for size in sizes)
        return x, (h, c) if self.cell == "LSTM" else h


CELLS = [
    ("LSTM", ()),
    ("LSTM", (("proj_size", P),)),
    ("GRU", ()),
    ("RNN", (("nonlinearity", "tanh"),)),
    ("RNN", (("nonlinearity", "relu"),)),
]
CASES = [
    Case(cell, own, *rest)
    for (cell, own), *rest in product(
        CELLS,
        (1, 2, 3),
        (False, True),
        (True, False),
        ("time_major", "batch_first", "unbatched"),
        (False, True),
        (torch.float32, torch.float64),
    )
]
# a stride prime to every axis still meets each value of each
CASES = CASES[::37] if INTERPRETED else CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    ours, theirs = case.build()
    args = case.inputs()
    found = results(ours, *args)
    assert all(value.dtype == case.dtype for value in found.values())
    expected = results(theirs.double(), *mapped(Tensor.double, args))
    assert_close(found, expected, TOLERANCE[case.dtype])


@pytest.mark.parametrize("dtype", [torch.float64] if INTERPRETED else [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("p", "layout"), [(0.5, "time_major"), (0.5, "batch_first"), (1.0, "time_major")])
@pytest.mark.parametrize("cell", LAYERS)
def test_dropout_draws_what_torch_draws(cell: str, p: float, layout: str, dtype: torch.dtype) -> None:
    case = Case(cell, (("dropout", p),), 2 if INTERPRETED else 3, not INTERPRETED, True, layout, True, dtype)
    ours, theirs = case.build()
    found, expected = (results(layer, *case.inputs(), seed=3) for layer in (ours, theirs))
    assert_close(found, expected, TOLERANCE[dtype])
    assert not torch.equal(found["output[0]"], ours.eval()(*case.inputs())[0])


def test_states_that_torch_takes() -> None:
    """A list; and for unbatched input both in one tensor, or more than two."""
    ours, theirs = build("LSTM", I, H)
    x, h = torch.randn(T, B, I), torch.randn(3, 1, B, H)
    for args in ((x, [h[0], h[1]]), (x[:, 0], h[:2, :, 0]), (x[:, 0], tuple(h[:, :, 0]))):
        found, expected = (dict(tensors(layer(*args), "output")) for layer in (ours, theirs))
        assert_close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("cell", LAYERS)
def test_functional_call_uses_the_weights_it_is_given(cell: str) -> None:
    layer = LAYERS[cell][0](I, H)
    other = LAYERS[cell][0](I, H)
    x = torch.randn(T, B, I)
    found = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))[0]
    assert torch.equal(found, other(x)[0])


@pytest.mark.parametrize("cell", ALIKE)
def test_compiles_as_one_graph(cell: str) -> None:
    torch.compiler.reset()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, I)
            self.layer = LAYERS[cell][0](I, H, 1 if INTERPRETED else 2, bidirectional=True)
            self.head = nn.Linear(2 * H, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.embed(x).tanh())[0])

    torch.manual_seed(7)
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for steps in [T] if INTERPRETED else [T, T + 1]:
        x = torch.randn(steps, B, 2)
        expected = model(x)
        expected_grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        found = compiled(x)
        found_grads = torch.autograd.grad(found.square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_grads, expected_grads)


@pytest.mark.parametrize("cell", LAYERS)
def test_autocast(cell: str) -> None:
    """All in autocast's dtype, as torch.nn.LSTM, whatever the dtypes of input and state are."""
    layer = LAYERS[cell][0](I, H)
    h = torch.zeros(1, B, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, state in ((torch.zeros(1, B, I), h), (torch.zeros(1, B, I).bfloat16(), h), (torch.zeros(1, B, I), None)):
            hx = (state, state) if cell == "LSTM" and state is not None else state
            assert all(t.dtype == torch.bfloat16 for _, t in tensors(layer(x, hx)))
    with pytest.raises(ValueError, match="RNN input dtype"):
        layer(torch.zeros(1, B, I).bfloat16())


COMMON = {
    "recurrent_activation": "sigmoid",
    "layer_norm": False,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "input_dropout": 0.0,
    "dropout_per_gate": False,
    "gate_clip": None,
    "activation": "tanh",
}
OWN = {
    "LSTM": {"peephole": False, "coupled": False, "cell_clip": None, "output_activation": None},
    "GRU": {"reset_after": True},
    "RNN": {},
}


@pytest.mark.parametrize("cell", LAYERS)
def test_options_at_their_defaults_are_torchs_layer(cell: str) -> None:
    """And an option of another layer is no argument."""
    layer, theirs = LAYERS[cell]
    torch.manual_seed(0)
    ours = layer(I, H, **COMMON, **OWN[cell])
    assert {name: getattr(ours, name) for name in COMMON | OWN[cell]} == COMMON | OWN[cell]
    assert repr(ours) == repr(theirs(I, H))
    expected = build(cell, I, H)[1]
    x = torch.randn(T, B, I, generator=seeded())
    assert_close(results(ours, x), results(expected, x), TOLERANCE[torch.float32])
    for stranger in {"peephole", "reset_after", "wings"} - OWN[cell].keys():
        with pytest.raises(TypeError, match=stranger):
            layer(I, H, **{stranger: True})


@pytest.mark.parametrize("cell", LAYERS)
def test_engine_and_memory_are_handed_on(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS[cell][0](I, H, engine="reference", memory="recompute")
    handed = []
    function = getattr(lt.functional, cell.lower())
    monkeypatch.setattr(
        lt.functional,
        cell.lower(),
        lambda *args, **options: handed.append(options) or function(*args, **options),
    )
    layer(torch.zeros(T, B, I))
    assert [(options["engine"], options["memory"]) for options in handed] == [("reference", "recompute")]
    with pytest.raises(ValueError, match=r"engine must be one of 'auto'.*got 'treadmill'"):
        LAYERS[cell][0](I, H, engine="treadmill")
    with pytest.raises(ValueError, match=r"memory must be one of 'store', 'recompute', got 'forget'"):
        LAYERS[cell][0](I, H, memory="forget")


@pytest.mark.parametrize("cell", LAYERS)
def test_recomputing_changes_no_result(cell: str) -> None:
    store, recompute = (LAYERS[cell][0](I, H, bidirectional=True, memory=m) for m in ("store", "recompute"))
    recompute.load_state_dict(store.state_dict())
    found, expected = (results(layer, torch.randn(T, B, I, generator=seeded())) for layer in (recompute, store))
    assert_close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.native
@pytest.mark.parametrize("cell", LAYERS)
def test_traced_on_the_cpu_as_one_operator(cell: str) -> None:
    """Not as ATen's layer, which inductor turns into an oneDNN operator and miscompiles in inference."""
    torch.compiler.reset()
    layer = LAYERS[cell][0](I, H).eval()
    called = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(T, B, I)
    with torch.no_grad():
        y, _ = torch.compile(layer, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(y, layer(x)[0])
    assert any("lstm_triton" in name for name in called)
    assert not any(re.search(r"\b(lstm|gru|rnn_tanh|rnn_relu)\b", name) for name in called)
