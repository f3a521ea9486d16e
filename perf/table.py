"""Rows on disk and on the screen: a CSV that survives a kill, Markdown, and a progress bar."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


class Rows:
    """A CSV file to which whole rows are added, each on disk before the next begins.

    With `resume` the rows there are kept, but for a last line that a kill cut short; without, the file starts anew.
    """

    def __init__(self, path: Path, fields: Sequence[str], *, resume: bool = False) -> None:
        self.path, self.fields = path, list(fields)
        self.resumed = resume and path.exists()
        self.rows = read(path, fields) if self.resumed else []
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside it first: a kill in here must not take the rows that were there.
        new = path.with_suffix(".new")
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            writer.writeheader()
            writer.writerows(self.rows)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    def add(self, *rows: dict[str, object]) -> None:
        """Write rows that belong together at once, and see them on disk."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.fields, restval="").writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        self.rows += [{name: str(row.get(name, "")) for name in self.fields} for row in rows]


def read(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The complete rows of a CSV. A file with other columns is another version's: ValueError."""
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    reader = csv.reader(complete.splitlines())
    header = next(reader, list(fields))
    if header != list(fields):
        raise ValueError(f"{path} has other columns than this version writes; choose another --out or drop --resume")
    return [dict(zip(fields, row, strict=True)) for row in reader if len(row) == len(fields)]


def markdown(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> str:
    """The rows as a Markdown table, through pandas and tabulate where they are installed."""
    if not rows:
        return "(no rows)"
    table = [{name: row.get(name, "") for name in columns} for row in rows]
    try:
        import pandas
        import tabulate  # noqa: F401 (pandas asks for it)
    except ImportError:
        lines = [list(columns)] + [[str(row[name]) for name in columns] for row in table]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
        )
    return pandas.DataFrame(table, columns=list(columns)).to_markdown(index=False, disable_numparse=True)


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """A progress bar on stderr; a line for each tenth where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        for done, item in enumerate(items, 1):
            yield item
            if done * 10 // total > (done - 1) * 10 // total:
                print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
    else:
        # In a log each state of the bar is a line's worth.
        interval = 0.5 if sys.stderr.isatty() else 15
        yield from tqdm(items, total=total, desc=what, file=sys.stderr, dynamic_ncols=True, mininterval=interval)


def short(error: Exception) -> str:
    """An exception in a cell of a table: its kind and what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
