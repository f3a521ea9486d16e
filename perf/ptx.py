"""The order of publish and wait in compiled PTX, on every path that control can take.

Programs that wait for one another are correct only if the compiler left this order alone, in every part of every step:

    publish   last store of what others read -> bar.sync -> release (which is one thread's; the stores are every warp's)
    wait      acquire -> bar.sync -> first load of it; no such load above the wait
    count     publish and wait take turns: who waits for a count knows how often the others have published

A step may have several parts, each with tensors of its own that are stored, published, waited for and loaded. So each
published tensor has a phase of its own: how far it is on the way from its store to its load. Blocks of PTX lie in any
order, so text order proves nothing: abstract states, the phases of all, run along the control flow graph until nothing
new turns up, and each release and load is judged in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .flow import Instruction, loops, nested

_LABEL = re.compile(r"^(\$?[\w$.]+):")
_STATEMENT = re.compile(r"^(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_REGISTER = re.compile(r"%[a-z]+\d+")
_PARAMETER = re.compile(r"\[\w+_param_(\d+)")
_TENSOR = re.compile(r"(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.")
_SCALAR = re.compile(r"fma\.rn\.f(32|64)")
_POINTER = re.compile(r"\.param \.u64 \.ptr \.global[^,)]* \w+_param_(\d+)")


@dataclass
class Kernel:
    """The body of one PTX entry: instructions, what may follow each, and which pointers each address may come from."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[list[int]] = field(default_factory=list)
    pointers: list[frozenset[int]] = field(default_factory=list)
    parameters: set[int] = field(default_factory=set)  # which are pointers


#: Phases of a published tensor on its way from a program's store to the others' load. READY is also where it begins:
#: before the first store nothing is owed.
STORED, BARRED, RELEASED, ACQUIRED, READY = range(5)


@dataclass(frozen=True)
class State:
    """What is known at one point of one path."""

    phases: tuple[int, ...]  # of each published tensor
    waited: bool = True  # since the last release


@dataclass(frozen=True)
class Role:
    """What one instruction does, "" if nothing of the order above, and to which of the published tensors."""

    name: str = ""
    tensors: frozenset[int] = frozenset()  # their places among the published


def ptx_order(
    ptx: str,
    published: Collection[int] | None = None,
    own: Collection[int] | None = None,
    names: Mapping[int, str] | None = None,
) -> list[str]:
    """Violations of the order above in a kernel whose programs wait for one another; empty if there are none.

    ptx: the text of one kernel.
    published: indices, among the PTX parameters, of the pointers to what programs publish to one another. By default
        all that the kernel both stores to and loads from.
    own: if given, those that it stores to and loads from, each program its own part alone. Any other such pointer is a
        violation: it might be read by others, and nobody looked.
    names: of the parameters, for the violations.

    A kernel where an expected part is missing (no acquire, no release, of some tensor no store or no load) is a
    violation too.
    """
    kernel = parse(ptx)
    both = _stored_and_loaded(kernel)
    shared = sorted(both - set(own or ()) if published is None else published)
    called = [(names or {}).get(index, f"parameter {index}") for index in shared]
    roles = [_role(one, pointers, shared) for one, pointers in zip(kernel.instructions, kernel.pointers, strict=True)]
    missing = [f"no {name} found" for name in ("acquire", "release") if name not in {role.name for role in roles}]
    for i, name in enumerate(called):
        there = {role.name for role in roles if i in role.tensors}
        missing += [f"no {access} of {name} found" for access in ("store", "load") if access not in there]
    for index in sorted(both - set(shared) - set(both if own is None else own)):
        name = (names or {}).get(index, f"parameter {index}")
        missing.append(f"{name} is stored and loaded, and said to be neither published nor each program's own")
    if missing or not shared:
        return missing or ["nothing is published"]
    publishing = {"store", "release"}
    loop = next((loop for loop in loops(kernel.successors) if publishing <= {roles[i].name for i in loop}), None)
    if loop is None:
        return ["no time loop that stores and releases"]

    problems: set[tuple[int, str]] = set()
    for i, states in enumerate(_states(kernel, roles, len(shared))):
        for state in states:
            problems |= {(kernel.instructions[i].line, text) for text in _judge(state, roles[i], i in loop, called)}
        if roles[i].name == "load" and i not in loop and _origins(kernel, i) & set(shared):
            problems.add((kernel.instructions[i].line, "load of published data outside the time loop"))
    return [f"PTX line {line}: {text}" for line, text in sorted(problems)]


def _judge(state: State, role: Role, in_loop: bool, called: Sequence[str]) -> Iterator[str]:
    """What is wrong with an instruction that is met in a state."""
    if role.name == "release":
        for phase, name in zip(state.phases, called, strict=True):
            if phase == STORED:
                yield f"release without a barrier after the last store of {name}"
        if in_loop and not {STORED, BARRED} & set(state.phases):
            yield "release before this part's store"
        if in_loop and not state.waited:
            yield "release without a wait since the last one"
    if role.name == "load":
        for i in sorted(role.tensors):
            if state.phases[i] < ACQUIRED:
                yield f"load of {called[i]}, which is published, above the wait"
            elif state.phases[i] == ACQUIRED:
                yield f"load of {called[i]}, which is published, without a barrier after the acquire"


def products_per_tile(ptx: str) -> int:
    """Product instructions in the loop over K tiles inside the time loop, of which a trip is one tile; 0 without one.

    Tensor core instructions or, where that loop has none, scalar multiply-adds, packed pairs as two.
    """
    kernel = parse(ptx)
    for time_loop in loops(kernel.successors)[:1]:
        for loop in nested(kernel.successors, time_loop):
            opcodes = [kernel.instructions[i].opcode for i in loop]
            found = sum(bool(_TENSOR.match(opcode)) for opcode in opcodes)
            found = found or sum(2 if opcode.endswith("x2") else 1 for opcode in opcodes if _SCALAR.match(opcode))
            if found:
                return found
    return 0


def parse(ptx: str) -> Kernel:
    """Read the entry of a PTX module."""
    kernel = Kernel()
    labels: dict[tuple[int, str], int] = {}  # by the line that opens the block: inline assembly has labels of its own
    blocks: list[int] = []
    within: list[list[int]] = []  # the blocks around each instruction
    lines = ptx.splitlines()
    start = next((i for i, line in enumerate(lines) if ".entry" in line), None)
    if start is None:
        raise ValueError("no .entry in the PTX")
    for number, raw in enumerate(lines[start:], start + 1):
        text = raw.split("//")[0].strip()
        if text == "{":
            blocks.append(number)
        elif text == "}":
            blocks.pop()
            if not blocks:
                break
        if match := _LABEL.match(text):
            labels[blocks[-1], match[1]] = len(kernel.instructions)
            text = text[match.end() :]
        for statement in text.split(";"):
            match = _STATEMENT.match(statement.strip().lstrip("{}").strip())
            if match:
                kernel.instructions.append(Instruction(match[2], match[3].strip(), match[1] or "", number))
                within.append(list(blocks))
    count = len(kernel.instructions)
    for i, one in enumerate(kernel.instructions):
        following = [i + 1] if i + 1 < count else []
        if one.opcode.startswith("bra"):
            name = one.operands.strip()
            target = next((labels[block, name] for block in reversed(within[i]) if (block, name) in labels), None)
            if target is None:
                raise ValueError(f"PTX line {one.line}: branch to an unknown label {one.operands!r}")
            following = (following if one.predicate else []) + [target] * (target < count)
        elif one.opcode in ("ret", "exit", "trap") and not one.predicate:
            following = []
        kernel.successors.append(following)
    kernel.parameters = {int(number) for number in _POINTER.findall(ptx)}
    kernel.pointers = _addresses(kernel.instructions, kernel.parameters)
    return kernel


def _addresses(instructions: list[Instruction], parameters: set[int]) -> list[frozenset[int]]:
    """For each instruction, the pointer parameters that its address may be computed from (on any path)."""
    origin: dict[str, set[int]] = {}
    edges: dict[str, set[str]] = {}
    for one in instructions:
        registers = _REGISTER.findall(one.operands)
        if one.opcode.startswith("ld.param"):
            for number in _PARAMETER.findall(one.operands):
                origin.setdefault(registers[0], set()).update({int(number)} & parameters)
        elif not one.opcode.startswith(("ld", "st", "atom", "red", "cp", "setp", "bra", "mma", "bar")) and registers:
            edges.setdefault(registers[0], set()).update(registers[1:])
    changed = True
    while changed:
        changed = False
        for target, sources in edges.items():
            known = origin.setdefault(target, set())
            new = set().union(*(origin.get(source, ()) for source in sources)) - known
            if new:
                known |= new
                changed = True
    found = []
    for one in instructions:
        # The last bracket holds the global address: `ld.global {d}, [a]`, `st.global [a], {v}`, `cp.async [s], [a], n`.
        brackets = re.findall(r"\[([^\]]*)\]", one.operands) if _is_global(one.opcode) else []
        registers = _REGISTER.findall(brackets[-1]) if brackets else []
        found.append(frozenset().union(*(origin.get(register, ()) for register in registers)))
    return found


def _origins(kernel: Kernel, i: int) -> frozenset[int]:
    """What an instruction's address may come from by the definitions that can reach it.

    A register that walks through time is one pointer before the loop and another in it.
    """
    before, todo = {i}, [i]
    while todo:
        following = todo.pop()
        for j, successors in enumerate(kernel.successors):
            if following in successors and j not in before:
                before.add(j)
                todo.append(j)
    reaching = [kernel.instructions[j] for j in sorted(before)]
    return _addresses(reaching, kernel.parameters)[reaching.index(kernel.instructions[i])]


def _is_global(opcode: str) -> bool:
    return ".global" in opcode and opcode.startswith(("ld", "st", "atom", "red", "cp.async"))


def _is_access(opcode: str) -> str:
    """ "load" or "store" for a plain global access, "" for anything else."""
    if not _is_global(opcode) or ".acquire" in opcode or ".release" in opcode:
        return ""
    return "load" if opcode.startswith(("ld", "cp.async")) else "store" if opcode.startswith("st") else ""


def _role(instruction: Instruction, pointers: frozenset[int], shared: Sequence[int]) -> Role:
    opcode = instruction.opcode
    if _is_global(opcode) and (".release" in opcode or ".acq_rel" in opcode):
        return Role("release")
    if _is_global(opcode) and ".acquire" in opcode:
        return Role("acquire")
    if opcode.startswith(("bar.sync", "barrier.sync")):
        return Role("barrier")
    tensors = frozenset(i for i, index in enumerate(shared) if index in pointers)
    return Role(_is_access(opcode), tensors) if tensors else Role()


def _stored_and_loaded(kernel: Kernel) -> frozenset[int]:
    by_kind: dict[str, set[int]] = {"load": set(), "store": set()}
    for one, pointers in zip(kernel.instructions, kernel.pointers, strict=True):
        if kind := _is_access(one.opcode):
            by_kind[kind] |= pointers
    return frozenset(by_kind["load"] & by_kind["store"])


def _states(kernel: Kernel, roles: list[Role], tensors: int) -> list[set[State]]:
    """The states in which each instruction may be met."""
    met: list[set[State]] = [set() for _ in kernel.instructions]
    todo = [(0, State((READY,) * tensors))]
    while todo:
        i, state = todo.pop()
        if state in met[i]:
            continue
        met[i].add(state)
        after = _step(state, roles[i])
        todo.extend((following, after) for following in kernel.successors[i])
    return met


#: What an instruction makes of the phases of all tensors.
_ONWARD = {
    "barrier": {STORED: BARRED, ACQUIRED: READY},
    "release": {BARRED: RELEASED},
    "acquire": {RELEASED: ACQUIRED},
}


def _step(state: State, role: Role) -> State:
    if role.name == "store":
        return State(tuple(STORED if i in role.tensors else p for i, p in enumerate(state.phases)), state.waited)
    onward = _ONWARD.get(role.name, {})
    phases = tuple(onward.get(phase, phase) for phase in state.phases)
    return State(phases, {"acquire": True, "release": False}.get(role.name, state.waited))
