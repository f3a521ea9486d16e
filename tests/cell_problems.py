"""One layer and direction of any CellSpec: tensors by lt.functional's names, the call, results and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from numerics import relative_error
from torch import Tensor

import lstm_triton as lt
from lstm_triton.spec import CellSpec


@dataclass(frozen=True)
class CellProblem:
    """masks: dropout masks on x and h, none, one, or one a gate. skips: lengths, mask and reset. seed: of zoneout."""

    spec: CellSpec
    T: int = 4
    B: int = 3
    I: int = 3  # noqa: E741
    H: int = 20
    masks: int = 0
    skips: bool = False
    reverse: bool = False
    cells: bool = False
    seed: int | None = None
    dtype: torch.dtype = torch.float32
    more: dict[str, Any] = field(default_factory=dict)  # further arguments

    def tensors(self) -> dict[str, Tensor]:
        """What has gradients, drawn in float64 and rounded."""
        generator = torch.Generator().manual_seed(1)
        spec, G, P = self.spec, self.spec.gates, self.spec.output(self.H)

        def draw(*shape: int, scale: float = 0.5, mean: float = 0.0) -> Tensor:
            return mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)

        found = {"x": draw(self.T, self.B, self.I, scale=1.0), "h0": draw(self.B, P, scale=1.0)}
        if spec.cell == "lstm":
            found["c0"] = draw(self.B, self.H, scale=1.0)
        found |= {name: draw(*shape) for name, shape in spec.parameters(self.I, self.H).items()}
        if spec.layer_norm:
            columns = {"norm_ih": G * self.H, "norm_hh": G * self.H}
            columns |= {"norm_c": self.H} if spec.cell == "lstm" else {}
            for name, size in columns.items():
                found[f"{name}.weight"], found[f"{name}.bias"] = draw(size, scale=0.3, mean=1.0), draw(size, scale=0.3)
        if self.masks:
            gates = (G,) if self.masks > 1 else ()
            for name, size in (("recurrent_mask", P), ("input_mask", self.I)):
                kept = torch.rand(*gates, self.B, size, generator=generator) < 0.7
                found[name] = kept.double() / 0.7
        return {name: tensor.to(self.dtype) for name, tensor in found.items()}

    def options(self) -> dict[str, Any]:
        """The arguments that have no gradients."""
        spec = self.spec
        found = dict(spec.options) | self.more | {"reverse": self.reverse}
        if spec.zoneout != (0.0, 0.0):
            found["zoneout"] = spec.zoneout if spec.cell == "lstm" else spec.zoneout[0]
            found["seed"] = None if self.seed is None else torch.tensor([self.seed])
        if self.skips:
            lengths = torch.full((self.B,), self.T)
            lengths[-1] = self.T - self.T // 3
            pattern = 3 * torch.arange(self.T)[:, None] + 5 * torch.arange(self.B)
            found |= {"lengths": lengths, "mask": pattern % 4 != 1, "reset": pattern % 5 == 3}
        if self.cells and spec.cell == "lstm":
            found["return_cells"] = True
        return found

    def run(self, module: Any, tensors: dict[str, Tensor], **how: Any) -> tuple[Tensor, ...]:
        """lt.functional's or lt.reference's results."""
        given = dict(tensors)
        for name in ("norm_ih", "norm_hh", "norm_c"):
            if f"{name}.weight" in given:
                given[name] = given.pop(f"{name}.weight"), given.pop(f"{name}.bias")
        return getattr(module, self.spec.cell)(**given, **self.options(), **how)

    def differentiate(self, module: Any, tensors: dict[str, Tensor], **how: Any) -> dict[str, Tensor]:
        """Results and the gradients by every tensor, for drawn gradients by the results, rounded to dtype."""
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        results = self.run(module, leaves, **how)
        generator = torch.Generator().manual_seed(2)
        outer = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(self.dtype) for y in results]
        found = torch.autograd.grad(
            results, list(leaves.values()), [d.to(y) for d, y in zip(outer, results, strict=True)]
        )
        names = [f"result {i}" for i in range(len(results))] + [f"d{name}" for name in leaves]
        return dict(zip(names, [*(y.detach() for y in results), *found], strict=True))

    def errors(self, **how: Any) -> dict[str, float]:
        """Ours on the engine and so on of `how`, against the reference in float64."""
        tensors = self.tensors()
        wanted = self.differentiate(lt.reference, {name: tensor.double() for name, tensor in tensors.items()})
        ours = self.differentiate(lt.functional, tensors, **how)
        return {name: relative_error(ours[name], value) for name, value in wanted.items()}
