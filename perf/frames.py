"""Result files as pandas frames: what `report` and `compare` read, and the words both use for a row."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import environment
from .cases import CELLS, DTYPES, MODES
from .options import refuse
from .providers import PROVIDERS

try:
    import pandas as pd
except ImportError as error:
    refuse(f"pandas is needed: pip install 'lstm-triton[perf]' ({error})")

#: What a row is about. Two rows of one file that agree in it and in the device are one result measured twice.
CASE = ("cell", "dtype", "mode", "layers", "bidirectional", "batch", "hidden", "seq")
KEY = (*CASE, "provider")
#: What a file must have to be a sweep's result; other columns may be missing and are then empty.
REQUIRED = (*KEY, "status", "median_ms", "p20_ms", "p80_ms", "ratio", "device")
WHOLE = ("layers", "batch", "hidden", "seq")
NUMBERS = (
    "median_ms", "p20_ms", "p80_ms", "rounds", "warm_ms", "warm_p20_ms", "warm_p80_ms",
    "graph_ms", "graph_p20_ms", "graph_p80_ms", "us_per_step", "ratio", "floor_us", "to_floor",
    "host_us", "peak_mib", "saved_mib", "clock_mhz", "error",
)  # fmt: skip
TEXT = ("worst", "allowed", "plan", "version", "detail", "constants", *environment.COLUMNS)

#: The order in which these stand everywhere; what is not named here comes after, by name.
ORDER = {"cell": tuple(CELLS), "dtype": tuple(DTYPES), "mode": MODES, "provider": tuple(PROVIDERS)}


@dataclass(frozen=True)
class Result:
    """The rows of one file, numbers as numbers, and how many rows a later one of the same case replaced."""

    path: Path
    rows: pd.DataFrame
    replaced: int


def read(path: Path) -> Result:
    """A sweep's CSV, or the sweep.csv of a folder; exit status 2 with a message if it is neither."""
    file = path / "sweep.csv" if path.is_dir() else path
    if not file.is_file():
        refuse(f"{path}: expected a sweep's CSV or a folder that holds sweep.csv; {file} does not exist")
    text = file.read_text(errors="replace")
    complete = text[: text.rfind("\n") + 1]  # a kill may have cut the last line short
    try:
        rows = pd.read_csv(io.StringIO(complete), dtype=str, keep_default_na=False, na_filter=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        refuse(f"{file}: expected a sweep's CSV: {' '.join(str(error).split())}")
    missing = [name for name in REQUIRED if name not in rows.columns]
    if missing:
        refuse(f"{file}: not a sweep's result, it lacks the columns {', '.join(missing)}")
    rows = rows.reindex(columns=[*KEY, "status", *NUMBERS, *TEXT], fill_value="")
    for name in (*WHOLE, *NUMBERS):
        try:
            number = rows[name].replace("", "nan").astype("float64")
        except ValueError as error:
            refuse(f"{file}: column {name}: expected numbers: {error}")
        # An error may be infinite, that of a result with NaN.
        wrong = (number < 0) | (np.isinf(number) & (name != "error")) | ((name in WHOLE) & (number % 1 != 0))
        if wrong.any():
            expected = "whole numbers" if name in WHOLE else "finite numbers that are not negative"
            refuse(f"{file}: column {name}: expected {expected}, got {rows[name][wrong].iloc[0]!r}")
        rows[name] = number.astype("int64") if name in WHOLE else number
    rows["bidirectional"] = rows["bidirectional"] == "True"
    kept = rows.drop_duplicates([*KEY, "device"], keep="last")
    return Result(file, sort(kept), len(rows) - len(kept))


def sort(rows: pd.DataFrame, by: Sequence[str] = KEY) -> pd.DataFrame:
    """The rows in the order of ORDER, and of numbers."""
    return rows.sort_values(list(by), key=_ranks, kind="stable", ignore_index=True)


def ordered(name: str, values: Iterable[str]) -> list[str]:
    """The different values of one column, in the order of ORDER."""
    return sorted(set(values), key=lambda value: _rank(name, value))


def _ranks(column: pd.Series) -> pd.Series:
    return column.map(lambda value: _rank(column.name, value)) if column.name in ORDER else column


def _rank(name: str, value: str) -> tuple[int, str]:
    known = ORDER.get(name, ())
    return (known.index(value) if value in known else len(known), value)


def kind(row: pd.Series) -> str:
    """The cell and how it is stacked: "lstm", "lstm, 2 layers, both directions"."""
    layers = f", {row['layers']} layers" if row["layers"] > 1 else ""
    return f"{row['cell']}{layers}{', both directions' if row['bidirectional'] else ''}"


def words(row: pd.Series, *, provider: bool = True) -> str:
    """A row's case on one line."""
    size = f"B={row['batch']} H={row['hidden']} T={row['seq']}"
    return f"{row['provider'] + ' ' if provider else ''}{kind(row)} {row['dtype']} {row['mode']} {size}"


def is_ours(rows: pd.DataFrame) -> pd.Series:
    """Rows of this package, whichever engine was asked for."""
    return rows["provider"].str.match(r"ours(:|$)")


def is_cpu(device: str) -> bool:
    """environment.collect names a CPU so."""
    return device.startswith("CPU")


def reference(rows: pd.DataFrame) -> str:
    """What torch.nn is in these rows: cuDNN where every one of them says so."""
    plans = rows["plan"][(rows["provider"] == "torch") & (rows["plan"] != "")]
    return "cuDNN" if len(plans) and plans.str.startswith("cuDNN").all() else "torch.nn"


def subject(rows: pd.DataFrame) -> str | None:
    """The provider that is held against the reference: ours with the engine it chose, or the first engine there is."""
    return next(iter(ordered("provider", rows["provider"][is_ours(rows)])), None)


def values(rows: pd.DataFrame, name: str) -> str:
    """All the different values of a text column, for a line that says what a file was measured with."""
    return ", ".join(dict.fromkeys(value for value in rows[name] if value)) or "not recorded"


def geometric_mean(numbers: Sequence[float] | pd.Series) -> float:
    """NaN where there are none."""
    found = np.asarray(numbers, dtype=float)
    with np.errstate(divide="ignore"):  # a ratio that was rounded to nothing
        return float(np.exp(np.log(found).mean())) if found.size else float("nan")
