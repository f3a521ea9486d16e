"""One schedule on a GPU: compiled, right, and how fast. What the search in tune.py decides by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lstm_triton import constexprs, launch, tuning
from lstm_triton.devices import Device
from lstm_triton.planner import KernelProblem, make_plan
from lstm_triton.plans import KernelPlan, LaunchPlan
from lstm_triton.spec import CellSpec

from .cases import DTYPES
from .numerics import alive
from .precompile import compile_kernel, pool
from .problems import Problem, check_engine
from .table import short
from .timing import Timing, clock_for, race

#: Steps of a timed run, and of one that is checked against float64 on the CPU.
SEQ, CHECKED_SEQ = 512, 6
SCHEDULE = ("engine", "block_b", "block_h", "block_k", "split_k", "ahead", "stages", "num_warps")


@dataclass(frozen=True)
class Result:
    """What became of one schedule: microseconds a step, or why there are none."""

    status: str
    us: float = math.inf
    p20: float = math.inf
    p80: float = math.inf
    detail: str = ""


@dataclass(frozen=True)
class Task:
    """One problem of the list, as the command line names it."""

    cell: str
    direction: str
    dtype: str
    hidden: int
    batch: int

    def problem(self, device: Device) -> KernelProblem:
        """The planner's view of it."""
        exact = "ieee" if self.dtype in ("fp32", "fp64") else "tf32"
        dtype = DTYPES[self.dtype]
        return KernelProblem(CellSpec(self.cell), self.direction, self.batch, self.hidden, dtype, device, exact, True)

    def __str__(self) -> str:
        return f"{self.cell} {self.direction} {self.dtype} H={self.hidden} B={self.batch}"


def choice_of(plan: KernelPlan) -> tuning.Choice:
    """A plan as an entry of a table, so that the package's own way of planning runs it."""
    return tuning.Choice(**{name: getattr(plan, name) for name in SCHEDULE}, us_per_step=1.0, model_us=1.0)


class Trial:
    """Compiles schedules on all cores, checks each against float64, times those that are right side by side."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._stack = ExitStack()

    def __enter__(self) -> Trial:
        self._processes = self._stack.enter_context(pool())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(
        self, task: Task, problem: KernelProblem, plans: Sequence[KernelPlan], longer: float
    ) -> dict[KernelPlan, Result]:
        """What became of each plan; `longer` is how many times as long as usual to measure."""
        launches = [launch_plan(problem, plan) for plan in plans]
        list(self._processes.map(compile_kernel, [(found, task.direction, True) for found in launches]))
        results: dict[KernelPlan, Result] = {}
        runs: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
        data = None
        for i, (plan, found) in enumerate(zip(plans, launches, strict=True)):
            try:
                detail = wrong(task, problem, plan)
                results[plan] = Result("failed", detail=detail)
                if not detail:
                    data = data or Data(task, found)
                    runs[str(i)] = data.run(found)
            except OutOfResources as error:
                results[plan] = Result("refused", detail=short(error))
            except Exception as error:
                if not alive("cuda"):
                    raise
                results[plan] = Result("error", detail=short(error))
        for name, found in self._race(runs, longer).items():
            if isinstance(found, Exception):
                results[plans[int(name)]] = Result("error", detail=short(found))
            else:
                us = (ms * 1e3 / SEQ for ms in (found["cold"].median_ms, found["cold"].p20_ms, found["cold"].p80_ms))
                results[plans[int(name)]] = Result("ok", *us)
        return results

    def _race(
        self, runs: dict[str, Callable[[], tuple[Tensor, ...]]], longer: float
    ) -> dict[str, dict[str, Timing] | Exception]:
        """Time side by side; a wait that ran out is that schedule's, and what it leaves must be numbers."""

        def check(name: str) -> None:
            launch.raise_timeout(torch.device("cuda", torch.cuda.current_device()))

        if not runs:
            return {}
        found = race(runs, clock_for("cuda"), self.seconds * longer, ("cold",), check=check)
        for name, run in runs.items():
            if isinstance(found[name], dict) and not run()[0].isfinite().all():
                found[name] = ValueError("its results are not finite after it was timed")
        return found


def launch_plan(problem: KernelProblem, plan: KernelPlan) -> LaunchPlan:
    """The plan with this schedule for its direction, and the planner's for the other."""
    p = problem
    with tuning.using({p.key: choice_of(plan)}):
        found = make_plan(p.spec, SEQ, p.B, p.H, p.dtype, p.device, precision=p.precision)
    if replace(getattr(found, p.direction), measured_us=None) != plan:
        raise ValueError(f"the planner makes {found.label} of a schedule that was to be tried: {plan}")
    return found


def wrong(task: Task, problem: KernelProblem, plan: KernelPlan, device: str = "cuda") -> str:
    """What is wrong with a schedule's results, through the functions that users call; empty if nothing is."""
    asked = Problem(problem.spec, "auto", task.dtype, CHECKED_SEQ, task.batch, task.hidden, 16)
    with tuning.using({problem.key: choice_of(plan)}):
        check = check_engine(asked, device, repeat=False)
    return "" if check.passed else check.detail


class Data:
    """A problem's tensors, shared by all of its schedules."""

    def __init__(self, task: Task, plan: LaunchPlan, device: str = "cuda", seq: int = SEQ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.spec, self.direction, dtype, B, H = plan.spec, task.direction, plan.dtype, plan.B, plan.H

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

        rows = self.spec.gates * H
        self.w_hh, self.b_hh = normal(rows, H, scale=H**-0.5), normal(rows, scale=H**-0.5)
        self.h0, self.dy = normal(B, H), normal(seq, B, H)
        self.c0 = normal(B, H) if self.spec.cell == "lstm" else None
        self.gates = normal(seq, B, rows)
        forward = self._forward(plan)
        self.y, self.extra, self.zeros = forward.h, forward.extra, torch.zeros_like(forward.state)

    def run(self, plan: LaunchPlan) -> Callable[[], tuple[Tensor, ...]]:
        """The kernel alone, once over the whole sequence. Forward finds the gates as its last run left them."""
        return partial(self._forward if self.direction == "forward" else self._backward, plan)

    def _forward(self, plan: LaunchPlan) -> launch.Forward:
        return launch.forward(
            plan, self.gates, self.w_hh, self.b_hh, self.h0, self.c0, reverse=False, training=True
        )  # fmt: skip

    def _backward(self, plan: LaunchPlan) -> launch.Backward:
        saves_gates, saves_extra = constexprs.saves(self.spec)
        states = (self.y, self.h0) if self.c0 is None else (self.extra, self.c0)
        saved = self.gates if saves_gates else None, *states, self.extra if saves_extra else None
        return launch.backward(
            plan, self.dy, self.zeros.clone(), self.zeros.clone(), None, *saved, self.w_hh, reverse=False
        )  # fmt: skip
