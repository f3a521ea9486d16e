"""Run the programs of a Triton grid concurrently in the interpreter, and look for data races.

    with concurrent(seed=0) as run:
        kernel[grid](...)
    assert not run.races, run.describe()

scheduler.py decides which program runs next, races.py keeps the happens-before relation, executor.py hooks both into
Triton's interpreter.
"""

from .executor import Run, concurrent
from .races import Access, OutOfBounds, Race
from .scheduler import POLICIES, Livelock

__all__ = ["POLICIES", "Access", "Livelock", "OutOfBounds", "Race", "Run", "concurrent"]
