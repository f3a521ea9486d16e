"""The constants of each GPU: every file fits the schema, and what does not is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lstm_triton as lt
from lstm_triton import devices
from lstm_triton.devices import Curve, check, from_entry
from lstm_triton.planner import make_plan
from lstm_triton.spec import CellSpec

pytestmark = pytest.mark.both
TUNED = Path(lt.__file__).parent / "tuned"
MEASURED = {name: "recorded" for name in devices.SCHEMA["measured"]} | {"date": "2030-01-02"}


def entry(name: str = "H200") -> dict[str, Any]:
    return json.loads((TUNED / devices.file_name(name)).read_text())


@pytest.mark.parametrize("path", sorted(TUNED.glob("*.json")), ids=lambda path: path.name)
def test_every_file_fits_the_schema(path: Path) -> None:
    content = json.loads(path.read_text())
    check(content)
    assert devices.file_name(content["name"]) == path.name
    # what nobody measured is called an estimate
    assert content["measured"] or "not checked" in content["source"]
    assert devices.devices()[content["name"]].constants == ("estimates" if not content["measured"] else
        f"measured {content['measured']['date']}")  # fmt: skip


def change(path: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(entry())
    *outer, last = path.split(".")
    target = content
    for name in outer:
        target = target[name]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sms", ..., "sms is missing"),
        ("sms", 1.5, "sms must be of type int, got 1.5"),
        ("sms", True, "sms must be of type int"),
        ("clock_ghz", 0, "clock_ghz must be finite and above zero"),
        ("clock_ghz", float("nan"), "clock_ghz must be finite"),
        ("cell_us", "fast", "cell_us must be of type float, got 'fast'"),
        ("cell_us", None, "cell_us must be of type float, got None"),
        ("speed", 1, "speed is unknown"),
        ("wait_us.flag", ..., "wait_us.flag is missing"),
        ("wait_us.flag", {}, "wait_us.flag must have positive numbers as keys, got none"),
        ("wait_us.flag", {"many": 1.0}, "wait_us.flag must have positive numbers as keys, got many"),
        ("wait_us.flag", 3, "wait_us.flag must be an object"),
        ("wait_us.flag.2", -1, "wait_us.flag.2 must be finite and above zero"),
        ("launch_us.plain", None, "launch_us.plain must be of type float"),
        ("measured", {"date": "2030"}, "measured.device is missing"),
        ("small_tile_flops_per_clock.plain.fp8", {"16": 1}, "small_tile_flops_per_clock.plain.fp8 is unknown"),
    ],
)
def test_what_does_not_fit_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        check(change(path, value))
    assert message in str(raised.value)


def test_what_may_be_absent() -> None:
    assert from_entry(change("launch_us.pdl", None)).constants == "estimates"
    assert from_entry(change("measured", MEASURED)).constants == "measured 2030-01-02"


def test_curve() -> None:
    curve = Curve(((2, 1.0), (8, 3.0), (32, 4.0)))
    assert [curve.at(n) for n in (1, 2, 4, 8, 16, 32, 500)] == pytest.approx([1, 1, 2, 3, 3.5, 4, 4])


def test_registered_constants_are_the_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = devices.devices()  # a copy: other tests have theirs
    monkeypatch.setattr(devices, "_known", lambda: known)

    def waiting() -> float:
        plan = make_plan(CellSpec("lstm"), 9, 16, 1024, torch.bfloat16, devices.device_named("H200"), engine="resident")
        return dict(plan.forward.parts)["wait"]

    before = waiting()
    content = change("wait_us.counter", {"2": 5.0, "128": 7.0}) | {"measured": MEASURED}
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(content))
    devices.register(path)
    assert before < 5 and waiting() == 7.0
    assert devices.device_named("H200").constants == "measured 2030-01-02"
    path.write_text(json.dumps(content | {"sms": "many"}))
    with pytest.raises(ValueError, match=r"h200\.json: sms must be of type int"):
        devices.register(path)


def test_model_follows_the_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each constant that the plan's model reads moves the part of the step that it stands for, and nothing else."""

    def parts(content: dict[str, Any], engine: str) -> dict[str, float]:
        plan = make_plan(
            CellSpec("lstm"), 9, 16, 512, torch.bfloat16, from_entry(content), engine=engine, tile=(16, 16)
        )
        return dict(plan.forward.parts)

    for path, value, engine, part in [
        ("wait_us.counter", {"2": 9.0}, "resident", "wait"),
        ("l2_bytes_per_clock.same", 1, "resident", "rows"),
        ("l2_bytes_per_clock.distinct", 1, "streamed", "weights"),
        ("small_tile_flops_per_clock.batched.half", {"16": 1}, "resident", "product"),
        ("cell_us", 50.0, "resident", "cell"),
        ("launch_us.plain", 50.0, "step", "launch"),
    ]:
        before, after = parts(entry(), engine), parts(change(path, value), engine)
        assert {name for name in before if before[name] != pytest.approx(after[name])} == {part}, path
