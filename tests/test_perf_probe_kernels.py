"""`probe`'s kernels do what they are timed for: their results are checked, and in their machine code the work is in the
loop, in order, and compiled once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from lstm_triton.perf import probe, probe_kernels, probe_launches, sass
from lstm_triton.perf.probe_constants import probes
from lstm_triton.perf.probe_launches import Form, Launch
from lstm_triton.perf.ptx import ptx_order

from lstm_triton import devices


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
