"""`python -m lstm_triton.perf sweep | gpu-check | resources`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

COMMANDS = {
    "sweep": "time ours against torch.nn (cuDNN) over cells, dtypes and sizes, numerics first",
    "gpu-check": "on a GPU machine: tests and numerics first, then a timed sweep, within a time budget",
    "resources": "compile the kernels for a GPU that need not be there; registers, spills, shared memory, instructions",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lstm_triton.perf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        module = import_module(f".{name.replace('-', '_')}", __package__)
        command = commands.add_parser(name, help=text, description=text, formatter_class=argparse.RawTextHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
