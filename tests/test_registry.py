"""Cells from a user's own code: docs/adding-a-cell.md as it stands, and every way that such a cell may be run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cell_problems import CellProblem
from concurrency import concurrent
from lstm_triton.kernels.activations import sigmoid, tanh
from lstm_triton.kernels.cells import gate, gate_gradient, keep, reopen
from lstm_triton.perf import resources
from numerics import ENGINES, TOLERANCE, problem, relative_error
from torch import Tensor

import lstm_triton as lt
from lstm_triton import constexprs, devices, functional, launch, ops, planner, reference, registry
from lstm_triton.spec import KINDS, CellSpec

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-cell.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
CHECK = 'lt.check_cell("mgu")\n'


@triton.jit
def lstm_forward(x, h, state, params, OPT: tl.constexpr):
    i, f = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
    g, o = tanh(x[2] + h[2]), sigmoid(x[3] + h[3])
    c = f * state + i * g
    return o, c, (i, f, g, o), c


@triton.jit
def lstm_backward(dout, dstate, kept, state, state_prev, extra, params, OPT: tl.constexpr):
    i, f, g, o = kept[0], kept[1], kept[2], kept[3]
    slots = (
        dstate * g * (i * (1 - i)),
        dstate * state_prev * (f * (1 - f)),
        dstate * i * (1 - g * g),
        dout * (o * (1 - o)),
    )
    return slots, tl.zeros_like(dout), dstate * f, ()


@triton.jit
def lstm_output(out, state, OPT: tl.constexpr):
    return out * tanh(state)


@triton.jit
def lstm_backward_output(dh, kept, state, OPT: tl.constexpr):
    phi = tanh(state)
    return dh * phi, dh * kept[3] * (1 - phi * phi)


@triton.jit
def lstm_candidate(kept, state, state_prev, OPT: tl.constexpr):
    return kept[1] * state_prev + kept[0] * kept[2]


def lstm_step(x: tuple[Tensor, ...], h: tuple[Tensor, ...], c: Tensor) -> tuple[Tensor, Tensor]:
    a = [left + right for left, right in zip(x, h, strict=True)]
    c = a[1].sigmoid() * c + a[0].sigmoid() * a[2].tanh()
    return a[3].sigmoid() * c.tanh(), c


LSTM: dict[str, Any] = {
    "gates": ("i", "f", "g", "o"), "forward": lstm_forward, "backward": lstm_backward, "reference": lstm_step,
    "output": lstm_output, "backward_output": lstm_backward_output,
}  # fmt: skip


@triton.jit
def gru_forward(x, h, state, params, OPT: tl.constexpr):
    r, z = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    h_t = n + z * (state - n)
    return h_t, h_t, (r, z, n), h[2]


@triton.jit
def gru_backward(dout, dstate, kept, state, state_prev, extra, params, OPT: tl.constexpr):
    r, z, n = kept[0], kept[1], kept[2]
    dn = dout * (1 - z) * (1 - n * n)
    dz = dout * (state_prev - n) * (z * (1 - z))
    dr = dn * extra * (r * (1 - r))
    return (dr, dz, dn, dr, dz, dn * r), dout * z, dstate, ()


def gru_step(x: tuple[Tensor, ...], h: tuple[Tensor, ...], state: Tensor) -> Tensor:
    r, z = (x[0] + h[0]).sigmoid(), (x[1] + h[1]).sigmoid()
    return (1 - z) * (x[2] + r * h[2]).tanh() + z * state


GRU: dict[str, Any] = {
    "gates": ("r", "z", "n"), "forward": gru_forward, "backward": gru_backward, "reference": gru_step, "separate": True,
}  # fmt: skip


@triton.jit
def diagonal_forward(x, h, state, params, OPT: tl.constexpr):
    a = x[0] + h[0] + params[0] * state + params[1]
    h_t = gate(a, OPT.activation, OPT)
    return h_t, h_t, (keep(a, h_t, OPT.activation, OPT),), h_t


@triton.jit
def diagonal_backward(dout, dstate, kept, state, state_prev, extra, params, OPT: tl.constexpr):
    da = gate_gradient(dout, kept[0], reopen(kept[0], OPT.activation, OPT), OPT.activation, OPT)
    return (da,), params[0] * da, dstate, (da * state_prev, da)


def diagonal_step(
    x: tuple[Tensor, ...], h: tuple[Tensor, ...], state: Tensor, *, params: tuple[Tensor, ...], activation: Any,
    gate_clip: float | None,
) -> Tensor:  # fmt: skip
    a = x[0] + h[0] + params[0] * state + params[1]
    return reference.activate(a if gate_clip is None else a.clamp(-gate_clip, gate_clip), activation)


DIAGONAL: dict[str, Any] = {
    "gates": ("h",), "forward": diagonal_forward, "backward": diagonal_backward, "reference": diagonal_step,
    "vectors": ("u", "b"), "options": ("activation", "gate_clip"),
}  # fmt: skip


@triton.jit
def plain_forward(x, h, state, params, OPT: tl.constexpr):
    h_t = tanh(x[0] + h[0])
    return h_t, h_t, (h_t,), h_t


@triton.jit
def plain_backward(dout, dstate, kept, state, state_prev, extra, params, OPT: tl.constexpr):
    return (dout * (1 - state * state),), tl.zeros_like(dout), dstate, ()


def plain_step(x: tuple[Tensor, ...], h: tuple[Tensor, ...], state: Tensor) -> Tensor:
    return (x[0] + h[0]).tanh()


PLAIN: dict[str, Any] = {
    "gates": ("h",), "forward": plain_forward, "backward": plain_backward, "reference": plain_step,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_cells() -> Iterator[None]:
    """Registered for this file alone: others ask which cells there are."""
    before = set(KINDS)
    lt.register_cell("own_lstm", **LSTM, candidate=lstm_candidate)
    lt.register_cell("own_gru", **GRU)
    lt.register_cell("diagonal", **DIAGONAL)
    lt.register_cell("plain", **PLAIN)
    yield
    for name in set(KINDS) - before:
        for table in (KINDS, constexprs._CELLS, reference.STEPS, functional._FUNCTIONS, registry._registered):
            del table[name]
        for module in (functional, reference):
            delattr(module, name)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, own_cells: None) -> Iterator[ModuleType]:
    """The page's code as a module of its own; on a CPU without kernels all but the check, which then has to refuse."""
    assert BLOCKS.count(CHECK) == 1
    path = tmp_path_factory.mktemp("page") / "page_of_mgu.py"
    path.write_text("\n\n".join(block for block in BLOCKS if launch.INTERPRETED or block != CHECK))
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    found.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


@pytest.mark.both
def test_page(page: ModuleType) -> None:
    assert sum(page.losses[-3:]) < 0.5 * sum(page.losses[:3])
    if not launch.INTERPRETED:
        with pytest.raises(RuntimeError, match="needs a GPU, or TRITON_INTERPRET=1"):
            lt.check_cell("mgu")


@pytest.mark.native
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_page_compiles_ahead(page: ModuleType, direction: str) -> None:
    w = torch.empty(2 * 512, 512, dtype=torch.bfloat16, device="meta")
    x = torch.empty(32, 16, 512, dtype=torch.bfloat16, device="meta")
    plan = lt.plan("mgu", x, None, w, w, engine="resident", target="H200")
    assert plan.explain().startswith("mgu, T=32, B=16, H=512, bfloat16 on H200")
    (row,) = resources.compile_group([(plan, direction)])
    assert (row.problems, row.spill_bytes, row.engine) == ("", 0, "resident")
    assert row.shared_bytes <= row.shared_plan


FAULTS = {
    # what is planted: the line, what becomes of it, and what check_cell finds first
    "forward": ("h_t = state + f * (n - state)", "h_t = n + f * (state - n)", "y differs"),
    "derivative of n": (" * (1 - n * n)", "", "the gradient by gate f's part of the input product"),
    "derivative of f": (" * f * (1 - f)", " * f", "the gradient by gate f's part of the input product"),
    "slots swapped": ("(df, dn, df, dn * f)", "(dn, df, df, dn * f)", "gate f's part of the input product"),
    "slot by h": ("(df, dn, df, dn * f)", "(df, dn, df, dn)", "gate n's part of the recurrent product"),
    "h directly": ("dout * (1 - f), dstate", "tl.zeros_like(dout), dstate", "the gradient by h0 (dh_direct"),
    "kept": ("(f, n), h[1]", "(n, f), h[1]", "the gradient by gate f's part of the input product"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault: str, page: ModuleType, tmp_path: Path) -> None:
    right, wrong, found = FAULTS[fault]
    name = f"faulty_{fault.replace(' ', '_')}"
    source = "\n\n".join(BLOCKS[:3]).replace('"mgu"', f'"{name}"')
    assert source.count(right) == 1
    path = tmp_path / "faulty.py"
    path.write_text(source.replace(right, wrong))
    at = importlib.util.spec_from_file_location("faulty", path)
    at.loader.exec_module(importlib.util.module_from_spec(at))
    with pytest.raises(AssertionError, match=re.escape(found)) as raised:
        lt.check_cell(name)
    assert str(raised.value).startswith(f"{name}, one step: ")
    if fault == "derivative of n":  # the one that the page has
        told = next(line for line in PAGE.read_text().splitlines() if line.startswith("    mgu, one step"))
        assert str(raised.value).replace(name, "mgu").startswith(told.strip().removesuffix("..."))


def test_check_passes_what_is_right() -> None:
    lt.check_cell("own_lstm", hidden=5, steps=2)
    lt.check_cell("diagonal", hidden=5, steps=2, activation="elu", gate_clip=0.7)


def test_check_plans_on_every_gpu() -> None:
    """What check_cell would run there: float64 has not every engine on every GPU."""
    for device in devices.devices().values():
        calls = [call for _, _, call in registry._calls("own_lstm", 11, 3, device)]
        assert {call["engine"] for call in calls} >= {"streamed", "step"}
        assert ({call["engine"] for call in calls} == {*ENGINES}) == device.fp64_matrix_products
        for call in calls:
            planner.make_plan(CellSpec("own_lstm"), 3, 3, 11, torch.float64, device, engine=call["engine"])


def test_check_finds_faults_of_vectors_and_cell_states() -> None:
    lt.register_cell("faulty_vectors", **(DIAGONAL | {"backward": diagonal_backward_wrong}))
    with pytest.raises(AssertionError, match=re.escape("one step: the gradient by params (dparams) differs")):
        lt.check_cell("faulty_vectors")
    lt.register_cell("faulty_state", **(LSTM | {"backward": lstm_backward_wrong}))
    with pytest.raises(AssertionError, match=re.escape("one step: the gradient by c0 (dstate_prev) differs")):
        lt.check_cell("faulty_state")


@triton.jit
def undefined_at_zero(x, h, state, params, OPT: tl.constexpr):
    h_t = tanh((x[0] + h[0]) * (x[0] / x[0]))
    return h_t, h_t, (h_t,), h_t


def test_check_has_units_that_are_not_there() -> None:
    """In the last tile, with zeros for inputs: engine local multiplies them too."""
    lt.register_cell("undefined_at_zero", **(PLAIN | {"forward": undefined_at_zero}))
    with pytest.raises(AssertionError, match="engine 'local': y differs from the reference's by nan"):
        lt.check_cell("undefined_at_zero")


@triton.jit
def diagonal_backward_wrong(dout, dstate, kept, state, state_prev, extra, params, OPT: tl.constexpr):
    da = gate_gradient(dout, kept[0], reopen(kept[0], OPT.activation, OPT), OPT.activation, OPT)
    return (da,), params[0] * da, dstate, (da, da)


@triton.jit
def lstm_backward_wrong(dout, dstate, kept, state, state_prev, extra, params, OPT: tl.constexpr):
    slots, dh_direct, _, dparams = lstm_backward(dout, dstate, kept, state, state_prev, extra, params, OPT)
    return slots, dh_direct, dstate, dparams


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("local", torch.float16),
        ("resident", torch.bfloat16),
        ("streamed", torch.float32),
        ("step", torch.float16),
        ("step", torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes(page: ModuleType, dtype: torch.dtype, engine: str) -> None:
    case = CellProblem(CellSpec("mgu"), 3, 3, 2, 12, dtype=dtype)
    whole = engine in ("resident", "streamed")
    errors = case.errors(engine=engine, tile=(16, 16 if whole else 8))
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, {"masks": 1, "skips": True, "reverse": True}),
        ({"zoneout": (0.4, 0.0)}, {"masks": 2, "seed": 5, "skips": True}),
        ({"layer_norm": True}, {"skips": True}),
        ({"layer_norm": True, "bias": False, "zoneout": (0.4, 0.0)}, {"masks": 1, "reverse": True}),
        ({"bias": False}, {"masks": 2}),
    ],
    ids=str,
)
def test_options_around_the_cell(page: ModuleType, options: Any, how: Any, memory: str) -> None:
    case = CellProblem(CellSpec("mgu", **options), 3, 3, 2, 12, dtype=torch.float64, **how)
    errors = case.errors(engine="local" if case.reverse else "step", tile=(16, 8), memory=memory)
    assert max(errors.values()) <= 1e-13, errors


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_recompute_in_chunks(page: ModuleType, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than are computed again at a time: the draws of zoneout go on where the chunk before ended."""
    monkeypatch.setattr(ops, "chunk_steps", lambda T: 2)
    spec = CellSpec("mgu", zoneout=(0.4, 0.0))
    case = CellProblem(spec, 5, 3, 2, 4, dtype=torch.float64, seed=7, skips=True, reverse=reverse)
    errors = case.errors(engine="local", memory="recompute")
    assert max(errors.values()) <= 1e-13, errors


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_programs_wait_for_one_another(page: ModuleType, engine: str) -> None:
    case = CellProblem(CellSpec("mgu"), 3, 3, 2, 20, dtype=torch.float64, skips=True)
    with concurrent(0) as run:
        errors = case.errors(engine=engine, tile=(16, 8))
    assert not run.races, run.describe()
    assert max(errors.values()) <= TOLERANCE[torch.float64], errors


def differentiated(cell: str, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Results, and the gradients of their squares by all inputs."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    results = getattr(lt.functional, cell)(*leaves, **options)
    loss = sum(y.square().sum() for y in results)
    return [*(y.detach() for y in results), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("engine", ENGINES)
def test_own_lstm_is_the_built_in_one(engine: str) -> None:
    """Bit for bit: the mathematics is the same, and nothing else depends on whose it is."""
    inputs = problem("lstm", 3, 3, 12, 2, torch.bfloat16 if engine in ("resident", "step") else torch.float32)
    options: dict[str, Any] = {"engine": engine, "tile": (16, 16 if engine in ("resident", "streamed") else 8)}
    if engine in ("local", "streamed"):
        options |= {"lengths": torch.tensor([3, 0, 2]), "return_cells": True, "reverse": True}
        options |= {"zoneout": (0.3, 0.4), "seed": torch.tensor(11)}
    found, wanted = differentiated("own_lstm", inputs, **options), differentiated("lstm", inputs, **options)
    assert len(found) == len(wanted) == 10 + ("return_cells" in options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_own_gru_is_the_built_in_one(engine: str) -> None:
    """Bit for bit, but for what PyTorch sums with the gates in another order."""
    inputs = problem("gru", 3, 3, 12, 2, torch.float64)
    options = {"engine": engine, "tile": (16, 16 if engine in ("resident", "streamed") else 8)}
    found, wanted = differentiated("own_gru", inputs, **options), differentiated("gru", inputs, **options)
    names = ("y", "h_n", "dx", "dh0", "dw_ih", "dw_hh", "db_ih", "db_hh")
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        if name in ("dx", "dw_ih", "db_ih"):
            assert relative_error(ours, theirs) <= TOLERANCE[torch.float64], name
        else:
            assert torch.equal(ours, theirs), name


def test_only_what_backward_reads_is_kept() -> None:
    assert (KINDS["own_gru"].extra, KINDS["own_gru"].keeps) == (True, True)
    assert (KINDS["diagonal"].extra, KINDS["diagonal"].keeps) == (False, True)
    assert (KINDS["plain"].extra, KINDS["plain"].keeps) == (False, False)
    errors = CellProblem(CellSpec("plain"), 3, 3, 2, 12, dtype=torch.float64, skips=True).errors(engine="local")
    assert max(errors.values()) <= TOLERANCE[torch.float64], errors


def weights(cell: str, H: int = 4, I: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:  # noqa: E741
    generator = torch.Generator().manual_seed(3)
    shapes = CellSpec(cell).parameters(I, H).values()
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.both
def test_derivatives_of_second_order(page: ModuleType) -> None:
    x = torch.randn(2, 2, 1, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    lengths, engine = torch.tensor([2, 1]), "local" if launch.INTERPRETED else "auto"

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return lt.functional.mgu(*tensors, lengths=lengths, engine=engine)

    inputs = (x, h0, *weights("mgu", 2, 1))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.both
def test_transforms(page: ModuleType) -> None:
    tensors = weights("mgu", 2, 1)
    x, t = torch.randn(2, 3, 2, 1, dtype=torch.float64)

    def loss(x: Tensor, *w: Tensor) -> Tensor:
        return lt.functional.mgu(x[:, None], None, *w)[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(1, *(None,) * 4))(x, *tensors)
    for row in range(2):
        leaf = x[:, row].clone().requires_grad_()
        assert torch.allclose(each[row], torch.autograd.grad(loss(leaf, *tensors), leaf)[0], rtol=1e-12)
    value, tangent = torch.func.jvp(lambda x: loss(x[:, 0], *tensors), (x,), (t,))
    leaf = x[:, 0].clone().requires_grad_()
    expected = (torch.autograd.grad(loss(leaf, *tensors), leaf)[0] * t[:, 0]).sum()
    assert torch.allclose(tangent, expected, rtol=1e-12) and torch.allclose(value, loss(leaf, *tensors), rtol=1e-12)


@pytest.mark.both
def test_two_cells_in_a_compiled_program(page: ModuleType) -> None:
    """One graph, with both cells in it, one above the other."""
    first, second = weights("mgu"), weights("own_lstm", 5, 4)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        y = lt.functional.mgu(x, None, *first, lengths=torch.tensor([3, 2]))[0]
        return lt.functional.own_lstm(y, None, None, *second)[0]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [x, *first, *second]
    found, wanted = compiled(x), run(x)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, wanted)]
    assert torch.allclose(found, wanted, rtol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*gradients, strict=True))


@pytest.mark.both
def test_autocast(page: ModuleType) -> None:
    x, tensors = torch.randn(3, 2, 3), weights("mgu", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, h_n = lt.functional.mgu(x, None, *tensors)
    assert y.dtype == h_n.dtype == torch.bfloat16
    gradient = torch.autograd.grad(y.float().square().sum(), tensors[0])[0]
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()
    assert relative_error(y, lt.reference.mgu(x.double(), None, *(w.double() for w in tensors))[0]) <= 2e-2


@pytest.mark.both
def test_specs_as_text(page: ModuleType) -> None:
    for spec in (CellSpec("mgu", zoneout=(0.5, 0.0), layer_norm=True), CellSpec("diagonal", "elu", gate_clip=2.0)):
        assert CellSpec.parse(str(spec)) == spec
        assert not spec.plain and spec.kind is KINDS[spec.cell]
    assert CellSpec("diagonal", layer_norm=True).rows == ("u", "b", "norm_hh.h")
    for name in ("lstm", "gru", "rnn"):  # and these are what they were
        assert not CellSpec(name).registered


@pytest.mark.both
def test_same_registration_again() -> None:
    assert lt.register_cell("own_gru", **GRU) is lt.functional.own_gru
    assert lt.functional.own_gru.__name__ == "own_gru" and "gates in the order r, z, n" in lt.functional.own_gru.__doc__
    for other in ({"separate": False}, {"reference": lambda x, h, state: state}, {"forward": gru_backward}):
        with pytest.raises(ValueError, match="name 'own_gru' is registered already, with other functions or settings"):
            lt.register_cell("own_gru", **(GRU | other))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"name": "gru"}, ValueError, "name must be another than those of the built-in cells, got 'gru'"),
    ({"name": "my-cell"}, ValueError, "name must be a Python identifier, got 'my-cell'"),
    ({"name": "class"}, ValueError, "name must be a Python identifier, got 'class'"),
    ({"name": "plan"}, ValueError, "name 'plan' is something else in lt.functional or lt.reference"),
    ({"gates": ("r", "z")}, ValueError, "forward must return 2 tiles as kept, got 3: (r, z, n)"),
    ({"gates": tuple("rznab")}, ValueError, "gates must be 1 to 4 names, got 5: r, z, n, a, b"),
    ({"gates": ()}, ValueError, "gates must be 1 to 4 names, got 0: none"),
    ({"gates": 3}, ValueError, "gates must be a tuple of different names, got 3"),
    ({"gates": ("r", "r", "n")}, ValueError, "gates must be a tuple of different names, got ('r', 'r', 'n')"),
    ({"separate": False}, ValueError, "backward must return 3 tiles as slots, got 6: (dr, dz, dn, dr, dz, dn * r)"),
    ({"separate": 1}, TypeError, "separate must be True or False, got 1"),
    ({"vectors": ("p",)}, ValueError, "backward must return 1 tiles as dparams, got 0: ()"),
    ({"options": ("cell_clip",)}, ValueError, "options must be among 'activation', 'recurrent_activation'"),
    ({"forward": gru_step}, TypeError, "forward must be a @triton.jit function, got function"),
    ({"backward": gru_forward}, ValueError, "backward must take (dout, dstate, kept, state, state_prev, extra, params"),
    ({"forward": lstm_candidate}, ValueError, "forward must take (x, h, state, params, OPT), got (kept, state, state"),
    ({"output": lstm_output}, ValueError, "output and backward_output go together"),
    ({"candidate": lstm_candidate}, ValueError, "which candidate is for too; got candidate"),
    ({"reference": None}, TypeError, "reference must be a function of PyTorch tensors, got NoneType"),
    ({"reference": lambda x, h, state: x[0].sum()}, ValueError, "reference must return h[t] as a Tensor [B, H] of x's "
     "dtype, here (2, 3) of torch.float64, got a Tensor () of torch.float64"),
    ({"reference": lambda x, h, state: state.float()}, ValueError, "got a Tensor (2, 3) of torch.float32"),
    ({"reference": lstm_step, "gates": tuple("ifgo"), "forward": lstm_forward, "backward": lstm_backward,
      "separate": False}, ValueError, "reference must return h[t] as a Tensor"),
    ({**LSTM, "separate": False, "reference": lambda x, h, c: c}, ValueError, "reference must return (h[t], c[t])"),
]  # fmt: skip


@pytest.mark.both
@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_what_is_wrong_is_told(given: dict[str, Any], error: type[Exception], message: str) -> None:
    before = dict(KINDS)
    with pytest.raises(error, match=re.escape(message)):
        lt.register_cell(**({"name": "wrong", **GRU} | given))
    assert before == KINDS and not hasattr(lt.functional, "wrong")


@pytest.mark.both
def test_a_wrong_call_is_told(page: ModuleType) -> None:
    w_ih, w_hh, *_ = weights("mgu")
    x = torch.randn(3, 2, 3, dtype=torch.float64)

    def call(cell: str, error: type[Exception], message: str, *tensors: Tensor | None, **options: Any) -> None:
        for run in (getattr(lt.functional, cell), lambda *a, **k: lt.plan(cell, *a, target="H200", **k)):
            with pytest.raises(error, match=re.escape(message)):
                run(*tensors, **options)

    call("mgu", ValueError, "w_hh must have shape (10, 5) (2 gate(s), T=3, B=2, I=3, H=5), got (8, 5)",
         x, None, w_ih, w_hh.new_zeros(8, 5))  # fmt: skip
    for name, value in (("activation", "relu"), ("coupled", True), ("w_hr", x), ("gate_clip", 1.0), ("peephole", x)):
        message = f"mgu() got an unexpected keyword argument '{name}': options of its own are none"
        call("mgu", TypeError, message, x, None, w_ih, w_hh, **{name: value})
    call("mgu", TypeError, "params is of cells registered with vectors, which 'mgu' was not",
         x, None, w_ih, w_hh, params=w_hh)  # fmt: skip
    call("diagonal", TypeError, "params must be a Tensor (2, 4), rows u, b, got None", x, None, w_ih[:4], w_hh[:4])
    with pytest.raises(TypeError, match=re.escape("params must be a Tensor (2, 4), got None")):
        lt.reference.diagonal(x, None, w_ih[:4], w_hh[:4, :4])
    with pytest.raises(TypeError, match="params must be left out"):
        lt.reference.mgu(x, None, w_ih, w_hh, params=w_hh)
    call("diagonal", ValueError, "params must have shape (2, 4)", x, None, w_ih[:4], w_hh[:4], params=w_hh[:3])
    call("plain", ValueError, "zoneout of h cannot go with 'plain'", x, None, w_ih[:4], w_hh[:4], zoneout=0.1)
    with pytest.raises(ValueError, match="activation is no option that 'mgu' was registered with: got 'relu'"):
        CellSpec("mgu", "relu")
    with pytest.raises(ValueError, match="layer_norm cannot go with 'own_lstm'"):
        CellSpec("own_lstm", layer_norm=True)
    with pytest.raises(ValueError, match="peephole is for the lstm alone"):
        CellSpec("own_lstm", peephole=True)
    with pytest.raises(ValueError, match="name must be a registered cell's"):
        lt.check_cell("lstm")
    with pytest.raises(ValueError, match=r"options must be those that 'mgu' was registered with \(none\), got engine"):
        lt.check_cell("mgu", engine="step")
    with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
        lt.check_cell("mgu", steps=0)
    with pytest.raises(ValueError, match="name must not begin with an underscore, got '__getattr__'"):
        lt.register_cell("__getattr__", **LSTM)
    with pytest.raises(ValueError, match="or be registered first, got 'of_another_process'"):
        CellSpec.parse("of_another_process zoneout=(0.1,0.0)")


@pytest.mark.both
def test_zoneout_of_c_wants_the_candidate() -> None:
    lt.register_cell("held_lstm", **LSTM)
    assert (KINDS["held_lstm"].zoned, KINDS["own_lstm"].zoned) == (("h",), ("h", "c"))
    with pytest.raises(
        ValueError, match="zoneout of c cannot go with 'held_lstm': it was registered without candidate"
    ):
        CellSpec("held_lstm", zoneout=(0.0, 0.1))
    assert planner.make_plan(CellSpec("held_lstm", zoneout=(0.1, 0.0)), 4, 2, 8, torch.float32, devices.INTERPRETER)
