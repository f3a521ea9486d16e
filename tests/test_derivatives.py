"""Second and higher derivatives by autograd, forward mode and several gradients at once: each against the same of
lt.reference.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from derivative_cases import assert_close, leaves, loss, square_norm
from numerics import TOLERANCE
from sequence_cases import PLAIN, WITH_OPTIONS, Case
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jacrev

import lstm_triton as lt

LSTM, GRU, RNN = PLAIN
T, B, H = 3, 2, 3


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("case", [*PLAIN, *WITH_OPTIONS], ids=str)
def test_second_derivatives(case: Case, memory: str) -> None:
    """By the inputs and by the gradients of the outputs."""
    results = []
    for function in case.both(engine="local", memory=memory):
        inputs = leaves(case.inputs(T, B, H))
        outputs = function(*inputs)
        grads = [(t + 0.3).detach().requires_grad_() for t in outputs]
        first = torch.autograd.grad(outputs, inputs, grads, create_graph=True)
        results.append([*first, *torch.autograd.grad(loss(first), [*inputs, *grads])])
    assert_close(*results)


@pytest.mark.parametrize("case", [WITH_OPTIONS[0], GRU, WITH_OPTIONS[2]], ids=str)
def test_gradgradcheck(case: Case) -> None:
    inputs = [t.requires_grad_() for t in case.inputs(2, B, H)]
    assert torch.autograd.gradgradcheck(
        case.function(lt.functional, engine="local"), inputs, fast_mode=True, check_undefined_grad=False
    )


@pytest.mark.parametrize("case", [LSTM, WITH_OPTIONS[1]], ids=str)
def test_third_derivatives(case: Case) -> None:
    results = []
    for function in case.both(engine="local"):
        inputs = leaves(case.inputs(2, B, H))
        first = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
        second = torch.autograd.grad(square_norm(first), inputs, create_graph=True)
        results.append(torch.autograd.grad(square_norm(second), inputs))
    assert_close(*results)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1), (torch.float16, 0.5), (torch.bfloat16, 1)], ids=str)
def test_second_derivatives_in_other_dtypes(dtype: torch.dtype, share: float) -> None:
    """Computed in fp32: float16 stays below half of its tolerance, which it exceeds where each step is rounded."""
    results = []
    for function, inside in zip(LSTM.both(engine="local"), (dtype, torch.float64), strict=True):
        inputs = leaves([t.to(inside) for t in LSTM.inputs(8, 4, 8, dtype=dtype)])
        first = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
        results.append([s.double() for s in torch.autograd.grad(square_norm(first), inputs)])
    assert_close(*results, share * TOLERANCE[dtype])


def test_gradients_of_some_outputs_by_some_inputs() -> None:
    """Where not every gradient is asked for or comes in, at either order."""
    results = []
    for function in LSTM.both(engine="local"):
        inputs = LSTM.inputs(T, B, H)
        x, w_hh = inputs[0].requires_grad_(), inputs[4].requires_grad_()
        (first,) = torch.autograd.grad(function(*inputs)[2].square().sum(), [x], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [w_hh]))
    assert_close(*results)


class Nothing(torch.autograd.Function):
    """The identity, which hands no gradient back."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(grads)


def test_no_gradient_comes_in() -> None:
    """Then none goes out, at either order."""
    inputs = leaves(LSTM.inputs(2, B, H))
    outputs = LSTM.function(lt.functional, engine="local")(*inputs)
    for tensors in (outputs, torch.autograd.grad(loss(outputs), inputs, create_graph=True)):
        found = torch.autograd.grad(loss(Nothing.apply(*tensors)), inputs, allow_unused=True, retain_graph=True)
        assert found == (None,) * len(inputs)


def test_gradient_penalty() -> None:
    """A step of training on a loss and on the norm of its gradient by the input."""
    models, x = [], torch.randn(5, B, 4, generator=torch.Generator().manual_seed(0))
    for engine in ("local", "reference"):
        torch.manual_seed(0)
        model = lt.GRU(4, 7, num_layers=2, bidirectional=True, engine=engine)
        inputs = x.clone().requires_grad_()
        value = model(inputs)[0].square().mean()
        (by_input,) = torch.autograd.grad(value, inputs, create_graph=True)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        (value + 10 * (by_input.norm() - 1).square()).backward()
        optimiser.step()
        models.append(list(model.parameters()))
    assert_close(*models, TOLERANCE[torch.float32])


def test_derivatives_within_autocast() -> None:
    """Of what ran without it: as without it, at either order."""
    results = []
    for enabled in (False, True):
        inputs = leaves(LSTM.inputs(T, B, H, dtype=torch.float32))
        value = loss(LSTM.function(lt.functional, engine="local")(*inputs))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            first = torch.autograd.grad(value, inputs, create_graph=True)
            results.append([*first, *torch.autograd.grad(square_norm(first), inputs)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_grad_mode_in_inference_mode() -> None:
    inputs = leaves(GRU.inputs(T, B, H))
    function = GRU.function(lt.functional, engine="local")
    with torch.inference_mode(), torch.enable_grad():
        ours = function(*inputs)
    assert_close(ours, function(*inputs), 0)


def test_backward_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = lt.LSTM(4, 7, num_layers=2, dropout=0.5).eval()
    x = torch.randn(T, B, 4, requires_grad=True)
    inputs = [x, *model.parameters()]
    ours = torch.autograd.grad(loss([model(x)[0]]), inputs)
    twin = torch.nn.LSTM(4, 7, num_layers=2, dropout=0.5).eval()
    twin.load_state_dict(model.state_dict())
    assert_close(ours, torch.autograd.grad(loss([twin(x)[0]]), [x, *twin.parameters()]), TOLERANCE[torch.float32])


def with_tangents(case: Case) -> list[Tensor]:
    return [forward_ad.make_dual(t, t.cos()) for t in case.inputs(T, B, H)]


def tangents(tensors: Any) -> list[Tensor]:
    return [forward_ad.unpack_dual(t).tangent for t in tensors]


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode(compiled: bool) -> None:
    results = []
    with forward_ad.dual_level():
        ours, theirs = WITH_OPTIONS[0].both(engine="local")
        for function in (torch.compile(ours, backend="eager") if compiled else ours, theirs):
            results.append(tangents(function(*with_tangents(WITH_OPTIONS[0]))))
    assert_close(*results)


def test_forward_over_reverse() -> None:
    """With everything in forward mode, and with a gradient alone that comes into a graph made before."""
    results = []
    for function in LSTM.both(engine="local"):
        inputs = leaves(LSTM.inputs(T, B, H))
        y = function(*inputs)[0]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, t.detach().cos()) for t in inputs]
            found = tangents(torch.autograd.grad(loss(function(*duals)), duals))
            dy = forward_ad.make_dual(torch.ones_like(y), y.detach().sin())
            results.append(found + tangents(torch.autograd.grad(y, inputs, dy)))
    assert_close(*results)


@pytest.mark.parametrize("case", [LSTM, *WITH_OPTIONS], ids=str)
@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(case: Case, memory: str) -> None:
    """is_grads_batched, and the derivatives of what comes out."""
    results = []
    for function in case.both(engine="local", memory=memory):
        inputs = leaves(case.inputs(2, B, H))
        outputs = function(*inputs)
        grads = [torch.stack([t.detach().cos(), t.detach().sin()]) for t in outputs]
        first = torch.autograd.grad(outputs, inputs, grads, is_grads_batched=True, retain_graph=True)
        again = torch.autograd.grad(outputs, inputs, grads, is_grads_batched=True, create_graph=True)
        results.append([*first, *again, *torch.autograd.grad(square_norm(again), inputs)])
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("output", range(3))
def test_batched_gradients_of_one_output(output: int) -> None:
    results = []
    for function in LSTM.both(engine="local"):
        inputs = leaves(LSTM.inputs(2, B, H))
        y = function(*inputs)[output]
        grads = torch.stack([y.detach().cos(), y.detach().sin()])
        first = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, create_graph=True)
        results.append([*first, *torch.autograd.grad(square_norm(first), inputs)])
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_second_gradients() -> None:
    x, *others = LSTM.inputs(2, B, H)
    ours, theirs = (
        torch.autograd.functional.hessian(lambda x, f=f: loss(f(x, *others)), x, vectorize=True)
        for f in LSTM.both(engine="local")
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_jacobian_of_an_unbatched_layer(kind: str, memory: str) -> None:
    """A batch of one, of which every row of the jacobian shares what was kept."""
    ours = getattr(lt, kind)(3, 4, memory=memory, dtype=torch.float64)
    reference = getattr(lt, kind)(3, 4, engine="reference", dtype=torch.float64)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(*(jacrev(lambda x, m=m: m(x)[0])(x).detach() for m in (ours, reference)))


def test_backward_inside_autocast_is_not_cast() -> None:
    """The dtypes are those of the forward pass, as torch.nn's."""
    layer, x = lt.GRU(3, 4), torch.randn(T, B, 3)
    wanted = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    y = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_grad_mode_inside_inference_mode() -> None:
    layer, x = lt.LSTM(3, 4), torch.randn(T, B, 3)
    with torch.inference_mode(), torch.enable_grad():
        y, _ = layer(x)
    assert torch.equal(y, layer(x)[0])
