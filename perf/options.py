"""What the commands' options have in common: lists, GPUs, files of constants. Bad usage says so, and ends with 2."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lstm_triton.devices import Device


#: Exit statuses of a command that needs a CUDA device, and of one whose time ran out before everything was seen.
NO_GPU, OUT_OF_TIME = 3, 4


def refuse(message: str) -> NoReturn:
    """A wrong command line, as argparse has it."""
    print(message)
    raise SystemExit(2)


def split(text: str) -> list[str]:
    """The parts of "a,b, c"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def choose(name: str, text: str, allowed: Collection[str]) -> list[str]:
    """The parts, each one of `allowed`; a message and exit status 2 otherwise, as argparse has it."""
    parts = split(text)
    wrong = [part for part in parts if part not in allowed]
    if wrong or not parts:
        what = f"{wrong[0]!r} is none of" if wrong else "choose from"
        refuse(f"--{name}: {what} {', '.join(allowed)}")
    return parts


def numbers(name: str, text: str) -> list[int]:
    """The parts as positive integers."""
    parts = split(text)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        refuse(f"--{name}: expected positive integers, got {text!r}")
    return [int(part) for part in parts]


def target(name: str, text: str) -> Device:
    """The GPU of that name, which need not be there."""
    from lstm_triton.devices import device_named

    try:
        return device_named(text)
    except ValueError as error:
        refuse(f"--{name}: {error}")


def use_constants(path: Path | None) -> None:
    """Plan and estimate with a file's constants (of probe), if one is given."""
    from lstm_triton.devices import register

    try:
        if path is not None:
            register(path)
    except (OSError, ValueError) as error:
        refuse(f"--constants: {error}")
