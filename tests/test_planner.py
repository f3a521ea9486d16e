"""Plans: a pure function of the problem and the device, that never asks for more than a GPU holds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from numerics import CELLS, problem

import lstm_triton as lt
from lstm_triton.devices import device_like, device_named, devices
from lstm_triton.planner import DTYPES, ENGINES, make_plan
from lstm_triton.spec import CellSpec

ALL = list(itertools.product(devices().values(), CELLS, DTYPES, ("tf32", "ieee")))


@pytest.mark.both
@pytest.mark.parametrize("B", [1, 7, 64, 256, 5000])
@pytest.mark.parametrize("H", [1, 33, 64, 200, 512, 1024, 2048, 4096])
def test_every_problem_has_a_plan_that_fits(H: int, B: int) -> None:
    for device, cell, dtype, precision in ALL:
        plan = make_plan(CellSpec(cell), 100, B, H, dtype, device, precision=precision)
        for kernel in (plan.forward, plan.backward):
            assert kernel.n_b * kernel.block_b >= B > (kernel.n_b - 1) * kernel.block_b
            assert kernel.n_h * kernel.tiles * kernel.block_h >= H
            assert kernel.shared_bytes <= device.shared_per_program
            assert (kernel.n_h == 1) or kernel.engine != "local"
            if kernel.synchronised:
                # A launch allows 255 registers a thread: so many programs are there at once, whatever happens.
                at_once = min(
                    device.registers_per_sm // (256 * 32 * kernel.num_warps),
                    device.shared_per_sm // (kernel.shared_bytes + 1024),
                )
                assert 1 <= kernel.grid <= device.sms * at_once
            assert kernel.step_us > 0 and math.isclose(kernel.step_us, sum(us for _, us in kernel.parts))


@pytest.mark.both
def test_engines_where_they_are_at_home() -> None:
    for H, engine in ((64, "local"), (512, "resident"), (1024, "resident"), (2048, "streamed")):
        assert make_plan(CellSpec("lstm"), 512, 16, H, torch.bfloat16, devices()["H200"]).engine == engine


@pytest.mark.both
def test_explain_says_what_and_why() -> None:
    text = lt.plan("lstm", *_shapes("lstm", 512, 16, 1024), target="H200").explain()
    for part in (
        "lstm, T=512, B=16, H=1024, bfloat16 on H200",
        "resident",
        "not measured",
        "streamed",
        "local not possible",
    ):
        assert part in text


def _shapes(cell: str, T: int, B: int, H: int) -> list[torch.Tensor]:
    G = CellSpec(cell).gates
    states = [(B, H)] * (2 if cell == "lstm" else 1)
    return [
        torch.empty(shape, device="meta", dtype=torch.bfloat16)
        for shape in [(T, B, H), *states, (G * H, H), (G * H, H)]
    ]


@pytest.mark.both
def test_plan_takes_the_functions_arguments() -> None:
    x, h0, w_ih, w_hh = _shapes("gru", 5, 3, 40)
    plan = lt.plan("gru", x, h0, w_ih, w_hh=w_hh, engine="streamed", tile=(32, 16), target="sm_80")
    assert (plan.engine, plan.device.name, plan.spec.bias, plan.T, plan.B, plan.H) == (
        "streamed",
        "A100",
        False,
        5,
        3,
        40,
    )
    assert (plan.backward.block_b, plan.backward.block_h, plan.backward.n_h) == (32, 16, 3)
    with pytest.raises(TypeError, match="w_hh"):
        lt.plan("gru", x, h0, w_ih, target="H200")
    with pytest.raises(ValueError, match="cell must be one of 'lstm'"):
        lt.plan("mgu", x, h0, w_ih, w_hh)
    with pytest.raises(ValueError, match=r"target must be one of A100.*got 'TPU'"):
        lt.plan("gru", x, h0, w_ih, w_hh, target="TPU")
    with pytest.raises(ValueError, match="name a target"):
        lt.plan("gru", x, h0, w_ih, w_hh)
    with pytest.raises(TypeError, match="reset_after must be True or False"):
        lt.plan("gru", x, h0, w_ih, w_hh, reset_after=1, target="H200")


@pytest.mark.both
def test_impossible_plans_say_why() -> None:
    spec, h200 = CellSpec("lstm"), devices()["H200"]
    with pytest.raises(ValueError, match=r"engine='resident' cannot run lstm with B=16, H=4096 on H200.*KiB.*on chip"):
        make_plan(spec, 9, 16, 4096, torch.bfloat16, h200, engine="resident")
    with pytest.raises(ValueError, match="raise block_h"):
        make_plan(spec, 9, 16, 1000, torch.bfloat16, h200, engine="local", tile=(16, 16))
    with pytest.raises(ValueError, match=r"fp32 products are scalar.*TF32"):
        make_plan(spec, 9, 16, 512, torch.float32, h200, engine="resident", precision="ieee")
    with pytest.raises(ValueError, match=r"a group is \d+ programs, and only \d+ surely run at once"):
        make_plan(spec, 9, 16, 4096, torch.bfloat16, h200, engine="streamed", tile=(16, 8))


@pytest.mark.both
def test_more_steps_than_can_be_counted() -> None:
    spec, h200 = CellSpec("lstm"), devices()["H200"]
    with pytest.raises(ValueError, match="cannot be counted"):
        make_plan(spec, 1 << 21, 1, 512, torch.float16, h200, engine="resident")
    assert make_plan(spec, 1 << 20, 1, 512, torch.float16, h200).engine == "resident"
    assert make_plan(spec, 1 << 21, 1, 512, torch.float16, h200).engine in ("local", "step")


@pytest.mark.both
def test_tile_as_a_list() -> None:
    tensors = _shapes("lstm", 5, 3, 40)
    plans = [lt.plan("lstm", *tensors, target="H200", engine="step", tile=tile) for tile in ([16, 16], (16, 16))]
    assert plans[0] == plans[1]


@pytest.mark.both
def test_devices_are_found_by_name() -> None:
    assert set(devices()) == {"A100", "H100", "H200", "L4", "RTX 4090", "B200"}
    assert device_named("NVIDIA H200") is devices()["H200"]
    assert device_named("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert device_named("rtx_4090").name == "RTX 4090"
    for stranger in ("NVIDIA RTX A1000", "NVIDIA L40S", "H2000"):
        with pytest.raises(ValueError, match="target must be one of"):
            device_named(stranger)
    with pytest.raises(TypeError, match="target must be the name of a GPU, got int"):
        device_named(90)
    assert [device_named(f"sm_{n}").capability for n in (80, 89, 90, 100)] == [80, 89, 90, 100]
    unknown = device_like("NVIDIA A10", 86, 72, 101376, 102400)
    assert (unknown.name, unknown.sms, unknown.shared_per_program) == ("NVIDIA A10", 72, 101376)
    assert not unknown.fp64_matrix_products
    assert make_plan(CellSpec("lstm"), 9, 16, 512, torch.float16, unknown).forward.grid <= 72 * 8


@pytest.mark.both
@pytest.mark.parametrize("engine", ENGINES)
def test_a_named_engine_is_honoured(engine: str) -> None:
    plan = make_plan(CellSpec("gru"), 9, 4, 64, torch.float16, devices()["A100"], engine=engine)
    assert plan.forward.engine == plan.backward.engine == engine


def test_interpreted_tensors_plan_for_the_interpreter() -> None:
    plan = lt.plan("lstm", *problem("lstm", 5, 3, 40))
    assert (plan.engine, plan.device.name) == ("step", "interpreter")
    assert lt.plan("lstm", *problem("lstm", 5, 3, 40), engine="resident", tile=(16, 16)).forward.n_h == 3
