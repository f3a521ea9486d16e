"""The floor under a result: the chain of a time step that no schedule can shorten, from a device's constants.

publish -> see -> read the group's rows -> multiply -> cell, once a step, with the best
of the waiting protocols and of all ways to cut the layer into programs. Weights are free as far as they
fit on chip. Products over all time steps (input, dx, weight gradients) are not in it: a schedule could hide them.
As good as its constants: measured ones (probe) make it a claim about the card, estimates only about the estimates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lstm_triton import costs
from lstm_triton.devices import PROTOCOLS
from lstm_triton.spec import GATES

if TYPE_CHECKING:
    from lstm_triton.devices import Device

    from .cases import Case

KIND = {"fp16": "half", "bf16": "half", "tf32": "tf32", "fp32": "fp32", "fp64": "fp64"}
ITEMSIZE = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Floor:
    """`ms` of a whole run; `us_per_step` the same over its steps and layers, as the sweep counts them."""

    us_per_step: float
    ms: float


def floor(case: Case, device: Device) -> Floor:
    """The least time of a case on a device, forward and, in forward+backward, backward through time."""
    directions = ("forward", "backward") if case.mode == "forward+backward" else ("forward",)
    chains = 1 + case.bidirectional
    # Layers one after another, or as a wavefront: layer l at step t beside layer l+1 at step t-1.
    us = sum(
        min(
            case.layers * case.seq * step(case, device, direction, chains),
            (case.seq + case.layers - 1) * step(case, device, direction, chains * case.layers),
        )
        for direction in directions
    )
    return Floor(us / case.seq / case.layers, us / 1e3)


def step(case: Case, device: Device, direction: str, chains: int = 1) -> float:
    """The least time (us) of one step of `chains` independent recurrences at once."""
    gates = len(GATES[case.cell])
    k = case.hidden if direction == "forward" else gates * case.hidden
    columns = gates if direction == "forward" else 1  # of the product, a hidden unit
    kind, itemsize = KIND[case.dtype], ITEMSIZE[case.dtype]
    on_chip = device.shared_per_program + 4 * device.registers_per_sm
    least = math.inf
    for block_b, block_h in itertools.product(_cuts(case.batch, 8), _cuts(case.hidden, 4)):
        group = math.ceil(case.hidden / block_h)
        sharing = max(1.0, chains * math.ceil(case.batch / block_b) * group / device.sms)  # programs on one SM
        n = block_h * columns
        streamed = max(0.0, 1 - on_chip / (sharing * k * n * itemsize))  # the part that is not on chip
        us = costs.weights(device, k, n, itemsize, resident=False) * streamed
        us += min(costs.product(device, kind, block_b, k, n, how) for how in ("plain", "batched"))
        us += min(device.cell_us, costs.cell(device, block_b, n, 1))
        if group > 1:
            us += costs.rows(device, block_b, k, itemsize)
        us *= sharing
        if group > 1:
            us += min(device.wait_us(protocol, group) for protocol in PROTOCOLS)
        least = min(least, us)
    return least


def _cuts(size: int, smallest: int) -> Iterator[int]:
    """Blocks that `size` can be cut into: powers of two from `smallest`, up to one that holds it all."""
    block = smallest
    while block < size:
        yield block
        block *= 2
    yield block
