"""The options of the functions under autocast, in plans, derivatives of all kinds, torch.compile and opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import TOLERANCE, relative_error
from option_problems import (
    EVERYTHING,
    LENGTHS,
    MASK,
    RESET,
    SPECS,
    B,
    H,
    T,
    assert_close,
    draw,
    plain,
    seeded,
    with_gradients,
)
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import lstm_triton as lt
from lstm_triton.spec import CellSpec

pytestmark = [
    pytest.mark.both,
    pytest.mark.filterwarnings("ignore:LSTM with .* is not supported with oneDNN"),
]


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
