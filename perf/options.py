"""Comma-separated lists on the command line."""

from __future__ import annotations

from collections.abc import Collection


def split(text: str) -> list[str]:
    """The parts of "a,b, c"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def choose(name: str, text: str, allowed: Collection[str]) -> list[str]:
    """The parts, each one of `allowed`; a message and exit status 2 otherwise, as argparse has it."""
    parts = split(text)
    wrong = [part for part in parts if part not in allowed]
    if wrong or not parts:
        what = f"{wrong[0]!r} is none of" if wrong else "choose from"
        print(f"--{name}: {what} {', '.join(allowed)}")
        raise SystemExit(2)
    return parts


def numbers(name: str, text: str) -> list[int]:
    """The parts as positive integers."""
    parts = split(text)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        print(f"--{name}: expected positive integers, got {text!r}")
        raise SystemExit(2)
    return [int(part) for part in parts]
