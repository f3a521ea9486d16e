"""A stand-in for the processes that gpu-check's parts run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

from lstm_triton.perf import engines, environment, sweep, table


class Runner:
    """Writes what a part's process would have left, and returns the statuses it is given, one a call."""

    def __init__(
        self, *statuses: int | None, rows: Iterable[dict[str, object]] = (), output: str = "", entry: object = None
    ) -> None:
        self.statuses = list(statuses)
        self.output, self.rows, self.entry = output, list(rows), entry
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], seconds: float, log: Path) -> int | None:
        self.commands.append(list(command))
        with log.open("a") as file:
            file.write(self.output)
        fields = {"lstm_triton.perf.engines": engines.FIELDS, "sweep": sweep.FIELDS}
        for name in fields.keys() & command:
            out = Path(command[command.index("--out") + 1])
            path = out / "sweep.csv" if name == "sweep" else out
            source = {"source": environment.source_hash()}
            table.Rows(path, fields[name], resume="--resume" in command).add(*(row | source for row in self.rows))
        if self.entry is not None:
            (log.parent / "h200.json").write_text(json.dumps(self.entry))
        return self.statuses.pop(0)

    def options(self, i: int = -1) -> argparse.Namespace:
        """A command's options, as the command itself understands them."""
        command = self.commands[i]
        command = command[command.index("-m") + 1 :]
        if command[0] == "lstm_triton.perf.engines":
            return engines.parser().parse_args(command[1:])
        assert command[0] == "lstm_triton.perf"
        parser = argparse.ArgumentParser()
        import_module(f"lstm_triton.perf.{command[1]}").add_arguments(parser)
        return parser.parse_args(command[2:])
