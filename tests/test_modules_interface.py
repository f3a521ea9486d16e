"""Everything of torch.nn's layers beside their numbers that other code calls: arguments by position, repr, state dicts,
lists of weights, copies, and the checks that are methods of theirs, private names included.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from itertools import chain, product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_pairs import ALIKE, INTERPRETED, LAYERS, build, outcome, tensors

import lstm_triton as lt

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]

# the interpreter takes its time at every step
T, B, I, H, P = 2 if INTERPRETED else 3, 2, 4, 5, 4  # noqa: E741


@pytest.mark.parametrize("cell", LAYERS)
def test_state_dicts_load_both_ways(cell: str) -> None:
    mine, other = LAYERS[cell]
    for source, target in ((mine, other), (other, mine)):
        torch.manual_seed(4)
        donor, taker = source(I, H, 2, bidirectional=True), target(I, H, 2, bidirectional=True)
        assert list(donor.state_dict()) == list(taker.state_dict())
        taker.load_state_dict(donor.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(donor.parameters(), taker.parameters(), strict=True))


STACKS = [
    *product(LAYERS, [{}, {"num_layers": 2, "bias": False, "bidirectional": True}]),
    *(("LSTM", {"num_layers": 2, "proj_size": P, "bidirectional": True, "bias": bias}) for bias in (True, False)),
]


@pytest.mark.parametrize(("cell", "options"), STACKS, ids=str)
def test_weights_are_listed_as_torch_lists_them(cell: str, options: dict) -> None:
    """Under the names, private ones too, that code which initialises or walks layers uses."""
    ours, theirs = build(cell, I, H, **options)
    ours.flatten_parameters()
    assert ours.mode == theirs.mode
    assert ours._all_weights == theirs._all_weights
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert [len(group) for group in ours.all_weights] == [len(group) for group in theirs.all_weights]
    for mine, other in (
        (chain(*ours.all_weights), chain(*theirs.all_weights)),
        (ours._flat_weights, theirs._flat_weights),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


@pytest.mark.parametrize("cell", LAYERS)
def test_weights_listed_anew(cell: str) -> None:
    """As models do for torch.nn that change one; nothing can be changed by the list alone."""
    layer = LAYERS[cell][0](I, H)
    x = torch.randn(T, B, I)
    del layer.weight_hh_l0
    layer.weight_hh_l0 = torch.zeros(layer.weight_ih_l0.shape[0], H)
    layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]
    assert layer._flat_weights[1] is layer.weight_hh_l0
    y, _ = layer(x)
    with pytest.raises(ValueError, match="set weight_ih_l0 to change one"):
        layer._flat_weights = [torch.zeros_like(w) for w in layer._flat_weights]
    with pytest.raises(TypeError):
        layer._flat_weights[0] = torch.zeros_like(layer.weight_ih_l0)
    assert torch.equal(layer(x)[0], y)
    parametrize.register_parametrization(layer, "weight_ih_l0", nn.Identity())
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


@pytest.mark.parametrize("cell", LAYERS)
def test_reset_parameters_draws_anew(cell: str) -> None:
    ours, theirs = (layer(I, H, 2) for layer in LAYERS[cell])
    for layer in (ours, theirs):
        torch.manual_seed(6)
        layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "dropout": 0.25, "bidirectional": True},
        {"bias": False, "batch_first": True},
        {"bidirectional": 1, "num_layers": True},
        {"bidirectional": 0},
    ],
    ids=str,
)
def test_repr(cell: str, options: dict) -> None:
    ours, theirs = (layer(I, H, **options) for layer in LAYERS[cell])
    assert repr(ours) == repr(theirs)


def test_repr_of_options() -> None:
    ours, theirs = build("LSTM", I, H, 2, proj_size=P)
    assert repr(ours) == repr(theirs) == f"LSTM({I}, {H}, proj_size={P}, num_layers=2)"
    layer = lt.GRU(I, H, batch_first=True, memory="recompute", engine="reference")
    assert repr(layer) == f"GRU({I}, {H}, batch_first=True, memory=recompute, engine=reference)"


@pytest.mark.parametrize("cell", LAYERS)
def test_arguments_by_position(cell: str) -> None:
    own = ["relu"] if cell == "RNN" else []
    last = [P] if cell == "LSTM" else []
    args = [I, H, 2, *own, False, True, 0.5, True, *last]
    ours, theirs = build(cell, *args)
    assert repr(ours) == repr(theirs)
    names = [n for n, p in inspect.signature(LAYERS[cell][0]).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert repr(LAYERS[cell][0](**dict(zip(names, args, strict=False)))) == repr(theirs)
    assert LAYERS[cell][0](*args, "meta", torch.float64).weight_ih_l0.is_meta


@pytest.mark.parametrize("cell", ALIKE)
def test_copies(cell: str) -> None:
    layer = LAYERS[cell][0](I, H, bidirectional=True)
    x = torch.randn(1, B, I)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors(twin(x)), tensors(expected), strict=True))
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
        assert layer.weight_hh_l0.abs().sum() > 0


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([2, 1])], ids=["padded", "packed"])
@pytest.mark.parametrize(("cell", "options"), STACKS, ids=str)
def test_checks_that_others_call(cell: str, options: dict, batch_sizes: Tensor | None, batch_first: bool) -> None:
    """check_forward_args and its parts, on their own."""
    pair = build(cell, I, H, batch_first=batch_first, **options)
    good = torch.zeros(T, B, I) if batch_sizes is None else torch.zeros(3, I)
    sizes = [layer.get_expected_hidden_size(good, batch_sizes) for layer in pair]
    assert sizes[0] == sizes[1]
    h = c = torch.zeros(sizes[0])
    if cell == "LSTM":
        sizes = [layer.get_expected_cell_size(good, batch_sizes) for layer in pair]
        assert sizes[0] == sizes[1]
        c = torch.zeros(sizes[0])
    for x in (good, good[..., 1:], good[0], good[None], good.double()):
        mine, other = (outcome(lambda layer=layer: layer.check_input(x, batch_sizes)) for layer in pair)  # noqa: B023
        assert mine == other
        assert (mine[0] == "no error") == (x is good)
    for hx in ((h, c), (h[1:], c), (h, c[:, 1:]), (h[0], c[0])):
        hx = hx if cell == "LSTM" else hx[0]
        mine, other = (outcome(lambda layer=layer: layer.check_forward_args(good, hx, batch_sizes)) for layer in pair)  # noqa: B023
        assert mine == other
        for order in (None, torch.tensor([1, 0])):
            outputs = [outcome(lambda layer=layer: layer.permute_hidden(hx, order)) for layer in pair]  # noqa: B023
            assert outputs[0] == outputs[1]
    mine, other = (outcome(lambda layer=layer: layer.check_hidden_size(h, (1, 2, 9), "{} and {}")) for layer in pair)
    assert mine == other == ("RuntimeError", f"(1, 2, 9) and {list(h.shape)}")
    rows = torch.arange(h.size(1)).float()[:, None].expand(h.shape)
    state = (rows, rows + 5) if cell == "LSTM" else rows
    order = torch.arange(h.size(1)).flip(0)
    for (_, a), (_, b) in zip(*(tensors(layer.permute_hidden(state, order)) for layer in pair), strict=True):
        assert torch.equal(a, b)
