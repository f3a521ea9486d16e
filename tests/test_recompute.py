"""memory="recompute" against "store": the same gradients, fewer numbers kept, less memory in backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from concurrency import concurrent
from numerics import TOLERANCE, relative_error
from sequence_cases import PLAIN, WITH_OPTIONS, Case
from torch import Tensor

import lstm_triton as lt
from lstm_triton import constexprs, launch, ops

LSTM, GRU, RNN = PLAIN
LSTM_OPTIONS, GRU_OPTIONS, RNN_OPTIONS = WITH_OPTIONS
LSTM_CELLS = Case("lstm", cells=True)


def differentiate(case: Case, inputs: list[Tensor], module: Any, **options: Any) -> list[Tensor]:
    """Outputs, and gradients of all inputs."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    outputs = case.function(module, **options)(*inputs)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).to(torch.bfloat16).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def worst(case: Case, T: int, B: int, H: int, dtype: torch.dtype, **options: Any) -> float:
    """The largest relative error of an output or gradient against the reference in fp64."""
    inputs = case.inputs(T, B, H, dtype=dtype)
    wanted = differentiate(case, [t.double() for t in inputs], lt.reference)
    ours = differentiate(case, inputs, lt.functional, memory="recompute", **options)
    return max(relative_error(*pair) for pair in zip(ours, wanted, strict=True))


@pytest.fixture
def chunks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "chunk_steps", lambda T: 2)


@pytest.mark.usefixtures("chunks_of_two")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "case", [*PLAIN, *WITH_OPTIONS, LSTM_CELLS, Case("gru", bias=False), Case("lstm", reverse=True)], ids=str
)
def test_gradients(case: Case, dtype: torch.dtype) -> None:
    """Chunks of 2, 2 and 1 steps."""
    assert worst(case, 5, 3, 7, dtype, engine="local") <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", [LSTM, RNN], ids=str)
def test_nothing_is_rounded_between_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 too, the gradients by x and the states hardly depend on how the steps are cut into chunks."""
    inputs = case.inputs(8, 3, 7, dtype=torch.float16)
    results = []
    for length in (1, 64):
        monkeypatch.setattr(ops, "chunk_steps", lambda T, length=length: length)
        results.append(differentiate(case, inputs, lt.functional, engine="local", memory="recompute"))
    states = 2 if case.cell == "lstm" else 1
    compared = slice(1 + states, 1 + states + 1 + states)  # after the results
    errors = [relative_error(*pair) for pair in zip(*(r[compared] for r in results), strict=True)]
    assert max(errors) <= 0.1 * TOLERANCE[torch.float16]


@pytest.mark.usefixtures("chunks_of_two")
@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("case", [LSTM_OPTIONS, GRU], ids=str)
def test_gradients_at_other_lengths(case: Case, T: int) -> None:
    assert worst(case, T, 3, 7, torch.float64, engine="step") <= TOLERANCE[torch.float64]


@pytest.mark.usefixtures("chunks_of_two")
@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_gradients_of_waiting_engines(engine: str) -> None:
    with concurrent(0) as run:
        assert worst(LSTM, 3, 3, 20, torch.float32, engine=engine, tile=(16, 8)) <= TOLERANCE[torch.float32]
    assert not run.races, run.describe()


def test_gradients_of_a_long_sequence() -> None:
    """Chunks as they are: 64 and 3 steps."""
    assert worst(GRU_OPTIONS, 67, 2, 5, torch.float32, engine="local") <= TOLERANCE[torch.float32]


@pytest.mark.usefixtures("chunks_of_two")
@pytest.mark.parametrize("case", [LSTM_OPTIONS, GRU], ids=str)
def test_gradients_only_where_asked(case: Case) -> None:
    """Whatever subset of inputs and outputs matters, the gradients are those of "store"."""
    inputs = case.inputs(3, 2, 7)
    for i in range(len(inputs)):
        results = []
        for memory in ("store", "recompute"):
            some = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
            outputs = case.function(lt.functional, engine="local", memory=memory)(*some)
            results += torch.autograd.grad(outputs[i % len(outputs)].square().sum(), some[i])
        assert relative_error(*results) <= TOLERANCE[torch.float64]


def test_chunks() -> None:
    """About sqrt(T) steps, if that is more than 64; whole sixteens, so that a chunk is aligned as a tensor is."""
    for T in (1, 64, 65, 1000, 4096, 4097, 100_000):
        steps, root = ops.chunk_steps(T), math.sqrt(T)
        assert steps % 16 == 0 and max(64, root) <= steps < max(65, root + 16)


@pytest.mark.parametrize("T, expected", [(1, [1]), (64, [64]), (130, [2, 64, 64]), (5000, [40, *[80] * 62])])
@pytest.mark.parametrize("reverse", [False, True])
def test_backward_goes_chunk_by_chunk(
    T: int, expected: list[int], reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last steps to the first, in the order in which they were processed."""
    lengths: list[int] = []
    without_kernels(monkeypatch, lengths)
    differentiate(Case("gru", reverse=reverse), GRU.inputs(T, 2, 4), lt.functional, memory="recompute")
    assert lengths == (expected[::-1] if reverse else expected)


# What is kept between forward and backward


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("case", [*PLAIN, *WITH_OPTIONS, LSTM_CELLS], ids=str)
def test_bytes_kept(case: Case, memory: str) -> None:
    """The inputs, which exist anyway. Store: h, the G gates and one more tile (c of the LSTM, a product of the GRU), of
    the RNN h alone. Recompute: h, and c of the LSTM. A byte for each step of each row, where some are skipped.
    """
    T, B, H = 3, 2, 6
    inputs = [t.requires_grad_() for t in case.inputs(T, B, H, dtype=torch.float32)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = case.function(lt.functional, memory=memory)(*inputs)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    for t in inputs:
        storages.pop(t.untyped_storage()._cdata, None)
    tiles = {"store": {"lstm": 5, "gru": 4, "rnn": 0}, "recompute": {"lstm": 1, "gru": 0, "rnn": 0}}[memory][case.cell]
    h = 3 if case.projected else 6
    expected = T * B * 4 * (h + tiles * H)
    if case.masked:  # x with zeros where it does not count, which step that is, and where x is masked
        expected += T * B * (4 * 2 + 1 + 1)
    assert sum(storages.values()) == expected
    assert len(outputs) == 1 + (2 if case.cell == "lstm" else 1) + case.cells


# What backward takes


def without_kernels(monkeypatch: pytest.MonkeyPatch, lengths: list[int] | None = None) -> None:
    """Results of the kernels' shapes in no time, for what does not depend on their values."""

    def forward(plan: Any, gates: Tensor, w_hh: Tensor, b_hh: Any, h0: Tensor, c0: Any, **options: Any) -> Any:
        T, B, _ = gates.shape
        extra = (
            gates.new_zeros(T, B, plan.H)
            if options["training"] or (options["save_states"] and c0 is not None)
            else None
        )
        return launch.Forward(gates.new_zeros(T, B, plan.H), h0.clone(), extra, None, None)

    def backward(plan: Any, dy: Tensor, dh: Tensor, dstate: Tensor, *args: Any, **options: Any) -> Any:
        T, B, _ = dy.shape
        if lengths is not None:
            lengths.append(T)
        return launch.Backward(dy.new_ones(T, B, constexprs.slots(plan.spec)[0] * plan.H), dh, dstate, None)

    monkeypatch.setattr(launch, "forward", forward)
    monkeypatch.setattr(launch, "backward", backward)


def peak_of_backward(memory: str, T: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes that backward holds beyond what was there before it and the gradient by x that it returns."""
    without_kernels(monkeypatch)
    inputs = [t.requires_grad_() for t in LSTM.inputs(T, 16, 32, features=8, dtype=torch.float32)]
    outputs = LSTM.function(lt.functional, memory=memory)(*inputs)
    grads = [torch.ones_like(t) for t in outputs]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(outputs, inputs, grads)
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - inputs[0].nbytes


def test_peak_of_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded by a chunk, whatever the length; store holds the gradients of all gates."""
    row = 16 * 4 * 32 * 4  # bytes of the gates of a step
    for T in (256, 4096):
        assert 2 * row * 64 < peak_of_backward("recompute", T, monkeypatch) < 5 * row * 64
        assert peak_of_backward("store", T, monkeypatch) >= row * T


def test_sums_over_chunks_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a sum of ones ends at 256."""
    without_kernels(monkeypatch)
    monkeypatch.setattr(ops, "chunk_steps", lambda T: 1)
    T = 600
    inputs = [torch.ones_like(t).requires_grad_() for t in LSTM.inputs(T, 1, 4, dtype=torch.bfloat16)]
    y, _, _ = LSTM.function(lt.functional, memory="recompute")(*inputs)
    dw_ih, db_hh = torch.autograd.grad(y.sum(), [inputs[3], inputs[6]])
    assert (dw_ih == T).all() and (db_hh == T).all()
