"""docs/derivation.md: its formulas are run as they stand on the page, and held against autograd and the library."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from derivation_cases import (
    CASES,
    HEADINGS,
    PAGE,
    ROOT,
    SCOPE,
    TOLERANCE,
    B,
    H,
    I,
    K,
    T,
    array,
    assigned,
    draw,
    forward_case,
    groups,
    leaves,
    one_sequence,
    run,
    section,
    solved,
)

import lstm_triton as lt


def parsed(title: str) -> list[ast.Module]:
    return [ast.parse(source) for source in groups(title)]


@pytest.mark.native
def test_every_heading_has_its_test() -> None:
    with_formulas = [title for title in HEADINGS if "```python formulas\n" in section(title)]
    assert sorted(CASES) == sorted(with_formulas) and len(with_formulas) == 16
    assert [title for title in HEADINGS if "```python\n" in section(title)] == ["The same in NumPy"]
    others = set(HEADINGS) - set(CASES)
    assert others == {
        "How to read the formulas",
        "How fast it vanishes",  # test_numbers_of_the_figure, test_claims_of_the_figure
        "Where each line stands in the kernels",  # test_lines_stand_there
        "The same in NumPy",  # test_numpy_formulation
        "Orders and layouts",  # test_orders_and_layouts
        "Papers",  # test_papers
    }
    assert PAGE.count("```python formulas\n") == sum(len(re.findall("```python f", section(t))) for t in CASES)


@pytest.mark.native
@pytest.mark.parametrize("title", CASES)
def test_formulas(title: str) -> None:
    CASES[title]().check(parsed(title))


SHAPE = re.compile(r"\[([\dA-Z*]+(?:, [\dA-Z*]+)*)\]")


@pytest.mark.native
@pytest.mark.parametrize("title", CASES)
def test_shapes(title: str) -> None:
    """What the comments say: of what the line assigns, and of the factors of a product that they show."""
    names = CASES[title]().check(parsed(title))
    lines = [line for source in groups(title) for line in source.splitlines() if "#" in line]
    checked = 0
    for line in lines:
        formula, _, comment = line.partition("#")
        if not SHAPE.search(comment):
            continue
        found = []
        for name, by_entry in assigned(ast.parse(formula.strip())):
            value = names[name]
            found.append(np.shape(value[0] if by_entry or isinstance(value, dict) else value))
        factors, arrow, result = comment.rpartition("->")
        told = [
            tuple(eval(re.sub(r"(\d)([A-Z])", r"\1*\2", size), {}, dict(names)) for size in shape.split(", "))
            for shape in SHAPE.findall(result)
        ]
        assert found == (told if len(told) > 1 else told * len(found)), line
        for left, right in re.findall(r"(\S+)\] @ \[([^],]+)", factors):
            assert arrow and left == right, line
        checked += 1
    assert checked > 0


SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
RENAMED = {"sigmoid": "tanh", "tanh": "sigmoid", "exp": "cosh", "cosh": "exp", "diag": "tanh", "max": "sum"}


class Fault(ast.NodeTransformer):
    """The formulas with one thing changed: the `chosen`-th of what can be; `text` says what."""

    def __init__(self, chosen: int) -> None:
        self.left, self.text = chosen, ""

    def _here(self, node: ast.AST) -> bool:
        self.left -= 1
        if self.left == -1:
            self.text = f"line {node.lineno}: {ast.unparse(node)}"
        return self.left == -1

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Another operator, or of a matrix product the left factor."""
        self.generic_visit(node)
        if self._here(node):
            if isinstance(node.op, ast.MatMult):
                return node.left
            node.op = SWAPPED[type(node.op)]()
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        """No sign."""
        self.generic_visit(node)
        return node.operand if self._here(node) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """No transposition."""
        self.generic_visit(node)
        return node.value if node.attr == "T" and self._here(node) else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Another function, or the parts of a concatenation in the opposite order."""
        self.generic_visit(node)
        name = getattr(node.func, "id", "")
        if name in RENAMED and self._here(node):
            node.func.id = RENAMED[name]
        elif name == "concat" and self._here(node):
            node.args.reverse()
        return node


def faults(source: str) -> Iterator[tuple[str, ast.Module]]:
    """Each fault that can be planted in a group of formulas, one at a time."""
    for chosen in itertools.count():
        fault = Fault(chosen)
        changed = fault.visit(ast.parse(source))
        if not fault.text:
            return
        yield fault.text, changed


@pytest.mark.native
@pytest.mark.parametrize("title", CASES)
def test_faults_are_found(title: str) -> None:
    checks = CASES[title]()
    names, planted, unnoticed = checks.given, 0, []
    for source in groups(title):
        for text, changed in faults(source):
            planted += 1
            try:
                checks.check_next(changed, names)
            except Exception:  # a wrong shape or a missing entry is noticed too
                continue
            unnoticed.append(text)
        names = checks.check_next(ast.parse(source), names)  # unchanged it passes
    assert planted >= 3 and not unnoticed


@pytest.mark.native
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 4.0])
def test_bound_of_the_gradient(scale: float) -> None:
    """The inequalities of "Why the gradient vanishes", and its condition norm(W_hh) < 1."""
    title = "Why the gradient vanishes"
    names = one_sequence(scale).check(parsed(title))
    norm = SCOPE["norm"]
    assert all(norm(names["J"][t]) <= names["reach"][t] * (1 + 1e-12) for t in range(T))
    assert norm(names["P"]) <= names["bound"] * (1 + 1e-12)
    assert names["bound"] <= norm(names["W_hh"]) ** K * (1 + 1e-12)
    assert (norm(names["W_hh"]) < 1) == (scale < 0.5)


OPTIONS = {
    "rnn": ("rnn", "The RNN", "Back through the RNN"),
    "lstm": ("lstm", "The LSTM, gate by gate", "Back through the LSTM"),
    "peephole": ("lstm", "Peepholes", "Back through peepholes"),
    "coupled": ("lstm", "Coupled gates", "Back through coupled gates"),
    "gru after": ("gru", "The GRU that resets after the product", "Back through the GRU that resets after"),
    "gru before": ("gru", "The GRU that resets before the product", "Back through the GRU that resets before"),
}


@pytest.mark.both
@pytest.mark.parametrize("library", ["reference", "functional"])
@pytest.mark.parametrize("cell", OPTIONS)
def test_library_agrees(cell: str, library: str) -> None:
    """The page's forward and backward formulas, one after the other, and the library: interpreted kernels, or ATen."""
    function, forward, backward = OPTIONS[cell]
    p = leaves(cell)
    names = dict(forward_case(cell).given)
    outside = {name: value for name, value in solved(cell)[0].items() if name in ("dy", "dh_n", "dc_n")}
    names |= {"h": {-1: p["h0"].detach().numpy()}, **outside}
    if "c0" in p:
        names["c"] = {-1: p["c0"].detach().numpy()}
    after = [] if function == "gru" else parsed("One product for all time steps")
    for tree in [*parsed(forward), *parsed(backward), *after]:
        run(tree, names)
    if cell == "gru before":
        names["dW_hh"] = np.concatenate((names["dW_rz"], names["dW_n"]))  # row blocks of one matrix
    options: dict[str, Any] = {}
    peepholes = ("p_i", "p_f", "p_o") if cell == "peephole" else ()
    if peepholes:
        options["peephole"] = torch.stack([p[name] for name in peepholes])
    if cell == "coupled":
        options["coupled"] = True
    if cell == "gru before":
        options["reset_after"] = False
    order = [name for name in p if name not in peepholes]
    outputs = getattr(getattr(lt, library), function)(*(p[name] for name in order), **options)
    by_outputs = [torch.from_numpy(value) for value in outside.values()]
    gradients = torch.autograd.grad(outputs, list(p.values()), by_outputs)
    states = [array(names["h"]), names["h"][T - 1]] + ([names["c"][T - 1]] if "c" in names else [])
    found = [*states, *(names[f"d{name}"] for name in p)]
    found = [array(value) if isinstance(value, dict) else value for value in found]
    for mine, other in zip(found, [*outputs, *gradients], strict=True):
        assert np.abs(mine - other.detach().numpy()).max() <= TOLERANCE


@cache
def formulas() -> set[str]:
    """Every line of the page's formulas, without its comment."""
    lines = (line for title in CASES for source in groups(title) for line in source.splitlines())
    return {line.partition("#")[0].strip() for line in lines} - {""}


QUOTED = re.findall(
    r"\| here \| function in (\S+) \| its line \|\n\|[-|]+\|\n((?:\|.*\n)+)",
    section("Where each line stands in the kernels") + "\n",
)
QUOTES = [(file, *row.strip("| ").split(" | ")) for file, rows in QUOTED for row in rows.splitlines()]


@cache
def source_lines(file: str, function: str) -> list[str]:
    text = (ROOT / file).read_text()
    (found,) = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function]
    return [line.strip() for line in text.splitlines()[found.lineno : found.end_lineno]]


@pytest.mark.native
@pytest.mark.parametrize(("file", "formula", "function", "line"), QUOTES, ids=[f"{q[2]}-{q[1]}" for q in QUOTES])
def test_lines_stand_there(file: str, formula: str, function: str, line: str) -> None:
    assert formula.strip("`") in formulas()
    quoted = line.strip("`").split("`, `")
    assert not set(quoted) - set(source_lines(file, function.strip("`")))


@pytest.mark.native
def test_quotes_cover_the_cells() -> None:
    assert [file for file, _ in QUOTED] == ["kernels/cells.py", "kernels/activations.py", "lstm_triton/products.py"]
    assert len(QUOTES) == 51
    lstm = {"lstm_forward", "lstm_output", "lstm_backward_output", "lstm_backward"}
    gru = {"gru_forward", "gru_backward", "gru_reset", "gru_update", "gru_update_backward", "gru_reset_backward"}
    of_cells = {quote[2].strip("`") for quote in QUOTES if quote[0] == "kernels/cells.py"}
    assert of_cells == lstm | gru | {"rnn_forward", "rnn_backward"}
    for file, function in (("backward", "sequence_backward"), ("forward", "sequence_forward")):
        assert f"`{function}`" in PAGE and source_lines(f"kernels/{file}.py", function)


@pytest.mark.native
def test_numpy_formulation() -> None:
    """The functions of "The same in NumPy" against autograd; test_docs runs their comparison with the library."""
    block = re.search(r"^```python\n(.*?)^```$", section("The same in NumPy"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block[1], "docs/derivation.md", "exec"), names)
    values, _ = solved("lstm")
    shapes = {"x": (B, T, I), "h0": (B, H), "Wx": (I, 4 * H), "Wh": (H, 4 * H), "b": (4 * H,)}
    p = {name: draw(seed, *shape).requires_grad_() for seed, (name, shape) in enumerate(shapes.items())}
    h, saved = names["lstm_forward"](*(value.detach().numpy() for value in p.values()))
    state, c, outputs = p["h0"], torch.zeros(B, H, dtype=torch.float64), []
    for t in range(T):
        a_i, a_f, a_o, a_g = (p["x"][:, t] @ p["Wx"] + state @ p["Wh"] + p["b"]).chunk(4, 1)
        c = torch.sigmoid(a_f) * c + torch.sigmoid(a_i) * torch.tanh(a_g)
        state = torch.sigmoid(a_o) * torch.tanh(c)
        outputs.append(state)
    y = torch.stack(outputs, 1)
    dy = torch.from_numpy(values["dy"].swapaxes(0, 1).copy())
    wanted = [y, *torch.autograd.grad(y, list(p.values()), dy)]
    for mine, other in zip([h, *names["lstm_backward"](dy.numpy(), saved)], wanted, strict=True):
        assert np.abs(mine - other.detach().numpy()).max() <= TOLERANCE


@pytest.mark.native
def test_orders_and_layouts() -> None:
    """Numbers that say where they are, through lt.convert and back."""
    rows = [row.strip("|").split("|") for row in re.findall(r"^\|.*\|$", section("Orders and layouts"), re.MULTILINE)]
    rows = [[cell.strip().replace("\\", "") for cell in row] for row in rows[2:]]
    assert [row[-1].strip('"') for row in rows] == ["torch", "lstm_triton", "keras", "onnx", "cs231n"]
    for _, _, lstm, gru, w_ih, w_hh, biases, source in rows:
        source = source.strip('"')
        for cell, theirs, ours in (("lstm", lstm, "ifgo"), ("gru", gru, "rzn")):
            if not theirs:
                with pytest.raises(ValueError, match="has the cells"):
                    lt.convert.weights([np.zeros((I, 3 * H))] * 2, source, cell)
                continue
            G = len(ours)
            tensors = {
                "weight_ih": torch.arange(G * H, dtype=torch.float64)[:, None].repeat(1, I),
                "weight_hh": torch.arange(G * H, dtype=torch.float64)[:, None].repeat(1, H),
                "bias_ih": torch.arange(G * H, dtype=torch.float64),
                "bias_hh": torch.zeros(G * H, dtype=torch.float64),
            }
            arrays = lt.convert.to(tensors, source, cell)
            arrays = [np.asarray(a) for a in (arrays.values() if isinstance(arrays, dict) else arrays) if a is not None]
            sizes = {"G": G, "H": H, "I": I}
            shapes = [tuple(eval(shape.replace("[", "(").replace("]", ",)"), sizes)) for shape in (w_ih, w_hh)]
            assert [a.shape for a in arrays[:2]] == shapes
            by_row = arrays[0].reshape(G * H, I) if arrays[0].shape[-1] == I else arrays[0].T
            gates = [int(number) // H for number in by_row[::H, 0]]
            assert " ".join(ours[gate] for gate in gates) == theirs
            if cell == "lstm":
                count, shape = re.fullmatch(r"(one|two) of (\[.*\])", biases).groups()
                assert [a.shape for a in arrays[2:]] == [np.empty(eval(shape, sizes)).shape] * {"one": 1, "two": 2}[
                    count
                ]


@pytest.mark.native
def test_papers() -> None:
    """Those and only those that the page cites, in alphabetical order."""
    listed = re.findall(r"^- (\w+).*?(\d{4})$", section("Papers").replace("\n  ", " "), re.MULTILINE)
    assert listed == sorted(listed)
    text = " ".join(PAGE.partition("\n## Papers\n")[0].split())
    cited = {(name, year) for name, year in re.findall(r"([A-Z]\w+)(?: et al\.| and [A-Z]\w+)?,? \(?(\d{4})", text)}
    assert cited == set(listed)
