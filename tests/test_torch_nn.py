"""What PyTorch tests of its recurrent modules, on ours: its module inputs, its error inputs, and what its test suite
says of states, packed rows, dropout and cells, everything beside torch.nn.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from concurrency import concurrent
from numerics import ENGINES
from torch import Tensor, nn
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
    seeded,
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


def test_nonlinearity() -> None:
    for kind in PAIRS["RNN"]:
        assert [kind(1, 2).nonlinearity, kind(1, 2).mode] == ["tanh", "RNN_TANH"]
        for layer in (kind(1, 2, nonlinearity="relu"), kind(1, 2, 1, "relu")):
            assert [layer.nonlinearity, layer.mode] == ["relu", "RNN_RELU"]
    for kind in PAIRS["RNNCell"]:
        cell = kind(I, H)
        cell.nonlinearity = "relu"
        assert cell(torch.randn(B, I)).min() >= 0


@pytest.mark.native
@pytest.mark.parametrize("name", PAIRS)
def test_meta_tensors_give_shapes(name: str) -> None:
    x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)
    found, expected = (kind(I, H, device="meta")(x.to("meta")) for kind in PAIRS[name])
    for (_, a), (_, b) in zip(tensors(found), tensors(expected), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
