"""Every option of the cells on interpreted kernels: all engines, all gradients, against the float64 reference."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cell_problems import CellProblem
from concurrency import concurrent
from numerics import ENGINES, TOLERANCE, relative_error

import lstm_triton as lt
from lstm_triton.spec import ACTIVATIONS, OPTIONS, CellSpec

#: Options that meet: every pair of those that touch the same lines of the kernels.
TOGETHER = (
    CellSpec("lstm", peephole=True, proj=7, cell_clip=0.4, gate_clip=0.9, zoneout=(0.3, 0.2)),
    CellSpec("lstm", peephole=True, coupled=True, layer_norm=True, zoneout=(0.2, 0.4), cell_clip=0.7),
    CellSpec("lstm", "softsign", proj=7, layer_norm=True, gate_clip=1.2, peephole=True),
    CellSpec("lstm", "relu", recurrent_activation="hard_sigmoid", output_activation="tanh", gate_clip=1.2, bias=False),
    CellSpec("lstm", coupled=True, zoneout=(0.0, 0.5), proj=3, output_activation="linear"),
    CellSpec("gru", "softplus", reset_after=False, zoneout=(0.3, 0.0), gate_clip=0.8),
    CellSpec("gru", recurrent_activation="softsign", layer_norm=True, zoneout=(0.3, 0.0), gate_clip=0.8),
    CellSpec("rnn", "relu", layer_norm=True, zoneout=(0.3, 0.0), gate_clip=0.8, bias=False),
)
#: Those with kinks: in 16 bits a value beside one falls to its other side.
KINKS = ("hard_sigmoid", "relu", "leaky_relu", "elu", "thresholded_relu")


def check(problem: CellProblem, engine: str, tolerance: float | None = None, **how: Any) -> None:
    """Results, final states and every gradient within the dtype's tolerance, and no race."""
    with concurrent(0) if engine in ("resident", "streamed") else nullcontext() as run:
        errors = problem.errors(engine=engine, **how)
    assert run is None or not run.races, run.describe()
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= (tolerance or TOLERANCE[problem.dtype]), (worst, errors[worst], problem)
    assert not any(e != e for e in errors.values()), errors


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", OPTIONS, ids=str)
def test_agrees_with_reference(spec: CellSpec, engine: str) -> None:
    check(CellProblem(spec, 3, dtype=torch.float64), engine, tile=(16, 16))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", TOGETHER, ids=str)
def test_options_together(spec: CellSpec, engine: str) -> None:
    check(CellProblem(spec, 3, seed=5, dtype=torch.float64), engine, tile=(16, 16))


@pytest.mark.parametrize(("spec", "engine"), [
    (spec, engine) for i, spec in enumerate([*OPTIONS, *TOGETHER])
    for engine in (("step", "resident") if i % 2 else ("local", "streamed"))
], ids=str)  # fmt: skip
def test_with_skipped_steps_and_draws(spec: CellSpec, engine: str) -> None:
    """All else at once: steps skipped and reset, the other direction, all cells, zoneout's draws, two groups."""
    masks = (0, 1, spec.gates)[len(str(spec)) % 3]
    problem = CellProblem(spec, 3, 18, 2, 12, masks, True, True, True, 7, torch.float64)
    check(problem, engine, tile=(16, 8))


@pytest.mark.parametrize(
    ("masks", "engine"), [("one", "step"), ("one", "resident"), ("one a gate", "local"), ("one a gate", "streamed")]
)
@pytest.mark.parametrize("spec", [
    CellSpec("lstm"), CellSpec("lstm", proj=7), CellSpec("lstm", coupled=True, bias=False), CellSpec("gru"),
    CellSpec("gru", reset_after=False), CellSpec("rnn"), CellSpec("lstm", layer_norm=True),
], ids=str)  # fmt: skip
def test_recurrent_dropout(spec: CellSpec, masks: str, engine: str) -> None:
    check(CellProblem(spec, masks=1 if masks == "one" else spec.gates, dtype=torch.float64), engine, tile=(16, 8))


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("spec", [*OPTIONS, *TOGETHER], ids=str)
def test_single_precision(spec: CellSpec, memory: str) -> None:
    """The tolerance of the plain cells, also where backward makes the gates again; or what eager fp32 is off itself."""
    recompute = memory == "recompute"
    problem = CellProblem(spec, 4, 3, 8, 17, spec.gates if recompute else 0, seed=3, skips=recompute)
    ours, eager = problem.errors(engine="local", memory=memory), problem.errors(engine="reference")
    for name, error in ours.items():
        assert error <= max(TOLERANCE[torch.float32], 2 * eager[name]), (name, error, eager[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [s for s in OPTIONS if not any(kink in str(s) for kink in KINKS)], ids=str)
def test_half_precision(spec: CellSpec, dtype: torch.dtype) -> None:
    if spec.gate_clip or spec.cell_clip:
        spec = CellSpec.parse(str(spec).replace("clip=0.5", "clip=50.0").replace("clip=1.0", "clip=50.0"))
    check(CellProblem(spec, 3, 5, 3, 20, dtype=dtype, seed=3), "local", tile=(16, 16))


def test_recompute_in_several_chunks() -> None:
    """Longer than a chunk of steps: zoneout draws by the step's place in the whole sequence, sums go on."""
    for spec, reverse in (
        (CellSpec("lstm", peephole=True, layer_norm=True, zoneout=(0.3, 0.2), proj=2), True),
        (CellSpec("gru", reset_after=False, zoneout=(0.3, 0.0)), False),
        (CellSpec("rnn", zoneout=(0.3, 0.0)), True),
    ):
        problem = CellProblem(spec, 70, 2, 2, 3, 1, seed=5, reverse=reverse, dtype=torch.float64)
        check(problem, "local", 1e-11, memory="recompute")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str) -> None:
    """As the candidate's, the gates' and the output's; with its defaults and with other numbers."""
    for activation in (name, (name, 0.7, 0.3)):
        for spec in (
            CellSpec("lstm", activation),
            CellSpec("lstm", recurrent_activation=activation, output_activation="sigmoid"),
            CellSpec("lstm", output_activation=activation),
            CellSpec("gru", activation, recurrent_activation=activation),
            CellSpec("rnn", activation),
        ):
            check(CellProblem(spec, 3, 2, 2, 5, dtype=torch.float64), "local", 1e-12, tile=(16, 16))


def test_activations_are_accurate_and_finite_in_single_precision() -> None:
    """Value and derivative of each, relative to float64's, from tiny to huge arguments; NaN stays NaN."""
    x = torch.cat([s * torch.logspace(-6, 1.3, 60, dtype=torch.float64) for s in (1.0, -1.0)]).float()
    far = torch.tensor([1e4, -1e4, 3e38, -3e38, torch.nan])
    weights = torch.ones(1, 1), torch.zeros(1, 1)
    for name in ACTIVATIONS:
        found = []
        for module, dtype in ((lt.functional, torch.float32), (lt.reference, torch.float64)):
            leaf = x.to(dtype).reshape(1, -1, 1).requires_grad_()
            y, _ = module.rnn(leaf, None, *(w.to(dtype) for w in weights), activation=name)
            (slope,) = torch.autograd.grad(y.sum(), leaf)
            found.append((y.detach().double(), slope.double()))
        (ours, slope), (exact, exact_slope) = found
        assert ((ours - exact).abs() <= 1e-6 * exact.abs() + 1e-30).all(), name
        assert ((slope - exact_slope).abs() <= 1e-6).all(), name  # 1 - y * y cancels where y is near 1
        y, _ = lt.functional.rnn(far.reshape(1, -1, 1), None, *weights, activation=name)
        assert y[0, :4].isfinite().all() and y[0, 4].isnan().all(), name


@pytest.mark.parametrize("engine", ENGINES)
def test_clips_have_their_true_subgradient(engine: str) -> None:
    """A gate beyond its clip passes no gradient, one on it does; an infinite gradient behind a clip stays there."""
    spec = CellSpec("rnn", "linear", gate_clip=1.0)
    x = torch.tensor([[[0.5], [1.0], [1.5], [-1.5]]], requires_grad=True)
    with concurrent(0):
        y, _ = lt.functional.rnn(
            x, None, torch.ones(1, 1), torch.zeros(1, 1), activation="linear", gate_clip=spec.gate_clip, engine=engine,
            tile=(16, 8),
        )  # fmt: skip
        (slope,) = torch.autograd.grad(y, x, torch.tensor([[[1.0], [1.0], [torch.inf], [torch.inf]]]))
    assert y.flatten().tolist() == [0.5, 1.0, 1.0, -1.0]
    assert slope.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_was_clipped_is_known_whatever_the_rounding(dtype: torch.dtype) -> None:
    """Pre-activations one unit in the last place to both sides of a clip that the dtype cannot hold."""
    clip, w = 0.7, torch.ones(1, 1, dtype=dtype)
    low = torch.tensor(clip, dtype=torch.float64).to(dtype)
    x = torch.stack([torch.nextafter(low, torch.tensor(s, dtype=dtype)) for s in (0.0, 1.0)]).reshape(1, 2, 1)
    for activation in ("tanh", "sigmoid", "linear"):
        leaf = x.clone().requires_grad_()
        y, _ = lt.functional.rnn(leaf, None, w, w, activation=activation, gate_clip=clip, engine="local")
        (slope,) = torch.autograd.grad(y.sum(), leaf)
        assert slope[0, 0] > 0.1 and slope[0, 1] == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", [
    CellSpec("lstm", layer_norm=True), CellSpec("gru", layer_norm=True), CellSpec("gru", reset_after=False),
    CellSpec("lstm", zoneout=(0.3, 0.2)), CellSpec("lstm", peephole=True, gate_clip=1.0),
], ids=str)  # fmt: skip
def test_a_row_does_not_depend_on_its_batch(spec: CellSpec, engine: str) -> None:
    """Next to NaN and infinity a row's result is the same to the bit, and the spoilt rows show it."""
    problem = CellProblem(spec, 3, 18, 2, 20, seed=4)
    tensors = problem.tensors()
    spoilt = {name: tensor.clone() for name, tensor in tensors.items()}
    spoilt["x"][1, 3], spoilt["h0"][17] = torch.nan, torch.inf
    with concurrent(0), torch.no_grad():
        clean = problem.run(lt.functional, tensors, engine=engine, tile=(16, 8))[0]
        beside = problem.run(lt.functional, spoilt, engine=engine, tile=(16, 8))[0]
    rows = [row for row in range(18) if row not in (3, 17)]
    assert torch.equal(clean[:, rows], beside[:, rows])
    assert beside[1, 3].isnan().any() and not beside[:, 17].equal(clean[:, 17])


@pytest.mark.parametrize("spec", [s for s in OPTIONS if s.zoneout != (0.0, 0.0)], ids=str)
def test_zoneout_keeps_the_share_it_says_and_means_its_mean(spec: CellSpec) -> None:
    """One step: h is the old one in about that share of places; over many seeds its mean and variance are right."""
    problem = CellProblem(spec, 1, 8, 2, 32)
    tensors, p = problem.tensors(), spec.zoneout[0]
    new = CellProblem(CellSpec(spec.cell), 1, 8, 2, 32).run(lt.reference, tensors)[1]
    old = tensors["h0"]
    with torch.no_grad():
        drawn = torch.stack(
            [CellProblem(spec, 1, 8, 2, 32, seed=s).run(lt.functional, tensors, engine="local")[1] for s in range(64)]
        )
        mean = problem.run(lt.functional, tensors, engine="local")[1]
    kept = drawn == old
    assert relative_error(drawn[~kept], new.expand_as(drawn)[~kept]) < 1e-6
    draws = kept.numel()
    assert abs(kept.float().mean() - p) < 5 * (p * (1 - p) / draws) ** 0.5
    assert ((kept.float().mean(0) - p).abs() < 5 * (p * (1 - p) / 64) ** 0.5).all()  # no place is special
    assert relative_error(mean, p * old + (1 - p) * new) < 1e-6
    variance = p * (1 - p) * (old - new).pow(2)
    assert abs(drawn.var(0).sum() / variance.sum() - 1) < 0.2


@pytest.mark.parametrize("engine", ["local", "resident"])
@pytest.mark.parametrize("spec", [s for s in OPTIONS if s.zoneout != (0.0, 0.0)], ids=str)
def test_zoneout_draws_the_same_in_backward(spec: CellSpec, engine: str) -> None:
    """Finite differences under a fixed seed, along one direction of all tensors."""
    problem = CellProblem(spec, 4, 3, 2, 9, seed=11, dtype=torch.float64)
    tensors = problem.tensors()
    generator = torch.Generator().manual_seed(3)
    along = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in tensors.items()}

    def loss(step: float) -> torch.Tensor:
        moved = {n: (t + step * along[n]).requires_grad_() for n, t in tensors.items()}
        value = sum(y.pow(2).sum() for y in problem.run(lt.functional, moved, engine=engine, tile=(16, 16)))
        return value, moved

    with concurrent(0):
        value, moved = loss(0.0)
        slope = sum(
            (g * along[n]).sum() for n, g in zip(moved, torch.autograd.grad(value, moved.values()), strict=True)
        )
        with torch.no_grad():
            difference = (loss(1e-5)[0] - loss(-1e-5)[0]) / 2e-5
    assert abs(difference / slope - 1) < 1e-7
