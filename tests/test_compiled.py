"""Every engine compiled ahead of time: no spill, within the target's memory, published and awaited in the right order.

Engines by name, with every cell, direction and target, and all dtypes; test_perf_baseline has what the planner chooses.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from lstm_triton.perf import resources, sass
from lstm_triton.perf.budget import CLASSES
from lstm_triton.perf.ptx import ptx_order

from lstm_triton.constexprs import options, parts
from lstm_triton.devices import devices
from lstm_triton.launch import compile_ahead
from lstm_triton.planner import ENGINES, LaunchPlan, make_plan
from lstm_triton.spec import OPTIONS, CellSpec

pytestmark = pytest.mark.native

TARGETS = ("A100", "H200", "B200")
CELLS = ("lstm", "gru", "rnn")
DTYPES = {
    "bf16": (torch.bfloat16, "tf32"),
    "fp16": (torch.float16, "tf32"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
    "fp64": (torch.float64, "ieee"),
}
#: Where each engine is at home, with a size that is no power of two among them.
SIZES = {
    "local": ((64, 16), (24, 3)),
    "resident": ((512, 16), (768, 64)),
    "streamed": ((1536, 64),),
    "step": ((200, 5),),
}


def engine_plans() -> list[LaunchPlan]:
    """Each engine, cell and target, the dtypes in turn."""
    plans = []
    dtypes = itertools.cycle(DTYPES)
    for engine in ENGINES:
        for cell, target, (H, B) in itertools.product(CELLS, TARGETS, SIZES[engine]):
            while True:
                dtype, precision = DTYPES[next(dtypes)]
                try:
                    plans.append(
                        make_plan(
                            CellSpec(cell), 64, B, H, dtype, devices()[target], engine=engine, precision=precision
                        )
                    )
                    break
                except ValueError:  # scalar products from chip alone have no plan: exact fp32, and fp64 on a B200
                    assert engine in ("local", "resident"), (engine, cell, target, H, dtype)
    return plans


PLANS = engine_plans()
KERNELS = {
    (direction, resources.identity(plan, getattr(plan, direction))): (plan, direction)
    for plan, direction in itertools.product(PLANS, ("forward", "backward"))
}


@pytest.mark.parametrize(
    ("plan", "direction"),
    KERNELS.values(),
    ids=lambda v: v if isinstance(v, str) else f"{v.device.name}-{v.spec.cell}-{v.dtype}-H{v.H}-B{v.B}-{v.label}",
)
def test_resources_and_order(plan: LaunchPlan, direction: str) -> None:
    (row,) = resources.compile_group([(plan, direction)])
    assert row.problems == ""
    assert row.spill_bytes == 0
    assert row.shared_bytes <= row.shared_plan <= plan.device.shared_per_program
    assert row.counted == ("launch" if row.engine == "step" else "time step")
    assert row.all == sum(getattr(row, kind) for kind in CLASSES) and row.OTHER == 0 and row.est_cycles > row.all
    if row.engine in ("resident", "streamed"):
        assert row.ATOM >= 1 and row.BAR >= 2
    if row.dtype != "fp32" and (row.dtype, row.target) != ("fp64", "B200"):
        assert row.MMA > 0


def test_the_subset_covers_everything() -> None:
    assert len(KERNELS) <= 120
    for direction in ("forward", "backward"):
        met = {
            (getattr(plan, direction).engine, plan.spec.cell, plan.device.name)
            for plan, d in KERNELS.values()
            if d == direction
        }
        assert met >= set(itertools.product(ENGINES, CELLS, TARGETS))
        dtypes = {(plan.dtype, plan.precision) for plan, d in KERNELS.values() if d == direction}
        assert len(dtypes) == len(DTYPES)


def test_lengths_and_batches_never_recompile() -> None:
    """T, B and what is derived from them are plain run-time numbers, and plans do not depend on T."""
    from lstm_triton.kernels.backward import sequence_backward
    from lstm_triton.kernels.forward import sequence_forward

    for kernel in (sequence_forward, sequence_backward):
        runtime = {p.name for p in kernel.params if p.do_not_specialize}
        assert runtime >= {"T", "B", "start", "chained", "first_group"}
        assert not {p.name for p in kernel.params if p.is_constexpr} & runtime
    one, other = (make_plan(CellSpec("lstm"), T, 16, 512, torch.bfloat16, devices()["H200"]) for T in (1, 5000))
    assert (one.forward, one.backward) == (other.forward, other.backward)
    small, large = (make_plan(CellSpec("lstm"), 9, B, 512, torch.bfloat16, devices()["H200"]) for B in (3, 14))
    assert resources.identity(small, small.forward) == resources.identity(large, large.forward)


#: What kernels do beyond the plain cell: cell, projected share of H, skipped steps, gradients by every cell state.
FORMS = (
    ("lstm", 0, True, True),
    ("gru", 0, True, False),
    ("rnn", 0, True, False),
    ("lstm", 1 / 2, False, False),
    ("lstm", 1 / 4, True, True),
)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_projections_and_skipped_steps(form: tuple[str, float, bool, bool], engine: str, direction: str) -> None:
    """On two targets of three, the dtypes in turn: no spill, within the plan's memory, every wait in its place."""
    cell, share, masked, cells = form
    H, B = SIZES[engine][0]
    half = "bf16", "fp16"
    dtypes = itertools.islice(itertools.cycle(half if engine == "local" else (*half, "tf32")), FORMS.index(form), None)
    targets = [target for target in TARGETS if target != TARGETS[FORMS.index(form) % len(TARGETS)]]
    for target, name in zip(targets, dtypes, strict=False):
        dtype, precision = DTYPES[name]
        spec = CellSpec(cell, proj=int(share * H))
        plan = make_plan(spec, 64, B, H, dtype, devices()[target], engine=engine, precision=precision)
        kernel = getattr(plan, direction)
        for part in range(2 if share and engine == "step" else 1):
            compiled = compile_ahead(plan, direction, masked=masked, cells=cells, part=part)
            assert sass.read_cubin(compiled.asm["cubin"]).stack_bytes == 0
            assert compiled.metadata.shared <= kernel.shared_bytes <= plan.device.shared_per_program
            if kernel.synchronised:
                published = resources.published(compiled, direction)
                assert len(published) == (2 if share else 1) and ptx_order(compiled.asm["ptx"], published) == []
                waits = compiled.asm["ptx"].count("ld.global.gpu.acquire") + compiled.asm["ptx"].count("ld.acquire")
                assert waits >= (4 if share else 2)  # each wait polls before its loop and in it


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("i", range(len(OPTIONS)), ids=lambda i: str(OPTIONS[i]))
def test_every_option_compiles(i: int, direction: str) -> None:
    """Engines, targets and the number of dropout masks in turn: no spill, within the plan's memory."""
    spec, engine = OPTIONS[i], ("resident", "local", "streamed", "step")[i % 4]
    H, B = {"local": (64, 16), "streamed": (1536, 64)}.get(engine, (512, 16))
    masks = (0, 1, spec.gates)[i % 3]
    plan = make_plan(spec, 64, B, H, torch.bfloat16, devices()[TARGETS[i % 3]], engine=engine, masks=masks)
    kernel = getattr(plan, direction)
    for part in range(len(parts(kernel, options(spec, masks, True)))):
        compiled = compile_ahead(plan, direction, masked=True, random=True, part=part)
        assert sass.read_cubin(compiled.asm["cubin"]).stack_bytes == 0
        assert compiled.metadata.shared <= kernel.shared_bytes <= plan.device.shared_per_program
