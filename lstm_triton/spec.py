"""What is computed: a frozen description of one recurrent cell, apart from how it is scheduled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product

#: The name of an activation, or (name, alpha, beta).
Activation = str | tuple[str, float, float]

#: Gates in torch.nn's order, which is the order of the rows of `w_ih`, `w_hh` and the biases.
GATES = {"lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n"), "rnn": ("h",)}

#: The activations that each cell's kernels have.
ACTIVATIONS: dict[str, tuple[Activation, ...]] = {"lstm": ("tanh",), "gru": ("tanh",), "rnn": ("tanh", "relu")}

#: What a byte of `steps` [T, B] says of one step of one row: it counts, and the state is zeroed before it.
VALID, RESET = 1, 2

#: Defaults of the options that every function and module takes but no kernel implements yet. Asking for anything else
#: is refused by name, never ignored.
LATER = {
    "peephole": (None, False),
    "coupled": (False,),
    "recurrent_activation": ("sigmoid",),
    "output_activation": (None,),
    "cell_clip": (None,),
    "gate_clip": (None,),
    "input_mask": (None,),
    "recurrent_mask": (None,),
    "reset_after": (True,),
    "layer_norm": (False,),
    "zoneout": (0.0, (0.0, 0.0)),
    "recurrent_dropout": (0.0,),
    "input_dropout": (0.0,),
    "dropout_per_gate": (False,),
}


@dataclass(frozen=True)
class CellSpec:
    """One cell: its kind, its activation, whether it has biases, and its projection.

    cell: "lstm" (Hochreiter and Schmidhuber 1997, with Gers' forget gate), "gru" (Cho et al. 2014, reset after the
        product, as torch.nn and cuDNN) or "rnn" (Elman 1990).
    activation: "tanh", or "relu" for the rnn.
    proj: P, the size of the projected h = W_hr (o * tanh(c)) of an LSTM (Sak et al. 2014), or 0 for none.
    """

    cell: str
    activation: Activation = "tanh"
    bias: bool = True
    proj: int = 0

    def __post_init__(self) -> None:
        if self.cell not in GATES:
            raise ValueError(f"cell must be one of {', '.join(map(repr, GATES))}, got {self.cell!r}")
        if self.proj and self.cell != "lstm":
            raise ValueError(f"proj is for the lstm alone, got proj={self.proj} for {self.cell!r}")
        allowed = ACTIVATIONS[self.cell]
        if self.activation not in allowed:
            raise NotImplementedError(
                f"activation={self.activation!r} is not available for {self.cell!r}; expected one of {allowed}"
            )

    def __str__(self) -> str:
        """The cell and what differs from its defaults: "rnn activation=relu"."""
        options = [field for field in fields(self)[1:] if getattr(self, field.name) != field.default]
        return " ".join([self.cell, *(f"{option.name}={getattr(self, option.name)}" for option in options)])

    @property
    def gates(self) -> int:
        """G, the number of gate rows for each hidden unit."""
        return len(GATES[self.cell])

    @property
    def states(self) -> tuple[str, ...]:
        """The initial states, each [B, H], as the functions call them; the final ones come back in the same order."""
        return ("h0", "c0") if self.cell == "lstm" else ("h0",)

    @property
    def options(self) -> dict[str, object]:
        """What the functions have to be told beyond their tensors, by argument."""
        told_by_tensors = ("cell", "bias", "proj")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in told_by_tensors}

    def output(self, hidden: int) -> int:
        """Columns of h: P where it is projected, else H."""
        return self.proj or hidden

    def state_shapes(self, batch: int, hidden: int) -> dict[str, tuple[int, int]]:
        """Shapes of the states, by name."""
        return {name: (batch, self.output(hidden) if name == "h0" else hidden) for name in self.states}

    def parameters(self, inputs: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's weights, as the functions call them and in their order, for I inputs and H units."""
        rows = self.gates * hidden
        biases = {"b_ih": (rows,), "b_hh": (rows,)} if self.bias else {}
        projection = {"w_hr": (self.proj, hidden)} if self.proj else {}
        return {"w_ih": (rows, inputs), "w_hh": (rows, self.output(hidden)), **biases, **projection}


def variants() -> Iterator[CellSpec]:
    """Every cell that the kernels compute, those with biases first: what numerics have to be shown for."""
    for bias, cell in product((True, False), GATES):
        for activation in ACTIVATIONS[cell]:
            yield CellSpec(cell, activation, bias)
        if cell == "lstm":
            yield CellSpec(cell, bias=bias, proj=3)


def refuse_later_options(**options: object) -> None:
    """Raise NotImplementedError naming the first option that is not at its default."""
    for name, value in options.items():
        if not any(value is default or value == default for default in LATER[name] if _comparable(value, default)):
            raise NotImplementedError(f"{name}={_short(value)} is not available in this version of lstm_triton")


def _comparable(value: object, default: object) -> bool:
    return value is default or isinstance(value, (bool, int, float, str, tuple))


def _short(value: object) -> str:
    shape = getattr(value, "shape", None)
    return f"<tensor {tuple(shape)}>" if shape is not None else repr(value)
