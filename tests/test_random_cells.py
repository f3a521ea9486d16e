"""Cells drawn at random, every option with every other, on every engine, against the float64 reference.

A few dozen run with the suite; `pytest tests/test_random_cells.py --configurations 1000` draws as many as you ask for.
A configuration is its seed: one that fails can be run alone (-k "seed17-") and comes out the same.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cell_problems import CellProblem
from concurrency import concurrent
from numerics import ENGINES

from lstm_triton.spec import ACTIVATIONS, CellSpec

#: float64, so that no kink is decided otherwise than in the reference; sums of up to some hundred products.
TOLERANCE = 1e-10


def draw(seed: int) -> tuple[CellProblem, dict[str, Any]]:
    """A problem, and how it is run."""
    rng = random.Random(seed)

    def sometimes(value: Any, default: Any, share: float = 0.4) -> Any:
        return value if rng.random() < share else default

    def activation(default: str) -> Any:
        name = rng.choice([default, default, default, *ACTIVATIONS])
        return rng.choice([name, (name, round(rng.uniform(0.2, 1.5), 2), round(rng.uniform(0.1, 1.0), 2))])

    cell = rng.choice(("lstm", "lstm", "gru", "rnn"))
    H = rng.randint(1, 19)
    options: dict[str, Any] = {"activation": activation("tanh"), "bias": rng.random() < 0.7}
    options["gate_clip"] = sometimes(round(rng.uniform(0.3, 2.0), 2), None)
    options["layer_norm"] = sometimes(True, False, 0.3)
    options["zoneout"] = sometimes((round(rng.uniform(0, 1), 2), 0.0), (0.0, 0.0))
    if cell != "rnn":
        options["recurrent_activation"] = activation("sigmoid")
    if cell == "gru" and not options["layer_norm"]:
        options["reset_after"] = rng.random() < 0.5
    if cell == "lstm":
        options["output_activation"] = sometimes(activation("tanh"), None)
        options["peephole"], options["coupled"] = sometimes(True, False), sometimes(True, False)
        options["cell_clip"] = sometimes(round(rng.uniform(0.3, 2.0), 2), None)
        options["zoneout"] = options["zoneout"][0], sometimes(round(rng.uniform(0, 1), 2), 0.0)
        options["proj"] = sometimes(rng.randint(1, H - 1), 0) if H > 1 else 0
    spec = CellSpec(cell, **options)
    problem = CellProblem(
        spec,
        T=rng.randint(1, 5),
        B=rng.randint(1, 5),
        I=rng.randint(1, 6),
        H=H,
        masks=rng.choice((0, 0, 1, spec.gates)),
        skips=rng.random() < 0.4,
        reverse=rng.random() < 0.5,
        cells=rng.random() < 0.4,
        seed=rng.choice((None, rng.randint(-(2**63), 2**63 - 1))),
        dtype=torch.float64,
    )
    how = {"engine": rng.choice(ENGINES), "memory": rng.choice(("store", "store", "recompute"))}
    return problem, how | {"tile": rng.choice(((16, 8), (16, 16), (32, 16)))}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = metafunc.config.getoption("configurations") or 40
    metafunc.parametrize("seed", range(count), ids=lambda seed: f"seed{seed}-")


def test_agrees_with_reference(seed: int) -> None:
    problem, how = draw(seed)
    with concurrent(seed) if how["engine"] in ("resident", "streamed") else nullcontext() as run:
        errors = problem.errors(**how)
    assert run is None or not run.races, run.describe()
    for name, error in errors.items():
        assert error <= TOLERANCE, (name, error, problem, how)
