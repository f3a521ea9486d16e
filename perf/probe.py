"""Measure on a GPU the constants of the planner's model, and write them as the GPU's tuned/<family>.json.

Every constant is the time of a long run less that of a short one over the steps between, the median of several rounds,
by events on the device; the SM clock is that of a spin of known length right behind each run. What a kernel computed is
checked before and after it is timed. wait_us is a step of programs that do nothing else: store a 16 x 8 tile, publish,
see that all did, and (its latency, hardly its bandwidth) read another's; one program on an SM, one group. Without a
GPU the kernels are compiled, and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch

import lstm_triton
from lstm_triton.devices import file_name
from lstm_triton.launch import INTERPRETED

from . import environment, sass, table
from .options import NO_GPU, OUT_OF_TIME, target
from .precompile import pool
from .probe_constants import (
    Field,
    Probe,
    Result,
    clock_ghz,
    device_sizes,
    flat,
    implausible,
    measure,
    probes,
    starting_point,
    updated,
)
from .probe_launches import Form, Launch
from .ptx import ptx_order

#: Clocks of the spin that measures the clock, about a millisecond; and of the first one, in which the clock goes up.
SPIN, WARM_UP = 2_000_000, 400_000_000
#: How often to time a run anew in which the host was late.
ATTEMPTS = 5
#: Raw samples: milliseconds of the short and the long run, us of a step between, and the constant from that.
FIELDS = ("constant", "unit", "round", "few", "many", "few_ms", "many_ms", "us", "clock_ghz", "value", "problem")
SHOWN = ("constant", "value", "p20", "p80", "unit", "before", "note")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("results/probe"), help="folder for the constants and samples")
    parser.add_argument("--minutes", type=float, default=3.0, help="begin no further measurement after this long")
    parser.add_argument("--save", action="store_true", help="also put the constants into the package, as its own")
    parser.add_argument("--target", help="compile the kernels for this GPU (sm_80, H200, ...) and measure nothing")
    parser.add_argument("--jobs", type=int, help="compilations at a time (default: all cores)")


def main(options: argparse.Namespace) -> int:
    """0 if all was measured, 1 if anything was wrong, OUT_OF_TIME if time ran out, NO_GPU without a GPU."""
    if options.minutes <= 0:
        print(f"--minutes: expected more than 0, got {options.minutes}")
        raise SystemExit(2)
    if options.target or not torch.cuda.is_available():
        return rehearse(options)
    if INTERPRETED:
        print("probe: kernels are interpreted in this process, so there is nothing to measure: unset TRITON_INTERPRET")
        raise SystemExit(2)
    deadline = time.monotonic() + 60 * options.minutes
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    entry = starting_point(properties.name, properties.major * 10 + properties.minor)
    sizes = device_sizes(properties, entry)
    found = environment.collect("cuda")
    options.out.mkdir(parents=True, exist_ok=True)
    environment.write(found, options.out)
    print(environment.summary(found), flush=True)
    wanted = probes(sizes["capability"], sizes["sms"])
    for line in compile_ahead(wanted, sizes["capability"], options.jobs):
        print(line, flush=True)
    torch.cuda._sleep(WARM_UP)
    rows = table.Rows(options.out / "probe.csv", FIELDS)
    results = run(wanted, device_timer, flat(entry), rows, deadline)
    return finish(entry, sizes, results, wanted, found, options)


def device_timer(launch: Launch, count: int, head_start: int) -> tuple[float, float]:
    """Milliseconds of one run by events, and the clock in GHz by a spin behind it."""
    for _ in range(ATTEMPTS):
        launch.prepare(count)
        begin, end, spin, over = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        if head_start:
            torch.cuda._sleep(head_start)
        begin.record()
        launch.run(count)
        late = head_start > 0 and begin.query()
        end.record()
        torch.cuda._sleep(SPIN // 10)  # the host gets ahead here, too
        spin.record()
        torch.cuda._sleep(SPIN)
        over.record()
        torch.cuda.synchronize()
        if not late:
            return begin.elapsed_time(end), SPIN / (spin.elapsed_time(over) * 1e6)
    raise RuntimeError(f"the host took longer to launch than the {head_start} clocks it was ahead, {ATTEMPTS} times")


def run(
    wanted: Sequence[Probe],
    timer: Callable[[Launch, int, int], tuple[float, float]],
    known: dict[Field, float],
    rows: table.Rows,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Result]:
    """Measure one after another until the deadline; what goes wrong in one is its result, and the next goes on."""
    results = []
    for probe in table.progress(wanted, len(wanted), "measured"):
        if clock() > deadline:
            break
        try:
            result = measure(probe, timer, known, clock)
        except Exception as error:
            result = Result(probe, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if not result.problem:
            known = {**known, probe.field: result.value}
        results.append(result)
        rows.add(*_raw(result))
    return results


def finish(
    entry: dict[str, Any],
    sizes: dict[str, int],
    results: Sequence[Result],
    wanted: Sequence[Probe],
    found: dict[str, object],
    options: argparse.Namespace,
) -> int:
    """Print and write what was measured, and say what was not; the exit status."""
    values = {result.probe.field: result.value for result in results if not result.problem}
    bad = [f"{result.probe.name}: {result.problem}" for result in results if result.problem]
    ghz = clock_ghz(results)
    if ghz is not None:
        wrong = implausible(("clock_ghz",), ghz)
        bad += [f"clock_ghz: {wrong}"] * bool(wrong)
        values |= {} if wrong else {("clock_ghz",): ghz}
    print(table.markdown(report(results, flat(entry)), SHOWN))
    print(f"SM clock {ghz:.3f} GHz" if ghz else "SM clock unknown")
    for line in host_bound(values):
        print(line)
    missing = [probe.name for probe in wanted[len(results) :]]
    if missing:
        print(f"NOT MEASURED, no time was left: {', '.join(missing)}")
    for line in bad:
        print(f"FAILED {line}")
    constants = {where: value for where, value in values.items() if where[0] in entry}
    if not any(where != ("clock_ghz",) for where in constants):
        print("No constant was measured, so none is written.")
        return 1
    text = json.dumps(updated(entry, sizes, constants, found), indent=2) + "\n"
    for folder in [options.out, *([Path(lstm_triton.__file__).parent / "tuned"] if options.save else [])]:
        path = folder / file_name(entry["name"])
        path.write_text(text)
        print(f"{len(constants)} constants of the {entry['name']} written to {path}")
    return 1 if bad else OUT_OF_TIME if missing else 0


def report(results: Iterable[Result], before: dict[Field, float]) -> list[dict[str, object]]:
    """A row a constant: median, percentiles, what stood there before."""
    rows = []
    for result in results:
        probe = result.probe
        row: dict[str, object] = {"constant": probe.name, "unit": probe.unit, "before": before.get(probe.field, "")}
        if result.samples:
            p20, p80 = result.spread
            row |= {"value": f"{result.value:.4g}", "p20": f"{p20:.4g}", "p80": f"{p80:.4g}"}
            if probe.field[0] == "l2_bytes_per_clock":
                row["note"] = f"{result.value * clock_ghz([result]):.0f} GB/s an SM"
        if result.problem:
            row |= {"value": "-", "p20": "-", "p80": "-", "note": "FAILED"}
        rows.append(row)
    return rows


def host_bound(values: dict[Field, float]) -> list[str]:
    """A line for each kind of launch that the host, not the device, limits."""
    lines = []
    for kind in ("plain", "cooperative"):
        seen, queued = values.get(("launch_us", kind)), values.get(("queued_us", kind))
        if seen and queued and seen > 1.2 * queued:
            lines.append(f"{kind} launches are bound by the host: {seen:.2f} us each, the device takes {queued:.2f}")
    return lines


def _raw(result: Result) -> list[dict[str, object]]:
    probe = result.probe
    same = {"constant": probe.name, "unit": probe.unit, "few": probe.few, "many": probe.many, "problem": result.problem}
    rows = [
        same | {"round": turn, "few_ms": f"{sample.few_ms:.5f}", "many_ms": f"{sample.many_ms:.5f}",
                "us": f"{sample.us:.6g}", "clock_ghz": f"{sample.ghz:.4f}", "value": f"{sample.value:.6g}"}
        for turn, sample in enumerate(result.samples)
    ]  # fmt: skip
    return rows or [same]


def compile_ahead(wanted: Iterable[Probe], capability: int, jobs: int | None) -> list[str]:
    """Compile every kernel into Triton's cache, on all cores; a line for each that cannot be."""
    failed = []
    with pool(jobs) as processes:
        forms = _forms(wanted)
        for form, problem in zip(forms, processes.map(_compile, forms, [capability] * len(forms)), strict=True):
            failed += [f"FAILED to compile {form}: {problem}"] * bool(problem)
    return failed


def _compile(form: Form, capability: int) -> str:
    try:
        form.compile_ahead(capability)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _forms(wanted: Iterable[Probe]) -> list[Form]:
    return list(dict.fromkeys(probe.form for probe in wanted if probe.form))


def rehearse(options: argparse.Namespace) -> int:
    """Compile every kernel for a GPU that need not be there, and look for what would spoil the measurement there."""
    device = target("target", options.target or "sm_90")
    rows = []
    forms = _forms(probes(device.capability, device.sms))
    with pool(options.jobs) as processes:
        futures = [processes.submit(inspect, form, device.capability, device.shared_per_program) for form in forms]
        for future in table.progress(as_completed(futures), len(futures), "compiled"):
            rows.append(future.result())
    rows.sort(key=lambda row: row["kernel"])
    broken = sum(bool(row["problem"]) for row in rows)
    print(table.markdown(rows, ("kernel", "registers", "spill_bytes", "shared_bytes", "problem")))
    print(f"{len(rows)} kernels compiled for the {device.name} (sm_{device.capability}): {broken} with problems.")
    here = "no CUDA device is available here" if not torch.cuda.is_available() else "--target asks for no measurement"
    print(f"probe: {here}. NOTHING WAS MEASURED, and no constants were written; this rehearsed the compilation alone.")
    return 1 if broken else 0 if torch.cuda.is_available() else NO_GPU


def inspect(form: Form, capability: int, shared: int) -> dict[str, object]:
    """What one kernel takes, and what is wrong with it."""
    row: dict[str, object] = {"kernel": str(form), "registers": "", "spill_bytes": "", "shared_bytes": ""}
    try:
        compiled = form.compile_ahead(capability)
        code = sass.read_cubin(compiled.asm["cubin"])
    except Exception as error:
        return row | {"problem": f"{type(error).__name__}: {error}"}
    needs = compiled.metadata.shared
    problems = [f"spills {code.stack_bytes} bytes a thread"] * bool(code.stack_bytes)
    problems += [f"needs more shared memory than the {shared} bytes there"] * (needs > shared)
    if dict(form.constants).get("PROTOCOL") in ("counter", "flag"):
        problems += ptx_order(compiled.asm["ptx"], {0})  # the tiles are what is published
    row |= {"registers": code.registers, "spill_bytes": code.stack_bytes, "shared_bytes": needs}
    return row | {"problem": "; ".join(problems)}
