"""Numbers of ONNX Runtime, computed here: every recurrent node, with every activation in every place.

Its recurrent nodes and the text of the standard differ in these points (1.23 and 1.32):
- clip "is applied to the input of activations". It is to that of f and g, gates with their peepholes; but h, the LSTM's
  output activation, gets the cell state as it is. So does ours with gate_clip.
- ThresholdedRelu is x where x >= alpha there, but where x > alpha in the operator of that name, in ONNX Runtime and in
  ours.
- alpha and beta are said to default to those of the operators. They do, except that ThresholdedRelu has alpha 0 for 1,
  Affine and ScaledTanh, which are no operators any more, 0 and 0, which leaves zeros; and the RNN node of 1.23 has 0
  for all of them. So the nodes below are told both.
- Of final states after no step at all the text says nothing. They are zeros, of the RNN node only since after 1.23; in
  ours they are the initial states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from interop import GATES, assert_close, call, engines
from onnx import TensorProto, helper

from lstm_triton import convert
from lstm_triton.spec import ACTIVATIONS, PARAMETERS_READ

pytestmark = pytest.mark.both

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
