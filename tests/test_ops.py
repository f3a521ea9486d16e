"""The operators: schema and fakes, gradients, torch.compile, errors. On interpreted kernels."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from concurrency import concurrent
from numerics import CELLS, TOLERANCE, problem, relative_error, worst_error
from sequence_cases import PLAIN, WITH_OPTIONS, Case
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_triton as lt
from lstm_triton import constexprs, launch, ops
from lstm_triton.spec import variants

ENGINES = ("local", "step")


def operator_calls(case: Case, training: bool, memory: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every operator that a training step (or inference) calls, with its arguments."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "lstm_triton":
                calls.append((func, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
            return func(*args, **kwargs or {})

    # No accumulator's dtype: a fake that says float32 for a result, or the other way round, is found.
    inputs = [t.requires_grad_(training) for t in case.inputs(3, 2, 8, dtype=torch.float16)]
    with Recorder():
        outputs = case.function(lt.functional, engine="local", tile=(16, 16), memory=memory)(*inputs)
        if training:
            torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs])
    return iter(calls)


LSTM, GRU, RNN = PLAIN
LSTM_OPTIONS, GRU_OPTIONS, RNN_OPTIONS = WITH_OPTIONS
LSTM_CELLS = Case("lstm", cells=True)


@pytest.mark.parametrize(
    ("case", "training", "memory"),
    [
        (LSTM, True, "store"), (GRU, True, "recompute"), (RNN, True, "store"),
        (LSTM_OPTIONS, False, "store"), (LSTM_OPTIONS, True, "store"), (LSTM_OPTIONS, True, "recompute"),
        (GRU_OPTIONS, True, "store"), (RNN_OPTIONS, True, "recompute"),
        (LSTM_CELLS, False, "store"), (LSTM_CELLS, True, "recompute"),
    ],
    ids=str,
)  # fmt: skip
def test_opcheck(case: Case, training: bool, memory: str) -> None:
    """Schema, fakes and tracing; and no result shares memory with another or with an argument."""
    calls = list(operator_calls(case, training, memory))
    assert [func.name().split("::")[1] for func, _ in calls] == [
        "forward",
        *([] if not training else ["backward"] if memory == "store" else ["backward_recompute"]),
    ]
    for func, args in calls:
        torch.library.opcheck(func, args)
        results = func(*args)
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        assert len(given | {t.untyped_storage()._cdata for t in results}) == len(given) + len(results)
        assert all(t.is_contiguous() for t in results)


@pytest.mark.parametrize(
    ("cell", "engine", "reverse"),
    [("lstm", "local", True), ("lstm", "step", False), ("gru", "local", False), ("gru", "step", True),
     ("rnn", "local", True)],
)  # fmt: skip
def test_gradcheck(cell: str, engine: str, reverse: bool) -> None:
    inputs = [t.requires_grad_() for t in problem(cell, 2, 2, 3, features=2, dtype=torch.float64)]
    function = getattr(lt.functional, cell)
    assert torch.autograd.gradcheck(
        lambda *a: function(*a, engine=engine, tile=(16, 16), reverse=reverse), inputs, atol=1e-7, fast_mode=True
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


def test_no_product_for_a_gradient_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *others = problem("lstm", 3, 2, 8)
    others = [t.requires_grad_() for t in others]
    monkeypatch.setattr(ops, "input_gradient", None)
    torch.autograd.grad(lt.functional.lstm(x, *others, engine="local")[0].sum(), others)
    with pytest.raises(TypeError):
        lt.functional.lstm(x.requires_grad_(), *others, engine="local")[0].sum().backward()


@pytest.mark.parametrize("case", [LSTM, LSTM_CELLS, *WITH_OPTIONS], ids=str)
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_inference_saves_nothing(case: Case, memory: str) -> None:
    ((_, args),) = operator_calls(case, False, memory)
    *_, gates, extra, normed, stats, h = torch.ops.lstm_triton.forward(*args)
    assert gates.numel() == normed.numel() == stats.numel() == h.numel() == 0
    assert extra.numel() == (args[0].shape[0] * 2 * 8 if case.cells and not case.masked else 0)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.function(lt.functional, memory=memory)(*case.inputs(3, 2, 8))
    assert not saved


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("case", WITH_OPTIONS, ids=str)
def test_the_state_of_a_row_without_steps_reaches_no_weight(case: Case, memory: str) -> None:
    """Not even multiplied by zero."""
    T, B = 3, 2
    inputs = case.inputs(T, B, 7, dtype=torch.float32)
    function = case.function(lt.functional, engine="local", memory=memory)
    results = []
    for state in (0.0, torch.nan):
        for t in inputs[1 : 3 if case.cell == "lstm" else 2]:
            t[1] = state
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, *_ = function(*leaves, lengths=torch.tensor([T, 0]))
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        results.append([y, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


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


@pytest.mark.filterwarnings("error:.*must not also be an input")  # what AOTAutograd says of results that share memory
@pytest.mark.parametrize(
    ("case", "memory"), [(GRU, "recompute"), (LSTM_OPTIONS, "store"), (RNN_OPTIONS, "recompute")], ids=str
)
def test_compiles_without_a_graph_break(case: Case, memory: str) -> None:
    """Training and inference, for any length after one compilation."""
    function = case.function(lt.functional, engine="local", memory=memory)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for T in (6, 7):
        results = []
        for run in (function, compiled):
            leaves = [t.requires_grad_() for t in case.inputs(T, 3, 8, features=5, dtype=torch.float32)]
            outputs = run(*leaves)
            results.append([*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves)])
        # The products over time may be summed in another order.
        assert max(relative_error(*pair) for pair in zip(*results, strict=True)) <= TOLERANCE[torch.float32]
        assert counter.frame_count == 1
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(function(*leaves), compiled(*leaves), strict=True))


def test_one_state_for_both_compiles() -> None:
    x, h0, _, *weights = problem("lstm", 3, 2, 8)
    weights = [t.requires_grad_() for t in weights]
    compiled = torch.compile(lambda h: lt.functional.lstm(x, h, h, *weights), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h0)[0], lt.functional.lstm(x, h0, h0, *weights)[0])


def test_exports_as_one_operator() -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return LSTM_OPTIONS.function(lt.functional)(*tensors)

    inputs = tuple(LSTM_OPTIONS.inputs(3, 2, 8))
    with torch.no_grad():
        program = torch.export.export(Module(), inputs)
    ours = [node.target for node in program.graph.nodes if "lstm_triton" in str(node.target)]
    assert ours == [torch.ops.lstm_triton.forward.default]
    wanted = LSTM_OPTIONS.function(lt.functional)(*inputs)
    assert all(torch.equal(*pair) for pair in zip(program.module()(*inputs), wanted, strict=True))


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
        ({"w_hh": torch.zeros(32, 9)}, ValueError, r"w_hh must have shape \(36, 9\).*got \(32, 9\)"),
        ({"h0": torch.zeros(2, 8).to_sparse()}, ValueError, "h0 must be a dense tensor, got layout torch.sparse_coo"),
        ({"lengths": torch.tensor([1, 2]).to_sparse()}, ValueError, "lengths must be a dense tensor"),
        ({"w_hh": torch.zeros(32, 0)}, ValueError, "H >= 1"),
        ({"b_ih": torch.zeros(8)}, ValueError, r"b_ih must have shape \(32,\)"),
        ({"b_hh": torch.zeros(32, device="meta")}, ValueError, "b_hh must be on x's device cpu, got meta"),
        ({"activation": "swish"}, ValueError, "activation must be one of 'tanh', .*got 'swish'"),
        ({"peephole": torch.zeros(2, 8)}, ValueError, r"peephole must have shape \(3, 8\).*got \(2, 8\)"),
        ({"memory": "none"}, ValueError, "memory must be one of 'store', 'recompute', got 'none'"),
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


@pytest.mark.parametrize(
    ("case", "T", "options"),
    [
        *((RNN, 5, {"engine": engine}) for engine in (*ENGINES, "resident", "streamed")),
        (LSTM_CELLS, 5, {"engine": "local"}),
        *((case, 19, {"engine": "local", "memory": "recompute"}) for case in (LSTM, GRU_OPTIONS)),
    ],
)
def test_every_launch_gets_the_same_pointers(
    case: Case, T: int, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles anew for a pointer of another alignment: whole tensors go in, never a step's slice of one, and of
    chunks of steps only such as begin where a tensor might.
    """
    aligned: set[tuple[bool, ...]] = set()
    run = launch._run

    def remember(kernel: Any, plan: Any, tensors: tuple[Any, ...], *rest: Any) -> None:
        aligned.add(tuple(t is None or t.data_ptr() % 16 == 0 for t in tensors))
        run(kernel, plan, tensors, *rest)

    monkeypatch.setattr(launch, "_run", remember)
    monkeypatch.setattr(ops, "chunk_steps", lambda T: 16)
    inputs = [t.requires_grad_() for t in case.inputs(T, 3, 7, features=3, dtype=torch.float16)]
    with concurrent(0):
        outputs = case.function(lt.functional, tile=(16, 8), **options)(*inputs)
        # gradients may come in as anything
        grads = [torch.ones(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape) for t in outputs]
        torch.autograd.grad(outputs, inputs, grads)
    assert aligned and all(all(flags) for flags in aligned)


def test_slots_name_each_cell() -> None:
    for spec in variants():
        slots, first = constexprs.slots(spec)
        assert first + spec.gates <= slots
