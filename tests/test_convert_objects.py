"""Everything that hung on a layer still hangs on it after replace() and to_torch(): hooks, attributes, memory.

And to_torch() leaves the original as it is, and copies of either are copies.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convert_cases import TOLERANCE, B, H, I, Net, T, flatten, in_float64, kinds
from numerics import relative_error
from torch import Tensor, nn

import lstm_triton as lt

pytestmark = pytest.mark.both
float64 = pytest.fixture(autouse=True)(in_float64)


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


def test_to_torch_leaves_flattening_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's flat buffer would move the parameters, away from views and captured graphs of the original."""
    back = lt.to_torch(lt.LSTM(I, H))
    called = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda self: called.append(self))
    back(torch.randn(T, B, I))
    copy.deepcopy(back)
    assert not called


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
