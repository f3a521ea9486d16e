"""gpu-check's numerics: what is checked, that the checks catch faults, and how a run of them survives its own end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lstm_triton.perf import engines, precompile, problems, table
from lstm_triton.perf.cases import DTYPES, precision
from lstm_triton.perf.numerics import Check
from lstm_triton.perf.problems import Problem, Tensors, check_engine, draw, expected
from torch.overrides import TorchFunctionMode

import lstm_triton as lt
from lstm_triton import constexprs
from lstm_triton.modules import spec_of
from lstm_triton.planner import ENGINES
from lstm_triton.plans import LaunchPlan
from lstm_triton.spec import OPTIONS, CellSpec, variants

SPECS = list(variants())
PLAIN = [spec for spec in SPECS if spec not in OPTIONS]
BIASED = [spec for spec in SPECS if spec.bias]
GRU = CellSpec("gru")


#: Of the interpreted problems; tf32 there is fp32.
IN_TURN = ("fp32", "fp16", "bf16", "fp64", "fp32")


def small(spec: CellSpec = GRU, engine: str = "local", **changes: Any) -> Problem:
    return replace(Problem(spec, engine, "fp32", 3, 3, 5, 4, tile=(16, 16)), **changes)


def test_variants_are_what_the_kernels_have() -> None:
    assert {spec.cell for spec in SPECS} == set(constexprs._CELLS)
    assert {replace(spec, bias=not spec.bias) for spec in PLAIN} == set(PLAIN)
    assert len({str(spec) for spec in SPECS}) == len(SPECS)
    # and of what the kernels are told nothing is the same for all, but what is no matter of the cell
    told = [constexprs.options(spec, 0, False)._asdict() for spec in SPECS]
    same = {name for name in constexprs.Options._fields if len({options[name] for options in told}) == 1}
    assert same == {"epsilon", "masks", "random"}
    listed = engines.first()
    assert {problem.masks for problem in listed} == {"", *engines.MASKED}
    assert {problem.seeded for problem in listed if any(problem.spec.zoneout)} == {True, False}
    assert not any(problem.seeded for problem in engines.on_gpu() if not any(problem.spec.zoneout))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_spec_says_what_its_layer_takes(spec: CellSpec) -> None:
    problem = small(spec, width=4, hidden=5)
    found = problem.shapes
    weights = {name: shape for name, shape in found.items() if name not in ("x", *spec.states)}
    ours = {name: tuple(weight.shape) for name, weight in problem.layer("auto").named_parameters()}
    ours = {name: shape for name, shape in ours.items() if "_l0" in name and "_reverse" not in name}
    peepholes = {name: shape for name, shape in ours.items() if name.startswith("weight_c")}
    if spec.peephole:
        assert weights.pop("peephole") == (len(peepholes), 5) and set(peepholes.values()) == {(5,)}
    assert list(weights.values()) == [shape for name, shape in ours.items() if name not in peepholes]
    if spec in PLAIN:
        kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[spec.cell]
        projection = {"proj_size": spec.proj} if spec.proj else {}
        theirs = [tuple(weight.shape) for weight in kind(4, 5, bias=spec.bias, **projection).parameters()]
        assert list(weights.values()) == theirs
    layer = problem.layer("auto")
    assert len(spec.states) == layer.states and spec_of(layer) == spec


def test_every_variant_and_engine_comes_first() -> None:
    wanted = {(spec, engine, dtype) for spec in PLAIN for engine in ENGINES for dtype in DTYPES}
    first = engines.first()
    whole, ragged, options = (
        first[: len(wanted)], first[len(wanted) : 2 * len(wanted)], first[2 * len(wanted) :]
    )  # fmt: skip
    for half in whole, ragged:
        assert {(p.spec, p.engine, p.dtype) for p in half} == wanted and len(half) == len(wanted)
    assert not any(p.ragged for p in whole) and all(p.ragged for p in ragged)
    assert {(p.spec, p.engine) for p in options} >= {(spec, engine) for spec in OPTIONS for engine in ENGINES}
    for engine in ENGINES:
        mine = [p for p in options if p.engine == engine]
        assert {(p.spec, p.ragged) for p in mine} >= {(spec, ragged) for spec in OPTIONS for ragged in (False, True)}
        masked = {(p.spec, p.masks) for p in mine if not p.ragged}
        assert masked >= {(spec, masks) for spec in engines.PRODUCTS for masks in engines.MASKED}
    assert engines.on_gpu()[: len(first)] == first and len(first) < 600


def test_each_variant_is_met_in_every_form() -> None:
    listed = engines.on_gpu()
    for spec in SPECS:
        mine = [p for p in listed if p.spec == spec]
        assert {(p.reverse, p.states) for p in mine} >= {(False, True), (True, False)}
        assert any(p.recompute for p in mine) and any(p.ragged for p in mine)
    for spec in BIASED:
        mine = [p for p in listed if p.spec == spec]
        assert {p.engine for p in engines.sanitized() if p.spec == spec} == set(ENGINES)
        assert any(p.module for p in mine) and any(p.tile and p.batch > 16 for p in mine)
        assert any(p.seq == p.batch == 1 < p.hidden for p in mine)
    assert set(engines.sanitized()) <= set(engines.first())
    keys = [tuple(problem.key.values()) for problem in listed]
    assert len(keys) == len(set(keys)) and {tuple(problem.key) for problem in listed} == {engines.KEY}


def planned(problem: Problem) -> LaunchPlan:
    shapes, dtype = problem.shapes, DTYPES[problem.dtype]
    tensors = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in shapes.items()}
    tensors |= dict.fromkeys(problem.spec.states)
    options = {**problem.spec.options, "engine": problem.engine, "tile": problem.tile, "target": "H200"}
    with precision(problem.dtype):
        return lt.plan(problem.spec.cell, **problems.paired(tensors), **options)


def refused(problem: Problem) -> bool:
    try:
        planned(problem)
    except ValueError:
        return True
    return False


def test_the_first_are_refused_only_where_products_are_scalar() -> None:
    no = {(p.engine, p.dtype, p.spec) for p in engines.first() if refused(p)}
    scalar = {("resident", "fp32"), ("local", "fp32")}
    # and where the operands of two products in float64 would have to be held
    assert all((engine, dtype) in scalar or (dtype == "fp64" and spec.two_products) for engine, dtype, spec in no)
    assert ("local", "fp32", CellSpec("rnn")) not in no


def test_with_a_tile_every_batch_has_the_same_kernels() -> None:
    for problem in (p for p in engines.on_gpu() if p.tile and not refused(p)):
        whole, single = planned(problem), planned(replace(problem, batch=1))
        for one, other in ((whole.forward, single.forward), (whole.backward, single.backward)):
            assert precompile.identity(whole, one) == precompile.identity(single, other)


def test_the_list_has_several_groups_and_several_launches_of_them() -> None:
    plans = [planned(p) for p in engines.on_gpu() if p.dtype == "bf16" and p.batch > 3 and not refused(p)]
    for engine in ("resident", "streamed"):
        kernels = [plan.forward for plan in plans if plan.engine == engine]
        assert any(kernel.n_b > 1 and kernel.n_h > 1 for kernel in kernels)
        assert any(kernel.groups_at_once < kernel.n_b for kernel in kernels)


@pytest.mark.parametrize(
    "problem",
    [
        small(spec, ENGINES[i % 4], reverse=not spec.bias, states=spec.bias, dtype=IN_TURN[i % 5])
        for i, spec in enumerate(PLAIN)
    ]
    + [
        small(spec, ENGINES[i % 4], reverse=spec.bias, ragged=True, recompute=i % 3 == 0)
        for i, spec in enumerate(PLAIN)
    ]
    + [
        small(spec, ENGINES[i % 4], dtype=IN_TURN[i % 5], masks=("", *engines.MASKED)[i % 3], seeded=any(spec.zoneout))
        for i, spec in enumerate(OPTIONS)
    ]
    + [
        small(spec, ENGINES[(i + 2) % 4], reverse=True, states=False, ragged=True, recompute=i % 3 != 0)
        for i, spec in enumerate(OPTIONS)
    ],
    ids=lambda problem: " ".join(problem.key.values()),
)
def test_every_variant_passes_on_interpreted_kernels(problem: Problem) -> None:
    """Drawn, called and compared as on a GPU, with all that must not change a bit."""
    check = check_engine(problem, "cpu")
    assert check.passed and 0 < check.error <= check.allowed, check.detail


@pytest.mark.parametrize("spec", BIASED, ids=str)
def test_modules_pass_on_interpreted_kernels(spec: CellSpec) -> None:
    ragged = spec.proj > 0
    problem = small(spec, "auto", module=True, tile=None, seq=2, states=spec.cell != "gru", ragged=ragged)
    named = {"y", "h_n"} | ({"c_n"} if spec.cell == "lstm" else set()) | ({"cells"} if ragged else set())
    assert {name for name in expected(problem) if name[0] != "d"} == named
    assert sum(name.startswith("dweight_hh_l1") for name in expected(problem)) == 2
    check = check_engine(problem, "cpu")
    assert check.passed, check.detail


def test_relu_is_kept_from_its_kink() -> None:
    wanted = expected(small(CellSpec("rnn", "relu"), dtype="bf16", seq=20, batch=16, hidden=64, width=8))
    y = wanted["y"]
    assert 0.3 < (y > 0).double().mean() < 0.7 and y[y > 0].min() > 0.5


#: In which call the kernels give another last bit.
FAULTS = {
    "in a second run": lambda seen: seen["call"] == 1,
    "in inference": lambda seen: not seen["training"],
    "beside sequences of NaN": lambda seen: seen["nan"],
    "alone in its batch": lambda seen: seen["batch"] == 1,
}


@pytest.mark.parametrize("when", FAULTS)
def test_a_changed_bit_is_caught(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are right, and of which one call gives another last bit."""
    calls = []

    def call(problem: Problem, tensors: Tensors, *rest: Any, training: bool = True) -> dict[str, torch.Tensor]:
        results = real(problem, tensors, *rest, training=training)
        x = tensors.arguments["x"]
        seen = {"call": len(calls), "training": training, "nan": bool(x.isnan().any()), "batch": x.shape[1]}
        calls.append(seen)
        if FAULTS[when](seen):
            results["y"][..., -1, :] *= 1 + 1e-6
        return results

    real = problems.call
    problem = small()
    expected(replace(problem, engine="", tile=None))  # else the oracle would be the first call
    monkeypatch.setattr(problems, "call", call)
    check = check_engine(problem, "cpu")
    assert not check.passed and check.detail == f"y: other bits {when}"


@pytest.mark.parametrize("name", ["y", "h_n", "c_n", "dx", "dc0", "dw_hh", "db_ih"])
def test_a_wrong_result_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        results = real(*arguments, **options)
        results[name].flatten()[0] += 0.01
        return results

    real = problems.call
    problem = small(CellSpec("lstm"))
    expected(replace(problem, engine="", tile=None))
    monkeypatch.setattr(problems, "call", call)
    check = check_engine(problem, "cpu", repeat=False)
    assert not check.passed and check.worst == name


def test_numerics_run_where_a_timed_out_wait_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        seen.append((torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()))
        return {"y": torch.ones(1, 1, 1)}

    monkeypatch.setattr(problems, "call", spy)
    monkeypatch.setattr(problems, "expected", problems.expected.__wrapped__)
    check_engine(small(batch=1), "cpu")
    assert len(seen) > 2 and set(seen) == {(True, False)}
    assert not torch.is_anomaly_enabled()


class CudaOnTheCpu(TorchFunctionMode):
    """Whatever is asked for on "cuda" is on the CPU."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        if options.get("device") == "cuda" or "cuda" in [a for a in arguments if isinstance(a, str)]:
            self.asked.append(getattr(function, "__name__", ""))
            options = {name: "cpu" if value == "cuda" else value for name, value in options.items()}
            arguments = tuple("cpu" if isinstance(a, str) and a == "cuda" else a for a in arguments)
            if self.asked[-1] == "full":  # not a quarter of a gigabyte
                arguments = ((8,), *arguments[1:])
        return function(*arguments, **options)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaOnTheCpu]:
    """The lines that a GPU runs, and a compiler that is told everything and does nothing."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with CudaOnTheCpu() as mode:
        yield mode


def rows_at(folder: Path, resume: bool = False) -> table.Rows:
    return table.Rows(folder / "numerics.csv", engines.FIELDS, resume=resume)


def test_what_a_gpu_runs(on_cuda: CudaOnTheCpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function and a module all the way, as on CUDA; their kernels asked for beforehand."""
    asked: list[list[precompile.Kernel]] = []

    def ahead(
        items: Sequence[Problem], kernels: Any, batch: int, deadline: float, *, overlap: bool
    ) -> Iterator[Problem]:
        assert overlap and deadline == math.inf
        asked.extend(kernels(item) for item in items)
        yield from items

    monkeypatch.setattr(engines, "ahead", ahead)
    todo = [small(CellSpec("lstm")), small(CellSpec("rnn"), "auto", module=True, tile=None, seq=2)]
    rows = rows_at(tmp_path)
    assert engines.run(todo, "cuda", rows, "here", None, early=True)
    assert [row["status"] for row in rows.rows] == ["ok", "ok"], rows.rows
    assert {"to", "empty"} <= set(on_cuda.asked)
    function, module = ([(k.direction, k.training, k.reverse) for k in kernels] for kernels in asked)
    assert function == [("forward", True, False), ("forward", False, False), ("backward", True, False)]
    assert module == [*function, *((direction, training, True) for direction, training, _ in function)]
    assert not list(tmp_path.glob("*.running"))


def judge_with(monkeypatch: pytest.MonkeyPatch, judge: Callable[[Problem], Check]) -> None:
    monkeypatch.setattr(engines, "check_engine", lambda problem, device, repeat: judge(problem))


GOOD = Check(True, 1e-7, "y", 1e-6)
QUEUE = [small(spec, engine) for spec in BIASED for engine in ("local", "resident")]


def test_refusals_are_told_from_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"local": ValueError("engine='local' cannot run it: too large"), "resident": ValueError("zip() argument")}

    def judge(problem: Problem) -> Check:
        raise errors[problem.engine]

    judge_with(monkeypatch, judge)
    rows = rows_at(tmp_path)
    assert engines.run(QUEUE[:2], "cpu", rows, "here", None, early=False)
    assert [row["status"] for row in rows.rows] == ["refused", "error"]


def test_an_engine_whose_waits_run_out_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(problem: Problem) -> Check:
        if problem.engine == "resident":
            raise RuntimeError("lstm_triton: a program waited in vain for its group")
        return GOOD

    judge_with(monkeypatch, judge)
    rows = rows_at(tmp_path)
    assert engines.run(QUEUE, "cpu", rows, "here", None, early=False)
    left = sum(problem.engine == "resident" for problem in QUEUE) - engines.TIMEOUTS
    assert [row["status"] for row in rows.rows if row["engine"] == "resident"] == ["error"] * 3 + ["left"] * left
    assert {row["status"] for row in rows.rows if row["engine"] == "local"} == {"ok"}


def test_a_lost_device_ends_the_run_after_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def judge(problem: Problem) -> Check:
        return GOOD if problem == QUEUE[0] else lost()

    judge_with(monkeypatch, judge)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    rows = rows_at(tmp_path)
    assert not engines.run(QUEUE, "cuda", rows, "here", None, early=False)
    assert [row["status"] for row in rows.rows] == ["ok", "error"]
    judge_with(monkeypatch, lambda problem: GOOD)
    resumed = rows_at(tmp_path, resume=True)
    assert engines.run(QUEUE, "cuda", resumed, "here", None, early=False)
    assert [row["status"] for row in resumed.rows] == ["ok", "error"] + ["ok"] * (len(QUEUE) - 2)


def test_a_problem_that_ends_its_process_gets_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(problem: Problem) -> Check:
        if problem == QUEUE[1]:
            raise KeyboardInterrupt
        return GOOD

    judge_with(monkeypatch, judge)
    with pytest.raises(KeyboardInterrupt):
        engines.run(QUEUE, "cpu", rows_at(tmp_path), "here", None, early=False)
    resumed = rows_at(tmp_path, resume=True)
    assert engines.run(QUEUE, "cpu", resumed, "here", None, early=False)
    keys = [tuple(row[name] for name in engines.KEY) for row in resumed.rows]
    assert sorted(keys) == sorted(tuple(problem.key.values()) for problem in QUEUE)
    assert [row["detail"] for row in resumed.rows if row["status"] == "error"] == ["the process ended in this problem"]


def test_no_problem_begins_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_with(monkeypatch, lambda problem: GOOD)
    rows = rows_at(tmp_path)
    assert engines.run(QUEUE, "cpu", rows, "here", -1.0, early=False) and not rows.rows


def test_what_was_not_reached_is_named() -> None:
    rows = [problem.key | {"status": "ok"} for problem in engines.first()]
    assert engines.unreached(rows, engines.first()) == []

    def refusing(*which: str) -> list[dict[str, str]]:
        return [row | {"status": "refused"} if (row["engine"], row["dtype"]) == which else row for row in rows]

    assert engines.unreached(refusing("resident", "fp32"), engines.first()) == []
    assert engines.unreached(refusing("resident", "bf16"), engines.first()) == ["resident bf16"]
    missed = [row for row in rows if not (row["engine"] == "step" and row["dtype"] == "fp64")]
    missed = [row for row in missed if (row["engine"], row["dtype"], row["cell"]) != ("local", "tf32", "gru")]
    assert engines.unreached(missed, engines.first()) == ["local tf32 (1 of 24 variants)", "step fp64"]


def test_the_next_batch_is_compiled_while_this_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def kernels(item: int) -> list[precompile.Kernel]:
        asked.append(item)
        return []

    yielded = precompile.ahead([0, 1, 2, 3, 4], kernels, batch=2, overlap=True)
    assert next(yielded) == 0 and asked == [0, 1, 2, 3]
    assert list(yielded) == [1, 2, 3, 4] and asked == [0, 1, 2, 3, 4]


def test_each_kernel_is_compiled_once_and_for_each_direction_of_time() -> None:
    plan = planned(small(dtype="bf16"))
    same = [(plan, "forward", True), (plan, "forward", True, False), precompile.Kernel(plan, "forward", True, True)]
    assert [kernel.reverse for kernel in precompile._distinct([0], lambda item: same)] == [False, True]


def test_inputs_are_the_same_every_time() -> None:
    problem = small(CellSpec("lstm"), dtype="bf16")
    first, second = draw(problem), draw(problem)
    assert list(first.arguments) == ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"]
    assert all(torch.equal(first.arguments[name], second.arguments[name]) for name in first.arguments)
    assert {tensor.dtype for tensor in first.arguments.values()} == {torch.bfloat16}
