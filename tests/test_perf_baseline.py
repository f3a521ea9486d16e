"""The committed table of resources, held: barriers, registers, spills and shared memory of every plan's kernels.

Every plan is compared; those that changed are compiled, and of the others a sample that meets every target, cell,
direction, dtype, engine and size. `make resources` renews the table.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import triton
from lstm_triton.perf import baseline, environment, resources, table

from lstm_triton.devices import device_named
from lstm_triton.planner import make_plan
from lstm_triton.spec import CellSpec

ROOT = Path(__file__).parent.parent
COMMITTED = baseline.read(ROOT / "perf" / "results" / "resources" / "resources.csv")
Group = list[resources.Job]


def options(**changes: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    resources.add_arguments(parser)
    return argparse.Namespace(**(vars(parser.parse_args([])) | changes))


def planned(job: resources.Job) -> dict[str, object]:
    return asdict(resources.planned(*job))


JOBS = resources.plans(options())[0]


def features(job: resources.Job) -> set[tuple[object, ...]]:
    """What a sample must meet, of one row."""
    row = planned(job)
    of = {name: row[name] for name in ("target", "cell", "direction", "dtype", "engine", "hidden", "batch")}
    on_each_target = [("cell", "engine"), ("dtype", "engine")]
    on_some = [("cell", "dtype"), ("hidden", "engine"), ("batch", "engine")]
    pairs = [("target", *pair) for pair in on_each_target] + on_some
    return {(of["direction"], *pair, *(of[name] for name in pair)) for pair in pairs}


def chosen(held: baseline.Baseline, jobs: Group) -> list[Group]:
    """Kernels to compile: all with a row whose plan changed, and of the others enough to meet every feature."""
    groups = list(resources.deduplicate(job for job in jobs if baseline.key(planned(job)) in held.rows).values())
    changed = [group for group in groups if any(held.replanned(planned(job)) for job in group)]
    # in an order that has nothing to do with the grid's, and is the same in every process
    same = [group for group in groups if group not in changed]
    same.sort(key=lambda group: hashlib.sha256(" ".join(baseline.key(planned(group[0]))).encode()).hexdigest())
    sample, met = [], set()
    for group in same:
        new = set().union(*map(features, group)) - met
        if new:
            sample.append(group)
            met |= new
    return changed + sample


def hold(held: baseline.Baseline, group: Group) -> None:
    """Compile one kernel; AssertionError if it has a problem or a row got worse, a warning if one got better."""
    rows = resources.compile_group(group)
    assert not isinstance(rows, str), rows
    assert {row.problems for row in rows} == {""}
    found = held.compare([asdict(row) for row in rows])
    assert not found.worse, "\n".join([*found.worse, baseline.RENEW])
    for line in found.better:
        warnings.warn(f"better than the baseline: {line}. {baseline.RENEW}", stacklevel=2)


def name(group: Group) -> str:
    return "-".join(baseline.key(planned(group[0])))


SAME_COMPILER = triton.__version__ == COMMITTED.triton
CHOSEN = chosen(COMMITTED, JOBS) if SAME_COMPILER else []


needs_its_compiler = pytest.mark.skipif(
    not SAME_COMPILER, reason=f"the baseline is Triton {COMMITTED.triton}'s, this is {triton.__version__}"
)


@pytest.mark.native
@needs_its_compiler
@pytest.mark.parametrize("group", CHOSEN, ids=name)
def test_no_kernel_takes_more_than_it_did(group: Group) -> None:
    hold(COMMITTED, group)


@pytest.mark.both
def test_every_plan_has_a_row_and_every_row_a_plan() -> None:
    wanted = [baseline.key(planned(job)) for job in JOBS]
    assert len(set(wanted)) == len(wanted)
    assert set(wanted) == set(COMMITTED.rows), baseline.RENEW


@pytest.mark.both
def test_the_baseline_is_of_the_compiler_that_the_suite_runs_with() -> None:
    """So that the comparison cannot be skipped unseen: whoever moves Triton renews the table."""
    assert re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1] == COMMITTED.triton


@pytest.mark.both
def test_no_row_of_the_baseline_has_a_problem() -> None:
    assert {row["problems"] for row in COMMITTED.rows.values()} == {""}
    assert {row["spill_bytes"] for row in COMMITTED.rows.values()} == {"0"}
    assert {row["OTHER"] for row in COMMITTED.rows.values()} == {"0"}


@pytest.mark.native
@needs_its_compiler
def test_the_sample_meets_everything() -> None:
    in_sample = [job for group in CHOSEN for job in group]
    assert set().union(*map(features, in_sample)) == set().union(*map(features, JOBS))
    for column in ("target", "cell", "direction", "dtype", "engine", "hidden", "batch"):
        assert {planned(job)[column] for job in in_sample} == {planned(job)[column] for job in JOBS}


# What a small table, made here, says of kernels that changed.


@pytest.fixture(scope="module")
def job() -> resources.Job:
    plan = make_plan(CellSpec("rnn"), resources.SEQ, 16, 64, torch.bfloat16, device_named("A100"))
    return plan, "forward"


@pytest.fixture(scope="module")
def small(job: resources.Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of one kernel."""
    folder = tmp_path_factory.mktemp("resources")
    table.Rows(folder / "resources.csv", resources.COLUMNS).add(*map(asdict, resources.compile_group([job])))
    environment.write(baseline.compiler(), folder)
    return folder / "resources.csv"


def doctored(path: Path, folder: Path, **changes: object) -> Path:
    """The table with some columns changed: a number is added."""
    (row,) = csv.DictReader(path.read_text().splitlines())
    for column, change in changes.items():
        row[column] = str(int(row[column]) + change) if isinstance(change, int) else str(change)
    table.Rows(folder / "resources.csv", resources.COLUMNS).add(row)
    environment.write(json.loads(path.with_name(baseline.BESIDE).read_text()), folder)
    return folder / "resources.csv"


@pytest.mark.native
@pytest.mark.parametrize(("column", "by"), [("BAR", 1), ("registers", 8), ("shared_bytes", 1024)])
def test_rise_is_found(column: str, by: int, job: resources.Job, small: Path, tmp_path: Path) -> None:
    hold(baseline.read(small), [job])
    with pytest.raises(AssertionError, match=rf"A100 rnn forward bf16 64 16: {column} \d+ -> \d+\n.*renew"):
        hold(baseline.read(doctored(small, tmp_path, **{column: -by})), [job])


@pytest.mark.native
def test_fall_passes_with_a_note(job: resources.Job, small: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"better than the baseline: .*BAR \d+ -> \d+\. .*renew"):
        hold(baseline.read(doctored(small, tmp_path, BAR=1)), [job])


@pytest.mark.native
def test_changed_plan_is_compiled_whatever_the_sample(job: resources.Job, small: Path, tmp_path: Path) -> None:
    other = replace(job[0], forward=replace(job[0].forward, num_warps=8))
    same, changed = baseline.read(small), baseline.read(doctored(small, tmp_path, warps=4, shared_bytes=-64))
    assert same.replanned(planned((other, "forward"))) and not same.replanned(planned(job))
    assert chosen(changed, [job]) == [[job]]
    with pytest.raises(AssertionError, match=r"shared_bytes \d+ -> \d+ \(plan \S+ 16x\d+ K .* 8 warps -> .* 4 warps\)"):
        hold(changed, [job])


def test_spill_is_worse_whatever_else_got_better() -> None:
    key = next(iter(COMMITTED.rows))
    before = COMMITTED.rows[key]
    now = before | {"spill_bytes": "8", "registers": str(int(before["registers"]) - 1)}
    found = COMMITTED.compare([now])
    assert len(found.worse) == 1 and "spill_bytes 0 -> 8" in found.worse[0] and not found.better
    assert COMMITTED.compare([before]).worse == COMMITTED.compare([before]).better == []
    assert COMMITTED.compare([before | {"hidden": "3"}]).unknown == [" ".join(key).replace(f" {key[4]} ", " 3 ", 1)]


@pytest.mark.native
def test_command(job: resources.Job, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1 and the row where something rose, status 0 and a note where it fell."""
    asked = {"target": "A100", "cells": "rnn", "dtype": "bf16", "hidden": "64", "batch": "16", "direction": "forward"}
    worse = doctored(small, tmp_path, BAR=-1)
    assert resources.main(options(**asked, jobs=1, out=tmp_path / "out", baseline=worse)) == 1
    said = capsys.readouterr().out
    assert (
        re.search(r"^WORSE: A100 rnn forward bf16 64 16: BAR \d+ -> \d+$", said, re.M) and "1 worse, 0 better" in said
    )

    better = doctored(small, tmp_path, BAR=1)
    (tmp_path / baseline.BESIDE).write_text('{"triton": "3.0.0"}')
    assert resources.main(options(**asked, jobs=1, out=tmp_path, baseline=better)) == 0  # onto itself
    said = capsys.readouterr().out
    assert "0 worse, 1 better" in said and "renew the baseline" in said and "made with Triton 3.0.0" in said
    assert baseline.read(tmp_path / "resources.csv").rows == baseline.read(small).rows


@pytest.mark.parametrize(
    ("text", "beside", "problem"),
    [
        ("target,cell\nA100,rnn\n", "{}", "lacks the columns direction, dtype"),
        (",".join(resources.COLUMNS) + "\n", "{}", "has no rows"),
        (",".join(resources.COLUMNS) + "\n" + "1," * (len(resources.COLUMNS) - 1) + "\n", "{}", "which triton"),
    ],
)
def test_what_is_no_baseline_is_refused(
    text: str, beside: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "resources.csv").write_text(text)
    (tmp_path / baseline.BESIDE).write_text(beside)
    with pytest.raises(SystemExit) as end:
        resources.main(options(baseline=tmp_path / "resources.csv", out=tmp_path / "out"))
    assert end.value.code == 2 and problem in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_missing_baseline_and_other_engines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, problem in (
        ({"baseline": tmp_path / "none.csv"}, "No such file"),
        ({"baseline": tmp_path / "none.csv", "engine": "local"}, "expected auto beside --baseline"),
    ):
        with pytest.raises(SystemExit) as end:
            resources.main(options(**changes, out=tmp_path))
        assert end.value.code == 2 and problem in capsys.readouterr().out
