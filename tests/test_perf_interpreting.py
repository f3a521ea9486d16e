"""The shortcuts through Triton's interpreter change no bit: in a process of its own, which has not taken them yet."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import torch
from cell_problems import CellProblem

import lstm_triton as lt
from lstm_triton.spec import CellSpec

#: Products, draws of unsigned integers, sums of rows, nested device functions, 16 bits, skipped steps.
PROBLEMS = (
    CellProblem(CellSpec("lstm", peephole=True, layer_norm=True, zoneout=(0.3, 0.2), proj=3), 2, seed=7, skips=True),
    CellProblem(CellSpec("gru", "softplus", reset_after=False, gate_clip=0.8), 2, dtype=torch.float16),
    CellProblem(CellSpec("rnn", "relu"), 2, masks=1, dtype=torch.float64),
)


def digests() -> list[str]:
    """Of results and gradients of each problem on two engines, all bits."""
    found = []
    for problem in PROBLEMS:
        for engine in ("local", "step"):
            tensors = problem.differentiate(lt.functional, problem.tensors(), engine=engine)
            found.append(hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors.values())).hexdigest())
    return found


def main() -> None:
    from lstm_triton.perf.interpreting import take_shortcuts
    from triton.runtime import interpreter

    plain = digests()
    patch = interpreter._patch_lang
    take_shortcuts()
    assert interpreter._patch_lang is not patch
    assert digests() == plain
    take_shortcuts()  # again, as a second command in one process would
    assert digests() == plain
    print(len(set(plain)))


def test_shortcuts_change_no_bit() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(PROBLEMS)


if __name__ == "__main__":
    main()
