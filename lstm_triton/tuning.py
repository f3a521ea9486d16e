"""Schedules that a search on a GPU found better than the model's choice, and where they are kept.

tuned/plans/<family>-triton-<version>.json, one for each GPU family and Triton version: another compiler makes other
kernels. `python -m lstm_triton.perf tune` writes them, the planner follows them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

import triton

from .devices import SCHEMA, file_name

VERSION = ".".join(re.findall(r"\d+", triton.__version__)[:2])


@dataclass(frozen=True)
class Key:
    """What a choice is for."""

    cell: str
    activation: str
    direction: str
    kind: str  # of arithmetic: half (fp16 and bf16 alike), tf32, fp32, fp64
    hidden: int
    rows: int  # of the batch, rounded up to a power of two, 16 at least

    @classmethod
    def of(cls, cell: str, activation: object, direction: str, kind: str, hidden: int, batch: int) -> Key:
        name = activation if isinstance(activation, str) else json.dumps(activation)
        return cls(cell, name, direction, kind, hidden, max(16, 1 << (batch - 1).bit_length()))


@dataclass(frozen=True)
class Choice:
    """A schedule: the numbers of a KernelPlan that are free to choose, and what it was measured at."""

    engine: str
    block_b: int
    block_h: int
    block_k: int
    split_k: int
    ahead: int
    stages: int
    num_warps: int
    us_per_step: float
    model_us: float  # of the schedule that the model alone would have taken, measured beside it


Table = dict[Key, Choice]
_override: Table | None = None


def lookup(family: str, key: Key) -> Choice | None:
    """The choice for a problem on a family of GPUs under the Triton that is installed, if there is one."""
    return (_load(family) if _override is None else _override).get(key) if family else None


@contextmanager
def using(table: Mapping[Key, Choice]) -> Iterator[None]:
    """In here these choices are the only ones, on every GPU: how a search runs its candidates, or runs without any."""
    global _override
    before, _override = _override, dict(table)
    try:
        yield
    finally:
        _override = before


def path_name(family: str, version: str = VERSION) -> str:
    """The file, under tuned/plans/, of one GPU family and Triton version."""
    return f"{file_name(family).removesuffix('.json')}-triton-{version}.json"


@cache
def _load(family: str) -> Table:
    path = files(__package__).joinpath("tuned", "plans", path_name(family))
    if not path.is_file():
        return {}
    try:
        return read(path.read_text(), family)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def write(table: Mapping[Key, Choice], family: str, measured: Mapping[str, str]) -> str:
    """A file's text; `measured` is the environment, as in the device's file."""
    kept = {name: measured[name] for name in SCHEMA["measured"]}
    plans = [{**asdict(key), **asdict(choice)} for key, choice in sorted(table.items(), key=lambda item: str(item[0]))]
    return json.dumps({"name": family, "triton": VERSION, "measured": kept, "plans": plans}, indent=1) + "\n"


def read(text: str, family: str, version: str = VERSION) -> Table:
    """The table in a file's text; ValueError naming what does not fit the schema."""
    entry = json.loads(text)
    _expect(entry, {"name": str, "triton": str, "measured": dict, "plans": list}, "the file")
    _expect(entry["measured"], SCHEMA["measured"], "measured")
    if (entry["name"], entry["triton"]) != (family, version):
        raise ValueError(f"it is for {entry['name']} and Triton {entry['triton']}, not {family} and {version}")
    table: Table = {}
    for i, plan in enumerate(entry["plans"]):
        _expect(plan, {field.name: _TYPES[field.type] for field in (*fields(Key), *fields(Choice))}, f"plans[{i}]")
        key, choice = (kind(**{field.name: plan[field.name] for field in fields(kind)}) for kind in (Key, Choice))
        _check_choice(choice, f"plans[{i}]")
        if key in table:
            raise ValueError(f"plans[{i}] is for the same problem as one before it")
        table[key] = choice
    return table


_TYPES = {"str": (str,), "int": (int,), "float": (int, float)}


def _expect(entry: Any, types: Mapping[str, Any], where: str) -> None:
    if not isinstance(entry, dict) or entry.keys() != types.keys():
        got = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
        raise ValueError(f"{where} must have the fields {', '.join(types)}, got {got}")
    for name, kind in types.items():
        if not isinstance(entry[name], kind) or isinstance(entry[name], bool):
            raise ValueError(f"{where}: {name} is {entry[name]!r}, of the wrong type")


def _check_choice(choice: Choice, where: str) -> None:
    powers: Sequence[str] = ("block_b", "block_h", "block_k", "split_k", "num_warps")
    for name in powers:
        value = getattr(choice, name)
        if value < 1 or value & (value - 1):
            raise ValueError(f"{where}: {name} must be a power of two, got {value}")
    if choice.ahead < 1 or choice.stages < 1 or not choice.us_per_step > 0 or not choice.model_us > 0:
        raise ValueError(f"{where}: ahead, stages, us_per_step and model_us must be above zero")
    if choice.engine not in ("local", "resident", "streamed", "step"):
        raise ValueError(f"{where}: engine must be local, resident, streamed or step, got {choice.engine!r}")
    if choice.engine != "local" and choice.split_k > 1 and choice.block_k // choice.split_k < 16:
        raise ValueError(f"{where}: a slice of K must hold 16 columns, got {choice.block_k} in {choice.split_k}")
