"""Reading NVIDIA machine code: registers, stack and the instruction mix inside the time loop.

The counts are static: each instruction of the loop once, those of nested loops (over K, and the spin) included and not
multiplied by their trips. They rank two ways of writing one step; they are not a cycle count.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .flow import Instruction, loops, reachable

#: Classes of instructions in the table, by the opcode's first part. MMA is every tensor core instruction (HMMA, DMMA,
#: HGMMA, UTCHMMA, ...); LDG includes the asynchronous copies from global to shared memory.
MIX = {
    "BAR": re.compile(r"BAR$"),
    "SHFL": re.compile(r"SHFL$"),
    "LDS": re.compile(r"LDS$"),
    "LDSM": re.compile(r"LDSM$"),
    "MMA": re.compile(r".*MMA$"),
    "LDG": re.compile(r"LDG(STS)?$"),
    "STG": re.compile(r"STG$"),
    "ATOM": re.compile(r"(ATOM|RED)G?$"),
    "MUFU": re.compile(r"MUFU$"),
}

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_USAGE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Code:
    """What the disassembler says of one kernel."""

    registers: int
    stack_bytes: int
    in_time_loop: bool
    counts: dict[str, int]


@cache
def tool(name: str) -> str:
    """Path of a CUDA binary tool that Triton's package carries ("cuobjdump" or "nvdisasm")."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"this Triton ({triton.__version__}) carries no {name}")
    return str(path)


def read_cubin(cubin: bytes) -> Code:
    """Disassemble one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = [
            subprocess.run([tool("cuobjdump"), what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        ]
    return read_listing(*listing)


def read_listing(usage: str, sass: str) -> Code:
    """The same from the tool's two texts, `cuobjdump -res-usage` and `cuobjdump -sass`."""
    found = {name: int(value) for name, value in _USAGE.findall(usage)}
    if "REG" not in found:
        raise ValueError("no register count in cuobjdump's report")
    instructions, successors = parse(sass)
    loop = time_loop(instructions, successors)
    return Code(found["REG"], found["STACK"], bool(loop), mix(instructions, loop or range(len(instructions))))


def parse(sass: str) -> tuple[list[Instruction], list[list[int]]]:
    """Instructions of a listing and, for each, the indices of those that may follow it."""
    instructions: list[Instruction] = []
    at: dict[int, int] = {}
    for number, text in enumerate(sass.splitlines(), 1):
        if match := _LINE.match(text):
            address, predicate, opcode, operands = match.groups()
            at[int(address, 16)] = len(instructions)
            instructions.append(Instruction(opcode, operands.strip(), predicate or "", number))
    if not instructions:
        raise ValueError("no SASS instruction in the listing")
    successors: list[list[int]] = []
    for i, one in enumerate(instructions):
        name = one.opcode.split(".")[0]
        following = [i + 1] if i + 1 < len(instructions) else []
        if name in ("BRA", "JMP", "CALL"):
            target = at.get(_target(one))
            conditional = name == "CALL" or one.predicate or _branch_predicate(one)
            following = (following if conditional else []) + ([] if target is None else [target])
        elif name in ("EXIT", "RET", "BPT", "KILL") and not one.predicate:
            following = []
        successors.append(following)
    return instructions, successors


def time_loop(instructions: list[Instruction], successors: list[list[int]]) -> set[int]:
    """The loop over time: the one that publishes if programs wait for one another, else the largest.

    Subroutines that it calls (double precision division) belong to it. Empty where the kernel has no loop.
    """
    found = loops(successors)
    if not found:
        return set()
    synchronised = [loop for loop in found if any(MIX["ATOM"].match(_class(instructions[i])) for i in loop)]
    loop = (synchronised or found)[0]
    for target in [successors[i][-1] for i in loop if _class(instructions[i]) == "CALL"]:
        called = reachable(successors, [target])
        # ptxas also writes CALL for a jump out of the loop, to code that never returns.
        if any(_class(instructions[i]) == "RET" for i in called):
            loop = loop | called
    return loop


def mix(instructions: list[Instruction], which: set[int] | range) -> dict[str, int]:
    """How many instructions there are of each class, and in all."""
    classes = Counter(_class(instructions[i]) for i in which if _class(instructions[i]) != "NOP")
    counts = {"all": sum(classes.values())}
    for name, pattern in MIX.items():
        counts[name] = sum(count for opcode, count in classes.items() if pattern.match(opcode))
    return counts


def _class(instruction: Instruction) -> str:
    return instruction.opcode.split(".")[0]


def _target(instruction: Instruction) -> int:
    addresses = re.findall(r"0x([0-9a-f]+)", instruction.operands)
    return int(addresses[-1], 16) if addresses else -1


def _branch_predicate(instruction: Instruction) -> bool:
    """Whether a branch without a guard still has a condition among its operands: `BRA.U !UP0, 0x10`, `BRA P2, 0x10`."""
    return bool(re.match(r"[!~]?U?[PR]\w+\s*,", instruction.operands))
