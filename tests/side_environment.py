"""Run by test_side_environments in a process of its own, with another Triton first on the path.

python side_environment.py compile      ahead of time, for three GPUs, and as a launch does; prints Triton's version
python side_environment.py interpret    numerics of the interpreted kernels; wants TRITON_INTERPRET=1
"""

from __future__ import annotations

import sys

import torch
import triton
from cell_problems import CellProblem
from launch_rehearsal import rehearse
from lstm_triton.perf.interpreting import take_shortcuts

import lstm_triton as lt
from lstm_triton import devices, launch, planner
from lstm_triton.spec import CellSpec

# cell, device, dtype, engine: every cell, engine, dtype and target once at least
PLANS = [
    ("lstm", "H200", torch.bfloat16, "resident"),
    ("lstm", "A100", torch.float32, "streamed"),
    ("gru", "B200", torch.float16, "resident"),
    ("rnn", "H200", torch.float16, "local"),
    ("gru", "A100", torch.bfloat16, "step"),
]
#: Cells whose options reach the farthest, engines in turn.
OPTIONS = [
    ("lstm peephole=True cell_clip=3.0 gate_clip=5.0 layer_norm=True zoneout=(0.1,0.2)", "local"),
    (
        "gru activation=('elu',0.7,0.0) recurrent_activation=hard_sigmoid reset_after=False zoneout=(0.1,0.0)",
        "resident",
    ),
    ("lstm activation=softplus coupled=True proj=5", "streamed"),
]
SHAPE = {"local": 64, "resident": 512, "streamed": 512, "step": 256}


def compile_plans() -> None:
    for cell, device, dtype, engine in PLANS:
        plan = planner.make_plan(CellSpec(cell), 32, 16, SHAPE[engine], dtype, devices.devices()[device], engine=engine)
        for direction in ("forward", "backward"):
            kernel = launch.compile_ahead(plan, direction)
            assert kernel.asm["cubin"], plan.label
            capability = plan.device.capability
            assert f".target sm_{capability}" in kernel.asm["ptx"], plan.label

    for text, engine in OPTIONS:
        plan = planner.make_plan(
            CellSpec.parse(text), 32, 16, SHAPE[engine], torch.bfloat16, devices.devices()["H200"],
            engine=engine, masks=1,
        )  # fmt: skip
        for direction in ("forward", "backward"):
            assert launch.compile_ahead(plan, direction, masked=True, random=True).asm["cubin"], text

    rehearse([(CellSpec("gru"), 0), (CellSpec.parse(OPTIONS[1][0]), 1)])


def interpret_options() -> None:
    for text, _ in OPTIONS:
        spec = CellSpec.parse(text)
        problem = CellProblem(spec, H=7, masks=spec.gates, skips=True, seed=3, dtype=torch.float64)
        for engine in ("step", "local"):
            errors = problem.errors(engine=engine)
            assert max(errors.values()) < 1e-12, (text, engine, errors)


def interpret() -> None:
    take_shortcuts()
    interpret_options()
    for cell, gates, states in (("lstm", 4, 2), ("gru", 3, 1), ("rnn", 1, 1)):
        torch.manual_seed(0)
        steps, batch, inputs, hidden = 4, 3, 3, 7
        shapes = [(steps, batch, inputs)] + [(batch, hidden)] * states
        shapes += [(gates * hidden, inputs), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,)]
        exact = [torch.randn(shape, dtype=torch.float64).mul_(0.5).requires_grad_() for shape in shapes]
        single = [t.detach().float().requires_grad_() for t in exact]
        for engine in ("step", "local"):
            found = getattr(lt.functional, cell)(*single, engine=engine)
            expected = getattr(lt.reference, cell)(*exact)
            cotangents = [torch.randn_like(t) for t in expected]
            found += torch.autograd.grad(found, single, [t.float() for t in cotangents])
            expected += torch.autograd.grad(expected, exact, cotangents)
            for mine, other in zip(found, expected, strict=True):
                error = (mine.double() - other).norm() / other.norm()
                assert error < 1e-6, f"{cell} {engine}: {error:.2e}"


if __name__ == "__main__":
    {"compile": compile_plans, "interpret": interpret}[sys.argv[1]]()
    print(triton.__version__)
