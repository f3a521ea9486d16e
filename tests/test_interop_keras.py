"""Numbers of Keras, from tests/data/keras.npz, which make_keras.py beside it made.

A skipped step repeats the output before it there, unless zero_output_for_mask, and with go_backwards the outputs are in
the order of processing. Dropout masks come as Keras drew them: where recurrent_dropout is not 0, one for each gate, of
h[t-1] and of x, as ours does with dropout_per_gate; where it is 0, one of x for all gates; SimpleRNN always one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop import assert_close, call, engines

from lstm_triton import convert

pytestmark = pytest.mark.both

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
