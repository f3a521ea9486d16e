"""PyTorch's tests of how recurrent modules get on with autograd, on ours: graphs that are kept, tensors that are not
contiguous, nothing written to, second derivatives, frozen parameters.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_pairs import (
    ALIKE,
    CELLS,
    INTERPRETED,
    PAIRS,
    TOLERANCE,
    assert_close,
    build,
    mapped,
    results,
    seeded,
    tensors,
)

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]

# the interpreter takes its time at every step of every layer
T, B, I, H, DEPTH = (2, 2, 4, 5, 1) if INTERPRETED else (3, 2, 4, 5, 2)  # noqa: E741


@pytest.mark.parametrize("name", ALIKE)
def test_graph_can_be_kept(name: str) -> None:
    layer = PAIRS[name][0](I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    leaves = [x, *layer.parameters()]
    total = layer(x)[0].square().sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for _ in range(2):
        again = torch.autograd.grad(total, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def strided(t: Tensor) -> Tensor:
    """The same values, none beside its neighbour in memory, and the dimensions stored in reverse."""
    backwards = t.detach().permute(*range(t.dim())[::-1])
    return torch.stack((backwards, -backwards), dim=-1)[..., 0].permute(*range(t.dim())[::-1])


@pytest.mark.parametrize("name", PAIRS)
def test_tensors_that_are_not_contiguous(name: str) -> None:
    layer = PAIRS[name][0](I, H, dtype=torch.float64)
    x = torch.randn(*((B, I) if name in CELLS else (T, B, I)), dtype=torch.float64)
    h = torch.randn(*((B, H) if name in CELLS else (1, B, H)), dtype=torch.float64)
    hx = (h, h + 1) if name.startswith("LSTM") else h
    expected = results(layer, x, hx)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.set_(strided(weight))
    assert not any(t.is_contiguous() for t in (strided(x), *layer.parameters()))
    x, hx = (mapped(lambda t: strided(t).requires_grad_(), t) for t in (x, hx))
    found = dict(tensors(layer(x, hx), "output"))
    for k, value in found.items():
        assert_close({k: value}, {k: expected[k]}, TOLERANCE[torch.float64])
    leaves = dict(tensors((x, hx), "input")) | dict(layer.named_parameters())
    # gradients that are not contiguous either, and expanded ones
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for g in [seeded(2)] for t in found.values()]
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), [strided(w) for w in weights])
    assert_close(
        {f"d{k}": grad for k, grad in zip(leaves, grads, strict=True)},
        {k: v for k, v in expected.items() if k.startswith("d")},
        TOLERANCE[torch.float64],
    )
    torch.autograd.grad(sum(t.sum() for _, t in tensors(layer(x, hx))), list(leaves.values()))


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_given_is_written_to(name: str) -> None:
    layer = PAIRS[name][0](I, H)
    x, h = (torch.randn(B, I), torch.randn(B, H)) if name in CELLS else (torch.randn(T, B, I), torch.randn(1, B, H))
    hx = (h, h.clone()) if name.startswith("LSTM") else h
    given = [t.requires_grad_() for _, t in tensors((x, hx))] + list(layer.parameters())
    versions, copies = [t._version for t in given], [t.detach().clone() for t in given]
    sum(t.square().sum() for _, t in tensors(layer(x, hx))).backward()
    assert [t._version for t in given] == versions
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


@pytest.mark.native  # on the kernels, of the functions below the modules: thousands of calls
@pytest.mark.parametrize("name", PAIRS)
def test_first_and_second_derivatives(name: str) -> None:
    layer = PAIRS[name][0](2, 3, dtype=torch.float64)
    x, h = (torch.randn(2, 2), torch.randn(2, 3)) if name in CELLS else (torch.randn(2, 2, 2), torch.randn(1, 2, 3))
    state = (h, h + 1) if name.startswith("LSTM") else (h,)
    leaves = [t.double().requires_grad_() for t in (x, *state)]
    names = [n for n, _ in layer.named_parameters()]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx = rest[: len(state)] if len(state) == 2 else rest[0]
        weights = dict(zip(names, rest[len(state) :], strict=True))
        return tuple(t for _, t in tensors(torch.func.functional_call(layer, weights, (x, hx))))

    leaves += [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("name", PAIRS)
def test_backward_in_eval_mode(name: str) -> None:
    ours, theirs = build(name, I, H)
    x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)
    assert_close(results(ours.eval(), x), results(theirs.eval(), x), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", PAIRS)
def test_frozen_parameters_get_no_gradient(name: str) -> None:
    layer = PAIRS[name][0](I, H)
    frozen, *others = layer.parameters()
    frozen.requires_grad_(False)
    x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)
    sum(t.sum() for _, t in tensors(layer(x))).backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in others)
    with torch.no_grad():
        assert not any(t.requires_grad for _, t in tensors(layer(x)))
