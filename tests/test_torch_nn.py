"""What PyTorch tests of its recurrent modules, on ours: its module inputs, its error inputs, and the behaviours that
its test suite holds them to, everything beside torch.nn.
"""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from concurrency import concurrent
from numerics import ENGINES
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, ModuleInput, module_db
from torch_pairs import (
    ALIKE,
    CELLS,
    INTERPRETED,
    LAYERS,
    PAIRS,
    TOLERANCE,
    assert_close,
    build,
    mapped,
    outcome,
    results,
    tensors,
)

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]

INFOS: dict[str, ModuleInfo] = {i.module_cls.__name__: i for i in module_db if i.module_cls.__name__ in PAIRS}
DTYPES = [torch.float32, torch.float64]
# the interpreter takes its time at every step of every layer
T, B, I, H, DEPTH = (2, 2, 4, 5, 1) if INTERPRETED else (3, 2, 4, 5, 2)  # noqa: E741


def test_pytorch_has_inputs_for_all_six() -> None:
    assert INFOS.keys() == PAIRS.keys()


def module_inputs(name: str, dtype: torch.dtype, training: bool) -> list[Any]:
    torch.manual_seed(1)
    options = {"with_packed_sequence": True} if name in ("GRU", "RNN") else {}
    return INFOS[name].module_inputs_func(
        INFOS[name], device="cpu", dtype=dtype, requires_grad=False, training=training, **options
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


USES = list(product(DTYPES, ["train", "eval"], ["inputs_need_grad", "inputs_need_none"]))


@pytest.mark.parametrize(("dtype", "mode", "need"), USES[:1] if INTERPRETED else USES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_module_inputs(name: str, dtype: torch.dtype, mode: str, need: str) -> None:
    training, by_inputs = mode == "train", need == "inputs_need_grad"
    samples = module_inputs(name, dtype, training)
    assert samples
    # a stride prime to every axis still meets each value of each
    for sample in samples[:: 29 if INTERPRETED and name in LAYERS else 1]:
        ours, theirs = build(name, *sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=dtype)
        args = sample.forward_input.args
        found, others = (results(m.train(training), *args, by_inputs=by_inputs) for m in (ours, theirs))
        assert all(value.dtype == dtype for value in found.values())
        # These inputs saturate gates, where fp32 has few digits left: no further from fp64 than torch.nn is.
        expected = results(theirs.double(), *mapped(Tensor.double, args), by_inputs=by_inputs)
        assert_close(found, expected, TOLERANCE[dtype], others)
        if sample.reference_fn is not None and not isinstance(args[0], PackedSequence):
            reference = dict(tensors(sample.reference_fn(ours, *args), "output"))
            assert_close({k: v for k, v in found.items() if k in reference}, reference, TOLERANCE[dtype])


@pytest.mark.parametrize("engine", ENGINES if INTERPRETED else ["auto", "reference"])
@pytest.mark.parametrize("name", PAIRS)
def test_engines(name: str, engine: str) -> None:
    """The layers on packed rows in both directions, LSTM with a projection; the cells on one step."""
    if name in CELLS:
        options, x, shape = {}, torch.randn(B, I, generator=seeded()), (B,)
    else:
        options = {"bidirectional": True} | ({"proj_size": 2} if name == "LSTM" else {})
        rows = torch.randn(2, B, I, generator=seeded())
        x, shape = pack_sequence([rows[:1, 0], rows[:, 1]], enforce_sorted=False), (2, B)
    h, c = torch.randn(*shape, options.get("proj_size", H)), torch.randn(*shape, H)
    hx = (h, c) if name.startswith("LSTM") else h
    theirs = build(name, I, H, **options)[1]
    ours = PAIRS[name][0](I, H, engine=engine, **options)
    ours.load_state_dict(theirs.state_dict())
    # the programs of these two wait for one another
    with concurrent(0) if engine in ("resident", "streamed") else nullcontext() as run:
        found = results(ours, x, hx)
    assert run is None or not run.races, run.describe()
    expected = results(theirs.double(), *mapped(Tensor.double, (x, hx)))
    assert_close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_module_error_inputs(name: str, dtype: torch.dtype) -> None:
    errors = INFOS[name].module_error_inputs_func(
        INFOS[name], device="cpu", dtype=dtype, requires_grad=False, training=False
    )
    assert errors
    for error in errors:
        sample = error.module_error_input

        def attempt(kind: type[nn.Module], sample: ModuleInput = sample, on: ModuleErrorEnum = error.error_on) -> None:
            module = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            if on == ModuleErrorEnum.FORWARD_ERROR:
                module.to(dtype)(*sample.forward_input.args)

        ours, theirs = PAIRS[name]
        with pytest.raises(error.error_type, match=error.error_regex):
            attempt(ours)
        assert outcome(lambda: attempt(ours)) == outcome(lambda: attempt(theirs))  # noqa: B023


@pytest.mark.parametrize("wrong", ["rows", "hidden_size", "input_size"])
@pytest.mark.parametrize("name", CELLS)
def test_cells_do_not_broadcast(name: str, wrong: str) -> None:
    x, good, bad = torch.randn(3, I), torch.randn(3, H), torch.randn(1, H) if wrong == "rows" else torch.randn(3, 1)
    states = [(bad, good), (good, bad)] if name == "LSTMCell" else [bad]
    if wrong == "input_size":
        x, states = torch.randn(3, 1), [(good, good) if name == "LSTMCell" else good]
    for hx in states:
        mine, other = (outcome(lambda kind=kind: kind(I, H)(x, hx)) for kind in PAIRS[name])  # noqa: B023
        assert other[0] == "RuntimeError"
        assert mine == other


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells_step_by_step(name: str, bias: bool) -> None:
    ours, theirs = build(name, I, H, bias, dtype=torch.float64)
    xs = torch.randn(T, 3, I, dtype=torch.float64)

    class Loop(nn.Module):
        def __init__(self, cell: nn.Module) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, xs: Tensor) -> list[Any]:
            states, state = [], None
            for x in xs:
                state = self.cell(x, state)
                states.append(state)
            return states

    assert_close(results(Loop(ours), xs), results(Loop(theirs), xs), TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", CELLS)
def test_cells_without_hidden_units(name: str) -> None:
    ours, theirs = (kind(I, 0) for kind in PAIRS[name])
    x = torch.randn(3, I, requires_grad=True)
    for hx in (None, torch.randn(3, 0)):
        hx = (hx, hx) if name == "LSTMCell" and hx is not None else hx
        found, expected = (dict(tensors(cell(x, hx), "output")) for cell in (ours, theirs))
        assert_close(found, expected, 0.0)
        assert all(t.requires_grad for t in (*found.values(), *expected.values()))


@pytest.mark.parametrize(
    ("name", "options"),
    [*product(LAYERS, ({}, {"bidirectional": True})), ("LSTM", {"proj_size": 2})],
    ids=str,
)
def test_no_initial_state_is_a_zero_state(name: str, options: dict) -> None:
    layer = PAIRS[name][0](I, H, DEPTH, **options)
    x = torch.randn(T, B, I)
    rows = DEPTH * (2 if "bidirectional" in options else 1)
    h, c = torch.zeros(rows, B, options.get("proj_size", H)), torch.zeros(rows, B, H)
    found, expected = layer(x), layer(x, (h, c) if name == "LSTM" else h)
    for (_, a), (_, b) in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", ALIKE)
def test_weight_norm(name: str) -> None:
    """The old one, which puts a plain tensor in the parameter's place."""
    found, of = [], "weight_hh_l0_reverse"
    for layer in build(name, I, H, bidirectional=True, dtype=torch.float64):
        assert all(isinstance(w, nn.Parameter) for w in layer._flat_weights)
        torch.nn.utils.weight_norm(layer, name=of)
        assert sum(isinstance(w, nn.Parameter) for w in layer._flat_weights) == len(layer._flat_weights) - 1
        found.append(results(layer, torch.randn(T, B, I, dtype=torch.float64, generator=seeded())))
        torch.nn.utils.remove_weight_norm(layer, name=of)
        assert all(isinstance(w, nn.Parameter) for w in layer._flat_weights)
        assert of in layer._parameters
        assert not {f"{of}_g", f"{of}_v"} & layer._parameters.keys()
    assert_close(*found, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ALIKE)
def test_parametrizations(name: str) -> None:
    """weight_norm, a mask on each weight (pruning), and a parametrization of one's own."""

    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    found = []
    for layer in build(name, I, H, 2, dtype=torch.float64):
        parametrizations.weight_norm(layer, "weight_ih_l0")
        parametrize.register_parametrization(layer, "weight_hh_l1", Halved())
        for of in ("weight_hh_l0", "bias_ih_l1"):
            prune.l1_unstructured(layer, of, amount=0.5)
        assert len(layer.all_weights) == 2
        found.append(results(layer, torch.randn(T, B, I, dtype=torch.float64, generator=seeded())))
    assert_close(*found, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", PAIRS)
def test_a_parametrization_runs_once_for_a_call(name: str) -> None:
    """All but the one that check_input looks at, once more."""
    module = PAIRS[name][0](I, H)
    calls = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(weight)
            return weight

    parametrize.register_parametrization(module, "weight_hh" if name in CELLS else "weight_hh_l0", Counted())
    calls.clear()
    module(torch.randn(B, I) if name in CELLS else torch.randn(1, B, I))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ALIKE)
def test_weights_dropped_for_a_time(name: str) -> None:
    """A parameter removed, the module moved without it, a plain tensor put in its place, as weight dropping does."""
    layer = PAIRS[name][0](I, H)
    x = torch.randn(T, B, I)
    expected = layer.double()(x.double())[0]
    layer.float()
    weight = layer.weight_hh_l0
    del layer.weight_hh_l0
    assert not hasattr(layer, "weight_hh_l0")
    assert layer._flat_weights.count(None) == 1
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        layer(x)
    layer.double()
    layer.weight_hh_l0 = weight.detach().double() * 1
    torch.testing.assert_close(layer(x.double())[0], expected, rtol=1e-6, atol=1e-7)
    assert "weight_hh_l0" not in dict(layer.named_parameters())
    raw = weight.detach().double().requires_grad_()
    layer.weight_hh_l0 = torch.nn.functional.dropout(raw, 0.5)
    layer(x.double())[0].sum().backward()
    assert raw.grad.count_nonzero() > 0


@pytest.mark.parametrize("packed", [True] if INTERPRETED else [False, True], ids=lambda packed: f"packed={packed}")
@pytest.mark.parametrize("name", ALIKE)
def test_dropout_changed_between_calls(name: str, packed: bool) -> None:
    """And the training flag: the random numbers are torch.nn's, at every p."""
    ours, theirs = build(name, I, H, 1 + DEPTH, dropout=0.3, dtype=torch.float64)
    x: Any = torch.randn(T, B, I, dtype=torch.float64)
    x = pack_sequence([x[:, 0], x[:1, 1]]) if packed else x
    seen = []
    for p, training in ((0.3, True), (1.0, True), (0.0, True), (0.7, False), (0.7, True)):
        found = []
        for layer in (ours, theirs):
            layer.dropout = p
            layer.train(training)
            torch.manual_seed(3)
            with torch.no_grad():
                found.append(dict(tensors(layer(x), "output")))
        assert_close(*found, TOLERANCE[torch.float64])
        seen.append(next(iter(found[0].values())))
    assert torch.equal(seen[2], seen[3])
    assert not any(torch.equal(a, seen[4]) for a in seen[:4])


@pytest.mark.parametrize("name", ALIKE)
def test_packed_rows_one_at_a_time(name: str) -> None:
    """A packed batch, sorted or not, is its rows each by itself, and so are the gradients."""
    layer = PAIRS[name][0](I, H, DEPTH, bidirectional=True, dtype=torch.float64)
    rows = [torch.randn(n, I, dtype=torch.float64, generator=seeded(n), requires_grad=True) for n in (1, T)]
    leaves = rows + list(layer.parameters())
    alone = [layer(row) for row in rows]
    together, state = layer(pack_sequence(rows, enforce_sorted=False))
    outputs = nn.utils.rnn.unpack_sequence(together)
    for found, (expected, _) in zip(outputs, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for i, (_, expected) in enumerate(alone):
        for (_, a), (_, b) in zip(tensors(state), tensors(expected), strict=True):
            torch.testing.assert_close(a[:, i], b, rtol=1e-12, atol=1e-14)
    found = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)
    expected = torch.autograd.grad(sum(y.square().sum() for y, _ in alone), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name: str) -> None:
    ours, theirs = build(name, I, H, 2, bidirectional=True)
    found, expected = (results(layer, torch.zeros(T, 0, I)) for layer in (ours, theirs))
    assert_close(found, expected, 0.0)


@pytest.mark.parametrize("name", ALIKE)
def test_tied_weights_train_together(name: str) -> None:
    found = []
    for layer in build(name, I, H, bidirectional=True, dtype=torch.float64):
        layer.weight_hh_l0_reverse = layer.weight_hh_l0
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(DEPTH):
            optimizer.zero_grad()
            layer(torch.randn(T, B, I, dtype=torch.float64, generator=seeded()))[0].square().sum().backward()
            optimizer.step()
        assert layer.weight_hh_l0_reverse is layer.weight_hh_l0
        found.append(dict(layer.named_parameters()))
    assert_close(*found, TOLERANCE[torch.float64])


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


@pytest.mark.parametrize("name", PAIRS)
def test_factories_and_moves(name: str) -> None:
    for dtype in (torch.float64, torch.float16):
        layer = PAIRS[name][0](I, H, device="meta", dtype=dtype)
        assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(dtype, "meta")}
        layer.to_empty(device="cpu").reset_parameters()
        assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(dtype, "cpu")}
        assert all(p.abs().max() <= H**-0.5 for p in layer.parameters())
    with torch.device("meta"):
        assert all(p.is_meta for p in PAIRS[name][0](I, H).parameters())
    x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)
    layer = PAIRS[name][0](I, H)
    for dtype in (torch.float64, torch.float32):
        assert all(t.dtype == dtype for _, t in tensors(layer.to(dtype)(x.to(dtype))))


@pytest.mark.native
@pytest.mark.parametrize("name", PAIRS)
def test_meta_tensors_give_shapes(name: str) -> None:
    x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)
    found, expected = (kind(I, H, device="meta")(x.to("meta")) for kind in PAIRS[name])
    for (_, a), (_, b) in zip(tensors(found), tensors(expected), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@pytest.mark.parametrize("name", PAIRS)
def test_saved_and_copied(name: str) -> None:
    model = nn.ModuleDict({"inner": nn.Sequential(PAIRS[name][0](I, H, bias=False))})
    x = torch.randn(B, I) if name in CELLS else torch.randn(1, B, I)
    expected = [t for _, t in tensors(model["inner"](x))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert repr(twin) == repr(model)
        assert list(twin.state_dict()) == list(model.state_dict())
        assert all(torch.equal(a, b) for (_, a), b in zip(tensors(twin["inner"](x)), expected, strict=True))
        with torch.no_grad():
            next(twin.parameters()).zero_()
    assert next(model.parameters()).count_nonzero() > 0


@pytest.mark.parametrize("name", PAIRS)
def test_state_dicts_that_do_not_fit(name: str) -> None:
    for state in (PAIRS[name][1](I, H + 1).state_dict(), PAIRS[name][1](I, H, bias=False).state_dict(), {}):
        mine, other = (outcome(lambda kind=kind: kind(I, H).load_state_dict(state)) for kind in PAIRS[name])  # noqa: B023
        assert other[0] == "RuntimeError"
        assert mine == other


def test_nonlinearity() -> None:
    for kind in PAIRS["RNN"]:
        assert [kind(1, 2).nonlinearity, kind(1, 2).mode] == ["tanh", "RNN_TANH"]
        for layer in (kind(1, 2, nonlinearity="relu"), kind(1, 2, 1, "relu")):
            assert [layer.nonlinearity, layer.mode] == ["relu", "RNN_RELU"]
    for kind in PAIRS["RNNCell"]:
        cell = kind(I, H)
        cell.nonlinearity = "relu"
        assert cell(torch.randn(B, I)).min() >= 0
