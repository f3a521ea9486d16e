"""What is known of each GPU: the constants of the planner's model, one file for each in tuned/."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Device:
    """What the model knows of a GPU. Times in us, rates per SM and clock."""

    name: str
    capability: int
    sms: int
    shared_per_program: int
    shared_per_sm: int
    registers_per_sm: int
    clock_ghz: float
    l2_round_trip_us: float
    l2_bytes_per_clock: float
    launch_us: float
    flops_half: float
    flops_tf32: float
    flops_fp32: float
    flops_fp64: float

    @property
    def fp64_matrix_products(self) -> bool:
        """Whether Triton has matrix instructions for fp64 there; elsewhere such products are scalar."""
        return self.capability in (80, 90)

    def occupancy(self, num_warps: int, shared_bytes: int) -> int:
        """Programs that one SM surely holds at once, with as many registers as a thread can have."""
        by_registers = self.registers_per_sm // (num_warps * 32 * 256)
        by_shared = self.shared_per_sm // (shared_bytes + 1024)
        return min(by_registers, by_shared)


@cache
def devices() -> dict[str, Device]:
    """The GPUs with a file in tuned/, by name."""
    found = []
    for path in sorted(files(__package__).joinpath("tuned").iterdir(), key=lambda p: p.name):
        if path.name.endswith(".json"):
            entry = json.loads(path.read_text())
            entry.pop("source")
            rates = {f"flops_{kind}": rate for kind, rate in entry.pop("flops_per_clock").items()}
            found.append(Device(**entry, **rates))
    return {device.name: device for device in found}


#: Stands for Triton's interpreter: programs cost nothing and any number of them is there.
INTERPRETER = replace(devices()["H200"], name="interpreter", sms=1 << 20, shared_per_program=1 << 30)


def device_named(target: str) -> Device:
    """The device called "H200", "nvidia h200", ... or a representative of "sm_90" (ValueError for any other name)."""
    if not isinstance(target, str):
        raise TypeError(f"target must be the name of a GPU, got {type(target).__name__}")
    wanted = target.lower().replace("_", " ")
    for device in devices().values():
        if re.search(rf"\b{device.name.lower()}\b", wanted) or wanted == f"sm {device.capability}":
            return device
    raise ValueError(f"target must be one of {', '.join(devices())} or sm_80, sm_89, sm_90, sm_100, got {target!r}")


def device_like(name: str, capability: int, sms: int, shared_per_program: int, shared_per_sm: int) -> Device:
    """The device of that name or, for a GPU without a file, the nearest one known by capability, with its own sizes."""
    try:
        known = device_named(name)
    except ValueError:
        known = min(devices().values(), key=lambda d: abs(d.capability - capability))
    return replace(
        known,
        name=name,
        capability=capability,
        sms=sms,
        shared_per_program=shared_per_program,
        shared_per_sm=shared_per_sm,
    )
