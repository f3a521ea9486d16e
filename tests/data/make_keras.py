"""What Keras makes of small layers, for test_interop_keras: writes keras.npz beside this file.

    pip install keras==3.15.1 torch numpy && KERAS_BACKEND=torch python tests/data/make_keras.py

In keras.npz: `cases`, JSON: for each name the layer, the kind of it, and what it was told; x [B, T, I]; h0, c0 [B, H];
the masks `right` and `any` [B, T]; `weights/<kind>/<number>`, as get_weights() returns them; `outputs/<kind>`
[cases of the kind, B, T + states, H], the sequences with the final states behind them; and where there was dropout, the
masks that Keras drew, gates in its order: `dropout/<name>/dropout` [B, I] or [G, B, I], and
`dropout/<name>/recurrent_dropout` [B, H] or [G, B, H].
"""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
from keras import ops

BATCH, STEPS, INPUTS, UNITS = 3, 5, 2, 3
LAYERS = {"lstm": "LSTM", "gru_after": "GRU", "gru_before": "GRU", "simple_rnn": "SimpleRNN"}
GATES = {"lstm": 4, "gru_after": 3, "gru_before": 3, "simple_rnn": 1}
DROPOUTS = ("dropout", "recurrent_dropout")

# `mask` is the name of one, the rest are the layer's own arguments
COMMON: dict[str, dict[str, object]] = {
    "plain": {},
    "no_bias": {"use_bias": False},
    "go_backwards": {"go_backwards": True},
    "right": {"mask": "right"},
    "any": {"mask": "any"},
    "any_zeros": {"mask": "any", "zero_output_for_mask": True},
    "any_backwards": {"mask": "any", "go_backwards": True},
    "dropout": {"dropout": 0.4},
    "recurrent_dropout": {"recurrent_dropout": 0.5},
    "both_dropouts": {"dropout": 0.4, "recurrent_dropout": 0.5},
}
GATED: dict[str, dict[str, object]] = {
    "hard_sigmoid": {"recurrent_activation": "hard_sigmoid"},
    "softsign_hard_sigmoid": {"activation": "softsign", "recurrent_activation": "hard_sigmoid"},
    "elu": {"activation": "elu"},
    "softplus": {"activation": "softplus"},
}
UNGATED: dict[str, dict[str, object]] = {
    name: {"activation": name}
    for name in ("relu", "sigmoid", "hard_sigmoid", "linear", "elu", "leaky_relu", "softplus", "softsign")
}


def cases() -> dict[str, dict[str, object]]:
    found = {}
    for kind, layer in LAYERS.items():
        for name, told in (COMMON | (UNGATED if kind == "simple_rnn" else GATED)).items():
            reset = {"reset_after": kind == "gru_after"} if layer == "GRU" else {}
            found[f"{kind}-{name}"] = {"kind": kind, "layer": layer, **reset, **told}
    return found


def draw(rng: np.random.RandomState, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(0)
    arrays = {
        "x": draw(rng, BATCH, STEPS, INPUTS),
        "h0": draw(rng, BATCH, UNITS, scale=0.5),
        "c0": draw(rng, BATCH, UNITS, scale=0.5),
        "right": np.arange(STEPS) < np.array([[5], [2], [4]]),
        "any": np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 0, 1, 1]], bool),
    }
    for kind, gates in GATES.items():
        columns = gates * UNITS
        shapes = [(INPUTS, columns), (UNITS, columns), (2, columns) if kind == "gru_after" else (columns,)]
        arrays |= {f"weights/{kind}/{number}": draw(rng, *shape, scale=0.6) for number, shape in enumerate(shapes)}
    return arrays


def record_masks(cell: object) -> list[np.ndarray]:
    """The masks that a cell draws, as it does: at the first step, once for all steps; of the input first."""
    drawn = []
    create = cell._create_dropout_mask

    def recorded(*given: object) -> object:
        masks = create(*given)
        per_gate = isinstance(masks, list)
        drawn.append(ops.convert_to_numpy(ops.stack(masks) if per_gate else masks))
        return masks

    cell._create_dropout_mask = recorded
    return drawn


def main() -> None:
    arrays = inputs()
    outputs = {kind: [] for kind in LAYERS}
    for name, case in cases().items():
        kind = case["kind"]
        told = {key: value for key, value in case.items() if key not in ("kind", "layer", "mask")}
        keras.utils.set_random_seed(0)
        layer = getattr(keras.layers, case["layer"])(UNITS, return_sequences=True, return_state=True, **told)
        layer.build((BATCH, STEPS, INPUTS))
        layer.set_weights([arrays[f"weights/{kind}/{number}"] for number in range(2 + told.get("use_bias", True))])
        drawn = record_masks(layer.cell)
        states = [arrays["h0"], arrays["c0"]] if kind == "lstm" else [arrays["h0"]]
        mask = arrays[case["mask"]] if "mask" in case else None
        y, *final = layer(arrays["x"], initial_state=states, mask=mask, training=True)
        outputs[kind].append(ops.convert_to_numpy(ops.concatenate([y, *(state[:, None] for state in final)], axis=1)))
        asked = [dropout for dropout in DROPOUTS if dropout in told]
        arrays |= {f"dropout/{name}/{dropout}": masks for dropout, masks in zip(asked, drawn, strict=True)}
    arrays |= {f"outputs/{kind}": np.stack(found) for kind, found in outputs.items()}
    arrays["cases"] = np.array(json.dumps(cases()))
    np.savez_compressed(Path(__file__).with_name("keras.npz"), **arrays)
    print(f"Keras {keras.__version__}: {len(cases())} cases")


if __name__ == "__main__":
    main()
