"""One command for a GPU machine that is there for some minutes: what is wrong, then what is fast, most telling first.

Each part runs in a process of its own: an illegal access in one does not take the next part's device away, and a part
that hangs is ended when its time is up. What a part had found by then is on disk and counts. Exit status: 0 all parts
passed, 1 one failed, 3 no GPU, 4 time ran out before everything was seen. The last hundred lines tell the whole story.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import parts
from .closing import FAILED, UNFINISHED, Outcome, report
from .options import NO_GPU, OUT_OF_TIME, choose
from .processes import LOG, Setting, run_process

#: Seconds kept back for the closing report.
RESERVE = 10.0
REHEARSAL = "a rehearsal on the CPU: nothing was measured on a GPU"


@dataclass(frozen=True)
class Part:
    """A part of the check: its share of the whole time, and how to run it in that many seconds."""

    name: str
    share: float
    run: Callable[[float], Outcome]


#: In this order. Shares are of what the chosen parts have together, and what one leaves over is the next one's.
PARTS = {
    "environment": (0.04, parts.environment_part),
    "tests": (0.15, parts.tests_part),
    "numerics": (0.24, parts.numerics_part),
    "sanitizer": (0.08, parts.sanitizer_part),
    "probe": (0.19, parts.probe_part),
    "sweep": (0.30, parts.sweep_part),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget in all (default 9)")
    parser.add_argument("--out", type=Path, default=Path("results/gpu-check"), help="folder for results and logs")
    parser.add_argument("--only", help=f"comma-separated parts: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--resume", action="store_true", help="keep the rows in --out made from the same sources")
    parser.add_argument(
        "--rehearse", action="store_true", help="go through all the motions without a GPU, at tiny sizes on the CPU"
    )


def main(options: argparse.Namespace) -> int:
    """0 if all parts passed, 1 if any failed, else OUT_OF_TIME; NO_GPU without a CUDA device."""
    import torch

    names = choose("only", options.only, tuple(PARTS)) if options.only is not None else list(PARTS)
    if not options.minutes > 0:
        print(f"--minutes: expected a number above zero, got {options.minutes:g}")
        return 2
    if not options.rehearse and not torch.cuda.is_available():
        print(
            "gpu-check: no CUDA device is available here. It cannot run the kernels on a GPU, check their numerics "
            "there or time them; nothing was measured. `gpu-check --rehearse` goes through the motions without one, "
            "`sweep` runs the CPU path and interprets, `resources` compiles."
        )
        return NO_GPU
    note = REHEARSAL if options.rehearse else ""
    if note:
        print(f"gpu-check: {note}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / LOG).unlink(missing_ok=True)
    setting = Setting(options.out, run_process, options.resume, options.rehearse)

    def seen(outcomes: dict[str, Outcome]) -> None:
        (options.out / "summary.md").write_text(report(outcomes, note, limit=float("inf")) + "\n")

    outcomes = orchestrate(chosen(names, setting), options.minutes * 60, seen=seen)
    print(report(outcomes, note), flush=True)
    states = {outcome.state for outcome in outcomes.values()}
    return 1 if FAILED in states else OUT_OF_TIME if UNFINISHED in states else 0


def chosen(names: Sequence[str], setting: Setting) -> list[Part]:
    """The parts of these names, in their own order, with the whole time between them."""
    kept = {name: part for name, part in PARTS.items() if name in names}
    whole = sum(share for share, _ in kept.values())
    return [Part(name, share / whole, partial(run, setting)) for name, (share, run) in kept.items()]


def orchestrate(
    todo: Sequence[Part],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    seen: Callable[[dict[str, Outcome]], None] = lambda outcomes: None,
) -> dict[str, Outcome]:
    """Run the parts in turn within `seconds`. A part that raises has failed; the next one runs all the same.

    A part may use its share of the whole and whatever earlier parts left over of theirs. After each, `seen` is called.
    """
    start = clock()
    allotted = 0.0
    outcomes: dict[str, Outcome] = {}
    for part in todo:
        allotted += part.share * (seconds - RESERVE)
        available = start + allotted - clock()
        if available <= 0:
            outcomes[part.name] = Outcome(UNFINISHED, ["not run: no time was left"])
            seen(outcomes)
            continue
        try:
            outcomes[part.name] = part.run(available)
        except Exception as error:
            outcomes[part.name] = Outcome(FAILED, [f"{type(error).__name__}: {error}"])
        seen(outcomes)
        found = outcomes[part.name]
        said = next(iter(found.lines), "")[:100]
        print(f"{part.name}: {found.state}, {clock() - start:.0f} s since the start; {said}", flush=True)
    return outcomes
