"""The cells beyond torch.nn's: what the options of functions and layers mean to who calls them.

Where an option can be told with torch.nn's cells it is: a coupled gate by weights of the other sign, masks by weights
that hold them. The equations themselves are test_reference's matter, the kernels' numerics test_kernels'.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import TOLERANCE, relative_error
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import lstm_triton as lt
from lstm_triton import launch
from lstm_triton.spec import OPTIONS, CellSpec

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]

T, B, H, I, P = (3, 3, 5, 4, 2) if launch.INTERPRETED else (5, 3, 5, 4, 2)  # noqa: E741
LENGTHS = torch.tensor([T, 0, T - 1])
MASK = torch.arange(3 * T).view(T, 3) % 4 != 1
RESET = torch.arange(3 * T).view(T, 3) % 5 == 3
LAYERS = {"lstm": lt.LSTM, "gru": lt.GRU, "rnn": lt.RNN}
CELLS = list(LAYERS)
#: All of them at once, as far as they get on with each other.
EVERYTHING = {
    "lstm": CellSpec(
        "lstm", "elu", True, P, "hard_sigmoid", "softsign", peephole=True, coupled=True, cell_clip=0.8, gate_clip=1.5,
        layer_norm=True, zoneout=(0.3, 0.4),
    ),
    "gru": CellSpec("gru", "softplus", True, 0, "hard_sigmoid", reset_after=False, gate_clip=1.5, zoneout=(0.3, 0)),
    "rnn": CellSpec("rnn", "leaky_relu", gate_clip=1.5, layer_norm=True, zoneout=(0.3, 0)),
}  # fmt: skip
SPECS = [*OPTIONS, *EVERYTHING.values()]
Tensors = dict[str, Any]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(spec: CellSpec, masks: str = "", dtype: torch.dtype = torch.float64, rows: int = B) -> Tensors:
    """All tensors of one call of the functions, by argument. masks: "" none, "shared" or "per gate"."""
    generator = seeded()

    def normal(*shape: int, scale: float = 0.5) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def norm(size: int) -> tuple[Tensor, Tensor]:
        return 1 + normal(size, scale=0.2), normal(size, scale=0.2)

    tensors: Tensors = {"x": normal(T, rows, I, scale=1)}
    tensors |= {name: normal(*shape) for name, shape in spec.state_shapes(rows, H).items()}
    tensors |= {name: normal(*shape) for name, shape in spec.parameters(I, H).items()}
    if spec.layer_norm:
        tensors |= {"norm_ih": norm(spec.gates * H), "norm_hh": norm(spec.gates * H)}
        tensors |= {"norm_c": norm(H)} if spec.cell == "lstm" else {}
    if masks:
        gates = (spec.gates,) if masks == "per gate" else ()
        tensors["input_mask"] = 1 + normal(*gates, rows, I)
        tensors["recurrent_mask"] = 1 + normal(*gates, rows, spec.output(H))
    return tensors


def with_gradients(function: Callable[..., Any], tensors: Tensors, **options: Any) -> list[Tensor]:
    """Outputs, and the gradients by all tensors for a fixed combination of them."""
    leaves, tree = tree_flatten(tensors)
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    outputs = function(**tree_unflatten(leaves, tree), **options)
    generator = seeded(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def assert_close(found: Any, wanted: Any, dtype: torch.dtype = torch.float64) -> None:
    for ours, other in zip(found, wanted, strict=True):
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
        assert relative_error(ours, other) <= TOLERANCE[dtype]


def assert_same(found: Any, wanted: Any) -> None:
    assert all(torch.equal(*pair) for pair in zip(tree_leaves(found), tree_leaves(wanted), strict=True))


def plain(cell: str, tensors: Tensors, **options: Any) -> tuple[Tensor, ...]:
    return getattr(lt.functional, cell)(**tensors, **options)


# Functions.


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


@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=str)
def test_autocast_takes_the_options_along(spec: CellSpec) -> None:
    tensors = draw(spec, "per gate", torch.float32)
    function, seed = getattr(lt.functional, spec.cell), torch.tensor([5])
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(function, tensors, **spec.options, seed=seed)
    assert {t.dtype for t in found[: 1 + len(spec.states)]} == {torch.bfloat16}
    assert {t.dtype for t in found[1 + len(spec.states) :]} == {torch.float32}
    double = with_gradients(function, tree_map(torch.Tensor.double, tensors), **spec.options, seed=seed)
    # clips, and activations with corners, may fall to either side
    assert max(relative_error(*pair) for pair in zip(found[:1], double, strict=False)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("masks", ["", "shared", "per gate"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_plans(spec: CellSpec, masks: str) -> None:
    """Of meta tensors, for a GPU that is not there."""
    tensors = tree_map(lambda t: t.to("meta"), draw(spec, masks))
    plan = lt.plan(
        spec.cell, **tensors, **spec.options, seed=torch.zeros(1, dtype=torch.int64, device="meta"), target="H200"
    )
    assert (plan.spec, plan.T, plan.B, plan.H) == (spec, T, B, H)
    assert spec.cell in plan.explain()


def test_a_plan_knows_what_its_kernels_do_not_see() -> None:
    tensors = tree_map(lambda t: t.to("meta"), draw(CellSpec("gru"), "per gate"))
    del tensors["b_hh"]
    assert not lt.plan("gru", **tensors, target="H200").spec.bias  # b_ih is added before
    tensors = tree_map(lambda t: t.to("meta"), draw(CellSpec("gru", bias=False, layer_norm=True)))
    assert lt.plan("gru", **tensors, target="H200").spec.bias  # that of the normalisation


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


@pytest.mark.native
@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=str)
def test_derivatives_of_all_kinds(spec: CellSpec) -> None:
    tensors = draw(spec, "per gate", rows=2)
    tensors["x"] = tensors["x"][:2]
    leaves, tree = tree_flatten(tensors)
    leaves = [t.requires_grad_() for t in leaves]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return plain(spec.cell, tree_unflatten(leaves, tree), **spec.options, lengths=torch.tensor([2, 1]))

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    many = torch.stack([leaves[0].detach(), 2 * leaves[0].detach()])
    rest = [t.detach() for t in leaves[1:]]
    found = torch.func.vmap(lambda x: function(x, *rest))(many)
    assert_close(found, [torch.stack(t) for t in zip(*(function(x, *rest) for x in many), strict=True)])


@pytest.mark.native
@pytest.mark.parametrize("masks", ["", "shared", "per gate"])
@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=str)
def test_functions_compile_once(spec: CellSpec, masks: str) -> None:
    torch.compiler.reset()
    names = list(draw(spec, masks))

    def function(lengths: Tensor, seed: Tensor, *tensors: Any) -> Any:
        given = dict(zip(names, tensors, strict=True))
        return plain(spec.cell, given, **spec.options, lengths=lengths, seed=seed)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 6):  # sizes that are equal would be taken for the same
            tensors = draw(spec, masks, rows=rows)
            lengths, seed = torch.arange(rows) % (T + 1), torch.tensor([rows])
            results = [
                with_gradients(
                    lambda _given=(f, lengths, seed), **drawn: _given[0](*_given[1:], *drawn.values()), tensors
                )
                for f in (compiled, function)
            ]
            assert_close(*results)


@pytest.mark.native
@pytest.mark.parametrize("spec", EVERYTHING.values(), ids=str)
def test_opcheck(spec: CellSpec) -> None:
    """Schema, fakes, gradients and tracing, with a finished input part and with weights for it."""
    given = draw(spec, "per gate", torch.float32)
    params = torch.rand(len(spec.rows), H, generator=seeded()) if spec.rows else None
    part = torch.rand(T, B, spec.gates * H, generator=seeded())
    c0, w_hr = given.get("c0"), given.get("w_hr")
    for x, weights in ((part, (None, None)), (given["x"], (given["w_ih"], given["b_ih"]))):
        tensors = [x, given["h0"], c0, weights[0], given["w_hh"], weights[1], given["b_hh"], w_hr, params]
        tensors = [None if t is None else t.clone().requires_grad_() for t in [*tensors, given["recurrent_mask"]]]
        arguments = (*tensors, LENGTHS, MASK, RESET, torch.tensor([9]), spec.untold, True, c0 is not None)
        operators = torch.ops.lstm_triton
        torch.library.opcheck(operators.host_forward.default, arguments)
        y, h_n, c_n, cells = (torch.ones_like(t) for t in operators.host_forward(*arguments))
        grads = (y, h_n, *((None, None) if c0 is None else (c_n, cells)))
        torch.library.opcheck(operators.host_backward.default, (*grads, *arguments))


# Layers.


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


def record(monkeypatch: pytest.MonkeyPatch, cell: str) -> list[dict[str, Any]]:
    """The keyword arguments of every call of the function from here on."""
    calls: list[dict[str, Any]] = []
    function = getattr(lt.functional, cell)
    monkeypatch.setattr(
        lt.functional, cell, lambda *args, **options: calls.append(options) or function(*args, **options)
    )
    return calls


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize(
    ("cell", "own", "gates"),
    [("lstm", {"proj_size": P}, 4), ("lstm", {"coupled": True}, 3), ("gru", {}, 3), ("rnn", {}, 1)],
)
def test_training_draws_masks(
    cell: str, own: dict[str, Any], gates: int, per_gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each layer, direction and call, scaled; in evaluation none."""
    calls = record(monkeypatch, cell)
    layer = LAYERS[cell](
        I,
        H,
        num_layers=2,
        bidirectional=True,
        input_dropout=0.5,
        recurrent_dropout=0.2,
        dropout_per_gate=per_gate,
        **own,
    )
    rows, x = 16, torch.randn(1, 16, I, generator=seeded())
    torch.manual_seed(0)
    first, _ = layer(x)
    second, _ = layer(x)
    torch.manual_seed(0)
    again, _ = layer(x)
    assert torch.equal(first, again) and not torch.equal(first, second)
    outputs = own.get("proj_size", H)
    lead = (gates, rows) if per_gate else (rows,)
    assert [c["input_mask"].shape for c in calls[:4]] == [(*lead, n) for n in (I, I, 2 * outputs, 2 * outputs)]
    assert [c["recurrent_mask"].shape for c in calls[:4]] == [(*lead, outputs)] * 4
    for name, p in (("input_mask", 0.5), ("recurrent_mask", 0.2)):
        drawn = [c[name] for c in calls[:4]]
        assert all(set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()} for mask in drawn)
        assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[2], drawn[3])
        kept = torch.cat([mask.flatten() for mask in drawn]).bool().double()
        assert abs(kept.mean() - (1 - p)) <= 4 * (p * (1 - p) / kept.numel()) ** 0.5
    calls.clear()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert not any({"input_mask", "recurrent_mask", "seed"} & c.keys() for c in calls)


@pytest.mark.parametrize("cell", CELLS)
def test_dropped_altogether(cell: str) -> None:
    """With probability 1 only biases are left: every step the same, and no gradient by the weights."""
    layer = LAYERS[cell](I, H, input_dropout=1.0, recurrent_dropout=1)
    y, _ = layer(torch.randn(T, B, I, generator=seeded()))
    assert y.isfinite().all() and torch.equal(y[:, 0], y[:, 1])
    by_weights = torch.autograd.grad(y.sum(), [layer.weight_ih_l0, layer.weight_hh_l0])
    assert not any(g.any() for g in by_weights)


@pytest.mark.parametrize("cell", CELLS)
def test_training_draws_seeds(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, cell)
    layer = LAYERS[cell](I, H, num_layers=2, bidirectional=True, zoneout=0.5)
    x = torch.randn(T, B, I, generator=seeded())
    torch.manual_seed(0)
    first, _ = layer(x)
    second, _ = layer(x)
    torch.manual_seed(0)
    assert torch.equal(first, layer(x)[0]) and not torch.equal(first, second)
    seeds = [c["seed"] for c in calls[:8]]
    assert all(s.shape == (1,) and s.dtype == torch.int64 for s in seeds)
    assert len({int(s) for s in seeds}) == 8 and any(abs(int(s)) > 2**32 for s in seeds)
    calls.clear()
    layer.eval()(x)
    assert len(calls) == 4 and not any("seed" in c for c in calls)


def test_nothing_is_drawn_without_an_option() -> None:
    layer = lt.LSTM(I, H, zoneout=(0.0, 0.0))
    state = torch.get_rng_state()
    layer(torch.zeros(1, 1, I))
    assert torch.equal(torch.get_rng_state(), state)


def test_regularisation_trains() -> None:
    """The mean over masks of a linear network is that without them."""
    layer = lt.RNN(I, H, activation="linear", recurrent_dropout=0.3, input_dropout=0.3, dtype=torch.float64)
    rows = 256 if launch.INTERPRETED else 4096
    x = torch.randn(2, 1, I, generator=seeded(), dtype=torch.float64).expand(2, rows, I)
    torch.manual_seed(0)
    y, _ = layer(x)
    wanted = layer.eval()(x[:, :1])[0][:, 0]
    deviation = y.std(dim=1) / rows**0.5
    assert ((y.mean(dim=1) - wanted).abs() <= 5 * deviation).all() and (deviation > 0).all()


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


@pytest.mark.parametrize("cell", CELLS)
def test_layers_under_autocast(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, cell)
    layer = LAYERS[cell](I, H, num_layers=2, layer_norm=True, recurrent_dropout=0.5, zoneout=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(torch.randn(2, B, I, generator=seeded()))
    assert y.dtype == torch.bfloat16
    assert [c["recurrent_mask"].dtype for c in calls] == [torch.float32, torch.bfloat16]
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


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


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dropout_between_layers_is_drawn_as_before(p: float) -> None:
    """torch.nn's draws where no option asks for others."""
    torch.manual_seed(0)
    ours = lt.GRU(I, H, num_layers=2, dropout=p, dtype=torch.float64)
    theirs = nn.GRU(I, H, num_layers=2, dropout=p, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, generator=seeded(), dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(layer(x))
    assert_close(*results)


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
