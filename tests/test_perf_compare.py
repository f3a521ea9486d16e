"""Two sweeps held against each other: what counts as a regression, what does not, and what is said about the rest."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from lstm_triton.perf import compare, frames, sweep
from lstm_triton.perf.__main__ import main

MADE_UP = Path(__file__).parent / "data" / "made_up_sweep.csv"

Rows = list[dict[str, object]]


def row(provider: str = "ours", ms: float | None = 1.0, spread: float = 0.0, **more: object) -> dict[str, object]:
    """A row of a sweep: `spread` is how far the percentiles lie from the median, relative to it."""
    found: dict[str, object] = dict.fromkeys(sweep.FIELDS, "")
    case = ("lstm", "bf16", "inference", 1, False, 16, 512, 256, provider, "ok")
    found |= dict(zip((*sweep.KEY, "status"), case, strict=True)) | {"device": "made-up GPU", "torch": "1"}
    if ms is not None:
        found |= {"median_ms": ms, "p20_ms": ms * (1 - spread), "p80_ms": ms * (1 + spread)}
    return found | more


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sweep.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Compares two lists of rows; the exit status and what was printed."""

    def run(old: Rows, new: Rows, *options: str) -> tuple[int, str]:
        files = [str(write(tmp_path / name, *rows)) for name, rows in (("old.csv", old), ("new.csv", new))]
        return main(["compare", *files, *options]), capsys.readouterr().out

    return run


def test_reads_what_the_sweep_writes() -> None:
    assert frames.KEY == sweep.KEY
    assert {*frames.REQUIRED, *frames.NUMBERS, *frames.TEXT} == set(sweep.FIELDS)
    assert MADE_UP.read_text().splitlines()[0] == ",".join(sweep.FIELDS)
    assert set(compare.COMPARED) <= set(sweep.FIELDS)


@pytest.mark.parametrize(
    ("ms", "spread", "options", "expected", "verdict"),
    [
        (1.2, 0.01, [], 1, "worse"),  # beyond the threshold, percentiles apart
        (1.2, 0.15, [], 0, ""),  # 1.02 to 1.38 meets 0.85 to 1.15
        (1.04, 0.001, [], 0, ""),  # within the threshold
        (1.04, 0.001, ["--threshold", "3"], 1, "worse"),
        (1.2, 0.01, ["--threshold", "25"], 0, ""),
        (0.8, 0.01, [], 0, "better"),
        (0.8, 0.15, [], 0, ""),
        (1.0, 0.0, [], 0, ""),
    ],
)
def test_a_regression_is_beyond_threshold_and_spread(status, ms, spread, options, expected, verdict) -> None:
    found, out = status([row(ms=1.0, spread=spread)], [row(ms=ms, spread=spread)], *options)
    assert found == expected
    assert f"{expected} regression{'s' * (expected != 1)} of ours in median_ms" in out
    listed = [line for line in out.splitlines() if line.startswith("| ours lstm")]
    assert [line.split("|")[5].strip() for line in listed] == [verdict] * bool(verdict)


def test_without_percentiles_the_threshold_decides(status) -> None:
    bare = {"p20_ms": "", "p80_ms": ""}
    assert status([row(**bare)], [row(ms=1.06, **bare)])[0] == 1
    assert status([row(**bare)], [row(ms=1.04, **bare)])[0] == 0
    assert status([row(peak_mib=10)], [row(ms=9, peak_mib=10.4)], "--column", "peak_mib")[0] == 0
    assert status([row(peak_mib=10)], [row(ms=9, peak_mib=10.6)], "--column", "peak_mib")[0] == 1
    assert status([row(saved_mib=0)], [row(saved_mib=0)], "--column", "saved_mib")[0] == 0
    assert status([row(saved_mib=0)], [row(saved_mib=1)], "--column", "saved_mib")[0] == 1


def test_columns_have_their_own_percentiles(status) -> None:
    warm = {"warm_ms": 1.0, "warm_p20_ms": 0.99, "warm_p80_ms": 1.01}
    slower = {"warm_ms": 1.2, "warm_p20_ms": 1.19, "warm_p80_ms": 1.21}
    assert status([row(**warm)], [row(**slower)])[0] == 0  # the cold times are alike
    assert status([row(**warm)], [row(**slower)], "--column", "warm_ms")[0] == 1
    assert status([row(**warm)], [row(**slower | {"warm_p20_ms": 1.0})], "--column", "warm_ms")[0] == 0


def test_of_a_ratio_less_is_worse(status) -> None:
    assert status([row(ratio=2.0)], [row(ratio=1.8)], "--column", "ratio")[0] == 1
    found, out = status([row(ratio=2.0)], [row(ratio=2.2)], "--column", "ratio")
    assert found == 0
    assert "better" in out


@pytest.mark.parametrize("broken", ["failed", "error", "refused"])
def test_a_case_that_broke_is_a_regression(status, broken: str) -> None:
    bad = row(ms=None, status=broken, detail="made up: no launch")
    found, out = status([row()], [bad])  # although no time is left to compare
    assert found == 1
    assert f"| {broken}" in out and "broken" in out and "made up: no launch" in out
    found, out = status([bad, row(seq=2)], [row(), row(seq=2)])
    assert found == 0
    assert "mended" in out
    assert status([bad, row(seq=2)], [bad, row(seq=2)])[0] == 0


def test_cells_without_a_counterpart_are_named(status) -> None:
    found, out = status([row(), row(hidden=1024)], [row(), row(layers=2, bidirectional=True)])
    assert found == 0
    assert "1 cells vanished:\n  ours lstm bf16 inference B=16 H=1024 T=256" in out
    assert "1 cells new:\n  ours lstm, 2 layers, both directions bf16 inference B=16 H=512 T=256" in out


def test_a_value_that_is_no_longer_there_is_named(status) -> None:
    old = [row(graph_ms=1), row(seq=2, graph_ms=1)]
    new = [row(graph_ms=1), row(seq=2, detail="made up: not captured")]
    found, out = status(old, new, "--column", "graph_ms")
    assert found == 0
    assert "no value" in out and "made up: not captured" in out


def test_only_ours_decides_unless_others_are_named(status) -> None:
    old, new = [row(), row("torch")], [row(), row("torch", ms=2.0)]
    found, out = status(old, new)
    assert found == 0
    assert "torch moved by +100.0 % (geometric mean)" in out
    assert "| torch lstm bf16" in out
    assert status(old, new, "--providers", "torch")[0] == 1
    assert status([row("ours:step")], [row("ours:step", ms=2.0)])[0] == 1


def test_means_by_provider_and_against_torch(status) -> None:
    sizes = (256, 512)
    old = [row(provider, hidden=size) for provider in ("ours", "torch") for size in sizes]
    new = [
        row(provider, ms, hidden=size)
        for provider, times in (("ours", (2, 8)), ("torch", (2, 2)))
        for size, ms in zip(sizes, times, strict=True)
    ]
    _, out = status(old, new)
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in out.splitlines()
        if line.startswith("|")
    }
    assert lines["ours"] == ["2", "+300.0 %", "+100.0 %"]  # sqrt(2 * 8) = 4; 4 / 2 = 2
    assert lines["torch"] == ["2", "+100.0 %", "+0.0 %"]
    assert lines["all"] == ["4", "+182.8 %", "+41.4 %"]  # (2 * 8 * 2 * 2) ** (1 / 4) = sqrt(8)


def test_worst_comes_first(status) -> None:
    factors = {1: 1.5, 2: 3.0, 4: 0.5, 8: 1.2}
    _, out = status([row(batch=b) for b in factors], [row(batch=b, ms=ms) for b, ms in factors.items()])
    listed = [line.split("B=")[1].split()[0] for line in out.splitlines() if line.startswith("| ours lstm")]
    assert listed == ["2", "1", "8", "4"]


def test_differences_of_the_environments_come_first(status) -> None:
    _, out = status([row()], [row(torch="2", driver="made up")])
    assert out.index("torch differs: 1 -> 2") < out.index("mean change")
    assert "driver differs: not recorded -> made up" in out and "WARNING" not in out
    _, out = status([row()], [row(device="another made-up GPU")])
    assert "WARNING: DIFFERENT DEVICES, made-up GPU and another made-up GPU" in out
    _, out = status([row()], [row(date="2000-01-02")])
    assert "Same device, driver, versions and sources." in out


def test_markdown_holds_the_unchanged_cells_too(status, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "compare.md"
    _, out = status([row(), row(seq=2)], [row(), row(seq=2, ms=2.0)], "--markdown", str(target))
    assert "T=256" not in out and "T=2" in out
    assert "T=256" in target.read_text() and "1 regression of ours" in target.read_text()


def test_bad_usage_ends_with_2_and_says_why(status, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.csv", row())
    other = tmp_path / "other.csv"
    other.write_text("target,cell\nA100,lstm\n")
    words = tmp_path / "words.csv"
    write(words, row(median_ms="fast"))
    two = write(tmp_path / "two.csv", row(), row(device="another made-up GPU"))
    nothing = tmp_path / "nothing.csv"
    nothing.touch()
    for bad, reason in (
        (tmp_path / "absent.csv", "does not exist"),
        (tmp_path, "sweep.csv does not exist"),
        (other, "lacks the columns dtype, mode"),
        (words, "column median_ms: expected numbers"),
        (two, "several devices (made-up GPU, another made-up GPU)"),
        (nothing, "expected a sweep's CSV"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["compare", str(good), str(bad)])
        said = capsys.readouterr()
        assert ended.value.code == 2
        assert str(bad) in said.out + said.err and reason in said.out + said.err
    for options, reason in (
        (["--column", "rounds"], "--column"),
        (["--column", "graph_ms"], "no cell has a graph_ms in both"),
        (["--threshold", "-1"], "--threshold: expected percent, zero or more, got -1"),
        (["--providers", "torch"], "--providers"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["compare", str(good), str(good), *options])
        said = capsys.readouterr()
        assert ended.value.code == 2
        assert reason in said.out + said.err
    with pytest.raises(SystemExit) as ended:
        status([row("torch")], [row("torch")])
    assert ended.value.code == 2


def test_folders_and_the_command_line(tmp_path: Path) -> None:
    old, new = (write(tmp_path / name / "sweep.csv", row(ms=ms)) for name, ms in (("a", 1.0), ("b", 2.0)))
    command = [sys.executable, "-m", "lstm_triton.perf", "compare"]
    done = subprocess.run([*command, str(old.parent), str(new.parent)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "+100.0 %" in done.stdout
    assert main(["compare", str(new.parent), str(old)]) == 0


def test_a_file_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(MADE_UP), str(MADE_UP)]) == 0
    assert "No cell changed by more than the threshold and the spread." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("median_ms", "-1", "finite numbers that are not negative, got '-1'"),
        ("peak_mib", "inf", "finite numbers that are not negative, got 'inf'"),
        ("seq", "1.5", "whole numbers, got '1.5'"),
        ("batch", "", "whole numbers, got ''"),
        ("hidden", "many", "expected numbers"),
    ],
)
def test_numbers_that_cannot_be_are_named(
    column: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (Path(__file__).parent / "data" / "made_up_sweep.csv").read_text().splitlines()
    fields = lines[1].split(",")
    fields[lines[0].split(",").index(column)] = value
    path = tmp_path / "sweep.csv"
    path.write_text("\n".join([lines[0], ",".join(fields), *lines[2:]]) + "\n")
    with pytest.raises(SystemExit) as stopped:
        frames.read(path)
    assert stopped.value.code == 2
    said = capsys.readouterr().out
    assert f"column {column}" in said and message in said
