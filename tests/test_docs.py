"""The pages that users read: their examples run, their tables count what the code does, their links lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lstm_triton as lt
from lstm_triton.modules import OPTIONS, spec_of
from lstm_triton.spec import ACTIVATIONS, activation_of

ROOT = Path(__file__).parent.parent
CELLS = (ROOT / "docs" / "cells.md").read_text()
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
]
#: But docs/adding-a-cell.md, whose device functions have to stand in a file: test_registry.py runs it as one.
EXAMPLES = [page for page in PAGES if "```python\n" in (ROOT / page).read_text() and page != "docs/adding-a-cell.md"]


def section(title: str) -> str:
    """Of docs/cells.md."""
    return CELLS.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_pages_with_examples() -> None:
    assert EXAMPLES == ["README.md", "docs/cells.md", "docs/derivation.md", "docs/drop-in.md", "docs/kernels.md"]


@pytest.mark.native
@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page: str) -> None:
    """As they stand and in their order, on the CPU where they name a GPU's tensors."""
    text = (ROOT / page).read_text()
    names: dict[str, object] = {} if page != "docs/drop-in.md" else {"lt": lt, "model": nn.Sequential(nn.LSTM(3, 5))}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        source = block[1].replace('device="cuda"', 'device="cpu"')
        lines_before = "\n" * text[: block.start(1)].count("\n")  # so that a traceback names the page's own line
        exec(compile(lines_before + source, page, "exec"), names)


@pytest.mark.both
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (ROOT / page).parent / name if name else ROOT / page
        assert other.exists(), target
        if other.suffix != ".md":
            continue
        titles = [
            title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
        ]
        assert not anchor or anchor in titles, target


@pytest.mark.both
def test_every_option_and_activation_is_told() -> None:
    for name in OPTIONS:
        assert re.search(rf"`{name}\b", CELLS), name
    told: dict[str, list[float]] = {}
    for first, last in re.findall(r'^\| (".*?) \| .* \|(.*)\|$', section("Activations"), re.MULTILINE):
        defaults = [float(number) for number in last.split(",") if number.strip()]
        told |= {name: [*defaults, 0.0, 0.0][:2] for name in re.findall(r'"(\w+)"', first)}
    assert told == {name: list(activation_of(name)[1:]) for name in ACTIVATIONS}


@pytest.mark.both
def test_parameters_are_called_so() -> None:
    layers = [lt.LSTM(3, 5, peephole=True, layer_norm=True), lt.LSTM(3, 5, coupled=True)]
    held = set().union(*(layer.state_dict() for layer in layers))
    arguments = inspect.signature(lt.functional.lstm).parameters
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", section("Parameters"), re.MULTILINE)
    assert len(rows) == 6
    for option, parameters, of_functions in rows:
        assert option in OPTIONS
        assert set(re.findall(r"`(\w+(?:\.weight)?)`", parameters)) <= held
        assert set(re.findall(r"`(\w+)", of_functions)) <= set(arguments)


COSTS = re.findall(r"^\| `(lt\..*)` \| (\d+) \| (\d+) \| (\d+) \|$", section("What it costs"), re.MULTILINE)


def kept(layer: nn.Module, steps: int) -> int:
    """Numbers that training keeps on the kernels, inputs and parameters left out."""
    x = torch.zeros(steps, 2, layer.input_size, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = layer(x)
    numbers = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() // 4 for t in saved}
    for t in (x, *layer.parameters()):
        numbers.pop(t.untyped_storage()._cdata, None)
    assert output[0].requires_grad
    return sum(numbers.values())


@pytest.mark.parametrize(("layer", "waits", "store", "recompute"), COSTS, ids=[row[0] for row in COSTS])
def test_costs(layer: str, waits: str, store: str, recompute: str) -> None:
    H = 16
    for memory, expected in (("store", store), ("recompute", recompute)):
        made = eval(layer.replace(")", f", memory={memory!r}, engine='local')"), {"lt": lt, "I": 3, "H": H})
        assert spec_of(made).waits == int(waits)
        a_step = (kept(made, 2) - kept(made, 1)) / (2 * H)
        # beside them, of layer_norm, means and deviations: six numbers a row
        assert int(expected) <= a_step <= int(expected) + 6 / H


@pytest.mark.both
def test_costs_are_of_every_cell() -> None:
    assert len(COSTS) == 13 and {row[0].partition("(")[0] for row in COSTS} == {"lt.LSTM", "lt.GRU", "lt.RNN"}
