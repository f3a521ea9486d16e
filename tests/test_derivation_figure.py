"""docs/derivation.md's figure: its numbers come from the committed table, which measuring again gives once more."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from derivation_cases import ROOT, one_step, section

import lstm_triton as lt

FIGURE = ROOT / "docs" / "figures" / "vanishing.py"
SECTION = section("How fast it vanishes")
PROSE = " ".join(SECTION.split())
TABLE = {
    row[0]: row[1:]
    for row in re.findall(r"^\| (.*?) \| *(.*?) *\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", SECTION, re.MULTILINE)[1:]
}


@cache
def figure() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("vanishing", FIGURE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed() -> dict[str, np.ndarray]:
    """[distances, seeds] of each curve."""
    return figure().read(FIGURE.with_suffix(".csv"))


def a_step(curve: str) -> float:
    of = dict(zip(figure().DISTANCES, figure().averaged(committed()[curve]), strict=True))
    return float((of[100] / of[50]) ** (1 / 50))


@pytest.mark.native
def test_numbers_of_the_figure() -> None:
    """The page's table from the committed file, and the figure is of that file."""
    module, measured = figure(), committed()
    assert list(TABLE) == list(measured) == list(module.CURVES)
    for curve, (gate, *shown) in TABLE.items():
        of = dict(zip(module.DISTANCES, module.averaged(measured[curve]), strict=True))
        assert shown == [f"{of[10]:.1e}", f"{of[50]:.1e}", f"{of[100]:.1e}", f"{a_step(curve):.3f}"]
        bias = float(curve[-1]) if curve[-1].isdigit() else 0.0
        assert gate == ("" if curve.startswith("RNN") else f"{1 / (1 + math.exp(-bias)):.2f}")
        assert measured[curve].shape == (len(module.DISTANCES), module.SEEDS)
    assert f"I = {module.I}, H = {module.H}, T = {module.T}" in PROSE
    assert f"geometric mean of {module.SEEDS} seeds" in PROSE
    digest = hashlib.sha256(FIGURE.with_suffix(".csv").read_bytes()).hexdigest()
    assert digest in FIGURE.with_suffix(".svg").read_text()


@pytest.mark.native
def test_claims_of_the_figure() -> None:
    module = figure()
    lost = {curve: -math.log10(module.averaged(values)[-1]) for curve, values in committed().items()}
    assert 0 < lost["LSTM, b_f = 3"] < 1 and 29.5 < lost["RNN"] < 30
    # norm(W_hh), and that of an orthogonal one
    norms = []
    for seed in range(module.SEEDS):
        torch.manual_seed(seed)
        layer = lt.RNN(module.I, module.H, dtype=torch.float64)
        norms.append(float(torch.linalg.matrix_norm(layer.weight_hh_l0.detach(), 2)))
        module.orthogonal(layer)
        assert float(torch.linalg.matrix_norm(layer.weight_hh_l0.detach(), 2)) == pytest.approx(1, abs=1e-12)
    assert f"between {min(norms):.2f} and {max(norms):.2f}" in PROSE
    # the direct path of each unit: the product of its forget gates
    for curve, (_, prepare, *_) in module.CURVES.items():
        if curve.startswith("LSTM"):
            for seed in range(module.SEEDS):
                torch.manual_seed(seed)
                layer = lt.LSTM(module.I, module.H, dtype=torch.float64)
                with torch.no_grad():
                    prepare(layer)
                    x = torch.randn(module.T, module.I, dtype=torch.float64)
                    p = dict(zip(("W_ih", "W_hh", "b_ih", "b_hh"), layer.parameters(), strict=True))
                    h = c = torch.zeros(module.H, dtype=torch.float64)
                    forget = []
                    for t in range(module.T):
                        made = one_step("lstm", p, x[t], h, c)
                        h, c = made["h"], made["c"]
                        forget.append(made["f"])
                best = float(torch.stack(forget[-100:-50]).log().mean(0).exp().max())
                mine = committed()[curve][:, seed]
                assert best < (mine[20] / mine[10]) ** (1 / 50)


@pytest.mark.native
def test_figure_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first seed, to the digits that the file has."""
    monkeypatch.setattr(sys, "argv", ["vanishing.py", "--out", str(tmp_path), "--seeds", "1"])
    figure().main()
    found = figure().read(tmp_path / "vanishing.csv")
    assert list(found) == list(committed())
    for curve, values in committed().items():
        np.testing.assert_allclose(found[curve][:, 0], values[:, 0], rtol=2e-6)
    assert "<svg" in (tmp_path / "vanishing.svg").read_text()
