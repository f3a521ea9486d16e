"""Every engine and cell on interpreted kernels, with all programs running at once, against the fp64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from concurrency import concurrent
from lstm_triton.kernels.backward import sequence_backward
from lstm_triton.kernels.forward import sequence_forward
from numerics import CELLS, ENGINES, TOLERANCE, differentiate, problem, relative_error, worst_error

import lstm_triton as lt
from lstm_triton import constexprs, launch
from lstm_triton.devices import INTERPRETER, Device
from lstm_triton.planner import make_plan
from lstm_triton.spec import CellSpec

SHAPES = [(5, 3, 40), (1, 1, 1), (7, 17, 72), (2, 33, 24)]


def check(cell: str, inputs: list[torch.Tensor], engine: str, seed: int = 0, **options: Any) -> None:
    """Outputs, final states and every gradient within the dtype's tolerance, and no race."""
    with concurrent(seed) as run:
        error = worst_error(cell, inputs, engine=engine, **options)
    assert not run.races, run.describe()
    assert error <= TOLERANCE[inputs[0].dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", CELLS)
def test_agrees_with_reference(cell: str, engine: str, shape: tuple[int, int, int]) -> None:
    check(cell, problem(cell, *shape), engine, tile=(16, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(cell: str, engine: str, dtype: torch.dtype) -> None:
    check(cell, problem(cell, 4, 5, 20, dtype=dtype), engine, tile=(16, 8))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", CELLS)
def test_direction_and_bias(cell: str, engine: str, bias: bool, reverse: bool) -> None:
    check(cell, problem(cell, 3, 2, 18, bias=bias), engine, tile=(16, 8), reverse=reverse)


@pytest.mark.parametrize("engine", ENGINES)
def test_relu(engine: str) -> None:
    check("rnn", problem("rnn", 4, 3, 20), engine, tile=(16, 8), activation="relu")


@pytest.mark.parametrize(("cell", "precision"), [("lstm", "tf32"), ("gru", "ieee")])
@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (64, 8), None], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_tiles(
    engine: str, tile: tuple[int, int] | None, cell: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product's other forms: K in slices or whole, one K tile or several."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    check(cell, problem(cell, 2, 18, 50), engine, tile=tile)


def test_large_k_takes_several_tiles() -> None:
    """H and G*H beyond the widest K tile, neither a multiple of it."""
    for engine in ("resident", "streamed"):
        plan = lt.plan("lstm", *problem("lstm", 2, 2, 530), engine=engine, tile=(16, 256))
        assert plan.forward.block_k < 530
        check("lstm", problem("lstm", 2, 2, 530), engine, tile=(16, 256))


@pytest.mark.parametrize("cell", CELLS)
def test_groups_in_several_launches(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all groups fit on the GPU at once, the rest come in further launches."""
    small = replace(INTERPRETER, sms=3)
    monkeypatch.setattr(Device, "occupancy", lambda *_: 1)
    monkeypatch.setattr(launch, "device_of", lambda _: small)
    for engine in ("resident", "streamed", "local"):
        inputs = problem(cell, 3, 40, 20)
        plan = lt.plan(cell, *inputs, engine=engine, tile=(16, 16))
        assert engine == "local" or (plan.forward.n_b, plan.forward.groups_at_once) == (3, 1)
        check(cell, inputs, engine, tile=(16, 16))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", CELLS)
def test_split_sequence_equals_the_whole(cell: str, engine: str) -> None:
    """Carrying the final states over, bit for bit: nothing but y and the states goes from step to step."""
    inputs = problem(cell, 6, 3, 24)
    weights = inputs[3 if cell == "lstm" else 2 :]
    function = getattr(lt.functional, cell)
    with concurrent(0), torch.no_grad():
        y, *last = function(*inputs, engine=engine, tile=(16, 8))
        y1, *middle = function(inputs[0][:2], *inputs[1 : len(last) + 1], *weights, engine=engine, tile=(16, 8))
        y2, *end = function(inputs[0][2:], *middle, *weights, engine=engine, tile=(16, 8))
    assert torch.equal(torch.cat((y1, y2)), y)
    assert all(torch.equal(a, b) for a, b in zip(end, last, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_repeats_bit_for_bit_under_any_schedule(engine: str) -> None:
    results = []
    for seed in range(3):
        with concurrent(seed, policy="priority" if seed else "random"):
            outputs, gradients, _ = differentiate(
                "gru", problem("gru", 4, 18, 24), None, lt.functional, engine=engine, tile=(16, 8)
            )
        results.append(outputs + gradients)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_row_does_not_depend_on_its_batch(cell: str, engine: str) -> None:
    """Alone or among others, next to NaN or infinity, a row's output is the same to the bit.

    Rows 16 to 18 begin a tile, as they do alone: the interpreter's own product may round by the place in the tile.
    """
    inputs = problem(cell, 4, 19, 24)
    states = 2 if cell == "lstm" else 1
    function = getattr(lt.functional, cell)
    with concurrent(0), torch.no_grad():
        whole = function(*inputs, engine=engine, tile=(16, 8))[0]
        rows = [inputs[0][:, 16:], *(s[16:] for s in inputs[1 : 1 + states]), *inputs[1 + states :]]
        part = function(*rows, engine=engine, tile=(16, 8))[0]
        spoilt = [t.clone() for t in inputs]
        spoilt[0][1, 3] = torch.nan
        spoilt[1][17] = torch.inf
        beside = function(*spoilt, engine=engine, tile=(16, 8))[0]
    assert torch.equal(whole[:, 16:], part)
    clean = [row for row in range(19) if row not in (3, 17)]
    assert torch.equal(whole[:, clean], beside[:, clean])
    assert beside[1:, 3].isnan().all()
    assert not beside[:, 17].equal(whole[:, 17])


@pytest.mark.parametrize("engine", ENGINES)
def test_relu_keeps_infinite_gradients_from_dead_units(engine: str) -> None:
    x, h0, *weights = (t.requires_grad_() for t in problem("rnn", 2, 2, 8, bias=False))
    results = []
    for name in (engine, "reference"):
        with concurrent(0):
            y, _ = lt.functional.rnn(x, h0, *weights, activation="relu", engine=name)
            alive = y[-1] > 0
            assert 0 < alive.sum() < alive.numel()
            dy = torch.zeros_like(y)
            dy[-1] = torch.where(alive, 1.0, torch.inf)
            results.append(torch.autograd.grad(y, [x, h0, *weights], dy))
    for ours, wanted in zip(*results, strict=True):
        assert relative_error(ours, wanted) <= TOLERANCE[torch.float32]


def test_relu_keeps_nan() -> None:
    inputs = problem("rnn", 2, 2, 8)
    inputs[0][0, 1] = torch.nan
    y, _ = lt.functional.rnn(*inputs, activation="relu", engine="local")
    assert y[:, 1].isnan().all()
    assert y[:, 0].isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_every_element_is_written(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that the host allocates without filling them are filled with NaN first."""

    def poisoned(self: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
        filler = torch.nan if self.is_floating_point() else -1
        return torch.full(shape, filler, dtype=self.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: torch.full_like(t, torch.nan))
    for cell in CELLS:
        check(cell, problem(cell, 3, 18, 20), engine, tile=(16, 8))


def test_extreme_values_stay_finite() -> None:
    """Pre-activations far beyond where exp overflows."""
    inputs = [1e4 * t for t in problem("lstm", 3, 2, 8)]
    outputs, gradients, _ = differentiate("lstm", inputs, None, lt.functional, engine="local")
    assert all(t.isfinite().all() for t in outputs + gradients)


def test_offsets_beyond_31_bits() -> None:
    """One step at the far end of tensors of more than 2^31 elements, of which only that end is ever touched."""
    B, H = 16, 64
    T = (1 << 31) // (B * H) + 2
    _, h0, _, w_hh, _, b_hh = problem("rnn", 1, B, H, dtype=torch.float16)
    x, h, dy, da_before = torch.randn(4, B, H, generator=torch.Generator().manual_seed(0)).half()
    gates, y, dys, da = (torch.empty(T, B, H, dtype=torch.float16) for _ in range(4))
    gates[T - 1], y[T - 2], dys[T - 1], da[T - 2] = x, h, dy, da_before
    plan = make_plan(CellSpec("rnn"), 1, B, H, torch.float16, INTERPRETER, engine="step", tile=(16, 32))

    constants = constexprs.constexprs_of(plan, plan.forward, True) | {"REVERSE": False, "MASKED": False}
    tensors = (gates, w_hh, b_hh, *(None,) * 5, h0, y, h.float(), *(None,) * 9)
    launch._run(sequence_forward, plan.forward, tensors, (1, B, T - 1, 1), constants)
    wanted = torch.tanh(x.double() + h.double() @ w_hh.double().t() + b_hh.double())
    assert relative_error(y[T - 1], wanted) <= TOLERANCE[torch.float16]

    # Of the direction that runs backwards in time, so that step T-2 has its gradients before T-1.
    constants = constexprs.constexprs_of(plan, plan.backward, True) | {
        "REVERSE": True,
        "MASKED": False,
        "HAS_DCELLS": False,
    }
    states = torch.zeros(B, H), torch.zeros(B, H)
    tensors = (dys, None, None, y, h0, *(None,) * 3, w_hh, *(None,) * 5, da, None, *states, *(None,) * 5)
    launch._run(sequence_backward, plan.backward, tensors, (1, B, T - 1, 0, 1, 0), constants)
    wanted = (dy.double() + da_before.double() @ w_hh.double()) * (1 - y[T - 1].double() ** 2)
    assert relative_error(da[T - 1], wanted) <= TOLERANCE[torch.float16]
