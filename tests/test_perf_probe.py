"""`probe`, the command: known times give known constants, and what is wrong, late or missing is said and not used."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import count as counting
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lstm_triton.perf import probe, probe_constants, table
from lstm_triton.perf.probe_constants import Field, Probe, flat, probes, starting_point, updated

from lstm_triton import devices


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
