"""The oldest and the newest Triton supported, each in a folder of its own put before this environment's packages."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIDE = ROOT / ".venv-triton"
# Triton 3.6's interpreter fails on run-time loop bounds with NumPy 2.4
ENVIRONMENTS = {"3.6.0": ("triton==3.6.0", "numpy<2.4"), "3.9.0": ("triton==3.9.0",)}


@pytest.fixture(params=ENVIRONMENTS)
def side(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """(version, folder) of one Triton, downloaded once and kept; workers that ask at the same time wait."""
    version = request.param
    name = f"{version}-{sys.implementation.cache_tag}"
    folder = SIDE / name
    SIDE.mkdir(exist_ok=True)
    with open(SIDE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            made = subprocess.run([*command, *ENVIRONMENTS[version]], capture_output=True, text=True)
            assert made.returncode == 0, made.stdout + made.stderr
            (folder / "complete").touch()
    return version, folder


@pytest.mark.parametrize("what", ["compile", "interpret"])
def test_other_triton(side: tuple[str, Path], what: str) -> None:
    version, folder = side
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TRITON_INTERPRET": "1" if what == "interpret" else "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    script = Path(__file__).with_name("side_environment.py")
    result = subprocess.run([sys.executable, script, what], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == [version]
