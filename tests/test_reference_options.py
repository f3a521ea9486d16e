"""What torch.nn has no words for: the oracle in every variant of spec.py, and with options that meet one another.

Against the equations of cell_equations.py, with all derivatives against differences; and `reference.sequence`, which
the kernels' host code calls, against the functions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cell_equations import by_equations, layer_norm
from reference_problems import ALL_STEPS, SEED, TOGETHER, assert_same, call, every_spec, tensors_of
from torch import Tensor, nn

from lstm_triton import reference
from lstm_triton.spec import CellSpec


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
