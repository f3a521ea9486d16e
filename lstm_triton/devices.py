"""What is known of each GPU: the constants of the planner's model, one file for each in tuned/.

`python -m lstm_triton.perf probe` measures them; a file in which nothing was measured holds estimates and says so.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

#: How a program can learn that the others of its group are done with a step: in three, two and one L2 round trip.
PROTOCOLS = ("counter", "flag", "data")
KINDS = ("half", "tf32", "fp32", "fp64")
LAUNCHES = ("plain", "cooperative", "graph", "pdl")

#: What a file holds: int, float, str, or a dict of such; a dict from str to float where the keys are numbers.
SCHEMA: dict[str, Any] = {
    "name": str,
    "source": str,
    "measured": {name: str for name in ("date", "device", "driver", "torch", "triton", "commit", "source")},
    **dict.fromkeys(("capability", "sms", "registers_per_sm", "shared_per_program", "shared_per_sm"), int),
    "clock_ghz": float,
    "wait_us": dict.fromkeys(PROTOCOLS, "by number"),
    "l2_bytes_per_clock": dict.fromkeys(("same", "distinct"), float),
    "launch_us": dict.fromkeys(LAUNCHES, float),
    "flops_per_clock": dict.fromkeys(KINDS, float),
    "small_tile_flops_per_clock": {
        how: dict.fromkeys(("half", "tf32", "fp64"), "by number") for how in ("plain", "batched")
    },
    "cell_us": float,
}
#: Not known everywhere: nothing was measured; no such launch before sm_90.
OPTIONAL = ("measured", "launch_us.pdl")


@dataclass(frozen=True)
class Curve:
    """A measured quantity at some numbers, straight lines over the number's logarithm between, level beyond."""

    points: tuple[tuple[int, float], ...]

    def at(self, number: int) -> float:
        numbers = [n for n, _ in self.points]
        i = bisect_left(numbers, number)
        if i == len(numbers) or numbers[i] == number or i == 0:
            return self.points[min(i, len(numbers) - 1)][1]
        (n0, v0), (n1, v1) = self.points[i - 1 : i + 1]
        return v0 + (v1 - v0) * math.log(number / n0) / math.log(n1 / n0)


@dataclass(frozen=True)
class Device:
    """What the model knows of a GPU. Times in us, rates per SM and clock."""

    name: str
    family: str  # the file its constants come from
    constants: str  # "estimates", or when they were measured
    capability: int
    sms: int
    shared_per_program: int
    shared_per_sm: int
    registers_per_sm: int
    clock_ghz: float
    waits: tuple[tuple[str, Curve], ...]  # us by protocol and programs of a group, publish to seen
    l2_bytes_per_clock: float  # all SMs reading the same tile, as the rows of a group
    l2_distinct_bytes_per_clock: float  # each SM its own
    launches: tuple[tuple[str, float], ...]  # us of one launch in a row of them, by kind
    flops: tuple[tuple[str, float], ...]  # of large products, by kind
    small_flops: tuple[tuple[tuple[str, str], Curve], ...]  # of 16 x N products, by how they are written and kind
    cell_us: float  # one step of the smallest local recurrence, 16 rows x 16 hidden units

    @property
    def fp64_matrix_products(self) -> bool:
        """Whether Triton has matrix instructions for fp64 there; elsewhere such products are scalar."""
        return self.capability in (80, 90)

    def occupancy(self, num_warps: int, shared_bytes: int) -> int:
        """Programs that one SM surely holds at once, with as many registers as a thread can have."""
        by_registers = self.registers_per_sm // (num_warps * 32 * 256)
        by_shared = self.shared_per_sm // (shared_bytes + 1024)
        return min(by_registers, by_shared)

    def wait_us(self, protocol: str, programs: int) -> float:
        """From the last program's publication until all of a group have seen it."""
        return dict(self.waits)[protocol].at(programs)

    def launch_us(self, kind: str = "plain") -> float:
        """One launch in a row of launches."""
        return dict(self.launches)[kind]

    def flops_per_clock(self, kind: str, rows: int, columns: int, how: str) -> float:
        """Of products [rows, K] x [K, columns], "plain" or "batched" over slices of K; below 64 rows by small tiles."""
        curve = dict(self.small_flops).get((how, kind))
        return dict(self.flops)[kind] if rows >= 64 or curve is None else curve.at(columns) * min(rows, 16) / 16


def check(entry: Mapping[str, Any]) -> None:
    """ValueError naming the first field that is missing, unknown, of another type or not above zero."""
    _check(entry, SCHEMA, "")


def _check(entry: Any, schema: Any, path: str) -> None:
    if entry is None and path in OPTIONAL:
        return
    if isinstance(schema, dict) or schema == "by number":
        if not isinstance(entry, Mapping):
            raise ValueError(f"{path or 'the file'} must be an object, got {entry!r}")
        expected = schema if isinstance(schema, dict) else dict.fromkeys(entry, float)
        for name in [*expected, *entry]:
            inner = f"{path}.{name}".lstrip(".")
            if name not in expected or name not in entry:
                raise ValueError(f"{inner} is {'unknown' if name in entry else 'missing'}")
        if schema == "by number" and not (entry and all(name.isdecimal() and int(name) > 0 for name in entry)):
            raise ValueError(f"{path} must have positive numbers as keys, got {', '.join(entry) or 'none'}")
        for name, inner in expected.items():
            _check(entry[name], inner, f"{path}.{name}".lstrip("."))
        return
    wanted = (int, float) if schema is float else schema
    if not isinstance(entry, wanted) or isinstance(entry, bool):
        raise ValueError(f"{path} must be of type {schema.__name__}, got {entry!r}")
    if schema is not str and not (math.isfinite(entry) and entry > 0):
        raise ValueError(f"{path} must be finite and above zero, got {entry!r}")


def from_entry(entry: Mapping[str, Any]) -> Device:
    """A file's contents as a Device; ValueError where they do not fit the schema."""
    check(entry)
    measured = entry["measured"]
    return Device(
        family=entry["name"],
        constants=f"measured {measured['date']}" if measured else "estimates",
        waits=tuple((name, _curve(curve)) for name, curve in entry["wait_us"].items()),
        l2_bytes_per_clock=entry["l2_bytes_per_clock"]["same"],
        l2_distinct_bytes_per_clock=entry["l2_bytes_per_clock"]["distinct"],
        launches=tuple((name, us) for name, us in entry["launch_us"].items() if us is not None),
        flops=tuple(entry["flops_per_clock"].items()),
        small_flops=tuple(
            ((how, kind), _curve(curve))
            for how, kinds in entry["small_tile_flops_per_clock"].items()
            for kind, curve in kinds.items()
        ),
        **{
            name: entry[name]
            for name, kind in SCHEMA.items()
            if kind in (int, float) or name == "name"
        },
    )  # fmt: skip


def _curve(entry: Mapping[str, float]) -> Curve:
    return Curve(tuple(sorted((int(number), value) for number, value in entry.items())))


@cache
def _known() -> dict[str, Device]:
    folder = files(__package__).joinpath("tuned")
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".json")), key=lambda path: path.name)
    found = [_read(path) for path in paths]
    return {device.name: device for device in found}


def _read(path: Any) -> Device:
    try:
        return from_entry(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def file_name(family: str) -> str:
    """The file in tuned/ that belongs to a family of GPUs: "RTX 4090" has rtx_4090.json."""
    return re.sub(r"[^a-z0-9]+", "_", family.lower()).strip("_") + ".json"


def devices() -> dict[str, Device]:
    """The GPUs with a file in tuned/, by name."""
    return dict(_known())


def register(path: Path) -> Device:
    """Use a file's constants in this process in place of those in tuned/; before the first plan for that GPU."""
    device = _read(path)
    _known()[device.name] = device
    return device


#: Stands for Triton's interpreter: programs cost nothing and any number of them is there.
INTERPRETER = replace(_known()["H200"], name="interpreter", family="", sms=1 << 20, shared_per_program=1 << 30)


def device_named(target: str) -> Device:
    """The device called "H200", "nvidia h200", ... or a representative of "sm_90" (ValueError for any other name)."""
    if not isinstance(target, str):
        raise TypeError(f"target must be the name of a GPU, got {type(target).__name__}")
    wanted = target.lower().replace("_", " ")
    for device in _known().values():
        if re.search(rf"\b{device.name.lower()}\b", wanted) or wanted == f"sm {device.capability}":
            return device
    raise ValueError(f"target must be one of {', '.join(_known())} or sm_80, sm_89, sm_90, sm_100, got {target!r}")


def device_like(name: str, capability: int, sms: int, shared_per_program: int, shared_per_sm: int) -> Device:
    """The device of that name or, for a GPU without a file, the nearest one known by capability, with its own sizes."""
    try:
        known = device_named(name)
    except ValueError:
        known = min(_known().values(), key=lambda d: abs(d.capability - capability))
        known = replace(known, family="", constants=f"{known.constants} of the {known.name}")
    return replace(
        known,
        name=name,
        capability=capability,
        sms=sms,
        shared_per_program=shared_per_program,
        shared_per_sm=shared_per_sm,
    )
