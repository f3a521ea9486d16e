"""Control flow of a listing of instructions: its loops, and the way through them. Serves PTX and SASS alike.

Blocks of either lie in any order, so nothing here goes by the order of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

Successors = list[list[int]]


@dataclass(frozen=True)
class Instruction:
    """One machine or PTX instruction: `@predicate opcode operands`, and where it stands in its listing."""

    opcode: str
    operands: str
    predicate: str
    line: int
    control: int | None = None  # SASS: the upper half of the encoding, which holds what the assembler scheduled


def components(successors: Successors, within: Iterable[int] | None = None) -> list[set[int]]:
    """Strongly connected components of the graph or a part of it, each after all that can be reached from it.

    Tarjan 1972, with an explicit stack, for listings are longer than Python's recursion limit.
    """
    roots = list(range(len(successors)) if within is None else within)
    inside = set(roots)
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[set[int]] = []
    for root in roots:
        if root in index:
            continue
        work = [(root, iter(successors[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, edges = work[-1]
            for target in edges:
                if target not in inside:
                    continue
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    on_stack.add(target)
                    work.append((target, iter(successors[target])))
                    break
                if target in on_stack:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component: set[int] = set()
                    while node not in component:
                        component.add(stack.pop())
                    on_stack -= component
                    found.append(component)
    return found


def loops(successors: Successors, within: Iterable[int] | None = None) -> list[set[int]]:
    """Components with a cycle, largest first: a loop with all the loops nested in it."""
    return sorted((found for found in components(successors, within) if len(found) > 1), key=len, reverse=True)


def nested(successors: Successors, loop: set[int]) -> list[set[int]]:
    """The loops inside a loop, largest first."""
    head = entry(successors, loop)
    return loops(_without_edges_into(head, successors, loop), sorted(loop))


def entry(successors: Successors, loop: set[int]) -> int:
    """Where control comes into a loop."""
    heads = {target for i, following in enumerate(successors) if i not in loop for target in following} & loop
    if len(heads) != 1:
        raise ValueError(f"a loop with {len(heads)} entries")
    return heads.pop()


def reachable(successors: Successors, starts: Iterable[int]) -> set[int]:
    """Every instruction that some path from `starts` meets."""
    seen: set[int] = set()
    todo = list(starts)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(successors[node])
    return seen


def once_through(
    successors: Successors, loop: set[int], trips: Callable[[set[int]], int], avoid: Collection[int] = ()
) -> list[int]:
    """The instructions of one trip of a loop, in order: the longest way round that meets the fewest of `avoid`.

    trips: how often to run a loop that lies on the way.
    """
    head = entry(successors, loop)
    latches = {i for i in loop if head in successors[i]}
    return way(_without_edges_into(head, successors, loop), sorted(loop), head, latches, trips, avoid)


def way(
    successors: Successors,
    within: Iterable[int],
    start: int,
    ends: Collection[int],
    trips: Callable[[set[int]], int],
    avoid: Collection[int] = (),
) -> list[int]:
    """The same from `start` to one of `ends`, through `within`."""
    parts = components(successors, within)
    part_of = {i: number for number, part in enumerate(parts) for i in part}
    # Of each component the best way to an end: minus what it meets of `avoid`, length, own instructions, what follows.
    best: dict[int, tuple[int, int, list[int], int | None]] = {}
    for number, part in enumerate(parts):
        options: list[int | None] = [None] if part & set(ends) else []
        options += sorted({part_of[t] for i in part for t in successors[i] if t in part_of} & best.keys() - {number})
        if not options:
            continue
        own = once_through(successors, part, trips, avoid) * trips(part) if len(part) > 1 else list(part)
        following = max(options, key=lambda option: (0, 0) if option is None else best[option][:2])
        after = (0, 0) if following is None else best[following][:2]
        best[number] = after[0] - sum(i in avoid for i in own), after[1] + len(own), own, following
    if part_of[start] not in best:
        raise ValueError("no way from the start to an end")
    found: list[int] = []
    number: int | None = part_of[start]
    while number is not None:
        found += best[number][2]
        number = best[number][3]
    return found


def _without_edges_into(head: int, successors: Successors, loop: set[int]) -> Successors:
    return [
        [target for target in following if target != head] if i in loop else following
        for i, following in enumerate(successors)
    ]
