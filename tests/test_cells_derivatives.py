"""What surrounds the kernels, for the options of the cells: derivatives of any order and kind, operators, programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cell_problems import CellProblem
from numerics import relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lstm_triton as lt
from lstm_triton.spec import CellSpec

SPECS = (
    CellSpec("lstm", peephole=True, proj=2, cell_clip=1.5, gate_clip=3.0, zoneout=(0.3, 0.2)),
    CellSpec("lstm", "softsign", coupled=True, layer_norm=True),
    CellSpec("gru", "elu", reset_after=False, zoneout=(0.3, 0.0)),
    CellSpec("rnn", "softplus", layer_norm=True),
)


def problem(spec: CellSpec, masks: int | None = None, **options: Any) -> CellProblem:
    options = {"T": 3, "B": 2, "I": 2, "H": 4, "dtype": torch.float64, "skips": True} | options
    return CellProblem(spec, masks=spec.gates if masks is None else masks, **options)


def function(p: CellProblem, names: list[str], module: Any = lt.functional, **how: Any) -> Callable[..., Tensor]:
    """One number from all results."""
    return lambda *t: sum(y.sin().sum() for y in p.run(module, dict(zip(names, t, strict=True)), **how))


def close(ours: Any, wanted: Any, tolerance: float = 1e-11) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert relative_error(a, b) <= tolerance


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_second_derivatives(spec: CellSpec, memory: str) -> None:
    p = problem(spec, seed=3)
    tensors, results = p.tensors(), []
    for module, how in ((lt.functional, {"engine": "local", "memory": memory}), (lt.reference, {})):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        value = function(p, list(tensors), module, **how)(*leaves)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    close(*results)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_only_the_gradients_asked_for(spec: CellSpec) -> None:
    p = problem(spec, 1, seed=3)
    tensors = p.tensors()
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    every = dict(
        zip(leaves, torch.autograd.grad(function(p, list(leaves))(*leaves.values()), leaves.values()), strict=True)
    )
    for name in tensors:
        some = {n: t.clone().requires_grad_(n == name) for n, t in tensors.items()}
        (gradient,) = torch.autograd.grad(function(p, list(some))(*some.values()), some[name])
        assert torch.equal(gradient, every[name]), name


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_forward_mode_and_vmap(spec: CellSpec, seed: int | None) -> None:
    """jvp, vmap over the sequences, their states and masks, and gradients for each, against the reference."""
    p = problem(spec, seed=seed, skips=False)
    tensors = p.tensors()
    names, values = list(tensors), list(tensors.values())
    along = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=t.dtype) for i, t in enumerate(values)
    ]
    stacked = [torch.stack((t, t + 0.1 * d)) for t, d in zip(values, along, strict=True)]
    rows = [0 if n in ("x", "h0", "c0", "recurrent_mask", "input_mask") else None for n in names]
    given = [s if at == 0 else t for s, t, at in zip(stacked, values, rows, strict=True)]
    results = []
    for module, how in ((lt.functional, {"engine": "local"}), (lt.reference, {})):
        f = function(p, names, module, **how)
        every = tuple(range(len(names)))
        results.append([
            *torch.func.jvp(f, tuple(values), tuple(along)),
            torch.vmap(f, tuple(rows))(*given),
            *torch.vmap(torch.func.grad(f, every), tuple(rows))(*given),
            torch.vmap(f)(*stacked),
            *torch.vmap(torch.func.grad(f, every))(*stacked),
        ])  # fmt: skip
    close(*results)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_operators_keep_their_rules(spec: CellSpec) -> None:
    """Schema, fakes, autograd of lstm_triton::forward and of the two backward operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "lstm_triton":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    for memory in ("store", "recompute"):
        p = problem(spec, 1, seed=3, dtype=torch.float32)
        leaves = {n: t.requires_grad_() for n, t in p.tensors().items()}
        with Record():
            function(p, list(leaves), engine="local", memory=memory)(*leaves.values()).backward()
    assert len({func for func, _ in calls}) == 3
    for func, args in calls:
        detached = [t.detach() if isinstance(t, Tensor) else t for t in args]
        torch.library.opcheck(func, tuple(detached), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_compiled_whole(spec: CellSpec) -> None:
    """fullgraph, forward and backward, with the draws of the same seed."""
    p = problem(spec, seed=3, dtype=torch.float32)
    tensors = p.tensors()
    f = function(p, list(tensors), engine="local")
    results = []
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        value = call(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    close(*results, 1e-6)


LAYERS = [
    (lt.LSTM, {"zoneout": (0.2, 0.3), "recurrent_dropout": 0.4, "input_dropout": 0.3, "dropout_per_gate": True}),
    (lt.GRU, {"reset_after": False, "zoneout": 0.2, "recurrent_dropout": 0.4}),
    (lt.RNN, {"layer_norm": True, "zoneout": 0.2, "input_dropout": 0.4}),
]


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=lambda v: getattr(v, "__name__", ""))
def test_checkpointing_draws_the_same(kind: type[torch.nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = kind(3, 6, num_layers=2, bidirectional=True, **options)
    x = torch.randn(4, 2, 3)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y, _ = call(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_seed_reproduces_a_run_and_the_next_run_is_another(
    kind: type[torch.nn.Module], options: dict[str, Any]
) -> None:
    layer, x = kind(3, 6, **options), torch.randn(4, 2, 3)
    torch.manual_seed(5)
    first, second = layer(x)[0], layer(x)[0]
    torch.manual_seed(5)
    again = layer(x)[0]
    assert torch.equal(first, again) and not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_random_masks_take_no_memory_of_a_sequence() -> None:
    """What zoneout saves for backward is what the same cell saves in expectation, and the seed."""

    def saved_bytes(seed: int | None) -> int:
        p = CellProblem(CellSpec("lstm", zoneout=(0.3, 0.2)), 16, 4, 3, 8, seed=seed)
        leaves, saved = {n: t.requires_grad_() for n, t in p.tensors().items()}, {}

        def note(t: Tensor) -> Tensor:
            saved[t.data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            p.run(lt.functional, leaves, engine="local")
        return sum(t.numel() * t.element_size() for t in saved.values())

    assert saved_bytes(3) == saved_bytes(None) + 8
