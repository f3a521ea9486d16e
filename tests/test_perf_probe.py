"""`probe`: its protocols are right, its kernels do what they are timed for, and known times give known constants."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count as counting
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from concurrency import POLICIES, Livelock, concurrent
from lstm_triton.perf import probe, probe_constants, probe_kernels, probe_launches, sass, table
from lstm_triton.perf.probe_constants import PROTOCOLS, Field, Probe, flat, probes, starting_point, updated
from lstm_triton.perf.probe_launches import Exchange, Form, Launch
from lstm_triton.perf.ptx import ptx_order

from lstm_triton import devices

STEPS = 5


def exchange(protocol: str, programs: int, **options: Any) -> tuple[str, list[Any]]:
    """One launch with all programs at once: what its own check says, and the races."""
    launch = Exchange(protocol, programs, STEPS, "cpu")
    launch.prepare(STEPS)
    with concurrent(**options) as run:
        launch.run(STEPS)
    return launch.check(STEPS), run.races


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("programs", [2, 3, 4])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_are_right(protocol: str, programs: int, policy: str, seed: int) -> None:
    problem, races = exchange(protocol, programs, seed=seed, policy=policy)
    assert not problem
    # Nothing orders the poll of data behind its store but the data itself: a word is either empty or right.
    polls = [race for race in races if "(wait_data)" in race.first.place + race.second.place]
    assert races == (polls if protocol == "data" else [])
    assert all(race.where.startswith("tiles_ptr") for race in races)


@triton.jit
def publish_without_barrier(counter_ptr):
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for_one_less(counter_ptr, target, polls):
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while seen < target - 1:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return seen >= 0


@triton.jit
def flag_without_barrier(flag_ptr, step):
    tl.atomic_xchg(flag_ptr, step, sem="release", scope="gpu")


@triton.jit
def flag_without_release(flag_ptr, step):
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, step, sem="relaxed", scope="gpu")


@triton.jit
def flags_without_acquire(flag_ptrs, INTERPRETED):
    return tl.min(tl.load(flag_ptrs, volatile=True))


@triton.jit
def look_at_the_first_flag(flag_ptrs, INTERPRETED):
    return tl.max(tl.atomic_add(flag_ptrs, 0, sem="acquire", scope="gpu"))


@triton.jit
def wait_flags_without_barrier(flag_ptrs, step, polls, INTERPRETED):
    seen = probe_kernels.see_flags(flag_ptrs, INTERPRETED)
    while seen < step:
        seen = probe_kernels.see_flags(flag_ptrs, INTERPRETED)
    return seen >= step


@triton.jit
def look_at_data_once(ptrs, mask, polls):
    lowest = tl.min(tl.load(ptrs, mask=mask, other=probe_kernels.WORD_MASK, volatile=True))
    return tl.maximum(lowest, 0)


@pytest.mark.parametrize(
    ("protocol", "name", "fault"),
    [
        ("counter", "publish", publish_without_barrier),
        ("counter", "wait", wait_for_one_less),
        ("flag", "publish_flag", flag_without_barrier),
        ("flag", "publish_flag", flag_without_release),
        ("flag", "see_flags", flags_without_acquire),
        ("flag", "see_flags", look_at_the_first_flag),
        ("flag", "wait_flags", wait_flags_without_barrier),
        ("data", "wait_data", look_at_data_once),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_faults_are_found(protocol: str, name: str, fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_kernels, name, fault)
    for policy in POLICIES:
        try:
            problem, races = exchange(protocol, 3, policy=policy)
        except Livelock:
            continue
        assert "not ordered" in problem if protocol == "data" else races


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_wait_that_runs_out_ends_and_is_reported(protocol: str) -> None:
    launch = Exchange(protocol, 3, STEPS, "cpu", polls=20)
    launch.prepare(STEPS)
    launch.run(STEPS)  # interpreted one after another: the first waits for a second that has not begun
    assert "waited in vain" in launch.check(STEPS)


def test_the_exchange_notices_a_wrong_word_anywhere() -> None:
    launch = Exchange("counter", 2, STEPS, "cpu")
    launch.tiles.copy_(launch.expected[:-1])
    launch.last.copy_(launch.expected[-1])
    assert launch.check(STEPS) == ""
    launch.tiles[3, 7, 5] += 1
    assert "first at step 3" in launch.check(STEPS)
    assert launch.check(3) == "not ordered: the last tiles are wrong"


def small(name: str) -> tuple[Launch, Callable[[Launch], torch.Tensor]]:
    """A launch on the CPU, and where its result is."""
    if name == "product":
        return probe_launches.LargeProduct("fp32", 32, "cpu"), lambda launch: launch.out
    if name == "recurrence":
        return probe_launches.Recurrence(5, "cpu"), lambda launch: launch.y
    if name == "launches":
        return probe_launches.LaunchRow("plain", 3, "cpu"), lambda launch: launch.touched
    if name.startswith("read"):
        return probe_launches.ReadL2(name == "read same", 2, "cpu"), lambda launch: launch.sums
    _, how, kind = name.split()
    return probe_launches.Multiply(how, kind, 8, 2, "cpu"), lambda launch: launch.out


@pytest.mark.parametrize(
    "name",
    ["read same", "read distinct", "launches", "multiply plain tf32", "multiply batched tf32",
     "multiply batched fp64", "product", "recurrence"],
)  # fmt: skip
def test_every_launch_is_right_and_notices_a_wrong_result(name: str) -> None:
    launch, result = small(name)
    for count in (1, 5):
        launch.prepare(count)
        launch.run(count)
        assert launch.check(count) == ""
    result(launch).view(-1)[0] += 1
    assert launch.check(5) != ""
    launch.prepare(4)
    launch.run(4)
    if name != "product":  # a product done less often is the same product
        assert result(launch).shape != (5, 16, 16) and (name == "recurrence" or launch.check(5) != "")


def test_a_graph_is_captured_once_a_length_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def capture(run: Callable[[], None]) -> SimpleNamespace:
        run()  # the warm-up
        captured.append(run)
        return SimpleNamespace(run=run)

    monkeypatch.setattr(probe_launches, "capture", capture)
    launch = probe_launches.LaunchRow("graph", 2, "cpu")
    for count in (2, 3, 2):
        launch.prepare(count)
        launch.run(count)
        assert launch.check(count) == ""
    assert len(captured) == 2


class Fake:
    """A launch of known duration."""

    def __init__(self, us: float, problem: str = "", later: str = "") -> None:
        self.us, self.problem, self.later, self.checks = us, problem, later, counting()

    def prepare(self, count: int) -> None:
        self.prepared = count

    def run(self, count: int) -> None:
        assert count == self.prepared

    def check(self, count: int) -> str:
        assert count == self.prepared
        return self.problem if next(self.checks) < 2 else self.later


GHZ = 1.75


def timer(launch: Fake, count: int, head_start: int) -> tuple[float, float]:
    launch.prepare(count)
    launch.run(count)
    return 0.02 + launch.us * count / 1e3, GHZ


def durations(where: Field) -> float:
    """us a step, chosen so that the constants are round numbers."""
    if where[0] == "wait_us":
        n = int(where[2])
        # data: 256 bytes of each program's tile at 64 bytes a clock, beside the wait itself
        return {"counter": 1.5, "flag": 1.0, "data": 0.5 + 256 * n / 64 / 1750}[where[1]] + n / 1000
    if where[0] == "l2_bytes_per_clock":
        return 65536 / {"same": 64, "distinct": 32}[where[1]] / 1750
    if where[0] == "small_tile_flops_per_clock":
        _, _, kind, n = where
        return 2 * 16 * 1024 / {"half": 2, "tf32": 4, "fp64": 8}[kind] * int(n) / (10 * int(n)) / 1750
    if where[0] == "flops_per_clock":
        size = 8192 if where[1] in ("half", "tf32") else 4096
        return 2 * size**3 / 132 / {"half": 4000, "tf32": 2000, "fp32": 250, "fp64": 200}[where[1]] / 1750
    kinds = {"plain": 5.0, "cooperative": 6.0, "graph": 1.5, "pdl": 1.25}
    return kinds[where[1]] / (2 if where[0] == "queued_us" else 1) if len(where) > 1 else 0.25


def faked(changes: Mapping[Field, Fake] = {}) -> list[Probe]:
    return [
        replace(one, make=lambda one=one: changes.get(one.field) or Fake(durations(one.field)))
        for one in probes(90, 132)
    ]


SIZES = {
    name: starting_point("H200", 90)[name]
    for name in ("capability", "sms", "registers_per_sm", "shared_per_program", "shared_per_sm")
}
ENVIRONMENT = {name: f"the {name}" for name in devices.SCHEMA["measured"]}


def measured(
    tmp_path: Path, wanted: list[Probe], deadline: float = 1e9, step: float = 0.0, save: bool = False
) -> tuple[int, dict[str, Any], list[dict[str, str]]]:
    """The exit status, the file and the samples of a run on a machine of known speed."""
    now = counting(0.0, step)
    entry = starting_point("NVIDIA H200", 90)
    rows = table.Rows(tmp_path / "probe.csv", probe.FIELDS)
    results = probe.run(wanted, timer, flat(entry), rows, deadline, lambda: next(now))
    options = argparse.Namespace(out=tmp_path, save=save)
    status = probe.finish(entry, SIZES | {"sms": 131}, results, wanted, ENVIRONMENT, options)
    path = tmp_path / "h200.json"
    return status, json.loads(path.read_text()) if path.exists() else {}, table.read(rows.path, probe.FIELDS)


def test_known_times_give_known_constants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found, samples = measured(tmp_path, faked())
    assert status == 0
    devices.check(found)
    assert found["wait_us"]["counter"] == {
        str(n): pytest.approx(1.5 + n / 1000, rel=1e-3) for n in (2, 4, 8, 16, 32, 64, 128, 132)
    }
    assert found["wait_us"]["flag"]["128"] == pytest.approx(1.128, rel=1e-3)
    assert found["wait_us"]["data"]["132"] == pytest.approx(0.632, rel=1e-3)
    assert found["l2_bytes_per_clock"] == pytest.approx({"same": 64, "distinct": 32}, rel=1e-3)
    assert found["launch_us"] == pytest.approx({"plain": 5, "cooperative": 6, "graph": 1.5, "pdl": 1.25}, rel=1e-3)
    assert found["flops_per_clock"] == pytest.approx({"half": 4000, "tf32": 2000, "fp32": 250, "fp64": 200}, rel=1e-3)
    for kinds in found["small_tile_flops_per_clock"].values():
        for kind in ("half", "tf32", "fp64"):
            assert kinds[kind] == {n: pytest.approx(10 * int(n), rel=1e-3) for n in ("8", "16", "32", "64")}
    assert found["cell_us"] == pytest.approx(0.25) and found["clock_ghz"] == GHZ
    assert found["sms"] == 131
    assert found["measured"]["date"] == "the date" and "as before" not in found["source"]
    assert devices.from_entry(found).constants == "measured the date"
    assert len(samples) == len(faked()) * probe_constants.ROUNDS
    assert {row["problem"] for row in samples} == {""}
    assert all(float(row["many_ms"]) > float(row["few_ms"]) > 0 for row in samples)
    printed = capsys.readouterr().out
    assert "plain launches are bound by the host: 5.00 us each, the device takes 2.50" in printed
    assert "112 GB/s an SM" in printed  # 64 bytes at 1.75 GHz


@pytest.mark.parametrize(
    ("fake", "message", "timed"),
    [
        (Fake(1.5, problem="not ordered"), "not ordered", False),
        (Fake(1.5, later="not ordered"), "not ordered", True),
        (Fake(0.01), "is not between 0.2 and 20", True),
        (Fake(50.0), "is not between 0.2 and 20", True),
        (Fake(-1.0), "is not between 0.2 and 20", True),
    ],
    ids=["wrong", "wrong when timed", "too fast", "too slow", "backwards"],
)
def test_what_is_wrong_is_said_and_not_used(
    fake: Fake, message: str, timed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("wait_us", "flag", "8")
    status, found, samples = measured(tmp_path, faked({where: fake}))
    assert status == 1
    assert "8" not in found["wait_us"]["flag"] and "16" in found["wait_us"]["flag"]
    assert found["wait_us"]["counter"]["8"] == pytest.approx(1.508, rel=1e-3)
    rows = [row for row in samples if row["constant"] == "wait_us.flag.8"]
    assert len(rows) == (probe_constants.ROUNDS if timed else 1)
    assert all(message in row["problem"] and bool(row["value"]) == timed for row in rows)
    assert "FAILED wait_us.flag.8: " in capsys.readouterr().out


def test_an_exception_is_one_constant_s_and_the_rest_goes_on(tmp_path: Path) -> None:
    def lost() -> Fake:
        raise RuntimeError("too many blocks in\ncooperative launch")

    wanted = [replace(one, make=lost) if one.field == ("cell_us",) else one for one in faked()]
    status, found, samples = measured(tmp_path, wanted)
    before = starting_point("H200", 90)
    assert status == 1 and found["cell_us"] == before["cell_us"]
    assert 'not measured, and so as before: cell_us ("estimates' in found["source"]
    (row,) = (row for row in samples if row["constant"] == "cell_us")
    assert row["problem"] == "RuntimeError: too many blocks in cooperative launch"


def test_what_time_did_not_allow_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found, _ = measured(tmp_path, faked(), deadline=20.0, step=0.1)
    assert status == probe.OUT_OF_TIME
    assert "NOT MEASURED, no time was left:" in capsys.readouterr().out
    assert found["l2_bytes_per_clock"]["same"] == pytest.approx(64, rel=1e-3)
    assert found["flops_per_clock"] == starting_point("H200", 90)["flops_per_clock"]
    assert "flops_per_clock.half" in found["source"]


def test_a_slow_probe_has_fewer_rounds(tmp_path: Path) -> None:
    _, _, samples = measured(tmp_path, faked()[:1], step=2.5)
    assert len(samples) == probe_constants.ENOUGH


def test_nothing_measured_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = faked({one.field: Fake(1.0, problem="wrong") for one in faked()})
    status, found, _ = measured(tmp_path, wanted)
    assert status == 1 and not found
    assert "No constant was measured" in capsys.readouterr().out


def test_saving_puts_it_into_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package" / "tuned").mkdir(parents=True)
    monkeypatch.setattr(probe.lstm_triton, "__file__", str(tmp_path / "package" / "__init__.py"))
    _, found, _ = measured(tmp_path, faked(), save=True)
    assert json.loads((tmp_path / "package" / "tuned" / "h200.json").read_text()) == found


def test_command_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the device: properties, environment, compilation and timer stand in."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    cuda = {"is_available": lambda: True, "current_device": lambda: 0, "_sleep": lambda clocks: None}
    for name, value in (cuda | {"get_device_properties": lambda index: properties}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(probe.environment, "collect", lambda device: {"device": device, **ENVIRONMENT})
    monkeypatch.setattr(probe.environment, "summary", str)
    monkeypatch.setattr(probe, "compile_ahead", lambda wanted, capability, jobs: [f"sm_{capability}"])
    monkeypatch.setattr(probe, "probes", lambda capability, sms: faked())
    monkeypatch.setattr(probe, "device_timer", timer)
    parser = argparse.ArgumentParser()
    probe.add_arguments(parser)
    options = parser.parse_args(["--out", str(tmp_path / "out"), "--minutes", "1"])
    monkeypatch.setattr(probe, "INTERPRETED", True)
    with pytest.raises(SystemExit, match="2"):
        probe.main(options)
    monkeypatch.setattr(probe, "INTERPRETED", False)
    assert probe.main(options) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["environment.json", "h200.json", "probe.csv"]


def test_a_second_measurement_builds_on_the_first() -> None:
    first = updated(starting_point("H200", 90), SIZES, {("cell_us",): 0.3, ("wait_us", "flag", "2"): 1.0}, ENVIRONMENT)
    second = updated(first, SIZES, {("wait_us", "flag", "4"): 1.123456}, ENVIRONMENT)
    assert second["cell_us"] == 0.3 and second["wait_us"]["flag"] == {"4": 1.123}
    assert "cell_us" in second["source"].split("as before: ")[1] and second["source"].count("as before") == 1
    assert first["wait_us"]["flag"] == {"2": 1.0}  # and is left alone


def test_gpu_without_a_file_starts_from_the_nearest() -> None:
    entry = starting_point("NVIDIA GeForce RTX 3090", 86)
    assert entry["name"] == "GeForce RTX 3090"
    assert entry["source"].startswith("those of the L4")  # sm_89
    assert "3090" in devices.file_name(entry["name"])
    assert starting_point("NVIDIA H100 80GB HBM3", 90)["name"] == "H100"
    properties = SimpleNamespace(major=8, minor=6, multi_processor_count=82, shared_memory_per_multiprocessor=102400)
    sizes = probe_constants.device_sizes(properties, entry)
    assert sizes == {
        "capability": 86, "sms": 82, "registers_per_sm": 65536, "shared_per_program": 101376, "shared_per_sm": 102400,
    }  # fmt: skip
    found = updated(copy.deepcopy(entry), sizes, {("launch_us", "plain"): 5.0}, ENVIRONMENT)
    assert found["launch_us"]["pdl"] is None and "pdl" not in found["source"]


def test_sizes_and_kinds_are_the_device_s() -> None:
    def fields(capability: int, sms: int) -> set[Field]:
        return {one.field for one in probes(capability, sms)}

    assert {f[2] for f in fields(80, 108) if f[0] == "wait_us"} == {"2", "4", "8", "16", "32", "64", "108"}
    assert {f[2] for f in fields(90, 128) if f[0] == "wait_us"} == {"2", "4", "8", "16", "32", "64", "128"}
    assert ("launch_us", "pdl") in fields(90, 132) and ("launch_us", "pdl") not in fields(89, 58)
    assert ("small_tile_flops_per_clock", "plain", "fp64", "8") in fields(80, 108) - fields(89, 58) - fields(100, 148)
    known = flat(starting_point("H200", 90))
    for where in fields(90, 132):
        assert where[0] == "queued_us" or any(where[:-1] == other[:-1] for other in known)
        assert probe_constants.implausible(where, float("nan"))


def test_a_row_the_device_caught_up_with_is_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer itself, on events that a clock of our own stamps: milliseconds, a spin's clocks, a late host."""
    now = [0.0]
    late = iter([True, False])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def query(self) -> bool:
            return next(late)

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def sleep(clocks: int) -> None:
        now[0] += clocks / (GHZ * 1e6)

    class Busy(Fake):
        def run(self, count: int) -> None:
            now[0] += count * self.us / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ms, ghz = probe.device_timer(Busy(3.0), 100, probe_constants.ONE_LAUNCH)
    assert (ms, ghz) == (pytest.approx(0.3), pytest.approx(GHZ))
    late = iter([True] * probe.ATTEMPTS)
    with pytest.raises(RuntimeError, match="the host took longer"):
        probe.device_timer(Busy(3.0), 100, probe_constants.ONE_LAUNCH)
    assert probe.device_timer(Busy(3.0), 100, 0)[0] == pytest.approx(0.3)  # no head start, nothing to be late for


def forms(capability: int) -> list[Form]:
    """Every kernel, at the ends of its range."""
    found = [probe_launches.exchange_form(*what) for what in (("counter", 132), ("flag", 4), ("flag", 132))]
    found += [probe_launches.exchange_form("data", n) for n in (4, 132)]
    found += [probe_launches.READ_FORM, probe_launches.touch_form("cooperative")]
    found += [probe_launches.touch_form("pdl")] * (capability >= 90)
    shapes = [("plain", "half", 8), ("batched", "half", 64), ("plain", "tf32", 64), ("batched", "tf32", 8)]
    shapes += [("plain", "fp64", 64), ("batched", "fp64", 32)] * (capability in (80, 90))
    return found + [probe_launches.multiply_form(*shape) for shape in shapes]


@pytest.mark.native
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles_and_none_spills(capability: int) -> None:
    device = devices.device_named(f"sm_{capability}")
    wanted = {one.form for one in probes(capability, device.sms)}
    for form in forms(capability):
        row = probe.inspect(form, capability, device.shared_per_program)
        assert row["problem"] == "" and row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255
        assert form in wanted or device.sms != 132


def instructions(form: Form, capability: int = 90) -> tuple[Counter[str], Counter[str], Any]:
    """Opcodes inside the kernel's loop and outside, and what was compiled."""
    compiled = form.compile_ahead(capability)
    code = sass.read_cubin(compiled.asm["cubin"])
    places = [Counter(), Counter()]
    for i, one in enumerate(code.instructions):
        places[i not in code.loop][one.opcode] += 1
    return places[0], places[1], compiled


def having(opcodes: Counter[str], *parts: str) -> int:
    return sum(n for opcode, n in opcodes.items() if all(part in opcode for part in parts))


@pytest.mark.native
def test_the_loads_from_l2_are_in_the_loop_wide_and_pass_l1_by() -> None:
    inside, outside, _ = instructions(probe_launches.READ_FORM)
    assert having(inside, "LDG") == having(inside, "LDG.E.128.STRONG.GPU") == probe_launches.LOADS
    # The compiler may peel or unroll a trip, but no load that is summed once and used many times.
    assert having(outside, "LDG") % probe_launches.LOADS == 0 and having(outside, "STG") > 0
    bytes_read = probe_launches.LOADS * 16 * probe_launches.READ_FORM.num_warps * 32
    assert bytes_read == probe_launches.BYTES_READ


@pytest.mark.native
@pytest.mark.parametrize(
    ("how", "kind", "n", "warps"),
    [("plain", "half", 8, 1), ("plain", "half", 64, 4), ("batched", "half", 8, 4), ("batched", "tf32", 32, 4)],
)
def test_the_products_are_in_the_loop_and_read_their_operands_there(how: str, kind: str, n: int, warps: int) -> None:
    inside, _, _ = instructions(probe_launches.multiply_form(how, kind, n))
    repeats = having(inside, "BAR")  # one each; the compiler unrolls some
    k = {"half": 16, "tf32": 8}[kind]
    # `warps` share a product: in a plain one of 16 x 8 every warp does all of it
    assert having(inside, "HMMA") == repeats * probe_launches.depth(kind) // k * (n // 8) // warps
    assert having(inside, "LDSM") >= repeats * 8
    assert not having(inside, "LDG") and not having(inside, "STG")


@pytest.mark.native
def test_waiting_is_in_the_loop_and_in_order() -> None:
    for protocol, acquires in (("counter", 1), ("flag", 1), ("data", 0)):
        inside, _, compiled = instructions(probe_launches.exchange_form(protocol, 64))
        ptx = compiled.asm["ptx"]
        assert having(inside, "STG") == 1
        assert (having(inside, "MEMBAR") > 0) == bool(acquires)
        if protocol == "data":
            assert having(inside, "LDG", "128.STRONG.SYS") == having(inside, "LDG") > 0
        else:
            assert ptx_order(ptx, {0}) == []
            assert ptx_order(ptx.replace("ld.acquire", "ld.relaxed").replace(".acquire", ".relaxed"), {0})
            assert ptx.count("ld.acquire.gpu.global") == (2 if protocol == "flag" else 0)  # one look, and the loop's


@pytest.mark.native
def test_a_launch_finds_what_was_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0,
                             get_current_stream=lambda device=None: 0)  # fmt: skip
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    for form in (probe_launches.exchange_form("flag", 4), probe_launches.touch_form("pdl"),
                 probe_launches.multiply_form("batched", "fp64", 8)):  # fmt: skip
        kernel = getattr(probe_kernels, form.kernel)
        types = {name: probe_launches._TORCH[kind] for name, kind in form.pointers}
        for number in (1, 16, 100):  # as arguments neither specialised nor compiled in
            arguments = [
                torch.empty(64, dtype=types.get(name, torch.int32)) if name.endswith("_ptr") else number
                for name in kernel.arg_names
                if name not in form._constants()
            ]
            launched = kernel.run(*arguments, grid=(1,), warmup=True, **form._constants(), **form._options())
            assert launched.hash == form.compile_ahead(90).hash


@pytest.mark.native
def test_what_would_spoil_the_measurement_is_found() -> None:
    form = probe_launches.multiply_form("plain", "half", 64)
    assert "more shared memory than the 1000 bytes" in probe.inspect(form, 90, 1000)["problem"]
    wrong = replace(form, constants=(("K", 7), *form.constants[1:]))
    assert "Error" in probe.inspect(wrong, 90, 1 << 20)["problem"]


@pytest.mark.native
def test_compiling_ahead_names_what_fails_and_does_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    form = probe_launches.touch_form("plain")
    wanted = [replace(probes(90, 132)[0], form=one) for one in (replace(form, kernel="absent"), form, form, None)]
    (line,) = probe.compile_ahead(wanted, 90, 1)
    assert line.startswith("FAILED to compile absent") and "AttributeError" in line
    assert len(list(tmp_path.rglob("touch.cubin"))) == 1


@pytest.mark.native
def test_without_a_gpu_it_rehearses_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    probe.add_arguments(parser)
    few = probes(80, 108)[:1]
    monkeypatch.setattr(probe, "probes", lambda capability, sms: few)
    options = parser.parse_args(["--target", "A100", "--jobs", "1", "--out", str(tmp_path)])
    assert probe.main(options) == probe.NO_GPU
    printed = capsys.readouterr().out
    assert "1 kernels compiled for the A100 (sm_80): 0 with problems." in printed and "NOTHING WAS MEASURED" in printed
    assert not list(tmp_path.iterdir())


def test_bad_usage_is_named() -> None:
    command = [sys.executable, "-m", "lstm_triton.perf", "probe"]
    for arguments, message in (["--target", "sm_12"], "--target: target must be one of"), (["--minutes", "0"], "--min"):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 2 and message in done.stdout
