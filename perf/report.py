"""Figures and a page from result files: what was measured, on what, against what, and what failed."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from . import figures, frames, page
from .environment import COLUMNS
from .frames import CASE, KEY, geometric_mean, is_cpu, pd, values, words
from .options import refuse
from .providers import PROVIDERS

#: How many of the cells with the lowest ratio are listed.
WORST = 10
#: Rows of the environment.json beside a file that its own columns lack.
BESIDE = ("python", "cuda", "platform", "cpu", "cpus", "memory_gib", "clocks")
CPU_ONLY = "Measured on a CPU, where ours and torch.nn run the same kernels. It says nothing about any GPU."
#: Columns of the table of all rows, as they are headed there, and the format of numbers.
SHOWN = {
    "kind": ("cell", ""), "dtype": ("dtype", ""), "mode": ("mode", ""),
    "batch": ("B", "d"), "hidden": ("H", "d"), "seq": ("T", "d"),
    "provider": ("provider", ""), "status": ("status", ""),
    "median_ms": ("median (ms)", ".4f"), "p20_ms": ("p20 (ms)", ".4f"), "p80_ms": ("p80 (ms)", ".4f"),
    "warm_ms": ("warm L2 (ms)", ".4f"), "graph_ms": ("CUDA graph (ms)", ".4f"),
    "us_per_step": ("a step (µs)", ".2f"), "ratio": ("ratio", ".3f"),
    "floor_us": ("floor of a step (µs)", ".2f"), "to_floor": ("time / floor", ".2f"), "host_us": ("host (µs)", ".1f"),
    "peak_mib": ("peak (MiB)", ".1f"), "saved_mib": ("saved (MiB)", ".1f"), "clock_mhz": ("clock (MHz)", ".0f"),
    "error": ("error", ".1e"), "allowed": ("allowed", ""), "plan": ("plan", ""), "version": ("version", ""),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="CSVs of sweeps, or folders that hold sweep.csv")
    parser.add_argument("--out", type=Path, default=Path("results/report"), help="folder for report.html and its PNGs")


def main(options: argparse.Namespace) -> int:
    """Write the page and its figures; 0 whatever the rows say."""
    results = [frames.read(path) for path in options.files]
    rows, replaced = combine(results)
    options.out.mkdir(parents=True, exist_ok=True)
    body = [head(results)]
    if replaced:
        body.append(
            page.paragraph(f"Not shown: {replaced} rows that a later one of the same case and device replaces.")
        )
    if rows.empty:
        body.append(page.paragraph("No rows: nothing was measured, so there is nothing to show."))
    devices = list(dict.fromkeys(rows["device"]))
    images = 0
    for device in devices:
        mine = rows[rows["device"] == device].reset_index(drop=True)
        body += [page.heading(2, device or "Device not recorded"), *notes(mine), *summary(mine)]
        prefix = f"{re.sub('[^a-z0-9]+', '-', device.lower())}_" if len(devices) > 1 else ""
        for section, drawings in figures.draw(mine).items():
            body.append(page.heading(3, section))
            for drawing in drawings:
                if drawing.figure is None:
                    body.append(page.paragraph(drawing.text))
                    continue
                png = drawing.png()
                (options.out / f"{prefix}{drawing.name}.png").write_bytes(png)
                body.append(page.image(png, drawing.figure.get_suptitle(), drawing.text))
                images += 1
        body += [*failures(mine), *everything(mine)]
    target = options.out / "report.html"
    target.write_text(page.document("lstm-triton: measurements", body), encoding="utf-8")
    print(f"{target}: {len(rows)} rows, {len(devices)} device(s), {images} figures, each also as PNG beside it")
    return 0


def combine(results: list[frames.Result]) -> tuple[pd.DataFrame, int]:
    """All rows, of two for the same case and device the later, and how many that left out."""
    rows = pd.concat([result.rows for result in results]).sort_values("date", kind="stable")
    kept = rows.drop_duplicates([*KEY, "device"], keep="last")
    return frames.sort(kept), len(rows) - len(kept) + sum(result.replaced for result in results)


def head(results: list[frames.Result]) -> str:
    """What each file was measured on and with, a column a file."""
    found = {}
    for i, result in enumerate(results):
        rows = result.rows
        clocks = rows["clock_mhz"].dropna()
        found[str(result.path) if str(result.path) not in found else f"{result.path} ({i})"] = {
            **{name: values(rows, name) for name in COLUMNS if name != "date"},
            "date": _range(rows["date"]),
            "rows": str(len(rows)),
            "SM clock after timing (MHz)": _range(clocks.astype(int)),
            "constants of the model": values(rows, "constants"),
            **_beside(result),
        }
    frame = pd.DataFrame(found).fillna("")
    frame = frame[(frame != "").any(axis=1)]
    frame.insert(0, "file", frame.index)
    return page.table(frame, "What was measured on what, from the files themselves")


def _range(found: pd.Series) -> str:
    return " to ".join(dict.fromkeys([str(found.min()), str(found.max())])) if len(found) else ""


def _beside(result: frames.Result) -> dict[str, str]:
    """More of the environment, from the environment.json beside a file, if it is of the same sources and device."""
    path = result.path.with_name("environment.json")
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        same = all(str(found[name]) in set(result.rows[name]) for name in ("device", "source", "commit"))
    except (ValueError, KeyError, TypeError) as error:
        refuse(f"{path}: expected the environment that a sweep writes: {type(error).__name__}: {error}")
    return {name: str(found[name]) for name in BESIDE if name in found} if same else {}


def notes(rows: pd.DataFrame) -> list[str]:
    """What has to be known before any number of these rows is read."""
    found = [page.paragraph(CPU_ONLY, warning=True)] if rows["device"].map(is_cpu).any() else []
    for name in ("driver", "torch", "triton", "cudnn", "commit", "source"):
        if rows[name].nunique() > 1:
            text = f"Measured with more than one {name}, side by side here: {values(rows, name)}."
            found.append(page.paragraph(text, warning=True))
    if (rows["dirty"] == "True").any():
        found.append(page.paragraph("Sources that differ from their commit were measured."))
    return found


def summary(rows: pd.DataFrame) -> list[str]:
    """The tables that come first: ratios by what the reference runs, every provider, and the worst cells."""
    other, who = frames.reference(rows), frames.subject(rows)
    theirs = rows[rows["provider"] == "torch"].set_index(list(CASE))["plan"].rename("reference")
    joined = rows.join(theirs, on=list(CASE))
    joined["reference"] = joined["reference"].fillna("not measured").replace("", "not recorded")
    joined["kind"] = [frames.kind(row) for _, row in joined.iterrows()]
    mine = frames.sort(joined[joined["provider"] == who], ("cell", "layers", "bidirectional", "dtype", "mode"))
    names = {"kind": "cell", "dtype": "dtype", "mode": "mode", "reference": "torch.nn runs"}
    groups = [
        dict(zip(names.values(), key, strict=True)) | _ratios(group)
        for key, group in mine.groupby(list(names), sort=False)
    ]
    ratio = f"Ratio: time of {other} over the provider's own, so that above 1 the provider is faster; geometric means."
    formats = {"ratio": ".3g"}
    found = [page.heading(3, "Summary")]
    if groups:
        groups.append({"cell": "all"} | _ratios(mine))
        found.append(
            page.table(pd.DataFrame(groups).fillna({n: "" for n in names.values()}), f"{who}. {ratio}", formats)
        )
    else:
        found.append(page.paragraph("No rows of ours: there is nothing to hold against the reference."))
    providers = [
        {"provider": name, **_ratios(group, worst=False)} | {"what its time includes": _includes(name)}
        for name, group in joined.groupby("provider", sort=False)
        for name in [str(name)]
    ]
    order = frames.ordered("provider", rows["provider"])
    providers.sort(key=lambda row: order.index(row["provider"]))
    found.append(page.table(pd.DataFrame(providers), f"Every provider. {ratio} Each over the cases it ran.", formats))
    worst = mine[mine["ratio"].notna()].nsmallest(WORST, "ratio")
    if len(worst):
        listing = pd.DataFrame({
            "case": [words(row, provider=False) for _, row in worst.iterrows()],
            "ratio": worst["ratio"].tolist(),
            f"{who} (ms)": worst["median_ms"].tolist(),
            "20th to 80th percentile": [f"{row['p20_ms']:.4f} to {row['p80_ms']:.4f}" for _, row in worst.iterrows()],
            "plan": worst["plan"].tolist(),
            "torch.nn runs": worst["reference"].tolist(),
        })  # fmt: skip
        caption = f"The lowest ratios, {len(worst)} of {int(mine['ratio'].notna().sum())}."
        found.append(page.table(listing, caption, {"ratio": ".3f", f"{who} (ms)": ".4f"}))
    return found


def _includes(name: str) -> str:
    return PROVIDERS[name].includes if name in PROVIDERS else ""


def _ratios(rows: pd.DataFrame, *, worst: bool = True) -> dict[str, object]:
    """Of some rows: how many, the mean ratio, to how many it is in favour, and the worst."""
    ratio = rows["ratio"].dropna()
    found: dict[str, object] = {
        "cases": len(rows),
        "ratio": geometric_mean(ratio),
        "faster": int((ratio > 1).sum()),
        "slower": int((ratio < 1).sum()),
        "without a ratio": int(rows["ratio"].isna().sum()),
    }
    if worst:
        row = rows.loc[ratio.idxmin()] if len(ratio) else None
        size = "" if row is None else f"{row['ratio']:.2f} at B={row['batch']} H={row['hidden']} T={row['seq']}"
        found["lowest"] = size
    return found


def failures(rows: pd.DataFrame) -> list[str]:
    """Every row that is not ok, with its reason."""
    bad = rows[rows["status"] != "ok"]
    found = [page.heading(3, "What failed, was refused or is absent")]
    if bad.empty:
        return [*found, page.paragraph("Nothing.")]
    listing = pd.DataFrame({
        "case": [words(row) for _, row in bad.iterrows()],
        "status": bad["status"].tolist(),
        "error": bad["error"].tolist(),
        "allowed": bad["allowed"].tolist(),
        "of": bad["worst"].tolist(),
        "reason": bad["detail"].tolist(),
    })  # fmt: skip
    caption = "loose: another provider's error exceeds what ours is allowed; it was timed all the same."
    return [*found, page.table(listing, caption, {"error": ".1e"})]


def everything(rows: pd.DataFrame) -> list[str]:
    """The table of all rows."""
    frame = rows.assign(kind=[frames.kind(row) for _, row in rows.iterrows()])[list(SHOWN)]
    frame.columns = [label for label, _ in SHOWN.values()]
    caption = "Sorted by case, then provider. Times are medians, on a GPU with a cold L2 cache unless said otherwise."
    return [page.heading(3, "All rows"), page.table(frame, caption, dict(SHOWN.values()), dense=True)]
