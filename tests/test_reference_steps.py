"""The oracle's lengths, mask and reset, said with torch.nn's layer on one step of one row at a time: see `row_by_row`.

And what they promise of steps that do not count: nothing of what stands there, be it NaN, reaches another step, another
row or a gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_problems import (
    ALL_STEPS,
    CELLS,
    LENGTHS,
    MASK,
    RESET,
    SEED,
    SPECS,
    STEP_OPTIONS,
    assert_same,
    call,
    problem,
    run,
    run_torch,
    tensors_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lstm_triton import reference
from lstm_triton.spec import CellSpec


def row_by_row(
    module: nn.Module, x: Tensor, states: list[Tensor], reverse: bool,
    lengths: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What the step options mean, told with torch.nn's layer on one step of one row: y, the final states, and all c."""
    T, B, _ = x.shape
    outputs, cells, finals = [], [], []
    for row in range(B):
        state = [s[row : row + 1] for s in states]
        end = T if lengths is None else max(0, min(T, int(lengths[row])))
        y = [state[0].new_zeros(1, state[0].shape[1])] * T
        c = [state[-1].new_zeros(1, state[-1].shape[1])] * T
        for t in reversed(range(end)) if reverse else range(end):
            if reset is not None and reset[t, row]:
                state = [torch.zeros_like(s) for s in state]
            if mask is None or mask[t, row]:
                y[t], *state = run_torch(module, x[t : t + 1, row : row + 1], state, False)
                y[t], c[t] = y[t][0], state[-1]
        outputs.append(torch.stack(y))
        cells.append(torch.stack(c))
        finals.append(state)
    return torch.cat(outputs, 1), *(torch.cat(s) for s in zip(*finals, strict=True)), torch.cat(cells, 1)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("options", STEP_OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("cell", CELLS)
def test_step_options_row_by_row(cell: str, options: dict[str, Tensor], reverse: bool) -> None:
    module, x, states, weights = problem(cell, (5, 6, 3, 4), True)
    if cell == "lstm":
        options = options | {"return_cells": True}
    found = run(cell, x, states, weights, reverse=reverse, **options)
    expected = row_by_row(module, x, states, reverse, **{k: v for k, v in options.items() if k != "return_cells"})
    assert_same(found, expected if cell == "lstm" else expected[:-1], [x, *states, *weights])


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_as_torch_packs_them(cell: str) -> None:
    """Both directions of torch.nn's layer on a packed sequence; torch takes no row without a step."""
    _, layer, cell_options = CELLS[cell]
    torch.manual_seed(0)
    module = layer(3, 4, bidirectional=True, dtype=torch.float64, **cell_options)
    x, lengths = torch.randn(5, 4, 3, dtype=torch.float64), torch.tensor([3, 5, 1, 4])
    output, final = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    expected, _ = pad_packed_sequence(output)
    weights = list(module.parameters())
    for i, reverse in enumerate((False, True)):
        states = [None] * (2 if cell == "lstm" else 1)
        y, *last = run(cell, x, states, weights[4 * i : 4 * i + 4], lengths=lengths, reverse=reverse)
        torch.testing.assert_close(y, expected[..., 4 * i : 4 * i + 4], rtol=1e-13, atol=1e-14)
        for mine, other in zip(last, final if cell == "lstm" else (final,), strict=True):
            torch.testing.assert_close(mine, other[i], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("steps", [{}, STEP_OPTIONS[-1]], ids=["plain", "steps"])
def test_projection_against_torch(steps: dict[str, Tensor], bias: bool, reverse: bool) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, bias=bias, proj_size=2, dtype=torch.float64)
    x = torch.randn(5, 6, 3, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in (2, 4)]
    *weights, w_hr = module.parameters()
    found = reference.lstm(x, *states, *weights, w_hr=w_hr, reverse=reverse, **steps)
    expected = row_by_row(module, x, states, reverse, **steps)[:-1] if steps else run_torch(module, x, states, reverse)
    assert_same(found, expected, [x, *states, *weights, w_hr])
    zeros = reference.lstm(x, None, None, *weights, w_hr=w_hr)
    assert zeros[0].shape == (5, 6, 2) and zeros[2].shape == (6, 4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_comes_of_steps_that_do_not_count(cell: str, bad: float) -> None:
    """Neither of what stands in x there nor of the gradients that come back there, for outputs and all gradients."""
    _, x, states, weights = problem(cell, (5, 6, 3, 4), True)
    leaves = [x, *states, *weights]
    results = []
    for filler in (0.0, bad):
        skipped = ~(MASK.bool() & (torch.arange(5)[:, None] < LENGTHS))[..., None]
        spoilt = x.detach().masked_fill(skipped, filler).requires_grad_()
        outputs = run(cell, spoilt, states, weights, lengths=LENGTHS, mask=MASK.bool())
        torch.manual_seed(1)
        cotangents = [torch.randn_like(t) for t in outputs]
        cotangents[0].masked_fill_(skipped, filler)
        results.append([*outputs, *torch.autograd.grad(outputs, [spoilt, *leaves[1:]], cotangents)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(t.isfinite().all() for t in results[1])


def test_a_held_state_that_is_infinite_spoils_no_gradient() -> None:
    """The steps that hold it compute nothing from it."""
    x = torch.tensor([[[1e308]], [[1.0]]], dtype=torch.float64)
    w_ih, w_hh = (torch.full((1, 1), 10.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, h_n = reference.rnn(x, None, w_ih, w_hh, activation="relu", lengths=torch.tensor([1]))
    assert h_n.item() == torch.inf
    gradients = torch.autograd.grad(h_n.sum() + y[1:].sum(), (w_ih, w_hh))
    assert [g.item() for g in gradients] == [1e308, 0.0]


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps(cell: str) -> None:
    _, x, states, weights = problem(cell, (3, 2, 3, 5), True)
    y, *last = run(cell, x[:0], states, weights, lengths=torch.tensor([2, 0]), mask=torch.ones(0, 2, dtype=torch.bool))
    assert y.shape == (0, 2, 5) and y.dtype == x.dtype
    assert all(torch.equal(a, b) for a, b in zip(last, states, strict=True))
    if cell == "lstm":
        y, _, c_n, cells = reference.lstm(
            x[:0], None, None, weights[0], weights[1][:, :2], w_hr=torch.ones(2, 5).double(), return_cells=True
        )
        assert (y.shape, c_n.shape, cells.shape) == ((0, 2, 2), (2, 5), (0, 2, 5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint32, torch.uint64], ids=str)
def test_lengths_of_any_integer_dtype(dtype: torch.dtype) -> None:
    _, x, states, weights = problem("gru", (3, 2, 3, 5), True)
    lengths = torch.tensor([2, 3])
    found = run("gru", x, states, weights, lengths=lengths.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(found, run("gru", x, states, weights, lengths=lengths), strict=True))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_derivatives_with_step_options(cell: str, reverse: bool) -> None:
    _, x, states, weights = problem(cell, (3, 3, 2, 2), True)
    steps: dict[str, Any] = {k: v[..., :3] if k == "lengths" else v[:3, :3] for k, v in STEP_OPTIONS[-1].items()}
    leaves = [x, *states, *weights]
    count = 1 + len(states)
    if cell == "lstm":
        steps["return_cells"] = True
        # the weights by the projected h, and the projection
        leaves[1] = states[0][:, :1].detach().requires_grad_()
        leaves[4] = weights[1][:, :1].detach().requires_grad_()
        leaves.append(torch.randn(1, 2, dtype=torch.float64, requires_grad=True))

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        rest = list(args[count : count + 4])
        projection = {"w_hr": args[-1]} if cell == "lstm" else {}
        return run(cell, args[0], list(args[1:count]), rest, reverse=reverse, **projection, **steps)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_function_transforms(cell: str) -> None:
    """vmap over rows of their own lengths, masks and resets, and forward-mode against backward-mode."""
    _, x, states, weights = problem(cell, (5, 6, 3, 4), True)
    x = x.detach()

    def total(x: Tensor, lengths: Tensor, mask: Tensor, reset: Tensor) -> Tensor:
        return run(cell, x, [None] * len(states), weights, lengths=lengths, mask=mask, reset=reset)[0]

    whole = total(x, LENGTHS, MASK.bool(), RESET.bool())
    rows = [x.transpose(0, 1)[:, :, None], LENGTHS[:, None], MASK.bool().t()[..., None], RESET.bool().t()[..., None]]
    torch.testing.assert_close(torch.func.vmap(total)(*rows)[:, :, 0].transpose(0, 1), whole, rtol=1e-13, atol=1e-14)
    arguments = (LENGTHS, MASK.bool(), RESET.bool())
    forward = torch.func.jacfwd(total)(x, *arguments)
    torch.testing.assert_close(forward, torch.func.jacrev(total)(x, *arguments), rtol=1e-13, atol=1e-14)


OF_ROWS = [spec for spec in SPECS if spec.layer_norm or spec.zoneout != (0.0, 0.0) or not spec.reset_after]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("spec", OF_ROWS, ids=str)
def test_rows_and_steps_that_do_not_count_stay_apart(spec: CellSpec, bad: float) -> None:
    """NaN in a row's input, state and masks, and at steps that do not count, reaches no other row nor any gradient."""
    counts = MASK.bool() & (torch.arange(5)[:, None] < LENGTHS)
    spoilt_row = 5
    results = []
    for filler in (0.0, bad):
        v = tensors_of(spec, (5, 6, 3, 4), "gate")
        with torch.no_grad():
            v["x"].masked_fill_(~counts[..., None], filler)
            for name in ("x", "h0", "c0", "input_mask", "recurrent_mask"):
                if name in v:
                    v[name][..., spoilt_row, :] = filler
        outputs = [o[..., :spoilt_row, :] for o in call(spec, v, seed=SEED, **ALL_STEPS)]
        torch.manual_seed(1)
        cotangents = [torch.randn_like(o) for o in outputs]
        cotangents[0].masked_fill_(~counts[:, :spoilt_row, None], filler)
        by_rows = [v[name] for name in ("x", *spec.states, "input_mask", "recurrent_mask")]
        gradients = torch.autograd.grad(outputs, by_rows, cotangents)
        results.append([*outputs, *(g[..., :spoilt_row, :] for g in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(t.isfinite().all() for t in results[1])


@pytest.mark.parametrize("spec", OF_ROWS, ids=str)
def test_no_gradient_comes_of_steps_that_do_not_count(spec: CellSpec) -> None:
    """All gradients, those by weights too, with NaN in the input there and in the gradients that come back there."""
    counts = MASK.bool() & (torch.arange(5)[:, None] < LENGTHS)
    results = []
    for filler in (0.0, torch.nan):
        v = tensors_of(spec, (5, 6, 3, 4), "gate")
        with torch.no_grad():
            v["x"].masked_fill_(~counts[..., None], filler)
        outputs = call(spec, v, seed=SEED, **ALL_STEPS)
        torch.manual_seed(1)
        cotangents = [torch.randn_like(o) for o in outputs]
        cotangents[0].masked_fill_(~counts[..., None], filler)
        results.append([*outputs, *torch.autograd.grad(outputs, list(v.values()), cotangents)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(t.isfinite().all() for t in results[1])
