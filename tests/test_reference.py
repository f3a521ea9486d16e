"""The oracle itself, `lstm_triton.reference`, against torch.nn in float64: outputs, final states and gradients.

Options that torch.nn's own layers can be made to say are here too: masks and coupled gates by other weights, layer
normalisation by the cell of PyTorch's benchmark. Lengths, masks and resets are test_reference_steps's, every option
against the equations test_reference_options's.
"""

from __future__ import annotations

import pytest
import torch
from reference_problems import CELLS, assert_same, problem, run, run_torch
from torch import Tensor, nn

from lstm_triton import reference

SHAPES = [(1, 1, 1, 1), (5, 3, 4, 6), (7, 2, 3, 37)]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_against_torch(cell: str, shape: tuple[int, ...], bias: bool, reverse: bool) -> None:
    module, x, states, weights = problem(cell, shape, bias)
    found = run(cell, x, states, weights, reverse=reverse)
    expected = run_torch(module, x, states, reverse)
    leaves = [x, *states, *weights]
    cotangents = [torch.randn_like(t) for t in expected]
    found += torch.autograd.grad(found, leaves, cotangents)
    expected += torch.autograd.grad(expected, leaves, cotangents)
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() <= 1e-13 * other.norm().clamp(min=1.0)


@pytest.mark.parametrize("cell", CELLS)
def test_states_default_to_zero(cell: str) -> None:
    _, x, states, weights = problem(cell, (4, 2, 3, 5), True)
    found = run(cell, x, [None] * len(states), weights)
    expected = run(cell, x, [torch.zeros_like(s) for s in states], weights)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_split_sequence_equals_the_whole(cell: str) -> None:
    _, x, states, weights = problem(cell, (7, 2, 3, 5), True)
    whole = run(cell, x, states, weights)
    first = run(cell, x[:3], states, weights)
    second = run(cell, x[3:], list(first[1:]), weights)
    joined = (torch.cat([first[0], second[0]]), *second[1:])
    torch.testing.assert_close(joined, whole, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cell", CELLS)
def test_keeps_the_dtype(cell: str, dtype: torch.dtype) -> None:
    _, x, states, weights = problem(cell, (3, 2, 3, 5), True)
    exact = run(cell, x, states, weights)
    found = run(cell, x.to(dtype), [s.to(dtype) for s in states], [w.to(dtype) for w in weights])
    # a few roundings of the storage dtype
    tolerance = 16 * torch.finfo(dtype).eps
    for mine, other in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_derivatives(cell: str, reverse: bool) -> None:
    _, x, states, weights = problem(cell, (3, 2, 2, 3), True)
    leaves = [x, *states, *weights]
    count = 1 + len(states)

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        return run(cell, args[0], list(args[1:count]), list(args[count:]), reverse=reverse)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_cells_are_the_final_states_of_the_beginnings() -> None:
    _, x, states, weights = problem("lstm", (4, 2, 3, 5), True)
    y, h_n, c_n, cells = run("lstm", x, states, weights, return_cells=True)
    assert torch.equal(cells[-1], c_n) and torch.equal(y[-1], h_n)
    for t in range(1, 4):
        torch.testing.assert_close(run("lstm", x[:t], states, weights)[2], cells[t - 1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("cell", CELLS)
def test_memory_is_checked_and_changes_nothing(cell: str) -> None:
    _, x, states, weights = problem(cell, (3, 2, 3, 5), True)
    results = [run(cell, x, states, weights, memory=memory)[0] for memory in ("store", "recompute")]
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="memory must be one of 'store', 'recompute', got 'less'"):
        run(cell, x, states, weights, memory="less")


@pytest.mark.parametrize("masks", ["shared", "gate"])
@pytest.mark.parametrize("cell", CELLS)
def test_masks_equal_for_all_rows_are_scaled_weights(cell: str, masks: str) -> None:
    module, x, states, weights = problem(cell, (5, 3, 2, 4), True)
    gates = weights[0].shape[0] // 4
    own = gates if masks == "gate" else 1
    factors = [torch.randn(own, 1, n, dtype=torch.float64) for n in (2, 4)]
    given = [f.expand(-1, 3, -1) if masks == "gate" else f[0].expand(3, -1) for f in factors]
    found = run(cell, x, states, weights, input_mask=given[0], recurrent_mask=given[1])
    with torch.no_grad():
        for w, f in zip(module.parameters(), factors, strict=False):
            w.copy_((w.unflatten(0, (gates, 4)) * f).flatten(0, 1))
    for mine, other in zip(found, run_torch(module, x, states, False), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-14)


def test_coupled_gates_are_a_forget_gate_of_negated_weights() -> None:
    """sigmoid(-a) = 1 - sigmoid(a)."""
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, dtype=torch.float64)
    weights = []
    with torch.no_grad():
        for w in module.parameters():
            i, f, g, o = w.split(4)
            f.copy_(-i)
            weights.append(torch.cat([i, g, o]))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    found = reference.lstm(x, None, None, *weights, coupled=True)
    for mine, other in zip(found, run_torch(module, x, None, False), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-14)


def test_reset_before_a_diagonal_product_is_reset_after_it() -> None:
    module, x, states, weights = problem("gru", (5, 3, 2, 4), True)
    with torch.no_grad():
        module.weight_hh_l0[8:] = torch.diag(torch.randn(4, dtype=torch.float64))
        module.bias_hh_l0[8:] = 0.0  # which the reset would multiply
        expected = run_torch(module, x, states, False)
        found = run("gru", x, states, weights, reset_after=False)
        assert all(torch.allclose(a, b, rtol=1e-13, atol=1e-14) for a, b in zip(found, expected, strict=True))
        module.weight_hh_l0[9, 1] = 1.0
        assert not torch.allclose(run("gru", x, states, weights, reset_after=False)[0], expected[0])


class LayerNormLSTMCell(nn.Module):
    """The cell of PyTorch's benchmark of custom LSTMs: what it normalises of the cell is the state it carries."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.w_ih = nn.Parameter(torch.randn(4 * hidden, inputs))
        self.w_hh = nn.Parameter(torch.randn(4 * hidden, hidden))
        self.norm_ih, self.norm_hh = nn.LayerNorm(4 * hidden), nn.LayerNorm(4 * hidden)
        self.norm_c = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (self.norm_ih(x @ self.w_ih.T) + self.norm_hh(h @ self.w_hh.T)).chunk(4, dim=1)
        c = self.norm_c(f.sigmoid() * c + i.sigmoid() * g.tanh())
        return o.sigmoid() * c.tanh(), c


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_layer_norm_is_that_of_torchs_benchmark(reverse: bool) -> None:
    """Outputs, all cells and final states, and the gradients of all of them by everything."""
    torch.manual_seed(0)
    cell = LayerNormLSTMCell(3, 4).double()
    norms = {name: getattr(cell, name) for name in ("norm_ih", "norm_hh", "norm_c")}
    for norm in norms.values():
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x, h0, c0 = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 2, 3), (2, 4), (2, 4)))
    pairs = {name: (norm.weight, norm.bias) for name, norm in norms.items()}
    found = reference.lstm(x, h0, c0, cell.w_ih, cell.w_hh, **pairs, reverse=reverse, return_cells=True)
    h, c = h0, c0
    y, cells = [h0] * 7, [c0] * 7
    for t in reversed(range(7)) if reverse else range(7):
        h, c = y[t], cells[t] = cell(x[t], h, c)
    assert_same(found, (torch.stack(y), h, c, torch.stack(cells)), [x, h0, c0, *cell.parameters()])


def test_peephole_of_the_output_gate_reads_the_cell_before_it_is_normalised() -> None:
    """Clipped, though; and the next step's i and f read it normalised."""
    torch.manual_seed(0)
    clip, p = 0.7, torch.randn(3, 4, dtype=torch.float64)
    cell = LayerNormLSTMCell(3, 4).double()
    nn.init.normal_(cell.norm_c.weight)
    nn.init.normal_(cell.norm_c.bias)
    x, h, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 2, 3), (2, 4), (2, 4)))
    pairs = {name: (n.weight, n.bias) for name, n in cell.named_children()}
    found = reference.lstm(x, h, c, cell.w_ih, cell.w_hh, peephole=p, cell_clip=clip, **pairs, return_cells=True)
    clipped = False
    y, cells = [], []
    for x_t in x:
        i, f, g, o = (cell.norm_ih(x_t @ cell.w_ih.T) + cell.norm_hh(h @ cell.w_hh.T)).chunk(4, dim=1)
        free = (f + p[1] * c).sigmoid() * c + (i + p[0] * c).sigmoid() * g.tanh()
        made = free.clamp(-clip, clip)
        clipped |= bool((made != free).any())
        c = cell.norm_c(made)
        h = (o + p[2] * made).sigmoid() * c.tanh()
        y.append(h)
        cells.append(c)
    assert clipped and (c.abs() > clip).any()
    torch.testing.assert_close(found, (torch.stack(y), h, c, torch.stack(cells)), rtol=1e-12, atol=1e-13)
