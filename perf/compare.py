"""Two sweeps cell by cell: what got slower by more than the threshold and more than the spread of either explains."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from . import frames, table
from .environment import COLUMNS
from .frames import CASE, KEY, geometric_mean, is_ours, pd, values, words
from .options import choose, refuse

#: What can be compared, and the columns of its 20th and 80th percentiles. Less is better, except where named below.
COMPARED = {
    "median_ms": ("p20_ms", "p80_ms"),
    "warm_ms": ("warm_p20_ms", "warm_p80_ms"),
    "graph_ms": ("graph_p20_ms", "graph_p80_ms"),
    "host_us": None,
    "peak_mib": None,
    "saved_mib": None,
    "to_floor": None,
    "ratio": None,
}
MORE_IS_BETTER = ("ratio",)
TIMED = ("ok", "loose")
BROKEN = ("failed", "error", "refused")
#: Verdicts, worst first. "worse" and "broken" are regressions.
VERDICTS = ("broken", "worse", "no value", "vanished", "", "better", "mended", "new")
REGRESSIONS = ("broken", "worse")
#: Cells without a counterpart that are named on the screen; --markdown names them all.
NAMED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    file = "a sweep's CSV or a folder that holds sweep.csv"
    parser.add_argument("old", type=Path, help=file)
    parser.add_argument("new", type=Path, help=file)
    parser.add_argument("--column", choices=COMPARED, default="median_ms", help="what to compare (default median_ms)")
    parser.add_argument(
        "--threshold", type=float, default=5.0, help="percent that a regression is worse by, at least (default 5)"
    )
    parser.add_argument("--providers", help="whose regressions set the exit status, comma-separated (default all ours)")
    parser.add_argument("--markdown", type=Path, help="write everything, unchanged cells too, to this file")


def main(options: argparse.Namespace) -> int:
    """0 without a regression, 1 with any."""
    if not 0 <= options.threshold < math.inf:
        refuse(f"--threshold: expected percent, zero or more, got {options.threshold:g}")
    old, new = _one_device(options.old), _one_device(options.new)
    pairs = pair(old, new, options.column, options.threshold)
    if not (pairs["change"].notna() | (pairs["verdict"] == "broken")).any():
        refuse(f"no cell has a {options.column} in both {options.old} and {options.new}")
    there = frames.ordered("provider", pairs["provider"])
    if options.providers is not None:
        judged = choose("providers", options.providers, there)
    else:
        judged = frames.ordered("provider", pairs["provider"][is_ours(pairs)])
        if not judged:
            refuse(f"no rows of ours: choose with --providers whose regressions count, of {', '.join(there)}")
    regressions = int((pairs["verdict"].isin(REGRESSIONS) & pairs["provider"].isin(judged)).sum())
    head = [f"old: {_source(old, options.old)}", f"new: {_source(new, options.new)}", "", *differences(old, new)]
    head += ["", *drift(pairs), "", table.markdown(means(pairs), list(means(pairs)[0])), ""]
    spread = " with 20th to 80th percentiles apart" if COMPARED[options.column] else ""
    tail = (
        f"{regressions} regression{'s' * (regressions != 1)} of {', '.join(judged)} in {options.column}: "
        f"worse by more than {options.threshold:g} %{spread}, or broken"
    )
    print("\n".join([*head, *_listing(pairs[pairs["verdict"] != ""], NAMED), "", tail]))
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text("\n".join([*head, *_listing(pairs, None), "", tail]) + "\n")
    return 1 if regressions else 0


def pair(old: pd.DataFrame, new: pd.DataFrame, column: str, threshold: float) -> pd.DataFrame:
    """One row for each cell of either file, worst first: old, new, their ratio and the verdict.

    `factor` is above 1 where the new one is worse, whichever way the column counts.
    """
    spread = COMPARED[column] or ()
    kept = ["status", "detail", column, *spread]
    both = old[[*KEY, *kept]].merge(new[[*KEY, *kept]], on=list(KEY), how="outer", suffixes=("_old", "_new"))
    found = both[list(KEY)].copy()
    found["old"], found["new"] = both[f"{column}_old"], both[f"{column}_new"]
    found["change"] = (found["new"] / found["old"] - 1).where(found["new"] != found["old"], 0.0) * 100
    found.loc[found["old"].isna() | found["new"].isna(), "change"] = math.nan
    ratio = 1 + found["change"] / 100
    found["factor"] = 1 / ratio if column in MORE_IS_BETTER else ratio
    found["apart"] = True
    if spread:
        (low_old, high_old), (low_new, high_new) = (
            [both[f"{name}_{side}"] for name in spread] for side in ("old", "new")
        )
        # A cell without percentiles is judged by the threshold alone.
        found["apart"] = ~((low_new <= high_old) & (low_old <= high_new))
    found["status_old"], found["status_new"] = both["status_old"], both["status_new"]
    found["detail"] = both["detail_new"].fillna("")
    found["verdict"] = [_verdict(row, 1 + threshold / 100) for _, row in found.iterrows()]
    rank = found["verdict"].map(VERDICTS.index)
    return found.assign(rank=rank).sort_values(["rank", "factor"], ascending=[True, False], ignore_index=True)


def _verdict(row: pd.Series, limit: float) -> str:
    if not isinstance(row["status_new"], str):
        return "vanished"
    if not isinstance(row["status_old"], str):
        return "new"
    if row["status_old"] in TIMED and row["status_new"] in BROKEN:
        return "broken"
    if row["status_old"] in BROKEN and row["status_new"] in TIMED:
        return "mended"
    if math.isnan(row["old"]) != math.isnan(row["new"]):
        return "no value"
    if row["apart"] and row["factor"] > limit:
        return "worse"
    if row["apart"] and row["factor"] * limit < 1:
        return "better"
    return ""


def means(pairs: pd.DataFrame) -> list[dict[str, object]]:
    """For each provider, and for all of ours: the geometric mean of the change, also against torch's own change."""
    usable = pairs[(pairs["old"] > 0) & (pairs["new"] > 0)].copy()
    usable["ratio"] = usable["new"] / usable["old"]
    torch = usable[usable["provider"] == "torch"].set_index(list(CASE))["ratio"]
    cases = pd.MultiIndex.from_frame(usable[list(CASE)])
    usable["against"] = usable["ratio"].to_numpy() / torch.reindex(cases).to_numpy()
    names = frames.ordered("provider", pairs["provider"])
    groups = {name: pairs["provider"] == name for name in names}
    if is_ours(pairs)[pairs["provider"] != "ours"].any():
        groups["all of ours"] = is_ours(pairs)
    groups["all"] = pairs["provider"].notna()
    return [
        {
            "provider": name,
            "cells": int(mask.sum()),
            "mean change": _percent(usable.loc[mask.reindex(usable.index), "ratio"]),
            "against torch's": _percent(usable.loc[mask.reindex(usable.index), "against"].dropna()),
        }
        | {verdict: int((pairs.loc[mask, "verdict"] == verdict).sum()) for verdict in VERDICTS if verdict}
        for name, mask in groups.items()
    ]


def _percent(ratios: pd.Series) -> str:
    return f"{(geometric_mean(ratios) - 1) * 100:+.1f} %" if len(ratios) else ""


def differences(old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """What else changed between the two, in words; another device first and loudest."""
    found = {name: (values(old, name), values(new, name)) for name in COLUMNS if name != "date"}
    found = {name: sides for name, sides in found.items() if sides[0] != sides[1]}
    lines = [f"{name} differs: {before} -> {after}" for name, (before, after) in found.items() if name != "device"]
    if "device" in found:
        before, after = found["device"]
        text = f"WARNING: DIFFERENT DEVICES, {before} and {after}: a change below says nothing about the code."
        return [text, *lines]
    return lines or ["Same device, driver, versions and sources."]


def drift(pairs: pd.DataFrame) -> list[str]:
    """What happened to what this code has no part in."""
    lines = [
        f"{row['provider']} moved by {row['mean change']} (geometric mean), in which no change of ours has a part."
        for row in means(pairs)
        if row["provider"] == "torch" and row["mean change"]
    ]
    return lines or [
        "torch stands in none of the cells of both: nothing tells a change of the code from the machine's."
    ]


def _listing(pairs: pd.DataFrame, most: int | None) -> list[str]:
    """A table of the cells that are in both, and the names of the others."""
    alone = pairs["verdict"].isin(["vanished", "new"])
    shown = [
        {
            "case": words(row),
            "old": _value(row["old"], row["status_old"]),
            "new": _value(row["new"], row["status_new"]),
            "change": "" if math.isnan(row["change"]) else f"{row['change']:+.1f} %",
            "verdict": row["verdict"],
            "detail": row["detail"] if row["verdict"] in ("broken", "no value") else "",
        }
        for _, row in pairs[~alone].iterrows()
    ]
    lines = (
        [table.markdown(shown, list(shown[0]))]
        if shown
        else ["No cell changed by more than the threshold and the spread."]
    )
    for verdict in ("vanished", "new"):
        names = [words(row) for _, row in pairs[pairs["verdict"] == verdict].iterrows()]
        if names:
            more = [] if most is None or len(names) <= most else [f"  and {len(names) - most} more"]
            lines += ["", f"{len(names)} cells {verdict}:", *(f"  {name}" for name in names[:most]), *more]
    return lines


def _value(number: float, status: str) -> str:
    return status if math.isnan(number) else f"{number:.4g}"


def _one_device(path: Path) -> pd.DataFrame:
    rows = frames.read(path).rows
    if rows["device"].nunique() > 1:
        refuse(f"{path}: holds rows of several devices ({values(rows, 'device')}); compare files of one device each")
    return rows


def _source(rows: pd.DataFrame, path: Path) -> str:
    return f"{path}: {len(rows)} rows, {values(rows, 'device')}, commit {values(rows, 'commit')}, {_dates(rows)}"


def _dates(rows: pd.DataFrame) -> str:
    dates = sorted({date[:10] for date in rows["date"] if date})
    return " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "no date"
