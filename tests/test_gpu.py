"""`pytest -m gpu`, on a CUDA device: what only a device can show.

The numerics of every variant, engine and dtype are lstm_triton.perf.engines', which gpu-check runs beside these.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lstm_triton.kernels.forward import sequence_forward
from lstm_triton.perf.cases import precision
from lstm_triton.perf.numerics import timeouts_at_once
from lstm_triton.perf.problems import Problem, check_engine
from numerics import ENGINES, problem, relative_error

import lstm_triton as lt
from lstm_triton import constexprs, launch
from lstm_triton.spec import CellSpec, variants

pytestmark = pytest.mark.gpu


def cuda(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.cuda() for t in tensors]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with precision("fp32"):
        yield


@pytest.mark.parametrize("engine", ["local", "resident", "streamed"])
def test_cuda_graph(engine: str) -> None:
    inputs = cuda(problem("lstm", 12, 8, 128, dtype=torch.float16))
    with torch.no_grad():
        wanted = lt.functional.lstm(*inputs, engine=engine)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _, _ = lt.functional.lstm(*inputs, engine=engine)
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert torch.equal(y, wanted[0])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_cuda_graph_of_a_training_step(cell: str) -> None:
    """Forward and backward captured: nothing in them waits for the device."""
    inputs = [tensor.requires_grad_() for tensor in cuda(problem(cell, 12, 8, 128, dtype=torch.float16))]

    def step() -> tuple[torch.Tensor, ...]:
        y, *_ = getattr(lt.functional, cell)(*inputs)
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    wanted = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        gradients = step()
    for gradient in gradients:
        gradient.zero_()
    graph.replay()
    assert all(torch.equal(ours, want) for ours, want in zip(gradients, wanted, strict=True))


def test_side_stream() -> None:
    inputs = cuda(problem("lstm", 12, 8, 128))
    wanted = lt.functional.lstm(*inputs)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = lt.functional.lstm(*inputs)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_long_sequence_keeps_every_wait(engine: str) -> None:
    """Thousands of publications; NaN and infinity stay in their rows."""
    inputs = cuda(problem("gru", 3000, 20, 128, dtype=torch.float16))
    with torch.no_grad():
        y, _ = lt.functional.gru(*inputs, engine=engine)
        inputs[0][7, 3] = torch.nan
        spoilt, _ = lt.functional.gru(*inputs, engine=engine)
    rest = [row for row in range(20) if row != 3]
    assert y.isfinite().all()
    assert torch.equal(y[:, rest], spoilt[:, rest])
    assert spoilt[7:, 3].isnan().all()


def test_a_wait_that_runs_out_is_said_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no polls allowed, some program of a large group is always too early."""
    inputs = cuda(problem("gru", 50, 16, 1024, dtype=torch.bfloat16))
    try:
        with torch.no_grad():
            with monkeypatch.context() as patch:
                patch.setattr(constexprs, "POLLS", 0)
                y, _ = lt.functional.gru(*inputs, engine="resident")
                torch.cuda.synchronize()
            assert y[-1].isnan().all()
            with pytest.raises(RuntimeError, match="waited in vain"):
                lt.functional.gru(*inputs, engine="resident")
            assert lt.functional.gru(*inputs, engine="resident")[0].isfinite().all()
    finally:  # whatever went wrong here is not said to another test
        torch.cuda.synchronize()
        launch._error_word(inputs[0].device).zero_()


def test_a_wait_that_runs_out_is_said_at_once_where_anomalies_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = cuda(problem("gru", 50, 16, 1024, dtype=torch.bfloat16))
    monkeypatch.setattr(constexprs, "POLLS", 0)
    try:
        with torch.no_grad(), timeouts_at_once(), pytest.raises(RuntimeError, match="waited in vain"):
            lt.functional.gru(*inputs, engine="resident")
    finally:
        torch.cuda.synchronize()
        launch._error_word(inputs[0].device).zero_()


def test_lengths_and_batches_compile_nothing_new() -> None:
    def compiled() -> int:
        return sum(len(caches[0]) for caches in sequence_forward.device_caches.values())

    with torch.no_grad():
        lt.functional.lstm(*cuda(problem("lstm", 4, 6, 64, dtype=torch.float16)), engine="resident")
        before = compiled()
        for T, B in ((1, 6), (2, 1), (7, 16), (64, 9)):
            lt.functional.lstm(*cuda(problem("lstm", T, B, 64, dtype=torch.float16)), engine="resident")
    assert compiled() == before


def test_tf32_is_followed() -> None:
    for dtype, products in (("tf32", "tf32"), ("fp32", "ieee")):
        with precision(dtype):
            assert lt.plan("lstm", *cuda(problem("lstm", 9, 17, 256))).precision == products


@pytest.mark.parametrize("spec", list(variants()), ids=str)
def test_the_planner_s_choice(spec: CellSpec) -> None:
    check = check_engine(Problem(spec, "auto", "bf16", 9, 17, 200, 33, reverse=not spec.bias), "cuda")
    assert check.passed, check.detail


@pytest.mark.parametrize("spec", [spec for spec in variants() if spec.bias and spec.plain and not spec.proj], ids=str)
def test_modules_against_cudnn(spec: CellSpec) -> None:
    kind = spec.cell.upper()
    options = {"num_layers": 2, "bidirectional": True, "device": "cuda"}
    torch.manual_seed(0)
    nonlinearity = {"nonlinearity": spec.activation} if spec.cell == "rnn" else {}
    theirs = getattr(torch.nn, kind)(40, 72, **options, **nonlinearity)
    ours = getattr(lt, kind)(40, 72, **options, **spec.options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(11, 5, 40, device="cuda")
    results = []
    for module in (ours, theirs):
        y, state = module(x)
        loss = y.square().sum() + sum(s.sum() for s in (state if spec.cell == "lstm" else [state]))
        results.append([y, *torch.autograd.grad(loss, list(module.parameters()))])
    assert max(relative_error(*pair) for pair in zip(*results, strict=True)) <= 1e-5


def test_compiled_model() -> None:
    model = torch.nn.ModuleList([lt.LSTM(40, 72, device="cuda"), torch.nn.Linear(72, 3, device="cuda")])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model[1](model[0](x)[0]).square().sum()

    x = torch.randn(11, 5, 40, device="cuda")
    wanted = torch.autograd.grad(loss(x), list(model.parameters()))
    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), list(model.parameters()))
    assert max(relative_error(*pair) for pair in zip(ours, wanted, strict=True)) <= 1e-5
