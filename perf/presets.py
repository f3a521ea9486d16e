"""Which cases a sweep goes through: the grid that options span, or a preset's list, which options narrow."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .cases import CELLS, DTYPES, MODES, Case
from .options import choose, numbers, refuse

#: The grid where nothing else is asked for. On the CPU, small sizes.
GRID = {
    "cuda": {
        "cells": ",".join(CELLS),
        "dtype": "bf16,fp16",
        "layers": "1",
        "bidirectional": "no",
        "hidden": "256,512,768,1024",
        "batch": "1,16,64",
        "seq": "512",
        "mode": ",".join(MODES),
    },
    "cpu": {
        "cells": ",".join(CELLS),
        "dtype": "fp32",
        "layers": "1",
        "bidirectional": "no",
        "hidden": "64,128",
        "batch": "1,16",
        "seq": "64",
        "mode": ",".join(MODES),
    },
}
FULL = GRID["cuda"] | {
    "dtype": "bf16,fp16,tf32,fp32",
    "layers": "1,2",
    "bidirectional": "no,yes",
    "hidden": "128,256,512,768,1024,1536,2048",
    "batch": "1,4,16,64,256",
    "seq": "64,512,2048",
}


@dataclass(frozen=True)
class Preset:
    """A list of cases, most telling first, and what goes with it unless options say otherwise."""

    cases: Callable[[], list[Case]]
    meaning: str
    providers: str = "ours,torch"
    minutes: float | None = None


def grid(axes: dict[str, str]) -> list[Case]:
    """Every combination of the axes, in their order, mode innermost."""
    axis = {name: parsed(name, text) for name, text in axes.items()}
    names = ("cells", "dtype", "layers", "bidirectional", "hidden", "batch", "seq", "mode")
    return [
        Case(cell, dtype, mode, batch, hidden, seq, layers, both)
        for cell, dtype, layers, both, hidden, batch, seq, mode in itertools.product(*(axis[name] for name in names))
    ]


def parsed(name: str, text: str) -> list[Any]:
    """One axis from the command line."""
    if name == "bidirectional":
        return [answer == "yes" for answer in choose(name, text, ("no", "yes"))]
    allowed = {"cells": CELLS, "dtype": tuple(DTYPES), "mode": MODES}
    return choose(name, text, allowed[name]) if name in allowed else numbers(name, text)


def _in_modes(shapes: Iterable[tuple[Any, ...]], *modes: str) -> list[Case]:
    """Shapes as (cell, dtype, batch, hidden, sequence, layers, both directions), each in these modes."""
    return [Case(cell, dtype, mode, *rest) for cell, dtype, *rest in shapes for mode in modes]


#: Where the most is learned, most first.
HEAD: tuple[tuple[Any, ...], ...] = (
    # Where cuDNN is strongest: fp16 or bf16, one layer, batches of 8s, 128s of hidden units.
    ("lstm", "bf16", 16, 1024, 512),
    ("lstm", "fp16", 16, 1024, 512),
    ("lstm", "fp16", 16, 768, 1024),
    ("lstm", "bf16", 16, 768, 1024),
    ("gru", "bf16", 16, 1024, 512),
    ("gru", "fp16", 16, 1024, 512),
    ("lstm", "bf16", 64, 512, 512),
    ("lstm", "fp16", 64, 512, 512),
    ("lstm", "bf16", 16, 128, 512),
    ("lstm", "bf16", 16, 256, 512),
    ("rnn", "bf16", 16, 1024, 512),
    ("lstm", "tf32", 16, 512, 512),
    ("lstm", "bf16", 1, 1024, 512),
    ("lstm", "bf16", 16, 2048, 256),
    ("lstm", "bf16", 16, 512, 512, 2),
    ("lstm", "bf16", 16, 512, 512, 1, True),
    ("lstm", "fp32", 32, 512, 64),
    ("gru", "bf16", 64, 256, 512),
    ("lstm", "bf16", 256, 512, 256),
)


def quick() -> list[Case]:
    """The head of the list in both common modes, then what a training forward alone takes."""
    return _in_modes(HEAD, "inference", "forward+backward") + _in_modes(HEAD[:6], "forward")


def telling() -> list[Case]:
    """quick's list, then a grid: gpu-check walks down it until its time is up."""
    families = itertools.product(CELLS, ("bf16", "fp16", "tf32"), (512, 1024, 256, 1536), (16, 64, 1))
    rest = [(cell, dtype, batch, hidden, 512) for cell, dtype, hidden, batch in families]
    return list(dict.fromkeys(quick() + _in_modes(rest, "inference", "forward+backward")))


def paper() -> list[Case]:
    """The shapes of published measurements; their numbers stand in the papers, on other cards."""
    chart = [(cell, dtype, 16, 768, 1024) for cell, dtype in (("lstm", "fp16"), ("lstm", "bf16"), ("lstm", "fp32"))]
    others = [
        ("gru", "tf32", 32, 512, 64),  # gru-qat's training step; it allows tf32
        ("gru", "fp32", 32, 512, 64),
        ("lstm", "tf32", 8000, 256, 32),  # torchrl's H and B; the length is ours
        ("gru", "tf32", 8000, 256, 32),
        ("rnn", "fp32", 4, 1152, 256),  # Persistent RNNs, 2016: one layer of 1152 at batch 4; the length is ours
        ("rnn", "fp16", 4, 1152, 256),
    ]
    return _in_modes([*chart, *others], *MODES)


PRESETS = {
    "quick": Preset(
        quick, "the most telling cases, cut to be done on a GPU within 5 minutes (--minutes 4.25)", minutes=4.25
    ),
    "default": Preset(lambda: grid(GRID["cuda"]), "the grid that also runs where no preset is named"),
    "full": Preset(lambda: grid(FULL), "every axis, for hours"),
    "paper": Preset(paper, "shapes of published measurements, with all providers", providers="all"),
    "telling": Preset(telling, "gpu-check's list: quick's, then a grid of 512 steps"),
}


def cases(options: argparse.Namespace, device: str) -> list[Case]:
    """What to sweep. Without a preset the options span a grid, beside one they keep its cases that match them all."""
    asked = {name: text for name in GRID[device] if (text := getattr(options, name)) is not None}
    if device == "cpu" and options.preset in ("full", "paper", "telling"):
        refuse(f"--preset: {options.preset!r} lists sizes of a GPU; on the CPU quick and default are a small grid")
    if options.preset is None or device == "cpu":
        return grid(GRID[device] | asked)
    wanted = {"cell" if name == "cells" else name: parsed(name, text) for name, text in asked.items()}
    kept = [
        case
        for case in PRESETS[options.preset].cases()
        if all(getattr(case, name) in values for name, values in wanted.items())
    ]
    if not kept:
        given = " ".join(f"--{name} {text}" for name, text in asked.items())
        refuse(f"--preset: {options.preset!r} has no case with {given}; leave the preset out to span a grid of them")
    return kept
