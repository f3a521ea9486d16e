"""`python -m lstm_triton.perf <command>`: measure, check, compile, compare, report."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

COMMANDS = {
    "sweep": "time ours against torch.nn (cuDNN) and others over cells, dtypes and sizes, numerics first",
    "gpu-check": "on a GPU machine: tests, numerics and constants first, then a timed sweep, within a time budget",
    "probe": "measure on a GPU the constants that the planner's model needs",
    "tune": "search plans near the model's choice on a GPU and keep the winners",
    "resources": "compile the kernels for a GPU that need not be there: registers, spills, the budget of a step",
    "compare": "two result files, cell by cell; exit status 1 where something got worse",
    "report": "figures and a page from result files",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m lstm_triton.perf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, formatter_class=argparse.RawTextHelpFormatter)
        if arguments[:1] == [name]:  # the others' modules stay unread
            module = import_module(f".{name.replace('-', '_')}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
