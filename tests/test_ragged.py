"""Rows of unequal length: PackedSequences beside torch.nn's, and lengths, mask, reset and cells of the layers."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch_pairs import ALIKE, INTERPRETED, LAYERS, TOLERANCE, assert_close, build, outcome, results, tensors

import lstm_triton as lt
from lstm_triton.ragged import packing_of

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]

LENGTHS = {"falling": [3, 2, 1], "equal": [2, 2], "unsorted": [1, 3, 2, 3], "one": [2]}
I, H = 4, 5  # noqa: E741


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(lengths: list[int], dtype: torch.dtype = torch.float64, size: int = I) -> PackedSequence:
    rows = [torch.randn(n, size, dtype=dtype, generator=seeded(i)) for i, n in enumerate(lengths)]
    return pack_sequence(rows, enforce_sorted=lengths == sorted(lengths, reverse=True))


def initial(name: str, rows: int, batch: int, proj: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    h = torch.randn(rows, batch, proj or H, dtype=dtype, generator=seeded(7))
    return (h, torch.randn(rows, batch, H, dtype=dtype, generator=seeded(8))) if name == "LSTM" else h


class Padded(nn.Module):
    """A layer on padded rows, by packing them; its parameters under their own names."""

    def __init__(self, layer: nn.Module, lengths: list[int], enforce_sorted: bool = False) -> None:
        super().__init__()
        self.layer, self.lengths, self.enforce_sorted = layer, lengths, enforce_sorted

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        first = self.layer.batch_first
        sequence = pack_padded_sequence(x, self.lengths, first, self.enforce_sorted)
        output, state = self.layer(sequence, hx)
        return pad_packed_sequence(output, first, total_length=x.size(1 if first else 0))[0], state

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.named_parameters(*args, **kwargs)


@pytest.mark.parametrize("lengths", [[4, 2, 1], [3, 3, 3], [1], [5, 5, 2, 1, 1]], ids=str)
def test_packing_is_torchs(lengths: list[int]) -> None:
    sequence = packed(lengths)
    packing = packing_of(sequence.batch_sizes, sequence.data.device)
    padded, rows = pad_packed_sequence(sequence)
    assert torch.equal(packing.pad(sequence.data), padded)
    assert torch.equal(packing.lengths, rows)
    assert torch.equal(packing.pack(padded), sequence.data)
    assert (packing.steps, packing.batch) == padded.shape[:2]
    assert packing.index.unique().numel() == packing.index.numel() == sum(lengths)


def test_packing_waits_for_no_device() -> None:
    """Meta tensors have no values to wait for."""
    sequence = packed([4, 2, 1])
    packing = packing_of(sequence.batch_sizes, torch.device("meta"))
    padded = packing.pad(sequence.data.to("meta"))
    assert (padded.shape, padded.device.type, packing.lengths.shape) == ((4, 3, I), "meta", (3,))
    assert packing.pack(padded).shape == sequence.data.shape


def test_packing_is_differentiable() -> None:
    sequence = packed([3, 1])
    packing = packing_of(sequence.batch_sizes, sequence.data.device)
    data, padded = sequence.data.requires_grad_(), torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    for function, x in ((packing.pad, data), (packing.pack, padded)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
        assert torch.func.vmap(function)(torch.stack((x, 2 * x)))[1].equal(2 * function(x))


def test_batch_sizes_cannot_increase() -> None:
    with pytest.raises(ValueError, match=r"batch_sizes .* must not increase, got \[1, 2\]"):
        packing_of(torch.tensor([1, 2]), torch.device("cpu"))


CASES = [
    (name, lengths, options, with_state)
    for name, lengths, (layers, bidirectional), proj, with_state in product(
        LAYERS, LENGTHS, ((1, False), (1, True), (2, True), (3, False)), (0, 2), (False, True)
    )
    if (options := {"num_layers": layers, "bidirectional": bidirectional} | ({"proj_size": proj} if proj else {}))
    and not (proj and name != "LSTM")
]
# a stride prime to every axis still meets each value of each
CASES = CASES[::23] if INTERPRETED else CASES


@pytest.mark.parametrize(("name", "lengths", "options", "with_state"), CASES, ids=str)
def test_packed_as_torch(name: str, lengths: str, options: dict, with_state: bool) -> None:
    sequence = packed(LENGTHS[lengths])
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    hx = initial(name, rows, len(LENGTHS[lengths]), options.get("proj_size", 0)) if with_state else None
    ours, theirs = build(name, I, H, dtype=torch.float64, **options)
    assert_close(results(ours, sequence, hx), results(theirs, sequence, hx), TOLERANCE[torch.float64])
    mine, other = ours(sequence, hx)[0], theirs(sequence, hx)[0]
    assert mine.batch_sizes is other.batch_sizes
    assert mine.sorted_indices is other.sorted_indices
    assert mine.unsorted_indices is other.unsorted_indices


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ALIKE)
def test_between_packing_and_padding(name: str, batch_first: bool, enforce_sorted: bool) -> None:
    ours, theirs = build(name, I, H, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn((3, 4, I) if batch_first else (4, 3, I), dtype=torch.float64)
    found, expected = (results(Padded(layer, [3, 3, 1], enforce_sorted), x) for layer in (ours, theirs))
    assert_close(found, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float64] if INTERPRETED else [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", ["unsorted"] if INTERPRETED else LENGTHS)
@pytest.mark.parametrize("name", ALIKE)
def test_dropout_draws_for_packed_steps(name: str, lengths: str, dtype: torch.dtype) -> None:
    ours, theirs = build(name, I, H, 2 if INTERPRETED else 3, dropout=0.5, dtype=dtype)
    sequence = packed(LENGTHS[lengths], dtype)
    found, expected = (results(layer, sequence, seed=3) for layer in (ours, theirs))
    assert_close(found, expected, TOLERANCE[dtype])
    assert not torch.equal(found["output[0].data"], ours.eval()(sequence)[0].data)


@pytest.mark.native
def test_packed_rows_compile() -> None:
    """With graph breaks where the host reads batch_sizes, and right for each packing."""
    torch.compiler.reset()
    layer = build("GRU", I, H, dtype=torch.float64)[0]
    compiled = torch.compile(layer, backend="aot_eager")
    for lengths in ([3, 1], [1, 2, 2]):
        found, expected = (dict(tensors(run(packed(lengths)), "output")) for run in (compiled, layer))
        assert_close(found, expected, TOLERANCE[torch.float64])
    x, lengths = torch.randn(3, 2, I, dtype=torch.float64), torch.tensor([1, 3])
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, lengths=lengths)
    assert_close(dict(tensors(found)), dict(tensors(layer(x, lengths=lengths))), TOLERANCE[torch.float64])


def wrong_calls(name: str) -> dict[str, tuple[PackedSequence, Any]]:
    falling, unsorted = packed([3, 1]), packed([1, 3])
    one = torch.zeros(1, 2, H, dtype=torch.float64)
    return {
        "input size": (packed([3, 1], size=I + 1), None),
        "input's dtype": (packed([3, 1], torch.float32), None),
        "rows": (falling, initial(name, 1, 3)),
        "state's size": (falling, initial(name, 1, 2, H + 1)),
        "state's layers": (falling, initial(name, 2, 2)),
        "rows to sort": (unsorted, initial(name, 1, 1)),
        "one state": (falling, (one,)),
        "three states": (falling, (one,) * 3),
        "state's dtype": (falling, initial(name, 1, 2, dtype=torch.float32)),
        "state's device": (falling, (one.to("meta"),) * 2 if name == "LSTM" else one.to("meta")),
        "input's device": (falling.to("meta"), None),
    }


@pytest.mark.parametrize("what", wrong_calls("GRU"))
@pytest.mark.parametrize("name", LAYERS)
def test_wrong_packed_calls(name: str, what: str) -> None:
    sequence, hx = wrong_calls(name)[what]
    mine, other = (outcome(lambda kind=kind: kind(I, H, dtype=torch.float64)(sequence, hx)) for kind in LAYERS[name])
    assert other[0] != "no error"
    assert mine[0] == other[0]
    # For some, torch.nn's words are those of the kernel that happened to meet the wrong tensor.
    if what in ("rows to sort", "one state", "three states") or (name != "LSTM" and "device" not in what):
        words = "Input and hidden tensors are not the same dtype, found input tensor with Double and hidden tensor"
        assert mine[1] == (f"{words} with Float" if what == "state's dtype" else other[1])


STACKS = [
    ("LSTM", {"bidirectional": True, "proj_size": 2}),
    ("LSTM", {}),
    ("GRU", {"bidirectional": True, "batch_first": True}),
    ("RNN", {}),
]
if not INTERPRETED:  # which takes its time at every step of every layer
    STACKS += [(name, {"num_layers": 2, "bidirectional": True, "batch_first": True}) for name in LAYERS]
    STACKS += [("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}), ("GRU", {"num_layers": 2})]


@pytest.mark.parametrize(("name", "options"), STACKS, ids=str)
def test_lengths(name: str, options: dict) -> None:
    lengths = [2, 1, 3, 3]
    ours, theirs = build(name, I, H, dtype=torch.float64, **options)
    x = torch.randn(4, 4, I, dtype=torch.float64, generator=seeded())
    x = x.transpose(0, 1) if ours.batch_first else x
    rows = len(ours._all_weights)
    hx = initial(name, rows, 4, options.get("proj_size", 0))
    found = results(ours, x, hx, lengths=torch.tensor(lengths, dtype=torch.int32))
    assert_close(found, results(Padded(theirs, lengths), x, hx), TOLERANCE[torch.float64])


@pytest.mark.parametrize(("name", "options"), STACKS, ids=str)
def test_steps_past_a_row_reach_nothing(name: str, options: dict) -> None:
    """NaN there, in the input and in the gradient by the output."""
    layer = build(name, I, H, dtype=torch.float64, **options)[0]
    x = torch.randn(3, 3, I, dtype=torch.float64, generator=seeded())
    lengths = torch.tensor([1, 3, 0])
    past = torch.arange(3)[:, None] >= lengths
    found = []
    for value in (0.0, torch.nan):
        y = x.masked_fill(past[..., None], value)
        y = (y.transpose(0, 1) if layer.batch_first else y).detach().requires_grad_()
        output, state = layer(y, lengths=lengths)
        weights = torch.ones(3, 3, output.size(-1), dtype=torch.float64).masked_fill(past[..., None], value)
        weights = weights.transpose(0, 1) if layer.batch_first else weights
        outputs = [output] + [t for _, t in tensors(state)]
        grads = torch.autograd.grad(outputs, [y, *layer.parameters()], [weights, *map(torch.ones_like, outputs[1:])])
        found.append([*outputs, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(t.isfinite().all() for t in found[0])
    padded = found[0][0].transpose(0, 1) if layer.batch_first else found[0][0]
    assert padded[past].count_nonzero() == 0
    assert all(s[:, 2].count_nonzero() == 0 for s in found[0][1 : len(outputs)])


@pytest.mark.parametrize(("name", "options"), STACKS, ids=str)
def test_mask(name: str, options: dict) -> None:
    """Each row as if the steps that do not count were not there; time-major, whatever batch_first says."""
    layer = build(name, I, H, dtype=torch.float64, **options)[0]
    x = torch.randn(3, 2, I, dtype=torch.float64, generator=seeded())
    mask = torch.tensor([[0, 1], [1, 1], [1, 0]], dtype=torch.bool)
    hx = initial(name, len(layer._all_weights), 2, options.get("proj_size", 0))
    y, state = layer(x.transpose(0, 1) if layer.batch_first else x, hx, mask=mask)
    y = y.transpose(0, 1) if layer.batch_first else y
    assert y[~mask].count_nonzero() == 0
    for row in range(2):
        own = tuple(s[:, row] for s in hx) if name == "LSTM" else hx[:, row]
        expected, last = layer(x[mask[:, row], row], own)
        torch.testing.assert_close(y[mask[:, row], row], expected, rtol=1e-12, atol=1e-14)
        for (_, a), (_, b) in zip(tensors(state), tensors(last), strict=True):
            torch.testing.assert_close(a[:, row], b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "options"),
    [*product(LAYERS, [{}] if INTERPRETED else [{}, {"num_layers": 2}]), ("LSTM", {"proj_size": 2})],
    ids=str,
)
def test_reset(name: str, options: dict) -> None:
    """Each row in pieces, all but the first from a zero state."""
    layer = build(name, I, H, dtype=torch.float64, **options)[0]
    x = torch.randn(4, 3, I, dtype=torch.float64, generator=seeded())
    starts = [[], [0], [2, 3]]
    reset = torch.zeros(4, 3, dtype=torch.bool)
    for row, steps in enumerate(starts):
        reset[steps, row] = True
    hx = initial(name, len(layer._all_weights), 3, options.get("proj_size", 0))
    y, state = layer(x, hx, reset=reset)
    for row, steps in enumerate(starts):
        last = tuple(s[:, row] for s in hx) if name == "LSTM" else hx[:, row]
        for start, end in zip([0, *steps], [*steps, 4], strict=True):
            if end > start:
                expected, last = layer(x[start:end, row], None if start in steps else last)
                torch.testing.assert_close(y[start:end, row], expected, rtol=1e-12, atol=1e-14)
        for (_, a), (_, b) in zip(tensors(state), tensors(last), strict=True):
            torch.testing.assert_close(a[:, row], b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), STACKS, ids=str)
def test_packed_rows_with_mask_and_reset(name: str, options: dict) -> None:
    """Both lie in the caller's order of rows, which is not that of the packed steps."""
    layer = build(name, I, H, dtype=torch.float64, **options)[0]
    sequence = packed([1, 3, 2])
    x, lengths = pad_packed_sequence(sequence, layer.batch_first)
    mask, reset = (torch.rand(3, 3, generator=seeded(i)) > 0.4 for i in (1, 2))
    assert mask.any() and reset.any() and not mask.all()
    hx = initial(name, len(layer._all_weights), 3, options.get("proj_size", 0))
    output, *found = layer(sequence, hx, mask=mask, reset=reset)
    expected = layer(x, hx, lengths=lengths, mask=mask, reset=reset)
    found = [pad_packed_sequence(output, layer.batch_first)[0], *found]
    for (_, a), (_, b) in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def some_cells(**options: Any) -> tuple[nn.Module, Tensor]:
    """An LSTM, and x [T, B, I]."""
    layer = build("LSTM", I, H, dtype=torch.float64, **options)[0]
    return layer, torch.randn(3, 3, I, dtype=torch.float64, generator=seeded())


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"proj_size": 2}], ids=str)
def test_cells(options: dict) -> None:
    """c after each step is c_n of what lies before it; of the last layer, time-major."""
    layer, x = some_cells(num_layers=1 if INTERPRETED else 2, **options)
    caller = x.transpose(0, 1) if layer.batch_first else x
    output, state, cells = layer(caller, return_cells=True)
    torch.testing.assert_close((output, state), layer(caller), rtol=1e-12, atol=1e-14)
    for t in range(3):
        _, (_, c_n) = layer(caller[:, : t + 1] if layer.batch_first else x[: t + 1])
        torch.testing.assert_close(cells[t], c_n[-1], rtol=1e-12, atol=1e-14)
    _, _, alone = layer(x[:, 1], return_cells=True)
    torch.testing.assert_close(alone, cells[:, 1], rtol=1e-12, atol=1e-14)


def test_cells_of_both_directions() -> None:
    layer, x = some_cells(num_layers=1 if INTERPRETED else 2, bidirectional=True)
    _, (_, c_n), cells = layer(x, return_cells=True)
    assert cells.shape == (3, 3, 2 * H)
    torch.testing.assert_close(torch.stack((cells[-1, :, :H], cells[0, :, H:])), c_n[-2:], rtol=1e-12, atol=1e-14)


def test_cells_of_packed_rows() -> None:
    layer, x = some_cells()
    lengths = torch.tensor([2, 3, 1])
    _, _, expected = layer(x, return_cells=True, lengths=lengths)
    sequence = pack_padded_sequence(x, lengths, enforce_sorted=False)
    _, _, cells = layer(sequence, return_cells=True)
    torch.testing.assert_close(pad_packed_sequence(cells)[0], expected, rtol=1e-12, atol=1e-14)
    for i in (1, 2, 3):
        assert cells[i] is sequence[i]


def test_gradients_by_cells() -> None:
    layer = build("LSTM", I, H, dtype=torch.float64)[0]
    x = torch.randn(3, 2, I, dtype=torch.float64, generator=seeded(), requires_grad=True)
    cotangent = torch.randn(3, 2, H, dtype=torch.float64, generator=seeded(1))
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x, return_cells=True)[2], leaves, cotangent)
    steps = torch.stack([layer(x[: t + 1])[1][1][0] for t in range(3)])
    torch.testing.assert_close(found, torch.autograd.grad(steps, leaves, cotangent), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_cells_are_lstms_alone(name: str) -> None:
    with pytest.raises(ValueError, match=f"return_cells must be False for {name}, which has no cell state"):
        LAYERS[name][0](I, H)(torch.zeros(2, 2, I), return_cells=True)
    with pytest.raises(TypeError, match="return_cells must be True or False, got 'all'"):
        lt.LSTM(I, H)(torch.zeros(2, 2, I), return_cells="all")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ALIKE)
def test_unbatched(name: str, batch_first: bool) -> None:
    layer = build(name, I, H, batch_first=batch_first, dtype=torch.float64)[0]
    x = torch.randn(3, I, dtype=torch.float64, generator=seeded())
    mask, reset = torch.tensor([True, False, True]), torch.tensor([False, True, False])
    for steps in ({"lengths": torch.tensor(2)}, {"mask": mask, "reset": reset}):
        found = layer(x, **steps)
        batch = x.unsqueeze(0 if batch_first else 1)
        expected = layer(batch, **{k: v.unsqueeze(-1) for k, v in steps.items()})
        assert found[0].shape == (3, H)
        torch.testing.assert_close(found[0], expected[0].squeeze(0 if batch_first else 1), rtol=0, atol=0)
        for (_, a), (_, b) in zip(tensors(found[1]), tensors(expected[1]), strict=True):
            torch.testing.assert_close(a, b.squeeze(1), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_steps(name: str) -> None:
    layer = LAYERS[name][0](I, H)
    x, every = torch.zeros(4, 3, I), torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="lengths must be None for a PackedSequence"):
        layer(pack_sequence([x[:, 0]]), lengths=torch.tensor([4]))
    for sequence in (packed([3, 1], torch.float32), packed([1, 3], torch.float32)):
        for argument, value in product(("mask", "reset"), (every[:3], every[:3, :1], every[:3, 0], every[:2, :2])):
            with pytest.raises(ValueError, match=rf"{argument} must have shape \(3, 2\) for this PackedSequence, got"):
                layer(sequence, **{argument: value})
    for given in (x, x[:, 0], sequence):
        for argument in ("mask", "reset", "lengths"):
            with pytest.raises((TypeError, ValueError), match=f"{argument} must be"):
                layer(given, **{argument: [True]})
    unbatched = {
        "lengths": (torch.tensor([4]), r"\(\) .* got \(1,\)"),
        "mask": (every[:, :1], r"\(4,\) .* got \(4, 1\)"),
        "reset": (every[:3, 0], r"\(4,\) .* got \(3,\)"),
    }
    for argument, (value, words) in unbatched.items():
        with pytest.raises(ValueError, match=f"{argument} must have shape {words}"):
            layer(x[:, 0], **{argument: value})
    wrong = {"lengths": torch.tensor([4, 4]), "mask": every.t(), "reset": every[:3]}
    for argument, value in wrong.items():
        with pytest.raises(ValueError, match=argument):
            layer(x, **{argument: value})
    for argument, value in {"lengths": torch.ones(3), "mask": every.float(), "reset": every.int()}.items():
        with pytest.raises((TypeError, ValueError), match=argument):
            layer(x, **{argument: value})


def test_under_another_default_device() -> None:
    """The packing's own bookkeeping stays with batch_sizes, and its results with the data."""
    packed = pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    layer = lt.LSTM(3, 4)
    wanted = layer(packed)[0].data
    torch.set_default_device("meta")
    try:
        found = layer(packed)[0].data
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, wanted)


def test_meta_tensors() -> None:
    layer = lt.LSTM(3, 4, device="meta")
    packed = PackedSequence(torch.empty(3, 3, device="meta"), torch.tensor([2, 1]))
    assert layer(packed)[0].data.shape == (3, 4)
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    assert layer(torch.empty(5, 2, 3, device="meta"), lengths=lengths)[0].shape == (5, 2, 4)
    with FakeTensorMode():
        y, _ = lt.LSTM(3, 4)(torch.empty(5, 2, 3), lengths=torch.tensor([5, 2]))
        assert y.shape == (5, 2, 4)


@pytest.mark.parametrize("steps", [2, 4])
def test_batch_sizes_of_other_data(steps: int) -> None:
    with pytest.raises(ValueError, match=f"data of a PackedSequence holds {steps} steps, its batch_sizes 3"):
        lt.GRU(3, 4)(PackedSequence(torch.randn(steps, 3), torch.tensor([2, 1])))
