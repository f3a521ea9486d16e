"""What the tests of the cells beyond torch.nn's share: all options at once, tensors for any CellSpec, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numerics import TOLERANCE, relative_error
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import lstm_triton as lt
from lstm_triton import launch
from lstm_triton.spec import OPTIONS, CellSpec

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
