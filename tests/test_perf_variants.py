"""What options take beside the plain cell: the committed table, and what is compared with what."""

from __future__ import annotations

import argparse
import hashlib
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import triton
from lstm_triton.perf import baseline, resources, table, variants
from lstm_triton.perf.variants import LIMIT, Job, Variant

from lstm_triton import constexprs, launch
from lstm_triton.spec import ACTIVATIONS, GATES, OPTIONS, CellSpec

FOLDER = Path(__file__).parent.parent / "perf" / "results" / "resources"
COMMITTED = {
    tuple(row[name] for name in variants.KEY): row for row in table.read(FOLDER / "variants.csv", variants.COLUMNS)
}
JOBS = variants.jobs()


def key(job: Job) -> tuple[str, ...]:
    return tuple(variants.key(job).values())


def job(cell: str, name: str, direction: str = "backward", hidden: int = 512) -> Job:
    (found,) = (
        job
        for job in JOBS
        if (job.variant.spec.cell, job.variant.name, job.direction, job.hidden) == (cell, name, direction, hidden)
    )
    return found


@pytest.mark.both
def test_every_variant_has_a_row_and_every_row_a_variant() -> None:
    keys = [key(job) for job in JOBS]
    assert len(set(keys)) == len(keys)
    assert list(COMMITTED) == keys, baseline.RENEW
    assert re.search(r"^triton==(\S+)$", (FOLDER.parents[2] / "constraints.txt").read_text(), re.M)[1] == made_with()


def made_with() -> str:
    return baseline.read(FOLDER / "resources.csv").triton


@pytest.mark.both
def test_no_row_has_a_problem_and_every_large_one_says_why() -> None:
    for row in COMMITTED.values():
        assert (row["problems"], row["spill_bytes"]) == ("", "0"), row
        instructions = (int(row[f"{of}all"]) * int(row[f"{of}warps"]) for of in ("", "plain_"))
        more = (next(instructions) / next(instructions) - 1) * 100
        assert float(row["more"]) == pytest.approx(more, abs=0.051)
        assert bool(row["remark"]) == (float(row["more"]) > LIMIT), row
    shown = (FOLDER / "variants.md").read_text()
    assert shown == f"{variants.NOTE}\n\n{variants.markdown(list(COMMITTED.values()))}\n"


@pytest.mark.both
def test_what_is_next_to_nothing_stays_so() -> None:
    """Options with no reason to take more: a reason that is made up for one shows here."""
    free = {"coupled", "cell_clip", "zoneout, expectation", "recurrent dropout, shared mask", "activation=relu"}
    names = {job.variant.name for job in JOBS if not list(variants.reasons(job.variant, job.direction, "resident"))}
    assert free <= names
    for row in COMMITTED.values():
        if row["variant"] in free and (row["cell"], row["engine"]) != ("rnn", "local"):
            assert float(row["more"]) <= LIMIT, row


@pytest.mark.both
def test_every_option_is_there_alone() -> None:
    default = constexprs.options(CellSpec("lstm"), 0, False)
    for cell in GATES:
        found = list(variants.variants(cell, 64))
        assert len({variant.name for variant in found}) == len(found)
        assert {variant.spec.cell for variant in found} == {cell}
        assert {variant.spec.activation for variant in found} == set(ACTIVATIONS)
        assert {variant.masks for variant in found} == {0, 1, len(GATES[cell])}
        met = [constexprs.options(variant.spec, variant.masks, variant.random) for variant in found]
        assert {options.random for options in met} == {True, False}
        # and so is every flag of the kernels that some option of this cell sets
        of_options = [constexprs.options(spec, 0, False) for spec in OPTIONS if spec.cell == cell]
        plain = constexprs.options(CellSpec(cell), 0, False)
        for name in set(default._fields) - {"params", "dparams", "norm_row", "g", "output"}:
            if any(getattr(options, name) != getattr(plain, name) for options in of_options):
                assert any(getattr(options, name) != getattr(plain, name) for options in met), (cell, name)


@pytest.mark.both
def test_like_is_compared_with_like() -> None:
    for each in JOBS:
        with_option, plain = (getattr(plan, each.direction) for plan in variants.plans(each))
        assert (with_option.engine, with_option.block_b, with_option.block_h) == (
            plain.engine, plain.block_b, plain.block_h,
        )  # fmt: skip
        assert variants.plans(each)[1].spec == CellSpec(each.variant.spec.cell)
    assert {row["engine"] for row in COMMITTED.values()} == {"resident", "local"}


@pytest.mark.both
def test_an_option_that_cannot_run_there_is_compared_on_its_own_plan() -> None:
    """Two products in bf16 do not fit the registers where the plain cell has its tile."""
    wide = Job(Variant("projection", CellSpec("lstm", proj=512)), "forward", 1536, 64)
    with_option, plain = (plan.forward for plan in variants.plans(wide))
    assert (with_option.engine, with_option.block_b, with_option.block_h) == (
        plain.engine, plain.block_b, plain.block_h,
    )  # fmt: skip


def sample() -> list[Job]:
    """One kernel of each name, in an order that has nothing to do with the table's and is the same everywhere."""
    ordered = sorted(JOBS, key=lambda job: hashlib.sha256(" ".join(key(job)).encode()).hexdigest())
    return list({job.variant.name: job for job in ordered}.values())


@pytest.mark.native
@pytest.mark.skipif(triton.__version__ != made_with(), reason=f"the table is Triton {made_with()}'s")
@pytest.mark.parametrize("each", sample(), ids=lambda job: " ".join(key(job)[4:]))
def test_no_option_takes_more_than_it_did(each: Job) -> None:
    """Also that each kernel publishes and waits in order: else it would have a problem."""
    row = variants.measure(each)
    assert not isinstance(row, str), row
    assert row.problems == ""
    old, new = COMMITTED[key(each)], asdict(row)
    risen = [f"{name} {old[name]} -> {new[name]}" for name in baseline.HELD if new[name] > int(old[name])]
    assert not risen, f"{', '.join(risen)}. {baseline.RENEW}"
    assert bool(row.remark) == bool(old["remark"]), f"{old['more']} -> {row.more} % more. {baseline.RENEW}"


@pytest.mark.native
def test_a_kernel_that_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(launch, "compile_ahead", broken)
    variants._compiled.cache_clear()
    assert variants.measure(job("gru", "gate_clip")) == (
        "H100 bf16 512 64 gru gate_clip backward: RuntimeError: no such thing"
    )


@pytest.mark.both
def test_reasons_are_those_of_the_option() -> None:
    assert "4 products" in " ".join(variants.reasons(*job("lstm", "recurrent dropout, mask per gate")[:2], "resident"))
    assert "twice a step" in " ".join(variants.reasons(*job("lstm", "layer_norm")[:2], "resident"))
    assert "once a step" in " ".join(variants.reasons(*job("gru", "layer_norm")[:2], "streamed"))
    assert "wait" in " ".join(variants.reasons(*job("gru", "reset_after=False")[:2], "resident"))
    assert list(variants.reasons(*job("gru", "reset_after=False")[:2], "local")) == ["a second product"]
    assert "Philox" in " ".join(variants.reasons(*job("rnn", "zoneout, random")[:2], "local"))
    for cell, name in (("lstm", "coupled"), ("lstm", "cell_clip"), ("gru", "recurrent dropout, shared mask")):
        for direction in variants.DIRECTIONS:
            assert not list(variants.reasons(job(cell, name, direction).variant, direction, "resident"))


@pytest.mark.both
@pytest.mark.parametrize(("more", "remark", "status"), [(9.0, "", 0), (30.0, "Philox", 0), (30.0, "", 1)])
def test_a_large_row_without_a_reason_is_a_fault(
    more: float, remark: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = {name: 0 for name in variants.COLUMNS} | {"tiles": 1, "problems": ""}
    rows = {each: variants.Row(**(whole | variants.key(each) | {"more": more, "remark": remark})) for each in JOBS}
    monkeypatch.setattr(variants, "measure_all", lambda todo, processes: [(each, rows[each]) for each in todo])
    parser = argparse.ArgumentParser()
    resources.add_arguments(parser)
    assert resources.main(parser.parse_args(["--variants", "--out", str(tmp_path)])) == status
    assert ("UNEXPLAINED: gru gate_clip backward H=512: 30.0 %" in capsys.readouterr().out) == bool(status)
    assert [row["variant"] for row in table.read(tmp_path / "variants.csv", variants.COLUMNS)] == [
        each.variant.name for each in JOBS
    ]
    assert (tmp_path / "variants.md").read_text().startswith(variants.NOTE)
