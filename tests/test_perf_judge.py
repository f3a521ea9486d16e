"""The verdict on a case: numerics first, no time for ours that failed. What only a GPU runs, on a stand-in for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fake_cuda import FakeCuda, built, fail, rehearse, when
from lstm_triton.perf import environment, judge, numerics, sweep
from lstm_triton.perf.cases import DTYPES, MODES, Case, inputs
from torch import nn

from lstm_triton import launch
from lstm_triton.devices import device_named
from lstm_triton.planner import ENGINES

BOTH = ["ours", "torch"]
SMALL = Case("lstm", "fp32", "inference", 2, 8, 5)

Verdicts = dict[str, dict[str, object]]


def judged(case: Case, names: list[str], **options: object) -> Verdicts:
    return judge.Judge("cpu", 0.0, **options)(case, names)


@pytest.mark.parametrize("how", ["off", "nan"])
@pytest.mark.parametrize("mode", MODES)
def test_failed_numerics_give_no_time(how: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "build", built(ours=how))
    verdicts = judged(replace(SMALL, mode=mode), BOTH)
    assert verdicts["ours"]["status"] == "failed" and verdicts["ours"]["detail"]
    assert not {"median_ms", "us_per_step", "ratio", "saved_mib"} & verdicts["ours"].keys()
    assert verdicts["torch"]["status"] == "ok" and float(verdicts["torch"]["median_ms"]) > 0
    assert verdicts["torch"]["ratio"] == "1.000"


def test_others_out_of_tolerance_are_timed_and_do_not_fail_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "build", built(torch="off", loop="off"))
    verdicts = judged(SMALL, ["ours", "torch", "loop"])
    for name in ("torch", "loop"):
        assert verdicts[name]["status"] == "loose" and "allowed" in verdicts[name]["detail"]
        assert float(verdicts[name]["median_ms"]) > 0 and float(verdicts["ours"]["ratio"]) > 0
    rows = [{"provider": name, "status": str(verdict["status"])} for name, verdict in verdicts.items()]
    assert sweep.faults(rows) == []


@pytest.mark.parametrize("how", ["nan", "other"])
def test_another_layer_than_was_asked_for_is_not_timed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "build", built(loop=how))
    verdicts = judged(SMALL, ["torch", "loop"])
    assert verdicts["loop"]["status"] == "failed" and "median_ms" not in verdicts["loop"]


def test_provider_that_raises_leaves_the_other_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "build", built(ours="out of\nmemory"))
    verdicts = judged(replace(SMALL, cell="gru"), BOTH)
    assert verdicts["ours"]["status"] == "error" and verdicts["ours"]["detail"] == "RuntimeError: out of memory"
    assert "median_ms" not in verdicts["ours"] and verdicts["torch"]["status"] == "ok"


def test_refused_and_absent_are_rows_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashrnn", None)
    monkeypatch.setattr(judge, "build", built())
    verdicts = judged(SMALL, ["ours:local", "flashrnn", "torch"])
    assert verdicts["ours:local"]["status"] == "refused" and "GPU" in verdicts["ours:local"]["detail"]
    assert verdicts["flashrnn"]["status"] == "absent" and "flashrnn" in verdicts["flashrnn"]["detail"]
    assert verdicts["torch"]["status"] == "ok"


def test_auto_has_no_right_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def label(name: str, case: Case, device: str) -> str:
        raise ValueError("no engine can run it")

    monkeypatch.setattr(judge, "label", label)
    assert judged(SMALL, ["ours"])["ours"]["status"] == "error"


def test_reference_that_fails_is_everybodys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "oracle", lambda case: 1 / 0)
    verdicts = judged(SMALL, BOTH)
    assert {verdict["detail"] for verdict in verdicts.values()} == {"reference: ZeroDivisionError: division by zero"}


def test_modes_of_a_shape_share_weights_and_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(judge, "inputs", lambda case, device: drawn.append(case) or inputs(case, device))
    one = judge.Judge("cpu", 0.0)
    for case in (*(replace(SMALL, mode=mode) for mode in MODES), replace(SMALL, dtype="fp64")):
        assert one(case, ["torch"])["torch"]["status"] == "ok"
    assert [case.dtype for case in drawn] == ["fp32", "fp64"]


def test_numerics_run_where_a_timed_out_wait_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*arguments: object) -> Callable[[], dict[str, torch.Tensor]]:
        seen.append((torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()))
        return lambda: {"y": torch.ones(1)}

    monkeypatch.setattr(numerics, "runner", spy)
    numerics.check_layer(nn.Identity(), SMALL, torch.ones(1), torch.ones(1), {"y": torch.ones(1)})
    assert seen == [(True, False)] and not torch.is_anomaly_enabled()


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_memory_is_nan_in_every_dtype(dtype: str) -> None:
    with numerics.nan_in_new_memory():
        found = torch.empty(1000, dtype=DTYPES[dtype])
        others = [torch.empty_like(found), found.new_empty(7, 9)]
        assert all(tensor.isnan().all() for tensor in (found, *others))
        assert not torch.zeros(9, dtype=DTYPES[dtype]).any()
    assert not torch.are_deterministic_algorithms_enabled()


def test_layer_that_leaves_an_element_unwritten_is_found() -> None:
    class Forgetful(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.empty_like(x)
            y[1:] = x[1:]
            return y, x[-1:]

    x = torch.randn(5, 2, 8)
    for _ in range(2):  # the second finds the first one's memory
        check = numerics.check_layer(Forgetful(), SMALL, x, x, {"y": x, "h_n": x[-1:]})
        assert not check.passed and check.worst == "y"


def test_one_wrong_row_among_many_is_found() -> None:
    want = torch.randn(200, 17, 130)
    got = want.clone()
    got[7, 3, :5] += 1
    assert numerics.relative_error(got, want) < numerics.TOLERANCE["bf16"][0]
    check = numerics.compare({"y": got}, {"y": want}, "bf16")
    assert not check.passed and "one element is off" in check.detail
    noisy = want + torch.randn_like(want) * 0.9e-2
    assert numerics.compare({"y": noisy}, {"y": want}, "bf16").passed


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return rehearse(monkeypatch)


def on_gpu(case: Case = SMALL, names: list[str] = BOTH, graph: bool = True) -> Verdicts:
    return gpu_judge(graph)(case, names)


def gpu_judge(graph: bool = True) -> judge.Judge:
    return judge.Judge("cuda", 0.0, graph=graph, model=device_named("H200"))


@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_every_column_is_filled(mode: str, gpu: FakeCuda) -> None:
    verdicts = on_gpu(replace(SMALL, mode=mode))
    columns = set(sweep.FIELDS) - set(sweep.KEY) - set(environment.COLUMNS) - {"detail"}
    for name, verdict in verdicts.items():
        assert {column for column in columns if not verdict.get(column)} == set(), name
        assert set(verdict) <= set(sweep.FIELDS) and verdict["detail"] == ""
        assert verdict["median_ms"] == verdict["warm_p80_ms"] == verdict["graph_ms"] == "1.5000"
        assert verdict["clock_mhz"] == "1755" and verdict["plan"] == f"plan of {name}"
        assert verdict["constants"] == device_named("H200").constants and verdict["peak_mib"] == "0.00"
        assert float(verdict["to_floor"]) == pytest.approx(1.5e3 / float(verdict["floor_us"]) / SMALL.seq, rel=0.01)
        assert float(verdict["host_us"]) > 0 and (float(verdict["saved_mib"]) > 0) is (mode != "inference")


def test_without_graph_nothing_is_captured(gpu: FakeCuda) -> None:
    verdicts = on_gpu(graph=False)
    assert "capture" not in gpu.log and "graph_ms" not in verdicts["ours"] and verdicts["ours"]["warm_ms"]


def test_failed_capture_keeps_the_times_and_is_not_tried_again(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.ends_captures = False
    when(monkeypatch, "torch", lambda: gpu.streams[-1] == "capturing", fail)
    one = gpu_judge()
    verdicts = one(SMALL, BOTH)
    assert verdicts["torch"]["detail"] == "graph: RuntimeError: cannot" and verdicts["torch"]["status"] == "ok"
    assert verdicts["torch"]["median_ms"] and "graph_ms" not in verdicts["torch"]
    assert verdicts["ours"]["graph_ms"] and gpu.streams == ["default"]
    before = gpu.log.count("capture")
    assert "not tried again after RuntimeError: cannot" in one(SMALL, BOTH)["torch"]["detail"]
    assert gpu.log.count("capture") == before + 1


def test_memory_that_lacks_once_is_asked_for_again(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("full")

    when(monkeypatch, "ours", lambda: gpu.streams[-1] == "capturing" and "replay" not in gpu.log, full)
    one = gpu_judge()
    assert "full" in one(SMALL, ["ours"])["ours"]["detail"]
    gpu.log.append("replay")
    assert one(SMALL, ["ours"])["ours"]["graph_ms"]


def test_replay_with_wrong_results_has_no_time(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_of(layer: nn.Module, *arguments: object) -> Callable[[], dict[str, torch.Tensor]]:
        run = cases_runner(layer, *arguments)
        return lambda: {name: value * (2 if gpu.streams[-1] == "capturing" else 1) for name, value in run().items()}

    cases_runner = judge.runner
    monkeypatch.setattr(judge, "runner", run_of)
    verdicts = on_gpu()
    for name in BOTH:
        assert "replayed results are wrong" in verdicts[name]["detail"]
        assert "graph_ms" not in verdicts[name] and verdicts[name]["median_ms"]


def test_device_lost_in_numerics_leaves_the_others_for_later(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose() -> None:
        gpu.sound = False
        fail("illegal access")

    when(monkeypatch, "ours:step", lambda: True, lose)
    monkeypatch.setitem(sys.modules, "flashrnn", None)
    verdicts = on_gpu(names=["flashrnn", "ours", "ours:step", "torch"])
    assert verdicts.keys() == {"flashrnn", "ours:step"}
    assert verdicts["ours:step"]["lost"] is True and verdicts["ours:step"]["detail"] == "RuntimeError: illegal access"


def test_device_lost_in_timing_leaves_the_others_for_later(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose() -> None:
        gpu.sound = False
        fail("illegal access")

    when(monkeypatch, "ours", lambda: "event" in gpu.log, lose)
    verdicts = on_gpu()
    assert verdicts.keys() == {"ours"} and verdicts["ours"]["lost"] is True
    assert verdicts["ours"]["status"] == "error" and verdicts["ours"]["detail"].startswith("timing: ")


def test_device_lost_in_a_capture_keeps_all_times(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose() -> None:
        gpu.sound = False
        fail("illegal access")

    when(monkeypatch, "torch", lambda: gpu.streams[-1] == "capturing", lose)
    verdicts = on_gpu()
    assert all(verdict["median_ms"] for verdict in verdicts.values()) and verdicts.keys() == set(BOTH)
    assert verdicts["torch"]["lost"] is True and "lost" not in verdicts["ours"]


def test_run_that_raises_while_it_is_timed_leaves_the_others_their_times(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    when(monkeypatch, "torch", lambda: gpu.log.count("event") > 8, fail)
    verdicts = on_gpu()
    assert verdicts["torch"]["status"] == "error" and verdicts["torch"]["detail"] == "timing: RuntimeError: cannot"
    assert verdicts["ours"]["status"] == "ok" and verdicts["ours"]["median_ms"] and verdicts["ours"]["ratio"] == ""


def test_wait_that_ran_out_while_it_was_timed_takes_the_time_away(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "raise_timeout", lambda device: fail() if "event" in gpu.log else None)
    verdicts = on_gpu()
    assert verdicts["ours"]["status"] == "error" and "median_ms" not in verdicts["ours"]
    assert verdicts["torch"]["median_ms"]


def test_cost_that_cannot_be_had_is_noted_beside_the_times(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "host_us", lambda run, clock: fail())
    verdicts = on_gpu()
    assert verdicts["ours"]["detail"] == "host_us: RuntimeError: cannot" and verdicts["ours"]["status"] == "ok"
    assert "host_us" not in verdicts["ours"] and verdicts["ours"]["graph_ms"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_judge_fills_every_column(mode: str) -> None:
    """The same on a GPU itself: times, graphs, memory and floor of ours and torch.nn."""
    case = Case("lstm", "bf16", mode, 16, 256, 32)
    model = launch.device_of(torch.empty(0, device="cuda"))
    verdicts = judge.Judge("cuda", 0.02, graph=True, model=model)(case, ["ours", "torch", "loop"])
    for name, verdict in verdicts.items():
        assert verdict["status"] in (("ok",) if name == "ours" else ("ok", "loose")), verdict
        for column in ("median_ms", "warm_ms", "graph_ms", "floor_us", "to_floor", "host_us", "peak_mib", "saved_mib"):
            assert verdict.get(column), (name, column, verdict["detail"])
        assert (float(verdict["saved_mib"]) > 0) is (mode != "inference")
    assert verdicts["torch"]["plan"].startswith(("cuDNN", "ATen"))
    assert any(engine in verdicts["ours"]["plan"] for engine in ENGINES)
