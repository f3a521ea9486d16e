"""Reading NVIDIA machine code: registers, stack, and the instructions that one time step makes a warp execute."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .flow import Instruction, loops, once_through, reachable, way

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
#: The lower half of an encoding ends the instruction's line, the upper half has the next line to itself.
_UPPER = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_USAGE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")
_PUBLISH = re.compile(r"(ATOM|RED)G?\b")


@dataclass
class Code:
    """What the disassembler says of one kernel."""

    registers: int
    stack_bytes: int
    instructions: list[Instruction]
    successors: list[list[int]]  # subroutines apart
    calls: dict[int, int] = field(default_factory=dict)  # where each call of a subroutine goes
    loop: set[int] = field(default_factory=set)  # over time; empty where the kernel has no loop

    def step(self, trips: Callable[[set[int]], int], launched: bool = False) -> list[int]:
        """The instructions of one time step, in order, loops as often as `trips` says.

        The longest way round the time loop that meets no call of a subroutine, unless none is without: subroutines are
        for what is rare (double precision division by a denormal number), jumps out of the loop for what ends it.
        launched: a kernel launched once a step, so that all of it belongs to the step.
        """
        if self.loop and not launched:
            main = once_through(self.successors, self.loop, trips, self.calls)
        else:
            everything = range(len(self.instructions))
            ends = {i for i in everything if not self.successors[i]}
            main = way(
                self.successors, everything, 0, ends, lambda loop: 1 if loop == self.loop else trips(loop), self.calls
            )
        return [i for one in main for i in (one, *self._subroutine(one, trips))]

    def _subroutine(self, call: int, trips: Callable[[set[int]], int]) -> list[int]:
        if call not in self.calls:
            return []
        body = reachable(self.successors, [self.calls[call]])
        returns = {i for i in body if name(self.instructions[i]) == "RET"}
        return way(self.successors, sorted(body), self.calls[call], returns, trips)


@cache
def tool(program: str) -> str:
    """Path of a CUDA binary tool that Triton's package carries ("cuobjdump" or "nvdisasm")."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / program
    if not path.exists():
        raise FileNotFoundError(f"this Triton ({triton.__version__}) carries no {program}")
    return str(path)


def read_cubin(cubin: bytes) -> Code:
    """Disassemble one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", "-sass", file.name]
        return read_listing(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read_listing(sass: str) -> Code:
    """The same from the tool's text, `cuobjdump -res-usage -sass`."""
    found = {what: int(value) for what, value in _USAGE.findall(sass)}
    if "REG" not in found:
        raise ValueError("no register count in cuobjdump's report")
    code = Code(found["REG"], found["STACK"], *parse(sass))
    for i, one in enumerate(code.instructions):
        # ptxas also writes CALL for a jump out of a loop, to code that never returns.
        if name(one) == "CALL" and len(code.successors[i]) == 2 and _returns(code, code.successors[i][-1]):
            code.calls[i] = code.successors[i].pop()
    code.loop = _time_loop(code)
    return code


def parse(sass: str) -> tuple[list[Instruction], list[list[int]]]:
    """Instructions of a listing and, for each, the indices of those that may follow it; a call's target comes last."""
    instructions: list[Instruction] = []
    at: dict[int, int] = {}
    lines = sass.splitlines()
    for number, text in enumerate(lines, 1):
        if match := _LINE.match(text):
            address, predicate, opcode, operands = match.groups()
            at[int(address, 16)] = len(instructions)
            upper = _UPPER.match(lines[number]) if number < len(lines) else None
            control = int(upper[1], 16) if upper else None
            instructions.append(Instruction(opcode, operands.strip(), predicate or "", number, control))
    if not instructions:
        raise ValueError("no SASS instruction in the listing")
    successors: list[list[int]] = []
    for i, one in enumerate(instructions):
        following = [i + 1] if i + 1 < len(instructions) else []
        if name(one) in ("BRA", "JMP", "CALL"):
            target = at.get(_target(one))
            conditional = name(one) == "CALL" or one.predicate or _branch_predicate(one)
            following = (following if conditional else []) + ([] if target is None else [target])
        elif name(one) in ("EXIT", "RET", "BPT", "KILL") and not one.predicate:
            following = []
        successors.append(following)
    return instructions, successors


def name(instruction: Instruction) -> str:
    """The opcode's first part."""
    return instruction.opcode.split(".")[0]


def _time_loop(code: Code) -> set[int]:
    """The loop over time: the one that publishes if programs wait for one another, else the largest."""
    found = loops(code.successors)
    synchronised = [loop for loop in found if any(_PUBLISH.match(code.instructions[i].opcode) for i in loop)]
    return next(iter(synchronised or found), set())


def _returns(code: Code, target: int) -> bool:
    return any(name(code.instructions[i]) == "RET" for i in reachable(code.successors, [target]))


def _target(instruction: Instruction) -> int:
    addresses = re.findall(r"0x([0-9a-f]+)", instruction.operands)
    return int(addresses[-1], 16) if addresses else -1


def _branch_predicate(instruction: Instruction) -> bool:
    """Whether a branch without a guard still has a condition among its operands: `BRA.U !UP0, 0x10`, `BRA P2, 0x10`."""
    return bool(re.match(r"[!~]?U?[PR]\w+\s*,", instruction.operands))
