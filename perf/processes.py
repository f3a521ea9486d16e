"""How gpu-check runs its processes: within their time, with everything that they started, their output in one log."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: In --out: the output of every part's process.
LOG = "log.txt"
#: Seconds before the end of its time at which a part is to begin nothing new: the end itself is for one that hangs.
MARGIN = 20.0

#: A command, the seconds it has, a file for its output -> its exit status, None if it was ended as its time was up.
Runner = Callable[[Sequence[str], float, Path], "int | None"]


@dataclass(frozen=True)
class Setting:
    """Where results go and how processes are run; `rehearse` goes through the motions without a GPU, at tiny sizes."""

    out: Path
    runner: Runner
    resume: bool = False
    rehearse: bool = False

    def run(self, command: Sequence[str], seconds: float, **variables: str) -> int | None:
        """Run a command with these environment variables; its output goes to the log."""
        if self.rehearse:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        given = [f"{name}={value}" for name, value in variables.items()]
        return self.runner([*(["env", *given] if given else []), *command], seconds, self.out / LOG)

    def logged(self, command: Sequence[str], seconds: float, **variables: str) -> tuple[int | None, list[str]]:
        """The same, and what it said."""
        log = self.out / LOG
        begin = log.stat().st_size if log.exists() else 0
        status = self.run(command, seconds, **variables)
        return status, log.read_bytes()[begin:].decode(errors="replace").splitlines()

    def restarting(
        self, command: Sequence[str], seconds: float, path: Path, **variables: str
    ) -> tuple[int | None, str]:
        """Run a command that writes rows to `path` and can --resume; again where it died or lost its device, in time.

        Returns the last status, None if it was ended as its time was up, and what is worth saying about it. Such a
        command begins nothing after its --minutes, and keeps a file beside its rows with what it is at.
        """
        deadline = time.monotonic() + seconds
        running = path.with_suffix(".running")
        if not self.resume:
            for left_over in (path, running):
                left_over.unlink(missing_ok=True)
        for attempt in range(4):
            left = max(deadline - time.monotonic(), 1.0)
            again = ["--resume"] if self.resume or attempt else []
            status, output = self.logged([*command, *minutes(left - MARGIN), *again], left, **variables)
            if status is None:
                at = " ".join(running.read_text().split()) if running.exists() else ""
                running.unlink(missing_ok=True)  # what had no time to end is not at fault
                return None, "; ended when its time was up" + f" at {at}" * bool(at)
            if status in (0, 1):
                return status, f"; lost its process {attempt} times on the way" if attempt else ""
            if status == 2:
                return status, f"; bad usage: {last_line(output)}"
        return status, f"; lost its process {attempt + 1} times, gave up: {last_line(output)}"


def run_process(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """Run `command`, its output appended to `log`; its exit status, or None if it was ended as its time was up."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # What it says arrives before it is ended, and pytest does not cut the reasons short.
    environ |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    with log.open("ab", buffering=0) as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        # A session of its own: whatever the process started ends with it.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Whatever it has started and left behind would be in the next part's way.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def minutes(seconds: float) -> list[str]:
    """As the commands take their time."""
    return ["--minutes", f"{max(seconds, 1.0) / 60:.2f}"]


def last_line(output: Sequence[str]) -> str:
    """The last that is not blank, shortened."""
    return next((line for line in reversed(output) if line.strip()), "no output").strip()[:150]
