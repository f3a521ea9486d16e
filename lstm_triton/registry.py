"""register_cell(): recurrent cells from a user's own code. check_cell(): whether their functions are right.

docs/adding-a-cell.md makes one from its equations. A registered cell is what a built-in one is: a CellKind in
spec.KINDS, device functions in constexprs, a step in reference.STEPS; all engines, operators and derivatives come of
these.
"""

from __future__ import annotations

import ast
import inspect
import keyword
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from . import constexprs, functional, launch, reference
from .devices import INTERPRETER, Device
from .planner import ENGINES
from .spec import GATES, KINDS, CellKind, CellSpec

#: Most gates that a product is split into (kernels/tiles.py).
MOST_GATES = 4

#: Options of CellSpec that a cell may be registered with.
OPTIONS = ("activation", "recurrent_activation", "gate_clip")

#: The device functions' parameters, as kernels/cells.py calls them.
_PARAMETERS = {
    "forward": ("x", "h", "state", "params", "OPT"),
    "backward": ("dout", "dstate", "kept", "state", "state_prev", "extra", "params", "OPT"),
    "output": ("out", "state", "OPT"),
    "backward_output": ("dh", "kept", "state", "OPT"),
    "candidate": ("kept", "state", "state_prev", "OPT"),
}
_RESULTS = {
    "forward": ("out", "state", "kept", "extra"),
    "backward": ("slots", "dh_direct", "dstate_prev", "dparams"),
    "backward_output": ("dout", "dstate"),
}

#: What each cell was registered with.
_registered: dict[str, tuple[Any, ...]] = {}


def register_cell(
    name: str,
    *,
    gates: Sequence[str],
    forward: Any,
    backward: Any,
    reference: Callable[..., Tensor | tuple[Tensor, Tensor]],
    separate: bool = False,
    vectors: Sequence[str] = (),
    options: Sequence[str] = (),
    output: Any = None,
    backward_output: Any = None,
    candidate: Any = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """Make lt.functional.<name>, lt.reference.<name> and lt.plan(name, ...) from a cell's mathematics.

    gates: 1 to 4 names, in the order of the row blocks of w_ih, w_hh and the biases.
    forward, backward: @triton.jit functions under the contract of kernels/cells.py.
    reference: the same in eager PyTorch, reference(x, h, state) -> h[t], or with a cell state (h[t], c[t]); x and h are
        tuples of G tensors [B, H], the two products of each gate, state [B, H] is h[t-1] or c[t-1].
    separate: backward finds 2 G slots, G gradients by x and then G by h; else G, which serve both.
    vectors: names of numbers for each hidden unit. The functions take them as params [K, H], which has gradients;
        forward and backward find them in `params`, and reference gets params=, a tuple of K tensors [H].
    options: which of "activation", "recurrent_activation" and "gate_clip" the device functions read of OPT. The
        functions take them, and reference gets them by name, as CellSpec has them.
    output, backward_output: of a cell with a cell state c, which `state` then is. candidate: what the step made of c,
        from what was kept; without it there is no zoneout of c.

    Returns lt.functional.<name>. The same call again returns it again; a name once taken keeps its meaning.
    Raises TypeError or ValueError naming the argument, what it was and what was expected.
    """
    functions = {
        "forward": forward, "backward": backward, "output": output, "backward_output": backward_output,
        "candidate": candidate,
    }  # fmt: skip
    gates, vectors, options = _names("gates", gates), _names("vectors", vectors), _names("options", options)
    meaning = (gates, vectors, options, separate, reference, *functions.values())
    _check_name(name, meaning)
    if name in _registered:
        return getattr(functional, name)
    if not 1 <= len(gates) <= MOST_GATES:
        raise ValueError(f"gates must be 1 to {MOST_GATES} names, got {len(gates)}: {', '.join(gates) or 'none'}")
    if unknown := [option for option in options if option not in OPTIONS]:
        raise ValueError(f"options must be among {', '.join(map(repr, OPTIONS))}, got {unknown[0]!r}")
    if type(separate) is not bool:
        raise TypeError(f"separate must be True or False, got {separate!r}")
    has_c = output is not None
    if has_c != (backward_output is not None) or (candidate is not None and not has_c):
        given = [f for f in ("output", "backward_output", "candidate") if functions[f] is not None]
        raise ValueError(
            "output and backward_output go together, for a cell with a cell state, which candidate is for too; "
            f"got {', '.join(given)}"
        )
    slots = gates + gates if separate else gates
    lengths = {"kept": len(gates), "slots": len(slots), "dparams": len(vectors)}
    given = {argument: function for argument, function in functions.items() if function is not None}
    for argument, function in given.items():
        _check_function(argument, function, lengths)
    # A state that zoneout holds is not what the step made, which is what the cell's backward means by it.
    reads_state = _reads(backward, "backward", "state")
    zoned = ("h",) * (has_c or not reads_state) + ("c",) * (candidate is not None)
    kind = CellKind(
        gates, slots, has_c, has_c or _reads(backward, "backward", "extra"),
        any(_reads(function, argument, "kept") for argument, function in given.items() if argument != "forward"),
        options, zoned, vectors,
    )  # fmt: skip
    _check_reference(reference, kind)

    KINDS[name] = kind
    constexprs.add_cell(name, constexprs.Cell(**given))
    _add_reference(name, reference)
    function = functional.function_of(name)
    setattr(functional, name, function)
    _registered[name] = meaning
    return function


def check_cell(name: str, *, hidden: int = 11, steps: int = 3, tolerance: float = 1e-9, **options: Any) -> None:
    """Hold a registered cell on all engines to its reference: results, and first derivatives by every input.

    In float64 on the GPU, or interpreted (TRITON_INTERPRET=1); a GPU without matrix products of float64 has the engines
    streamed and step alone for it. `options` are the function's own, activation and so on.
    First a single step, in which one wrong gradient is told from another; then `steps` of them on each engine, ragged
    and with what forward keeps computed again, and with the zoneout that the cell may have. Raises AssertionError
    naming the first result or gradient that differs by more than `tolerance`, ||ours - reference|| / ||reference||. It
    cannot tell whether reference is right.
    """
    if name not in _registered:
        known = ", ".join(map(repr, _registered)) or "none is registered"
        raise ValueError(f"name must be a registered cell's ({known}), got {name!r}")
    if others := set(options) - set(KINDS[name].takes):
        raise ValueError(
            f"options must be those that {name!r} was registered with ({', '.join(KINDS[name].takes) or 'none'}), got "
            f"{', '.join(sorted(others))}: engines and the like are all gone through"
        )
    for argument, value in (("hidden", hidden), ("steps", steps)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} must be a positive integer, got {value!r}")
    if not (launch.INTERPRETED or torch.cuda.is_available()):
        raise RuntimeError("check_cell runs kernels: it needs a GPU, or TRITON_INTERPRET=1 before triton is imported")
    for how, more, call in _calls(name, hidden, steps, launch.device_of(torch.empty(0, device=_device()))):
        given = _problem(name, call.pop("T"), hidden)
        ours, wanted = (
            _differentiate(name, module, given, options | more | engine)
            for module, engine in ((functional, call), (reference, {}))
        )
        for what, value in wanted.items():
            error = float((ours[what] - value).norm() / value.norm().clamp_min(1e-30))
            if not error <= tolerance:
                raise AssertionError(
                    f"{name}, {how}: {what} differs from the reference's by {error:.1e} (allowed: {tolerance:.1e})"
                )


def _calls(name: str, hidden: int, steps: int, device: Device) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """In words, arguments for both, and for ours alone; T among these."""
    # Without matrix products for float64, no engine has it whose weights stay on chip.
    engines = ENGINES if device.fp64_matrix_products else ("streamed", "step")

    def on(engine: str, T: int = steps) -> dict[str, Any]:
        tile = None
        if device is INTERPRETER:
            # Programs run one after another, so where they would wait, one owns all hidden units.
            waits = engine in ("resident", "streamed")
            tile = (16, max(16, triton.next_power_of_2(hidden)) if waits else 8)
        return {"T": T, "engine": engine, "tile": tile}

    yield "one step", {}, on("step", 1)
    lengths = torch.tensor([steps, 1, steps - 1], device=_device())
    reset = torch.zeros(steps, 3, dtype=torch.bool, device=_device())
    reset[steps // 2, 0] = True
    for engine in engines:
        yield f"engine {engine!r}", {}, on(engine)
    ragged = {"lengths": lengths, "reset": reset, "reverse": True}
    yield "lengths, reset, reverse, memory 'recompute'", ragged, on(engines[0]) | {"memory": "recompute"}
    zoned = tuple(0.3 if state in KINDS[name].zoned else 0.0 for state in "hc")
    if any(zoned):
        yield f"zoneout {zoned}", {"zoneout": zoned}, on(engines[0])


def _device() -> torch.device:
    return torch.device("cpu" if launch.INTERPRETED else "cuda")


def _problem(name: str, T: int, hidden: int) -> dict[str, Tensor]:
    """What a registered cell's function takes and has gradients, drawn: B = 3, I = 2."""
    spec, generator = CellSpec(name), torch.Generator().manual_seed(0)
    shapes = {"x": (T, 3, 2), **spec.state_shapes(3, hidden), **spec.parameters(2, hidden)}
    return {
        argument: (0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(_device())
        for argument, shape in shapes.items()
    }


def _differentiate(name: str, module: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Results, and the gradients of a drawn sum of them by every tensor: what tells most of the mistake first."""
    kind = KINDS[name]
    leaves = {argument: t.clone().requires_grad_() for argument, t in tensors.items()}
    results = getattr(module, name)(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device) for y in results]
    gradients = torch.autograd.grad(results, list(leaves.values()), drawn, allow_unused=True)
    by = {
        argument: torch.zeros_like(leaves[argument]) if d is None else d
        for argument, d in zip(leaves, gradients, strict=True)
    }
    found = dict(zip(("y", "h_n", "c_n"), (y.detach() for y in results), strict=False))
    for bias, slots in (("b_ih", "the input product"), ("b_hh", "the recurrent product")):
        for gate, d in zip(kind.gates, by[bias].chunk(len(kind.gates)), strict=True):
            found[f"the gradient by gate {gate}'s part of {slots} (slots, seen in {bias})"] = d
    told = {"h0": " (dh_direct, if slots are right)", "c0": " (dstate_prev)", "params": " (dparams)"}
    for argument in sorted(by, key=lambda argument: argument not in told):
        found[f"the gradient by {argument}{told.get(argument, '')}"] = by[argument]
    return found


def _add_reference(name: str, function: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> None:
    reference.STEPS[name] = reference.step_of(function)
    setattr(reference, name, reference.function_of(name))


def _names(argument: str, given: Any) -> tuple[str, ...]:
    """A sequence of different words."""
    found = tuple(given) if isinstance(given, (tuple, list)) else (None,)
    if not all(isinstance(name, str) and name.isidentifier() for name in found) or len(set(found)) < len(found):
        raise ValueError(f"{argument} must be a tuple of different names, got {given!r}")
    return found


def _check_name(name: Any, meaning: tuple[Any, ...]) -> None:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"name must be a Python identifier, got {name!r}")
    if name.startswith("_"):
        raise ValueError(f"name must not begin with an underscore, got {name!r}")
    if name in GATES:
        raise ValueError(f"name must be another than those of the built-in cells, got {name!r}")
    if name in _registered:
        if _registered[name] != meaning:
            raise ValueError(f"name {name!r} is registered already, with other functions or settings: take another")
    elif hasattr(functional, name) or hasattr(reference, name):
        raise ValueError(f"name {name!r} is something else in lt.functional or lt.reference: take another")


def _check_function(argument: str, function: Any, lengths: dict[str, int]) -> None:
    """A jit function, of as many parameters as the contract has, whose literal results have the right number."""
    if not isinstance(function, (triton.JITFunction, InterpretedFunction)):
        raise TypeError(f"{argument} must be a @triton.jit function, got {type(function).__name__}")
    expected, found = _PARAMETERS[argument], inspect.signature(function.fn).parameters
    if len(found) != len(expected):
        raise ValueError(f"{argument} must take ({', '.join(expected)}), got ({', '.join(found)})")
    for returned in _returns(_tree(function)):
        names = _RESULTS.get(argument, ())
        if not names or not isinstance(returned, ast.Tuple):
            continue
        if len(returned.elts) != len(names):
            raise ValueError(f"{argument} must return ({', '.join(names)}), got {len(returned.elts)} values")
        for name, value in zip(names, returned.elts, strict=True):
            if name in lengths and isinstance(value, ast.Tuple) and len(value.elts) != lengths[name]:
                found, wanted = len(value.elts), lengths[name]
                raise ValueError(f"{argument} must return {wanted} tiles as {name}, got {found}: {ast.unparse(value)}")


def _tree(function: Any) -> ast.FunctionDef:
    """A jit function's definition."""
    return ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body[0]


def _returns(tree: ast.FunctionDef) -> list[ast.expr]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]


def _reads(function: Any, argument: str, parameter: str) -> bool:
    """The device function has a use for the parameter that the contract calls so."""
    names = list(inspect.signature(function.fn).parameters)
    if parameter not in _PARAMETERS[argument]:
        return False
    name = names[_PARAMETERS[argument].index(parameter)]
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(_tree(function)))


def _check_reference(function: Any, kind: CellKind) -> None:
    """Run it on zeros: it has to return what `kind` says."""
    if not callable(function):
        raise TypeError(f"reference must be a function of PyTorch tensors, got {type(function).__name__}")
    shape = (2, 3)

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device="cpu")

    x, h = (tuple(zeros(*shape) for _ in kind.gates) for _ in range(2))
    defaults = {"activation": "tanh", "recurrent_activation": "sigmoid", "gate_clip": None}
    told: dict[str, Any] = {name: defaults[name] for name in kind.takes}
    if kind.vectors:
        told["params"] = tuple(zeros(shape[1]) for _ in kind.vectors)
    with torch.no_grad():
        made = function(x, h, zeros(*shape), **told)
    states = made if kind.has_c else (made,)
    names = ("h[t]", "c[t]") if kind.has_c else ("h[t]",)
    if not isinstance(states, (tuple, list)) or len(states) != len(names):
        raise ValueError(f"reference must return ({', '.join(names)}), got {_described(made)}")
    for name, state in zip(names, states, strict=True):
        if not isinstance(state, Tensor) or state.shape != shape or state.dtype != torch.float64:
            raise ValueError(
                f"reference must return {name} as a Tensor [B, H] of x's dtype, here {shape} of torch.float64, got "
                f"{_described(state)}"
            )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a Tensor {tuple(value.shape)} of {value.dtype}"
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
