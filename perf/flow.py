"""Control flow of a listing of instructions: its loops. Serves PTX and SASS alike, whose blocks lie in any order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One machine or PTX instruction: `@predicate opcode operands`, and where it stands in its listing."""

    opcode: str
    operands: str
    predicate: str
    line: int


def loops(successors: list[list[int]]) -> list[set[int]]:
    """Strongly connected components with a cycle, largest first: a loop with all the loops nested in it.

    Tarjan 1972, with an explicit stack, for listings are longer than Python's recursion limit.
    """
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[set[int]] = []
    for root in range(len(successors)):
        if root in index:
            continue
        work = [(root, iter(successors[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, edges = work[-1]
            for target in edges:
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
                    if len(component) > 1:
                        found.append(component)
    return sorted(found, key=len, reverse=True)


def reachable(successors: list[list[int]], starts: Iterable[int]) -> set[int]:
    """Every instruction that some path from `starts` meets."""
    seen: set[int] = set()
    todo = list(starts)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(successors[node])
    return seen
