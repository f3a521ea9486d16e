"""What a wheel holds, and that it works where the repository is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "README.md", "LICENSE", "lstm_triton", "kernels", "perf")

USE = """
import torch, lstm_triton as lt
layer = lt.LSTM(3, 5, num_layers=2, bidirectional=True)
y, (h, c) = layer(torch.randn(4, 2, 3))
y.sum().backward()
assert y.shape == (4, 2, 10) and layer.weight_hh_l0.grad is not None
print(lt.__file__)
"""


def run(*command: object, **options: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that setuptools' build folder does not land in the repository."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / part, source / part)
    run(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-w", target)
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lstm_triton"}
    for folder in ("lstm_triton", "kernels", "perf"):
        installed = "lstm_triton" if folder == "lstm_triton" else f"lstm_triton/{folder}"
        expected = {f"{installed}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert expected
        assert expected <= names
    tuned = {f"lstm_triton/tuned/{path.name}" for path in (ROOT / "lstm_triton" / "tuned").glob("*.json")}
    assert tuned
    assert tuned | {"lstm_triton/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel)
    assert not (site / "kernels").exists()
    assert not (site / "perf").exists()
    for interpret in ("0", "1"):
        environment = os.environ | {"PYTHONPATH": str(site), "TRITON_INTERPRET": interpret}
        where = run(sys.executable, "-c", USE, cwd=tmp_path, env=environment).strip()
        assert Path(where).is_relative_to(site)
    run(sys.executable, "-m", "lstm_triton.perf", "--help", cwd=tmp_path, env=environment)


def test_wheel_names_its_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    requirements = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    bare = {line for line in requirements if "extra ==" not in line}
    assert any(line.startswith("torch>=") for line in bare)
    assert any(line.startswith("triton>=") for line in bare)
    # a pin above would break whoever installs a newer PyTorch
    assert not any("<" in line or "==" in line for line in bare)
    assert "License-Expression: Apache-2.0" in metadata
