"""Real kernels, compiled ahead of time and read: the table's rows, and that a broken order does not pass."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from lstm_triton.perf import baseline, precompile, resources, table
from lstm_triton.perf.ptx import ptx_order

from lstm_triton.devices import device_named
from lstm_triton.planner import LaunchPlan, make_plan
from lstm_triton.spec import CellSpec


def plan(cell: str = "rnn", engine: str = "resident", B: int = 16, H: int = 64, target: str = "sm_80") -> LaunchPlan:
    return make_plan(CellSpec(cell), 32, B, H, torch.bfloat16, device_named(target), engine=engine)


def options(**changes: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    resources.add_arguments(parser)
    return argparse.Namespace(**(vars(parser.parse_args([])) | changes))


@pytest.mark.native
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_inspect_reads_a_compiled_kernel(direction: str) -> None:
    from lstm_triton.launch import compile_ahead

    chosen = plan()
    compiled = compile_ahead(chosen, direction)
    row = resources.inspect(compiled, chosen, direction)
    assert row.problems == ""
    assert (row.target, row.cell, row.direction, row.dtype, row.hidden, row.batch) == (
        "A100", "rnn", direction, "bf16", 64, 16,
    )  # fmt: skip
    assert row.counted == "time step" and row.grid > 1 and row.ATOM == 1
    assert row.MMA > 0 and row.LDSM > 0 and row.BAR > 2 and row.LDG > 0 and row.STG > 0
    assert 0 < row.registers <= 255 and 0 < row.shared_bytes <= row.shared_plan
    kernel = getattr(chosen, direction)
    small = replace(chosen, device=replace(chosen.device, shared_per_program=row.shared_bytes - 1))
    assert "shared memory" in resources.inspect(compiled, small, direction).problems
    assert (row.block_b, row.block_h, row.warps) == (kernel.block_b, kernel.block_h, kernel.num_warps)


@pytest.mark.native
def test_local_kernel_waits_for_nobody() -> None:
    from lstm_triton.launch import compile_ahead

    chosen = plan(engine="local")
    row = resources.inspect(compile_ahead(chosen, "forward"), chosen, "forward")
    assert (row.ATOM, row.problems, row.counted) == (0, "", "time step")


@pytest.mark.native
def test_plans_that_share_a_kernel_share_its_row_but_for_what_is_their_own() -> None:
    jobs = [(plan("lstm", B=batch, target="sm_90"), "forward") for batch in (16, 64)]
    (group,) = resources.deduplicate(jobs).values()
    rows = resources.compile_group(group)
    assert [(row.batch, row.grid) for row in rows] == [(16, 8), (64, 32)]
    assert len({(row.registers, row.all, row.est_cycles) for row in rows}) == 1
    assert all(
        getattr(row, name) == getattr(resources.planned(*job), name)
        for row, job in zip(rows, jobs, strict=True)
        for name in (*baseline.KEY, *baseline.PLANNED)
    )


@pytest.mark.native
def test_inference_stores_less_than_training() -> None:
    rows = {}
    for direction in ("forward", "inference"):
        (groups,) = resources.deduplicate([(plan("lstm"), direction)]).values()
        (rows[direction],) = resources.compile_group(groups)
    assert 0 < rows["inference"].STG < rows["forward"].STG
    assert rows["inference"].problems == "" and rows["inference"].direction == "inference"


@pytest.mark.native
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_faults_planted_in_the_compiled_kernel_are_found(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lstm_triton.launch import compile_ahead

    compiled = compile_ahead(plan("lstm", "streamed"), direction)
    ptx, shared = compiled.asm["ptx"], resources.pointers(compiled, direction)
    assert len(shared[0]) == 1
    assert ptx_order(ptx, *shared) == []

    lines = ptx.splitlines()
    release = next(i for i, line in enumerate(lines) if ".release.add" in line)
    barrier = next(i for i in range(release, 0, -1) if "bar.sync" in lines[i])
    found = ptx_order("\n".join(lines[:barrier] + lines[barrier + 1 :]), *shared)
    assert any("barrier after the last store" in problem for problem in found)

    # what stands between the wait and the loads, all of it
    weak = "\n".join(line for i, line in enumerate(lines) if "bar.sync" not in line or i == barrier)
    assert any("barrier after the acquire" in problem for problem in ptx_order(weak, *shared))

    if direction == "forward":
        # the gates are read before the wait and written after it: right for a program's own, wrong for others' data
        monkeypatch.setitem(resources.PUBLISHED, "forward", ("gates_ptr", "h_ptr"))
        found = ptx_order(ptx, *resources.pointers(compiled, "forward"))
        assert any("load of gates_ptr, which is published, above the wait" in problem for problem in found)
        monkeypatch.undo()
        monkeypatch.setitem(resources.OWN, "forward", ("state_ptr",))
        (found,) = ptx_order(ptx, *resources.pointers(compiled, "forward"))
        assert found.startswith("gates_ptr is stored and loaded, and said to be neither")

    # the counter read without acquire is no wait at all
    assert ptx_order(ptx.replace(".acquire", ".relaxed"), *shared) == ["no acquire found"]


def test_kernels_that_differ_in_nothing_compiled_are_compiled_once() -> None:
    wanted = [(plan(B=batch), direction) for batch in (1, 4, 16) for direction in ("forward", "backward")]
    groups = resources.deduplicate(wanted)
    assert sorted(len(group) for group in groups.values()) == [3, 3]
    assert len(resources.deduplicate([*wanted, (plan(H=128), "forward")])) == 3
    assert len(resources.deduplicate([*wanted, (plan(target="sm_90"), "forward")])) == 3


def test_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        resources.plans(options(target="sm_12"))
    assert end.value.code == 2 and "--target: target must be one of" in capsys.readouterr().out


def test_impossible_plan_is_named_and_the_rest_goes_on() -> None:
    wanted, refused = resources.plans(
        options(target="A100", cells="lstm", dtype="bf16", hidden="64,4096", batch="16", engine="local")
    )
    assert {chosen.H for chosen, _ in wanted} == {64}
    assert len(refused) == 1 and "A100 lstm bf16 H=4096" in refused[0]


def test_command(tmp_path: Path) -> None:
    """From a process that interprets, too: the compiler runs in others."""
    command = [sys.executable, "-m", "lstm_triton.perf", "resources", "--target", "sm_90", "--cells", "gru"]
    command += ["--dtype", "fp16", "--hidden", "32", "--batch", "1,2", "--jobs", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kernels in the grid, 2 different ones" in done.stdout
    assert "4 kernels: 0 with problems, 0 not compiled" in done.stdout
    rows = table.read(tmp_path / "resources.csv", resources.COLUMNS)
    assert [(row["direction"], row["batch"]) for row in rows] == [(d, b) for d in ("backward", "forward") for b in "12"]
    lines = (tmp_path / "resources.md").read_text().splitlines()
    assert "no measurement" in lines[0] and lines[2].startswith("| target") and len(lines) == 4 + len(rows)
    assert "est_cycles" in lines[2] and "16x" in lines[4]
    assert baseline.read(tmp_path / "resources.csv").triton == triton.__version__


def test_ahead_yields_everything_in_order_whatever_cannot_be_planned() -> None:
    asked = []

    def kernels(item: int) -> list[precompile.Kernel]:
        asked.append(item)
        if item == 1:
            raise ValueError("no plan")
        return []

    yielded = precompile.ahead([0, 1, 2], kernels, batch=2)
    assert next(yielded) == 0 and asked == [0, 1]
    assert [*yielded] == [1, 2] and asked == [0, 1, 2]


def test_ahead_begins_no_batch_after_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(precompile, "time", SimpleNamespace(monotonic=lambda: now[0]))
    yielded = precompile.ahead([0, 1, 2, 3], lambda item: [], 2, deadline=5.0)
    assert next(yielded) == 0
    now[0] = 6.0
    assert list(yielded) == [1]


@pytest.mark.native
def test_ahead_compiles_into_triton_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    chosen = plan(engine="local")
    assert list(precompile.ahead([chosen], lambda item: [(item, "forward", False)], batch=1)) == [chosen]
    assert len(list(tmp_path.rglob("sequence_forward.cubin"))) == 1
