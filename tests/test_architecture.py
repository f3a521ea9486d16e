"""The one-way rule of the imports, read from the sources, and no path of anybody's machine in the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lstm_triton"
FOLDERS = {f"{PACKAGE}.kernels": ROOT / "kernels", PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.perf": ROOT / "perf"}

# what each module of the package may import of the package; kernels are one unit
ALLOWED = {
    "spec": set(),
    "transforms": set(),
    "devices": set(),
    "costs": {"devices"},
    "tuning": {"devices"},
    "plans": {"spec", "devices"},
    "planner": {"spec", "devices", "costs", "plans", "tuning"},
    "philox": set(),
    "reference": {"spec", "philox"},
    "constexprs": {"spec", "plans", "kernels"},
    "launch": {"constexprs", "devices", "plans", "kernels"},
    "products": {"spec", "reference", "constexprs"},
    "ops": {"spec", "plans", "planner", "reference", "constexprs", "launch", "products", "transforms"},
    "autograd": {"spec", "reference", "products", "ops", "transforms"},
    "host": {"spec", "reference", "transforms"},
    "calls": {"spec", "planner", "reference", "launch", "autograd", "host"},
    "functional": {"spec", "devices", "plans", "planner", "reference", "ops", "calls"},
    "registry": {"spec", "devices", "planner", "reference", "constexprs", "launch", "functional"},
    "ragged": set(),
    "checks": set(),
    "layer_options": {"spec"},
    "layer_base": {"spec", "reference", "calls", "functional", "ragged", "checks", "layer_options"},
    "modules": {"spec", "checks", "layer_options", "layer_base"},
    "cell_modules": {"spec", "calls", "functional", "modules", "checks"},
    "weights": {"spec"},
    "convert": {"modules", "cell_modules", "weights"},
    "__init__": {"spec", "planner", "reference", "functional", "modules", "cell_modules", "convert", "registry"},
}


def imported(path: Path, module: str) -> set[str]:
    """Absolute names of everything a file imports, anywhere in it; `from a import b` gives a and a.b."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def modules(package: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDERS[package].glob("*.py"))}


def qualified(package: str, stem: str) -> str:
    return package if stem == "__init__" else f"{package}.{stem}"


def of_package(names: set[str]) -> set[str]:
    """The package's own modules among imported names: `lstm_triton.launch.compile_ahead` gives launch."""
    return {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}


@pytest.mark.parametrize("stem", modules(f"{PACKAGE}.kernels"))
def test_kernels_import_triton_alone(stem: str) -> None:
    package = f"{PACKAGE}.kernels"
    names = imported(modules(package)[stem], qualified(package, stem))
    foreign = {n for n in names if n.split(".")[0] not in ("triton", "typing") and not n.startswith(package)}
    assert not foreign


@pytest.mark.parametrize("stem", modules(PACKAGE))
def test_package_imports_downwards_only(stem: str) -> None:
    assert stem in ALLOWED, f"{stem}.py has no place in the layering yet"
    known = ALLOWED.keys() | {"kernels", "perf"}
    names = imported(modules(PACKAGE)[stem], qualified(PACKAGE, stem))
    # `from . import x` may also name a function; only modules are held to the rule
    assert of_package(names) & known <= ALLOWED[stem]
    assert not {n for n in names if n.split(".")[0] in ("tests", "perf", "kernels")}


def test_few_import_kernels() -> None:
    """What is told them, their launch, and the probe, for the waiting protocol that it times."""
    importers = {
        qualified(package, stem)
        for package in (PACKAGE, f"{PACKAGE}.perf")
        for stem, path in modules(package).items()
        if "kernels" in of_package(imported(path, qualified(package, stem)))
    }
    assert importers == {f"{PACKAGE}.constexprs", f"{PACKAGE}.launch", f"{PACKAGE}.perf.probe_kernels"}


@pytest.mark.both
def test_device_code_stays_short() -> None:
    """What CONTRIBUTING.md says of it, and the README."""
    lines = {path.name: len(path.read_text().splitlines()) for path in sorted((ROOT / "kernels").glob("*.py"))}
    assert max(lines.values()) <= 420 and sum(lines.values()) <= 1800, lines


def test_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    source = "import a.b\nfrom .c import d\nfrom . import e\ndef f():\n    from ..g import h\n"
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imported(path, "p.q.module") == {"a.b", "p.q.c", "p.q.c.d", "p.q", "p.q.e", "p.g", "p.g.h"}
    init = tmp_path / "__init__.py"
    init.write_text("from .c import d\nfrom ..g import h\n")
    assert imported(init, "p.q") == {"p.q.c", "p.q.c.d", "p.g", "p.g.h"}


def test_spec_needs_nothing_but_python() -> None:
    names = imported(ROOT / PACKAGE / "spec.py", f"{PACKAGE}.spec")
    assert all(name.split(".")[0] in sys.stdlib_module_names for name in names)


def test_no_machine_path_in_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    assert listed.returncode == 0, listed.stderr.decode()
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert len(paths) > 10
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|work|workspace|mnt)/\w")
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in paths
        if path.is_file() and path != Path(__file__) and (match := home.search(path.read_text(errors="ignore")))
    }
    assert not found
