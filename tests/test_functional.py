"""What the functions' arguments mean: lengths, mask, reset, return_cells, w_hr, memory. On ATen and on kernels.

Each meaning is told with the function itself on less: shorter sequences, single rows, two halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from concurrency import concurrent
from numerics import CELLS, TOLERANCE, problem, relative_error
from sequence_cases import Case
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton as lt
from lstm_triton import calls, host, launch
from lstm_triton.spec import RESET, VALID

pytestmark = pytest.mark.both

ENGINES = ("reference", "local", "step") if launch.INTERPRETED else ("reference", "auto")
#: Every cell on every engine is test_kernels' and test_autograd's matter.
ON_KERNELS = [("lstm", "local"), ("lstm", "step"), ("gru", "local"), ("rnn", "step")]
#: With waits between programs: these run concurrently.
WAITING = [("lstm", "resident"), ("gru", "streamed")] if launch.INTERPRETED else []
CASES = [(c, "reference") for c in CELLS] + (ON_KERNELS if launch.INTERPRETED else [(c, "auto") for c in CELLS])
T, B, H, P = 5, 4, 12, 6
#: None of its steps, all of them, one, more than there are.
LENGTHS = torch.tensor([0, 5, 1, 7])
WITHIN = torch.arange(T)[:, None] < LENGTHS
MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1]]).bool()
RESETS = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()


@contextmanager
def run_on(engine: str) -> Iterator[dict[str, Any]]:
    """The arguments that choose an engine; on kernels a tile of which the layer takes two, but for the slow "step"."""
    arguments: dict[str, Any] = {"engine": engine}
    if engine not in ("auto", "reference"):
        arguments["tile"] = (16, 16 if engine == "step" else 8)
    if engine in ("resident", "streamed"):
        with concurrent(0) as schedule:
            yield arguments
        assert not schedule.races, schedule.describe()
    else:
        yield arguments


def states_of(cell: str) -> int:
    return 2 if cell == "lstm" else 1


def call(cell: str, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    return getattr(lt.functional, cell)(*inputs, **options)


def with_gradients(cell: str, inputs: list[Tensor], engine: str, **options: Any) -> list[Tensor]:
    """Outputs, and gradients by all inputs and by w_hr, for output gradients drawn from each output's shape."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    leaves = list(inputs)
    if "w_hr" in options:
        options["w_hr"] = options["w_hr"].detach().clone().requires_grad_()
        leaves.append(options["w_hr"])
    generator = torch.Generator().manual_seed(1)
    with run_on(engine) as chosen:
        outputs = call(cell, inputs, **options, **chosen)
        cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def assert_close(found: Any, wanted: Any, dtype: torch.dtype = torch.float64) -> None:
    for ours, other in zip(found, wanted, strict=True):
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
        assert relative_error(ours, other) <= TOLERANCE[dtype]


def draw(cell: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return problem(cell, T, B, H, features=3, dtype=dtype)


def projected() -> tuple[list[Tensor], Tensor]:
    *inputs, w_hr = Case("lstm", projected=True).inputs(T, B, H, 3)
    return inputs, w_hr


@pytest.mark.parametrize(("cell", "engine"), [*CASES, *WAITING])
def test_lengths_are_a_mask(cell: str, engine: str) -> None:
    inputs = draw(cell)
    by_lengths = with_gradients(cell, inputs, engine, lengths=LENGTHS, reverse=True)
    assert_close(by_lengths, with_gradients(cell, inputs, engine, mask=WITHIN, reverse=True))
    y, *last = by_lengths[: 1 + states_of(cell)]
    assert not y[~WITHIN].any()
    # a row without a step: as it began
    assert all(torch.equal(s[0], s0[0]) for s, s0 in zip(last, inputs[1:], strict=False))


@pytest.mark.parametrize(("cell", "engine"), CASES)
def test_skipped_steps_might_as_well_not_be_there(cell: str, engine: str) -> None:
    """Each row on its own with the steps that count alone."""
    x, *rest = draw(cell)
    states, weights = rest[: states_of(cell)], rest[states_of(cell) :]
    with run_on(engine) as chosen:
        y, *last = call(cell, [x, *rest], mask=MASK, **chosen)
        assert not y[~MASK].any()
        for row in (1, 3):
            steps, one = MASK[:, row], slice(row, row + 1)
            y_row, *last_row = call(cell, [x[steps][:, one], *(s[one] for s in states), *weights], **chosen)
            assert_close([y[steps][:, one], *(s[one] for s in last)], [y_row, *last_row])
    # row 2 has no step that counts
    assert all(torch.equal(s[2], s0[2]) for s, s0 in zip(last, states, strict=True))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("cell", "engine"), CASES)
def test_a_reset_parts_the_sequence(cell: str, engine: str, reverse: bool) -> None:
    x, *rest = draw(cell)
    states, weights = rest[: states_of(cell)], rest[states_of(cell) :]
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    with run_on(engine) as chosen:
        whole = call(cell, [x, *rest], reset=reset, reverse=reverse, **chosen)
        cut = 3 if reverse else 2
        parts = (x[cut:], x[:cut]) if reverse else (x[:cut], x[cut:])
        y_1, *_ = call(cell, [parts[0], *states, *weights], reverse=reverse, **chosen)
        y_2, *last = call(cell, [parts[1], *[None] * len(states), *weights], reverse=reverse, **chosen)
    assert_close(whole, [torch.cat((y_2, y_1) if reverse else (y_1, y_2)), *last])


@pytest.mark.parametrize("engine", ENGINES)
def test_resets_at_skipped_steps_and_past_the_end(engine: str) -> None:
    """The state is zeroed at a step that mask skips, and not past a row's length."""
    inputs = draw("gru")
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    mask = torch.ones(T, B, dtype=torch.bool)
    mask[3:] = False
    lengths = torch.tensor([5, 4, 3, 2])
    with run_on(engine) as chosen:
        _, h_n = call("gru", inputs, mask=mask, reset=reset, lengths=lengths, **chosen)
        _, plain = call("gru", inputs, mask=mask, lengths=lengths, **chosen)
    assert not h_n[:2].any()
    assert torch.equal(h_n[2:], plain[2:])


@pytest.mark.parametrize("engine", ENGINES)
def test_cells_are_the_final_states_of_the_beginnings(engine: str) -> None:
    x, *rest = draw("lstm")
    with run_on(engine) as chosen:
        y, h_n, c_n, cells = call("lstm", [x, *rest], return_cells=True, **chosen)
        for t in (1, 3):
            assert_close([cells[t - 1]], [call("lstm", [x[:t], *rest], **chosen)[2]])
        masked = call("lstm", [x, *rest], return_cells=True, mask=MASK, **chosen)[3]
    assert torch.equal(cells[-1], c_n) and torch.equal(y[-1], h_n)
    assert not masked[~MASK].any() and masked[MASK].all()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("engine", ENGINES)
def test_projection_as_torch(engine: str, reverse: bool) -> None:
    """Outputs and all gradients of torch.nn.LSTM(proj_size=P)."""
    (x, h0, c0, *weights), w_hr = projected()
    layer = nn.LSTM(3, H, proj_size=P, dtype=torch.float64)
    with torch.no_grad():
        for parameter, weight in zip(layer.parameters(), [*weights, w_hr], strict=True):
            parameter.copy_(weight)
    leaves = [t.requires_grad_() for t in (x, h0, c0)]
    y, (h_n, c_n) = layer(x.flip(0) if reverse else x, (h0[None], c0[None]))
    wanted = [y.flip(0) if reverse else y, h_n[0], c_n[0]]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in wanted]
    wanted += torch.autograd.grad(wanted, [*leaves, *layer.parameters()], cotangents)
    assert_close(with_gradients("lstm", [x, h0, c0, *weights], engine, w_hr=w_hr, reverse=reverse), wanted)


@pytest.mark.parametrize(
    ("cell", "engine", "options"),
    [(*case, "lengths-reset") for case in [*CASES, *WAITING]]
    + [("lstm", engine, options) for engine in ENGINES for options in ("lengths", "mask-cells")],
)
def test_nothing_comes_of_steps_that_do_not_count(cell: str, engine: str, options: str) -> None:
    """NaN in x there and in the gradients by what is returned there: the bits of everything else stay."""
    own: dict[str, Any] = {
        "lengths": {"lengths": LENGTHS},
        "lengths-reset": {"lengths": LENGTHS, "reset": RESETS},
        "mask-cells": {"mask": MASK, **({"return_cells": True} if cell == "lstm" else {})},
    }[options]
    skipped = ~(WITHIN if "lengths" in own else MASK)
    generator = torch.Generator().manual_seed(1)
    x, *rest = draw(cell, torch.float32)
    results = []
    for filler in (0.0, torch.nan):
        leaves = [t.clone().requires_grad_() for t in (x.masked_fill(skipped[..., None], filler), *rest)]
        with run_on(engine) as chosen:
            outputs = call(cell, leaves, **own, **chosen)
            generator.manual_seed(1)
            cotangents = [torch.randn(t.shape, generator=generator) for t in outputs]
            for sequence in (cotangents[0], *cotangents[3:]):
                sequence.masked_fill_(skipped[..., None], filler)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not results[1][len(outputs)][skipped].any()


@pytest.mark.parametrize(("cell", "engine"), CASES)
def test_a_row_with_nan_spoils_no_other(cell: str, engine: str) -> None:
    inputs = draw(cell, torch.float32)
    spoilt = [inputs[0].clone(), *inputs[1:]]
    spoilt[0][2, 1] = torch.nan
    with run_on(engine) as chosen:
        clean = call(cell, inputs, lengths=LENGTHS, reset=RESETS, **chosen)
        found = call(cell, spoilt, lengths=LENGTHS, reset=RESETS, **chosen)
    rows = [0, 2, 3]
    assert all(torch.equal(a[..., rows, :], b[..., rows, :]) for a, b in zip(found, clean, strict=True))
    # and the row itself is sound again after its state was zeroed
    assert found[0][2, 1].isnan().all() and found[0][3:, 1].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # in what the interpreter computes and drops
@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_state_is_held_and_spoils_no_gradient(engine: str) -> None:
    inputs = draw("lstm")
    x, h0, c0 = (t.clone().requires_grad_() for t in inputs[:3])
    weights = [t.clone().requires_grad_() for t in inputs[3:]]
    with torch.no_grad():
        h0[0] = c0[0] = torch.inf
    y, h_n, c_n = call("lstm", [x, h0, c0, *weights], lengths=LENGTHS, engine=engine)
    assert h_n[0].isinf().all() and c_n[0].isinf().all() and y.isfinite().all()
    gradients = torch.autograd.grad(sum(t.square().mean() for t in (y, h_n[1:], c_n[1:])), [x, h0, c0, *weights])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_lengths_of_any_integer_dtype(engine: str) -> None:
    inputs = draw("rnn")
    with run_on(engine) as chosen:
        wanted = call("rnn", inputs, lengths=LENGTHS, **chosen)
        for dtype in calls.INTEGERS:
            found = call("rnn", inputs, lengths=LENGTHS.to(dtype), **chosen)
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)), dtype
        negative = call("rnn", inputs, lengths=LENGTHS - 3, **chosen)
        clamped = call("rnn", inputs, lengths=torch.tensor([0, 2, 0, 4]), **chosen)
    assert all(torch.equal(*pair) for pair in zip(negative, clamped, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_of_any_layout(engine: str) -> None:
    inputs = draw("rnn")
    row, one = MASK[:, 1:2], RESETS[:1]
    options = {"mask": row.contiguous().t().contiguous().t().expand(T, B), "reset": one.expand(T, B)}
    options["lengths"] = torch.stack((LENGTHS, LENGTHS), -1)[:, 0]
    assert not any(t.is_contiguous() for t in options.values())
    with run_on(engine) as chosen:
        found = call("rnn", inputs, **options, **chosen)
        wanted = call("rnn", inputs, **{name: t.contiguous() for name, t in options.items()}, **chosen)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_recomputing_gives_what_storing_gives(engine: str) -> None:
    inputs, w_hr = projected()
    options = {"w_hr": w_hr, "mask": MASK, "reset": RESETS, "return_cells": True}
    stored = with_gradients("lstm", inputs, engine, **options)
    assert_close(with_gradients("lstm", inputs, engine, **options, memory="recompute"), stored)


def test_flags() -> None:
    flags = calls.step_flags
    assert flags(None, None) is None
    assert flags(MASK, None).tolist() == (VALID * MASK.long()).tolist()
    assert flags(None, RESETS).tolist() == (VALID + RESET * RESETS.long()).tolist()
    both = flags(MASK, RESETS)
    assert both.tolist() == (VALID * MASK.long() + RESET * RESETS.long()).tolist()
    assert both.dtype == torch.uint8


@pytest.mark.parametrize("options", ["lengths", "mask", "reset"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_rows_and_no_steps(cell: str, options: str) -> None:
    """Without rows results without elements, without steps torch's error, as without the option."""
    inputs = draw(cell)
    given = {"lengths": LENGTHS, "mask": MASK, "reset": RESETS}[options]
    n = states_of(cell)
    leaves = [inputs[0][:, :0], *(s[:0] for s in inputs[1 : 1 + n]), *inputs[1 + n :]]
    leaves = [t.clone().requires_grad_() for t in leaves]
    outputs = call(cell, leaves, **{options: given[..., :0]})
    assert [t.shape for t in outputs] == [(T, 0, H), *[(0, H)] * n]
    assert not any(g.any() for g in torch.autograd.grad(sum(t.sum() for t in outputs), leaves))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        call(cell, [inputs[0][:0], *inputs[1:]], **{options: given if options == "lengths" else given[:0]})


def test_autocast_takes_the_projection_along() -> None:
    inputs, w_hr = projected()
    inputs = [t.float() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients("lstm", inputs, ENGINES[-1], w_hr=w_hr.float(), lengths=LENGTHS, return_cells=True)
    assert [t.dtype for t in found] == [torch.bfloat16] * 4 + [torch.float32] * 8
    wanted = with_gradients("lstm", inputs, "reference", w_hr=w_hr.float(), lengths=LENGTHS, return_cells=True)
    assert max(relative_error(*pair) for pair in zip(found, wanted, strict=True)) <= TOLERANCE[torch.bfloat16]


def test_plans_take_the_new_arguments() -> None:
    inputs, w_hr = projected()
    meta = [t.to("meta") for t in inputs]
    options = {"w_hr": w_hr.to("meta"), "lengths": LENGTHS.to("meta"), "mask": MASK.to("meta"), "memory": "recompute"}
    plan = lt.plan("lstm", *meta, **options, return_cells=True, target="H200")
    assert (plan.spec.proj, plan.T, plan.B, plan.H) == (P, T, B, H)
    with pytest.raises(ValueError, match="lengths must have an integer dtype"):
        lt.plan("lstm", *meta, **options | {"lengths": torch.empty(B, device="meta")}, target="H200")
    with pytest.raises(ValueError, match="memory must be one of"):
        lt.plan("lstm", *meta, **options | {"memory": ""}, target="H200")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": [1, 2, 3, 4]}, TypeError, "lengths must be a Tensor or None, got list"),
        ({"lengths": LENGTHS.float()}, ValueError, "lengths must have an integer dtype, got torch.float32"),
        ({"lengths": LENGTHS > 0}, ValueError, "lengths must have an integer dtype, got torch.bool"),
        ({"lengths": LENGTHS[:3]}, ValueError, r"lengths must have shape \(4,\) .*T=5, B=4.*got \(3,\)"),
        ({"lengths": LENGTHS[None]}, ValueError, r"lengths must have shape \(4,\) .*got \(1, 4\)"),
        ({"lengths": LENGTHS.to("meta")}, ValueError, "lengths must be on x's device cpu, got meta"),
        ({"mask": MASK.t()}, ValueError, r"mask must have shape \(5, 4\) .*got \(4, 5\)"),
        ({"mask": MASK.to(torch.uint8)}, ValueError, "mask must have dtype torch.bool, got torch.uint8"),
        ({"mask": MASK.to("meta")}, ValueError, "mask must be on x's device cpu, got meta"),
        ({"mask": True}, TypeError, "mask must be a Tensor or None, got bool"),
        ({"reset": RESETS[0]}, ValueError, r"reset must have shape \(5, 4\) .*got \(4,\)"),
        ({"reset": RESETS.float()}, ValueError, "reset must have dtype torch.bool, got torch.float32"),
        ({"reset": RESETS.to("meta")}, ValueError, "reset must be on x's device cpu, got meta"),
        ({"w_hr": "identity"}, TypeError, "w_hr must be a Tensor, got str"),
        ({"w_hr": torch.zeros(H)}, ValueError, r"w_hr must have 2 dimensions, got shape \(12,\)"),
        ({"w_hr": torch.zeros(P, H).to_sparse()}, ValueError, "w_hr must be a dense tensor"),
        ({"w_hr": torch.zeros(H, H)}, ValueError, r"w_hr must be \[P, H\] with 0 < P < H, got shape \(12, 12\)"),
        ({"w_hr": torch.zeros(0, H)}, ValueError, r"w_hr must be \[P, H\] with 0 < P < H, got shape \(0, 12\)"),
        ({"w_hr": torch.zeros(P, H)}, ValueError, r"w_hr must have x's dtype torch.float64, got torch.float32"),
        ({"w_hr": torch.zeros(P, 2 * H)}, ValueError, r"w_hr must have shape \(6, 12\) .*H=12, P=6.*got \(6, 24\)"),
        ({"w_hh": torch.zeros(4 * H, H)}, ValueError, r"w_hh must have shape \(48, 6\) .*P=6.*got \(48, 12\)"),
        ({"h0": torch.zeros(B, H)}, ValueError, r"h0 must have shape \(4, 6\) .*got \(4, 12\)"),
        ({"c0": torch.zeros(B, P)}, ValueError, r"c0 must have shape \(4, 12\) .*got \(4, 6\)"),
        ({"memory": "less"}, ValueError, "memory must be one of 'store', 'recompute', got 'less'"),
        ({"return_cells": 1}, TypeError, "return_cells must be True or False, got 1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs, w_hr = projected()
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")
    given = dict(zip(names, inputs, strict=True)) | {"w_hr": w_hr} | change
    with pytest.raises(error, match=message):
        lt.functional.lstm(**given)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
@pytest.mark.parametrize("name", ["w_hr", "return_cells"])
def test_what_the_lstm_alone_takes(cell: str, name: str) -> None:
    for module in (lt.functional, lt.reference):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            getattr(module, cell)(*draw(cell), **{name: None})


# Without a kernel: torch's own layers.

OPTIONS = [
    {},
    {"lengths": LENGTHS},
    {"lengths": torch.zeros(B, dtype=torch.long)},
    {"mask": MASK},
    {"reset": RESETS},
    {"lengths": LENGTHS, "mask": MASK, "reset": RESETS},
]


@pytest.mark.native
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("case", [Case("lstm"), Case("lstm", projected=True), Case("gru"), Case("rnn")], ids=str)
def test_the_host_agrees_with_reference(case: Case, options: dict[str, Tensor], reverse: bool) -> None:
    inputs = case.inputs(T, B, H, 3)
    own: dict[str, Any] = {"w_hr": inputs.pop()} if case.projected else {}
    for bias in (True, False):
        given = inputs if bias else inputs[:-2]
        results = [
            with_gradients(case.cell, given, engine, **options, **own, reverse=reverse)
            for engine in ("auto", "reference")
        ]
        assert_close(*results)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_give_torchs_bits(cell: str, dtype: torch.dtype) -> None:
    """Those of torch.nn's layer on a packed sequence. Its other direction multiplies the rows in another order."""
    torch.manual_seed(0)
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell](3, H, bidirectional=True, dtype=dtype)
    x, lengths = torch.randn(T, B, 3, dtype=dtype), torch.tensor([3, 5, 1, 4])
    packed, final = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    wanted, _ = pad_packed_sequence(packed)
    weights = list(layer.parameters())
    for i, reverse in enumerate((False, True)):
        inputs = [x, *[None] * states_of(cell), *weights[4 * i : 4 * i + 4]]
        found = call(cell, inputs, lengths=lengths, reverse=reverse)
        last = [s[i] for s in (final if cell == "lstm" else (final,))]
        for ours, other in zip(found, (wanted[..., i * H : (i + 1) * H], *last), strict=True):
            assert relative_error(ours, other) <= (TOLERANCE[dtype] if reverse else 0)


@pytest.mark.native
@pytest.mark.parametrize("options", [{"lengths": torch.tensor([3, 0, 1])}, {}], ids=["lengths", "plain"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_host_differentiates_twice_and_forward(cell: str, options: dict[str, Tensor]) -> None:
    inputs = [t.requires_grad_() for t in problem(cell, 3, 3, 2, features=2, dtype=torch.float64)]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return call(cell, list(inputs), **options, reverse=True)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    x, *rest = (t.detach() for t in inputs)
    many = torch.stack((x, 2 * x))
    found = torch.func.vmap(lambda x: function(x, *rest))(many)
    assert_close(found, [torch.stack(o) for o in zip(*(function(x, *rest) for x in many), strict=True)])


@pytest.mark.native
def test_the_host_takes_aten_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step runs only what ATen has no layer for."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("step by step")

    monkeypatch.setattr(host.reference, "sequence", refuse)
    inputs, w_hr = projected()
    for options in ({}, {"lengths": LENGTHS}):
        call("lstm", inputs, w_hr=w_hr, **options)
    for options in ({"mask": MASK}, {"reset": RESETS}, {"return_cells": True}):
        with pytest.raises(AssertionError, match="step by step"):
            call("lstm", inputs, w_hr=w_hr, **options)
