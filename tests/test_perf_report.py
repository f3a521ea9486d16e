"""The report: a page that holds everything itself, the numbers it sums up, and figures that say what is not there."""

from __future__ import annotations

import base64
import csv
import importlib
import io
import json
import re
import sys
from html import unescape
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from lstm_triton.perf import figures, frames, page, style
from lstm_triton.perf.__main__ import main

MADE_UP = Path(__file__).parent / "data" / "made_up_sweep.csv"
FIGURES = {
    *(f"{name}_{dtype}" for name in ("ratio", "step_H", "step_B") for dtype in ("fp16", "bf16")),
    "step_T_bf16", "memory", "floor", "host",
}  # fmt: skip


def rows() -> list[dict[str, str]]:
    with MADE_UP.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, found: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows()[0]))
        writer.writeheader()
        writer.writerows(found)
    return path


def report(out: Path, *files: Path) -> str:
    """The page that `report` makes of some files."""
    assert main(["report", *map(str, files), "--out", str(out)]) == 0
    return (out / "report.html").read_text()


def lines(text: str) -> list[list[str]]:
    """The cells of every line of every table."""
    found = re.findall(r"<tr>(.*?)</tr>", text)
    return [[unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line)] for line in found]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report(folder, MADE_UP)
    return folder


@pytest.fixture(scope="module")
def text(out: Path) -> str:
    return (out / "report.html").read_text()


def test_the_page_holds_everything_itself(out: Path, text: str) -> None:
    assert {path.stem for path in out.glob("*.png")} == FIGURES
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', text)
    assert len(sources) == len(FIGURES)
    images = {base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in sources}
    assert images == {path.read_bytes() for path in out.glob("*.png")}
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", re.sub(r'base64,[^"]*', "", text))
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert text.count("<figcaption>") == text.count("<img") == len(re.findall(r'alt="[^"]{20,}"', text))
    for tag in ("table", "tr", "td", "th", "p", "h3", "figure", "main"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>")


def test_images_show_something(out: Path) -> None:
    for path in out.glob("*.png"):
        image = matplotlib.image.imread(path)[..., :3]
        height, width, _ = image.shape
        assert width > 700 and height > 250
        assert 0.005 < (image.min(axis=2) < 0.6).mean() < 0.6, path  # ink, and paper


def test_the_head_says_what_was_measured_on_what(text: str) -> None:
    head = {line[0]: line[1] for line in lines(text) if len(line) == 2}
    assert head["device"] == "made-up GPU" and head["commit"] == "made-up"
    assert head["rows"] == str(len(rows())) and head["constants of the model"] == "estimates"
    assert head["SM clock after timing (MHz)"] == "1980" and head["date"] == "2000-01-01T00:00:00+00:00"


def test_the_summary_is_that_of_the_rows(text: str) -> None:
    found = {tuple(line[:4]): line[4:] for line in lines(text) if len(line) == 10}
    # cases, mean ratio, faster, slower, without a ratio, lowest
    assert found["lstm", "fp16", "inference", "cuDNN persist static"] == [
        "4", "1.41", "2", "1", "0", "0.50 at B=1 H=256 T=512",  # (0.5 * 2 * 1 * 4) ** (1 / 4)
    ]  # fmt: skip
    assert found["lstm", "fp16", "forward+backward", "cuDNN persist static"][:4] == ["4", "1.41", "3", "1"]
    assert found["lstm", "bf16", "inference", "cuDNN standard"][:5] == ["6", "4", "6", "0", "0"]
    assert found["lstm", "bf16", "forward+backward", "cuDNN standard"][:5] == ["4", "3", "3", "0", "1"]
    assert found["lstm, 2 layers", "bf16", "inference", "cuDNN standard"][:2] == ["1", "2"]
    assert found["gru", "bf16", "inference", "cuDNN standard"][:5] == ["4", "1.26", "2", "1", "1"]  # 2 ** (1 / 3)
    assert found["gru", "bf16", "forward+backward", "cuDNN standard"][:2] == ["4", "2"]
    # 1 * 4, 4, 4 ** 6, 27, 2, 2, 16 over 25 cases: 2 ** 22 * 27 in all
    assert found["all", "", "", ""][:5] == ["27", f"{(2**22 * 27) ** (1 / 25):.3g}", "21", "3", "2"]
    providers = {line[0]: line[1:6] for line in lines(text) if len(line) == 7}
    assert providers["loop"] == ["10", "0.05", "0", "10", "0"]
    assert providers["ours:resident"] == ["10", "2", "8", "0", "2"]


def test_failures_stand_on_the_page_with_their_reasons(text: str) -> None:
    bad = {
        line[0]: line[1:]
        for line in lines(text)
        if len(line) == 6 and line[1] in ("failed", "error", "refused", "loose")
    }
    assert len(bad) == sum(row["status"] != "ok" for row in rows()) == 5
    assert bad["ours lstm bf16 forward+backward B=16 H=512 T=512"] == [
        "failed", "3.0e-01", "4.0e-03", "dw_hh", "made up: dw_hh: 3.0e-01 over 4.0e-03",
    ]  # fmt: skip
    assert bad["torch gru bf16 inference B=16 H=512 T=512"][-1] == "RuntimeError: made up: out of <memory>"
    assert "<memory>" not in text


def test_every_row_is_in_the_last_table(text: str) -> None:
    last = text[text.index("All rows") :]
    assert len(lines(last)) == len(rows()) + 1
    header, *body = lines(last)
    first = dict(zip(header, body[0], strict=True))
    assert (first["cell"], first["dtype"], first["B"], first["provider"]) == ("lstm", "fp16", "1", "ours")
    assert (first["median (ms)"], first["ratio"], first["a step (µs)"]) == ("1.6000", "0.500", "3.12")
    assert "CUDA graph (ms)" not in header  # no row has one


def axes_of(drawing: style.Drawing) -> dict[str, matplotlib.axes.Axes]:
    return {ax.get_title(): ax for ax in drawing.figure.axes}


@pytest.fixture(scope="module")
def drawn() -> dict[str, style.Drawing]:
    found = figures.draw(frames.read(MADE_UP).rows)
    return {drawing.name: drawing for drawings in found.values() for drawing in drawings}


def test_heat_maps_print_ratios_and_what_has_none(drawn: dict[str, style.Drawing]) -> None:
    axes = axes_of(drawn["ratio_fp16"])
    written = {ax: [field.get_text() for field in axes[ax].texts] for ax in axes}
    assert written["lstm, inference"] == ["0.50", "2.00", "1.00", "4.00"]
    assert [tile.get_linewidth() > 1 for tile in axes["lstm, inference"].patches] == [True, False, False, False]
    places = [tile.get_xy() for tile in axes["lstm, inference"].patches]
    assert [(round(x), round(y)) for x, y in places] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    axes = axes_of(drawn["ratio_bf16"])
    assert [field.get_text() for field in axes["lstm, forward+backward"].texts][-1] == "failed"
    assert [field.get_text() for field in axes["gru, inference"].texts] == ["2.00", "2.00", "0.50", "no cuDNN"]
    hatched = [tile.get_hatch() is not None for tile in axes["gru, inference"].patches]
    assert hatched == [False, False, False, True]
    assert [field.get_text() for field in axes["lstm, 2 layers, forward+backward"].texts] == ["not measured"]


def test_numbers_on_tiles_are_legible_without_colour(drawn: dict[str, style.Drawing]) -> None:
    for name in ("ratio_fp16", "ratio_bf16"):
        for ax in axes_of(drawn[name]).values():
            for tile in ax.patches:
                if isinstance(tile, matplotlib.patches.Rectangle):
                    assert np.dot(tile.get_facecolor()[:3], (0.299, 0.587, 0.114)) > 0.45


def test_heat_maps_name_another_length(tmp_path: Path) -> None:
    found = [row for row in rows() if row["dtype"] == "fp16"]
    for row in found:
        if row["batch"] == "16" and row["hidden"] == "512":
            row["seq"] = "64"
    drawing = figures.draw(frames.read(write(tmp_path / "a.csv", found)).rows)["Ratio to cuDNN"][0]
    assert [field.get_text() for field in axes_of(drawing)["lstm, inference"].texts][-1] == "4.00\nT=64"


def test_curves_hold_all_else_still(drawn: dict[str, style.Drawing]) -> None:
    drawing = drawn["step_T_bf16"]
    assert drawing.figure.get_suptitle() == "bf16: time of a step over the sequence length T, at B = 16, H = 256"
    ax = axes_of(drawing)["lstm, inference"]
    curves = {bars.lines[0].get_marker(): bars for bars in ax.containers}
    assert set(curves) == {style.PROVIDERS[name][1] for name in ("ours", "ours:resident", "torch", "loop")}
    ours = curves[style.PROVIDERS["ours"][1]].lines
    recorded = {
        float(row["seq"]): row
        for row in rows()
        if [row[n] for n in ("cell", "dtype", "mode", "provider", "batch", "hidden")]
        == ["lstm", "bf16", "inference", "ours", "16", "256"]
    }
    assert dict(zip(*ours[0].get_data(), strict=True)) == {t: float(r["us_per_step"]) for t, r in recorded.items()}
    low, high = ours[2][0].get_segments()[0][:, 1]
    for got, name in ((low, "p20_ms"), (high, "p80_ms")):
        assert got == pytest.approx(float(recorded[128.0][name]) * 1e3 / 128, rel=2e-3)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("sequence length T", "time a step (µs)")
    legend = [entry.get_text() for entry in drawing.figure.legends[0].get_texts()]
    assert set(legend) == {"ours", "ours:resident", "torch", "loop", "floor by the model"}


def test_memory_and_floor_say_their_numbers(drawn: dict[str, style.Drawing]) -> None:
    both = sum(row["provider"] == "ours" and row["status"] == "ok" for row in rows()) - 1  # torch.nn raised in one
    assert f"peak during a run 0.50 of cuDNN's in {both} cases" in drawn["memory"].text
    assert "kept for backward 0.25 of cuDNN's" in drawn["memory"].text
    assert "constants: estimates" in drawn["floor"].text
    (ax,) = axes_of(drawn["floor"]).values()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["local", "local / resident", "resident", "resident / streamed"]
    medians = [note.get_text() for note in ax.texts]
    assert medians[:2] == ["1.5 (8)", "1.5 (6)"]


@pytest.mark.parametrize(
    ("plan", "mode", "expected"),
    [
        ("resident 16x32 / streamed 16x16", "forward+backward", "resident / streamed"),
        ("resident 16x32 / streamed 16x16", "forward", "resident"),
        ("local 16x64 / local 16x64", "forward+backward", "local"),
        ("", "inference", "unknown"),
    ],
)
def test_the_engine_that_ran_is_read_from_the_plan(plan: str, mode: str, expected: str) -> None:
    assert figures.engine(plan, mode) == expected


def test_providers_and_modes_differ_without_colour() -> None:
    looks = [*style.PROVIDERS.values(), style.OTHER]
    assert len({marker for _, marker, _ in looks}) == len({str(dashes) for *_, dashes in looks}) == len(looks)
    assert len({marker for _, marker in style.MODES.values()}) == len(style.MODES)
    assert set(style.PROVIDERS) == set(frames.ORDER["provider"]) and set(style.MODES) == set(frames.ORDER["mode"])


def test_a_cpu_says_nothing_about_a_gpu(tmp_path: Path) -> None:
    alike = {"device": "CPU, 2 cores", "plan": "ATen", "floor_us": "", "to_floor": ""}
    cpu = [row | alike for row in rows() if row["dtype"] == "fp16"]
    text = report(tmp_path, write(tmp_path / "cpu.csv", cpu))
    assert "It says nothing about any GPU." in text
    assert "No figure of the distance to the floor" in text and not (tmp_path / "floor.png").exists()
    assert "cuDNN</h3>" not in text and "Ratio to torch.nn" in text and "cold L2 cache;" not in text


def test_no_row_makes_a_page_that_says_so(tmp_path: Path) -> None:
    assert "No rows: nothing was measured" in report(tmp_path, write(tmp_path / "none.csv", []))
    assert not list(tmp_path.glob("*.png"))


def test_one_row_makes_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    alone = next(row for row in rows() if row["provider"] == "ours") | {"ratio": ""}
    text = report(tmp_path, write(tmp_path / "one.csv", [alone]))
    assert {path.stem for path in tmp_path.glob("*.png")} == {"floor", "host"}
    assert "No map of the ratio to torch.nn in fp16: no case has a time of both." in text
    for what in ("hidden size H", "batch size B", "sequence length T"):
        assert f"No curve over the {what} in fp16: no cell was timed at two of them with all else alike." in text
    assert "No figure of memory: no case has it measured of both torch.nn and ours." in text


def test_without_ours_the_rest_is_shown(tmp_path: Path) -> None:
    others = [row for row in rows() if row["provider"] in ("torch", "loop")]
    text = report(tmp_path, write(tmp_path / "others.csv", others))
    assert "No rows of ours" in text and "No map of the ratio to cuDNN in fp16, bf16" in text
    assert {"step_H_bf16.png", "host.png"} <= {path.name for path in tmp_path.glob("*.png")}


def test_of_a_row_measured_twice_the_later_counts(tmp_path: Path) -> None:
    first = rows()[1]
    later = first | {"median_ms": "9.8765", "date": "2000-01-02T00:00:00+00:00", "commit": "other"}
    files = [write(tmp_path / "a.csv", [later, rows()[0]]), write(tmp_path / "b.csv", [first])]
    twice = frames.read(write(tmp_path / "c.csv", [first, later]))
    assert twice.rows["median_ms"].tolist() == [9.8765] and twice.replaced == 1
    text = report(tmp_path, *files)
    assert "9.8765" in text and f">{first['median_ms']}<" not in text
    assert "Not shown: 1 rows" in text
    assert "Measured with more than one commit, side by side here:" in text


def test_devices_stand_apart(tmp_path: Path) -> None:
    one = [row for row in rows() if row["dtype"] == "fp16"]
    other = [row | {"device": "Another made-up GPU", "commit": "other"} for row in one]
    text = report(tmp_path, write(tmp_path / "one.csv", one), write(tmp_path / "other.csv", other))
    assert "<h2>made-up GPU</h2>" in text and "<h2>Another made-up GPU</h2>" in text
    names = {name for name in FIGURES if "bf16" not in name}
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        f"{device}_{name}" for device in ("made-up-gpu", "another-made-up-gpu") for name in names
    }
    assert "more than one commit" not in text


def test_the_environment_beside_a_file_is_used_if_it_is_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "sweep.csv", rows()[:2])
    found = {"device": "made-up GPU", "source": "made-up", "commit": "made-up", "python": "0.0 made up"}
    beside = tmp_path / "environment.json"
    beside.write_text(json.dumps(found))
    assert ["python", "0.0 made up"] in lines(report(tmp_path / "a", tmp_path))
    beside.write_text(json.dumps(found | {"source": "other"}))
    assert "0.0 made up" not in report(tmp_path / "b", file)
    beside.write_text("[]")
    with pytest.raises(SystemExit) as ended:
        report(tmp_path / "c", file)
    assert ended.value.code == 2


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "cut.csv", rows()[:2])
    file.write_text(file.read_text() + "lstm,bf16,infer")
    assert len(frames.read(file).rows) == 2


def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        report(tmp_path, tmp_path / "absent.csv")
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "absent.csv: expected a sweep's CSV or a folder that holds sweep.csv" in said.out + said.err


@pytest.mark.parametrize(("package", "module"), [("pandas", "frames"), ("matplotlib", "style")])
def test_what_is_not_installed_is_named(
    package: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"lstm_triton.perf.{module}"
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert f"{package} is needed: pip install 'lstm-triton[perf]'" in said.out + said.err


def test_tables_escape_and_align() -> None:
    frame = frames.pd.DataFrame({"a": ["<b>", ""], "n": [1.25, float("nan")], "empty": ["", ""]})
    text = page.table(frame, "x & y", {"n": ".1f"})
    assert "x &amp; y" in text and "&lt;b&gt;" in text and "empty" not in text
    assert '<td class="number">1.2</td>' in text and '<td class="number"></td>' in text


def test_images_keep_their_size_in_bytes(drawn: dict[str, style.Drawing]) -> None:
    image = matplotlib.image.imread(io.BytesIO(drawn["floor"].png()))
    assert image.shape[1] == round(drawn["floor"].figure.get_figwidth() * style.SETTINGS["savefig.dpi"])
