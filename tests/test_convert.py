"""replace() and to_torch(): the same numbers and gradients, and everything that hung on a layer still hangs on it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from numerics import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lstm_triton as lt

pytestmark = pytest.mark.both

LAYERS = {"LSTM": (nn.LSTM, lt.LSTM), "GRU": (nn.GRU, lt.GRU), "RNN": (nn.RNN, lt.RNN)}
CELLS = {
    "LSTMCell": (nn.LSTMCell, lt.LSTMCell),
    "GRUCell": (nn.GRUCell, lt.GRUCell),
    "RNNCell": (nn.RNNCell, lt.RNNCell),
}
# of float64, ||ours - torch.nn's|| / ||torch.nn's||
TOLERANCE = 1e-13
T, B, I, H = 2, 3, 4, 5  # noqa: E741


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def flatten(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flatten(part)]


def results(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """All outputs, and the gradients by inputs and parameters of a fixed random combination of them."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    torch.manual_seed(1)
    outputs = flatten(model(*inputs))
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=generator) for t in outputs]
    leaves = {f"input {i}": t for i, t in enumerate(inputs)}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return found | {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        assert relative_error(found[name], value) <= TOLERANCE, name


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


class Net(nn.Module):
    """Layers in attributes, lists, dicts and sequences; states unpacked and handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(OrderedDict(first=nn.Linear(I, H), rnn=nn.RNN(H, H, nonlinearity="relu")))
        self.encoder = nn.LSTM(H, H, 2, bidirectional=True, batch_first=True)
        self.rest = nn.ModuleList([nn.GRU(2 * H, H), nn.ModuleDict({"rnn": nn.RNN(H, H, bias=False)})])
        self.cell = nn.LSTMCell(H, H)
        self.register_buffer("scale", torch.tensor(0.5))
        self.norm = nn.LayerNorm(H)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = self.inside(x)
        x, (h, c) = self.encoder(x.transpose(0, 1))
        x, last = self.rest[0](x.transpose(0, 1) * self.scale, h[:1] + c[1:2])
        x, _ = self.rest[1]["rnn"](x, last)
        return self.norm(x), self.cell(x[-1], (last[0], h[0]))[0]


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


def test_hooks() -> None:
    """Every kind of hook still runs, as often and with the same things; handles remove them."""
    net = nn.Sequential(nn.LSTM(I, H, 2), nn.Identity())
    layer = net[0]
    log: list[tuple[str, Any]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, *args: log.append((name, [t.shape for t in flatten(args) if isinstance(t, Tensor)]))

    handles = [
        layer.register_forward_pre_hook(note("pre")),
        layer.register_forward_hook(note("forward")),
        layer.register_full_backward_pre_hook(lambda m, grads: log.append(("backward pre", len(grads)))),
        layer.register_full_backward_hook(lambda m, gin, gout: log.append(("backward", (len(gin), len(gout))))),
        layer.register_forward_hook(lambda m, args, output: (output[0] * 2, output[1])),
        layer.weight_hh_l1.register_hook(lambda grad: log.append(("parameter", grad.shape)) or grad * 3),
        layer.weight_hh_l0.register_post_accumulate_grad_hook(lambda p: log.append(("accumulated", p.shape))),
        layer.register_state_dict_pre_hook(lambda m, prefix, keep: log.append(("state dict", prefix))),
        layer.register_load_state_dict_pre_hook(lambda m, d, prefix, *rest: log.append(("load", prefix))),
        layer.register_load_state_dict_post_hook(lambda m, keys: log.append(("loaded", list(keys)))),
    ]
    x = torch.randn(T, B, I, requires_grad=True)

    def run(model: nn.Module) -> tuple[list[Any], list[Tensor]]:
        log.clear()
        model.zero_grad()
        y, (h, _) = model(x)
        (y.sum() + h.sum()).backward()
        model.load_state_dict(model.state_dict())
        return list(log), [y.detach(), *(p.grad.clone() for p in model.parameters())]

    calls, wanted = run(net)
    kinds_of_hooks = {"pre", "forward", "backward pre", "backward", "parameter", "accumulated"}
    assert {name for name, _ in calls} == kinds_of_hooks | {"state dict", "load", "loaded"}
    for model in (lt.replace(net), lt.to_torch(net)):
        found_calls, found = run(model)
        assert sorted(map(str, found_calls)) == sorted(map(str, calls))
        assert all(relative_error(f, w) <= TOLERANCE for f, w in zip(found, wanted, strict=True))
    for handle in handles:
        handle.remove()
    assert run(net)[0] == []


def test_a_hook_that_is_a_method_goes_along_with_the_copy() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = lt.GRU(I, H)
            self.calls = 0
            self.rnn.register_forward_hook(self.count)

        def count(self, *_: Any) -> None:
            self.calls += 1

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    net = Counting()
    back = lt.to_torch(net)
    back(torch.randn(T, B, I))
    assert (net.calls, back.calls) == (0, 1)


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight_hh_l0", amount=0.4)
    prune.l1_unstructured(layer, "weight_ih_l0", amount=3)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer, "weight_hh_l0")
        nn.utils.weight_norm(layer, "weight_ih_l0", dim=1)


def new_weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer, "weight_hh_l0")
    parametrizations.weight_norm(layer, "weight_ih_l0", dim=1)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class PerGate(nn.Module):
    """Each gate's [H, H] block symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.symmetric = Symmetric()

    def forward(self, w: Tensor) -> Tensor:
        return torch.cat([self.symmetric(block) for block in w.split(H)])


def two_in_a_row(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight_hh_l0", PerGate())
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Tanh())
    parametrize.register_parametrization(layer, "bias_hh_l0", nn.Softplus())


def orthogonal(layer: nn.Module) -> None:
    parametrizations.orthogonal(layer, "weight_ih_l0")


CHANGES = {
    "pruned": pruned,
    "old-weight-norm": old_weight_norm,
    "weight-norm": new_weight_norm,
    "parametrized": two_in_a_row,
    "orthogonal": orthogonal,
    "spectral-norm": lambda layer: parametrizations.spectral_norm(layer, "weight_hh_l0").eval(),
    "pruned-and-parametrized": lambda layer: (prune.l1_unstructured(layer, "bias_hh_l0", 2), new_weight_norm(layer)),
}


def changed(cell: str, change: str) -> nn.Module:
    torch.manual_seed(5)
    layer = LAYERS[cell][0](I, H)
    CHANGES[change](layer)
    return layer


@pytest.mark.parametrize("run_before", [False, True], ids=["fresh", "run"])
@pytest.mark.parametrize(("change", "cell"), list(zip(CHANGES, cycle(LAYERS), strict=False)))
def test_weights_that_are_computed(change: str, cell: str, run_before: bool) -> None:
    """Pruning, weight norm and parametrizations, replaced and turned back, in either order."""
    theirs, ours = LAYERS[cell]
    x = torch.randn(T, B, I)
    wanted = results(changed(cell, change), x)
    layer = changed(cell, change)
    if run_before:
        results(layer, x)
    parameters = {name: id(p) for name, p in layer.named_parameters()}
    name = type(layer).__name__
    lt.replace(layer)
    back = lt.to_torch(layer)
    again = lt.replace(lt.to_torch(layer))
    for converted, kind, other in ((layer, ours, theirs), (back, theirs, ours), (again, ours, theirs)):
        assert isinstance(converted, kind)
        assert not isinstance(converted, other)
        assert type(converted).__name__ == name
        assert {name: id(p) for name, p in converted.named_parameters()} == parameters
        assert_same(results(converted, x), wanted)


def test_parametrizations_go_on_working() -> None:
    """Added, assigned to, cached and removed after the change of class, on one of two layers that shared a class."""
    pair = nn.ModuleList([changed("LSTM", "weight-norm")])
    pair.append(copy.deepcopy(pair[0]))
    assert type(pair[0]) is type(pair[1])
    lt.replace(pair)
    first, second = pair
    x = torch.randn(T, B, I)
    wanted = results(second, x)
    with parametrize.cached():
        assert first.weight_hh_l0 is first.weight_hh_l0
        assert_same(results(first, x), wanted)
    weight = first.weight_hh_l0.detach().clone()
    first.weight_hh_l0 = weight * 2
    torch.testing.assert_close(first.weight_hh_l0, weight * 2)
    parametrize.register_parametrization(first, "bias_ih_l0", nn.Tanh())
    assert first.bias_ih_l0.abs().max() < second.bias_ih_l0.abs().max()
    for name in list(first.parametrizations):
        parametrize.remove_parametrizations(first, name)
    assert type(first) is lt.LSTM
    torch.testing.assert_close(first.weight_hh_l0, weight * 2)
    assert_same(results(second, x), wanted)
    assert type(lt.to_torch(first)) is nn.LSTM


def test_pruning_and_weight_norm_can_be_removed() -> None:
    for change, undo in (
        ("pruned", lambda layer: prune.remove(layer, "weight_hh_l0")),
        ("old-weight-norm", lambda layer: nn.utils.remove_weight_norm(layer, "weight_hh_l0")),
    ):
        layer = lt.replace(changed("GRU", change))
        x = torch.randn(T, B, I)
        wanted = flatten(layer(x))
        for converted in (lt.to_torch(layer), layer):
            undo(converted)
            assert isinstance(converted.weight_hh_l0, nn.Parameter)
            for found, value in zip(flatten(converted(x)), wanted, strict=True):
                assert relative_error(found, value) <= TOLERANCE


def test_conversion_evaluates_no_parametrization() -> None:
    """It may cost, draw random numbers, or, as spectral norm does in training, take a step."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, w: Tensor) -> Tensor:
            Counting.calls += 1
            return w * 1

    layer = nn.LSTM(I, H)
    parametrize.register_parametrization(layer, "weight_hh_l0", Counting())
    x = torch.randn(T, B, I)
    wanted = results(layer, x)
    Counting.calls = 0
    lt.replace(layer)
    back = lt.to_torch(layer)
    lt.replace(lt.to_torch(layer))
    assert Counting.calls == 0
    assert_same(results(copy.deepcopy(back), x), wanted)
    assert_same(results(back, x), wanted)


def test_conversion_draws_no_random_numbers_and_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.ModuleList([nn.LSTM(I, H, dropout=0.5), nn.RNN(I, H)])
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lt.to_torch(lt.replace(net))
    assert torch.equal(torch.get_rng_state(), state)


class Own(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(x * 2, hx)


def test_subclasses_stay_with_a_warning() -> None:
    net = nn.ModuleDict({"a": nn.ModuleList([nn.LSTM(I, H), Own(I, H)]), "b": Own(I, H)})
    parametrizations.weight_norm(net["b"], "weight_hh_l0")
    x = torch.randn(T, B, I)
    wanted = [results(layer, x) for layer in (net["a"][1], net["b"])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lt.replace(net)
    assert [str(warning.message).split(":")[0] for warning in caught] == [
        "a.1 was left as it is", "b was left as it is",
    ]  # fmt: skip
    assert all("Own is a subclass of torch.nn.LSTM" in str(warning.message) for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    assert type(net["a"][0]) is lt.LSTM
    assert type(net["a"][1]) is Own
    assert isinstance(net["b"], Own)
    for layer, value in zip((net["a"][1], net["b"]), wanted, strict=True):
        assert_same(results(layer, x), value)
    with pytest.warns(UserWarning, match="^the model itself was left"):
        lt.replace(Own(I, H))


def test_a_forward_in_the_object_stays_with_a_warning() -> None:
    net = nn.Sequential(nn.GRU(I, H), nn.GRU(I, H))
    inner = net[0].forward
    net[0].forward = lambda x: inner(2 * x)
    x = torch.randn(T, B, I)
    wanted = net[0](x)[0]
    with pytest.warns(UserWarning, match="^0 was left as it is: a forward of its own"):
        lt.replace(net)
    assert kinds(net)[1:] == [nn.GRU, lt.GRU]
    assert torch.equal(net[0](x)[0], wanted)
    net[1].forward = net[1].forward
    with pytest.raises(ValueError, match=r"^1 cannot be made torch.nn's: a forward of its own"):
        lt.to_torch(net)


def test_subclasses_of_ours_cannot_become_torchs() -> None:
    class Ours(lt.GRU):
        pass

    with pytest.raises(ValueError, match=r"^1 cannot be made torch.nn's.*Ours is a subclass of lstm_triton.GRU"):
        lt.to_torch(nn.Sequential(nn.Identity(), Ours(I, H)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_left_alone() -> None:
    scripted = torch.jit.script(nn.GRU(I, H))
    quantized = torch.ao.nn.quantized.dynamic.LSTM
    ours = lt.LSTM(I, H, engine="reference")
    net = nn.ModuleList([scripted, nn.GRUCell(I, H), ours])
    state = dict(vars(ours))
    before = kinds(net)
    assert lt.replace(lt.replace(net, engine="step")) is net
    assert kinds(net) == before
    assert vars(ours) == state
    assert not issubclass(quantized, (nn.LSTM, nn.GRU, nn.RNN))
    back = lt.to_torch(net)
    assert back[0] is scripted
    assert kinds(back)[-1] is nn.LSTM


def test_modules_that_are_not_registered_are_shared() -> None:
    """One held in a list is no part of the model; nor does a reference to the owner copy the owner."""

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = lt.GRU(I, H)
            self.teacher = [nn.GRU(I, H)]
            self.rnn.owner = [self]

    net = Student()
    teacher = net.teacher[0]
    lt.replace(net)
    assert type(teacher) is nn.GRU
    back = lt.to_torch(net)
    assert back.teacher is not net.teacher
    assert back.teacher[0] is teacher
    assert back.rnn.owner[0] is back
    assert lt.to_torch(net.rnn).owner[0] is net


def test_a_warning_taken_as_an_error_leaves_everything() -> None:
    net = nn.ModuleList([nn.LSTM(I, H), Own(I, H)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="1 was left as it is"):
            lt.replace(net)
    assert kinds(net) == [nn.ModuleList, nn.LSTM, Own]


def test_engine_and_memory_are_handed_on_and_dropped() -> None:
    net = nn.Sequential(nn.LSTM(I, H), nn.Identity())
    lt.replace(net, engine="reference", memory="recompute")
    assert (net[0].engine, net[0].memory) == ("reference", "recompute")
    x = torch.randn(T, B, I)
    assert_same(results(lt.to_torch(net), x), results(net, x))
    lt.replace(net, engine="step")
    assert net[0].engine == "reference"


def test_nothing_changes_where_something_is_wrong() -> None:
    net = nn.ModuleList([nn.LSTM(I, H), nn.GRU(I, H)])
    with pytest.raises(ValueError, match=r"engine must be one of .* got 'treadmill'"):
        lt.replace(net, engine="treadmill")
    with pytest.raises(ValueError, match=r"memory must be .* got 'hoard'"):
        lt.replace(net, memory="hoard")
    assert kinds(net) == [nn.ModuleList, nn.LSTM, nn.GRU]
    for convert, name in ((lt.replace, "model"), (lt.to_torch, "module")):
        with pytest.raises(TypeError, match=f"{name} must be a torch.nn.Module, got list"):
            convert([net])


COMMON = {
    "activation": "softsign",
    "recurrent_activation": "hard_sigmoid",
    "layer_norm": True,
    "zoneout": 0.1,
    "recurrent_dropout": 0.1,
    "input_dropout": 0.1,
    "dropout_per_gate": True,
    "gate_clip": 5.0,
}
OWN = {
    "LSTM": {"peephole": True, "coupled": True, "cell_clip": 3.0, "output_activation": "relu", "zoneout": (0.0, 0.1)},
    "GRU": {"reset_after": False, "activation": ("elu", 0.5)},
    "RNN": {"activation": ("elu", 0.5)},
}
OPTIONS = [(cell, name, value) for cell in LAYERS for name, value in (*COMMON.items(), *OWN[cell].items())]
OPTIONS.remove(("RNN", "recurrent_activation", "hard_sigmoid"))  # which it has no gates for


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_options_that_torch_lacks_are_refused_by_name(option: tuple[str, str, Any]) -> None:
    cell, name, value = option
    layer = LAYERS[cell][1](I, H, **{name: value})
    with pytest.raises(ValueError, match=rf"^0 cannot be made torch.nn's: torch.nn.{cell} has no {name}="):
        lt.to_torch(nn.Sequential(layer))


def test_all_options_that_torch_lacks_are_named() -> None:
    layer = lt.LSTM(I, H, coupled=True, zoneout=(0.0, 0.1), gate_clip=2)
    words = r"coupled=True, zoneout=\(0.0, 0.1\), gate_clip=2$"
    with pytest.raises(ValueError, match=rf"torch.nn.LSTM has no {words}"):
        lt.to_torch(layer)


def test_options_that_say_what_torch_does_are_none() -> None:
    """Other ways to write the defaults."""
    layer = lt.LSTM(
        I, H, activation=("tanh", 2.0), recurrent_activation=("sigmoid",), output_activation="tanh", zoneout=(0, 0)
    )
    x = torch.randn(T, B, I)
    assert_same(results(lt.to_torch(layer), x), results(layer, x))


def test_an_option_is_refused_before_anything_is_copied() -> None:
    layer = lt.GRU(I, H)
    layer.activation = "relu"
    with pytest.raises(ValueError, match=r"^the module itself cannot be made torch.nn's.* has no activation='relu'"):
        lt.to_torch(layer)
    assert type(layer) is lt.GRU


def test_relu_is_torchs_nonlinearity() -> None:
    x = torch.randn(T, B, I)
    for layer in (lt.RNN(I, H, nonlinearity="relu"), lt.RNN(I, H, activation="relu")):
        back = lt.to_torch(layer)
        assert (back.mode, back.nonlinearity) == ("RNN_RELU", "relu")
        assert_same(results(back, x), results(layer, x))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
def test_copies_afterwards(how: str) -> None:
    """Of fresh models and of those that have run; copies are equal, and their own."""
    layers = nn.ModuleList([nn.LSTM(I, H, 2), nn.RNN(I, H, bias=False, bidirectional=True)])
    x = torch.randn(T, B, I)
    wanted = [flatten(layer(x)) for layer in layers]
    lt.replace(layers)
    for model in (layers, lt.to_torch(layers), lt.replace(lt.to_torch(layers))):
        for _ in range(2):
            twin = COPIES[how](model)
            assert kinds(twin) == kinds(model)
            assert [vars(m).keys() for m in twin.modules()] == [vars(m).keys() for m in model.modules()]
            assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
            for layer, outputs in zip(twin, wanted, strict=True):
                for found, value in zip(flatten(layer(x)), outputs, strict=True):
                    assert relative_error(found, value) <= TOLERANCE
            model = twin


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


def test_to_torch_leaves_the_original_as_it_is() -> None:
    net = lt.replace(Net())
    net.masks = {"pairs": [(torch.ones(2), torch.zeros(3, requires_grad=True) * 2)]}
    net.loop = [net.masks]
    net.loop.append(net.loop)
    before = {path: dict(vars(m)) for path, m in net.named_modules()}
    addresses = [p.data_ptr() for p in net.parameters()]
    back = lt.to_torch(net)
    assert kinds(net)[1:] != kinds(back)[1:]
    for path, m in net.named_modules():
        assert vars(m).keys() == before[path].keys()
        assert all(vars(m)[name] is value for name, value in before[path].items())
    assert [p.data_ptr() for p in net.parameters()] == addresses
    assert not {id(m) for m in back.modules()} & {id(m) for m in net.modules()}
    assert back.scale is net.scale
    assert back.masks is not net.masks
    assert back.masks["pairs"][0][1] is net.masks["pairs"][0][1]
    assert back.loop[1] is back.loop
    sum(t.sum() for t in back(torch.randn(T, B, I))).backward()
    assert net.encoder.weight_hh_l0.grad is back.encoder.weight_hh_l0.grad is not None


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


def test_to_torch_leaves_flattening_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's flat buffer would move the parameters, away from views and captured graphs of the original."""
    back = lt.to_torch(lt.LSTM(I, H))
    called = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda self: called.append(self))
    back(torch.randn(T, B, I))
    copy.deepcopy(back)
    assert not called


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


@pytest.mark.gpu
def test_to_torch_does_not_move_the_parameters() -> None:
    layer = lt.LSTM(I, H, device="cuda")
    addresses = [p.data_ptr() for p in layer.parameters()]
    back = lt.to_torch(layer)
    x = torch.randn(T, B, I, device="cuda")
    assert relative_error(back(x)[0], layer(x)[0]) < 1e-12
    assert [p.data_ptr() for p in layer.parameters()] == addresses
    back.flatten_parameters()
    assert [p.data_ptr() for p in layer.parameters()] != addresses
    assert relative_error(back(x)[0], layer(x)[0]) < 1e-12
