"""The sweep's rows: on disk one by one, resumed after a kill, never a time where the numerics failed."""

from __future__ import annotations

import argparse
import builtins
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda, fail, rehearse, when
from lstm_triton.perf import environment, judge, presets, providers, sweep, table
from lstm_triton.perf.cases import MODES, Case, inputs
from lstm_triton.perf.engines import interpreted

import lstm_triton
from lstm_triton.devices import device_named

FOUND = dict.fromkeys(environment.COLUMNS, "recorded") | {"commit": "abc", "source": "123"}
TWO = ("inference", "forward+backward")
CASES = [Case("lstm", "fp32", mode, batch, 8, 4) for batch in (1, 2, 3) for mode in TWO]
BOTH = ["ours", "torch"]
SMALL = Case("lstm", "fp32", "inference", 2, 8, 5)

Verdicts = dict[str, dict[str, object]]


class KilledError(BaseException):
    """Stands for the end of the process."""


class Judge:
    """Passes everything, and dies in the cases it is told to."""

    def __init__(self, *deadly: Case) -> None:
        self.deadly = deadly
        self.judged: list[Case] = []
        self.asked: list[list[str]] = []

    def __call__(self, case: Case, providers: list[str]) -> Verdicts:
        if case in self.deadly:
            raise KilledError
        self.judged.append(case)
        self.asked.append(providers)
        return {name: {"status": "ok", "median_ms": "1.0000"} for name in providers}


def rows_at(path: Path, resume: bool = True) -> table.Rows:
    return table.Rows(path / "sweep.csv", sweep.FIELDS, resume=resume)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    return parser.parse_args(arguments)


def test_resume_after_a_kill_does_what_is_left_once(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        sweep.run(CASES, BOTH, rows_at(tmp_path, resume=False), FOUND, Judge(CASES[2]))
    csv = tmp_path / "sweep.csv"
    assert len(csv.read_text().splitlines()) == 1 + 4
    csv.write_text(csv.read_text() + "lstm,fp32,inference,1,Fal")  # a row that the kill cut short
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
        with pytest.raises(KilledError):
            sweep.run(CASES, BOTH, rows_at(tmp_path, resume), FOUND, Judge(CASES[1]))
    third = Judge(CASES[1])
    rows = rows_at(tmp_path)
    sweep.run(CASES, BOTH, rows, FOUND, third)
    assert third.judged == CASES[2:]
    ended = [row for row in rows.rows if row["status"] == "error"]
    assert [row["provider"] for row in ended] == BOTH and not any(row["median_ms"] for row in ended)


def test_lost_device_costs_one_row_and_the_rest_is_tried_again_beside_torch(tmp_path: Path) -> None:
    three = ["ours", "ours:step", "torch"]

    def lose(case: Case, names: list[str]) -> Verdicts:
        return {"ours:step": {"status": "error", "detail": "illegal access", "lost": True}}

    rows = rows_at(tmp_path, resume=False)
    with pytest.raises(sweep.DeviceLostError, match="illegal access"):
        sweep.run(CASES[:1], three, rows, FOUND, lose)
    assert [row["provider"] for row in rows.rows] == ["ours:step"]
    again = Judge()
    sweep.run(CASES[:1], three, rows_at(tmp_path), FOUND, again)
    assert again.asked == [["ours", "torch"]]
    # A provider that is new beside rows that are there is timed in turns with torch.nn, so torch.nn is timed anew.
    later = Judge()
    rows = rows_at(tmp_path)
    sweep.run(CASES[:1], [*three, "loop"], rows, FOUND, later)
    assert later.asked == [["torch", "loop"]]
    assert len(sweep.current(rows.rows, FOUND)) == 4


def test_stops_before_a_case_that_would_not_end_in_time(tmp_path: Path) -> None:
    now = [0.0]

    def slow(case: Case, providers: list[str]) -> Verdicts:
        now[0] += 10
        return {name: {"status": "ok"} for name in providers}

    rows = rows_at(tmp_path, resume=False)
    assert sweep.run(CASES, BOTH, rows, FOUND, slow, deadline=35.0, clock=lambda: now[0]) == 3
    assert now[0] == 30.0


def test_cases_that_were_never_prepared_count_as_unreached(tmp_path: Path) -> None:
    rows = rows_at(tmp_path, resume=False)
    assert sweep.run(CASES, BOTH, rows, FOUND, Judge(), prepare=lambda todo: iter(todo[:2])) == len(CASES) - 2


@pytest.mark.parametrize("status", ["failed", "error"])
def test_faults_are_ours_by_any_engine(status: str) -> None:
    rows = [{"provider": name, "status": status} for name in providers.PROVIDERS]
    assert [row["provider"] for row in sweep.faults(rows)] == [name for name in providers.PROVIDERS if "ours" in name]
    assert sweep.faults([{"provider": "ours:local", "status": "refused"}]) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--cells", "lstm,tree"], "--cells: 'tree' is none of lstm, gru, rnn"),
        (["--batch", "1,x"], "--batch: expected positive integers"),
        (["--hidden", "0"], "--hidden: expected positive integers"),
        (["--mode", "fwd"], "--mode: 'fwd' is none of inference, forward, forward+backward"),
        (["--providers", ""], "--providers: choose from ours, ours:local"),
        (["--providers", "ours,all"], "--providers: 'all' is none of ours"),
        (["--preset", "paper"], "--preset: 'paper' lists sizes of a GPU"),
        (["--seconds", "0"], "--seconds: expected a number above zero, got 0"),
        (["--minutes", "-1"], "--minutes: expected a number above zero, got -1"),
        (["--minutes", "nan"], "--minutes: expected a number above zero, got nan"),
        (["--device", "cuda"], "--device: 'cuda' needs a CUDA device"),
        (["--constants", "nowhere.json"], "--constants: "),
    ],
)
def test_wrong_usage_is_named(
    wrong: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit) as stopped:
        sweep.main(parsed("--device", "cpu", "--out", str(tmp_path / "out"), *wrong))
    assert stopped.value.code == 2 and message in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_all_providers_leaves_out_and_names_the_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "absence", lambda name: "no" if name in ("flashrnn", "gru-qat") else "")
    assert sweep.chosen("all") == [name for name in providers.PROVIDERS if name not in ("flashrnn", "gru-qat")]
    assert capsys.readouterr().out == "not importable here, so left out: flashrnn, gru-qat\n"
    assert sweep.chosen("flashrnn,ours") == ["flashrnn", "ours"]


def test_help_says_what_each_time_includes() -> None:
    text = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter)
    sweep.add_arguments(text)
    for name, provider in providers.PROVIDERS.items():
        assert f"{name}: {provider.includes}" in text.format_help()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return rehearse(monkeypatch)


@pytest.fixture
def gpu_machine(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """`main` on the stand-in; how it compiles ahead is kept."""
    kept: dict[str, object] = {}

    def ahead(todo: list[Case], kernels: object, batch: int, deadline: float) -> list[Case]:
        kept.update(todo=todo, deadline=deadline)
        return todo[:3]

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "collect", lambda device: FOUND | {"python": "3", "device": "H200"})
    monkeypatch.setattr(sweep, "ahead", ahead)
    monkeypatch.setattr(sweep, "_model", lambda device: device_named("H200"))
    monkeypatch.setattr(judge, "inputs", lambda case, device: inputs(replace(case, batch=2, seq=3), "cpu"))
    return kept


def test_quick_on_a_gpu(
    gpu_machine: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(presets, "HEAD", (("lstm", "fp32", 2, 8, 3), ("gru", "fp32", 2, 8, 3)))
    start = time.monotonic()
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: start))
    options = parsed("--preset", "quick", "--graph", "--seconds", "0.01", "--out", str(tmp_path))
    assert sweep.main(options) == 0
    assert gpu_machine["deadline"] == start + 4.25 * 60 and gpu_machine["todo"] == presets.quick()
    rows = table.read(tmp_path / "sweep.csv", sweep.FIELDS)
    assert len(rows) == 3 * 2 and all(row["status"] == "ok" and row["graph_ms"] for row in rows)
    out = capsys.readouterr().out
    assert "3 of 6 cases were not reached in time" in out and "CPU path" not in out
    text = (tmp_path / "sweep.md").read_text()
    assert providers.PROVIDERS["torch"].includes in text and "graph" in text.split("| case")[1].splitlines()[0]


def test_lost_device_ends_the_command_with_its_status(
    gpu_machine: dict[str, object], gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose() -> None:
        gpu.sound = False
        fail("illegal access")

    when(monkeypatch, "ours", lambda: True, lose)
    options = parsed("--cells", "rnn", "--hidden", "8", "--batch", "2", "--seq", "3", "--out", str(tmp_path))
    assert sweep.main(options) == sweep.DEVICE_LOST
    assert [row["provider"] for row in table.read(tmp_path / "sweep.csv", sweep.FIELDS)] == ["ours"]


def test_terminal_names_a_case_once_and_leaves_empty_columns_out() -> None:
    row = dict.fromkeys(sweep.FIELDS, "") | {name: str(value) for name, value in SMALL.key.items()}
    timed = {"status": "ok", "median_ms": "2.0000", "p20_ms": "1.9000", "p80_ms": "2.3000"}
    rows = [row | timed | {"provider": "ours"}, row | {"provider": "torch", "status": "error"}]
    both = row | {"layers": "2", "bidirectional": "True", "provider": "ours", "status": "ok"}
    head, _, first, second, third = sweep.terminal([*rows, both]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, first, second, third)]
    assert cells[0] == ["case", "provider", "status", "ms", "+-"]
    assert cells[1] == ["lstm fp32 inference B2 H8 T5", "ours", "ok", "2.0000", "10%"]
    assert cells[2] == ["", "torch", "error", "", ""]
    assert cells[3][0] == "lstm fp32 inference B2 H8 T5 L2 both"


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
    command += ["--providers", "ours,torch,loop", "--preset", "quick"]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("CPU path: ATen against ATen") and "GPU speed" in first and "stay empty" in first
    rows = table.read(tmp_path / "sweep.csv", sweep.FIELDS)
    assert [(row["mode"], row["provider"], row["status"]) for row in rows] == [
        (mode, provider, "ok") for mode in MODES for provider in ("ours", "torch", "loop")
    ]
    assert all(float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows)
    for column in ("warm_ms", "graph_ms", "floor_us", "host_us", "peak_mib", "clock_mhz", "constants"):
        assert {row[column] for row in rows} == {""}
    assert {"sweep.csv", "sweep.md", "environment.json"} == {path.name for path in tmp_path.iterdir()}
    for engine in ("local", "resident", "streamed", "step"):
        shown = sum(line.startswith(f"| {engine}") and "| ok" in line for line in done.stdout.splitlines())
        assert shown == sum(problem.engine == engine for problem in interpreted())


def test_interrupted_case_is_not_at_fault(tmp_path: Path) -> None:
    def interrupted(case: Case, providers: list[str]) -> Verdicts:
        raise KeyboardInterrupt

    for resume in (False, True, True):
        with pytest.raises(KeyboardInterrupt):
            sweep.run(CASES[:1], BOTH, rows_at(tmp_path, resume), FOUND, interrupted)
    again = Judge()
    sweep.run(CASES[:1], BOTH, rows_at(tmp_path), FOUND, again)
    assert again.judged == CASES[:1]


def test_resume_onto_other_columns_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.csv").write_text("a,b\n1,2\n")
    options = parsed("--device", "cpu", "--out", str(tmp_path), "--resume")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setenv("TRITON_INTERPRET", "0")
        sweep.main(options)
    assert stopped.value.code == 2 and "other columns" in capsys.readouterr().out
    assert (tmp_path / "sweep.csv").read_text() == "a,b\n1,2\n"


def test_kill_while_the_old_rows_are_written_back_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.run(CASES, BOTH, rows_at(tmp_path, resume=False), FOUND, Judge())
    before = (tmp_path / "sweep.csv").read_text()

    def killed(descriptor: int) -> None:
        raise KilledError

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KilledError):
        rows_at(tmp_path)
    assert (tmp_path / "sweep.csv").read_text() == before
