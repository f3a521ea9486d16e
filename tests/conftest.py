"""Chooses, before Triton is imported, whether this process interprets kernels, and which tests fit that choice.

Triton decides once for each process, so the suite is run twice, as `make test` does:

    TRITON_INTERPRET=1 pytest   (or plain `pytest`) tests without a marker and those marked `both`: kernels interpreted
    TRITON_INTERPRET=0 pytest   tests marked `native` and those marked `both`: ATen, ahead-of-time compilation
    pytest -m gpu               on a machine with a CUDA device: the kernels themselves
"""

from __future__ import annotations

import os

import pytest

MARKERS = {
    "native": "needs a process without Triton's interpreter: runs with TRITON_INTERPRET=0 only",
    "both": "runs with Triton's interpreter and without",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--configurations", type=int, help="how many layers test_random_configurations draws")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if _for_gpu(config):
        os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    # PyTorch's own test tools call this at import, and no test after that could set a flag such as cudnn.allow_tf32
    torch.backends.disable_global_flags = lambda: None
    # one thread for each xdist worker: tiny tensors, and as many workers as cores
    torch.set_num_threads(1)
    if _interpreting():
        from lstm_triton.perf.interpreting import take_shortcuts

        take_shortcuts()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if _for_gpu(config):
        if not torch.cuda.is_available():
            for item in items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))
        return
    kept = [item for item in items if _fits(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _fits(item)])
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _for_gpu(config):
        return
    if _interpreting():
        rest = "Tests of ATen and of compiled kernels were not among these: TRITON_INTERPRET=0 pytest"
    else:
        rest = "Tests on interpreted kernels were not among these: TRITON_INTERPRET=1 pytest"
    terminalreporter.write_line(f"{rest}. Those that need a GPU: pytest -m gpu. `make test` runs all but these last.")


def _for_gpu(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr")
    return "gpu" in expression and "not gpu" not in expression


def _interpreting() -> bool:
    return os.environ["TRITON_INTERPRET"] == "1"


def _fits(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu"):
        return False
    if item.get_closest_marker("native"):  # of one test, also where its file is marked `both`
        return not _interpreting()
    return _interpreting() or item.get_closest_marker("both") is not None
