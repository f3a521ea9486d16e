"""The operators: schema and fakes, autograd, torch.compile, errors. On interpreted kernels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from concurrency import concurrent
from numerics import CELLS, TOLERANCE, differentiate, problem, relative_error, worst_error

import lstm_triton as lt
from lstm_triton import launch
from lstm_triton.spec import CellSpec

ENGINES = ("local", "step")


def arguments(cell: str, training: bool = True) -> tuple[Any, ...]:
    x, h0, *rest = problem(cell, 3, 2, 8)
    c0 = rest.pop(0) if cell == "lstm" else None
    return x, h0, c0, *rest, cell, "tanh", False, "local", [16, 16], training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str, training: bool) -> None:
    args = arguments(cell, training)
    torch.library.opcheck(torch.ops.lstm_triton.forward.default, args)
    if training:
        _, h0, c0, _, w_hh, *_ = args
        y, h_n, _, gates, extra = torch.ops.lstm_triton.forward(*args)
        dc_n = None if c0 is None else torch.randn_like(c0)
        torch.library.opcheck(
            torch.ops.lstm_triton.backward.default,
            (torch.randn_like(y), torch.randn_like(h_n), dc_n, gates, y, extra, h0, c0, w_hh, cell, "tanh", True, False,
             "local", [16, 16]),
        )  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: str, reverse: bool, engine: str) -> None:
    inputs = [t.requires_grad_() for t in problem(cell, 2, 2, 3, features=2, dtype=torch.float64)]
    function = getattr(lt.functional, cell)
    assert torch.autograd.gradcheck(
        lambda *a: function(*a, engine=engine, tile=(16, 16), reverse=reverse), inputs, atol=1e-7
    )


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_only_where_asked(cell: str) -> None:
    """Whatever subset of the inputs requires a gradient, it gets the one it had among all."""
    inputs = problem(cell, 3, 2, 8)
    function = getattr(lt.functional, cell)
    every = [t.clone().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(sum(t.square().sum() for t in function(*every, engine="local")), every)
    for i in range(len(inputs)):
        some = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (gradient,) = torch.autograd.grad(sum(t.square().sum() for t in function(*some, engine="local")), some[i])
        assert torch.equal(gradient, wanted[i])


@pytest.mark.parametrize("cell", CELLS)
def test_inference_saves_nothing(cell: str) -> None:
    *_, gates, extra = torch.ops.lstm_triton.forward(*arguments(cell, training=False))
    assert gates.numel() == extra.numel() == 0
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        getattr(lt.functional, cell)(*problem(cell, 3, 2, 8))
        assert not saved
        getattr(lt.functional, cell)(*[t.requires_grad_() for t in problem(cell, 3, 2, 8)])
    assert saved


def test_training_saves_what_the_cell_needs_and_no_more() -> None:
    """Beside inputs and weights: y, the G gates and one more tile for LSTM and GRU; y alone for the RNN."""
    T, B, H = 3, 2, 8
    for cell, tiles in (("lstm", 1 + 4 + 1), ("gru", 1 + 3 + 1), ("rnn", 1)):
        inputs = [t.requires_grad_() for t in problem(cell, T, B, H)]
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            getattr(lt.functional, cell)(*inputs)
        weights = inputs[:-2]  # all but the biases
        assert sum(sizes) == sum(t.numel() for t in weights) + tiles * T * B * H


def test_missing_states_are_zeros() -> None:
    x, h0, c0, *weights = problem("lstm", 3, 2, 8)
    with_zeros = lt.functional.lstm(x, torch.zeros_like(h0), torch.zeros_like(c0), *weights)
    assert all(torch.equal(*pair) for pair in zip(lt.functional.lstm(x, None, None, *weights), with_zeros, strict=True))


def test_one_bias_alone() -> None:
    x, h0, w_ih, w_hh, b_ih, b_hh = problem("gru", 3, 2, 8)
    for biases in ((b_ih, None), (None, b_hh)):
        ours = lt.functional.gru(x, h0, w_ih, w_hh, *biases)[0]
        assert relative_error(ours, lt.reference.gru(x, h0, w_ih, w_hh, *biases)[0]) <= TOLERANCE[torch.float32]


def test_strided_inputs() -> None:
    """Transposed, expanded and sliced tensors give what their contiguous copies give."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = problem("lstm", 4, 3, 8)
    strided = [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        h0[:1].expand(3, 8),
        torch.stack((c0, c0), -1)[..., 0],
        w_ih.t().contiguous().t(),
        w_hh.t().contiguous().t(),
        torch.stack((b_ih, b_ih), -1)[..., 0],
        torch.stack((b_hh, b_hh), -1)[..., 0],
    ]
    assert not any(t.is_contiguous() for t in strided)
    ours = lt.functional.lstm(*strided, engine="local")
    wanted = lt.functional.lstm(*[t.contiguous() for t in strided], engine="local")
    assert max(relative_error(*pair) for pair in zip(ours, wanted, strict=True)) <= TOLERANCE[torch.float32]


def test_expanded_output_gradient() -> None:
    """sum().backward() hands over gradients without memory of their own."""
    inputs = [t.requires_grad_() for t in problem("lstm", 3, 2, 8)]
    gradients = torch.autograd.grad(lt.functional.lstm(*inputs, engine="local")[0].sum(), inputs)
    wanted = torch.autograd.grad(lt.reference.lstm(*inputs)[0].sum(), inputs)
    assert max(relative_error(*pair) for pair in zip(gradients, wanted, strict=True)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("cell", CELLS)
def test_compiles_without_a_graph_break(cell: str) -> None:
    inputs = problem(cell, 3, 2, 8)
    function = getattr(lt.functional, cell)

    def step(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return function(*args, engine="local")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = run(*leaves)
        results.append([*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves)])
        with torch.no_grad():
            results[-1] += run(*inputs)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_one_state_for_both_compiles() -> None:
    x, h0, _, *weights = problem("lstm", 3, 2, 8)
    weights = [t.requires_grad_() for t in weights]
    compiled = torch.compile(lambda h: lt.functional.lstm(x, h, h, *weights), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h0)[0], lt.functional.lstm(x, h0, h0, *weights)[0])


def test_double_backward_is_refused() -> None:
    inputs = [t.requires_grad_() for t in problem("rnn", 2, 2, 8)]
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(lt.functional.rnn(*inputs)[0].sum(), inputs[:1], create_graph=True)


def test_engine_reference_differentiates_twice() -> None:
    inputs = [t.requires_grad_() for t in problem("rnn", 2, 2, 8, dtype=torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *a: lt.functional.rnn(*a, engine="reference"), inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"engine": "fast"}, ValueError, "engine must be one of 'auto', 'local'.*got 'fast'"),
        ({"engine": "local", "tile": (16, 24)}, ValueError, r"tile must be .*powers of two.*got \(16, 24\)"),
        ({"engine": "step", "tile": (8, 16)}, ValueError, "tile must be"),
        ({"engine": "step", "tile": 16}, ValueError, "tile must be"),
        ({"x": torch.zeros(3, 5)}, ValueError, r"x must have 3 dimensions, got shape \(3, 5\)"),
        ({"x": None}, TypeError, "x must be a Tensor, got NoneType"),
        ({"x": torch.zeros(3, 2, 4)}, ValueError, r"w_ih must have shape \(32, 4\).*got \(32, 5\)"),
        ({"x": torch.zeros(3, 2, 5, dtype=torch.int64)}, ValueError, "x must be float16, .*got torch.int64"),
        ({"h0": torch.zeros(3, 8)}, ValueError, r"h0 must have shape \(2, 8\).*got \(3, 8\)"),
        ({"c0": torch.zeros(2, 8, dtype=torch.float64)}, ValueError, "c0 must have x's dtype .*32, got .*64"),
        ({"reverse": "no"}, TypeError, "reverse must be True or False, got 'no'"),
        ({"x": torch.zeros(3, 2, 5).to_sparse()}, ValueError, "x must be a dense tensor"),
        ({"c0": "zeros"}, TypeError, "c0 must be a Tensor or None, got str"),
        ({"w_hh": torch.zeros(24, 8)}, ValueError, r"w_hh must have shape \(32, 8\).*got \(24, 8\)"),
        ({"w_hh": torch.zeros(32, 0)}, ValueError, "H >= 1"),
        ({"b_ih": torch.zeros(8)}, ValueError, r"b_ih must have shape \(32,\)"),
        ({"b_hh": torch.zeros(32, device="meta")}, ValueError, "b_hh must be on x's device cpu, got meta"),
        ({"activation": "relu"}, NotImplementedError, "activation='relu' is not available for 'lstm'"),
        ({"peephole": torch.zeros(3, 8)}, NotImplementedError, "peephole"),
        ({"lengths": torch.tensor([3, 2])}, NotImplementedError, "lengths"),
        ({"memory": "recompute"}, NotImplementedError, "memory='recompute'"),
        ({"return_cells": True}, NotImplementedError, "return_cells"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)  # fmt: skip
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")
    given = dict(zip(names, problem("lstm", 3, 2, 8), strict=True)) | change
    with pytest.raises(error, match=message):
        lt.functional.lstm(**given)


@pytest.mark.parametrize("T, B", [(0, 2), (3, 0)])
def test_empty_inputs_as_torch(T: int, B: int) -> None:
    inputs = problem("gru", max(T, 1), max(B, 1), 8)
    x, h0 = inputs[0][:T, :B], inputs[1][:B]
    outcome = []
    for run in (
        lambda: lt.functional.gru(x, h0, *inputs[2:]),
        lambda: torch.gru(x, h0[None], inputs[2:], True, 1, 0.0, False, False, False),
    ):
        try:
            outcome.append(tuple(run()[0].shape))
        except RuntimeError as e:
            outcome.append(str(e))
    assert outcome[0] == outcome[1]


def test_no_input_features() -> None:
    inputs = problem("gru", 3, 2, 8, features=0)
    assert worst_error("gru", inputs, engine="local") <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode_is_refused(cell: str) -> None:
    """Nothing requires a gradient, yet a tangent must not be lost."""
    x, *rest = problem(cell, 2, 2, 8)
    function = getattr(lt.functional, cell)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|setup_context"):
        torch.func.jvp(lambda z: function(z, *rest)[0], (x,), (torch.ones_like(x),))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"),
    ):
        function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), *rest)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(lambda z: function(z, *rest)[0])(x[None])


@pytest.mark.both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: str, dtype: torch.dtype) -> None:
    """All results in autocast's dtype, gradients in the parameters', and float64 left alone."""
    inputs = [t.requires_grad_() for t in problem(cell, 3, 2, 8)]
    function = getattr(lt.functional, cell)
    with torch.autocast("cpu", dtype=dtype):
        outputs = function(*inputs)
    assert {t.dtype for t in outputs} == {dtype}
    gradients = torch.autograd.grad(sum(t.float().sum() for t in outputs), inputs)
    assert {t.dtype for t in gradients} == {torch.float32}
    assert relative_error(outputs[0], function(*inputs)[0]) <= TOLERANCE[dtype]
    with torch.autocast("cpu", dtype=dtype):
        assert function(*problem(cell, 3, 2, 8, dtype=torch.float64))[0].dtype == torch.float64


def test_threads() -> None:
    inputs = problem("gru", 2, 2, 20)
    wanted = lt.functional.gru(*inputs, engine="step", tile=(16, 8))[0]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: lt.functional.gru(*inputs, engine="step", tile=(16, 8))[0], range(12)))
    assert all(torch.equal(y, wanted) for y in results)


@pytest.mark.parametrize("engine", [*ENGINES, "resident", "streamed"])
def test_every_launch_gets_the_same_pointers(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles anew for a pointer of another alignment: whole tensors go in, never a step's slice of one."""
    aligned: set[tuple[bool, ...]] = set()
    run = launch._run

    def remember(kernel: Any, plan: Any, tensors: tuple[Any, ...], *rest: Any) -> None:
        aligned.add(tuple(t is None or t.data_ptr() % 16 == 0 for t in tensors))
        run(kernel, plan, tensors, *rest)

    monkeypatch.setattr(launch, "_run", remember)
    with concurrent(0):
        differentiate("rnn", problem("rnn", 5, 3, 7), None, lt.functional, engine=engine, tile=(16, 8))
    assert all(all(flags) for flags in aligned)


def test_slots_name_each_cell() -> None:
    for cell in CELLS:
        slots, first = launch.slots(CellSpec(cell))
        assert first + CellSpec(cell).gates <= slots
