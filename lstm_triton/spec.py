"""What is computed: a frozen description of one recurrent cell, apart from how it is scheduled."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product

#: The name of an activation, or (name, alpha, beta), or (name, alpha).
Activation = str | tuple[str, float, float] | tuple[str, float]


@dataclass(frozen=True)
class CellKind:
    """What the code around a cell has to know of its mathematics (kernels/cells.py).

    gates: their names in the order of the rows of w_ih, w_hh and the biases: torch.nn's, or as it was registered.
    slots: of which gate each gradient is that the cell's backward finds, in their order. The first G are those by the
        input product, the last G those by the recurrent one: the same, if there are no more.
    has_c: there is a cell state c beside h. extra: backward reads one more tile. keeps: it reads the gates.
    takes: which of CellSpec's options there are. zoned: the states that zoneout may hold.
    vectors: what the rows of `params` are, numbers for each hidden unit; those of an LSTM are its peepholes.
    """

    gates: tuple[str, ...]
    slots: tuple[str, ...]
    has_c: bool = False
    extra: bool = False
    keeps: bool = True
    takes: tuple[str, ...] = ()
    zoned: tuple[str, ...] = ("h",)
    vectors: tuple[str, ...] = ()

    @property
    def h_slot(self) -> int:
        """The first slot by the recurrent product."""
        return len(self.slots) - len(self.gates)

    @property
    def shift(self) -> int:
        """How far, in gates, the slots by the input product are rolled against the order of the gates."""
        return -self.gates.index(self.slots[0]) % len(self.gates)


_OF_GATES = ("activation", "recurrent_activation", "gate_clip")
_OF_LSTM = (*_OF_GATES, "output_activation", "proj", "peephole", "coupled", "cell_clip")
_LSTM = CellKind(tuple("ifgo"), tuple("ifgo"), True, True, takes=_OF_LSTM, zoned=("h", "c"))
_COUPLED = replace(_LSTM, gates=tuple("igo"), slots=tuple("igo"))
_GRU = CellKind(tuple("rzn"), tuple("nrzn"), extra=True, takes=(*_OF_GATES, "reset_after"))
_RESET_BEFORE = replace(_GRU, slots=tuple("rzn"), extra=False)
_RNN = CellKind(("h",), ("h",), keeps=False, takes=("activation", "gate_clip"))

#: Every kind of cell by name, with those that registry.py adds.
KINDS = {"lstm": _LSTM, "gru": _GRU, "rnn": _RNN}

#: The gates of the kinds that are built in.
GATES = {cell: kind.gates for cell, kind in KINDS.items()}

#: Every activation, with ONNX's alpha and beta where they count for something.
ACTIVATIONS: dict[str, tuple[float, float]] = {
    "tanh": (0.0, 0.0),
    "sigmoid": (0.0, 0.0),
    "relu": (0.0, 0.0),
    "hard_sigmoid": (0.2, 0.5),  # max(0, min(1, alpha x + beta))
    "linear": (0.0, 0.0),
    "affine": (1.0, 0.0),  # alpha x + beta
    "elu": (1.0, 0.0),  # x where x > 0, else alpha (exp(x) - 1)
    "leaky_relu": (0.01, 0.0),  # x where x > 0, else alpha x
    "scaled_tanh": (1.0, 1.0),  # alpha tanh(beta x)
    "softplus": (0.0, 0.0),  # log(1 + exp(x))
    "softsign": (0.0, 0.0),  # x / (1 + |x|)
    "thresholded_relu": (1.0, 0.0),  # x where x > alpha, else 0
}

#: How many of alpha and beta an activation reads.
PARAMETERS_READ = {"hard_sigmoid": 2, "affine": 2, "scaled_tanh": 2, "elu": 1, "leaky_relu": 1, "thresholded_relu": 1}

#: Those whose derivative follows from their value.
FROM_VALUE = ("tanh", "sigmoid", "relu")

#: What a byte of `steps` [T, B] says of one step of one row: it counts, and the state is zeroed before it.
VALID, RESET = 1, 2

#: Of layer normalisation, as torch.nn.LayerNorm's.
EPSILON = 1e-5


def activation_of(given: Activation, argument: str = "activation") -> tuple[str, float, float]:
    """An activation as (name, alpha, beta), ONNX's defaults where they are not given, zeros where they are not read.

    ValueError listing the names for an unknown one, or for parameters that are no finite numbers.
    """
    name, *parameters = given if isinstance(given, (tuple, list)) and given else (given,)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(
            f"{argument} must be one of {', '.join(map(repr, ACTIVATIONS))}, or a tuple (name, alpha, beta) of one, "
            f"got {given!r}"
        )
    if len(parameters) > 2 or any(not _finite(p) for p in parameters):
        raise ValueError(f"{argument} must be a name or (name, alpha, beta) with finite numbers, got {given!r}")
    alpha, beta = (*map(float, parameters), *ACTIVATIONS[name][len(parameters) :])
    read = PARAMETERS_READ.get(name, 0)
    return name, alpha if read > 0 else 0.0, beta if read > 1 else 0.0


@dataclass(frozen=True)
class CellSpec:
    """One cell: its kind and its options.

    cell: "lstm" (Hochreiter and Schmidhuber 1997, with Gers' forget gate), "gru" (Cho et al. 2014), "rnn" (Elman
        1990), or the name of a registered one, which has the options that it was registered with.
    activation: of the candidate (g, n, or the rnn's h). recurrent_activation: of the gates i, f, o, r, z.
        output_activation: of the LSTM's cell state; None: as activation. See `activation_of`.
    bias: whether there are biases.
    proj: P, the size of the projected h = W_hr (o * phi(c)) of an LSTM (Sak et al. 2014), or 0 for none.
    peephole: i and f read c[t-1], o reads c[t] (Gers and Schmidhuber 2000).
    coupled: f = 1 - i, three gates i, g, o (Greff et al. 2017).
    reset_after: the GRU's reset multiplies the recurrent product (torch.nn, cuDNN) and not the state (Cho et al.).
    cell_clip: c[t] is held within +- this; gate_clip: so are the pre-activations of all gates. Or None.
    layer_norm: the recurrent product, and what becomes the LSTM's c[t], are normalised (Ba et al. 2016; where, as in
        PyTorch's benchmark of custom LSTMs).
    zoneout: probabilities with which h and c keep what they were (Krueger et al. 2017); the second is the LSTM's.
    """

    cell: str
    activation: Activation = "tanh"
    bias: bool = True
    proj: int = 0
    recurrent_activation: Activation = "sigmoid"
    output_activation: Activation | None = None
    peephole: bool = False
    coupled: bool = False
    reset_after: bool = True
    cell_clip: float | None = None
    gate_clip: float | None = None
    layer_norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.cell not in KINDS:
            known = ", ".join(map(repr, KINDS))
            raise ValueError(f"cell must be one of {known}, or be registered first, got {self.cell!r}")
        takes = KINDS[self.cell].takes
        for name in ("proj", "peephole", "coupled", "cell_clip", "output_activation"):
            value = getattr(self, name)
            if name not in takes and value not in (0, None, False):
                raise ValueError(f"{name} is for the lstm alone, got {name}={value!r} for {self.cell!r}")
        for name in ("peephole", "coupled", "reset_after", "layer_norm"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if "reset_after" not in takes and not self.reset_after:
            raise ValueError(f"reset_after is for the gru alone, got reset_after=False for {self.cell!r}")
        for name in ("activation", "recurrent_activation", "output_activation"):
            value = getattr(self, name)
            if value is not None or name != "output_activation":
                self._normalise(name, _shortest(activation_of(value, name)))
        if self.output_activation == self.activation:
            self._normalise("output_activation", None)
        if self.cell == "rnn" and self.recurrent_activation != "sigmoid":
            raise ValueError(
                f"recurrent_activation is of gates, which the rnn has none of: got {self.recurrent_activation!r}; "
                "activation is what it applies"
            )
        for name in ("cell_clip", "gate_clip"):
            value = getattr(self, name)
            if value is not None:
                if not _finite(value) or value <= 0:
                    raise ValueError(f"{name} must be a positive finite number or None, got {value!r}")
                self._normalise(name, float(value))
        for name, default in (("activation", "tanh"), ("recurrent_activation", "sigmoid"), ("gate_clip", None)):
            value = getattr(self, name)
            if name not in takes and value != default:
                raise ValueError(f"{name} is no option that {self.cell!r} was registered with: got {value!r}")
        self._normalise("zoneout", zoneout_of(self.cell, self.zoneout))
        if self.layer_norm and not self.reset_after:
            raise ValueError(
                "layer_norm cannot go with reset_after=False: one mean and variance over all gates of a step need "
                "their products at once, and there the third product needs the gates of the other two"
            )
        if self.layer_norm and self.has_c and self.registered:
            raise ValueError(
                f"layer_norm cannot go with {self.cell!r}: of a registered cell with a cell state it is not known "
                "where to normalise that"
            )

    def _normalise(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """The cell and what differs from its defaults: "rnn activation=relu"."""
        options = [field for field in fields(self)[1:] if getattr(self, field.name) != field.default]
        return " ".join([self.cell, *(f"{option.name}={_written(getattr(self, option.name))}" for option in options)])

    @classmethod
    def parse(cls, text: str) -> CellSpec:
        """The inverse of str()."""
        return _parse(text)

    @property
    def plain(self) -> bool:
        """Nothing but the cell, its biases and projection: what torch.nn has, the rnn's relu included."""
        if self.registered or (self.activation != "tanh" and (self.cell, self.activation) != ("rnn", "relu")):
            return False
        return all(getattr(self, name) == default for name, default in _OF_PLAIN_CELLS)

    @property
    def kind(self) -> CellKind:
        """What the cell's mathematics asks of the code around it."""
        if self.coupled:
            return _COUPLED
        return KINDS[self.cell] if self.reset_after else _RESET_BEFORE

    @property
    def registered(self) -> bool:
        """The cell is not built in."""
        return self.cell not in GATES

    @property
    def has_c(self) -> bool:
        """There is a cell state c beside h."""
        return self.kind.has_c

    @property
    def gate_names(self) -> tuple[str, ...]:
        """In the order of the rows of w_ih, w_hh and the biases."""
        return self.kind.gates

    @property
    def gates(self) -> int:
        """G, the number of gate rows for each hidden unit."""
        return len(self.gate_names)

    @property
    def states(self) -> tuple[str, ...]:
        """The initial states, each [B, H], as the functions call them; the final ones come back in the same order."""
        return ("h0", "c0") if self.has_c else ("h0",)

    @property
    def peepholes(self) -> tuple[str, ...]:
        """The gates that read the cell state, in the order of the rows of `peephole`."""
        return () if not self.peephole else ("i", "o") if self.coupled else ("i", "f", "o")

    @property
    def vectors(self) -> tuple[str, ...]:
        """What the rows of `params` [K, H] hold that the cell itself reads."""
        return self.kind.vectors + tuple(f"peephole.{gate}" for gate in self.peepholes)

    @property
    def rows(self) -> tuple[str, ...]:
        """What all rows of `params` [K, H] hold: each a vector with one number for each hidden unit."""
        norm = tuple(f"norm_hh.{gate}" for gate in self.gate_names) if self.layer_norm else ()
        norm += ("norm_c.weight", "norm_c.bias") if self.layer_norm and self.has_c else ()
        return (*self.vectors, *norm)

    @property
    def two_products(self) -> bool:
        """A step is two products, the second of what the first gave: projection, or reset before the product."""
        return self.proj > 0 or not self.reset_after

    @property
    def waits(self) -> int:
        """How often in a step a program needs something from all others of its group."""
        return 1 + self.two_products + self.layer_norm * (2 if self.has_c else 1)

    def keeps_value(self, activation: Activation) -> bool:
        """Backward reads the value of a gate with this activation, and not what that came from.

        Where the value tells the derivative; with gate_clip it must also leave room for a mark.
        """
        return activation in FROM_VALUE and not (activation == "relu" and self.gate_clip is not None)

    @property
    def keeps_preactivations(self) -> bool:
        """Some gate is kept before its activation, and activated again in backward."""
        used = [getattr(self, name) for name in ("activation", "recurrent_activation") if name in self.kind.takes]
        return not all(map(self.keeps_value, used))

    @property
    def remakes_cell(self) -> bool:
        """Backward computes what the step made of c again: c[t] is that clipped, normalised or zoned out."""
        return self.has_c and (self.cell_clip is not None or self.layer_norm or self.zoneout[1] > 0)

    @property
    def output_phi(self) -> Activation:
        """The activation of the LSTM's cell state."""
        return self.activation if self.output_activation is None else self.output_activation

    @property
    def options(self) -> dict[str, object]:
        """What the functions have to be told beyond their tensors, by argument, where it is not the default."""
        told_by_tensors = ("cell", "bias", "proj", "peephole", "layer_norm")
        always = "activation" if "activation" in self.kind.takes else ""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in told_by_tensors
            and (field.name == always or getattr(self, field.name) != field.default)
        }

    @property
    def untold(self) -> str:
        """In words, what the tensors of a call do not tell; `parse` reads it, and `of_tensors` adds the rest."""
        return str(self.of_tensors(True, 0))

    def of_tensors(self, bias: bool, proj: int) -> CellSpec:
        """With what the tensors of a call tell."""
        return replace(self, bias=bias, proj=proj)

    def output(self, hidden: int) -> int:
        """Columns of h: P where it is projected, else H."""
        return self.proj or hidden

    def state_shapes(self, batch: int, hidden: int) -> dict[str, tuple[int, int]]:
        """Shapes of the states, by name."""
        return {name: (batch, self.output(hidden) if name == "h0" else hidden) for name in self.states}

    def parameters(self, inputs: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's weights, as the functions call them and in their order, for I inputs and H units.

        Those of layer normalisation aside.
        """
        rows = self.gates * hidden
        biases = {"b_ih": (rows,), "b_hh": (rows,)} if self.bias else {}
        projection = {"w_hr": (self.proj, hidden)} if self.proj else {}
        vectors = {"params" if self.registered else "peephole": (len(self.vectors), hidden)} if self.vectors else {}
        return {"w_ih": (rows, inputs), "w_hh": (rows, self.output(hidden)), **biases, **projection, **vectors}


_OF_PLAIN_CELLS = tuple(
    (field.name, field.default)
    for field in fields(CellSpec)
    if field.name not in ("cell", "activation", "bias", "proj")
)


def zoneout_of(cell: str, given: object) -> tuple[float, float]:
    """The probabilities for h and c: a pair for a cell with a cell state, or one number for both; else one number.

    ValueError unless they are in [0, 1], and 0 for a state that zoneout may not hold.
    """
    kind = KINDS[cell]
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given if kind.has_c else 0.0)
    if len(pair) != 2 or any(not _finite(p) or not 0 <= p <= 1 for p in pair) or (not kind.has_c and pair[1] != 0):
        wanted = "a number in [0, 1], or a pair of them for h and c" if kind.has_c else "a number in [0, 1]"
        raise ValueError(f"zoneout must be {wanted}, got {given!r}")
    for state, p in zip("hc", pair, strict=True):
        if p > 0 and state not in kind.zoned:
            why = (
                "it was registered without candidate, which tells what the step made of c"
                if state == "c"
                else "its backward reads what the step made of h, which is then not what was kept"
            )
            raise ValueError(f"zoneout of {state} cannot go with {cell!r}: {why}; got {given!r}")
    return float(pair[0]), float(pair[1])


def variants() -> Iterator[CellSpec]:
    """Cells whose numerics have to be shown, those with biases first: the plain ones, and each option at least once."""
    for bias, cell in product((True, False), GATES):
        yield CellSpec(cell, bias=bias)
        if cell == "rnn":
            yield CellSpec(cell, "relu", bias)
        if cell == "lstm":
            yield CellSpec(cell, bias=bias, proj=3)
    yield from OPTIONS


def _finite(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    )  # NaN is not below


def _shortest(activation: tuple[str, float, float]) -> Activation:
    """The name alone where the parameters are the defaults: one spelling of each activation."""
    return activation[0] if activation == activation_of(activation[0]) else activation


def _written(value: object) -> str:
    """A value as __str__ writes it: a word, or a Python literal without blanks."""
    return value if isinstance(value, str) else repr(value).replace(" ", "")


@lru_cache(maxsize=1024)
def _parse(text: str) -> CellSpec:
    cell, *options = text.split()
    found: dict[str, object] = {}
    for option in options:
        name, _, value = option.partition("=")
        found[name] = value if value in ACTIVATIONS else ast.literal_eval(value)
    return CellSpec(cell, **found)


#: Every option, alone or with those that it has to get on with.
OPTIONS = (
    CellSpec("lstm", peephole=True),
    CellSpec("lstm", coupled=True),
    CellSpec("lstm", peephole=True, coupled=True, cell_clip=0.5),
    CellSpec("lstm", gate_clip=1.0, cell_clip=0.5),
    CellSpec("lstm", "softsign", recurrent_activation="hard_sigmoid", output_activation=("scaled_tanh", 1.5, 0.5)),
    CellSpec("lstm", zoneout=(0.3, 0.2)),
    CellSpec("lstm", layer_norm=True),
    CellSpec("gru", reset_after=False),
    CellSpec("gru", "elu", recurrent_activation="hard_sigmoid", gate_clip=2.0),
    CellSpec("gru", zoneout=(0.3, 0.0)),
    CellSpec("gru", layer_norm=True),
    CellSpec("rnn", "leaky_relu", gate_clip=2.0),
    CellSpec("rnn", zoneout=(0.3, 0.0)),
    CellSpec("rnn", layer_norm=True),
)
