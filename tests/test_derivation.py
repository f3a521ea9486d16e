"""docs/derivation.md: its formulas are run as they stand on the page, and held against autograd and the library.

The plain forward equations are written once more here, in torch, and know nothing of the library. `Case.values` has
every quantity of them by the page's name, and, with a d before it, the gradient by it that autograd finds.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lstm_triton as lt

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "derivation.md").read_text()
HEADINGS = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
TOLERANCE = 1e-10

T, B, I, H, K = 5, 3, 2, 4, 3  # noqa: E741


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def groups(title: str) -> list[str]:
    """A section's formulas; a block that begins indented goes on with the loop of the one before.

    Each with as many empty lines before and within it as puts every formula on its line of the page.
    """
    found: list[str] = []
    start = PAGE.index(f"\n## {title}\n")
    for block in re.finditer(r"^```python formulas\n(.*?)^```$", section(title), re.MULTILINE | re.DOTALL):
        at = PAGE[:start].count("\n") + section(title)[: block.start(1)].count("\n") + 2
        if block[1].startswith(" "):
            found[-1] += "\n" * (at - found[-1].count("\n")) + block[1]
        else:
            found.append("\n" * at + block[1])
    return found


SCOPE: dict[str, Any] = {
    "exp": np.exp,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "split": lambda a, parts: np.split(a, parts, axis=-1),
    "concat": lambda *parts: np.concatenate(parts, axis=-1),
    "stack": lambda parts: np.stack(list(parts)),
    "rows": lambda a: a.reshape(-1, a.shape[-1]),
    "diag": np.diag,
    "eye": np.eye,
    "norm": lambda a: np.linalg.norm(a, 2),
    "prod": math.prod,
}


def assigned(tree: ast.AST) -> list[tuple[str, bool]]:
    """The names that formulas assign, and whether entry by entry."""
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                    by_entry = isinstance(one, ast.Subscript)
                    found.append(((one.value if by_entry else one).id, by_entry))
    return found


def run(tree: ast.Module, names: dict[str, Any]) -> set[str]:
    """Formulas, in `names`, where those that are assigned by entry are dicts; which they assign."""
    found = assigned(tree)
    for name, by_entry in found:
        if by_entry:
            names.setdefault(name, {})
    names |= SCOPE
    exec(compile(tree, "docs/derivation.md", "exec"), names)
    return {name for name, _ in found}


def array(entries: dict[Any, Any]) -> np.ndarray:
    """[T, ...] of entries by t, or a matrix of entries by row and column."""
    keys = [key for key in entries if key != -1]
    if isinstance(keys[0], tuple):
        found = np.empty(tuple(np.array(keys).max(0) + 1))
        for key in keys:
            found[key] = entries[key]
        return found
    assert sorted(keys) == list(range(len(keys)))
    return np.stack([entries[key] for key in range(len(keys))])


def compare(found: set[str], names: dict[str, Any], values: dict[str, Any]) -> None:
    """Each of the names found, with what it has to be."""
    assert found
    for name in found:
        ours, wanted = (array(v) if isinstance(v, dict) else np.asarray(v) for v in (names[name], values[name]))
        assert ours.shape == wanted.shape, name
        assert np.abs(ours - wanted).max() <= TOLERANCE * max(1.0, np.abs(wanted).max()), name


@dataclass(frozen=True)
class Case:
    given: dict[str, Any]  # what the formulas may read
    values: dict[str, Any]  # what they have to find

    def check(self, trees: list[ast.Module]) -> dict[str, Any]:
        """Run all of a section's formulas, and compare after each group; what is known then."""
        names = self.given
        for tree in trees:
            names = self.check_next(tree, names)
        return names

    def check_next(self, tree: ast.Module, before: dict[str, Any]) -> dict[str, Any]:
        """Run and compare one group; `before` stays as it is."""
        names = {name: dict(value) if isinstance(value, dict) else value for name, value in before.items()}
        with np.errstate(all="ignore"):
            compare(run(tree, names), names, self.values)
        return names


CASES: dict[str, Callable[[], Case]] = {}


def case(title: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register what the formulas under a heading are held against."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        CASES[title] = cache(make)
        return CASES[title]

    return register


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


#: Gates of each cell.
GATES = {"rnn": 1, "lstm": 4, "peephole": 4, "coupled": 3, "gru after": 3, "gru before": 3}


def leaves(cell: str) -> dict[str, Tensor]:
    G = GATES[cell]
    shapes = {
        "x": (T, B, I), "h0": (B, H), "c0": (B, H), "W_ih": (G * H, I), "W_hh": (G * H, H), "b_ih": (G * H,),
        "b_hh": (G * H,), "p_i": (H,), "p_f": (H,), "p_o": (H,),
    }  # fmt: skip
    if not has_cells(cell):
        del shapes["c0"]
    if cell != "peephole":
        del shapes["p_i"], shapes["p_f"], shapes["p_o"]
    return {name: draw(seed, *shape).requires_grad_() for seed, (name, shape) in enumerate(shapes.items())}


def has_cells(cell: str) -> bool:
    return cell in ("lstm", "peephole", "coupled")


def one_step(cell: str, p: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor | None) -> dict[str, Tensor]:
    """The plain equations: everything that a step computes, by the page's names."""
    by_x, by_h = x @ p["W_ih"].T + p["b_ih"], h @ p["W_hh"].T + p["b_hh"]
    if cell == "rnn":
        a = by_x + by_h
        return {"a": a, "h": torch.tanh(a)}
    if cell == "gru after":
        u_r, u_z, u_n = by_x.chunk(3, -1)
        v_r, v_z, v_n = by_h.chunk(3, -1)
        a_r, a_z, a_n = u_r + v_r, u_z + v_z, None
        r, z = torch.sigmoid(a_r), torch.sigmoid(a_z)
        a_n = u_n + r * v_n
        n = torch.tanh(a_n)
        found = {"u": by_x, "v": by_h, "u_r": u_r, "u_z": u_z, "u_n": u_n, "v_r": v_r, "v_z": v_z, "v_n": v_n}
        return found | {"a_r": a_r, "a_z": a_z, "a_n": a_n, "r": r, "z": z, "n": n, "h": (1 - z) * n + z * h}
    if cell == "gru before":
        u_r, u_z, u_n = by_x.chunk(3, -1)
        v_r, v_z = (h @ p["W_hh"][: 2 * H].T + p["b_hh"][: 2 * H]).chunk(2, -1)
        a_r, a_z = u_r + v_r, u_z + v_z
        r, z = torch.sigmoid(a_r), torch.sigmoid(a_z)
        s = r * h
        a_n = u_n + s @ p["W_hh"][2 * H :].T + p["b_hh"][2 * H :]
        n = torch.tanh(a_n)
        found = {"u": by_x, "u_r": u_r, "u_z": u_z, "u_n": u_n, "v_r": v_r, "v_z": v_z, "s": s}
        return found | {"a_r": a_r, "a_z": a_z, "a_n": a_n, "r": r, "z": z, "n": n, "h": (1 - z) * n + z * h}
    a = by_x + by_h
    q = dict(zip("igo" if cell == "coupled" else "ifgo", a.chunk(GATES[cell], -1), strict=True))
    found = {"a": a} | {f"q_{name}": part for name, part in q.items()}
    peephole = cell == "peephole"
    a_i = q["i"] + p["p_i"] * c if peephole else q["i"]
    a_f = None if cell == "coupled" else q["f"] + p["p_f"] * c if peephole else q["f"]
    i, g = torch.sigmoid(a_i), torch.tanh(q["g"])
    f = 1 - i if cell == "coupled" else torch.sigmoid(a_f)
    c = f * c + i * g
    a_o = q["o"] + p["p_o"] * c if peephole else q["o"]
    o = torch.sigmoid(a_o)
    found |= {"a_i": a_i, "a_g": q["g"], "a_o": a_o, "i": i, "f": f, "g": g, "c": c, "o": o, "h": o * torch.tanh(c)}
    return found if a_f is None else found | {"a_f": a_f}


@cache
def solved(cell: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quantities of a sequence by name, leaves as arrays and others by step; and the gradients by all of them."""
    p = leaves(cell)
    h, c = p["h0"], p.get("c0")
    taken: dict[str, list[Tensor]] = {}
    for t in range(T):
        made = one_step(cell, p, p["x"][t], h, c)
        h, c = made["h"], made.get("c")
        for name, value in made.items():
            taken.setdefault(name, []).append(value)
    outside = {"dy": draw(20, T, B, H), "dh_n": draw(21, B, H)} | ({"dc_n": draw(22, B, H)} if has_cells(cell) else {})
    loss = (torch.stack(taken["h"]) * outside["dy"]).sum() + (h * outside["dh_n"]).sum()
    if c is not None:
        loss = loss + (c * outside["dc_n"]).sum()
    flat = [*p.values(), *(value for values in taken.values() for value in values)]
    gradients = iter([g.numpy() for g in torch.autograd.grad(loss, flat)])
    by_name: dict[str, Any] = {f"d{name}": next(gradients) for name in p}
    by_name |= {f"d{name}": {t: next(gradients) for t in range(T)} for name in taken}
    values: dict[str, Any] = {name: value.detach().numpy() for name, value in (p | outside).items()}
    values |= {name: {t: v.detach().numpy() for t, v in enumerate(found)} for name, found in taken.items()}
    values["h"][-1] = values["h0"]
    if c is not None:
        values["c"][-1] = values["c0"]
    # the loops' carried gradients end as those by the first states
    by_name["dh_next"] = by_name["dh0"]
    if c is not None:
        by_name["dc_next"] = by_name["dc0"]
    return values, by_name


SIZES = {"T": T, "B": B, "I": I, "H": H, "k": K}
INPUTS = ("x", "W_ih", "W_hh", "b_ih", "b_hh", "p_i", "p_f", "p_o")


def forward_case(cell: str) -> Case:
    """Given the inputs and the first states. What is no entry by step is compared as the last step leaves it."""
    values, _ = solved(cell)
    states = {name: {-1: values[name][-1]} for name in ("h", "c") if name in values}
    given = SIZES | {"G": GATES[cell]} | {name: values[name] for name in INPUTS if name in values} | states
    return Case(given, values | named_parts(values))


def named_parts(values: dict[str, Any]) -> dict[str, Any]:
    """What the page names for one step, or cuts out of the weights."""
    names = [name for name in values if re.fullmatch("[quv]_[a-z]", name) and name != "v_n"]
    parts = {name: values[name][T - 1] for name in names}
    for name, whole in (("W", values["W_hh"]), ("b", values["b_hh"])):
        parts |= {f"{name}_rz": whole[: 2 * H], f"{name}_n": whole[2 * H :]}
    return parts


def backward_case(cell: str) -> Case:
    """Given what forward found, and the gradients from outside."""
    values, gradients = solved(cell)
    wanted = gradients | {name: part for name, part in named_parts(values).items() if name in ("W_rz", "W_n")}
    wanted |= {"dW_rz": gradients["dW_hh"][: 2 * H], "dW_n": gradients["dW_hh"][2 * H :]}
    if cell == "gru before":  # the gradients by all three pre-activations, one beside the other
        wanted["da"] = gradients["du"]
    return Case(SIZES | {"G": GATES[cell]} | values, wanted)


for title, name in {
    "RNN": "rnn",
    "LSTM": "lstm",
    "GRU that resets after": "gru after",
    "GRU that resets before": "gru before",
}.items():
    case(f"Back through the {title}")(lambda name=name: backward_case(name))
case("The RNN")(lambda: forward_case("rnn"))
case("The LSTM, gate by gate")(lambda: forward_case("lstm"))
case("Peepholes")(lambda: forward_case("peephole"))
case("Back through peepholes")(lambda: backward_case("peephole"))
case("Coupled gates")(lambda: forward_case("coupled"))
case("Back through coupled gates")(lambda: backward_case("coupled"))
case("The GRU that resets after the product")(lambda: forward_case("gru after"))
case("The GRU that resets before the product")(lambda: forward_case("gru before"))


@case("Four derivatives")
def _() -> Case:
    N = 6
    shapes = {"a": (B, H), "q": (B, H), "u": (B, H), "v": (B, H), "x": (B, I), "W": (N, I), "bias": (N,)}
    read = {name: draw(seed, *shape).requires_grad_() for seed, (name, shape) in enumerate(shapes.items())}
    made = {
        "s": torch.sigmoid(read["a"]),
        "y": torch.tanh(read["q"]),
        "p": read["u"] * read["v"],
        "m": torch.nn.functional.linear(read["x"], read["W"], read["bias"]),
    }
    outside = {f"d{name}": draw(10 + i, *value.shape) for i, (name, value) in enumerate(made.items())}
    loss = sum((made[name] * outside[f"d{name}"]).sum() for name in made)
    found = dict(zip([f"d{name}" for name in read], torch.autograd.grad(loss, list(read.values())), strict=True))
    made |= {"ds_da": found["da"] / outside["ds"], "dy_dq": found["dq"] / outside["dy"]}
    given = {name: value.detach().numpy() for name, value in (read | outside).items()}
    return Case(given | SIZES | {"N": N}, {name: value.detach().numpy() for name, value in (made | found).items()})


@case("Why the gradient vanishes")
def _() -> Case:
    """One sequence: the first row of the batch. The Jacobians are torch's, of the plain equations."""
    return one_sequence(1.0)


def one_sequence(scale: float) -> Case:
    p = {name: value.detach() for name, value in leaves("rnn").items()}
    p["W_hh"] = p["W_hh"] * scale

    def forward(h: Tensor, first: int) -> Tensor:
        for t in range(first, T):
            h = one_step("rnn", p, p["x"][t, 0], h, None)["h"]
        return h

    h = [p["h0"][0]]
    for t in range(T):
        h.append(one_step("rnn", p, p["x"][t, 0], h[-1], None)["h"])
    values: dict[str, Any] = {
        "J": {
            t: torch.autograd.functional.jacobian(
                lambda v, t=t: one_step("rnn", p, p["x"][t, 0], v, None)["h"], h[t]
            ).numpy()
            for t in range(T)
        },
        "P": torch.autograd.functional.jacobian(lambda v: forward(v, T - K), h[T - K]).numpy(),
    }
    slopes = [float((1 / torch.cosh(torch.atanh(value)) ** 2).max()) for value in h[1:]]
    largest = float(torch.linalg.svdvals(p["W_hh"])[0])
    values["reach"] = {t: slope * largest for t, slope in enumerate(slopes)}
    values["bound"] = float(np.prod([slope * largest for slope in slopes[T - K :]]))
    given = {"h": {t: value.numpy() for t, value in enumerate(h[1:])} | {-1: h[0].numpy()}, "W_hh": p["W_hh"].numpy()}
    return Case(SIZES | given, values)


@case("The cure is a sum")
def _() -> Case:
    """The carry: autograd from the last c to c[T-1-k], where the gates of the steps between are held fixed."""
    values, _ = solved("lstm")
    gates = {name: {t: torch.from_numpy(v) for t, v in values[name].items()} for name in "ifg"}
    first = torch.from_numpy(values["c"][T - 1 - K]).clone().requires_grad_()
    c = first
    for t in range(T - K, T):
        c = gates["f"][t] * c + gates["i"][t] * gates["g"][t]
    (carry,) = torch.autograd.grad(c.sum(), first)
    given = {name: values[name] for name in "ifg"} | {"c": {-1: values["c0"]}}
    return Case(SIZES | given, {"c": values["c"], "carry": carry.numpy()})


@case("One product for all time steps")
def _() -> Case:
    values, gradients = solved("lstm")
    h = np.stack([values["h"][t - 1] for t in range(T)])
    product = torch.nn.functional.linear(*(torch.from_numpy(values[name]) for name in ("x", "W_ih", "b_ih")))
    wanted = gradients | {"X": product.reshape(T * B, -1).numpy(), "dA": array(gradients["da"]), "before": h}
    return Case(SIZES | {"G": 4} | values | {"da": gradients["da"]}, wanted)


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


FIGURE = ROOT / "docs" / "figures" / "vanishing.py"
SECTION = section("How fast it vanishes")
PROSE = " ".join(SECTION.split())
TABLE = {
    row[0]: row[1:]
    for row in re.findall(r"^\| (.*?) \| *(.*?) *\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", SECTION, re.MULTILINE)[1:]
}


@cache
def figure() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("vanishing", FIGURE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed() -> dict[str, np.ndarray]:
    """[distances, seeds] of each curve."""
    return figure().read(FIGURE.with_suffix(".csv"))


def a_step(curve: str) -> float:
    of = dict(zip(figure().DISTANCES, figure().averaged(committed()[curve]), strict=True))
    return float((of[100] / of[50]) ** (1 / 50))


@pytest.mark.native
def test_numbers_of_the_figure() -> None:
    """The page's table from the committed file, and the figure is of that file."""
    module, measured = figure(), committed()
    assert list(TABLE) == list(measured) == list(module.CURVES)
    for curve, (gate, *shown) in TABLE.items():
        of = dict(zip(module.DISTANCES, module.averaged(measured[curve]), strict=True))
        assert shown == [f"{of[10]:.1e}", f"{of[50]:.1e}", f"{of[100]:.1e}", f"{a_step(curve):.3f}"]
        bias = float(curve[-1]) if curve[-1].isdigit() else 0.0
        assert gate == ("" if curve.startswith("RNN") else f"{1 / (1 + math.exp(-bias)):.2f}")
        assert measured[curve].shape == (len(module.DISTANCES), module.SEEDS)
    assert f"I = {module.I}, H = {module.H}, T = {module.T}" in PROSE
    assert f"geometric mean of {module.SEEDS} seeds" in PROSE
    digest = hashlib.sha256(FIGURE.with_suffix(".csv").read_bytes()).hexdigest()
    assert digest in FIGURE.with_suffix(".svg").read_text()


@pytest.mark.native
def test_claims_of_the_figure() -> None:
    module = figure()
    lost = {curve: -math.log10(module.averaged(values)[-1]) for curve, values in committed().items()}
    assert 0 < lost["LSTM, b_f = 3"] < 1 and 29.5 < lost["RNN"] < 30
    # norm(W_hh), and that of an orthogonal one
    norms = []
    for seed in range(module.SEEDS):
        torch.manual_seed(seed)
        layer = lt.RNN(module.I, module.H, dtype=torch.float64)
        norms.append(float(torch.linalg.matrix_norm(layer.weight_hh_l0.detach(), 2)))
        module.orthogonal(layer)
        assert float(torch.linalg.matrix_norm(layer.weight_hh_l0.detach(), 2)) == pytest.approx(1, abs=1e-12)
    assert f"between {min(norms):.2f} and {max(norms):.2f}" in PROSE
    # the direct path of each unit: the product of its forget gates
    for curve, (_, prepare, *_) in module.CURVES.items():
        if curve.startswith("LSTM"):
            for seed in range(module.SEEDS):
                torch.manual_seed(seed)
                layer = lt.LSTM(module.I, module.H, dtype=torch.float64)
                with torch.no_grad():
                    prepare(layer)
                    x = torch.randn(module.T, module.I, dtype=torch.float64)
                    p = dict(zip(("W_ih", "W_hh", "b_ih", "b_hh"), layer.parameters(), strict=True))
                    h = c = torch.zeros(module.H, dtype=torch.float64)
                    forget = []
                    for t in range(module.T):
                        made = one_step("lstm", p, x[t], h, c)
                        h, c = made["h"], made["c"]
                        forget.append(made["f"])
                best = float(torch.stack(forget[-100:-50]).log().mean(0).exp().max())
                mine = committed()[curve][:, seed]
                assert best < (mine[20] / mine[10]) ** (1 / 50)


@pytest.mark.native
def test_figure_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first seed, to the digits that the file has."""
    monkeypatch.setattr(sys, "argv", ["vanishing.py", "--out", str(tmp_path), "--seeds", "1"])
    figure().main()
    found = figure().read(tmp_path / "vanishing.csv")
    assert list(found) == list(committed())
    for curve, values in committed().items():
        np.testing.assert_allclose(found[curve][:, 0], values[:, 0], rtol=2e-6)
    assert "<svg" in (tmp_path / "vanishing.svg").read_text()
