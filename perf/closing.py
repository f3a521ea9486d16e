"""gpu-check's closing report: the whole story in so few lines that it survives where only the end of a log is kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import Any

from . import engines, sweep, table
from .cases import DTYPES, MODES
from .problems import Problem

#: Lines of the report at most; a log's last hundred hold it.
REPORT_LINES = 95
#: And characters of what the parts say.
REPORT_CHARACTERS = 10_500
PASSED, UNFINISHED, FAILED, ABSENT = "passed", "unfinished", "FAILED", "absent"

Row = dict[str, str]


@dataclass
class Outcome:
    """What became of one part, and the lines that say so, most important first.

    state: "passed"; "unfinished", nothing wrong in what was seen, but not all was; "FAILED"; "absent", what it needs
        is not on this machine. keep: lines that the report has room for whatever else there is.
    """

    state: str
    lines: list[str] = field(default_factory=list)
    keep: int = 8


def report(outcomes: Mapping[str, Outcome], note: str = "", limit: float = REPORT_LINES) -> str:
    """The outcomes in at most `limit` lines: each keeps what it needs, the earlier parts get what is left over.

    A note is stated at the head and beside the verdict, which is the last line.
    """
    kept = {name: min(len(outcome.lines), outcome.keep) for name, outcome in outcomes.items()}
    room = limit - 2 - 2 * len(outcomes) - sum(kept.values())
    for name, outcome in outcomes.items():
        more = max(0, min(len(outcome.lines) - kept[name], room))
        kept[name] += more
        room -= more
    while limit < math.inf and _characters(outcomes, kept) > REPORT_CHARACTERS:
        kept[max(kept, key=kept.__getitem__)] -= 1
    lines = ["gpu-check" + f": {note}" * bool(note)]
    for name, outcome in outcomes.items():
        lines += ["", f"{name}: {outcome.state}", *outcome.lines[: kept[name]]]
    named = {
        state: [name for name, o in outcomes.items() if o.state == state] for state in (FAILED, UNFINISHED, ABSENT)
    }
    found = [f"{state}: {', '.join(names)}" for state, names in named.items() if names]
    wrong = any(named[state] for state in (FAILED, UNFINISHED))
    verdict = "; ".join(found if wrong else ["all parts passed", *found])
    return "\n".join([*lines, f"VERDICT: {verdict}" + f" ({note})" * bool(note)])


def _characters(outcomes: Mapping[str, Outcome], kept: Mapping[str, int]) -> int:
    return sum(len(line) + 1 for name, count in kept.items() for line in outcomes[name].lines[:count])


def counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"


def numerics_lines(rows: Sequence[Row], total: int, wanted: Sequence[Problem]) -> list[str]:
    """How many of all, which of those `wanted` were not reached, what is wrong, and the errors by engine and dtype."""
    lines = [f"{len(rows)} of {total} problems: {counted(Counter(row['status'] for row in rows))}"]
    missing = engines.unreached(rows, wanted)
    if missing:
        lines.append(f"not reached: {'; '.join(missing)}")
    for row in [row for row in rows if row["status"] in engines.FAULTY][:12]:
        lines.append("  " + " ".join(row[name] for name in engines.KEY if row[name]) + f": {row['detail'][:100]}")
    lines.append("right of judged, and the largest relative error to float64 among the right, by engine and dtype:")
    dtypes = [dtype for dtype in DTYPES if any(dtype == problem.dtype for problem in wanted)]
    return lines + table.markdown(_errors(rows, wanted, dtypes), ("engine", *dtypes)).splitlines()


def _errors(rows: Sequence[Row], wanted: Sequence[Problem], dtypes: Sequence[str]) -> list[dict[str, object]]:
    found = []
    for engine in dict.fromkeys([*(problem.engine for problem in wanted), *(row["engine"] for row in rows)]):
        line: dict[str, object] = {"engine": engine}
        for dtype in dtypes:
            reached = [row for row in rows if (row["engine"], row["dtype"]) == (engine, dtype)]
            judged = [row for row in reached if row["status"] not in ("refused", "left")]
            right = [row for row in judged if row["status"] == "ok"]
            worst = max((float(row["error"]) for row in right), default=0.0)
            none = "refused" if reached else "not reached"
            line[dtype] = f"{len(right)}/{len(judged)} {worst:.0e}" if judged else none
        found.append(line)
    return found


def probe_lines(entry: Mapping[str, Any]) -> list[str]:
    """A file of device constants, as measured."""

    def numbers(values: Mapping[str, float | None]) -> str:
        return ", ".join(f"{name} {'none' if value is None else f'{value:.4g}'}" for name, value in values.items())

    lines = [
        f"us from publish to seen, by {how}, programs and us: {numbers(us)}" for how, us in entry["wait_us"].items()
    ]
    lines += [
        f"us a launch: {numbers(entry['launch_us'])}; a step of the smallest cell: {entry['cell_us']:.4g} us",
        f"L2 bytes a clock and SM: {numbers(entry['l2_bytes_per_clock'])}; clock {entry['clock_ghz']:.4g} GHz",
        f"flops a clock and SM, large tiles: {numbers(entry['flops_per_clock'])}",
    ]
    for how, kinds in entry["small_tile_flops_per_clock"].items():
        shown = "; ".join(f"{kind}: {numbers(rates)}" for kind, rates in kinds.items())
        lines.append(f"  16 x N tiles, {how}, by N: {shown}")
    return lines


def sweep_lines(rows: Sequence[Row]) -> list[str]:
    """Means by cell and dtype, then a line a case, in the order of the rows."""
    cases = by_case(rows)
    if not cases:
        return []
    means = table.markdown(_means(cases), ("cell", "dtype", *MODES, "x floor", "saved", "peak")).splitlines()
    lines = [
        "torch.nn's time over ours, geometric mean (cases): above 1 ours is faster. x floor: our time over the model's",
        "floor. saved, peak: our memory over torch.nn's, between forward and backward and at most.",
        *means,
        f"{'case':<48} {'ours ms':>9} {'torch ms':>9} {'us/step':>8} {'ratio':>6} {'floor':>6} {'error':>8}  plan",
    ]
    return lines + [_case_line(by_provider) for by_provider in cases.values()]


def by_case(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Each case's rows by provider."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in sweep.KEY[:-1]), {})[row["provider"]] = row
    return cases


def _means(cases: Mapping[tuple[str, ...], Mapping[str, Row]]) -> list[dict[str, object]]:
    """A line for each cell and dtype of which ours was timed."""
    families: dict[tuple[str, str], list[Mapping[str, Row]]] = {}
    for by_provider in cases.values():
        ours = by_provider.get("ours", {})
        if ours.get("median_ms"):
            families.setdefault((ours["cell"], ours["dtype"]), []).append(by_provider)
    lines = []
    for (cell, dtype), family in families.items():
        line: dict[str, object] = {"cell": cell, "dtype": dtype}
        for mode in MODES:
            line[mode] = _mean((pair for pair in family if pair["ours"]["mode"] == mode), _value("ratio"), count=True)
        line["x floor"] = _mean(family, _value("to_floor"))
        line["saved"], line["peak"] = (_mean(family, _over_torch(name)) for name in ("saved_mib", "peak_mib"))
        lines.append(line)
    return lines


def _value(column: str) -> Callable[[Mapping[str, Row]], float]:
    return lambda by_provider: _number(by_provider["ours"][column])


def _over_torch(column: str) -> Callable[[Mapping[str, Row]], float]:
    def over(by_provider: Mapping[str, Row]) -> float:
        other = _number(by_provider.get("torch", {}).get(column, ""))
        return _number(by_provider["ours"][column]) / other if other > 0 else math.nan

    return over


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _mean(
    family: Iterable[Mapping[str, Row]], value: Callable[[Mapping[str, Row]], float], *, count: bool = False
) -> str:
    """The geometric mean of what there is and is above zero, with `count` also of how many."""
    values = [number for number in map(value, family) if number > 0]
    return f"{geometric_mean(values):.2f}" + f" ({len(values)})" * count if values else "-"


def _case_line(by_provider: Mapping[str, Row]) -> str:
    """Ours beside torch.nn."""
    row = next(iter(by_provider.values()))
    name = f"{row['cell']} {row['dtype']} {row['mode']} B{row['batch']} H{row['hidden']} T{row['seq']}"
    name += f" L{row['layers']}" * (row["layers"] != "1") + " bi" * (row["bidirectional"] == "True")
    ours, other = by_provider.get("ours", {}), by_provider.get("torch", {})
    shown = [found.get("median_ms") or found.get("status", "-") for found in (ours, other)]
    columns = [ours.get(column, "") for column in ("us_per_step", "ratio", "to_floor", "error")]
    line = f"{name:<48} {shown[0]:>9} {shown[1]:>9} {columns[0]:>8} {columns[1]:>6} {columns[2]:>6} {columns[3]:>8}  "
    line += f"{ours.get('plan', '')} | {other.get('plan', '')}"
    loose = f" (torch.nn's error: {other['error']})" if other.get("status") == "loose" else ""
    return f"{line}{loose} {ours.get('detail', '')[:60]}".rstrip(" |")
