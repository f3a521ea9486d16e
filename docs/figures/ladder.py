"""The tables of docs/kernels.md: from an eager loop to one program, rung by rung, in numbers that need no GPU.

    TRITON_INTERPRET=0 python docs/figures/ladder.py    # writes them into the page; tests/test_kernels_page.py compares

Launches and traffic of the eager loops are counted as PyTorch dispatches them. Those of the engines follow from their
plans; instructions, registers and shared memory are read from the kernels, compiled for an H100 or as resources.csv
has them. `lstm_steps` is one LSTM layer's time loop without options: the product of its gates in each of three forms.
"""

# ruff: noqa: RUF005 - Triton's language has no unpacking into a tuple

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from lstm_triton.kernels.activations import sigmoid, tanh
from lstm_triton.kernels.product import sum_slices
from lstm_triton.kernels.sync import publish, wait
from lstm_triton.kernels.tiles import split_gates
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from lstm_triton.devices import device_named
from lstm_triton.planner import make_plan
from lstm_triton.plans import KernelPlan, LaunchPlan
from lstm_triton.spec import CellSpec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
RESOURCES = ROOT / "perf" / "results" / "resources" / "resources.csv"
#: The example of the page: an LSTM of H units, B rows, bfloat16, on an H100; and one small enough for a single program.
TARGET, B, H, SMALL = "H100", 16, 512, 64
#: The engines with an H; and those of them that the planner chooses there, so that resources.csv has them.
RUNGS = (("step", H), ("streamed", H), ("resident", H), ("resident", SMALL), ("local", SMALL))
COMMITTED = (("resident", H), ("local", SMALL))
#: How the product of the four gates can be written.
FORMS = ("four dots", "one dot", "one dot, K split")
#: What is read of a compiled kernel: instructions of one warp in one time step, and what the program takes.
COUNTED = ("all", "BAR", "MMA", "LDSM", "LDG", "STG", "MUFU", "registers", "shared_bytes")


@triton.jit(do_not_specialize=["T", "polls"])
def lstm_steps(
    gates_ptr,  # [T, B, 4*H] W_ih x + b
    w_hh_ptr,  # [4*H, H]
    h_ptr,  # [T + 1, B, H]: h[-1], which is given, then every h[t]
    counter_ptr,  # [1] zero
    T,
    polls,  # of a wait, at most
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,  # all rows of the batch
    BLOCK_H: tl.constexpr,
    FORM: tl.constexpr,
):
    """One group of programs, each with BLOCK_H hidden units and their weights on chip; c begins with zeros."""
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_b = tl.arange(0, BLOCK_B)[:, None]
    offs_k = tl.arange(0, H)
    offs_n = tl.arange(0, BLOCK_H * 4)  # unit-major, the gate fastest
    row = offs_n % 4 * H + tl.program_id(0) * BLOCK_H + offs_n // 4
    slices = tl.arange(0, 4)[:, None, None] * (H // 4)
    in_slice = tl.arange(0, H // 4)
    w = ()
    if FORM == "four dots":
        for gate in tl.static_range(4):
            w = w + (tl.load(w_hh_ptr + (gate * H + units)[None, :] * H + offs_k[:, None]),)
    elif FORM == "one dot":
        w = (tl.load(w_hh_ptr + row[None, :] * H + offs_k[:, None]),)
    else:
        w = (tl.load(w_hh_ptr + row[None, None, :] * H + slices + in_slice[None, :, None]),)

    c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    target = 0
    for _ in tl.range(0, T, num_stages=1):
        x = ()
        for gate in tl.static_range(4):
            x = x + (tl.load(gates_ptr + offs_b * (4 * H) + gate * H + units[None, :]).to(tl.float32),)
        wait(counter_ptr, target, polls)
        target += tl.num_programs(0)
        a = ()
        if FORM == "four dots":
            h = tl.load(h_ptr + offs_b * H + offs_k[None, :])
            for gate in tl.static_range(4):
                a = a + (tl.dot(h, w[gate]),)
        elif FORM == "one dot":
            h = tl.load(h_ptr + offs_b * H + offs_k[None, :])
            a = split_gates(tl.dot(h, w[0]), BLOCK_B, BLOCK_H, 4)
        else:
            h = tl.load(h_ptr + slices + tl.arange(0, BLOCK_B)[None, :, None] * H + in_slice[None, None, :])
            a = split_gates(sum_slices(tl.dot(h, w[0]), BLOCK_B, BLOCK_H * 4, 4), BLOCK_B, BLOCK_H, 4)
        i, f = sigmoid(x[0] + a[0]), sigmoid(x[1] + a[1])
        g, o = tanh(x[2] + a[2]), sigmoid(x[3] + a[3])
        c = f * c + i * g
        h_ptr += BLOCK_B * H
        tl.store(h_ptr + offs_b * H + units[None, :], (o * tanh(c)).to(h_ptr.dtype.element_ty))
        publish(counter_ptr)
        gates_ptr += BLOCK_B * 4 * H


def eager(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b: Tensor) -> Tensor:
    """h[T-1] of an LSTM layer; x [T, B, I], h and c [B, H], w_ih [4*H, I], w_hh [4*H, H], b [4*H]."""
    for x_t in x:
        i, f, g, o = (linear(x_t, w_ih, b) + linear(h, w_hh)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


def hoisted(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b: Tensor) -> Tensor:
    """The same with the input's product made for all steps at once."""
    for a_t in linear(x, w_ih, b):
        i, f, g, o = (a_t + linear(h, w_hh)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


class Dispatched(TorchDispatchMode):
    """Counts the operators that compute, each of which is at least one launch on a GPU, and the bytes they touch."""

    def __init__(self, weights: tuple[Tensor, ...] = ()):
        super().__init__()
        self.weights = {w.untyped_storage()._cdata for w in weights}
        self.launches = self.weight_bytes = self.other_bytes = 0

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = op(*args, **(kwargs or {}))
        operands = [a for a in args if isinstance(a, Tensor)]
        storages = {a.untyped_storage()._cdata for a in operands}
        results = [r for r in (result if isinstance(result, (tuple, list)) else (result,))]
        if not any(r.untyped_storage()._cdata in storages for r in results):  # else a view: nothing is computed
            self.launches += 1
            for tensor in (*operands, *results):
                if tensor.untyped_storage()._cdata in self.weights:
                    self.weight_bytes += tensor.nbytes
                else:
                    self.other_bytes += tensor.nbytes
        return result


def counted(loop: Callable[..., Tensor], steps: int) -> Dispatched:
    """What a loop does in `steps` steps of the page's example."""
    shapes = (steps, B, H), (B, H), (B, H), (4 * H, H), (4 * H, H), (4 * H,)
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with Dispatched(tuple(tensors[3:5])) as found, torch.no_grad():
        loop(*tensors)
    return found


def planned(engine: str, hidden: int) -> LaunchPlan:
    return make_plan(CellSpec("lstm"), 512, B, hidden, torch.bfloat16, device_named(TARGET), engine=engine)


def launches(plan: LaunchPlan) -> tuple[int, int]:
    """Of the forward kernel: launches for each step, and launches whatever the length."""
    from lstm_triton import constexprs

    kernel = plan.forward
    groups = -(-kernel.n_b // kernel.groups_at_once)
    once = groups * len(constexprs.parts(kernel, constexprs.options(plan.spec, plan.masks, False)))
    return (once, 0) if kernel.engine == "step" else (0, once)


def traffic(plan: LaunchPlan, kernel: KernelPlan) -> tuple[int, int, int]:
    """Bytes of one time step, over all programs, in training: of W_hh, of the group's rows, of what a program owns.

    The rows are those of h[t-1], or backward of the gate gradients. A unit's own: forward, its four gates in and out,
    h and c; backward, dy, four gates, c[t-1] in and four gradients out. H and B are whole tiles here.
    """
    size, gates = plan.dtype.itemsize, plan.spec.gates
    depth = plan.H if kernel.direction == "forward" else gates * plan.H
    programs = kernel.n_b * kernel.n_h
    columns = kernel.block_h * kernel.tiles * (gates if kernel.direction == "forward" else 1)
    weights = 0 if kernel.resident else programs * depth * columns * size
    rows = 0 if kernel.engine == "local" else programs * kernel.block_b * depth * size
    own = (2 * gates + 2) * size + (
        2 * 4 if kernel.engine == "step" else 0
    )  # between two launches c is in memory, fp32
    return weights, rows, own * plan.B * plan.H


def compiled(plan: LaunchPlan) -> dict[str, int]:
    from lstm_triton.perf import resources

    from lstm_triton.launch import compile_ahead

    row = resources.inspect(compile_ahead(plan, "forward"), plan, "forward")
    if row.problems:
        raise ValueError(row.problems)
    return {name: getattr(row, name) for name in COUNTED}


def committed(hidden: int, direction: str, engine: str) -> dict[str, int]:
    """A row of resources.csv; ValueError where it is of another engine."""
    wanted = {"target": TARGET, "cell": "lstm", "direction": direction, "dtype": "bf16", "batch": str(B)}
    wanted |= {"hidden": str(hidden), "engine": engine}
    with RESOURCES.open(newline="") as file:
        for row in csv.DictReader(file):
            if wanted.items() <= row.items():
                return {name: int(row[name]) for name in COUNTED}
    raise ValueError(f"{RESOURCES.name} has no row {wanted}")


def forms() -> dict[str, dict[str, int]]:
    """`lstm_steps` compiled in each of its forms."""
    from lstm_triton.perf import sass
    from lstm_triton.perf.budget import budget

    from lstm_triton.launch import compile_kernel

    types = dict.fromkeys(("gates_ptr", "w_hh_ptr", "h_ptr"), "bf16") | {"counter_ptr": "i32"}
    kernel, capability = planned("resident", H).forward, device_named(TARGET).capability
    found = {}
    for form in FORMS:
        constants = {"H": H, "BLOCK_B": kernel.block_b, "BLOCK_H": kernel.block_h, "FORM": form}
        options = {"num_warps": kernel.num_warps, "maxnreg": 255}
        made = compile_kernel(lstm_steps, types, constants, capability, options)
        code = sass.read_cubin(made.asm["cubin"])
        step = budget(
            code, launched=False, k_tiles=1, products_per_tile=0, warps=kernel.num_warps, capability=capability
        )
        took = {"registers": code.registers, "shared_bytes": made.metadata.shared}
        found[form] = {name: {**step.counts, **took}[name] for name in COUNTED}
    return found


def markdown(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def kib(count: float) -> str:
    return f"{count / 1024:g}"


def steps_table() -> str:
    """Each rung by its launches, waits, and traffic of a step."""
    rows = []
    for name, loop in (("eager loop", eager), ("input product hoisted", hoisted)):
        short, long = counted(loop, 2), counted(loop, 4)
        a_step = (long.launches - short.launches) // 2
        once = short.launches - 2 * a_step
        weights, others = (long.weight_bytes - short.weight_bytes) / 2, (long.other_bytes - short.other_bytes) / 2
        rows.append([name, H, f"{a_step} T" + f" + {once}" * (once > 0), "", kib(weights), "", kib(others)])
    for engine, hidden in RUNGS:
        plan = planned(engine, hidden)
        a_step, once = launches(plan)
        weights, read, own = traffic(plan, plan.forward)
        own += 5 * B * hidden * plan.dtype.itemsize  # the input's product: x in, which is H wide here, gates out
        total = "T + 1" if a_step == 1 else f"{a_step} T + 1" if a_step else f"{once + 1}"
        waits = plan.spec.waits if plan.forward.synchronised else 0
        rows.append([f"`{engine}`", hidden, total, waits, kib(weights), kib(read), kib(own)])
    moved = [f"{what}, KiB a step" for what in ("weights", "rows of h", "other")]
    head = ["rung", "H", "launches, T steps", "waits a step", *moved]
    return markdown(head, rows)


def code_table() -> str:
    """The engines' kernels: instructions of a warp and step, and what a program takes."""
    head = ["kernel", "H", "programs", *COUNTED[:-2], "registers", "shared, KiB"]
    rows = []
    for direction in ("forward", "backward"):
        for engine, hidden in RUNGS:
            kernel = getattr(planned(engine, hidden), direction)
            if (engine, hidden) in COMMITTED:
                counts = committed(hidden, direction, engine)
            elif direction == "forward":
                counts = compiled(planned(engine, hidden))
            else:
                continue
            counts["shared_bytes"] = kib(counts["shared_bytes"])
            rows.append([f"{direction}, `{engine}`", hidden, kernel.grid, *counts.values()])
    return markdown(head, rows)


def forms_table() -> str:
    """The gate product's forms."""
    rows = [[form, *counts.values()] for form, counts in forms().items()]
    for row in rows:
        row[-1] = kib(row[-1])
    return markdown(["product", *COUNTED[:-2], "registers", "shared, KiB"], rows)


def main() -> None:
    """Renew each table of the page, found by its first line."""
    text = PAGE.read_text()
    for table in (steps_table(), forms_table(), code_table()):
        head = table.splitlines(keepends=True)[0]
        before, found, after = text.partition(head)
        if not found:
            raise ValueError(f"{PAGE.name} has no table that begins {head!r}")
        text = before + table + "\n" + after.partition("\n\n")[2]
        print(table)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
