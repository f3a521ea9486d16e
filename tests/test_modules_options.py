"""The options of the layers, which are made of the functions: parameters, initialisation and repr for each of them.

And they go along with packed sequences, copies and torch.compile, and are refused by name where they are wrong.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from option_problems import (
    CELLS,
    EVERYTHING,
    LAYERS,
    LENGTHS,
    SPECS,
    B,
    H,
    I,
    P,
    T,
    Tensors,
    assert_close,
    assert_same,
    plain,
    seeded,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import lstm_triton as lt
from lstm_triton import launch
from lstm_triton.spec import CellSpec

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]


def layer_of(spec: CellSpec, **others: Any) -> nn.Module:
    """A layer of this cell with weights drawn, those of normalisation too."""
    torch.manual_seed(0)
    options = dict(spec.options)
    if spec.layer_norm:
        options["layer_norm"] = True
    if spec.cell == "lstm":
        options |= {"proj_size": spec.proj, "peephole": spec.peephole}
    else:
        options["zoneout"] = spec.zoneout[0]
    layer = LAYERS[spec.cell](I, H, **(options | others))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("norm"):
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype), alpha=0.2)
    return layer


def by_function(layer: nn.Module, spec: CellSpec, x: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The layer's output and final states in evaluation, from its state dict and the functions."""
    weights = dict(layer.named_parameters())
    finals = []
    for depth in range(layer.num_layers):
        outputs = []
        for direction in ("", "_reverse"):
            of_this = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}
            of_this |= {"w_hr": "weight_hr"} if spec.proj else {}
            given: Tensors = {name: weights[f"{theirs}_l{depth}{direction}"] for name, theirs in of_this.items()}
            if spec.peephole:
                rows = [weights[f"weight_c{gate}_l{depth}{direction}"] for gate in spec.peepholes]
                given["peephole"] = torch.stack(rows)
            if spec.layer_norm:
                for norm in ("norm_ih", "norm_hh", *(("norm_c",) if spec.cell == "lstm" else ())):
                    given[norm] = tuple(weights[f"{norm}_l{depth}{direction}.{part}"] for part in ("weight", "bias"))
            states = dict.fromkeys(spec.states)
            y, *last = plain(
                spec.cell, {"x": x, **states, **given}, **spec.options, lengths=lengths, reverse=bool(direction)
            )
            outputs.append(y)
            finals.append(last)
        x = torch.cat(outputs, dim=-1)
    return x, [torch.stack(s) for s in zip(*finals, strict=True)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_layers_are_made_of_the_functions(spec: CellSpec) -> None:
    layer = layer_of(spec, num_layers=1 if launch.INTERPRETED else 2, bidirectional=True, dtype=torch.float64).eval()
    x = torch.randn(T, B, I, generator=seeded(), dtype=torch.float64)
    y, state = layer(x, lengths=LENGTHS)
    assert_same([y, state], by_function(layer, spec, x, LENGTHS))
    # backward in evaluation reaches every parameter
    gradients = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    assert all(g.any() for g in gradients)


def test_normalisation_is_torchs() -> None:
    """PyTorch's layer-normalised LSTM, in its modules."""
    layer = layer_of(CellSpec("lstm", layer_norm=True), dtype=torch.float64)
    x = torch.randn(T, B, I, generator=seeded(), dtype=torch.float64)
    h = c = torch.zeros(B, H, dtype=torch.float64)
    outputs = []
    for x_t in x:
        gates = layer.norm_ih_l0(F.linear(x_t, layer.weight_ih_l0)) + layer.bias_ih_l0 + layer.bias_hh_l0
        gates = gates + layer.norm_hh_l0(F.linear(h, layer.weight_hh_l0))
        i, f, g, o = gates.chunk(4, dim=-1)
        c = layer.norm_c_l0(f.sigmoid() * c + i.sigmoid() * g.tanh())
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    y, (h_n, c_n) = layer(x)
    assert_close([y, h_n[0], c_n[0]], [torch.stack(outputs), h, c])


def test_parameters() -> None:
    layer = lt.LSTM(I, H, num_layers=2, bidirectional=True, proj_size=P, peephole=True, layer_norm=True)
    own = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_ci", "weight_cf", "weight_co"]
    norms = [f"norm_{name}" for name in ("ih", "hh", "c")]
    suffixes = [f"_l{k}{direction}" for k in range(2) for direction in ("", "_reverse")]
    names = [name + suffix for suffix in suffixes for name in own]
    names += [f"{name}{suffix}.{part}" for suffix in suffixes for name in norms for part in ("weight", "bias")]
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == names
    assert layer.weight_cf_l1_reverse.shape == layer.norm_c_l0.weight.shape == (H,)
    assert layer.norm_ih_l1.bias.shape == layer.norm_hh_l1.weight.shape == (4 * H,)
    assert (layer.norm_hh_l0.eps, type(layer.norm_hh_l0)) == (1e-5, nn.LayerNorm)
    assert [len(weights) for weights in layer.all_weights] == [len(own)] * 4

    layer = lt.LSTM(I, H, peephole=True, coupled=True, bias=False, dtype=torch.bfloat16, device="meta")
    assert list(layer.state_dict()) == ["weight_ih_l0", "weight_hh_l0", "weight_ci_l0", "weight_co_l0"]
    assert layer.weight_ih_l0.shape == (3 * H, I) and layer.weight_co_l0.dtype == torch.bfloat16
    for kind, gates in ((lt.GRU, 3), (lt.RNN, 1)):
        layer = kind(I, H, layer_norm=True, dtype=torch.float64)
        assert [name for name, _ in layer.named_modules()] == ["", "norm_ih_l0", "norm_hh_l0"]
        assert layer.norm_hh_l0.weight.shape == (gates * H,) and layer.norm_hh_l0.weight.dtype == torch.float64


def test_initialisation() -> None:
    """torch.nn's draws come first; the norms begin as torch.nn.LayerNorm, also when drawn again."""
    torch.manual_seed(3)
    theirs = nn.LSTM(I, H)
    torch.manual_seed(3)
    layer = lt.LSTM(I, H, peephole=True, layer_norm=True)
    after = torch.get_rng_state()
    for name, weight in theirs.named_parameters():
        assert torch.equal(weight, getattr(layer, name))
    bound = H**-0.5
    assert all(0 < getattr(layer, f"weight_c{gate}_l0").abs().max() <= bound for gate in "ifo")
    torch.manual_seed(3)
    lt.LSTM(I, H, peephole=True)
    assert torch.equal(torch.get_rng_state(), after)  # nothing for the norms
    drawn = layer.weight_ci_l0.clone()
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 9)
    torch.manual_seed(3)
    layer.reset_parameters()
    assert torch.equal(layer.weight_ci_l0, drawn)
    for norm in (layer.norm_ih_l0, layer.norm_hh_l0, layer.norm_c_l0):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=str)
def test_packed_sequences(spec: CellSpec) -> None:
    """As lengths say, in training too: rows in order of length draw the same masks either way."""
    others = {"recurrent_dropout": 0.5, "input_dropout": 0.5, "dropout_per_gate": True, "bidirectional": True}
    layer = layer_of(spec, **others, dtype=torch.float64)
    x = torch.randn(T, B, I, generator=seeded(), dtype=torch.float64)
    lengths = torch.tensor([T, T - 1, 1])
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(1)
        y, state = layer(x, lengths=lengths)
        torch.manual_seed(1)
        packed, packed_state = layer(pack_padded_sequence(x, lengths))
        assert_close(tree_leaves([pad_packed_sequence(packed)[0], packed_state]), tree_leaves([y, state]))


@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=str)
def test_unbatched_and_batch_first(spec: CellSpec) -> None:
    layer = layer_of(spec, recurrent_dropout=0.5, input_dropout=0.5, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, T, I, generator=seeded(), dtype=torch.float64)
    torch.manual_seed(1)
    y, state = layer(x)
    torch.manual_seed(1)
    found = layer(x[0])
    assert_same([t.unsqueeze(0) for t in found[:1]], [y])
    assert_same([t.unsqueeze(1) for t in tree_leaves(found[1])], tree_leaves(state))


@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=str)
def test_copies(spec: CellSpec) -> None:
    layer = layer_of(spec, recurrent_dropout=0.5)
    x = torch.randn(T, B, I, generator=seeded())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        results = []
        for module in (layer, other):
            torch.manual_seed(0)
            results.append(module(x))
        assert_same(*results)
    fresh = layer_of(spec, recurrent_dropout=0.5)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(layer.state_dict())
    assert_same(fresh.eval()(x), layer.eval()(x))


@pytest.mark.native
@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=str)
def test_layers_compile(spec: CellSpec) -> None:
    torch.compiler.reset()
    layer = layer_of(spec, num_layers=2, recurrent_dropout=0.3, input_dropout=0.3, dropout=0.2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(T, B, I, generator=seeded())
    for training in (True, False):
        layer.train(training)
        results = []
        for function in (layer, compiled):
            torch.manual_seed(0)
            results.append(tree_leaves(function(x)))
        assert_close(*results, torch.float32)


def test_repr() -> None:
    layer = lt.LSTM(
        I, H, dropout=0.1, num_layers=2, peephole=True, cell_clip=3, activation=("elu", 0.5), zoneout=(0.1, 0.2),
        input_dropout=0.25, dropout_per_gate=True, memory="recompute",
    )  # fmt: skip
    assert repr(layer) == (
        f"LSTM({I}, {H}, num_layers=2, dropout=0.1, peephole=True, cell_clip=3, activation=('elu', 0.5), "
        "zoneout=(0.1, 0.2), input_dropout=0.25, dropout_per_gate=True, memory=recompute)"
    )
    assert repr(lt.GRU(I, H, reset_after=False, gate_clip=1.5)) == f"GRU({I}, {H}, reset_after=False, gate_clip=1.5)"
    assert repr(lt.RNN(I, H, nonlinearity="relu")) == repr(nn.RNN(I, H, nonlinearity="relu"))
    assert "(norm_hh_l0): LayerNorm" in repr(lt.RNN(I, H, layer_norm=True))


def test_activations_of_rnn() -> None:
    layer = lt.RNN(I, H, nonlinearity="relu", activation=("leaky_relu", 0.3))
    assert (layer.nonlinearity, layer.mode) == (("leaky_relu", 0.3), "RNN_LEAKY_RELU")
    assert lt.RNN(I, H, activation=("relu", 0.0, 0.0)).mode == "RNN_RELU"
    assert lt.RNN(I, H, nonlinearity="relu").activation == "relu"


BAD = [
    ("zoneout", -0.1, ValueError),
    ("recurrent_dropout", 1.5, ValueError),
    ("recurrent_dropout", True, ValueError),
    ("input_dropout", "0.5", ValueError),
    ("input_dropout", float("nan"), ValueError),
    ("dropout_per_gate", 1, TypeError),
    ("layer_norm", None, TypeError),
    ("gate_clip", -1.0, ValueError),
    ("activation", "gelu", ValueError),
]
BAD_OWN = {
    "lstm": [
        ("peephole", 1, TypeError), ("coupled", "yes", TypeError), ("cell_clip", float("inf"), ValueError),
        ("output_activation", "", ValueError), ("recurrent_activation", None, ValueError),
    ],
    "gru": [("reset_after", 0, TypeError), ("zoneout", (0.1, 0.1), ValueError), ("peephole", True, TypeError)],
    "rnn": [("recurrent_activation", "relu", ValueError), ("coupled", True, TypeError)],
}  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
def test_layers_refuse_by_name(cell: str) -> None:
    for name, value, error in [*BAD, *BAD_OWN[cell]]:
        with pytest.raises(error, match=name):
            LAYERS[cell](I, H, **{name: value})
    if cell == "gru":
        with pytest.raises(ValueError, match="layer_norm cannot go with reset_after=False"):
            lt.GRU(I, H, layer_norm=True, reset_after=False)
