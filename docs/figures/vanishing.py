"""How fast the gradient vanishes with distance, measured on this library's layers: vanishing.csv and vanishing.svg.

    python docs/figures/vanishing.py [--out FOLDER] [--seeds N]

One number is ||d h[T-1] / d x[T-1-k]||, the Frobenius norm of the Jacobian [H, I], for one cell, one seed and one
distance k. Weights are torch.nn's initial ones but for what a curve's name says; x is standard normal; float64, CPU.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lstm_triton.perf.style import SETTINGS, matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import lstm_triton as lt

I, H, T = 16, 32, 128  # noqa: E741
DISTANCES = range(0, 101, 5)
SEEDS = 8


def plain(layer: nn.Module) -> None:
    """As torch.nn initialises it."""


def orthogonal(layer: nn.Module) -> None:
    """All singular values of W_hh are 1."""
    nn.init.orthogonal_(layer.weight_hh_l0)


def opened(gate: int, bias: float) -> Callable[[nn.Module], None]:
    """One gate starts from this bias: 1 in an LSTM is the forget gate, 1 in a GRU the update gate."""

    def prepare(layer: nn.Module) -> None:
        rows = slice(gate * H, (gate + 1) * H)
        layer.bias_ih_l0[rows] = bias
        layer.bias_hh_l0[rows] = 0

    return prepare


#: Name: layer, what is done to its weights, colour, dashes.
CURVES: dict[str, tuple[type[nn.Module], Callable[[nn.Module], None], str, object]] = {
    "RNN": (lt.RNN, plain, "#d55e00", "-"),
    "RNN, W_hh orthogonal": (lt.RNN, orthogonal, "#d55e00", "--"),
    "GRU": (lt.GRU, plain, "#009e73", "-"),
    "GRU, b_z = 3": (lt.GRU, opened(1, 3.0), "#009e73", ":"),
    "LSTM": (lt.LSTM, plain, "#0072b2", "-"),
    "LSTM, b_f = 1": (lt.LSTM, opened(1, 1.0), "#0072b2", "--"),
    "LSTM, b_f = 3": (lt.LSTM, opened(1, 3.0), "#0072b2", ":"),
}


def norms(curve: str, seed: int) -> np.ndarray:
    """||d h[T-1] / d x[T-1-k]|| for each of DISTANCES.

    H rows of the batch hold the same sequence. Rows do not meet, so one backward pass with the unit matrix as the
    gradient by h[T-1] gives row n of every Jacobian in row n of the batch.
    """
    cell, prepare, *_ = CURVES[curve]
    torch.manual_seed(seed)
    layer = cell(I, H, dtype=torch.float64)
    with torch.no_grad():
        prepare(layer)
    x = torch.randn(T, 1, I, dtype=torch.float64).repeat(1, H, 1).requires_grad_()
    y, _ = layer(x)
    (dx,) = torch.autograd.grad(y[-1], x, torch.eye(H, dtype=torch.float64))  # [T, H, I]
    return np.array([float(dx[T - 1 - k].norm()) for k in DISTANCES])


def measure(seeds: int) -> dict[str, np.ndarray]:
    """Of each curve [distances, seeds]."""
    return {curve: np.stack([norms(curve, seed) for seed in range(seeds)], axis=1) for curve in CURVES}


def write(measured: dict[str, np.ndarray], path: Path) -> None:
    """A line for each curve and distance, a column for each seed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        seeds = next(iter(measured.values())).shape[1]
        writer.writerow(["curve", "distance", *(f"seed_{seed}" for seed in range(seeds))])
        for curve, values in measured.items():
            for k, row in zip(DISTANCES, values, strict=True):
                writer.writerow([curve, k, *(f"{value:.6e}" for value in row)])


def read(path: Path) -> dict[str, np.ndarray]:
    """The inverse of `write`, to its digits."""
    found: dict[str, list[list[float]]] = {}
    with path.open(newline="") as file:
        for curve, _, *row in list(csv.reader(file))[1:]:
            found.setdefault(curve, []).append([float(value) for value in row])
    return {curve: np.array(rows) for curve, rows in found.items()}


def averaged(values: np.ndarray) -> np.ndarray:
    """Geometric mean over the seeds [distances], each relative to that seed's norm at distance 0."""
    return np.exp(np.log(values / values[:1]).mean(axis=1))


def draw(measured: dict[str, np.ndarray], path: Path, source: str) -> None:
    """The means as lines, the least and the greatest seed as bands. source: what the file says it was made from."""
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": "vanishing", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.5, 4.4))
        axes: Axes = figure.subplots()
        for curve, values in measured.items():
            _, _, colour, dashes = CURVES[curve]
            relative = values / values[:1]
            axes.fill_between(DISTANCES, relative.min(axis=1), relative.max(axis=1), color=colour, alpha=0.1, lw=0)
            axes.plot(DISTANCES, averaged(values), color=colour, linestyle=dashes, lw=1.6)
        ends = {curve: averaged(values)[-1] for curve, values in measured.items()}
        for curve, height in apart(ends).items():
            axes.annotate(curve, (DISTANCES[-1], height), (6, 0), textcoords="offset points", va="center",
                          color=CURVES[curve][2])  # fmt: skip
        axes.set(yscale="log", xlim=(0, 100), xlabel="distance k, in time steps")
        axes.set_ylabel("gradient's norm, that at distance 0 = 1")
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": source})


def apart(ends: dict[str, float], factor: float = 60.0) -> dict[str, float]:
    """Where names can stand without overlapping: from the top down, each at most its neighbour over `factor`."""
    heights: dict[str, float] = {}
    above = float("inf")
    for curve in sorted(ends, key=ends.__getitem__, reverse=True):
        above = heights[curve] = min(ends[curve], above / factor)
    return heights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for both files")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many seeds, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for matrices this small more of them only wait for one another
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "vanishing.csv"
    write(measure(arguments.seeds), path)
    # drawn from the file, so that the figure shows what it holds
    source = f"sha256 of vanishing.csv: {hashlib.sha256(path.read_bytes()).hexdigest()}"
    draw(read(path), arguments.out / "vanishing.svg", source)


if __name__ == "__main__":
    main()
