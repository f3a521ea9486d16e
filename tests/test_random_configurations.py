"""Layers drawn at random, every option with every other, against torch.nn's one step at a time in float64.

A few dozen run with the suite; `pytest tests/test_random_configurations.py --configurations 1000` draws as many as you
ask for. A configuration is its seed: one that fails can be run alone (-k "seed17-") and comes out the same.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from concurrency import concurrent
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton as lt
from lstm_triton import launch

pytestmark = pytest.mark.both

#: What the norm of any result or gradient may be off by, relative to the float64 oracle's.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: A norm below this counts as this: small sums that all but cancel keep fewer digits.
FLOOR = 0.05
FORMS = ("plain", "unbatched", "packed", "unsorted", "lengths", "mask", "reset", "mask and reset")


@dataclass(frozen=True)
class Configuration:
    """One layer, its input, and how it is called."""

    cell: str
    form: str
    dtype: torch.dtype
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int
    directions: int
    proj: int
    bias: bool
    batch_first: bool
    hx: bool
    relu: bool
    cells: bool
    dropout: float
    memory: str
    engine: str
    seed: int

    @property
    def options(self) -> dict[str, object]:
        """As torch.nn's constructor takes them."""
        found = {
            "input_size": self.I,
            "hidden_size": self.H,
            "num_layers": self.layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.directions == 2,
            "dropout": self.dropout,
        }
        found |= {"proj_size": self.proj} if self.proj else {}
        return found | ({"nonlinearity": "relu"} if self.relu else {})


def draw(seed: int) -> Configuration:
    rng = random.Random(seed)
    cell = rng.choice(("lstm", "lstm", "gru", "rnn"))
    form = rng.choice(FORMS)
    relu = cell == "rnn" and rng.random() < 0.5
    H, layers = rng.randint(1, 19), rng.choice((1, 1, 2, 3))
    # In 16 bits a relu's kink is decided otherwise than in float64.
    dtypes = (torch.float64, torch.float32, torch.float32) + (() if relu else (torch.float16, torch.bfloat16))
    dtype = rng.choice(dtypes)
    interpreted = ("auto", "local", "step", "resident", "streamed")
    return Configuration(
        cell=cell,
        form=form,
        dtype=dtype,
        T=rng.randint(1, 7),
        B=1 if form == "unbatched" else rng.randint(1, 5),
        I=rng.randint(1, 6),
        H=H,
        layers=layers,
        directions=rng.choice((1, 2)),
        proj=rng.randint(1, H - 1) if cell == "lstm" and H > 1 and rng.random() < 0.4 else 0,
        bias=rng.random() < 0.7,
        batch_first=rng.random() < 0.5,
        hx=rng.random() < 0.5,
        relu=relu,
        cells=cell == "lstm" and rng.random() < 0.4,
        # Dropout's random numbers are torch.nn's where torch.nn runs beside, in the same dtype.
        dropout=0.3 if layers > 1 and form in ("plain", "packed") and rng.random() < 0.3 else 0.0,
        memory=rng.choice(("store", "store", "recompute")),
        engine=rng.choice(interpreted) if launch.INTERPRETED else "auto",
        seed=seed,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = metafunc.config.getoption("configurations") or (40 if launch.INTERPRETED else 200)
    metafunc.parametrize("seed", range(count), ids=lambda seed: f"seed{seed}-")


def test_agrees_with_torch_nn(seed: int) -> None:
    c = draw(seed)
    torch.manual_seed(seed)
    kind = c.cell.upper()
    theirs = getattr(nn, kind)(**c.options).to(c.dtype)
    ours = getattr(lt, kind)(**c.options, memory=c.memory, engine=c.engine).to(c.dtype)
    ours.load_state_dict(theirs.state_dict())

    columns = c.proj or c.H
    x = torch.randn(c.T, c.B, c.I).to(c.dtype)
    shapes = [(c.layers * c.directions, c.B, columns)] + [(c.layers * c.directions, c.B, c.H)] * (c.cell == "lstm")
    hx = [torch.randn(shape).to(c.dtype) for shape in shapes] if c.hx else None
    valid, reset = steps(c)
    results = [(c.T, c.B, c.directions * columns), *shapes, (c.T, c.B, c.directions * c.H)][: 1 + len(shapes) + c.cells]
    outer = [torch.randn(shape).to(c.dtype) for shape in results]

    if c.dropout and not c.cells:
        run = lambda x, hx: called(theirs, c, x, hx, valid, reset)  # noqa: E731
        wanted = differentiated(theirs, run, x, hx, outer, seed)
    else:
        ours.dropout = theirs.dropout = 0.0
        exact = getattr(nn, kind)(**c.options).double()
        exact.load_state_dict(theirs.state_dict())
        run = lambda x, hx: stepwise(exact, c, x, hx, valid, reset)  # noqa: E731
        doubled = None if hx is None else [s.double() for s in hx]
        wanted = differentiated(exact, run, x.double(), doubled, [d.double() for d in outer], seed)
    waits = c.engine in ("resident", "streamed")
    with concurrent(seed) if waits else nullcontext() as checked:
        got = differentiated(ours, lambda x, hx: called(ours, c, x, hx, valid, reset), x, hx, outer, seed)
    assert not waits or not checked.races
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert value.dtype == c.dtype and value.shape == wanted[name].shape, (name, c)
        norm = float(wanted[name].norm().clamp_min(FLOOR))
        error = float((value.double() - wanted[name]).norm()) / norm
        assert error <= TOLERANCE[c.dtype], (name, error, c)


def steps(c: Configuration) -> tuple[Tensor, Tensor]:
    """Which steps count, and which begin from zeros: bool [T, B]."""
    valid, reset = torch.ones(c.T, c.B, dtype=torch.bool), torch.zeros(c.T, c.B, dtype=torch.bool)
    if c.form in ("packed", "unsorted", "lengths"):
        lengths = torch.randint(0 if c.form == "lengths" else 1, c.T + 1, (c.B,))
        if c.form == "packed":
            lengths = lengths.sort(descending=True).values
        if c.form != "lengths":
            lengths[0] = c.T
        valid = torch.arange(c.T)[:, None] < lengths
    if "mask" in c.form:
        valid = torch.rand(c.T, c.B) < 0.7
    if "reset" in c.form:
        reset = torch.rand(c.T, c.B) < 0.3
    return valid, reset


def called(
    layer: nn.Module, c: Configuration, x: Tensor, hx: list[Tensor] | None, valid: Tensor, reset: Tensor
) -> list[Tensor]:
    """The layer called as the configuration says; its results time-major and padded: y, h_n, (c_n), (cells)."""
    lengths = valid.sum(0)
    unbatched = c.form == "unbatched"
    options: dict[str, object] = {}
    if c.form in ("packed", "unsorted"):
        given = pack_padded_sequence(x, lengths, enforce_sorted=c.form == "packed")
    else:
        given = x[:, 0] if unbatched else x.transpose(0, 1) if c.batch_first else x
        options |= {"lengths": lengths} if c.form == "lengths" else {}
        options |= {"mask": valid} if "mask" in c.form else {}
        options |= {"reset": reset} if "reset" in c.form else {}
    if c.cells:
        options["return_cells"] = True
    states = None if hx is None else [s[:, 0] for s in hx] if unbatched else hx
    y, last, *rest = layer(given, states if states is None or c.cell == "lstm" else states[0], **options)
    last = list(last) if c.cell == "lstm" else [last]
    if unbatched:
        return [t.unsqueeze(1) for t in (y, *last, *rest)]
    if c.form in ("packed", "unsorted"):
        return [pad_packed_sequence(y)[0], *last, *(pad_packed_sequence(cells)[0] for cells in rest)]
    return [y.transpose(0, 1) if c.batch_first else y, *last, *rest]


def stepwise(
    layer: nn.Module, c: Configuration, x: Tensor, hx: list[Tensor] | None, valid: Tensor, reset: Tensor
) -> list[Tensor]:
    """The same results by torch.nn's layer of one step, called for each layer, direction and step in turn."""
    states: list[list[Tensor]] = []
    for depth in range(c.layers):
        outputs, cells = [], []
        for direction in range(c.directions):
            suffix = f"_l{depth}" + "_reverse" * direction
            options = c.options | {"input_size": x.shape[-1], "num_layers": 1, "bidirectional": False, "dropout": 0.0}
            one = type(layer)(**options | {"batch_first": False}).double()
            weights = {n.replace(suffix, "_l0"): w for n, w in layer.named_parameters() if n.endswith(suffix)}
            state = [x.new_zeros(1, c.B, c.proj or c.H)] + [x.new_zeros(1, c.B, c.H)] * (c.cell == "lstm")
            if hx is not None:
                state = [s[len(states)][None] for s in hx]
            y: list[Tensor] = [x] * c.T
            cell: list[Tensor] = [x] * c.T
            for t in range(c.T)[:: -1 if direction else 1]:
                counts, anew = valid[t][:, None], reset[t][:, None]
                state = [torch.where(anew, 0.0, s) for s in state]
                given = tuple(state) if c.cell == "lstm" else state[0]
                _, new = torch.func.functional_call(one, weights, (x[t][None], given))
                new = list(new) if c.cell == "lstm" else [new]
                state = [torch.where(counts, n, s) for n, s in zip(new, state, strict=True)]
                y[t], cell[t] = (torch.where(counts, s[0], 0.0) for s in (state[0], state[-1]))
            outputs.append(torch.stack(y))
            cells.append(torch.stack(cell))
            states.append(state)
        x = torch.cat(outputs, -1)
    last = [torch.cat([state[i] for state in states]) for i in range(len(states[0]))]
    return [x, *last, *([torch.cat(cells, -1)] if c.cells else [])]


def differentiated(
    layer: nn.Module, run: object, x: Tensor, hx: list[Tensor] | None, outer: list[Tensor], seed: int
) -> dict[str, Tensor]:
    """Results, and the gradients by input, states and parameters."""
    leaves = {"x": x, **{f"hx[{i}]": s for i, s in enumerate(hx or [])}}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    torch.manual_seed(seed)
    results = run(leaves["x"], [leaves[f"hx[{i}]"] for i in range(len(hx))] if hx else None)
    leaves |= dict(layer.named_parameters())
    gradients = torch.autograd.grad(results, list(leaves.values()), outer[: len(results)])
    found = dict(zip(("y", "h_n", "c_n", "cells"), results, strict=False))
    return {n: t.detach() for n, t in found.items()} | dict(zip(map("d{}".format, leaves), gradients, strict=True))
