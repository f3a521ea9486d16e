"""The figures of a report, drawn from the rows of one device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from . import style
from .frames import CASE, geometric_mean, is_cpu, is_ours, kind, ordered, pd, reference, subject, values
from .style import MODES, Drawing, Figure, matplotlib

#: What a time is drawn against: the axis' label, and what stands still meanwhile.
AGAINST = {
    "hidden": ("hidden size H", ("layers", "bidirectional", "seq", "batch")),
    "batch": ("batch size B", ("layers", "bidirectional", "seq", "hidden")),
    "seq": ("sequence length T", ("layers", "bidirectional", "batch", "hidden")),
}
LETTERS = {"batch": "B", "hidden": "H", "seq": "T"}
#: The colours of the heat maps end at twice as fast or slow at least, at eight times at most.
FEWEST_DOUBLINGS, MOST_DOUBLINGS = 1.0, 3.0


def draw(rows: pd.DataFrame) -> dict[str, list[Drawing]]:
    """All figures of one device, by section of the page."""
    rows = rows.assign(kind=[kind(row) for _, row in rows.iterrows()])
    other = reference(rows)
    missing = f"No map of the ratio to {other} in {{}}: no case has a time of both."
    with matplotlib.rc_context(style.SETTINGS):
        found = {f"Ratio to {other}": _by_dtype(rows, heat_maps, missing)}
        for column, (label, _) in AGAINST.items():
            missing = f"No curve over the {label} in {{}}: no cell was timed at two of them with all else alike."
            found[f"Time a step over the {label}"] = _by_dtype(rows, curves, missing, column)
        found["Memory"] = [memory(rows)]
        found["Distance to the floor"] = [distance_to_floor(rows)]
        found["Host overhead"] = [host_time(rows)]
    return found


def _cold(rows: pd.DataFrame) -> str:
    """A CPU's caches are left as they are."""
    return "" if rows["device"].map(is_cpu).any() else ", cold L2 cache"


def _by_dtype(
    rows: pd.DataFrame, one: Callable[..., Drawing | None], missing: str, *arguments: object
) -> list[Drawing]:
    """A drawing for each dtype, and one sentence for all dtypes that have no data."""
    drawn = {dtype: one(rows[rows["dtype"] == dtype], dtype, *arguments) for dtype in ordered("dtype", rows["dtype"])}
    without = [dtype for dtype, drawing in drawn.items() if drawing is None]
    found = [drawing for drawing in drawn.values() if drawing]
    return found + [Drawing("", missing.format(", ".join(without)))] * bool(without)


def heat_maps(rows: pd.DataFrame, dtype: str) -> Drawing | None:
    """The ratio over batch and hidden size, a panel for each cell and mode."""
    who, other = subject(rows), reference(rows)
    mine = rows[rows["provider"] == who]
    if mine["ratio"].isna().all():
        return None
    seq = _most_frequent(mine["seq"])
    kinds, modes = list(dict.fromkeys(mine["kind"])), ordered("mode", mine["mode"])
    sizes = {row: [sorted(mine[mine["kind"] == row][name].unique()) for name in ("hidden", "batch")] for row in kinds}
    widest = max(len(hidden) for hidden, _ in sizes.values())
    figure, axes = style.panels(
        f"{dtype}: how many times as fast as {other} {who} is",
        kinds,
        modes,
        width=max(2.6, 0.5 * widest),
        heights=[0.36 * len(batch) + 0.75 for _, batch in sizes.values()],
        sharey="row",
    )
    doublings = np.clip(np.log2(mine["ratio"]).abs().max(), FEWEST_DOUBLINGS, MOST_DOUBLINGS)
    norm = matplotlib.colors.Normalize(-doublings, doublings, clip=True)
    # without the darkest ends, on which no number is legible
    colours = matplotlib.colors.LinearSegmentedColormap.from_list(
        "", matplotlib.colormaps["PuOr"](np.linspace(0.2, 0.8, 64))
    )
    for (row, mode), ax in axes.items():
        hidden, batch = sizes[row]
        panel = mine[(mine["kind"] == row) & (mine["mode"] == mode)]
        if panel.empty:
            style.empty(ax)
        for (b, h), cases in panel.groupby(["batch", "hidden"]):
            case = cases.iloc[(cases["seq"] - seq).abs().argmin()]
            look, text = _tile(case, other, colours, norm)
            x, y = hidden.index(h), batch.index(b)
            ax.add_patch(matplotlib.patches.Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, **look))
            text += f"\nT={case['seq']}" if case["seq"] != seq else ""
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5} if math.isnan(case["ratio"]) else None
            size = 8 if widest <= 6 and "\n" not in text else 6.5
            ax.text(x, y, text, ha="center", va="center", fontsize=size, linespacing=0.9, bbox=paper)
        ax.set(xlim=(-0.5, len(hidden) - 0.5), ylim=(-0.5, len(batch) - 0.5))
        ax.set_xticks(range(len(hidden)), hidden)
        ax.set_yticks(range(len(batch)), batch)
        ax.grid(False)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        if mode == modes[0]:
            ax.set_ylabel("batch size B")
        if row == kinds[-1]:
            ax.set_xlabel("hidden size H")
    scale = matplotlib.cm.ScalarMappable(norm, colours)
    bar = figure.colorbar(
        scale, ax=list(axes.values()), location="bottom", extend="both", shrink=0.6, aspect=40, pad=0.03
    )
    ticks = range(-int(doublings), int(doublings) + 1)
    bar.set_ticks(list(ticks), labels=[f"{2.0**tick:g}" for tick in ticks])
    bar.set_label(f"time of {other} / time of {who}")
    text = (
        f"Median time of {other} over that of {who}{_cold(rows)}, T = {seq} unless the field names another. "
        f"Above 1 {who} is faster; below 1, in a thick frame, {other} is. Dotted: no ratio, and why. Empty: not run."
    )
    return Drawing(f"ratio_{dtype}", text, figure)


def _tile(case: pd.Series, other: str, colours: object, norm: object) -> tuple[dict[str, object], str]:
    """How one field of a heat map looks, and what is written in it."""
    if math.isnan(case["ratio"]):
        look = {"facecolor": "white", "hatch": "...", "edgecolor": "0.75", "linewidth": 0.5}
        return look, case["status"] if math.isnan(case["median_ms"]) else f"no {other}"
    frame = {"edgecolor": "black", "linewidth": 1.8} if case["ratio"] < 1 else {"edgecolor": "none"}
    return {"facecolor": colours(norm(np.log2(case["ratio"]))), **frame}, f"{case['ratio']:.2f}"


def curves(rows: pd.DataFrame, dtype: str, column: str) -> Drawing | None:
    """Time a step of every provider over one of the sizes, the others standing still."""
    label, still = AGAINST[column]
    part, fixed = _widest(rows[rows["us_per_step"].notna()], column, still)
    part = part[part.groupby("kind")[column].transform("nunique") > 1]
    if part.empty:
        return None
    kinds, modes = list(dict.fromkeys(part["kind"])), ordered("mode", part["mode"])
    title = f"{dtype}: time of a step over the {label}, at {fixed}"
    figure, axes = style.panels(title, kinds, modes, width=3.1, heights=[2.2] * len(kinds), sharex=True, sharey="row")
    entries: dict[str, object] = {}
    for (row, mode), ax in axes.items():
        panel = part[(part["kind"] == row) & (part["mode"] == mode)].sort_values(column)
        if panel.empty:
            style.empty(ax)
        for provider in ordered("provider", panel["provider"]):
            points = panel[panel["provider"] == provider]
            colour, marker, dashes = style.PROVIDERS.get(provider, style.OTHER)
            step = points["us_per_step"]
            spread = [
                (points[p] - points["median_ms"]).abs() * step / points["median_ms"] for p in ("p20_ms", "p80_ms")
            ]
            look = {"color": colour, "marker": marker, "linestyle": dashes}
            entries[provider] = ax.errorbar(points[column], step, yerr=np.nan_to_num(spread), **look)
        floor = panel[(panel["provider"] == subject(panel)) & panel["floor_us"].notna()]
        if len(floor):
            look = {"color": "0.5", "linewidth": 0.8}
            entries["floor by the model"] = ax.plot(floor[column], floor["floor_us"], **look)[0]
        style.log_axis(ax, "x", sorted(part[column].unique()))
        style.log_axis(ax, "y")
        if row == kinds[-1]:
            ax.set_xlabel(label)
        if mode == modes[0]:
            ax.set_ylabel("time a step (µs)")
    style.legend(figure, entries)
    text = f"Median time of a run over its steps and layers{_cold(rows)}; bars: 20th to 80th percentile."
    if "floor by the model" in entries:
        constants = values(part[is_ours(part)], "constants")
        text += f" The thin line is the least that the planner's model allows, its constants: {constants}."
    if column == "seq":
        text += " A level curve: the time grows as T does."
    return Drawing(f"step_{LETTERS[column]}_{dtype}", text, figure)


def memory(rows: pd.DataFrame) -> Drawing:
    """Peak and saved memory of ours against the reference's, a point for each case."""
    who, other = subject(rows), reference(rows)
    mine, theirs = (rows[rows["provider"] == provider] for provider in (who, "torch"))
    both = mine.merge(theirs, on=list(CASE), suffixes=("", "_torch"))
    panels = {"peak_mib": "peak during a run", "saved_mib": "kept for backward"}
    shown = {name: both[(both[name] > 0) & (both[f"{name}_torch"] > 0)] for name in panels}
    shown = {name: points for name, points in shown.items() if len(points)}
    if not shown:
        return Drawing("", f"No figure of memory: no case has it measured of both {other} and ours.")
    title = f"Memory of {who} against that of {other}: below the line it is less"
    figure, axes = style.panels(title, [""], [panels[name] for name in shown], width=3.9, heights=[3.5])
    entries: dict[str, object] = {}
    means = []
    for (name, points), ax in zip(shown.items(), axes.values(), strict=True):
        x, y = points[f"{name}_torch"], points[name]
        for mode in ordered("mode", points["mode"]):
            colour, marker = MODES.get(mode, style.OTHER[:2])
            look = {"marker": marker, "s": 22, "facecolors": "none", "edgecolors": colour}
            entries[mode] = ax.scatter(x[points["mode"] == mode], y[points["mode"] == mode], **look)
        style.log_axis(ax, "x")
        style.log_axis(ax, "y")
        ends = np.array([min(x.min(), y.min()) / 1.5, max(x.max(), y.max()) * 1.5])
        for factor, dashes, words in ((1.0, "-", "equal"), (0.5, "--", "half")):
            entries[words] = ax.plot(ends, ends * factor, color="0.4", linestyle=dashes, linewidth=0.8)[0]
        ax.set(xlim=ends, ylim=ends, xlabel=f"{other} (MiB)", ylabel=f"{who} (MiB)")
        means.append(f"{panels[name]} {geometric_mean(y / x):.2f} of {other}'s in {len(points)} cases")
    style.legend(figure, entries)
    return Drawing("memory", f"A point for each case. Geometric means: {'; '.join(means)}.", figure)


def distance_to_floor(rows: pd.DataFrame) -> Drawing:
    """Time over the model's floor, by the engine that ran."""
    mine = rows[is_ours(rows) & rows["to_floor"].notna()]
    if mine.empty:
        return Drawing("", "No figure of the distance to the floor: no row of ours has both a floor and a time.")
    engines = pd.Series([engine(row["plan"], row["mode"]) for _, row in mine.iterrows()], mine.index)
    title = "Time of ours over the floor that the model sets, by the engine that ran"
    text = (
        "A point for each case; the bar is the median, printed at the right with the number of cases. "
        f"Left of 1 the model would be wrong. Its constants: {values(mine, 'constants')}."
    )
    return Drawing("floor", text, _strips(mine["to_floor"], engines, mine["mode"], title, "time / floor", line=1.0))


def host_time(rows: pd.DataFrame) -> Drawing:
    """What a call costs on the CPU, by provider."""
    found = rows[rows["host_us"].notna()]
    if found.empty:
        return Drawing("", "No figure of host overhead: no row has the host time of a call.")
    title = "Host time of one call with a single step, by provider"
    text = "A point for each case, at T = 1; the bar is the median, printed at the right with the number of cases."
    strips = _strips(found["host_us"], found["provider"], found["mode"], title, "host time of a call (µs)")
    return Drawing("host", text, strips)


def engine(plan: str, mode: str) -> str:
    """The engines in a planner's label, "resident 16x32 / streamed 16x16": backward's only where backward ran."""
    names = [part.split()[0] for part in plan.split(" / ") if part.split()]
    return " / ".join(dict.fromkeys(names if mode == "forward+backward" else names[:1])) or "unknown"


def _strips(
    numbers: pd.Series, groups: pd.Series, modes: pd.Series, title: str, label: str, line: float | None = None
) -> Figure:
    """A row of points for each mode of each group, groups apart."""
    present = set(zip(groups, modes, strict=True))
    names = ordered("provider", groups)
    lines = {name: [mode for mode in ordered("mode", modes) if (name, mode) in present] for name in names}
    height = 0.2 * len(present) + 0.15 * len(names) + 0.2
    figure, axes = style.panels(title, [""], [""], width=7.5, heights=[height])
    (ax,) = axes.values()
    entries: dict[str, object] = {}
    y, middles = 0.0, {}
    for name in names:
        for mode in lines[name]:
            points = numbers[(groups == name) & (modes == mode)]
            colour, marker = MODES.get(mode, style.OTHER[:2])
            look = {
                "marker": marker,
                "s": 18,
                "facecolors": "none",
                "edgecolors": colour,
                "linewidths": 0.8,
                "zorder": 3,
            }
            ax.plot([points.median()] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2)
            entries[mode] = ax.scatter(points, np.full(len(points), y), **look)
            at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7.5}
            ax.annotate(f"{points.median():.3g} ({len(points)})", (1.01, y), **at)
            y -= 1.0
        middles[name] = y + (len(lines[name]) + 1) / 2
        ax.axhline(y + 0.125, color="0.8", linewidth=0.6)
        y -= 0.75
    if line is not None:
        ax.axvline(line, color="black", linewidth=1)
    style.log_axis(ax, "x")
    low, high = (pick(numbers.tolist() + [line] * (line is not None)) for pick in (min, max))
    room = 1.1 if high > 1.5 * low else 1.5
    ax.set(xlim=(low / room, high * room), ylim=(y + 0.875, 0.75), xlabel=label)
    ax.set_yticks(list(middles.values()), list(middles))
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    style.legend(figure, entries)
    return figure


def _most_frequent(column: pd.Series) -> int:
    """The value that most rows have; of several, the middle one."""
    counts = column.value_counts()
    return _middle(counts.index[counts == counts.max()])


def _middle(found: Sequence[int]) -> int:
    return sorted(found)[(len(found) - 1) // 2]


def _widest(rows: pd.DataFrame, column: str, still: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """The rows that share one value in each of `still` and have the most values of `column` between them, in words too.

    Of several such parts the one with the most rows, and of these the middle one.
    """
    if rows.empty:
        return rows, ""
    sizes = rows.groupby(list(still))[column].agg(["nunique", "size"]).reset_index()
    for name in ("nunique", "size"):
        sizes = sizes[sizes[name] == sizes[name].max()]
    for name in still:
        sizes = sizes[sizes[name] == _middle(sizes[name].unique())]
    chosen = sizes.iloc[0]
    part = rows[(rows[list(still)] == chosen[list(still)]).all(axis=1)]
    return part, ", ".join(f"{letter} = {chosen[name]}" for name, letter in LETTERS.items() if name in still)
