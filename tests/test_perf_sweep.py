"""The sweep's rows: on disk one by one, resumed after a kill, never a time where the numerics failed."""

from __future__ import annotations

import argparse
import builtins
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lstm_triton.perf import environment, judge, numerics, providers, sweep, table, timing
from lstm_triton.perf.providers import Case, oracle

import lstm_triton

FOUND = dict.fromkeys(environment.COLUMNS, "recorded") | {"commit": "abc", "source": "123"}
CASES = [Case("lstm", "fp32", mode, batch, 8, 4) for batch in (1, 2, 3) for mode in ("fwd", "fwdbwd")]
BOTH = ["ours", "torch"]


class Judge:
    """Passes everything, and dies in the cases it is told to."""

    def __init__(self, *deadly: Case) -> None:
        self.deadly = deadly
        self.judged: list[Case] = []

    def __call__(self, case: Case, providers: list[str]) -> dict[str, dict[str, object]]:
        if case in self.deadly:
            raise KeyboardInterrupt
        self.judged.append(case)
        return {name: {"status": "ok", "median_ms": "1.0000"} for name in providers}


def rows_at(path: Path, resume: bool = True) -> table.Rows:
    return table.Rows(path / "sweep.csv", sweep.FIELDS, resume=resume)


def test_resume_after_a_kill_does_what_is_left_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep.run(CASES, BOTH, rows_at(tmp_path, resume=False), FOUND, Judge(CASES[2]))
    csv = tmp_path / "sweep.csv"
    assert len(csv.read_text().splitlines()) == 1 + 4
    csv.write_text(csv.read_text() + "lstm,fp32,fwd,1,Fal")  # a row that the kill cut short
    second = Judge()
    rows = rows_at(tmp_path)
    assert sweep.run(CASES, BOTH, rows, FOUND, second) == 0
    assert second.judged == CASES[2:]
    keys = [tuple(row[name] for name in sweep.KEY) for row in table.read(csv, sweep.FIELDS)]
    assert len(keys) == len(set(keys)) == 12
    third = Judge()
    sweep.run(CASES, BOTH, rows_at(tmp_path), FOUND, third)
    assert third.judged == []


def test_without_resume_it_starts_anew(tmp_path: Path) -> None:
    sweep.run(CASES, BOTH, rows_at(tmp_path, resume=False), FOUND, Judge())
    again = Judge()
    sweep.run(CASES[:1], BOTH, rows_at(tmp_path, resume=False), FOUND, again)
    assert again.judged == CASES[:1]
    assert len(table.read(tmp_path / "sweep.csv", sweep.FIELDS)) == 2


@pytest.mark.parametrize("changed", ["commit", "source", "device"])
def test_rows_of_other_code_or_another_device_do_not_count(changed: str, tmp_path: Path) -> None:
    sweep.run(CASES, BOTH, rows_at(tmp_path, resume=False), FOUND, Judge())
    again = Judge()
    rows = rows_at(tmp_path)
    other = FOUND | {changed: "other"}
    sweep.run(CASES, BOTH, rows, other, again)
    assert again.judged == CASES
    assert len(sweep.current(rows.rows, other)) == 12


def test_case_that_ends_the_process_twice_gets_a_row_and_is_left(tmp_path: Path) -> None:
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            sweep.run(CASES, BOTH, rows_at(tmp_path, resume), FOUND, Judge(CASES[1]))
    third = Judge(CASES[1])
    rows = rows_at(tmp_path)
    sweep.run(CASES, BOTH, rows, FOUND, third)
    assert third.judged == CASES[2:]
    ended = [row for row in rows.rows if row["status"] == "error"]
    assert [row["provider"] for row in ended] == BOTH and not any(row["median_ms"] for row in ended)


def test_lost_device_ends_the_sweep_after_its_row(tmp_path: Path) -> None:
    def lose(case: Case, providers: list[str]) -> dict[str, dict[str, object]]:
        return {name: {"status": "error", "detail": "illegal access", "lost": True} for name in providers}

    rows = rows_at(tmp_path, resume=False)
    with pytest.raises(sweep.DeviceLostError, match="illegal access"):
        sweep.run(CASES, BOTH, rows, FOUND, lose)
    assert len(rows.rows) == 2


def test_stops_before_a_case_that_would_not_end_in_time(tmp_path: Path) -> None:
    now = [0.0]

    def slow(case: Case, providers: list[str]) -> dict[str, dict[str, object]]:
        now[0] += 10
        return {name: {"status": "ok"} for name in providers}

    rows = rows_at(tmp_path, resume=False)
    assert sweep.run(CASES, BOTH, rows, FOUND, slow, deadline=35.0, clock=lambda: now[0]) == 3
    assert now[0] == 30.0


def test_cases_that_were_never_prepared_count_as_unreached(tmp_path: Path) -> None:
    rows = rows_at(tmp_path, resume=False)
    assert sweep.run(CASES, BOTH, rows, FOUND, Judge(), prepare=lambda todo: iter(todo[:2])) == len(CASES) - 2


def wrong_build(how: str):
    """A provider "ours" that is torch.nn with one weight changed."""

    def build(provider: str, case: Case, weights: dict[str, torch.Tensor], device: str) -> torch.nn.Module:
        layer = oracle(case)
        layer.load_state_dict(weights)
        if provider == "ours":
            with torch.no_grad():
                layer.weight_hh_l0[0, 0] = math.nan if how == "nan" else layer.weight_hh_l0[0, 0] + 0.1
        return layer

    return build


@pytest.mark.parametrize(("mode", "training"), [("fwd", False), ("fwdbwd", True)])
@pytest.mark.parametrize("provider", BOTH)
def test_inference_is_in_eval_mode(provider: str, mode: str, training: bool) -> None:
    case = Case("lstm", "fp32", mode, 2, 8, 5)
    assert providers.build(provider, case, oracle(case).state_dict(), "cpu").training is training


def test_torch_out_of_tolerance_is_timed_and_does_not_fail_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(provider: str, case: Case, weights: dict[str, torch.Tensor], device: str) -> torch.nn.Module:
        return wrong_build("off")("ours" if provider == "torch" else "torch", case, weights, device)

    monkeypatch.setattr(judge, "build", build)
    verdicts = judge.Judge("cpu", seconds=0.01)(Case("lstm", "fp32", "fwd", 2, 8, 5), BOTH)
    assert verdicts["torch"]["status"] == "loose" and "allowed" in verdicts["torch"]["detail"]
    assert float(verdicts["torch"]["median_ms"]) > 0 and float(verdicts["ours"]["ratio"]) > 0
    rows = [{"provider": name, "status": str(verdict["status"])} for name, verdict in verdicts.items()]
    assert sweep.faults(rows) == []
    assert sweep.faults([row | {"status": "failed"} for row in rows]) == [{"provider": "ours", "status": "failed"}]


def test_numerics_run_where_a_timed_out_wait_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*arguments: object) -> dict[str, torch.Tensor]:
        seen.append((torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()))
        return {"y": torch.ones(1)}

    monkeypatch.setattr(numerics, "call", spy)
    monkeypatch.setattr(numerics, "expected", numerics.expected.__wrapped__)
    numerics.check_engine(numerics.Problem("gru", "resident", "fp32", 2, 1, 4, 4), "cpu")
    assert len(seen) > 1 and set(seen) == {(True, False)}
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_poison_is_nan_in_every_dtype(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []

    def full(size: int, value: int, **options: object) -> None:
        blocks.append(torch.tensor([value] * 8, dtype=options["dtype"]))

    monkeypatch.setattr(torch, "full", lambda size, value, **options: full(size[0], value, **options))
    numerics.poison_free_memory("cuda")
    assert blocks and all(block.view(numerics.DTYPES[dtype]).isnan().all() for block in blocks)


def test_on_a_gpu_the_host_gets_ahead_before_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 1.5

    class Flush:
        def zero_(self) -> None:
            log.append("flush")

    cuda = SimpleNamespace(
        get_device_properties=lambda index: SimpleNamespace(L2_cache_size=1 << 20),
        Event=Event,
        _sleep=lambda clocks: log.append("sleep"),
        synchronize=lambda: log.append("synchronize"),
    )
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda, empty=lambda *_, **__: Flush(), int8=torch.int8))
    assert timing._cuda_timer()([lambda: log.append("a"), lambda: log.append("b")]) == [1.5, 1.5]
    once = ["flush", "sleep", "event", "a", "event"]
    assert log == [*once, *(name.replace("a", "b") if name == "a" else name for name in once), "synchronize"]


@pytest.mark.parametrize("how", ["off", "nan"])
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_failed_numerics_give_no_time(how: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "build", wrong_build(how))
    verdicts = judge.Judge("cpu", seconds=0.01)(Case("lstm", "fp32", mode, 2, 8, 5), BOTH)
    assert verdicts["ours"]["status"] == "failed" and verdicts["ours"]["detail"]
    assert not {"median_ms", "us_per_step", "ratio"} & verdicts["ours"].keys()
    assert verdicts["torch"]["status"] == "ok" and float(verdicts["torch"]["median_ms"]) > 0
    assert verdicts["torch"]["ratio"] == "1.000"


def test_provider_that_raises_leaves_the_other_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(provider: str, case: Case, weights: dict[str, torch.Tensor], device: str) -> torch.nn.Module:
        if provider == "ours":
            raise RuntimeError("out of\nmemory")
        return oracle(case)

    monkeypatch.setattr(judge, "build", build)
    verdicts = judge.Judge("cpu", seconds=0.01)(Case("gru", "fp32", "fwd", 2, 8, 5), BOTH)
    assert verdicts["ours"] == {"status": "error", "detail": "RuntimeError: out of memory"}
    assert verdicts["torch"]["status"] == "ok"


def test_telling_cases_are_distinct_and_begin_with_the_anchor_shapes() -> None:
    cases = sweep.telling()
    assert len(cases) == len(set(cases))
    shapes = ("B=16 H=1024 T=512", ("bf16", "fp16")), ("B=16 H=768 T=1024", ("fp16", "bf16"))
    assert [str(case) for case in cases[:8]] == [
        f"lstm {dtype} {mode} {shape}" for shape, dtypes in shapes for dtype in dtypes for mode in ("fwd", "fwdbwd")
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--cells", "lstm,tree"], "--cells: 'tree' is none of lstm, gru, rnn"),
        (["--batch", "1,x"], "--batch: expected positive integers"),
        (["--hidden", "0"], "--hidden: expected positive integers"),
        (["--providers", ""], "--providers: choose from ours, torch"),
    ],
)
def test_wrong_list_is_named(
    wrong: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    options = parser.parse_args(["--device", "cpu", "--out", str(tmp_path / "out"), *wrong])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setenv("TRITON_INTERPRET", "0")
        sweep.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name in names:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_markdown_with_and_without_tabulate_holds_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": "1.50", "b": "x"}, {"a": "22", "b": ""}]

    def cells(text: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "-" not in line]

    rich = table.markdown(rows, ("a", "b"))
    without(monkeypatch, "tabulate")
    assert cells(rich) == cells(table.markdown(rows, ("a", "b"))) == [["a", "b"], ["1.50", "x"], ["22", ""]]


def test_progress_without_tqdm_yields_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    without(monkeypatch, "tqdm")
    assert list(table.progress(range(20), 20, "sweep")) == list(range(20))
    assert capsys.readouterr().err.splitlines()[-1] == "sweep: 20 of 20"


def test_environment_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    found = environment.collect("cpu")
    assert set(environment.COLUMNS) <= found.keys()
    assert found["lstm_triton"] == lstm_triton.__version__
    assert found["torch"] == torch.__version__ and len(str(found["source"])) == 12
    environment.write(found, tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text()) == found
    assert str(Path.home()) not in (tmp_path / "environment.json").read_text()
    rows = rows_at(tmp_path, resume=False)
    sweep.run(CASES[:1], ["ours"], rows, found, Judge())
    assert all(rows.rows[0][name] == str(found[name]) for name in environment.COLUMNS)


def test_command_on_the_cpu(tmp_path: Path) -> None:
    """The whole command at one small size: its first line, its files, every engine in the interpreter."""
    command = [sys.executable, "-m", "lstm_triton.perf", "sweep", "--device", "cpu", "--cells", "gru", "--batch", "2"]
    command += ["--hidden", "16", "--seq", "8", "--seconds", "0.02", "--out", str(tmp_path)]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("CPU path: ATen against ATen") and "GPU speed" in first
    rows = table.read(tmp_path / "sweep.csv", sweep.FIELDS)
    assert [(row["mode"], row["provider"], row["status"]) for row in rows] == [
        (mode, provider, "ok") for mode in ("fwd", "fwdbwd") for provider in BOTH
    ]
    assert all(float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows)
    assert {"sweep.csv", "sweep.md", "environment.json"} == {path.name for path in tmp_path.iterdir()}
    for engine in ("local", "resident", "streamed", "step"):
        assert sum(line.startswith(f"| {engine}") and "| ok" in line for line in done.stdout.splitlines()) == 3
