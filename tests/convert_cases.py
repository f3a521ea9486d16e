"""What the tests of replace() and to_torch() share: models, the results of a model with all gradients, comparisons."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from numerics import relative_error
from torch import Tensor, nn

import lstm_triton as lt

LAYERS = {"LSTM": (nn.LSTM, lt.LSTM), "GRU": (nn.GRU, lt.GRU), "RNN": (nn.RNN, lt.RNN)}

# of float64, ||ours - torch.nn's|| / ||torch.nn's||
TOLERANCE = 1e-13
T, B, I, H = 2, 3, 4, 5  # noqa: E741


def in_float64() -> Iterator[None]:
    """A fixture of every test: the default dtype is float64, and seeds are fixed."""
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
