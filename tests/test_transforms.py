"""torch.func's transforms of the functions and the layers, each against the same of lt.reference: vmap, grad, jvp,
jacobians and their nestings. And what is launched for them: the kernels, on the folded batch where weights are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from derivative_cases import Function, assert_close, every, gradients, leaves, loss, square_norm
from numerics import TOLERANCE
from sequence_cases import PLAIN, WITH_OPTIONS, Case
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import lstm_triton as lt
from lstm_triton import launch, ops, reference

LSTM, GRU, RNN = PLAIN
T, B, H = 3, 2, 3


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

    def remember(name: str) -> None:
        run = getattr(launch, name)

        def launched(plan: Any, sequence: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append((name, sequence.shape[1]))
            return run(plan, sequence, *args, **kwargs)

        monkeypatch.setattr(launch, name, launched)

    remember("forward")
    remember("backward")
    return found


def stacked(tensors: list[Tensor], dims: tuple[int | None, ...] | None = None) -> list[Tensor]:
    """Three different versions of each tensor, or of those with a dimension in `dims`, stacked along it."""
    dims = dims or (0,) * len(tensors)
    return [
        t if dim is None else torch.stack([t * (1 + 0.1 * k) for k in range(3)], dim)
        for t, dim in zip(tensors, dims, strict=True)
    ]


def by_rows(case: Case, tensors: list[Tensor]) -> tuple[int | None, ...]:
    """in_dims of a vmap over the input and the states."""
    n = 3 if case.cell == "lstm" else 2
    return (0,) * n + (None,) * (len(tensors) - n)


def last(dims: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The last dimension instead of the first."""
    return tuple(None if dim is None else -1 for dim in dims)


def by_one_weight(dims: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """in_dims of a vmap over w_hh alone."""
    w_hh = dims.index(None) + 1
    return tuple(0 if i == w_hh else None for i in range(len(dims)))


def vmap_grad_of_grads(f: Function, t: list[Tensor], dims: tuple[int | None, ...]) -> Any:
    per_sample = vmap(lambda *some: gradients(f, *some), dims)
    return grad(lambda *all_: square_norm(per_sample(*all_)), every(t))(*stacked(t, dims))


def nested_vmap_grad(f: Function, t: list[Tensor], dims: tuple[int | None, ...]) -> Any:
    """Over the rows in two dimensions, and over the weights in another."""
    weights = tuple(0 if dim is None else None for dim in dims)
    function = vmap(vmap(vmap(lambda *some: gradients(f, *some), dims), dims), weights)
    return function(*stacked(stacked(stacked(t, dims), dims), weights))


def by_x(f: Function, t: list[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda x: f(x, *t[1:])


#: What is done with a function of tensors `t`, of which those with a dimension in `d` are the input and the states.
TRANSFORMS: dict[str, Callable[[Function, list[Tensor], tuple[int | None, ...]], Any]] = {
    "vjp": lambda f, t, d: (lambda outputs, pull: pull(outputs))(*vjp(f, *t)),
    "jvp": lambda f, t, d: jvp(f, tuple(t), tuple(i * 0.7 for i in t)),
    "jvp(jvp)": lambda f, t, d: jvp(lambda x: jvp(by_x(f, t), (x,), (t[0].sin(),))[1], (t[0],), (t[0].cos(),)),
    "vmap rows": lambda f, t, d: vmap(f, d)(*stacked(t, d)),
    "vmap rows, last to first": lambda f, t, d: vmap(f, last(d), 1)(*stacked(t, last(d))),
    "vmap all": lambda f, t, d: vmap(f)(*stacked(t)),
    "vmap one weight": lambda f, t, d: vmap(f, by_one_weight(d))(*stacked(t, by_one_weight(d))),
    "vmap(grad) rows": lambda f, t, d: vmap(lambda *some: gradients(f, *some), d)(*stacked(t, d)),
    "vmap(grad) all": lambda f, t, d: vmap(lambda *some: gradients(f, *some))(*stacked(t)),
    "vmap(vmap(vmap(grad)))": nested_vmap_grad,
    "vmap(jvp)": lambda f, t, d: vmap(lambda v: jvp(by_x(f, t), (t[0],), (v,)))(stacked(t)[0]),
    "grad(vmap)": lambda f, t, d: gradients(vmap(f, d), *stacked(t, d)),
    "grad(vmap(grad))": vmap_grad_of_grads,
    "grad(grad)": lambda f, t, d: grad(lambda *some: square_norm(gradients(f, *some)), every(t))(*t),
    "jacrev": lambda f, t, d: jacrev(f, every(t))(*t),
    "jacrev(jacrev)": lambda f, t, d: jacrev(jacrev(lambda x: loss(by_x(f, t)(x))))(t[0]),
    "jacfwd": lambda f, t, d: jacfwd(f, every(t))(*t),
    "hessian": lambda f, t, d: hessian(lambda x: loss(by_x(f, t)(x)))(t[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("case", "memory"), [(WITH_OPTIONS[0], "store"), (WITH_OPTIONS[1], "recompute"), (RNN, "store")], ids=str
)
def test_transforms(case: Case, memory: str, transform: str) -> None:
    tensors = case.inputs(2, B, H)
    dims = by_rows(case, tensors)
    assert_close(*(TRANSFORMS[transform](f, tensors, dims) for f in case.both(engine="local", memory=memory)))


@pytest.mark.usefixtures("no_reference")
def test_create_graph_alone_runs_the_kernels_alone() -> None:
    inputs = leaves(LSTM.inputs(T, B, H))
    function = LSTM.function(lt.functional, engine="local")
    wanted = torch.autograd.grad(loss(function(*inputs)), inputs)
    ours = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))
    with pytest.raises(AssertionError, match="the reference was called"):
        ours[0].sum().backward()


@pytest.mark.usefixtures("no_reference")
def test_transforms_run_the_kernels(launches: list[tuple[str, int]]) -> None:
    """Shared weights: once, on the folded batch. Other weights: once for each."""
    f, tensors = LSTM.function(lt.functional, engine="local"), LSTM.inputs(T, B, H)
    rows = by_rows(LSTM, tensors)
    vmap(lambda *some: gradients(f, *some), rows)(*stacked(tensors, rows))
    assert launches == [("forward", 3 * B), ("backward", 3 * B)]
    launches.clear()
    weights = by_one_weight(rows)
    vmap(f, weights)(*stacked(tensors, weights))
    assert launches == [("forward", B)] * 3
    launches.clear()
    jacrev(lambda x: f(x, *tensors[1:])[1])(tensors[0])
    assert launches == [("forward", B), ("backward", B * H * B)]


@pytest.mark.parametrize("case", [WITH_OPTIONS[0], GRU], ids=str)
def test_vmap_over_each_weight_alone(case: Case) -> None:
    tensors = case.inputs(2, B, H)
    for i in range(by_rows(case, tensors).index(None), len(tensors)):
        dims = tuple(0 if i == j else None for j in range(len(tensors)))
        some = stacked(tensors, dims)
        assert_close(*(vmap(lambda *t, f=f: gradients(f, *t), dims)(*some) for f in case.both(engine="local")))


def test_vmap_over_masks() -> None:
    """Each with its own steps, and nothing else of its own."""
    tensors = GRU.inputs(T, B, H)
    masks = torch.tensor([[[1, 0], [1, 1], [0, 1]], [[1, 1], [0, 1], [1, 0]]], dtype=torch.bool)
    resets = masks.flip(0) ^ masks
    results = [
        vmap(lambda m, r, f=f: grad(lambda *t: loss(f(*t, mask=m, reset=r)), every(tensors))(*tensors))(masks, resets)
        for f in GRU.both(engine="local")
    ]
    assert_close(*results)


def test_vmap_without_gradients_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, run = [], ops.forward

    def forward(settings: Any, training: bool, *tensors: Any) -> Any:
        kept.append(training)
        return run(settings, training, *tensors)

    monkeypatch.setattr(ops, "forward", forward)
    function, tensors = GRU.function(lt.functional, engine="local"), GRU.inputs(T, B, H)
    with torch.no_grad():
        vmap(function)(*stacked(tensors))
    assert kept == [False] * 3


def test_per_sample_gradients() -> None:
    """Of a module's parameters, against a loop over the samples."""
    torch.manual_seed(0)
    model = lt.LSTM(4, 5, bidirectional=True, batch_first=True)
    x = torch.randn(3, T, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return loss([functional_call(model, p, (sample[None],))[0]])

    ours = vmap(grad(of_one), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        wanted = torch.autograd.grad(loss([model(sample[None])[0]]), list(model.parameters()))
        assert_close([g[i] for g in ours.values()], wanted, TOLERANCE[torch.float32])


def test_ensemble() -> None:
    """Models with weights of their own as one, their outputs and gradients, against a loop over them."""
    torch.manual_seed(0)
    models = [lt.GRU(4, 5) for _ in range(3)]
    parameters, _ = stack_module_state(models)
    x = torch.randn(T, B, 4)

    def run(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return functional_call(models[0], p, (x,))

    outputs = vmap(run)(parameters)
    ours = torch.autograd.grad(loss(outputs), list(parameters.values()))
    wanted_outputs = [torch.stack(o) for o in zip(*(model(x) for model in models), strict=True)]
    wanted = torch.autograd.grad(loss(wanted_outputs), [p for model in models for p in model.parameters()])
    assert_close(outputs, tuple(wanted_outputs), TOLERANCE[torch.float32])
    by_model = [g[i] for i in range(3) for g in ours]
    assert_close(by_model, list(wanted), TOLERANCE[torch.float32])


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_compiled_transforms(transform: str) -> None:
    """The transform within what is compiled: right, if not on the kernels."""
    tensors = GRU.inputs(2, B, H)

    def apply(f: Function) -> Any:
        if transform == "vmap":
            return vmap(f)(*stacked(tensors))
        return gradients(f, *tensors) if transform == "grad" else jvp(f, tuple(tensors), tuple(tensors))

    ours, theirs = GRU.both(engine="local")
    assert_close(torch.compile(lambda: apply(ours), backend="eager")(), apply(theirs))
