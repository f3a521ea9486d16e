"""LSTM, GRU and RNN against torch.nn's: the same numbers, gradients, state dicts, random draws and errors."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_pairs import ALIKE, INTERPRETED, LAYERS, TOLERANCE, assert_close, build, mapped, outcome, results, tensors

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


@pytest.mark.parametrize("cell", LAYERS)
def test_state_dicts_load_both_ways(cell: str) -> None:
    mine, other = LAYERS[cell]
    for source, target in ((mine, other), (other, mine)):
        torch.manual_seed(4)
        donor, taker = source(I, H, 2, bidirectional=True), target(I, H, 2, bidirectional=True)
        assert list(donor.state_dict()) == list(taker.state_dict())
        taker.load_state_dict(donor.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(donor.parameters(), taker.parameters(), strict=True))


STACKS = [
    *product(LAYERS, [{}, {"num_layers": 2, "bias": False, "bidirectional": True}]),
    *(("LSTM", {"num_layers": 2, "proj_size": P, "bidirectional": True, "bias": bias}) for bias in (True, False)),
]


@pytest.mark.parametrize(("cell", "options"), STACKS, ids=str)
def test_weights_are_listed_as_torch_lists_them(cell: str, options: dict) -> None:
    """Under the names, private ones too, that code which initialises or walks layers uses."""
    ours, theirs = build(cell, I, H, **options)
    ours.flatten_parameters()
    assert ours.mode == theirs.mode
    assert ours._all_weights == theirs._all_weights
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert [len(group) for group in ours.all_weights] == [len(group) for group in theirs.all_weights]
    for mine, other in (
        (chain(*ours.all_weights), chain(*theirs.all_weights)),
        (ours._flat_weights, theirs._flat_weights),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


@pytest.mark.parametrize("cell", LAYERS)
def test_reset_parameters_draws_anew(cell: str) -> None:
    ours, theirs = (layer(I, H, 2) for layer in LAYERS[cell])
    for layer in (ours, theirs):
        torch.manual_seed(6)
        layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "dropout": 0.25, "bidirectional": True},
        {"bias": False, "batch_first": True},
        {"bidirectional": 1, "num_layers": True},
        {"bidirectional": 0},
    ],
    ids=str,
)
def test_repr(cell: str, options: dict) -> None:
    ours, theirs = (layer(I, H, **options) for layer in LAYERS[cell])
    assert repr(ours) == repr(theirs)


def test_repr_of_options() -> None:
    ours, theirs = build("LSTM", I, H, 2, proj_size=P)
    assert repr(ours) == repr(theirs) == f"LSTM({I}, {H}, proj_size={P}, num_layers=2)"
    layer = lt.GRU(I, H, batch_first=True, memory="recompute", engine="reference")
    assert repr(layer) == f"GRU({I}, {H}, batch_first=True, memory=recompute, engine=reference)"


@pytest.mark.parametrize("cell", LAYERS)
def test_arguments_by_position(cell: str) -> None:
    own = ["relu"] if cell == "RNN" else []
    last = [P] if cell == "LSTM" else []
    args = [I, H, 2, *own, False, True, 0.5, True, *last]
    ours, theirs = build(cell, *args)
    assert repr(ours) == repr(theirs)
    names = [n for n, p in inspect.signature(LAYERS[cell][0]).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert repr(LAYERS[cell][0](**dict(zip(names, args, strict=False)))) == repr(theirs)
    assert LAYERS[cell][0](*args, "meta", torch.float64).weight_ih_l0.is_meta


@pytest.mark.parametrize("cell", ALIKE)
def test_copies(cell: str) -> None:
    layer = LAYERS[cell][0](I, H, bidirectional=True)
    x = torch.randn(1, B, I)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors(twin(x)), tensors(expected), strict=True))
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
        assert layer.weight_hh_l0.abs().sum() > 0


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


@pytest.mark.parametrize("cell", LAYERS)
def test_weights_listed_anew(cell: str) -> None:
    """As models do for torch.nn that change one; nothing can be changed by the list alone."""
    layer = LAYERS[cell][0](I, H)
    x = torch.randn(T, B, I)
    del layer.weight_hh_l0
    layer.weight_hh_l0 = torch.zeros(layer.weight_ih_l0.shape[0], H)
    layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]
    assert layer._flat_weights[1] is layer.weight_hh_l0
    y, _ = layer(x)
    with pytest.raises(ValueError, match="set weight_ih_l0 to change one"):
        layer._flat_weights = [torch.zeros_like(w) for w in layer._flat_weights]
    with pytest.raises(TypeError):
        layer._flat_weights[0] = torch.zeros_like(layer.weight_ih_l0)
    assert torch.equal(layer(x)[0], y)
    parametrize.register_parametrization(layer, "weight_ih_l0", nn.Identity())
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


def test_states_that_torch_takes() -> None:
    """A list; and for unbatched input both in one tensor, or more than two."""
    ours, theirs = build("LSTM", I, H)
    x, h = torch.randn(T, B, I), torch.randn(3, 1, B, H)
    for args in ((x, [h[0], h[1]]), (x[:, 0], h[:2, :, 0]), (x[:, 0], tuple(h[:, :, 0]))):
        found, expected = (dict(tensors(layer(*args), "output")) for layer in (ours, theirs))
        assert_close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([2, 1])], ids=["padded", "packed"])
@pytest.mark.parametrize(("cell", "options"), STACKS, ids=str)
def test_checks_that_others_call(cell: str, options: dict, batch_sizes: Tensor | None, batch_first: bool) -> None:
    """check_forward_args and its parts, on their own."""
    pair = build(cell, I, H, batch_first=batch_first, **options)
    good = torch.zeros(T, B, I) if batch_sizes is None else torch.zeros(3, I)
    sizes = [layer.get_expected_hidden_size(good, batch_sizes) for layer in pair]
    assert sizes[0] == sizes[1]
    h = c = torch.zeros(sizes[0])
    if cell == "LSTM":
        sizes = [layer.get_expected_cell_size(good, batch_sizes) for layer in pair]
        assert sizes[0] == sizes[1]
        c = torch.zeros(sizes[0])
    for x in (good, good[..., 1:], good[0], good[None], good.double()):
        mine, other = (outcome(lambda layer=layer: layer.check_input(x, batch_sizes)) for layer in pair)  # noqa: B023
        assert mine == other
        assert (mine[0] == "no error") == (x is good)
    for hx in ((h, c), (h[1:], c), (h, c[:, 1:]), (h[0], c[0])):
        hx = hx if cell == "LSTM" else hx[0]
        mine, other = (outcome(lambda layer=layer: layer.check_forward_args(good, hx, batch_sizes)) for layer in pair)  # noqa: B023
        assert mine == other
        for order in (None, torch.tensor([1, 0])):
            outputs = [outcome(lambda layer=layer: layer.permute_hidden(hx, order)) for layer in pair]  # noqa: B023
            assert outputs[0] == outputs[1]
    mine, other = (outcome(lambda layer=layer: layer.check_hidden_size(h, (1, 2, 9), "{} and {}")) for layer in pair)
    assert mine == other == ("RuntimeError", f"(1, 2, 9) and {list(h.shape)}")
    rows = torch.arange(h.size(1)).float()[:, None].expand(h.shape)
    state = (rows, rows + 5) if cell == "LSTM" else rows
    order = torch.arange(h.size(1)).flip(0)
    for (_, a), (_, b) in zip(*(tensors(layer.permute_hidden(state, order)) for layer in pair), strict=True):
        assert torch.equal(a, b)


def test_dropout_warning_names_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as caught:
        lt.GRU(I, H, dropout=0.5)
    assert caught[0].filename == __file__


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


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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
