"""One engine on one shape, against float64: outputs, final states, all gradients, and what must hold bit for bit.

What is drawn, called and compared follows from the CellSpec alone, so that a cell or flag that `spec.variants` lists is
checked like the others. The oracle is `lt.reference` in float64 on the CPU, itself tested against torch.nn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import lstm_triton as lt
from lstm_triton.spec import CellSpec

from . import kinks
from .cases import DTYPES, precision
from .numerics import Check, compare, nan_in_new_memory, timeouts_at_once

#: Layers of a module's problem; in both directions.
LAYERS = 2
#: What of a mask is zero. The rest, 1 / (1 - DROPPED), is exact in every dtype.
DROPPED = 0.2
MASKS = ("input_mask", "recurrent_mask")
#: Of zoneout: both halves of 64 bits count.
SEED = 0x1234_5678_9ABC_DEF0


@dataclass(frozen=True)
class Problem:
    """One call of a function, or of a module of LAYERS layers in both directions."""

    spec: CellSpec
    engine: str
    dtype: str
    seq: int
    batch: int
    hidden: int
    width: int  # of the input
    tile: tuple[int, int] | None = None
    reverse: bool = False
    states: bool = True  # initial states are given; None otherwise
    module: bool = False
    ragged: bool = False  # steps are skipped and states zeroed at random; the LSTM gives all its cell states as well
    recompute: bool = False  # memory="recompute"
    masks: str = ""  # x[t] and h[t-1] are multiplied by dropout masks: one "shared" by all gates, or one "per gate"
    seeded: bool = False  # zoneout draws; else it takes the expectation

    @property
    def key(self) -> dict[str, str]:
        """As a table shows it: equal for no other problem."""
        form = ["module"] * self.module + ["reverse"] * self.reverse + ["no states"] * (not self.states)
        form += ["ragged"] * self.ragged + ["recompute"] * self.recompute
        form += [f"masks {self.masks}"] * bool(self.masks) + ["seeded"] * self.seeded
        return {
            "engine": self.engine,
            "cell": str(self.spec),
            "dtype": self.dtype,
            "seq": str(self.seq),
            "batch": str(self.batch),
            "hidden": str(self.hidden),
            "width": str(self.width),
            "tile": "" if self.tile is None else f"{self.tile[0]}x{self.tile[1]}",
            "form": ", ".join(form),
        }

    def layer(self, engine: str) -> nn.Module:
        """The module, its parameters without storage; in evaluation, since what training draws is another each time."""
        kind = {"lstm": lt.LSTM, "gru": lt.GRU, "rnn": lt.RNN}[self.spec.cell]
        options = {"num_layers": LAYERS, "bidirectional": True, "bias": self.spec.bias, **self.spec.options}
        options |= {"proj_size": self.spec.proj} if self.spec.proj else {}
        options |= {name: True for name in ("peephole", "layer_norm") if getattr(self.spec, name)}
        options |= {"memory": self.memory, "device": "meta", "dtype": DTYPES[self.dtype], "engine": engine}
        return kind(self.width, self.hidden, **options).eval()

    @property
    def memory(self) -> str:
        return "recompute" if self.recompute else "store"

    @property
    def cells(self) -> bool:
        """All cell states are asked for."""
        return self.ragged and len(self.spec.states) > 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all floating-point arguments of the function, by name; of a pair both, as `norm_ih.weight`."""
        spec, gates = self.spec, (self.spec.gates,) * (self.masks == "per gate")
        rows = spec.gates * self.hidden
        norms = {"norm_ih": rows, "norm_hh": rows, "norm_c": self.hidden} if spec.layer_norm else {}
        if spec.cell != "lstm":
            norms.pop("norm_c", None)
        found: dict[str, tuple[int, ...]] = {"x": (self.seq, self.batch, self.width)}
        found |= {**spec.state_shapes(self.batch, self.hidden), **spec.parameters(self.width, self.hidden)}
        found |= {f"{norm}.{part}": (size,) for norm, size in norms.items() for part in ("weight", "bias")}
        if self.masks:
            found["input_mask"] = (*gates, self.batch, self.width)
            found["recurrent_mask"] = (*gates, self.batch, spec.output(self.hidden))
        return found


@dataclass(frozen=True)
class Tensors:
    """The arguments of one call by name, and the gradients by what it returns, in its order."""

    arguments: dict[str, Tensor | None]
    outer: list[Tensor]
    others: dict[str, Tensor]  # mask, reset and seed, where there are any


def draw(problem: Problem, seed: int = 0) -> Tensors:
    """Random arguments on the CPU: inputs and states normal, weights as in a freshly made layer, then rounded.

    Masks are of dropout. What two normalised products are multiplied by is spread around a half, which makes their sum,
    the gates, as large as in a freshly made layer; what the cell state is, around one.
    """
    p, generator = problem, torch.Generator().manual_seed(seed)
    scale, dtype = p.hidden**-0.5, DTYPES[p.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = (torch.rand(shape, generator=generator) * 2 - 1) * scale
        if name.startswith("norm") and name.endswith("weight"):
            drawn += 1.0 if name.startswith("norm_c") else 0.5
        return drawn.to(dtype)

    shapes = p.shapes
    states = p.spec.state_shapes(p.batch, p.hidden)
    directions = 2 if p.module else 1
    output = (p.seq, p.batch, directions * p.spec.output(p.hidden))
    parameters = {name: shape for name, shape in shapes.items() if name not in ("x", *states, *MASKS)}
    if p.module:
        states = {name: (2 * LAYERS, *shape) for name, shape in states.items()}
        parameters = {name: tuple(weight.shape) for name, weight in p.layer("auto").named_parameters()}
    arguments: dict[str, Tensor | None] = {"x": normal(*shapes["x"])}
    arguments |= {name: normal(*shape) if p.states else None for name, shape in states.items()}
    arguments |= {name: weight(name, shape) for name, shape in parameters.items()}
    for name in MASKS:
        if name in shapes:
            kept = torch.rand(shapes[name], generator=generator) >= DROPPED
            arguments[name] = (kept / (1 - DROPPED)).to(dtype)
    kinks.avoid(p.spec, arguments, generator)
    outer = [normal(*output), *(normal(*shape) for shape in states.values())]
    if p.cells:
        outer.append(normal(p.seq, p.batch, directions * p.hidden))
    others = {}
    if p.ragged:
        for name, share in (("mask", 0.8), ("reset", 0.2)):
            others[name] = torch.rand(p.seq, p.batch, generator=generator) < share
    if p.seeded:
        others["seed"] = torch.tensor([SEED])
    return Tensors(arguments, outer, others)


def call(
    problem: Problem, tensors: Tensors, device: str, engine: str, dtype: torch.dtype, *, training: bool = True
) -> dict[str, Tensor]:
    """Outputs and final states, by name; in training all gradients, too, computed by `engine` in `dtype`."""
    leaves = {
        name: None if value is None else value.detach().to(device, dtype).requires_grad_(training)
        for name, value in tensors.arguments.items()
    }
    with precision(problem.dtype), torch.set_grad_enabled(training):
        others = {name: value.to(device) for name, value in tensors.others.items()}
        results = _results(problem, leaves, others, engine)
        found = dict(zip(("y", "h_n", "c_n", "cells"), results, strict=False))
        if training:
            present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
            outer = [gradient.to(device, dtype) for gradient in tensors.outer]
            gradients = torch.autograd.grad(results, list(present.values()), outer)
            found |= {f"d{name}": gradient for name, gradient in zip(present, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def _results(
    problem: Problem, leaves: dict[str, Tensor | None], others: dict[str, Tensor], engine: str
) -> tuple[Tensor, ...]:
    options: dict[str, object] = {**others, **({"return_cells": True} if problem.cells else {})}
    if not problem.module:
        module = lt.reference if engine == "reference" else lt.functional
        function = getattr(module, problem.spec.cell)
        options |= {"reverse": problem.reverse, "engine": engine, "tile": problem.tile, "memory": problem.memory}
        return function(**paired(leaves), **problem.spec.options, **options)
    states = [leaves[name] for name in problem.spec.states]
    hx = None if states[0] is None else tuple(states) if len(states) > 1 else states[0]
    weights = {name: leaf for name, leaf in leaves.items() if name not in ("x", *problem.spec.states)}
    y, final, *cells = torch.func.functional_call(problem.layer(engine), weights, (leaves["x"], hx), options)
    return (y, *final, *cells) if len(states) > 1 else (y, final)


def paired(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """As the functions take them: weight and bias of a normalisation as one argument."""
    found: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for name, tensor in tensors.items():
        norm, dot, _ = name.partition(".")
        if dot:
            found[norm] = (*found.get(norm, ()), tensor)
    return found


@lru_cache(maxsize=1)
def expected(problem: Problem) -> dict[str, Tensor]:
    """What every engine should give; engines come one after another, so the last is worth keeping."""
    return call(problem, draw(problem), "cpu", "reference", torch.float64)


def check_engine(problem: Problem, device: str, *, repeat: bool = True) -> Check:
    """One engine against float64; with `repeat`, also what must not change a bit.

    That is a second run; inference against training; a sequence beside others that are NaN; and, where a tile is given
    so that every batch runs on the same kernel, a sequence alone.
    """
    with timeouts_at_once():
        return _check_engine(problem, device, repeat)


def _check_engine(problem: Problem, device: str, repeat: bool) -> Check:
    tensors, dtype = draw(problem), DTYPES[problem.dtype]

    def run(tensors: Tensors, *, training: bool = True) -> dict[str, Tensor]:
        with nan_in_new_memory():
            return call(problem, tensors, device, problem.engine, dtype, training=training)

    got = run(tensors)
    verdict = compare(got, expected(replace(problem, engine="", tile=None, recompute=False)), problem.dtype)
    if not verdict.passed or not repeat:
        return verdict
    others = {
        "in a second run": lambda: _changed(got, run(tensors)),
        "in inference": lambda: _changed(got, run(tensors, training=False)),
    }
    if problem.batch > 1:
        others["beside sequences of NaN"] = lambda: _changed_by_neighbours(problem, tensors, got, run)
        if problem.tile and not (problem.module or problem.seeded):  # which of a row zoneout keeps, goes by its number
            others["alone in its batch"] = lambda: _changed_by_being_alone(problem, device)
    for when, changed in others.items():
        names = changed()
        if names:
            return Check(False, verdict.error, names[0], 0.0, f"{', '.join(names)}: other bits {when}")
    return verdict


def _changed(got: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in other if not torch.equal(got[name], other[name])]


def _rows(problem: Problem, results: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """What belongs to some sequences alone: the batch is the last dimension but one."""
    own = ("y", "h_n", "c_n", "cells", *(f"d{name}" for name in ("x", *problem.spec.states, *MASKS)))
    return {name: results[name][..., rows, :] for name in own if name in results}


def _changed_by_neighbours(
    problem: Problem, tensors: Tensors, got: dict[str, Tensor], run: Callable[[Tensors], dict[str, Tensor]]
) -> list[str]:
    """Which results of the last sequence change when every other sequence of the batch becomes NaN."""
    arguments = dict(tensors.arguments)
    for name in ("x", *problem.spec.states):
        if arguments[name] is not None:
            arguments[name] = arguments[name].clone()
            arguments[name][..., :-1, :] = math.nan
    last = slice(problem.batch - 1, None)
    other = run(replace(tensors, arguments=arguments))
    return _changed(_rows(problem, got, last), _rows(problem, other, last))


def _changed_by_being_alone(problem: Problem, device: str) -> list[str]:
    """Which outputs of the last sequence change when it is the only one.

    Of the recurrence, that is: a matrix product by a library may add up otherwise at another size. So the input is one
    number of few bits, which makes its product exact in any order.
    """
    narrow, dtype = replace(problem, width=1), DTYPES[problem.dtype]
    drawn = draw(narrow)
    arguments = dict(drawn.arguments)
    for name in ("x", "w_ih"):
        arguments[name] = arguments[name].bfloat16().to(dtype)
    if problem.spec.bias:
        arguments["b_ih"] = torch.zeros_like(arguments["b_ih"])
    last = slice(problem.batch - 1, None)
    alone = arguments | {
        name: None if arguments[name] is None else arguments[name][..., last, :]
        for name in ("x", *problem.spec.states, *(MASKS if problem.masks else ()))
    }
    both = (
        Tensors(arguments, [], drawn.others),
        Tensors(alone, [], {name: value[:, last] for name, value in drawn.others.items()}),
    )
    whole, single = (call(problem, given, device, problem.engine, dtype, training=False) for given in both)
    return _changed(_rows(problem, whole, last), single)
