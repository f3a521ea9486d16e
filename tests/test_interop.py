"""Numbers of other libraries: ONNX Runtime and the NumPy loops of a course, computed here, and Keras's, in tests/data.

Every case goes through convert.weights and lt.functional, on the reference, and on what "auto" is: the interpreted
kernels under TRITON_INTERPRET=1. Where other libraries say or do something else than ours is noted beside the test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

import lstm_triton as lt
from lstm_triton import convert
from lstm_triton.spec import ACTIVATIONS, PARAMETERS_READ

pytestmark = pytest.mark.both

engines = pytest.mark.parametrize("engine", ["reference", "auto"])
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def assert_close(ours: Any, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance)


def call(cell: str, x: Tensor, states: list[Tensor | None], weights: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """lt.functional's `cell` with what convert.weights gave."""
    matrices = [weights["weight_ih"], weights["weight_hh"], weights.get("bias_ih"), weights.get("bias_hh")]
    if "peephole" in weights:
        options["peephole"] = weights["peephole"]
    return list(getattr(lt.functional, cell)(x, *states, *matrices, **options))


# ONNX Runtime. Its recurrent nodes and the text of the standard differ in these points (1.23 and 1.32):
# - clip "is applied to the input of activations". It is to that of f and g, gates with their peepholes; but h, the
#   LSTM's output activation, gets the cell state as it is. So does ours with gate_clip.
# - ThresholdedRelu is x where x >= alpha there, but where x > alpha in the operator of that name, in ONNX Runtime and
#   in ours.
# - alpha and beta are said to default to those of the operators. They do, except that ThresholdedRelu has alpha 0 for
#   1, Affine and ScaledTanh, which are no operators any more, 0 and 0, which leaves zeros; and the RNN node of 1.23
#   has 0 for all of them. So the nodes below are told both.
# - Of final states after no step at all the text says nothing. They are zeros, of the RNN node only since after 1.23;
#   in ours they are the initial states.

ONNX_NAMES = {
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "hard_sigmoid": "HardSigmoid",
    "affine": "Affine",
    "elu": "Elu",
    "leaky_relu": "LeakyRelu",
    "scaled_tanh": "ScaledTanh",
    "softplus": "Softplus",
    "softsign": "Softsign",
    "thresholded_relu": "ThresholdedRelu",
}
PARAMETERS = {
    "hard_sigmoid": (0.3, 0.4),
    "affine": (0.7, 0.1),
    "elu": (0.6, 0.0),
    "leaky_relu": (0.15, 0.0),
    "scaled_tanh": (1.3, 0.8),
    "thresholded_relu": (0.2, 0.0),
}


@dataclass(frozen=True)
class Node:
    """One recurrent node of ONNX, with inputs of its own, and what ours is told for it."""

    op: str
    attributes: dict[str, Any] = field(default_factory=dict)
    activations: tuple[str, ...] = ()  # in our names, of f, g, h
    bias: bool = True
    peephole: bool = False
    states: bool = True
    lengths: tuple[int, ...] | None = None
    shape: tuple[int, int, int, int] = (5, 3, 2, 7)  # T, B, I, H

    def __str__(self) -> str:
        flags = [name for name in ("peephole", "lengths") if getattr(self, name)]
        flags += [f"no_{name}" for name in ("bias", "states") if not getattr(self, name)]
        told = [f"{name}={value}" for name, value in self.attributes.items()]
        return "-".join([self.op, *flags, *told, *self.activations, str(self.shape)])

    @property
    def cell(self) -> str:
        return self.op.lower()

    @property
    def directions(self) -> int:
        return 2 if self.attributes.get("direction") == "bidirectional" else 1

    def inputs(self) -> dict[str, np.ndarray]:
        """The node's, by ONNX's names."""
        steps, batch, features, hidden = self.shape
        rng = np.random.default_rng(0)

        def draw(*shape: int, scale: float = 0.4) -> np.ndarray:
            return (rng.standard_normal(shape) * scale).astype(np.float32)

        D, rows = self.directions, GATES[self.cell] * hidden
        arrays = {
            "X": draw(steps, batch, features, scale=1.0),
            "W": draw(D, rows, features),
            "R": draw(D, rows, hidden),
        }
        if self.bias:
            arrays["B"] = draw(D, 2 * rows)
        if self.lengths is not None:
            arrays["sequence_lens"] = np.array(self.lengths, np.int32)
        if self.states:
            arrays["initial_h"] = draw(D, batch, hidden)
            arrays |= {"initial_c": draw(D, batch, hidden)} if self.op == "LSTM" else {}
        if self.peephole:
            arrays["P"] = draw(D, 3 * hidden)
        return arrays

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Y [T, D, B, H], Y_h and, of an LSTM, Y_c [D, B, H], as ONNX Runtime computes them."""
        told = dict(self.attributes)
        if self.activations:
            told["activations"] = [ONNX_NAMES[name] for name in self.activations] * self.directions
            for position, name in enumerate(("activation_alpha", "activation_beta")):
                # one for each activation that reads it
                read = [PARAMETERS[a][position] for a in self.activations if PARAMETERS_READ.get(a, 0) > position]
                told |= {name: read * self.directions} if read else {}
        names = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"][: 8 if self.op == "LSTM" else 6]
        outputs = ["Y", "Y_h", "Y_c"][: 3 if self.op == "LSTM" else 2]
        node = [name if name in inputs else "" for name in names], outputs
        return onnx_runtime(helper.make_node(self.op, *node, hidden_size=self.shape[3], **told), inputs)

    def ours(self, inputs: dict[str, np.ndarray], engine: str) -> list[np.ndarray]:
        """The same from ours, a direction at a time."""
        told = self.attributes
        layout = {name: told[name] for name in ("input_forget", "linear_before_reset") if name in told}
        options: dict[str, Any] = {"engine": engine, "gate_clip": told.get("clip")}
        if self.op == "GRU":
            options["reset_after"] = bool(told.get("linear_before_reset", 0))
        if self.op == "LSTM":
            options["coupled"] = bool(told.get("input_forget", 0))
        slots = ("activation",) if self.op == "RNN" else ("recurrent_activation", "activation", "output_activation")
        options |= {
            slot: (name, *PARAMETERS[name]) if name in PARAMETERS else name
            for slot, name in zip(slots, self.activations, strict=False)
        }
        if self.lengths is not None:
            options["lengths"] = torch.tensor(self.lengths)
        found = []
        for index in range(self.directions):
            arrays = [inputs.get(name) for name in ("W", "R", "B", "P")[: 4 if self.op == "LSTM" else 3]]
            direction = {"direction": index} if self.directions == 2 else {}
            weights = convert.weights(arrays, "onnx", self.cell, **layout, **direction)
            names = ("initial_h", "initial_c") if self.op == "LSTM" else ("initial_h",)
            states = [torch.from_numpy(inputs[name][index]) if name in inputs else None for name in names]
            reverse = index == 1 or told.get("direction") == "reverse"
            x = torch.from_numpy(inputs["X"])
            found.append(call(self.cell, x, states, weights, reverse=reverse, **options))
        y, *final = zip(*found, strict=True)
        return [torch.stack(y, dim=1).numpy(), *(torch.stack(state).numpy() for state in final)]


def onnx_runtime(node: onnx.NodeProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a model of one node."""
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
    infos = [helper.make_tensor_value_info(name, kinds[array.dtype], array.shape) for name, array in inputs.items()]
    ranks = [{"Y": 4, "Y_h": 3, "Y_c": 3}.get(name, 1) for name in node.output]
    outs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{axis}" for axis in range(rank)])
        for name, rank in zip(node.output, ranks, strict=True)
    ]
    graph = helper.make_graph([node], "one", infos, outs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


LENGTHS = {"lengths": (5, 1, 3)}
NODES = [
    Node("LSTM", shape=(1, 1, 3, 1)),
    Node("LSTM", shape=(9, 2, 6, 17), states=False),
    Node("LSTM", bias=False),
    Node("LSTM", peephole=True),
    Node("LSTM", {"input_forget": 1}),
    Node("LSTM", {"input_forget": 1}, peephole=True, bias=False),
    Node("LSTM", {"clip": 0.3}),
    Node("LSTM", {"clip": 0.3}, peephole=True),
    Node("LSTM", {"clip": 0.3, "input_forget": 1, "direction": "reverse"}, peephole=True, **LENGTHS),
    Node("LSTM", {"direction": "reverse"}),
    Node("LSTM", {"direction": "bidirectional"}, peephole=True, **LENGTHS),
    Node("LSTM", **LENGTHS),
    Node("GRU", shape=(1, 1, 3, 1)),
    Node("RNN", shape=(1, 1, 3, 1)),
    Node("RNN", shape=(9, 2, 6, 17), states=False),
    Node("RNN", bias=False),
    Node("RNN", {"clip": 0.3}),
    Node("RNN", {"direction": "bidirectional", "clip": 0.6}, **LENGTHS),
    *[
        node
        for before in ({"linear_before_reset": 0}, {"linear_before_reset": 1})
        for node in (
            Node("GRU", before, shape=(9, 2, 6, 17), states=False),
            Node("GRU", before, bias=False),
            Node("GRU", before | {"clip": 0.3}),
            Node("GRU", before | {"direction": "reverse", "clip": 0.6}, **LENGTHS),
            Node("GRU", before | {"direction": "bidirectional"}, **LENGTHS),
        )
    ],
]

# each activation in each place
NAMES = tuple(ONNX_NAMES)
WITH_ACTIVATIONS = [
    node
    for number, name in enumerate(NAMES)
    for node in (
        Node("LSTM", activations=(name, NAMES[number - 1], NAMES[number - 2]), shape=(4, 2, 3, 5)),
        Node("GRU", {"linear_before_reset": number % 2}, activations=(name, NAMES[number - 3]), shape=(4, 2, 3, 5)),
        Node("RNN", activations=(name,), shape=(4, 2, 3, 5)),
    )
] + [
    Node("LSTM", {"clip": 0.5}, activations=("hard_sigmoid", "softplus", "elu"), shape=(4, 2, 3, 5)),
    Node("GRU", {"clip": 0.5, "linear_before_reset": 1}, activations=("softsign", "affine"), shape=(4, 2, 3, 5)),
    Node("RNN", {"direction": "bidirectional"}, activations=("scaled_tanh",), shape=(4, 2, 3, 5)),
]


@engines
@pytest.mark.parametrize("node", NODES + WITH_ACTIVATIONS, ids=str)
def test_onnx_runtime(node: Node, engine: str) -> None:
    inputs = node.inputs()
    for found, expected in zip(node.ours(inputs, engine), node.run(inputs), strict=True):
        assert found.shape == expected.shape
        assert np.abs(expected).max() > 1e-3
        assert_close(found, expected)


def test_every_activation_is_met_in_every_place() -> None:
    """All but "linear", of which ONNX has no name: affine is that with its defaults."""
    for place in range(3):
        assert {node.activations[place] for node in WITH_ACTIVATIONS if len(node.activations) > place} == set(NAMES)
    assert set(ACTIVATIONS) - set(NAMES) == {"linear"}


@engines
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_onnx_runtime_row_without_steps(op: str, direction: str, engine: str) -> None:
    node = Node(op, {"direction": direction}, lengths=(5, 0, 2))
    inputs = node.inputs()
    (y, *final), (their_y, *theirs) = node.ours(inputs, engine), node.run(inputs)
    assert_close(y, their_y)
    for found, expected, initial in zip(final, theirs, [inputs["initial_h"], inputs.get("initial_c")], strict=False):
        assert_close(found[0, [0, 2]], expected[0, [0, 2]])
        assert (found[0, 1] == initial[0, 1]).all()


@engines
def test_onnx_runtime_clips_gates_and_not_the_cell(engine: str) -> None:
    node = Node("LSTM", {"clip": 0.5}, shape=(1, 3, 2, 7))
    inputs = node.inputs()
    inputs["initial_c"] = np.full_like(inputs["initial_c"], 4.0)
    (y, _, c_n), (their_y, _, their_c_n) = node.ours(inputs, engine), node.run(inputs)
    assert np.abs(their_c_n).max() > 0.5
    assert_close(y, their_y)
    assert_close(c_n, their_c_n)


@engines
@pytest.mark.parametrize("name", ["hard_sigmoid", "elu", "leaky_relu", "thresholded_relu", "softplus", "softsign"])
def test_defaults_are_those_of_the_operators(name: str, engine: str) -> None:
    """And so are the activations, on both sides of every corner. A unit that reads x and nothing else shows them."""
    x = np.array([-30, -3.5, -2.5, -1, -0.25, -0.01, 0, 0.01, 0.25, 0.99, 1, 1.01, 2.5, 3.5, 30], np.float32)
    (expected,) = onnx_runtime(helper.make_node(ONNX_NAMES[name], ["x"], ["y"]), {"x": x})
    weights = {"weight_ih": torch.ones(1, 1), "weight_hh": torch.zeros(1, 1)}
    y, _ = call("rnn", torch.from_numpy(x)[None, :, None], [None], weights, activation=name, engine=engine)
    assert_close(y[0, :, 0], expected)


@engines
@pytest.mark.parametrize("cell", ["lstm", "coupled", "gru", "rnn"])
def test_ours_in_onnx_runtime(cell: str, engine: str) -> None:
    """convert.to makes inputs of a node as they are."""
    coupled = cell == "coupled"
    cell = "lstm" if coupled else cell
    layout = {"input_forget": 1} if coupled else {}
    node = Node(cell.upper(), layout | ({"linear_before_reset": 1} if cell == "gru" else {}))
    torch.manual_seed(0)
    features, hidden = node.shape[2:]
    rows = hidden * (3 if coupled else GATES[cell])
    shapes = {"weight_ih": (rows, features), "weight_hh": (rows, hidden), "bias_ih": (rows,), "bias_hh": (rows,)}
    if cell == "lstm":
        shapes["peephole"] = (2 if coupled else 3, hidden)
    weights = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    names = ("W", "R", "B", "P")[: 4 if cell == "lstm" else 3]
    inputs = node.inputs() | dict(zip(names, convert.to(weights, "onnx", cell, **layout), strict=True))
    states = [torch.from_numpy(inputs[name][0]) for name in inputs if name.startswith("initial")]
    y, *_ = call(
        cell, torch.from_numpy(inputs["X"]), states, weights, engine=engine, **({"coupled": True} if coupled else {})
    )
    assert_close(y, node.run(inputs)[0][:, 0])


# Keras, from tests/data/keras.npz, which make_keras.py beside it made. A skipped step repeats the output before it
# there, unless zero_output_for_mask, and with go_backwards the outputs are in the order of processing. Dropout masks
# come as Keras drew them: where recurrent_dropout is not 0, one for each gate, of h[t-1] and of x, as ours does with
# dropout_per_gate; where it is 0, one of x for all gates; SimpleRNN always one.

KERAS = np.load(Path(__file__).parent / "data" / "keras.npz")
KERAS_CASES = json.loads(str(KERAS["cases"]))
KERAS_ACTIVATIONS = {"hard_sigmoid": ("hard_sigmoid", 1 / 6, 0.5), "leaky_relu": ("leaky_relu", 0.2)}
CELLS = {"LSTM": "lstm", "GRU": "gru", "SimpleRNN": "rnn"}


@engines
@pytest.mark.parametrize("name", KERAS_CASES)
def test_keras(name: str, engine: str) -> None:
    case = KERAS_CASES[name]
    kind, cell = case["kind"], CELLS[case["layer"]]
    of_kind = [other for other in KERAS_CASES if KERAS_CASES[other]["kind"] == kind]
    outputs = KERAS[f"outputs/{kind}"][of_kind.index(name)].swapaxes(0, 1)  # [T + states, B, H]
    layout = {"reset_after": case["reset_after"]} if cell == "gru" else {}
    arrays = [KERAS[f"weights/{kind}/{number}"] for number in range(2 + case.get("use_bias", True))]
    weights = convert.weights(arrays, "keras", cell, **layout)

    options: dict[str, Any] = {"engine": engine, "reverse": case.get("go_backwards", False), **layout}
    for argument in ("activation", "recurrent_activation"):
        if argument in case:
            options[argument] = KERAS_ACTIVATIONS.get(case[argument], case[argument])
    for dropout, argument in (("dropout", "input_mask"), ("recurrent_dropout", "recurrent_mask")):
        if dropout in case:
            masks = torch.from_numpy(KERAS[f"dropout/{name}/{dropout}"])
            per_gate = cell != "rnn" and "recurrent_dropout" in case
            assert masks.dim() == (3 if per_gate else 2)
            if per_gate:
                assert not (masks[0] == masks[1]).all()
            # gates z, r, n there
            options[argument] = masks[[1, 0, 2]].contiguous() if per_gate and cell == "gru" else masks
    x = torch.from_numpy(KERAS["x"]).transpose(0, 1).contiguous()
    compared = torch.ones(x.shape[:2], dtype=torch.bool)
    if "mask" in case:
        options["mask"] = torch.from_numpy(KERAS[case["mask"]]).T.contiguous()
        if not case.get("zero_output_for_mask"):
            compared = options["mask"]
    states = [torch.from_numpy(KERAS[state]) for state in (("h0", "c0") if cell == "lstm" else ("h0",))]
    y, *final = call(cell, x, states, weights, **options)
    their_y = outputs[: len(x)][::-1] if options["reverse"] else outputs[: len(x)]
    assert_close(y[compared], their_y[compared.numpy()])
    assert_close(torch.stack(final), outputs[len(x) :])


def test_keras_cases_are_all_there() -> None:
    assert len(KERAS_CASES) == 60
    assert {(case["layer"], case.get("reset_after")) for case in KERAS_CASES.values()} == {
        ("LSTM", None), ("GRU", True), ("GRU", False), ("SimpleRNN", None)
    }  # fmt: skip


# The NumPy layers of Stanford's CS231n (2016, assignment 3): numbers that its notebooks print, and its equations.


def course_step(cell: str, x: np.ndarray, h: np.ndarray, c: np.ndarray, w: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    Wx, Wh, b = w
    a = x @ Wx + h @ Wh + b
    if cell == "rnn":
        return np.tanh(a), c
    i, f, o, g = np.split(a, 4, axis=1)
    i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
    c = f * c + i * np.tanh(g)
    return o * np.tanh(c), c


def course(
    cell: str, x: np.ndarray, h: np.ndarray, c: np.ndarray, w: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """x [N, T, D] -> all h [N, T, H], and the last c."""
    steps = []
    for t in range(x.shape[1]):
        h, c = course_step(cell, x[:, t], h, c, w)
        steps.append(h)
    return np.stack(steps, axis=1), c


def spaced(low: float, high: float, *shape: int) -> np.ndarray:
    return np.linspace(low, high, num=int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True)
class Printed:
    """What a notebook computes: x [N, T, D], h0, c0 [N, H], Wx, Wh, b; and what it prints, [N, T, H] and [N, H]."""

    cell: str
    x: np.ndarray
    h0: np.ndarray
    c0: np.ndarray
    weights: list[np.ndarray]
    h: list[Any]
    c_n: list[Any] | None = None


PRINTED = {
    "rnn_step_forward": Printed(
        "rnn", spaced(-0.4, 0.7, 3, 1, 10), spaced(-0.2, 0.5, 3, 4), np.zeros((3, 4)),
        [spaced(-0.1, 0.9, 10, 4), spaced(-0.3, 0.7, 4, 4), spaced(-0.2, 0.4, 4)],
        [[[-0.58172089, -0.50182032, -0.41232771, -0.31410098]],
         [[0.66854692, 0.79562378, 0.87755553, 0.92795967]],
         [[0.97934501, 0.99144213, 0.99646691, 0.99854353]]],
    ),
    "rnn_forward": Printed(
        "rnn", spaced(-0.1, 0.3, 2, 3, 4), spaced(-0.3, 0.1, 2, 5), np.zeros((2, 5)),
        [spaced(-0.2, 0.4, 4, 5), spaced(-0.4, 0.1, 5, 5), spaced(-0.7, 0.1, 5)],
        [[[-0.42070749, -0.27279261, -0.11074945, 0.05740409, 0.22236251],
          [-0.39525808, -0.22554661, -0.0409454, 0.14649412, 0.32397316],
          [-0.42305111, -0.24223728, -0.04287027, 0.15997045, 0.35014525]],
         [[-0.55857474, -0.39065825, -0.19198182, 0.02378408, 0.23735671],
          [-0.27150199, -0.07088804, 0.13562939, 0.33099728, 0.50158768],
          [-0.51014825, -0.30524429, -0.06755202, 0.17806392, 0.40333043]]],
    ),
    "lstm_step_forward": Printed(
        "lstm", spaced(-0.4, 1.2, 3, 1, 4), spaced(-0.3, 0.7, 3, 5), spaced(-0.4, 0.9, 3, 5),
        [spaced(-2.1, 1.3, 4, 20), spaced(-0.7, 2.2, 5, 20), spaced(0.3, 0.7, 20)],
        [[[0.24635157, 0.28610883, 0.32240467, 0.35525807, 0.38474904]],
         [[0.49223563, 0.55611431, 0.61507696, 0.66844003, 0.7159181]],
         [[0.56735664, 0.66310127, 0.74419266, 0.80889665, 0.858299]]],
        [[0.32986176, 0.39145139, 0.451556, 0.51014116, 0.56717407],
         [0.66382255, 0.76674007, 0.87195994, 0.97902709, 1.08751345],
         [0.74192008, 0.90592151, 1.07717006, 1.25120233, 1.42395676]],
    ),
    "lstm_forward": Printed(
        "lstm", spaced(-0.4, 0.6, 2, 3, 5), spaced(-0.4, 0.8, 2, 4), np.zeros((2, 4)),
        [spaced(-0.2, 0.9, 5, 16), spaced(-0.3, 0.6, 4, 16), spaced(0.2, 0.7, 16)],
        [[[0.01764008, 0.01823233, 0.01882671, 0.0194232],
          [0.11287491, 0.12146228, 0.13018446, 0.13902939],
          [0.31358768, 0.33338627, 0.35304453, 0.37250975]],
         [[0.45767879, 0.4761092, 0.4936887, 0.51041945],
          [0.6704845, 0.69350089, 0.71486014, 0.7346449],
          [0.81733511, 0.83677871, 0.85403753, 0.86935314]]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_course_prints_what_its_equations_give(name: str) -> None:
    case = PRINTED[name]
    h, c_n = course(case.cell, case.x, case.h0, case.c0, case.weights)
    assert_close(h, np.array(case.h), 1e-8)
    if case.c_n is not None:
        assert_close(c_n, np.array(case.c_n), 1e-8)


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PRINTED)
def test_course_forward(name: str, dtype: torch.dtype, engine: str) -> None:
    case = PRINTED[name]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-8
    weights = {n: w.to(dtype) for n, w in convert.weights(case.weights, "cs231n", case.cell).items()}
    x = torch.from_numpy(case.x).to(dtype).transpose(0, 1).contiguous()
    states = [torch.from_numpy(state).to(dtype) for state in (case.h0, case.c0)[: 2 if case.cell == "lstm" else 1]]
    y, *final = call(case.cell, x, states, weights, engine=engine)
    assert_close(y.transpose(0, 1), np.array(case.h), tolerance)
    if case.c_n is not None:
        assert_close(final[1], np.array(case.c_n), tolerance)


def differences(function: Callable[[], np.ndarray], array: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """d sum(function() grad) / d array, from central differences: array is changed in place, and restored."""
    found = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        sums = []
        for step in (1e-5, -1e-5):
            array[index] = kept + step
            sums.append((function() * grad).sum())
        array[index] = kept
        found[index] = (sums[0] - sums[1]) / 2e-5
    return found


@engines
@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_course_backward(cell: str, engine: str) -> None:
    """Gradients of all inputs, those of the weights converted back, against differences of the course's equations."""
    N, T, D, H = 2, 4, 3, 5
    G = GATES[cell]
    rng = np.random.default_rng(0)
    x, h0, c0, dh = (rng.standard_normal(shape) for shape in ((N, T, D), (N, H), (N, H), (N, T, H)))
    course_weights = [rng.standard_normal(shape) * 0.5 for shape in ((D, G * H), (H, G * H), (G * H,))]
    states = [h0, c0][: 2 if cell == "lstm" else 1]

    weights = convert.weights(course_weights, "cs231n", cell)
    inputs = [torch.from_numpy(x).transpose(0, 1).contiguous(), *map(torch.from_numpy, states), *weights.values()]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    x_ours, *states_ours = inputs[: 1 + len(states)]
    ours = dict(zip(weights, inputs[1 + len(states) :], strict=True))
    y = call(cell, x_ours, states_ours, ours, engine=engine)[0]
    dx, *grads = torch.autograd.grad(y, inputs, torch.from_numpy(dh).transpose(0, 1))

    def function() -> np.ndarray:
        return course(cell, x, h0, c0, course_weights)[0]

    assert_close(dx.transpose(0, 1), differences(function, x, dh), 1e-8)
    for found, state in zip(grads, states, strict=False):
        assert_close(found, differences(function, state, dh), 1e-8)
    of_weights = dict(zip(weights, grads[len(states) :], strict=True))
    assert_close(of_weights.pop("bias_hh"), of_weights["bias_ih"].numpy(), 1e-12)
    for found, array in zip(convert.to(of_weights, "cs231n", cell), course_weights, strict=True):
        assert_close(found, differences(function, array, dh), 1e-8)
