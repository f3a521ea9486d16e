"""The cells beyond torch.nn's: what the options of the functions mean to who calls them, and what is refused.

Where an option can be told with torch.nn's cells it is: a coupled gate by weights of the other sign, masks by weights
that hold them. The equations themselves are test_reference_options's matter, the kernels' numerics test_cells's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from option_problems import (
    CELLS,
    EVERYTHING,
    LENGTHS,
    MASK,
    RESET,
    SPECS,
    B,
    H,
    I,
    P,
    T,
    assert_close,
    assert_same,
    draw,
    plain,
    seeded,
    with_gradients,
)
from torch.utils._pytree import tree_flatten, tree_unflatten

import lstm_triton as lt
from lstm_triton.spec import CellSpec

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]


@pytest.mark.parametrize("masks", ["", "shared", "per gate"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_functions_agree_with_reference(spec: CellSpec, masks: str) -> None:
    """What is worked out before a kernel, or before `reference`, is told: masks of x, normalisation, biases."""
    options: dict[str, Any] = dict(spec.options)
    if masks:
        options |= {"lengths": LENGTHS, "reset": RESET, "reverse": True}
    if masks == "per gate" and any(spec.zoneout):
        options["seed"] = torch.tensor([7])
    if masks and spec.cell == "lstm":
        options["return_cells"] = True
    tensors = draw(spec, masks)
    found = with_gradients(getattr(lt.functional, spec.cell), tensors, **options)
    wanted = with_gradients(getattr(lt.reference, spec.cell), tensors, **options)
    assert_close(found, wanted)
    by_name = with_gradients(getattr(lt.functional, spec.cell), tensors, **options, engine="reference")
    assert_same(by_name, wanted)


@pytest.mark.parametrize("given", ["b_ih", "b_hh", "neither"])
@pytest.mark.parametrize("spec", [CellSpec("gru"), CellSpec("gru", layer_norm=True)], ids=str)
def test_one_bias_is_enough(spec: CellSpec, given: str) -> None:
    for masks in ("", "per gate"):
        tensors = draw(spec, masks)
        for name in {"b_ih", "b_hh"} - {given}:
            del tensors[name]
        assert_close(*(with_gradients(module.gru, tensors) for module in (lt.functional, lt.reference)))


@pytest.mark.parametrize("cell", CELLS)
def test_an_input_mask_is_a_factor(cell: str) -> None:
    spec = CellSpec(cell)
    tensors = draw(spec, "shared")
    mask, _ = tensors.pop("input_mask"), tensors.pop("recurrent_mask")
    found = plain(cell, tensors, input_mask=mask)
    assert_close(found, plain(cell, tensors | {"x": tensors["x"] * mask}))
    # for each gate its own: on inputs side by side, of which each gate's weights see but one
    masks = 1 + torch.randn(spec.gates, B, I, generator=seeded(), dtype=torch.float64)
    wide = torch.cat([tensors["x"] * m for m in masks], dim=-1)
    w_ih = torch.block_diag(*tensors["w_ih"].chunk(spec.gates))
    assert_close(plain(cell, tensors, input_mask=masks), plain(cell, tensors | {"x": wide, "w_ih": w_ih}))


@pytest.mark.parametrize("spec", [*map(CellSpec, CELLS), CellSpec("gru", reset_after=False)], ids=str)
def test_a_recurrent_mask_is_in_the_weights(spec: CellSpec) -> None:
    """Of one row: W (m h) = (W m) h, and the state that the GRU mixes in is not masked."""
    tensors = draw(spec, "per gate", rows=1)
    masks, _ = tensors.pop("recurrent_mask"), tensors.pop("input_mask")
    w_hh = (tensors["w_hh"].unflatten(0, (spec.gates, H)) * masks).flatten(0, 1)
    found = plain(spec.cell, tensors, recurrent_mask=masks, **spec.options)
    assert_close(found, plain(spec.cell, tensors | {"w_hh": w_hh}, **spec.options))
    found = plain(spec.cell, tensors, recurrent_mask=masks[0], **spec.options)
    assert_close(found, plain(spec.cell, tensors | {"w_hh": tensors["w_hh"] * masks[0]}, **spec.options))


def test_a_coupled_gate_is_the_other_ones_opposite() -> None:
    """1 - sigmoid(a) = sigmoid(-a)."""
    tensors = draw(CellSpec("lstm", coupled=True))
    uncoupled = dict(tensors)
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        i, g, o = tensors[name].chunk(3)
        uncoupled[name] = torch.cat((i, -i, g, o))
    assert_close(plain("lstm", tensors, coupled=True), plain("lstm", uncoupled))


def test_a_peephole_is_a_bias_where_the_cell_state_is_known() -> None:
    """Of one step: c[t-1] is c0, and with g = 0 and f = 1 so is c[t]."""
    tensors = draw(CellSpec("lstm", peephole=True))
    peephole = tensors.pop("peephole")
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        tensors[name].unflatten(0, (4, H))[2] = 0
    tensors["b_ih"].unflatten(0, (4, H))[1] = 100
    one = tensors | {"x": tensors["x"][:1, :1]} | {name: tensors[name][:1] for name in ("h0", "c0")}
    added = peephole * one["c0"]
    added = torch.stack((added[0], added[1], torch.zeros(H), added[2])).flatten()
    assert_close(plain("lstm", one, peephole=peephole), plain("lstm", one | {"b_ih": one["b_ih"] + added}))


@pytest.mark.parametrize("cell", CELLS)
def test_options_that_change_nothing(cell: str) -> None:
    tensors = draw(CellSpec(cell))
    idle: dict[str, Any] = {"gate_clip": 1e3, "zoneout": 0.0, "seed": torch.tensor(3), "activation": ("tanh", 5.0)}
    if cell != "rnn":
        idle["recurrent_activation"] = ["sigmoid"]
    if cell == "lstm":
        idle |= {"cell_clip": 1e3, "output_activation": "tanh", "zoneout": [0, 0.0]}
    assert_close(plain(cell, tensors, **idle), plain(cell, tensors))


def test_clips() -> None:
    tensors = draw(CellSpec("lstm", proj=P))
    *_, cells = plain("lstm", tensors, cell_clip=0.1, return_cells=True)
    assert cells.abs().max() == 0.1
    # pre-activations of nothing: i = f = o = 1/2, g = 0
    *_, c_n = plain("lstm", tensors, gate_clip=1e-30)
    assert_close([c_n], [tensors["c0"] * 0.5**T])


@pytest.mark.parametrize("cell", CELLS)
def test_zoneout_keeps_what_its_seed_says(cell: str) -> None:
    tensors = draw(CellSpec(cell), rows=64)
    options: dict[str, Any] = {"zoneout": 0.3, "reverse": True}
    seeds = [torch.tensor([11]), torch.tensor(11), torch.tensor(-(2**40))]
    first, same, other = (plain(cell, tensors, **options, seed=seed)[0] for seed in seeds)
    assert_same(first, same)
    kept = [y == torch.cat((y, tensors["h0"][None]))[1:] for y in (first, other)]
    # four standard deviations of the share
    tolerance = 4 * (0.3 * 0.7 / first.numel()) ** 0.5
    assert all(abs(k.double().mean() - 0.3) <= tolerance for k in kept)
    # independent of each other: the share of both is the product
    assert abs((kept[0] & kept[1]).double().mean() - 0.09) <= tolerance
    everything = plain(cell, tensors, zoneout=1, seed=seeds[0])
    assert_same(everything[0], tensors["h0"].expand(T, -1, -1))
    assert_same(everything[0], plain(cell, tensors, zoneout=1)[0])


def test_zoneout_of_one_state_alone() -> None:
    tensors = draw(CellSpec("lstm"))
    y, _, c_n, cells = plain("lstm", tensors, zoneout=(1.0, 0.0), return_cells=True)
    assert_same(y, tensors["h0"].expand(T, -1, -1))
    assert not (cells[1:] == cells[:-1]).any() and torch.equal(c_n, cells[-1])
    y, _, c_n = plain("lstm", tensors, zoneout=(0.0, 1.0))
    assert_same(c_n, tensors["c0"])
    assert not (y[1:] == y[:-1]).any()


def test_expected_zoneout_is_the_mean_of_one_step() -> None:
    tensors = draw(CellSpec("gru"))
    tensors["x"] = tensors["x"][:1]
    (step, _), (expected, _) = (plain("gru", tensors, zoneout=z) for z in (0.0, 0.25))
    assert_close([expected[0]], [0.25 * tensors["h0"] + 0.75 * step[0]])


@pytest.mark.parametrize("masks", ["", "shared", "per gate"])
@pytest.mark.parametrize("spec", [CellSpec("gru"), EVERYTHING["lstm"], EVERYTHING["rnn"]], ids=str)
def test_nothing_comes_of_steps_that_do_not_count(spec: CellSpec, masks: str) -> None:
    """NaN in x there and in the gradients by what is returned there: the bits of everything else stay."""
    tensors = draw(spec, masks)
    skipped = ~(MASK & (torch.arange(T)[:, None] < LENGTHS))
    options = spec.options | {"lengths": LENGTHS, "mask": MASK, "reset": RESET}
    results = []
    for filler in (0.0, torch.nan):
        leaves, tree = tree_flatten(tensors | {"x": tensors["x"].masked_fill(skipped[..., None], filler)})
        leaves = [t.clone().requires_grad_() for t in leaves]
        outputs = plain(spec.cell, tree_unflatten(leaves, tree), **options)
        dy = torch.ones_like(outputs[0]).masked_fill(skipped[..., None], filler)
        gradients = torch.autograd.grad(outputs, leaves, [dy, *map(torch.ones_like, outputs[1:])])
        results.append([*outputs, *gradients])
    assert all(t.isfinite().all() for t in results[0])
    assert_same(*results)


def test_a_row_with_nan_spoils_no_other() -> None:
    spec = EVERYTHING["lstm"]
    tensors = draw(spec, "per gate")
    spoilt = tensors["x"].clone()
    spoilt[1, 1] = torch.nan
    clean, found = (plain("lstm", tensors | {"x": x}, **spec.options) for x in (tensors["x"], spoilt))
    assert_same([t[..., [0, 2], :] for t in found], [t[..., [0, 2], :] for t in clean])
    assert found[0][1:, 1].isnan().all()


@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=str)
def test_no_rows_and_no_steps(spec: CellSpec) -> None:
    for masks in ("", "per gate"):
        outputs = with_gradients(getattr(lt.functional, spec.cell), draw(spec, masks, rows=0), **spec.options)
        assert outputs[0].shape == (T, 0, spec.output(H))
        tensors = draw(spec, masks)
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            plain(spec.cell, tensors | {"x": tensors["x"][:0]}, **spec.options)


LSTM = draw(CellSpec("lstm", peephole=True, layer_norm=True), "shared")
ONE = torch.ones(H, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peephole": True}, TypeError, "peephole must be a Tensor or None, got bool"),
        ({"peephole": torch.zeros(4, H)}, ValueError, rf"peephole must have shape \(3, {H}\) .*got \(4, {H}\)"),
        ({"peephole": LSTM["peephole"].float()}, ValueError, "peephole must have x's dtype torch.float64, got"),
        ({"peephole": LSTM["peephole"].to("meta")}, ValueError, "peephole must be on x's device cpu, got meta"),
        ({"coupled": 1}, TypeError, "coupled must be True or False, got 1"),
        (
            {"coupled": True},
            ValueError,
            r"w_hh must have shape \(18, 6\).*3 gate\(s\)" if H == 6 else "must have shape",
        ),
        ({"activation": "swish"}, ValueError, "^activation must be one of 'tanh', .*'thresholded_relu'.*got 'swish'"),
        ({"recurrent_activation": ("elu", "1")}, ValueError, "^recurrent_activation must be .*finite.*got"),
        ({"output_activation": 3}, ValueError, "^output_activation must be one of .*got 3"),
        ({"cell_clip": 0}, ValueError, "cell_clip must be a positive finite number or None, got 0"),
        ({"cell_clip": True}, ValueError, "cell_clip must be a positive finite number or None, got True"),
        ({"gate_clip": torch.tensor(1.0)}, ValueError, "gate_clip must be a positive finite number or None, got"),
        ({"zoneout": 1.5}, ValueError, "zoneout must be a number in .*or a pair of them for h and c, got 1.5"),
        ({"zoneout": (0.1, 0.2, 0.3)}, ValueError, "zoneout must be a number in"),
        ({"zoneout": [0.1, None]}, ValueError, "zoneout must be a number in"),
        ({"norm_c": None}, ValueError, "norm_c must be given where norm_ih is: norm_ih, norm_hh, norm_c go together"),
        ({"norm_ih": None}, ValueError, "norm_ih must be given where norm_hh is"),
        ({"norm_hh": ONE}, TypeError, r"norm_hh must be a pair of Tensors \(weight, bias\) or None, got Tensor"),
        ({"norm_hh": (ONE,)}, TypeError, "norm_hh must be a pair of Tensors .*got 1 of them"),
        ({"norm_c": (ONE, None)}, TypeError, r"norm_c\[1\] must be a Tensor, got NoneType"),
        ({"norm_ih": (ONE, ONE)}, ValueError, rf"norm_ih\[0\] must have shape \({4 * H},\) .*got \({H},\)"),
        (
            {"norm_c": (ONE, ONE.float())},
            ValueError,
            r"norm_c\[1\] must have x's dtype torch.float64, got",
        ),
        ({"input_mask": [1.0]}, TypeError, "input_mask must be a Tensor or None, got list"),
        ({"input_mask": torch.ones(I)}, ValueError, rf"input_mask must have shape \({B}, {I}\) or \(4, {B}, {I}\)"),
        ({"input_mask": torch.ones(3, B, I)}, ValueError, rf"input_mask must have shape .*got \(3, {B}, {I}\)"),
        ({"recurrent_mask": torch.ones(B, H)}, ValueError, "recurrent_mask must have x's dtype torch.float64, got"),
        ({"recurrent_mask": torch.ones(H, B)}, ValueError, rf"recurrent_mask must have shape \({B}, {H}\) or"),
        ({"seed": 3}, TypeError, "seed must be a Tensor or None, got int"),
        ({"seed": torch.tensor(3, dtype=torch.int32)}, ValueError, "seed must have dtype torch.int64, got torch.int32"),
        ({"seed": torch.tensor([3, 4])}, ValueError, r"seed must have shape \(1,\) or \(\) .*got \(2,\)"),
        ({"seed": torch.tensor(3, device="meta")}, ValueError, "seed must be on x's device cpu, got meta"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str, engine: str) -> None:
    plain("lstm", LSTM)
    with pytest.raises(error, match=message):
        plain("lstm", LSTM | change, engine=engine)


def test_what_cells_do_not_have() -> None:
    gru = draw(CellSpec("gru", layer_norm=True))
    with pytest.raises(ValueError, match="layer_norm cannot go with reset_after=False"):
        plain("gru", gru, reset_after=False)
    with pytest.raises(ValueError, match="zoneout must be a number in"):
        plain("gru", gru, zoneout=(0.1, 0.1))
    for cell, name in (
        ("gru", "peephole"),
        ("gru", "norm_c"),
        ("rnn", "recurrent_activation"),
        ("lstm", "reset_after"),
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            plain(cell, draw(CellSpec(cell)), **{name: None})
