"""Weights of which each number tells where it belongs, as ours and as every library has them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

I, H, P = 3, 5, 2  # noqa: E741
OURS = {"lstm": "ifgo", "gru": "rzn", "rnn": "h"}
#: Each library's own order of gates, in our letters.
THEIRS = {
    ("keras", "lstm"): "ifgo",
    ("keras", "gru"): "zrn",
    ("keras", "rnn"): "h",
    ("onnx", "lstm"): "iofg",
    ("onnx", "gru"): "zrn",
    ("onnx", "rnn"): "h",
    ("cs231n", "lstm"): "ifog",
    ("cs231n", "rnn"): "h",
}


def tagged(gates: str, columns: int, which: int) -> np.ndarray:
    """[len(gates)*H, columns]: each number tells its gate, its row in the gate, its column, and `which` array it is."""
    rows = [[ord(gate) * 1000 + which * 100 + unit * 10 + column for column in range(columns)]
            for gate in gates for unit in range(H)]  # fmt: skip
    return np.array(rows, np.float64)


def ours(cell: str, gates: str | None = None, peephole: bool = False) -> dict[str, Tensor]:
    """Tensors with tagged numbers, two biases."""
    gates = gates or OURS[cell]
    arrays = {
        "weight_ih": tagged(gates, I, 1),
        "weight_hh": tagged(gates, H, 2),
        "bias_ih": tagged(gates, 1, 3)[:, 0],
        "bias_hh": tagged(gates, 1, 4)[:, 0],
    }
    if peephole:
        arrays["peephole"] = tagged("".join(gate for gate in "ifo" if gate in gates), 1, 5).reshape(-1, H)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def theirs(library: str, cell: str, gates: str | None = None) -> list[np.ndarray]:
    """The same numbers as a library has them, written down from its documentation; two biases where it has them."""
    gates = gates or THEIRS[library, cell]
    w_ih, w_hh, b_ih, b_hh = (
        tagged(gates, I, 1),
        tagged(gates, H, 2),
        tagged(gates, 1, 3)[:, 0],
        tagged(gates, 1, 4)[:, 0],
    )
    if library == "onnx":
        peepholes = [tagged("iof", 1, 5)[:, 0]] if cell == "lstm" else []
        return [w_ih, w_hh, np.concatenate([b_ih, b_hh]), *peepholes]
    two = library == "keras" and cell == "gru"
    return [w_ih.T, w_hh.T, np.stack([b_ih, b_hh]) if two else b_ih]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert found[name].is_contiguous()
