"""Second and higher derivatives, torch.func, forward mode: each against the same of lt.reference."""

from __future__ import annotations

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
from lstm_triton import launch, ops, reference

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

    def remember(name: str) -> None:
        run = getattr(launch, name)

        def launched(plan: Any, sequence: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append((name, sequence.shape[1]))
            return run(plan, sequence, *args, **kwargs)

        monkeypatch.setattr(launch, name, launched)

    remember("forward")
    remember("backward")
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


@pytest.mark.usefixtures("no_reference")
def test_create_graph_alone_runs_the_kernels_alone() -> None:
    inputs = leaves(LSTM.inputs(T, B, H))
    function = LSTM.function(lt.functional, engine="local")
    wanted = torch.autograd.grad(loss(function(*inputs)), inputs)
    ours = torch.autograd.grad(loss(function(*inputs)), inputs, create_graph=True)
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))
    with pytest.raises(AssertionError, match="the reference was called"):
        ours[0].sum().backward()


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


# torch.func


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


# Forward mode


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


# Several gradients at once


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
