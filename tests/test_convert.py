"""replace() and to_torch() of layers, cells and whole models: the same numbers, gradients and parameters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from convert_cases import LAYERS, TOLERANCE, B, H, I, Net, T, assert_same, in_float64, kinds, results
from numerics import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lstm_triton as lt

pytestmark = pytest.mark.both
float64 = pytest.fixture(autouse=True)(in_float64)

CELLS = {
    "LSTMCell": (nn.LSTMCell, lt.LSTMCell),
    "GRUCell": (nn.GRUCell, lt.GRUCell),
    "RNNCell": (nn.RNNCell, lt.RNNCell),
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
    "LSTM-dropout": ("LSTM", {"num_layers": 3, "dropout": 0.5, "bidirectional": True}),
    "LSTM-batch-first": ("LSTM", {"batch_first": True, "bias": False}),
    "GRU": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "GRU-dropout": ("GRU", {"num_layers": 2, "dropout": 0.3, "batch_first": True}),
    "RNN": ("RNN", {"bidirectional": True}),
    "RNN-relu": ("RNN", {"num_layers": 2, "nonlinearity": "relu", "bias": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_by_itself(case: str) -> None:
    cell, options = CASES[case]
    theirs, ours = LAYERS[cell]
    layer = theirs(I, H, **options)
    x = torch.randn(T, B, I)
    wanted = results(layer, x)
    text, keys, attributes = repr(layer), list(layer.state_dict()), set(vars(layer))
    parameters = dict(layer.named_parameters())

    assert lt.replace(layer) is layer
    assert type(layer) is ours
    assert vars(layer).keys() == vars(ours(I, H, **options)).keys()
    assert_same(results(layer, x), wanted)

    back = lt.to_torch(layer)
    assert type(back) is theirs
    assert type(layer) is ours
    assert vars(back).keys() == attributes
    assert {name: id(p) for name, p in back.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    found = results(back, x)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert repr(layer) == repr(back) == text
    assert list(layer.state_dict()) == list(back.state_dict()) == keys


def test_a_layer_that_was_changed_after_it_was_built() -> None:
    """What torch.nn reads at each call is not lost, though no constructor saw it; nor is what was added."""
    layer = nn.LSTM(I, H, 2)
    layer.dropout, layer.batch_first, layer.note = 0.5, True, "mine"
    layer.register_buffer("count", torch.zeros(1))
    count = layer.count
    layer.weight_hh_l1.requires_grad_(False)
    layer.eval()
    x = torch.randn(B, T, I)
    evaluated = results(layer, x)
    wanted = results(layer.train(), x)
    for converted in (lt.replace(layer), lt.to_torch(layer)):
        assert converted.training
        assert converted.note == "mine"
        assert converted.count is count
        assert_same(results(converted, x), wanted)
        assert_same(results(converted.eval(), x), evaluated)
        assert not lt.replace(converted).training
        converted.train()


def test_a_nested_model() -> None:
    net = Net()
    x = torch.randn(T, B, I)
    wanted = results(net, x)
    before = dict(net.named_modules())
    before_kinds = kinds(net)
    parameters = dict(net.named_parameters())
    assert lt.replace(net) is net
    assert {path: id(m) for path, m in net.named_modules()} == {path: id(m) for path, m in before.items()}
    assert {name: id(p) for name, p in net.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    exchanged = {theirs: ours for theirs, ours in LAYERS.values()}
    assert kinds(net) == [exchanged.get(kind, kind) for kind in before_kinds]
    assert sum(kind in exchanged for kind in before_kinds) == 4
    assert_same(results(net, x), wanted)
    assert_same(results(lt.to_torch(net), x), wanted)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_cells(cell: str, options: dict[str, Any]) -> None:
    """to_torch turns ours; replace leaves torch.nn's."""
    theirs, ours = CELLS[cell]
    options = options | ({"nonlinearity": "relu"} if cell == "RNNCell" else {})
    torch.manual_seed(3)
    plain = theirs(I, H, **options)
    x = torch.randn(B, I)
    assert type(lt.replace(plain)) is theirs
    torch.manual_seed(3)
    layer = ours(I, H, **options)
    back = lt.to_torch(nn.ModuleList([layer]))[0]
    assert type(back) is theirs
    assert type(layer) is ours
    assert vars(back).keys() == vars(plain).keys()
    assert all(p is q for p, q in zip(back.parameters(), layer.parameters(), strict=True))
    assert repr(back) == repr(plain)
    assert_same(results(back, x), results(plain, x))
    assert_same(results(pickle.loads(pickle.dumps(back)), x), results(layer, x))
    parametrizations.weight_norm(layer, "weight_hh")
    normed = lt.to_torch(layer)
    assert isinstance(normed, theirs)
    assert_same(results(normed, x), results(layer, x))


def test_relu_is_torchs_nonlinearity() -> None:
    x = torch.randn(T, B, I)
    for layer in (lt.RNN(I, H, nonlinearity="relu"), lt.RNN(I, H, activation="relu")):
        back = lt.to_torch(layer)
        assert (back.mode, back.nonlinearity) == ("RNN_RELU", "relu")
        assert_same(results(back, x), results(layer, x))


class Tied(nn.Module):
    """One layer used twice under two names, and another that shares a weight with it."""

    def __init__(self) -> None:
        super().__init__()
        self.once = nn.GRU(H, H)
        self.again = self.once
        self.other = nn.GRU(H, H)
        self.other.weight_hh_l0 = self.once.weight_hh_l0
        self.layers = [self.once, self.other]

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.again(self.once(x)[0])[0])[0]
        return self.layers[0](x)[0]


def test_tied_layers_and_weights() -> None:
    net = Tied()
    x = torch.randn(T, B, H)
    wanted = results(net, x)
    lt.replace(net)
    assert kinds(net) == [Tied, lt.GRU, lt.GRU]
    back = lt.to_torch(net)
    assert kinds(back) == [Tied, nn.GRU, nn.GRU]
    for model in (net, back):
        assert model.once is model.again is model.layers[0]
        assert model.once.weight_hh_l0 is model.other.weight_hh_l0
        assert_same(results(model, x), wanted)
    assert back.once is not net.once


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_made_before_trains_the_layer(optimizer: type[torch.optim.Optimizer]) -> None:
    net = Tied()
    twin = copy.deepcopy(net)
    optimizers = [optimizer(model.parameters(), lr=0.01) for model in (net, twin)]
    lt.replace(twin)
    start = [p.detach().clone() for p in net.parameters()]
    for step in range(2):
        x = torch.randn(T, B, H, generator=torch.Generator().manual_seed(step))
        for model, optim in zip((net, twin), optimizers, strict=True):
            optim.zero_grad()
            sum(t.square().sum() for t in model(x)).backward()
            optim.step()
    for ours, theirs, old in zip(twin.parameters(), net.parameters(), start, strict=True):
        assert not torch.equal(theirs, old)
        assert relative_error(ours - old, theirs - old) < 1e-11


def test_state_dicts_go_round() -> None:
    source, taker = Net(), Net()
    x = torch.randn(T, B, I)
    wanted = results(source, x)
    for model in (lt.replace(taker), lt.to_torch(taker), lt.replace(lt.to_torch(taker))):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        assert list(model.state_dict()) == list(source.state_dict())
        model.load_state_dict(source.state_dict())
        assert_same(results(model, x), wanted)


def test_moving_and_casting() -> None:
    """torch.nn looks its weights up again when they are cast, and so does what to_torch made."""
    net = lt.replace(Net())
    x = torch.randn(T, B, I)
    back = copy.deepcopy(lt.to_torch(net)).float()
    assert back.encoder.all_weights[0][0].dtype == torch.float32
    assert back(x.float())[0].dtype == torch.float32
    assert net(x)[0].dtype == torch.float64
    meta = copy.deepcopy(net).to("meta")
    assert all(p.is_meta for p in lt.to_torch(meta).parameters())


def test_functional_call_on_what_to_torch_made() -> None:
    layer = lt.GRU(I, H)
    other = lt.GRU(I, H)
    x = torch.randn(T, B, I)
    found = torch.func.functional_call(lt.to_torch(layer), dict(other.named_parameters()), (x,))[0]
    assert relative_error(found, other(x)[0]) <= TOLERANCE


@pytest.mark.native
def test_a_compiled_model_notices() -> None:
    net = nn.Sequential(nn.Linear(I, I), nn.GRU(I, H))
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(T, B, I)
    wanted = results(net, x)
    compiled(x)
    assert lt.replace(compiled) is compiled
    assert type(net[1]) is lt.GRU
    names = {f"_orig_mod.{name}": name for name, _ in net.named_parameters()}
    found = {f"d {names.get(key[2:], key[2:])}" if key[0] == "d" else key: t for key, t in results(compiled, x).items()}
    assert_same(found, wanted)
    torch.compile(net, backend="aot_eager", fullgraph=True)(x)
