"""The floor: against a step added up by hand, below every plan of the model, and moved by what it stands for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from lstm_triton.perf.cases import DTYPES, MODES, Case
from lstm_triton.perf.floor import floor, step

from lstm_triton.devices import Curve, devices
from lstm_triton.planner import make_plan
from lstm_triton.spec import CellSpec

pytestmark = pytest.mark.both
H200 = devices()["H200"]
#: Round numbers, so that a step can be added up by hand.
PLAIN = replace(
    H200,
    clock_ghz=1.0,
    sms=64,
    waits=(("counter", Curve(((2, 3.0),))), ("flag", Curve(((2, 2.0),))), ("data", Curve(((2, 1.0), (64, 1.5))))),
    l2_bytes_per_clock=32.0,
    flops=(("half", 1000.0), ("tf32", 500.0), ("fp32", 100.0), ("fp64", 50.0)),
    small_flops=((("plain", "half"), Curve(((16, 500.0),))), (("batched", "half"), Curve(((16, 800.0),)))),
    cell_us=0.25,
)


def case(mode: str = "inference", **changes: object) -> Case:
    return replace(Case("rnn", "bf16", mode, 16, 1024, 100), **changes)


def test_one_step_by_hand() -> None:
    # 16 rows by 16 units on each of 64 programs: wait 1.5, rows 16*1024*2/32 = 1.024 us,
    # product 2*16*1024*16/800 = 0.655 us, cell 0.25 less what 16 x 16 values are below its 16 x 64, 768 / 4 clocks.
    by_hand = 1.5 + 1.024 + 0.65536 + 0.25 - 0.192
    assert step(case(), PLAIN, "forward") == pytest.approx(by_hand, rel=1e-6)
    assert floor(case(), PLAIN).us_per_step == pytest.approx(by_hand)
    assert floor(case(), PLAIN).ms == pytest.approx(by_hand * 100 / 1e3)
    # with all units in one program there is nothing to wait for
    assert step(case(hidden=16), PLAIN, "forward") < 0.25 + 0.1


def test_run_counts_steps_layers_and_directions() -> None:
    one = floor(case(), PLAIN)
    assert floor(case(seq=200), PLAIN).ms == pytest.approx(2 * one.ms)
    assert floor(case(mode="forward"), PLAIN) == one
    both = floor(case(mode="forward+backward"), PLAIN)
    assert both.us_per_step == pytest.approx(one.us_per_step + step(case(), PLAIN, "backward"))
    # a wavefront shares the SMs, and is taken only where it pays
    many = replace(PLAIN, sms=1024)
    assert floor(case(layers=2), many).ms == pytest.approx(floor(case(), many).ms * 101 / 100, rel=0.02)
    assert one.ms < floor(case(layers=2), PLAIN).ms <= 2 * one.ms
    assert floor(case(layers=2), PLAIN).us_per_step == pytest.approx(floor(case(layers=2), PLAIN).ms * 1e3 / 200)
    assert one.ms <= floor(case(bidirectional=True), PLAIN).ms <= 2 * one.ms


def test_weights_cost_only_where_they_do_not_fit() -> None:
    def streamed(**changes: object) -> bool:
        slow = replace(PLAIN, l2_distinct_bytes_per_clock=1e-3)
        return step(case(**changes), slow, "forward") > step(case(**changes), PLAIN, "forward") + 1

    assert not streamed(cell="lstm", hidden=1024)
    assert streamed(cell="lstm", hidden=8192)


@pytest.mark.parametrize("name", ["A100", "H200", "B200"])
def test_no_plan_of_the_model_is_below_it(name: str) -> None:
    """With the best protocol in the plans' model as well: else the floor could hide behind the counter's waits."""
    device = devices()[name]
    device = replace(device, waits=tuple((protocol, dict(device.waits)["data"]) for protocol, _ in device.waits))
    for cell, dtype, batch, hidden in itertools.product(
        ("lstm", "gru", "rnn"), ("bf16", "tf32"), (1, 16, 64, 256), (64, 256, 768, 1024, 2048)
    ):
        plan = make_plan(CellSpec(cell), 64, batch, hidden, DTYPES[dtype], device)
        one = Case(cell, dtype, "forward+backward", batch, hidden, 64)
        for direction in ("forward", "backward"):
            assert step(one, device, direction) <= getattr(plan, direction).step_us * (1 + 1e-9), (one, direction)


def test_every_mode_and_dtype_has_one() -> None:
    for mode, dtype in itertools.product(MODES, DTYPES):
        assert 0 < floor(case(mode, dtype=dtype), H200).ms < 1e3
