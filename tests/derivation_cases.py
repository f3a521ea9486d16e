"""docs/derivation.md, read and run: the formulas of each section, and what autograd finds of the same quantities.

The plain forward equations are written once more here, in torch, and know nothing of the library. `Case.values` has
every quantity of them by the page's name, and, with a d before it, the gradient by it that autograd finds.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
