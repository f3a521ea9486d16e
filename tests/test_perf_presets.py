"""Which cases a sweep goes through: presets hold what they say, options narrow them or span a grid."""

from __future__ import annotations

import argparse

import pytest
from lstm_triton.perf import presets, sweep
from lstm_triton.perf.cases import DTYPES, MODES

TWO = ("inference", "forward+backward")


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    return parser.parse_args(arguments)


def test_telling_cases_are_distinct_and_begin_with_the_anchor_shapes() -> None:
    cases = presets.telling()
    assert len(cases) == len(set(cases)) and cases[: len(presets.quick())] == presets.quick()
    shapes = ("B=16 H=1024 T=512", ("bf16", "fp16")), ("B=16 H=768 T=1024", ("fp16", "bf16"))
    assert [str(case) for case in cases[:8]] == [
        f"lstm {dtype} {mode} {shape}" for shape, dtypes in shapes for dtype in dtypes for mode in TWO
    ]
    assert {case.mode for case in presets.quick()} == set(MODES)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_made_of_sound_cases(name: str) -> None:
    cases = presets.PRESETS[name].cases()
    assert len(cases) == len(set(cases)) > 10
    for case in cases:
        assert case.cell in presets.CELLS and case.dtype in DTYPES and case.mode in MODES
        assert min(case.batch, case.hidden, case.seq, case.layers) > 0 and isinstance(case.bidirectional, bool)


def test_paper_holds_the_published_shapes() -> None:
    found = {(c.cell, c.dtype, c.batch, c.hidden, c.seq) for c in presets.paper() if c.mode == "forward+backward"}
    chart = {("lstm", dtype, 16, 768, 1024) for dtype in ("fp16", "bf16")}
    assert chart | {("gru", "fp32", 32, 512, 64)} <= found
    assert any(c.batch == 8000 and c.hidden == 256 for c in presets.paper())
    assert any(c.cell == "rnn" and c.batch == 4 for c in presets.paper())


def test_options_span_a_grid_and_narrow_a_preset() -> None:
    wide = presets.cases(parsed("--hidden", "300", "--cells", "gru", "--mode", "forward"), "cuda")
    assert {(c.cell, c.hidden, c.mode) for c in wide} == {("gru", 300, "forward")} and len(wide) == 3 * 2
    assert presets.cases(parsed("--preset", "default"), "cuda") == presets.cases(parsed(), "cuda")
    narrow = presets.cases(parsed("--preset", "telling", "--cells", "gru", "--dtype", "fp16,tf32"), "cuda")
    assert narrow == [c for c in presets.telling() if c.cell == "gru" and c.dtype in ("fp16", "tf32")]
    both = presets.cases(parsed("--preset", "quick", "--bidirectional", "yes"), "cuda")
    assert both and all(c.bidirectional for c in both)
    small = presets.cases(parsed("--preset", "quick", "--hidden", "32"), "cpu")
    assert small == presets.cases(parsed("--hidden", "32"), "cpu") and {c.hidden for c in small} == {32}


def test_options_that_leave_nothing_of_a_preset_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        presets.cases(parsed("--preset", "quick", "--hidden", "300", "--cells", "gru"), "cuda")
    assert stopped.value.code == 2
    assert "--preset: 'quick' has no case with --cells gru --hidden 300" in capsys.readouterr().out
