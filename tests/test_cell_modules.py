"""LSTMCell, GRUCell and RNNCell against torch.nn's: the same numbers, gradients, parameters, words and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_pairs import CELLS, INTERPRETED, TOLERANCE, assert_close, build, outcome, results, tensors

import lstm_triton as lt

pytestmark = pytest.mark.both

B, I, H = 3, 4, 5  # noqa: E741
VARIANTS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})]


def state(name: str, *shape: int, **options: Any) -> Any:
    h = torch.zeros(*shape, **options)
    return (h, h) if name == "LSTMCell" else h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("batch", [(B,), ()], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_outputs_and_gradients(
    name: str, options: dict, bias: bool, batch: tuple[int, ...], with_state: bool, dtype: torch.dtype
) -> None:
    ours, theirs = build(name, I, H, bias, dtype=dtype, **options)
    x, h, c = (torch.randn(*batch, n, dtype=dtype, generator=torch.Generator().manual_seed(n)) for n in (I, H, H))
    args = (x, ((h, c) if name == "LSTMCell" else h) if with_state else None)
    found = results(ours, *args)
    assert all(value.dtype == dtype for value in found.values())
    assert_close(found, results(theirs, *args), TOLERANCE[dtype])


@pytest.mark.parametrize("name", CELLS)
def test_result_is_of_torchs_types(name: str) -> None:
    for x, hx in ((torch.randn(B, I), state(name, B, H)), (torch.randn(I), [state(name, H)][0])):
        found, expected = (kind(I, H)(x, hx) for kind in CELLS[name])
        assert type(found) is type(expected)


@pytest.mark.parametrize("name", CELLS)
def test_is_one_step_of_the_layer(name: str) -> None:
    cell = build(name, I, H, dtype=torch.float64)[0]
    layer = getattr(lt, name.removesuffix("Cell"))(I, H, dtype=torch.float64)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x = torch.randn(2, B, I, dtype=torch.float64)
    hx, outputs = None, []
    for step in x:
        hx = cell(step, hx)
        outputs.append(hx[0] if name == "LSTMCell" else hx)
    torch.testing.assert_close(torch.stack(outputs), layer(x)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CELLS)
def test_state_dicts_load_both_ways(name: str) -> None:
    mine, other = CELLS[name]
    for source, target in ((mine, other), (other, mine)):
        donor, taker = source(I, H), target(I, H)
        assert list(donor.state_dict()) == list(taker.state_dict())
        taker.load_state_dict(donor.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(donor.parameters(), taker.parameters(), strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_reset_parameters_draws_anew(name: str) -> None:
    ours, theirs = build(name, I, H)
    for cell in (ours, theirs):
        torch.manual_seed(6)
        cell.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_without_bias_the_parameters_are_none(name: str) -> None:
    for kind in CELLS[name]:
        cell = kind(I, H, False)
        assert cell.bias_ih is None and cell.bias_hh is None
        assert [n for n, _ in cell.named_parameters()] == ["weight_ih", "weight_hh"]


@pytest.mark.parametrize("arguments", [(I, H), (I, H, False), (I, H, 0)], ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_repr(name: str, options: dict, arguments: tuple) -> None:
    ours, theirs = (kind(*arguments, **options) for kind in CELLS[name])
    assert repr(ours) == repr(theirs)
    assert repr(CELLS[name][0](I, H, engine="reference")) == f"{name}({I}, {H}, engine=reference)"


@pytest.mark.parametrize(
    "arguments", [((-1, H), {}), ((4.0, H), {}), ((I, "5"), {}), ((I, H), {"dtype": torch.int64})], ids=str
)
@pytest.mark.parametrize("name", CELLS)
def test_wrong_construction(name: str, arguments: tuple) -> None:
    args, kwargs = arguments
    mine, other = (outcome(lambda kind=kind: kind(*args, **kwargs)) for kind in CELLS[name])
    assert other[0] != "no error"
    assert mine == other


@pytest.mark.parametrize("name", CELLS)
def test_unknown_arguments(name: str) -> None:
    for arguments in ({}, {"input_size": I, "hidden_size": H, "wings": 2}):
        mine, other = (outcome(lambda kind=kind: kind(**arguments)) for kind in CELLS[name])  # noqa: B023
        assert other[0] == "TypeError"
        assert mine == other
    with pytest.raises(ValueError, match=r"engine must be one of 'auto'.*got 'treadmill'"):
        CELLS[name][0](I, H, engine="treadmill")


X = torch.zeros(B, I)
CALLS = {
    "no dimension": (X[0, 0], None),
    "3-D input": (X[None], None),
    "input size": (X[:, 1:], None),
    "unbatched input size": (X[0, 1:], None),
    "input size before state": (X[:, 1:], (B + 1, H)),
    "3-D state": (X, (1, B, H)),
    "rows": (X, (B + 1, H)),
    "one row": (X, (1, H)),
    "columns": (X, (B, H + 1)),
    "rows before columns": (X, (B + 1, H + 1)),
    "unbatched state": (X, (H,)),
    "unbatched state as long as the batch": (torch.zeros(H, I), (H,)),
    "batched state": (X[0], (1, H)),
    "unbatched columns": (X[0], (H + 1,)),
    "no tensor": ([1.0], None),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("name", CELLS)
def test_wrong_calls(name: str, what: str) -> None:
    x, shape = CALLS[what]
    hx = None if shape is None else state(name, *shape)
    mine, other = (outcome(lambda kind=kind: kind(I, H)(x, hx)) for kind in CELLS[name])
    assert other[0] != "no error"
    assert mine == other


@pytest.mark.parametrize("name", CELLS)
def test_wrong_states(name: str) -> None:
    h = torch.zeros(B, H)
    for hx in (3, (h,), (h, h, h), (h, h[:2]), (h, h[:, 1:]), (h, h[None]), (None, None)):
        mine, other = (outcome(lambda kind=kind: kind(I, H)(X, hx)) for kind in CELLS[name])  # noqa: B023
        assert other[0] != "no error"
        assert mine == other
    for hx in ((h[0],), 3):
        mine, other = (outcome(lambda kind=kind: kind(I, H)(X[0], hx)) for kind in CELLS[name])  # noqa: B023
        assert other[0] != "no error"
        assert mine == other


def test_states_that_torch_takes() -> None:
    """A list; and for unbatched input both in one tensor, or more than two."""
    ours, theirs = build("LSTMCell", I, H)
    x, h = torch.randn(B, I), torch.randn(3, B, H)
    for args in ((x, [h[0], h[1]]), (x[0], h[:2, 0]), (x[0], tuple(h[:, 0]))):
        found, expected = (dict(tensors(cell(*args), "output")) for cell in (ours, theirs))
        assert_close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("what", ["input", "hidden"])
@pytest.mark.parametrize("name", CELLS)
def test_mixed_dtypes_and_devices(name: str, what: str) -> None:
    """RuntimeError as in torch.nn, where the words are those of the kernel that met the wrong tensor first."""
    kind, other = ("parameter", "Float") if what == "input" else ("hidden", "Double")
    for change, words in (
        ({"dtype": torch.float64}, f"are not the same dtype, found .* and {kind} tensor with {other}"),
        ({"device": "meta"}, f"are not at the same device, found .* and {kind} tensor at"),
    ):
        x = X.to(**change) if what == "input" else X
        hx = state(name, B, H, **change) if what == "hidden" else None
        with pytest.raises(RuntimeError, match=f"Input and {kind} tensors {words}"):
            CELLS[name][0](I, H)(x, hx)
        assert outcome(lambda: CELLS[name][1](I, H)(x, hx))[0] == "RuntimeError"  # noqa: B023


def test_unknown_nonlinearity() -> None:
    for args in ((X,), (X[None],), (X[:, 1:],)):
        mine, other = (outcome(lambda kind=kind: kind(I, H, nonlinearity="sin")(*args)) for kind in CELLS["RNNCell"])  # noqa: B023
        assert other[0] != "no error"
        assert mine == other


@pytest.mark.parametrize("shape", [(0, I), (B, 0)], ids=["no rows", "no inputs"])
@pytest.mark.parametrize("name", CELLS)
def test_empty_inputs(name: str, shape: tuple[int, int]) -> None:
    ours, theirs = build(name, shape[1], H)
    found, expected = (results(cell, torch.zeros(shape)) for cell in (ours, theirs))
    assert_close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", CELLS)
def test_autocast(name: str) -> None:
    """In autocast's dtype, as torch.nn's cells on CUDA, whatever the state's dtype is."""
    cell = CELLS[name][0](I, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for hx in (None, state(name, B, H), state(name, B, H, dtype=torch.bfloat16)):
            assert all(t.dtype == torch.bfloat16 for _, t in tensors(cell(X, hx)))


@pytest.mark.parametrize("name", CELLS)
def test_engine_is_handed_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handed = []
    function = getattr(lt.functional, name.removesuffix("Cell").lower())
    monkeypatch.setattr(
        lt.functional,
        name.removesuffix("Cell").lower(),
        lambda *args, **options: handed.append(options["engine"]) or function(*args, **options),
    )
    for engine in ("auto", "reference"):
        CELLS[name][0](I, H, engine=engine)(X)
    assert handed == ["auto", "reference"]


@pytest.mark.parametrize("name", ["LSTMCell"] if INTERPRETED else CELLS)
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = CELLS[name][0](I, H)

        def forward(self, x: Tensor) -> Tensor:
            hx = None
            for step in x:
                hx = self.cell(step, hx)
            return hx[0] if name == "LSTMCell" else hx

    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, B, I)
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, expected)]
    torch.testing.assert_close(*grads)


def test_lstm_cell_wants_two_states() -> None:
    for cell in (torch.nn.LSTMCell(3, 4), lt.LSTMCell(3, 4)):
        with pytest.raises(TypeError, match="must be tuple of Tensors, not Tensor"):
            cell(torch.randn(2, 3), torch.randn(2, 2, 4))
