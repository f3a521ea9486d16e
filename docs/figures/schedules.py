"""The figures of docs/kernels.md: which program owns what, and one time step of a group. Drawn, not measured.

python docs/figures/schedules.py    # tiles.svg and step.svg beside this file
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from lstm_triton.perf.style import SETTINGS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from lstm_triton.devices import INTERPRETER
from lstm_triton.planner import make_plan
from lstm_triton.spec import CellSpec

FOLDER = Path(__file__).parent
#: The drawn example: an LSTM small enough to see, in tiles of 16 rows and 8 units.
B, H, TILE = 40, 32, (16, 8)
PLAN = make_plan(CellSpec("lstm"), 1, B, H, torch.float32, INTERPRETER, engine="streamed", tile=TILE).forward
GATES = CellSpec("lstm").gate_names
#: Of the members of a group; letters and numbers tell them apart as well.
COLOURS = ("#b3dbf2", "#f5d58f", "#9ddcc6", "#ecc6da")
#: The program that is followed: member 1 of group 1.
GROUP, MEMBER = 1, 1


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, **options: object) -> None:
    ax.add_patch(Rectangle((x, y), width, height, **({"facecolor": colour, "edgecolor": "0.3", "lw": 0.6} | options)))


def bare(ax: Axes, title: str, width: float, height: float) -> None:
    """Coordinates in rows and columns of a matrix, the first row above."""
    ax.set(xlim=(-0.02 * width, 1.02 * width), ylim=(1.02 * height, -0.02 * height), xticks=[], yticks=[])
    ax.set_title(title, loc="left")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def rows_and_units(ax: Axes) -> None:
    """h[t]: groups by rows, members by units."""
    high, wide = PLAN.n_b * PLAN.block_b, PLAN.n_h * PLAN.block_h
    bare(ax, f"h[t], c[t]: B={B} rows x H={H} units", wide, high)
    for group in range(PLAN.n_b):
        for member in range(PLAN.n_h):
            own = (group, member) == (GROUP, MEMBER)
            x, y = member * PLAN.block_h, group * PLAN.block_b
            box(ax, x, y, PLAN.block_h, PLAN.block_b, COLOURS[member], lw=2.2 if own else 0.6, zorder=3 if own else 2)
            ax.text(x + PLAN.block_h / 2, y + PLAN.block_b / 2, group * PLAN.n_h + member, ha="center", va="center",
                    fontsize=11, fontweight="bold" if own else "normal", zorder=4)  # fmt: skip
    box(ax, 0, B, wide, high - B, "none", hatch="////", zorder=5, lw=0)
    ax.set_yticks([(g + 0.5) * PLAN.block_b for g in range(PLAN.n_b)], [f"group {g}" for g in range(PLAN.n_b)])
    ax.set_xticks([(m + 0.5) * PLAN.block_h for m in range(PLAN.n_h)], [f"member {m}" for m in range(PLAN.n_h)])
    ax.tick_params(length=0)


def weights(ax: Axes, backward: bool) -> None:
    """W_hh: which rows, or backward which columns, a member multiplies by."""
    title = "backward: dh = da[t+1] W_hh" if backward else "forward: h_gates = h[t-1] W_hh^T"
    bare(ax, f"W_hh, {title}", H, 4 * H)
    for member in range(PLAN.n_h):
        own = member == MEMBER
        first = member * PLAN.block_h
        line = {"lw": 2.2 if own else 0.4, "zorder": 3 if own else 2}
        if backward:
            box(ax, first, 0, PLAN.block_h, 4 * H, COLOURS[member], **line)
        else:
            for gate in range(4):
                box(ax, 0, gate * H + first, H, PLAN.block_h, COLOURS[member], **line)
    for gate, name in enumerate(GATES):
        ax.axhline(gate * H, color="black", lw=1.1, zorder=4, xmin=0.02, xmax=0.98)
        ax.text(-1.2, (gate + 0.5) * H, name, ha="right", va="center", fontsize=11)
    if backward:
        ax.set_xticks([(m + 0.5) * PLAN.block_h for m in range(PLAN.n_h)], range(PLAN.n_h))
        ax.set_xlabel("member: H columns, K = 4H deep")
    else:
        for member in range(PLAN.n_h):
            for gate in range(4):
                ax.text(H / 2, gate * H + (member + 0.5) * PLAN.block_h, member, ha="center", va="center", zorder=5,
                        fontsize=8)  # fmt: skip
        ax.set_xlabel("K = H deep; the number is the member")
    ax.tick_params(length=0)


def interleaved(ax: Axes) -> None:
    """The columns of a program's product, in the order in which they lie in its tile."""
    columns = PLAN.block_h * 4
    bare(ax, f"the product's tile of program {GROUP * PLAN.n_h + MEMBER}: [16, K] x [K, {columns}]", columns, 4)
    for column in range(columns):
        unit, gate = MEMBER * PLAN.block_h + column // 4, column % 4
        box(ax, column, 0.6, 1, 1.6, COLOURS[MEMBER], alpha=1 - 0.17 * gate, lw=0.4)
        ax.text(column + 0.5, 1.4, GATES[gate], ha="center", va="center", fontsize=8)
        if gate == 0:
            ax.text(column + 2, 2.8, f"unit {unit}", ha="center", va="center", fontsize=7.5)
            ax.plot([column, column], [0.4, 3.2], color="black", lw=0.8, clip_on=False)
    ax.text(0, 3.9, "column n: unit n // 4, gate n % 4; one dot for all gates, split into i, f, g, o by tl.split",
            fontsize=8, va="center")  # fmt: skip


def tiles() -> Figure:
    figure = Figure(figsize=(9.6, 6.2))
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.6, 1))
    left, middle, right = top.subplots(1, 3, width_ratios=(1.25, 1, 1))
    rows_and_units(left)
    left.set_xlabel(
        "a number is a program of the grid; hatched rows\nare beyond B and masked; the heavy line is one program"
    )
    weights(middle, backward=False)
    weights(right, backward=True)
    interleaved(bottom.subplots(1, 1))
    return figure


#: Parts of a program's step: width in the drawing, colour, label. The widths are no measurement.
PARTS = {
    "x": (1.0, "#e6e6e6", "load\nx[t]"),
    "rows": (1.1, "#b3dbf2", "load\nrows"),
    "product": (1.5, "#f5d58f", "product"),
    "cell": (0.9, "#ecc6da", "cell"),
    "store": (0.95, "#9ddcc6", "store\nh[t]"),
    "publish": (0.35, "#444444", ""),
    "keep": (1.1, "#e6e6e6", "store\ngates, c"),
}
#: How much slower than drawn above a program is, and how long a count takes to be seen.
SLOWER = (1.0, 1.45, 1.15)
SEEN = 0.8
STEPS = 2


def group_of_programs(ax: Axes) -> float:
    """Three programs that wait: simulated, so that no bar begins before what it needs."""
    free, published = [0.0] * 3, [0.0] * 3  # the first wait is for nothing
    for step in range(STEPS):
        arrived = []
        for program in range(3):
            at = free[program]
            at = draw(ax, at, program, "x", SLOWER[program])
            seen = max(at + 0.7, max(published) + SEEN * (step > 0))
            box(ax, at, program - 0.3, seen - at, 0.6, "white", hatch="\\\\\\", edgecolor="0.6")
            ax.text((at + seen) / 2, program, "wait", ha="center", va="center", fontsize=7.5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
            at = seen
            for name in ("rows", "product", "cell", "store", "publish"):
                at = draw(ax, at, program, name, SLOWER[program])
            arrived.append(at)
            free[program] = draw(ax, at, program, "keep", SLOWER[program])
        if step + 1 < STEPS:
            published = arrived
            last = max(range(3), key=arrived.__getitem__)
            for program in {0, 1, 2} - {last}:
                ends = max(free[program] + PARTS["x"][0] * SLOWER[program] + 0.7, max(arrived) + SEEN)
                arrow = FancyArrowPatch(
                    (arrived[last] - 0.1, last), (ends, program), arrowstyle="-|>", mutation_scale=9, lw=1.1,
                    color="#d55e00", shrinkA=0, shrinkB=0, zorder=6,
                )  # fmt: skip
                ax.add_patch(arrow)
    return max(free)


def draw(ax: Axes, at: float, row: float, name: str, slower: float = 1.0) -> float:
    width, colour, label = PARTS[name]
    box(ax, at, row - 0.3, width * slower, 0.6, colour)
    ax.text(at + width * slower / 2, row, label, ha="center", va="center", fontsize=7.5)
    return at + width * slower


def one_program(ax: Axes, row: float) -> None:
    """The same steps of local: no wait, no rows to load."""
    at = 0.0
    for _ in range(STEPS):
        for name in ("x", "product", "cell", "store", "keep"):
            at = draw(ax, at, row, name)


def launched(ax: Axes, row: float) -> None:
    """And of the step engine: between two steps the launch ends, and with it everything on chip."""
    at = 0.0
    for _ in range(STEPS):
        box(ax, at, row - 0.3, 0.9, 0.6, "#d9d9d9", hatch="xxx", edgecolor="0.6")
        ax.text(at + 0.45, row, "launch", ha="center", va="center", fontsize=7.5, rotation=90,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
        at += 0.9
        for name in ("x", "rows", "product", "cell", "store", "keep"):
            at = draw(ax, at, row, name)


def step() -> Figure:
    figure = Figure(figsize=(9.6, 4.3))
    ax = figure.subplots()
    end = group_of_programs(ax)
    one_program(ax, 3.35)
    launched(ax, 4.6)
    ax.set(xlim=(-0.1, end + 0.1), ylim=(5.05, -0.75), xticks=[])
    labels = ["program 0", "program 1\n(late)", "program 2", "local:\none program", "step: each\nprogram"]
    ax.set_yticks([0, 1, 2, 3.35, 4.6], labels)
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title("Two time steps, forward. Above, a group of three programs. Not to scale: nothing is measured.",
                 loc="left")  # fmt: skip
    ax.text(0, 2.68, "black: publish (barrier, release). Arrows: the group's last count ends the others' waits.",
            fontsize=8, va="center")  # fmt: skip
    return figure


def save(name: str, figure: Figure) -> None:
    figure.savefig(FOLDER / name, format="svg", metadata={"Date": None})


def main() -> None:
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": "schedules", "svg.fonttype": "none"}):
        save("tiles.svg", tiles())
        save("step.svg", step())


if __name__ == "__main__":
    main()
