"""The constants that `probe` measures: from times of long and short runs to values, from those to tuned/<gpu>.json."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np

from lstm_triton.devices import PROTOCOLS, check, device_named, devices, file_name

from . import probe_launches as launches
from .probe_launches import Form, Launch

#: Where in the file: ("wait_us", "counter", "8").
Field = tuple[str, ...]
#: us of a step and GHz -> the constant; the third argument is what is known of the other constants by then.
Value = Callable[[float, float, Mapping[Field, float]], float]
#: Milliseconds of one prepared run, and the clock in GHz while it ran.
Timer = Callable[[Launch, int, int], "tuple[float, float]"]

#: What a value may be, by its field's beginning or, for arithmetic, its kind. Outside of that the measurement is wrong.
PLAUSIBLE = {
    "clock_ghz": (0.5, 4),
    "wait_us": (0.2, 20),
    "l2_bytes_per_clock": (2, 256),
    "launch_us": (0.2, 100),
    "queued_us": (0.2, 100),
    "cell_us": (0.05, 10),
    "half": (16, 20000),
    "tf32": (8, 10000),
    "fp32": (8, 1024),
    "fp64": (1, 1024),
}
#: Clocks for which the device sleeps while the host gets ahead: enough for one launch, or for a whole row of them.
ONE_LAUNCH, WHOLE_ROW = 4_000_000, 80_000_000
#: Rounds of a long and a short run each; a slow one has fewer, but no less than ENOUGH, once it took SECONDS.
ROUNDS, ENOUGH, SECONDS = 9, 3, 2.0


@dataclass(frozen=True)
class Probe:
    """One constant and how to measure it."""

    field: Field
    unit: str
    make: Callable[[], Launch]
    few: int  # steps of the short run
    many: int  # and of the long one
    value: Value
    form: Form | None = None  # the kernel to compile ahead
    head_start: int = ONE_LAUNCH  # clocks; 0 where what the host takes is to be seen

    @property
    def name(self) -> str:
        return ".".join(self.field)


@dataclass(frozen=True)
class Sample:
    """One round."""

    few_ms: float
    many_ms: float
    us: float  # a step
    ghz: float
    value: float


@dataclass
class Result:
    """What became of one probe. With a problem the value is not used."""

    probe: Probe
    samples: list[Sample] = field(default_factory=list)
    problem: str = ""

    @property
    def value(self) -> float:
        return float(np.median([sample.value for sample in self.samples]))

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and 80th percentiles."""
        p20, p80 = np.percentile([sample.value for sample in self.samples], (20, 80), method="nearest")
        return float(p20), float(p80)


def probes(capability: int, sms: int, device: str = "cuda") -> list[Probe]:
    """All of them, in the order in which they are measured: what plans depend on most comes first."""
    found = [*_l2(sms, device), *_waits(sms, device), *_launches(capability, sms, device)]
    found.append(
        Probe(("cell_us",), "us a step", partial(launches.Recurrence, 4096, device), 2048, 4096, _microseconds)
    )
    return [*found, *_small_tiles(capability, sms, device), *_large_tiles(capability, sms, device)]


def _microseconds(us: float, ghz: float, known: Mapping[Field, float]) -> float:
    return us


def _rate(work: float) -> Value:
    """Work of one SM in a step, by the clock."""
    return lambda us, ghz, known: work / (us * ghz * 1e3)


def _without_rows(programs: int) -> Value:
    """Whoever polls the data has read the rows by then, which the model counts apart, at the rate of L2."""
    bytes_read = launches.ROWS * launches.WORDS * 4 * programs
    return lambda us, ghz, known: us - bytes_read / known["l2_bytes_per_clock", "same"] / (ghz * 1e3)


def _l2(sms: int, device: str) -> Iterator[Probe]:
    for name in ("same", "distinct"):
        make = partial(launches.ReadL2, name == "same", sms, device)
        value = _rate(launches.BYTES_READ)
        yield Probe(("l2_bytes_per_clock", name), "bytes a clock and SM", make, 64, 512, value, launches.READ_FORM)


def _waits(sms: int, device: str) -> Iterator[Probe]:
    # The largest first: beyond its last point a curve is level.
    sizes = [sms, *(n for n in (128, 64, 32, 16, 8, 4, 2) if n < sms)]
    for protocol in PROTOCOLS:
        for n in sizes:
            make = partial(launches.Exchange, protocol, n, 512, device)
            value = _without_rows(n) if protocol == "data" else _microseconds
            form = launches.exchange_form(protocol, n)
            yield Probe(("wait_us", protocol, str(n)), "us", make, 64, 512, value, form)


def _launches(capability: int, sms: int, device: str) -> Iterator[Probe]:
    """As a program sees them, host and all; "queued" as the device would take them if the host were no slower.

    Nodes of a graph and programmatic launches are measured on the device alone: they are for where the host is not.
    """
    rows = [("plain", False), ("plain", True), ("cooperative", False), ("cooperative", True), ("graph", False)]
    for kind, queued in [*rows, *([("pdl", True)] if capability >= 90 else [])]:
        on_device = {"graph": ONE_LAUNCH}.get(kind, WHOLE_ROW if queued else 0)
        name = "queued_us" if queued and kind != "pdl" else "launch_us"
        make = partial(launches.LaunchRow, kind, sms, device)
        form = launches.touch_form(kind)
        yield Probe((name, kind), "us", make, 100, 700, _microseconds, form, on_device)


def _small_tiles(capability: int, sms: int, device: str) -> Iterator[Probe]:
    kinds = ("half", "tf32", "fp64") if capability in (80, 90) else ("half", "tf32")
    for kind in kinds:
        for how in ("plain", "batched"):
            for n in (8, 16, 32, 64):
                make = partial(launches.Multiply, how, kind, n, sms, device)
                value = _rate(2 * launches.ROWS * launches.depth(kind) * n)
                where = ("small_tile_flops_per_clock", how, kind, str(n))
                form = launches.multiply_form(how, kind, n)
                yield Probe(where, "flops a clock and SM", make, 8, 2008, value, form)


def _large_tiles(capability: int, sms: int, device: str) -> Iterator[Probe]:
    sizes = {"half": 8192, "tf32": 8192, "fp32": 4096, "fp64": 4096 if capability in (80, 90, 100) else 1024}
    for kind, size in sizes.items():
        make = partial(launches.LargeProduct, kind, size, device)
        value = _rate(2 * size**3 / sms)
        yield Probe(("flops_per_clock", kind), "flops a clock and SM", make, 2, 8, value)


def measure(probe: Probe, timer: Timer, known: Mapping[Field, float], clock: Callable[[], float]) -> Result:
    """Check a probe's results, time it if they are right, and check those of the last timed run.

    clock: seconds, for what a slow probe may take.
    """
    result = Result(probe)
    launch = probe.make()
    for count in (probe.few, probe.many):
        launch.prepare(count)
        launch.run(count)
        result.problem = launch.check(count)
        if result.problem:
            return result
    for count in (probe.few, probe.many):
        timer(launch, count, probe.head_start)
    start = clock()
    order = [probe.few, probe.many]
    for turn in range(ROUNDS):
        if turn >= ENOUGH and clock() - start > SECONDS:
            break
        taken = {count: timer(launch, count, probe.head_start) for count in order}
        (few_ms, ghz), (many_ms, other_ghz) = taken[probe.few], taken[probe.many]
        us, ghz = (many_ms - few_ms) * 1e3 / (probe.many - probe.few), (ghz + other_ghz) / 2
        # A run that did not get longer has no rate; such a sample is as far out of range as can be.
        value = probe.value(us, ghz, known) if us > 0 else float("inf")
        result.samples.append(Sample(few_ms, many_ms, us, ghz, value))
        order.reverse()
    result.problem = launch.check(order[0]) or implausible(probe.field, result.value)
    return result


def implausible(where: Field, value: float) -> str:
    """Why a value cannot be right; empty where it can."""
    low, high = next(PLAUSIBLE[name] for name in where if name in PLAUSIBLE)
    return "" if low <= value <= high else f"{value:.4g} is not between {low} and {high}: not used"


def clock_ghz(results: Iterable[Result]) -> float | None:
    """The clock under the small kernels; large products are throttled for their power."""
    small = [r for r in results if r.probe.field[0] != "flops_per_clock"]
    samples = [sample.ghz for result in small for sample in result.samples]
    return float(np.median(samples)) if samples else None


def starting_point(name: str, capability: int) -> dict[str, Any]:
    """The file of this GPU or, where it has none, of the nearest one known by capability, under this one's name."""
    try:
        known = device_named(name)
    except ValueError:
        known = min(devices().values(), key=lambda device: abs(device.capability - capability))
        family = re.sub(r"[^\w .+-]+", " ", name).strip().removeprefix("NVIDIA ")
    else:
        family = known.family
    path = files("lstm_triton").joinpath("tuned", file_name(known.family))
    entry = json.loads(path.read_text())
    if family != entry["name"]:
        entry |= {"name": family, "source": f"those of the {entry['name']}: {entry['source']}"}
    return entry


def flat(entry: Mapping[str, Any]) -> dict[Field, float]:
    """Every number of a file by its field."""
    found: dict[Field, float] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            found |= {(name, *rest): number for rest, number in flat(value).items()}
        elif isinstance(value, (int, float)):
            found[name,] = value
    return found


def updated(
    entry: Mapping[str, Any], sizes: Mapping[str, int], values: Mapping[Field, float], environment: Mapping[str, object]
) -> dict[str, Any]:
    """A file's contents with what was measured put in, and said which was not. ValueError where that fits no schema.

    A curve of which any point was measured holds those alone: points of two origins make no curve.
    """
    found = copy.deepcopy(dict(entry)) | sizes
    kept = sorted({_curve(where) for where in flat(entry) if where[0] not in ("capability", *sizes)})
    for where in values:
        if where[-1].isdecimal():
            _inside(found, where[:-1]).clear()
        kept = [name for name in kept if name != _curve(where)]
    for where, value in values.items():
        _inside(found, where[:-1])[where[-1]] = float(f"{value:.4g}")
    if found["capability"] < 90:
        found["launch_us"]["pdl"] = None
        kept = [name for name in kept if name != "launch_us.pdl"]
    text = f"measured by `perf probe` on {environment['device']}, {environment['date']}"
    if kept:
        text += f'; not measured, and so as before: {", ".join(kept)} ("{_origin(entry)}")'
    found["source"] = text
    found["measured"] = {
        name: str(environment[name]) for name in ("date", "device", "driver", "torch", "triton", "commit", "source")
    }
    check(found)
    return found


def _curve(where: Sequence[str]) -> str:
    return ".".join(where[:-1] if where[-1].isdecimal() else where)


def _inside(entry: dict[str, Any], where: Field) -> dict[str, Any]:
    for name in where:
        entry = entry[name]
    return entry


def _origin(entry: Mapping[str, Any]) -> str:
    return str(entry["source"]).split("; not measured")[0]


def device_sizes(properties: Any, known: Mapping[str, Any]) -> dict[str, int]:
    """What the device says of itself, as a file has it; what this PyTorch does not ask keeps the known number."""
    return {
        "capability": properties.major * 10 + properties.minor,
        "sms": properties.multi_processor_count,
        "registers_per_sm": getattr(properties, "regs_per_multiprocessor", known["registers_per_sm"]),
        "shared_per_program": getattr(properties, "shared_memory_per_block_optin", known["shared_per_program"]),
        "shared_per_sm": getattr(properties, "shared_memory_per_multiprocessor", known["shared_per_sm"]),
    }
