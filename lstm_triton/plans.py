"""What the planner decides: a LaunchPlan, two frozen KernelPlans, and what they say of themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .devices import Device
from .spec import CellSpec


@dataclass(frozen=True)
class KernelPlan:
    """One of the two kernels, scheduled."""

    engine: str
    direction: str  # "forward" or "backward"
    block_b: int  # rows of the batch a program owns
    block_h: int  # hidden units a tile
    tiles: int  # tiles a program owns; more than one in local alone
    tiles_p: int  # tiles of h's columns a program owns: `tiles`, or with a projection fewer
    block_k: int  # K tile of the recurrent product
    block_k_r: int  # and of the projection
    split_k: int  # slices of a K tile, one on each warp or pair of warps
    ahead: int  # K tiles of h or da loaded ahead of their product, where the weights are resident
    stages: int  # software pipeline of the K loop, where the weights are read at every step
    num_warps: int
    resident: bool  # W_hh is loaded once
    n_b: int  # groups: ceil(B / block_b)
    n_h: int  # programs a group
    groups_at_once: int  # groups of one launch; n_b, unless waiting programs must all fit on the GPU
    shared_bytes: int  # upper estimate
    step_us: float  # the model's estimate for one time step
    parts: tuple[tuple[str, float], ...]  # of step_us, by cause
    measured_us: float | None = None  # one time step, where a search on such a GPU chose this schedule

    @property
    def grid(self) -> int:
        """Programs of one launch."""
        return self.groups_at_once * self.n_h

    @property
    def synchronised(self) -> bool:
        """Programs wait for one another, so all of a launch must be on the GPU at once."""
        return self.engine in ("resident", "streamed")

    @property
    def tuned(self) -> bool:
        """Chosen by a measurement, not by the model."""
        return self.measured_us is not None


@dataclass(frozen=True)
class LaunchPlan:
    """How one layer and direction would run: the forward kernel, the backward kernel, and why."""

    spec: CellSpec
    T: int
    B: int
    H: int
    dtype: torch.dtype
    device: Device
    precision: str  # of fp32 products: "tf32" or "ieee"
    forward: KernelPlan
    backward: KernelPlan
    others: tuple[str, ...]  # what else was considered, in words
    masks: int = 0  # by how many h[t-1] is multiplied: none, one, or one a gate

    @property
    def engine(self) -> str:
        return self.forward.engine

    @property
    def label(self) -> str:
        """Short: engine and tile of both kernels."""
        kernels = self.forward, self.backward
        return " / ".join(f"{k.engine} {k.block_b}x{k.block_h * k.tiles}{' tuned' * k.tuned}" for k in kernels)

    def explain(self) -> str:
        """In words: what runs, what the model makes of it, and why not another engine."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            dtype += f" ({self.precision} products)"
        lines = [f"{self.spec.cell}, T={self.T}, B={self.B}, H={self.H}, {dtype} on {self.device.name}"]
        lines += [f"  {line}" for line in self._variant()]
        for kernel in (self.forward, self.backward):
            where = "on chip for the whole sequence" if kernel.resident else "read again at every step"
            parts = " + ".join(f"{us:.2f} {name}" for name, us in kernel.parts)
            lines += [
                f"{kernel.direction}: {kernel.engine}, {kernel.n_b} group(s) of {kernel.n_h} program(s), "
                f"{kernel.groups_at_once} group(s) a launch, {kernel.num_warps} warps a program",
                f"  a program owns {kernel.block_b} rows x {kernel.block_h * kernel.tiles} hidden units; "
                f"its part of W_hh is {where}",
                f"  product in K tiles of {kernel.block_k}, {kernel.split_k} slice(s) each; "
                f"at most {kernel.shared_bytes / 1024:.0f} KiB of shared memory",
                f"  estimated {kernel.step_us:.2f} us a step by the model, not measured: {parts}",
            ]
            if self.spec.two_products:
                lines.append(f"  a step is two products, the second of them in K tiles of {kernel.block_k_r}")
            if self.spec.waits > 1 and kernel.engine != "local":
                waits = self.spec.waits
                how = (
                    f"a step is {waits} launches" if kernel.engine == "step" else f"programs wait {waits} times a step"
                )
                lines.append(f"  {how}")
            if kernel.tuned:
                lines.append(f"  chosen by a search on such a GPU, where it took {kernel.measured_us:.2f} us a step")
        lines.append(f"the model's constants for this GPU: {self.device.constants}")
        return "\n".join([*lines, *self.others])

    def _variant(self) -> list[str]:
        """What differs from the plain cell, and what that costs a step."""
        spec = self.spec
        used = {
            "activation": spec.activation,
            "recurrent_activation": spec.recurrent_activation,
            "output_activation": spec.output_phi,
        }
        plain = {"activation": "tanh", "recurrent_activation": "sigmoid", "output_activation": spec.activation}
        found = [f"{name}={used[name]}" for name in used if used[name] != plain[name]]
        if spec.proj:
            found.append(f"h projected to {spec.proj} columns: a second product, and a second wait")
        if spec.peephole:
            found.append(f"peepholes of the gates {', '.join(spec.peepholes)}")
        if spec.coupled:
            found.append("coupled gates, f = 1 - i: three gate rows instead of four")
        if not spec.reset_after:
            found.append("reset before the product: a second product, of r h[t-1], and a second wait")
        found += [f"{name}={getattr(spec, name)}" for name in ("cell_clip", "gate_clip") if getattr(spec, name)]
        if spec.keeps_preactivations:
            found.append("gates whose value does not tell the derivative are activated again in backward")
        if spec.layer_norm:
            what = "the recurrent product and c are" if spec.has_c else "the recurrent product is"
            times = "twice" if spec.has_c else "once"
            found.append(f"layer norm: {what} normalised, for which the row's sums go round the group {times} a step")
        if spec.zoneout != (0.0, 0.0):
            found.append(f"zoneout of h {spec.zoneout[0]}" + f", of c {spec.zoneout[1]}" * spec.has_c)
        if self.masks == 1:
            found.append("recurrent dropout with one mask: h is stored once more, masked, where others read it")
        elif self.masks:
            found.append(
                f"recurrent dropout with {self.masks} masks: a product, and rows of h, of its own for each gate"
            )
        return found
