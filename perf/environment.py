"""What a result was measured on: the part of a measurement that a number alone does not carry."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import lstm_triton

#: Columns that go with every row of a result; the rest is in environment.json beside it.
COLUMNS = ("device", "driver", "torch", "triton", "cudnn", "commit", "dirty", "source", "date")


def collect(device: str) -> dict[str, object]:
    """Versions, hardware and the state of the sources, for "cuda" or "cpu"."""
    import torch
    import triton

    found: dict[str, object] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": "none",
        "driver": "none",
        "lstm_triton": lstm_triton.__version__,
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "source": source_hash(),
        **commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "sms": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cudnn": str(torch.backends.cudnn.version()),
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
            "clocks": _run("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"),
        }
    else:
        found["device"] = f"CPU, {found['cpus']} cores"
    return found


def source_hash() -> str:
    """Twelve hex digits over the text of the installed package: the same for the same code, with git or without."""
    digest = hashlib.sha256()
    for name, file in sorted(_sources()):
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> dict[str, object]:
    """The commit the sources are at and whether they differ from it; "none" where they are not under git."""
    root = Path(lstm_triton.__file__).parent
    # A site-packages folder inside some other repository is not that repository's code.
    if not _run("git", "-C", str(root), "ls-files", "spec.py"):
        return {"commit": "none", "dirty": False}
    head = _run("git", "-C", str(root), "rev-parse", "--verify", "-q", "HEAD")
    folders = [str(folder) for folder in _folders().values()]
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--", *folders, ":(exclude,top)*results/*")
    return {"commit": head[:12] or "none", "dirty": bool(changed)}


def write(found: dict[str, object], folder: Path) -> None:
    """Put environment.json beside the result."""
    (folder / "environment.json").write_text(json.dumps(found, indent=2) + "\n")


def summary(found: dict[str, object]) -> str:
    """One line for the head of a report."""
    state = f"{found['commit']}{' (changed)' if found['dirty'] else ''}, source {found['source']}"
    versions = f"torch {found['torch']}, triton {found['triton']}, cuDNN {found['cudnn']}, Python {found['python']}"
    return f"{found['device']}, driver {found['driver']}; {versions}; commit {state}; {found['date']}"


def _folders() -> dict[str, Path]:
    return {
        "lstm_triton": Path(lstm_triton.__file__).parent,
        "kernels": Path(find_spec("lstm_triton.kernels").origin).parent,
        "perf": Path(__file__).parent,
    }


def _sources() -> list[tuple[str, Path]]:
    return [
        (f"{name}/{file.relative_to(folder).as_posix()}", file)
        for name, folder in _folders().items()
        for file in folder.rglob("*")
        # An installed package holds the other two; where they lie does not matter.
        if file.suffix in (".py", ".json") and file.relative_to(folder).parts[0] not in ("kernels", "perf", "results")
    ]


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
