"""Run by test_side_environments in a process of its own, with another Triton first on the path.

python side_environment.py compile      ahead of time, for three GPUs; prints Triton's version
python side_environment.py interpret    numerics of the interpreted kernels; wants TRITON_INTERPRET=1
"""

from __future__ import annotations

import sys

import torch
import triton

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
SHAPE = {"local": 64, "resident": 512, "streamed": 512, "step": 256}


def compile_plans() -> None:
    for cell, device, dtype, engine in PLANS:
        plan = planner.make_plan(CellSpec(cell), 32, 16, SHAPE[engine], dtype, devices.devices()[device], engine=engine)
        for direction in ("forward", "backward"):
            kernel = launch.compile_ahead(plan, direction)
            assert kernel.asm["cubin"], plan.label
            capability = plan.device.capability
            assert f".target sm_{capability}" in kernel.asm["ptx"], plan.label


def interpret() -> None:
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
