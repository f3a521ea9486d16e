"""Second and higher derivatives, torch.func, forward mode: each against the same of lt.reference, on interpreted kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import TOLERANCE, relative_error
from sequence_cases import PLAIN, WITH_OPTIONS, Case
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

import lstm_triton as lt
from lstm_triton import autograd, launch, ops, reference

Function = Callable[..., tuple[Tensor, ...]]

LSTM, GRU, RNN = PLAIN
T, B, H = 3, 2, 3


def assert_close(ours: Any, wanted: Any, tolerance: float = TOLERANCE[torch.float64]) -> None:
    """Every tensor of two trees, by shape and relative error."""
    pairs = list(zip(tree_leaves(ours), tree_leaves(wanted), strict=True))
    assert pairs and all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    assert max(relative_error(a, b) for a, b in pairs) <= tolerance


def loss(outputs: Any) -> Tensor:
    """A number that every derivative of the outputs matters to."""
    return sum((t.double().sin() * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in outputs)


def square_norm(tensors: Any) -> Tensor:
    return sum(t.double().square().sum() for t in tensors)


def every(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def gradients(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
    """By all arguments, as a transform."""
    return grad(lambda *t: loss(function(*t)), every(tensors))(*tensors)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """All on the kernels: the reference must not be called."""

    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference, "sequence", called)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What launch was asked for: direction and rows of the batch."""
    found = []
    for name in ("forward", "backward"):

        def remember(plan: Any, *args: Any, run: Any = getattr(launch, name), name: str = name, **kwargs: Any) -> Any:
            found.append((name, args[0].shape[1]))
            return run(plan, *args, **kwargs)

        monkeypatch.setattr(launch, name, remember)
    return found


# Derivatives of derivatives, by autograd


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
        case.function(lt.functional, engine="step"), inputs, fast_mode=True, check_undefined_grad=False
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_second_derivatives_in_other_dtypes(dtype: torch.dtype) -> None:
    results = []
    for function, t in zip(GRU.both(engine="local"), (dtype, torch.float64), strict=True):
        inputs = leaves([i.to(t) for i in GRU.inputs(T, B, H, dtype=dtype)])
        first = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
        results.append([s.double() for s in torch.autograd.grad(square_norm(first), inputs)])
    assert_close(*results, TOLERANCE[dtype])


def test_gradients_of_some_outputs_by_some_inputs() -> None:
    """Where not every gradient is asked for or comes in, at either order."""
    results = []
    for function in LSTM.both(engine="local"):
        inputs = LSTM.inputs(T, B, H)
        x, w_hh = inputs[0].requires_grad_(), inputs[4].requires_grad_()
        (first,) = torch.autograd.grad(function(*inputs)[2].square().sum(), [x], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [w_hh]))
    assert_close(*results)


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


@pytest.mark.usefixtures("no_reference")
def test_create_graph_alone_runs_the_kernels_alone() -> None:
    inputs = leaves(LSTM.inputs(T, B, H))
    function = LSTM.function(lt.functional, engine="local")
    wanted = torch.autograd.grad(loss(function(*inputs)), inputs)
    ours = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))
    with pytest.raises(AssertionError, match="the reference was called"):
        ours[0].sum().backward()


def test_backward_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = lt.LSTM(4, 7, num_layers=2, dropout=0.5).eval()
    x = torch.randn(T, B, 4, requires_grad=True)
    inputs = [x, *model.parameters()]
    ours = torch.autograd.grad(loss([model(x)[0]]), inputs)
    twin = torch.nn.LSTM(4, 7, num_layers=2, dropout=0.5).eval()
    twin.load_state_dict(model.state_dict())
    assert_close(ours, torch.autograd.grad(loss([twin(x)[0]]), [x, *twin.parameters()]), TOLERANCE[torch.float32])


# torch.func

TRANSFORMS: dict[str, Callable[[Function, list[Tensor]], Any]] = {
    "grad": gradients_of if False else lambda f, t: gradients(f, *t),
}
