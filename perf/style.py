"""How figures look: one style for all of them, legible without colour, and what they share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from .options import refuse

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
except ImportError as error:
    refuse(f"matplotlib is needed: pip install 'lstm-triton[perf]' ({error})")

#: matplotlib's settings, for every figure.
SETTINGS = {
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "hatch.color": "0.6",
    "lines.linewidth": 1.2,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
}
#: Colour, marker and dashes of a provider: without colour, the marker and the dashes still tell any two apart.
PROVIDERS = {
    "ours": ("#000000", "o", "-"),
    "ours:local": ("#56b4e9", "v", (0, (1, 1))),
    "ours:resident": ("#0072b2", "^", (0, (5, 1))),
    "ours:streamed": ("#cc79a7", "<", (0, (3, 1, 1, 1))),
    "ours:step": ("#e69f00", ">", (0, (6, 2, 1, 2, 1, 2))),
    "torch": ("#d55e00", "s", "--"),
    "loop": ("#999999", "x", ":"),
    "compiled": ("#009e73", "+", "-."),
    "flashrnn": ("#882255", "D", (0, (8, 2))),
    "torchrl": ("#44aa99", "P", (0, (2, 2))),
    "gru-qat": ("#332288", "*", (0, (4, 1, 1, 1, 1, 1))),
}
OTHER = ("#777777", "d", (0, (1, 3)))
#: Colour and marker of a mode.
MODES = {"inference": ("#e69f00", "o"), "forward": ("#56b4e9", "^"), "forward+backward": ("#000000", "s")}


@dataclass(frozen=True)
class Drawing:
    """A figure, or, where there are no data for one, a sentence that says what is missing."""

    name: str  # of its file
    text: str  # what is shown and how to read it, or what is missing
    figure: Figure | None = None

    def png(self) -> bytes:
        """The figure as an image."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(SETTINGS):
            self.figure.savefig(buffer, format="png")
        return buffer.getvalue()


class Plain(LogLocator):
    """Ticks of a logarithmic axis: the more, the fewer decades it spans."""

    def tick_values(self, low: float, high: float) -> object:
        span = high / low
        self.set_params(subs=(1, 1.5, 2, 3, 5, 7) if span < 10 else (1, 2, 5) if span < 500 else (1,))
        return super().tick_values(low, high)


def panels(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    width: float,
    heights: Sequence[float],
    **sharing: object,
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A figure of small multiples, each titled with its row and its column; sizes in inches."""
    figure = Figure(figsize=(max(width * len(columns) + 0.9, 6.0), sum(heights) + 1.2))
    axes = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights, **sharing)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    found = {(row, column): axes[i, j] for i, row in enumerate(rows) for j, column in enumerate(columns)}
    for names, ax in found.items():
        ax.set_title(", ".join(filter(None, names)))
    return figure, found


def empty(ax: Axes) -> None:
    """A panel without data says so."""
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color="0.35")
    ax.grid(False)


def log_axis(ax: Axes, name: str, ticks: Sequence[float] | None = None) -> None:
    """A logarithmic "x" or "y" axis with plain numbers, at `ticks` or where there is room."""
    ax.set(**{f"{name}scale": "log"})
    axis = getattr(ax, f"{name}axis")
    axis.set_major_locator(Plain() if ticks is None else FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def legend(figure: Figure, entries: dict[str, object]) -> None:
    """One legend for the whole figure, below it."""
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=min(len(entries), 6))
