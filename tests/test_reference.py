"""The oracle itself: `reference` against torch.nn in float64, and both its derivatives against differences.

What torch.nn has no words for (mask, reset) is said with it, one step of one row at a time: see `row_by_row`. What no
layer of torch's is like is said again from the equations: see `by_equations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lstm_triton import reference
from lstm_triton.philox import philox
from lstm_triton.spec import ACTIVATIONS, CellSpec, activation_of, variants

# cell, activation, function, torch.nn's layer
CELLS = {
    "lstm": (reference.lstm, nn.LSTM, {}),
    "gru": (reference.gru, nn.GRU, {}),
    "rnn-tanh": (reference.rnn, nn.RNN, {"nonlinearity": "tanh"}),
    "rnn-relu": (reference.rnn, nn.RNN, {"nonlinearity": "relu"}),
}
SHAPES = [(1, 1, 1, 1), (5, 3, 4, 6), (7, 2, 3, 37)]


def problem(cell: str, shape: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float64) -> tuple:
    """torch.nn's layer, x [T, B, I], the states [B, H] and the layer's weights."""
    steps, batch, inputs, hidden = shape
    _, layer, options = CELLS[cell]
    torch.manual_seed(0)
    module = layer(inputs, hidden, bias=bias, dtype=dtype, **options)
    x = torch.randn(steps, batch, inputs, dtype=dtype, requires_grad=True)
    states = [torch.randn(batch, hidden, dtype=dtype, requires_grad=True) for _ in range(2 if cell == "lstm" else 1)]
    return module, x, states, list(module.parameters())


def run(cell: str, x: Tensor, states: list, weights: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    function, _, cell_options = CELLS[cell]
    if cell_options:
        options["activation"] = cell_options["nonlinearity"]
    return function(x, *states, *weights, **options)


def run_torch(module: nn.Module, x: Tensor, states: list[Tensor] | None, reverse: bool) -> tuple[Tensor, ...]:
    hx = None
    if states is not None:
        hx = tuple(s.unsqueeze(0) for s in states)
        hx = hx if len(hx) == 2 else hx[0]
    y, final = module(x.flip(0) if reverse else x, hx)
    final = final if isinstance(final, tuple) else (final,)
    return (y.flip(0) if reverse else y, *(s.squeeze(0) for s in final))


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


# a row without a step, one beyond T and one that says nothing
LENGTHS = torch.tensor([3, 0, 9, 5, -2, 1])
MASK = torch.tensor(
    [[1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1]]
)
RESET = torch.tensor(
    [[0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]]
)
STEP_OPTIONS = [
    {"lengths": LENGTHS},
    {"mask": MASK.bool()},
    {"reset": RESET.bool()},
    {"lengths": LENGTHS, "mask": MASK.bool()},
    {"lengths": LENGTHS, "reset": RESET.bool()},
    {"mask": MASK.bool(), "reset": RESET.bool()},
    {"lengths": LENGTHS, "mask": MASK.bool(), "reset": RESET.bool()},
]


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


def assert_same(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], leaves: list[Tensor], bound: float = 1e-13
) -> None:
    """Outputs and their gradients by the leaves."""
    cotangents = [torch.randn_like(t) for t in expected]
    found += torch.autograd.grad(found, leaves, cotangents)
    expected += torch.autograd.grad(expected, leaves, cotangents)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() <= bound * other.norm().clamp(min=1.0)


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


def test_cells_are_the_final_states_of_the_beginnings() -> None:
    _, x, states, weights = problem("lstm", (4, 2, 3, 5), True)
    y, h_n, c_n, cells = run("lstm", x, states, weights, return_cells=True)
    assert torch.equal(cells[-1], c_n) and torch.equal(y[-1], h_n)
    for t in range(1, 4):
        torch.testing.assert_close(run("lstm", x[:t], states, weights)[2], cells[t - 1], rtol=1e-13, atol=1e-14)


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


@pytest.mark.parametrize("cell", CELLS)
def test_memory_is_checked_and_changes_nothing(cell: str) -> None:
    _, x, states, weights = problem(cell, (3, 2, 3, 5), True)
    results = [run(cell, x, states, weights, memory=memory)[0] for memory in ("store", "recompute")]
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="memory must be one of 'store', 'recompute', got 'less'"):
        run(cell, x, states, weights, memory="less")


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


# What torch.nn has no words for: every variant of spec.py, and options that have to get on with each other.
TOGETHER = (
    CellSpec("lstm", ("elu", 0.7), True, 3, "hard_sigmoid", "softsign", True, cell_clip=1.0, gate_clip=2.0,
             layer_norm=True, zoneout=(0.3, 0.2)),
    CellSpec("lstm", ("thresholded_relu", 0.1), False, peephole=True, coupled=True, layer_norm=True, zoneout=(0, 0.5)),
    CellSpec("lstm", "softplus", proj=2, coupled=True, gate_clip=0.5, zoneout=(0.4, 0.0)),
    CellSpec("gru", ("scaled_tanh", 1.7, 0.6), recurrent_activation=("hard_sigmoid", 1 / 6, 0.5), reset_after=False,
             gate_clip=1.5, zoneout=0.4),
    CellSpec("gru", "linear", False, recurrent_activation=("affine", 0.1, 0.4), layer_norm=True, zoneout=0.2),
    CellSpec("rnn", ("leaky_relu", 0.2), False, gate_clip=3.0, layer_norm=True, zoneout=0.3),
)  # fmt: skip
SPECS = (*variants(), *TOGETHER)
MASKS = ("none", "shared", "gate")
ALL_STEPS = STEP_OPTIONS[-1]
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])

every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def tensors_of(spec: CellSpec, shape: tuple[int, ...], masks: str = "none") -> dict[str, Tensor]:
    """All float tensors of a call, a normalisation's as norm_hh.weight and norm_hh.bias."""
    T, B, I, H = shape  # noqa: E741
    shapes = {"x": (T, B, I), **spec.state_shapes(B, H), **spec.parameters(I, H)}
    if spec.layer_norm:
        norms = {"norm_ih": spec.gates * H, "norm_hh": spec.gates * H, "norm_c": H}
        for name, columns in norms.items():
            if name != "norm_c" or spec.cell == "lstm":
                shapes |= {f"{name}.weight": (columns,), f"{name}.bias": (columns,)}
    if masks != "none":
        own = (spec.gates,) if masks == "gate" else ()
        shapes |= {"input_mask": (*own, B, I), "recurrent_mask": (*own, B, spec.output(H))}
    torch.manual_seed(0)
    return {name: torch.randn(s, dtype=torch.float64, requires_grad=True) for name, s in shapes.items()}


def call(spec: CellSpec, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """The public function, which gives all cells too if it is the LSTM's."""
    arguments: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for name in {name.partition(".")[0] for name in tensors if "." in name}:
        arguments[name] = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if spec.cell == "lstm":
        options["return_cells"] = True
    return getattr(reference, spec.cell)(**arguments, **spec.options, **options)


def layer_norm(value: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return nn.functional.layer_norm(value, value.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])


# torch's own, or the same said otherwise
FORMULAS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "tanh": lambda x, a, b: 2 * torch.special.expit(2 * x) - 1,
    "sigmoid": lambda x, a, b: torch.special.expit(x),
    "relu": lambda x, a, b: nn.functional.threshold(x, 0.0, 0.0),
    "hard_sigmoid": lambda x, a, b: nn.functional.hardtanh(a * x + b, 0.0, 1.0),
    "linear": lambda x, a, b: x,
    "affine": lambda x, a, b: torch.add(b * torch.ones_like(x), x, alpha=a),
    "elu": lambda x, a, b: x.relu() + a * torch.expm1(-(-x).relu()),
    "leaky_relu": lambda x, a, b: nn.functional.leaky_relu(x, a),
    "scaled_tanh": lambda x, a, b: a * (2 * torch.special.expit(2 * b * x) - 1),
    "softplus": lambda x, a, b: torch.logaddexp(x, torch.zeros_like(x)),
    "softsign": lambda x, a, b: nn.functional.softsign(x),
    "thresholded_relu": lambda x, a, b: nn.functional.threshold(x, a, 0.0),
}


def philox_words(seed: int, counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 in Python's integers."""
    word = 2**32
    c0, c1, c2, c3 = counter
    k0, k1 = seed % word, seed // word % word
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b // word ^ c1 ^ k0, b % word, a // word ^ c3 ^ k1, a % word
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return c0, c1, c2, c3


def kept_of(seed: int, t: int, row: int, columns: int, probability: float, word: int) -> Tensor:
    words = [philox_words(seed, (unit, row, t, 0))[word] for unit in range(columns)]
    return torch.tensor([float(w // 2**8 < round(probability * 2**24)) for w in words], dtype=torch.float64)


def by_equations(
    spec: CellSpec, v: dict[str, Tensor], *, lengths: Tensor | None = None, mask: Tensor | None = None,
    reset: Tensor | None = None, seed: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `call` should give: the equations for one step of one row at a time, one gate after the other."""
    T, B, _ = v["x"].shape
    H = v["w_hh"].shape[0] // spec.gates
    place = {gate: k for k, gate in enumerate(spec.gate_names)}

    def of(name: str, gate: str) -> Tensor:
        return v[name][place[gate] * H : (place[gate] + 1) * H]

    def masked(vector: Tensor, name: str, gate: str, row: int) -> Tensor:
        if name not in v:
            return vector
        return v[name][place[gate], row] * vector if v[name].dim() == 3 else v[name][row] * vector

    def products(vector: Tensor, w: str, row: int) -> dict[str, Tensor]:
        mask_name = "input_mask" if w == "ih" else "recurrent_mask"
        parts = [of(f"w_{w}", gate).mv(masked(vector, mask_name, gate, row)) for gate in place]
        if spec.layer_norm:
            parts = layer_norm(torch.cat(parts), v, f"norm_{w}").split(H)
        bias = [of(f"b_{w}", gate) if spec.bias else torch.zeros(H) for gate in place]
        return {gate: part + b for gate, part, b in zip(place, parts, bias, strict=True)}

    def phi(activation: Any, a: Tensor, clip: float | None = spec.gate_clip) -> Tensor:
        a = a if clip is None else nn.functional.hardtanh(a, -clip, clip)
        name, alpha, beta = activation_of(activation)
        return FORMULAS[name](a, alpha, beta)

    def candidate(x: Tensor, row: int, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        xs, hs = products(x, "ih", row), products(h, "hh", row)
        sums = {gate: xs[gate] + hs[gate] for gate in place}
        if spec.cell == "rnn":
            return (phi(spec.activation, sums["h"]),)
        if spec.cell == "gru":
            r, z = (phi(spec.recurrent_activation, sums[gate]) for gate in "rz")
            inner = r * hs["n"]
            if not spec.reset_after:
                inner = of("w_hh", "n").mv(masked(r * h, "recurrent_mask", "n", row))
                inner = inner + of("b_hh", "n") if spec.bias else inner
            n = phi(spec.activation, xs["n"] + inner)
            return (n + z * (h - n),)
        peephole = dict(zip(spec.peepholes, v.get("peephole", ()), strict=True))
        i, f = (phi(spec.recurrent_activation, sums.get(k, 0 * c) + peephole.get(k, 0) * c) for k in "if")
        c = (1 - i if spec.coupled else f) * c + i * phi(spec.activation, sums["g"])
        c = c if spec.cell_clip is None else nn.functional.hardtanh(c, -spec.cell_clip, spec.cell_clip)
        o = phi(spec.recurrent_activation, sums["o"] + peephole.get("o", 0) * c)  # c not yet normalised
        c = layer_norm(c, v, "norm_c") if spec.layer_norm else c
        h = o * phi(spec.output_phi, c, None)
        return (v["w_hr"].mv(h) if spec.proj else h), c

    rows = []
    for row in range(B):
        state = [v[name][row] for name in spec.states]
        outputs = [[torch.zeros_like(s)] * T for s in state]
        end = T if lengths is None else max(0, min(T, int(lengths[row])))
        for t in reversed(range(end)) if reverse else range(end):
            if reset is not None and reset[t, row]:
                state = [torch.zeros_like(s) for s in state]
            if mask is not None and not mask[t, row]:
                continue
            new = candidate(v["x"][t, row], row, *state, *[None] * (2 - len(state)))
            for k, p in enumerate(spec.zoneout[: len(state)]):
                drawn = p if seed is None else kept_of(int(seed), t, row, len(state[k]), p, k)
                state[k] = outputs[k][t] = drawn * state[k] + (1 - drawn) * new[k]
        rows.append([*(torch.stack(o) for o in outputs), *state])
    found = [torch.stack(r, dim=-2) for r in zip(*rows, strict=True)]
    return (found[0], found[2], found[3], found[1]) if spec.cell == "lstm" else tuple(found)


@pytest.mark.parametrize(
    ("masks", "options"),
    [
        ("none", {"reverse": True}),
        ("none", {"seed": SEED, "reverse": True}),
        ("shared", {"seed": SEED[0], "reverse": True, **ALL_STEPS}),
        ("gate", {"seed": -SEED, **ALL_STEPS}),
        ("gate", ALL_STEPS),
    ],
    ids=["reverse", "reverse-seed", "shared-steps-reverse-seed", "gate-steps-seed", "gate-steps"],
)
@every_spec
def test_by_equations(spec: CellSpec, masks: str, options: dict[str, Any]) -> None:
    tensors = tensors_of(spec, (5, 6, 3, 4), masks)
    assert_same(call(spec, tensors, **options), by_equations(spec, tensors, **options), list(tensors.values()))


@pytest.mark.parametrize("masks", ["shared", "gate"])
@every_spec
def test_every_derivative(spec: CellSpec, masks: str) -> None:
    """By every float tensor; zoneout by a drawn mask with one sort of masks, by the expectation with the other."""
    tensors = tensors_of(spec, (3, 2, 2, 4), masks)
    steps = {k: v[:2] if k == "lengths" else v[:3, :2] for k, v in ALL_STEPS.items()} if masks == "gate" else {}
    options = {"seed": SEED if masks == "gate" else None, "reverse": masks == "gate", **steps}

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        return call(spec, dict(zip(tensors, args, strict=True)), **options)

    assert torch.autograd.gradcheck(function, list(tensors.values()))


@pytest.mark.parametrize("spec", TOGETHER, ids=str)
def test_second_derivatives(spec: CellSpec) -> None:
    tensors = tensors_of(spec, (3, 2, 2, 4), "gate")

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        return call(spec, dict(zip(tensors, args, strict=True)), seed=SEED)

    assert torch.autograd.gradgradcheck(function, list(tensors.values()), fast_mode=True)


@every_spec
def test_sequence_is_the_same_from_within(spec: CellSpec) -> None:
    """The input's part worked out before, what else the cell has as rows."""
    v = tensors_of(spec, (5, 6, 3, 4), "gate")
    x = torch.cat([
        nn.functional.linear(v["x"] * m, w) for m, w in zip(v["input_mask"], v["w_ih"].split(4), strict=True)
    ], dim=-1)  # fmt: skip
    x = layer_norm(x, v, "norm_ih") if spec.layer_norm else x
    x = x + v["b_ih"] if spec.bias else x
    b_hh = v.get("b_hh")
    rows = [v["peephole"]] if spec.peephole else []
    if spec.layer_norm:
        rows.append(v["norm_hh.weight"].view(spec.gates, 4))
        b_hh = v["norm_hh.bias"] if b_hh is None else b_hh + v["norm_hh.bias"]
        rows += [v[f"norm_c.{name}"][None] for name in ("weight", "bias") if spec.cell == "lstm"]
    params = torch.cat(rows) if rows else None
    assert len(spec.rows) == (0 if params is None else len(params))
    found = reference.sequence(
        x, v["h0"], v.get("c0"), None, v["w_hh"], None, b_hh, v.get("w_hr"), params, v["recurrent_mask"],
        *ALL_STEPS.values(), SEED, spec=replace(spec, bias=b_hh is not None), reverse=True, return_cells=True,
    )  # fmt: skip
    assert [tensor is None for tensor in found] == [False, False] + [spec.cell != "lstm"] * 2
    expected = call(spec, v, seed=SEED, reverse=True, **ALL_STEPS)
    for mine, other in zip(found[: len(expected)], expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_sequence_takes_the_weights_of_the_input_too(cell: str) -> None:
    spec = CellSpec(cell)
    v = tensors_of(spec, (5, 6, 3, 4))
    found = reference.sequence(
        v["x"], v["h0"], v.get("c0"), v["w_ih"], v["w_hh"], v["b_ih"], v["b_hh"], None, None, None,
        *ALL_STEPS.values(), None, spec=spec, reverse=False, return_cells=False,
    )  # fmt: skip
    assert found[3] is None
    expected = call(spec, v, **ALL_STEPS)[: 1 + len(spec.states)]
    assert all(torch.equal(a, b) for a, b in zip(found[: len(expected)], expected, strict=True))


# Options that torch.nn's own layers can be made to say.


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


def test_zoneout_mixes_normalised_cells() -> None:
    """One step: what is not kept is LN(c), kept or mixed with is the state as it was carried."""
    v = tensors_of(CellSpec("lstm", layer_norm=True), (1, 2, 3, 4))
    old, new = v["c0"], call(CellSpec("lstm", layer_norm=True), v)[2]
    back = (new - v["norm_c.bias"]) / v["norm_c.weight"]
    torch.testing.assert_close(back.mean(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    spec = CellSpec("lstm", layer_norm=True, zoneout=(0.0, 0.4))
    torch.testing.assert_close(call(spec, v)[2], 0.4 * old + 0.6 * new, rtol=1e-13, atol=1e-14)
    drawn = call(spec, v, seed=SEED)[2]
    kept = drawn == old
    assert kept.any() and not kept.all() and torch.equal(drawn, torch.where(kept, old, new))


def test_norms_go_together() -> None:
    v = tensors_of(CellSpec("lstm", layer_norm=True), (2, 2, 3, 4))
    del v["norm_c.weight"], v["norm_c.bias"]
    with pytest.raises(ValueError, match=r"norm_ih, norm_hh, norm_c go together.*got no norm_c"):
        call(CellSpec("lstm"), v)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_wrong_options(cell: str) -> None:
    v = tensors_of(CellSpec(cell), (2, 2, 3, 4))
    function = getattr(reference, cell)
    for name, value in {"activation": "gelu", "gate_clip": -1.0, "zoneout": 1.5}.items():
        with pytest.raises(ValueError, match=f"^{name} must be "):
            function(**v, **{name: value})


# Activations, with numbers other than the defaults where they have any: ONNX's formulas.
SCALARS: dict[Any, Callable[[float], float]] = {
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "hard_sigmoid": lambda x: max(0.0, min(1.0, 0.2 * x + 0.5)),
    ("hard_sigmoid", 1 / 6, 0.5): lambda x: max(0.0, min(1.0, x / 6 + 0.5)),
    "linear": lambda x: x,
    "affine": lambda x: x,
    ("affine", 2.0, -1.0): lambda x: 2 * x - 1,
    "elu": lambda x: x if x >= 0 else math.exp(x) - 1,
    ("elu", 0.3): lambda x: x if x >= 0 else 0.3 * (math.exp(x) - 1),
    "leaky_relu": lambda x: x if x >= 0 else 0.01 * x,
    ("leaky_relu", 0.3): lambda x: x if x >= 0 else 0.3 * x,
    "scaled_tanh": math.tanh,
    ("scaled_tanh", 1.7159, 2 / 3): lambda x: 1.7159 * math.tanh(2 / 3 * x),
    "softplus": lambda x: math.log(math.exp(x) + 1),
    "softsign": lambda x: x / (1 + abs(x)),
    "thresholded_relu": lambda x: x if x > 1 else 0.0,
    ("thresholded_relu", 0.25): lambda x: x if x > 0.25 else 0.0,
}
POINTS = [-7.3, -3.1, -2.0, -0.4, 0.0, 0.2, 0.25, 0.3, 0.9, 1.0, 1.4, 2.9, 4.0, 17.0, 25.0, 30.0]


def test_every_activation_has_its_formula() -> None:
    assert {activation_of(a)[0] for a in SCALARS} == set(ACTIVATIONS) == set(FORMULAS)


@pytest.mark.parametrize("activation", SCALARS, ids=str)
def test_activations(activation: Any) -> None:
    x = torch.tensor(POINTS, dtype=torch.float64)
    expected = torch.tensor([SCALARS[activation](point) for point in POINTS], dtype=torch.float64)
    torch.testing.assert_close(reference.activate(x, activation), expected, rtol=1e-13, atol=1e-15)
    name, alpha, beta = activation_of(activation)
    torch.testing.assert_close(FORMULAS[name](x, alpha, beta), expected, rtol=1e-13, atol=1e-15)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = reference.activate(x.to(dtype), activation)
        assert found.dtype == dtype
        # two roundings where the value is large, more of 1 where it is a difference
        torch.testing.assert_close(
            found.double(), reference.activate(x.to(dtype).double(), activation),
            rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps,
        )  # fmt: skip


@pytest.mark.parametrize("activation", SCALARS, ids=str)
def test_derivatives_of_activations(activation: Any) -> None:
    """Three of them, off the kinks; finite far out; NaN stays NaN."""
    x = torch.tensor(POINTS, dtype=torch.float64).add(0.01).requires_grad_()

    def slope(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda point: reference.activate(point, activation)))(x)

    assert torch.autograd.gradcheck(lambda x: reference.activate(x, activation), x)
    assert torch.autograd.gradcheck(slope, x)
    if activation_of(activation)[0] in ("tanh", "sigmoid", "elu", "scaled_tanh", "softplus", "softsign"):
        assert torch.autograd.gradgradcheck(slope, x)
    else:  # pieces of lines
        assert not torch.autograd.functional.vjp(slope, x, torch.ones_like(x))[1].any()
    far = torch.tensor([-800.0, 800.0], dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(reference.activate(far, activation).sum(), far, create_graph=True)[0]
    assert first.isfinite().all()
    if first.requires_grad:
        assert torch.autograd.grad(first.sum(), far)[0].isfinite().all()
    assert reference.activate(torch.tensor(torch.nan), activation).isnan()


@pytest.mark.parametrize(
    ("activation", "kink", "slope"),
    [
        ("relu", 0.0, 0.0), ("leaky_relu", 0.0, 0.01), (("elu", 0.3), 0.0, 0.3), ("thresholded_relu", 1.0, 0.0),
        ("hard_sigmoid", 2.5, 0.2), ("hard_sigmoid", -2.5, 0.2), ("softsign", 0.0, 1.0),
    ],
)  # fmt: skip
def test_slopes_at_kinks(activation: Any, kink: float, slope: float) -> None:
    x = torch.tensor(kink, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(reference.activate(x, activation), x)[0].item() == slope


# Which elements zoneout keeps.

# of Random123: counter, key, words
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    seed = key[1] * 2**32 + key[0]
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    found = philox(signed, tuple(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in found) == words == philox_words(seed, counter)


@triton.jit
def draw(
    words_ptr,  # [rows, BLOCK, 4]
    seed_ptr,
    t,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    units = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), units, row, t, 0)
    words_ptr += (row * BLOCK + units) * 4
    tl.store(words_ptr, w0.to(tl.int64))
    tl.store(words_ptr + 1, w1.to(tl.int64))
    tl.store(words_ptr + 2, w2.to(tl.int64))
    tl.store(words_ptr + 3, w3.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
def test_philox_is_tritons(seed: int) -> None:
    words = torch.full((3, 1024, 4), -1)
    draw[(3,)](words, torch.tensor([seed]), 1234567, BLOCK=1024)
    units, rows = torch.arange(1024), torch.arange(3)[:, None]
    assert torch.equal(torch.stack(philox(torch.tensor(seed), (units, rows, 1234567, 0)), dim=-1), words)


def test_kept_elements() -> None:
    seed, probability = torch.tensor(3), 0.3
    t = torch.arange(4)[:, None, None]
    h, c = (reference.kept(seed, t, 64, 257, probability, word) for word in (0, 1))
    assert h.shape == (4, 64, 257) and h.dtype == torch.bool
    # as often as they should, within five standard deviations; of neighbours and of the two states, both as often
    for both, p in ((h, 0.3), (c, 0.3), (h & c, 0.09), (h[1:] & h[:-1], 0.09), (h[:, 1:] & h[:, :-1], 0.09),
                    (h[..., 1:] & h[..., :-1], 0.09)):  # fmt: skip
        assert abs(both.double().mean().item() - p) < 5 * (p * (1 - p) / both.numel()) ** 0.5
    assert not torch.equal(h, reference.kept(torch.tensor(4), t, 64, 257, probability, 0))
    # a draw depends on its place and nothing else
    assert torch.equal(reference.kept(seed[None], 2, 5, 7, probability, 0), h[2, :5, :7])
    # of the same words the larger probability keeps more
    assert (reference.kept(seed, t, 64, 257, 0.5, 0) >= h).all()
    assert reference.kept(seed, t, 64, 257, 1.0, 0).all() and not reference.kept(seed, t, 64, 257, 0.0, 0).any()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_zoneout_draws_what_it_expects(cell: str) -> None:
    """One step, linear in what is kept: its mean over many seeds, and its values those of either state."""
    spec = CellSpec(cell, zoneout=(0.3, 0.2) if cell == "lstm" else 0.3)
    v = tensors_of(spec, (1, 2, 3, 4))
    seeds = torch.arange(4000)
    drawn = torch.func.vmap(lambda seed: call(spec, v, seed=seed)[1 : 1 + len(spec.states)])(seeds)
    expected = call(spec, v)[1:]
    candidates = call(CellSpec(cell), v)[1:]
    for name, many, mean, new, p in zip(spec.states, drawn, expected, candidates, spec.zoneout, strict=False):
        held = many == v[name]
        assert (held | (many == new)).all()
        deviation = (v[name] - new).abs() * (p * (1 - p) / len(seeds)) ** 0.5
        assert ((many.mean(0) - mean).abs() <= 5 * deviation).all()
        # every element of every row of its own accord
        assert (abs(held.double().mean(0) - p) < 5 * (p * (1 - p) / len(seeds)) ** 0.5).all()


def test_zoneout_of_everything_and_of_nothing() -> None:
    v = tensors_of(CellSpec("lstm", zoneout=(1.0, 1.0)), (3, 2, 3, 4))
    for seed in (None, SEED):
        y, h_n, c_n, cells = call(CellSpec("lstm", zoneout=(1.0, 1.0)), v, seed=seed)
        assert torch.equal(y, v["h0"].expand(3, -1, -1)) and torch.equal(h_n, v["h0"])
        assert torch.equal(cells, v["c0"].expand(3, -1, -1)) and torch.equal(c_n, v["c0"])
    plain = call(CellSpec("lstm"), v)
    assert all(torch.equal(a, b) for a, b in zip(call(CellSpec("lstm"), v, seed=SEED), plain, strict=True))


def test_the_seed_alone_decides() -> None:
    spec = CellSpec("gru", zoneout=0.3)
    v = tensors_of(spec, (5, 3, 3, 4))
    first, again, other = (call(spec, v, seed=torch.tensor(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


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


@every_spec
def test_options_keep_the_dtype(spec: CellSpec) -> None:
    v = tensors_of(spec, (3, 2, 3, 4), "gate")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rounded = {name: tensor.detach().to(dtype) for name, tensor in v.items()}
        exact = call(spec, {name: tensor.double() for name, tensor in rounded.items()}, seed=SEED)
        for mine, other in zip(call(spec, rounded, seed=SEED), exact, strict=True):
            assert mine.dtype == dtype
            # a few roundings of the storage dtype
            assert (mine.double() - other).norm() <= 16 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("spec", TOGETHER, ids=str)
def test_transforms_of_options(spec: CellSpec) -> None:
    """Forward mode against backward mode, once and twice; vmap over seeds; shapes alone."""
    v = {name: tensor.detach() for name, tensor in tensors_of(spec, (3, 2, 2, 4), "gate").items()}

    def total(x: Tensor, seed: Tensor) -> Tensor:
        return call(spec, v | {"x": x}, seed=seed, lengths=torch.tensor([2, 3]))[0].sum(0)

    forward, backward = torch.func.jacfwd, torch.func.jacrev
    torch.testing.assert_close(forward(total)(v["x"], SEED), backward(total)(v["x"], SEED), rtol=1e-12, atol=1e-12)
    over, under = forward(backward(total))(v["x"], SEED), backward(backward(total))(v["x"], SEED)
    torch.testing.assert_close(over, under, rtol=1e-11, atol=1e-11)
    seeds = torch.arange(3)
    each = torch.stack([total(v["x"], seed) for seed in seeds])
    torch.testing.assert_close(torch.func.vmap(total, (None, 0))(v["x"], seeds), each, rtol=1e-12, atol=1e-13)
    shapes = call(spec, {name: tensor.to("meta") for name, tensor in v.items()}, seed=SEED.to("meta"))
    assert [t.shape for t in shapes] == [t.shape for t in call(spec, v, seed=SEED)]
