"""What kernels took when the committed table was made, held against what they take now.

The rule is plain: a rise in barriers, registers, spills or shared memory of any row is worse, also where the plan took
another engine or tile. Whoever means it renews the table in the same commit (`make resources`), where it is seen.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Row = Mapping[str, object]
Key = tuple[str, ...]

#: What a row is about.
KEY = ("target", "cell", "direction", "dtype", "hidden", "batch")
#: What the planner decides.
PLANNED = ("engine", "block_b", "block_h", "tiles", "block_k", "split_k", "ahead", "stages", "warps", "grid")
PLANNED += ("shared_plan",)
#: What must not rise: barriers of a step, and what a program takes of its SM.
HELD = ("BAR", "registers", "spill_bytes", "shared_bytes")
BESIDE = "environment.json"
RENEW = "If that is meant, renew the baseline in the same commit: make resources"


@dataclass
class Comparison:
    """A line for each row that differs."""

    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # rows that the baseline lacks


@dataclass(frozen=True)
class Baseline:
    """A table made before."""

    path: Path
    rows: dict[Key, dict[str, str]]
    triton: str  # the version that compiled it; another makes other kernels

    def compare(self, rows: Iterable[Row]) -> Comparison:
        """Each row with the one of the same key."""
        found = Comparison()
        for row in rows:
            what = " ".join(key(row))
            if key(row) not in self.rows:
                found.unknown.append(what)
                continue
            old = self.rows[key(row)]
            changes = {name: (int(old[name]), int(row[name])) for name in HELD if int(old[name]) != int(row[name])}
            if not changes:
                continue
            line = f"{what}: " + ", ".join(f"{name} {was} -> {now}" for name, (was, now) in changes.items())
            if self.replanned(row):
                line += f" (plan {_plan(old)} -> {_plan(row)})"
            rises = any(now > was for was, now in changes.values())
            (found.worse if rises else found.better).append(line)
        return found

    def replanned(self, row: Row) -> bool:
        """Whether the plan of a row in the table is another now."""
        return any(str(row[name]) != self.rows[key(row)][name] for name in PLANNED)

    def report(self, rows: Iterable[Row]) -> bool:
        """Print the comparison; whether anything got worse."""
        now = compiler()["triton"]
        if self.triton != now:
            print(f"The baseline was made with Triton {self.triton}, this is {now}: differences may be the compiler's.")
        found = self.compare(rows)
        for title, lines in (("WORSE", found.worse), ("better", found.better), ("not in the baseline", found.unknown)):
            for line in lines:
                print(f"{title}: {line}")
        counts = f"{len(found.worse)} worse, {len(found.better)} better, {len(found.unknown)} not in it"
        print(f"against the baseline {self.path}: {counts}")
        if found.worse or found.better:
            print(RENEW)
        return bool(found.worse)


def read(path: Path) -> Baseline:
    """A table and what compiled it. OSError or ValueError for what is none."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (*KEY, *PLANNED, *HELD) if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}: no resources.csv of this version")
        rows = {key(row): row for row in reader}
    if not rows:
        raise ValueError(f"{path} has no rows")
    made = json.loads(path.with_name(BESIDE).read_text())
    if "triton" not in made:
        raise ValueError(f"{path.with_name(BESIDE)} does not say which triton compiled {path.name}")
    return Baseline(path, rows, made["triton"])


def compiler() -> dict[str, object]:
    """What made the kernels of a table: goes beside it."""
    import triton

    return {"triton": triton.__version__}


def key(row: Row) -> Key:
    """What a row is about."""
    return tuple(str(row[name]) for name in KEY)


def _plan(row: Row) -> str:
    return f"{row['engine']} {row['block_b']}x{row['block_h']} K {row['block_k']}/{row['split_k']} {row['warps']} warps"
