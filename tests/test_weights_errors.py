"""What convert.weights and convert.to refuse, naming it: what has no place there, wrong shapes, layouts, kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tagged_weights import H, I, P, assert_equal, ours, theirs
from torch import nn

from lstm_triton import convert

pytestmark = pytest.mark.both


@pytest.mark.parametrize("target", ["torch", "keras", "cs231n"])
def test_no_place_for_peepholes_and_coupled_gates(target: str) -> None:
    with pytest.raises(ValueError, match=rf"'{target}' has no peepholes: peephole cannot be converted"):
        convert.to(ours("lstm", peephole=True), target)
    with pytest.raises(ValueError, match=rf"weight_hh must have shape .* coupled lstm's, which '{target}' has not"):
        convert.to(ours("lstm", "igo"), target)


@pytest.mark.parametrize("target", ["onnx", "keras", "cs231n"])
def test_no_place_for_a_projection(target: str) -> None:
    found = convert.weights(nn.LSTM(I, H, proj_size=P).state_dict(), "torch")
    assert found["weight_hr"].shape == (P, H)
    with pytest.raises(ValueError, match=rf"'{target}' has no projection: weight_hr cannot be converted"):
        convert.to(found, target)


@pytest.mark.parametrize(("target", "keyword"), [("onnx", "input_forget=1"), ("lstm_triton", "coupled=True")])
def test_coupled_gates_have_to_be_named(target: str, keyword: str) -> None:
    with pytest.raises(ValueError, match=rf"weight_hh must have shape \(20, 5\) .*, got \(15, 5\): .*, {keyword}"):
        convert.to(ours("lstm", "igo"), target)
    name, value = keyword.split("=")
    with pytest.raises(
        ValueError, match=r"weight_hh must have shape \(15, 5\) \(3 gate\(s\), I=3, H=5\), got \(20, 5\)"
    ):
        convert.to(ours("lstm"), target, **{name: {"1": 1, "True": True}[value]})


WRONG_SHAPES = [
    ("keras", "lstm", 0, (I + 1, 4 * H - 1), r"kernel must have shape \(4, 20\) \(4 gate\(s\), I=4, H=5\), got"),
    ("keras", "lstm", 1, (H, 4 * H + 4), r"recurrent_kernel must have shape \(5, 20\) .*, got \(5, 24\)"),
    ("keras", "lstm", 1, (H, 3 * H), r"recurrent_kernel .*, got \(5, 15\): .* coupled lstm's, which 'keras' has not"),
    ("keras", "gru", 1, (0, 0), r"recurrent_kernel must be of one hidden unit or more, got shape \(0, 0\)"),
    ("keras", "rnn", 2, (H, 1), r"bias must have shape \(5,\) .*, got \(5, 1\)"),
    ("keras", "rnn", 0, (I,), r"kernel must have 2 dimensions, got shape \(3,\)"),
    ("onnx", "lstm", 1, (4 * H, H + 1), r"R must have shape \(24, 6\) \(4 gate\(s\), I=3, H=6\), got \(20, 6\)"),
    ("onnx", "lstm", 2, (4 * H,), r"B must have shape \(40,\) .*, got \(20,\)"),
    ("onnx", "lstm", 3, (2 * H,), r"P must have shape \(15,\) .*, got \(10,\)"),
    ("onnx", "gru", 0, (4 * H, I), r"W must have shape \(15, 3\) \(3 gate\(s\), I=3, H=5\), got \(20, 3\)"),
    ("cs231n", "lstm", 1, (4 * H, H), r"Wh must have shape \(20, 80\) .*, got \(20, 5\)"),
    ("cs231n", "rnn", 2, (H + 1,), r"b must have shape \(5,\) .*, got \(6,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("library", "cell", "index", "shape", "message"), WRONG_SHAPES)
def test_wrong_shapes(library: str, cell: str, index: int, shape: tuple[int, ...], message: str) -> None:
    arrays = theirs(library, cell)
    arrays[index] = np.zeros(shape)
    with pytest.raises(ValueError, match=message):
        convert.weights(arrays, library, cell)


def test_wrong_shapes_of_ours() -> None:
    tensors = ours("lstm", peephole=True)
    for name, shape, message in (
        ("weight_ih", (19, I), r"weight_ih must have shape \(20, 3\) \(4 gate\(s\), I=3, H=5\), got \(19, 3\)"),
        ("weight_hh", (20, 4), r"weight_hh must have shape \(16, 4\) .*, got \(20, 4\)"),
        ("bias_hh", (1, 20), r"bias_hh must have shape \(20,\) .*, got \(1, 20\)"),
        ("peephole", (2, H), r"peephole must have shape \(3, 5\) .*, got \(2, 5\)"),
        ("weight_ih", (20,), r"weight_ih must have 2 dimensions, got shape \(20,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.to(tensors | {name: torch.zeros(shape, dtype=torch.float64)}, "onnx")
    with pytest.raises(ValueError, match=r"weight_hr must be \[P, H\] with 0 < P < H, got shape \(5, 5\)"):
        convert.to(ours("lstm") | {"weight_hr": torch.zeros(5, 5, dtype=torch.float64)}, "torch")
    with pytest.raises(ValueError, match=r"tensors must have weight_hh, got weight_ih"):
        convert.to({"weight_ih": tensors["weight_ih"], "weight_hh": None}, "onnx")
    with pytest.raises(ValueError, match=r"tensors may hold weight_ih, .*, got 'w_ih'"):
        convert.to({"w_ih": tensors["weight_ih"]}, "onnx")
    with pytest.raises(ValueError, match=r"peephole is of an lstm, got it for a gru"):
        convert.to(ours("gru") | {"peephole": tensors["peephole"]}, "onnx", "gru")
    with pytest.raises(TypeError, match=r"tensors must be a dict, as weights\(\) returns it, got list"):
        convert.to(list(tensors.values()), "onnx")


@pytest.mark.parametrize(
    ("library", "cell", "layout", "error", "message"),
    [
        ("tensorflow", "lstm", {}, ValueError, r"ARGUMENT must be one of 'torch', .*'cs231n', got 'tensorflow'"),
        ([], "lstm", {}, ValueError, r"ARGUMENT must be one of .*, got \[\]"),
        ("keras", "lstmp", {}, ValueError, r"cell must be one of 'lstm', 'gru', 'rnn', got 'lstmp'"),
        ("cs231n", "gru", {}, ValueError, r"'cs231n' has the cells 'lstm', 'rnn', got cell='gru'"),
        ("cs231n", "lstm", {"order": 1}, TypeError, r"ARGUMENT='cs231n' and .* go with no other keywords, got order=1"),
        ("keras", "lstm", {"reset_after": True}, TypeError, r"cell='lstm' go with no other keywords, got reset_after"),
        ("keras", "gru", {"reset": True}, TypeError, r"cell='gru' go with reset_after, got reset=True"),
        ("keras", "gru", {"reset_after": 1}, ValueError, r"reset_after must be False or True, got 1"),
        ("onnx", "gru", {"linear_before_reset": 2}, ValueError, r"linear_before_reset must be 0 or 1, got 2"),
        ("onnx", "gru", {"input_forget": 1}, TypeError, r"go with .*linear_before_reset, got input_forget=1"),
        ("onnx", "lstm", {"input_forget": "1"}, ValueError, r"input_forget must be 0 or 1, got '1'"),
        ("torch", "lstm", {"coupled": True}, TypeError, r"go with layer, reverse, got coupled=True"),
        ("torch", "lstm", {"layer": -1}, ValueError, r"layer must be a number of a layer, from 0, or None, got -1"),
        ("torch", "lstm", {"layer": True}, ValueError, r"layer must be a number of a layer, .*, got True"),
        ("torch", "lstm", {"reverse": 0}, ValueError, r"reverse must be False or True, got 0"),
    ],
)
def test_wrong_layouts(library: Any, cell: str, layout: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message.replace("ARGUMENT", "source")):
        convert.weights(list(ours("lstm").values()), library, cell, **layout)
    with pytest.raises(error, match=message.replace("ARGUMENT", "target")):
        convert.to(ours("lstm"), library, cell, **layout)


def test_direction_is_for_reading_alone() -> None:
    with pytest.raises(TypeError, match=r"target='onnx' and cell='lstm' go with input_forget, got direction=0"):
        convert.to(ours("lstm"), "onnx", direction=0)
    for wrong in (2, -1, True, "0"):
        with pytest.raises(ValueError, match=r"direction must be 0, 1 or None, got"):
            convert.weights(theirs("onnx", "lstm"), "onnx", direction=wrong)


def test_wrong_kinds_of_arrays() -> None:
    arrays = theirs("keras", "lstm")
    for wrong, error, message in (
        ([[0.0]], TypeError, r"kernel must be a numpy array or a tensor, got list"),
        (None, TypeError, r"kernel must be a numpy array or a tensor, got NoneType"),
        (arrays[0].astype(int), TypeError, r"kernel must be of a floating dtype of at most 64 bits, got int64"),
        (arrays[0].astype(complex), TypeError, r"kernel must be of a floating dtype .*, got complex128"),
        (
            torch.zeros(I, 4 * H, dtype=torch.int32),
            TypeError,
            r"kernel must be float16, .* or float64, got torch.int32",
        ),
        (torch.zeros(I, 4 * H).to_sparse(), ValueError, r"kernel must be a dense tensor, got layout torch.sparse_coo"),
    ):
        with pytest.raises(error, match=message):
            convert.weights([wrong, *arrays[1:]], "keras")
    with pytest.raises(ValueError, match=r"bias must be torch.float64 on cpu as kernel is, got torch.float32 on cpu"):
        convert.weights([*arrays[:2], arrays[2].astype(np.float32)], "keras")
    with pytest.raises(
        TypeError, match=r"arrays must be a list or tuple of kernel, recurrent_kernel, bias, got ndarray"
    ):
        convert.weights(arrays[0], "keras")
    with pytest.raises(TypeError, match=r"arrays must be a list or tuple of W, R, B, P, got dict"):
        convert.weights({"W": arrays[0]}, "onnx")
    with pytest.raises(TypeError, match=r"arrays must be a state dict, got list"):
        convert.weights(arrays, "lstm_triton")


@pytest.mark.parametrize(
    ("library", "cell", "count", "message"),
    [
        ("keras", "lstm", 6, r"arrays must be kernel, recurrent_kernel, bias, the first two at least, got 6"),
        ("keras", "lstm", 1, r"arrays must be kernel, .*, got 1"),
        ("onnx", "gru", 4, r"arrays must be W, R, B, the first two at least, got 4"),
        ("torch", "gru", 3, r"arrays must be weight_ih, weight_hh, bias_ih, bias_hh, the first two at least, got 3"),
        ("torch", "lstm", 6, r"arrays must be weight_ih, .*, got 6"),
    ],
)
def test_wrong_numbers_of_arrays(library: str, cell: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.weights([np.zeros((1, 1))] * count, library, cell)


def test_state_dicts_with_other_things() -> None:
    """What would change the result and has no place in it is refused, other layers' tensors are left alone."""
    state = nn.LSTM(I, H, num_layers=11).state_dict()
    peepholes = {f"weight_c{gate}_l1": torch.zeros(H) for gate in "ifo"}
    assert_equal(
        convert.weights(state | peepholes, "torch", layer=10),
        {name.removesuffix("_l10"): tensor for name, tensor in state.items() if name.endswith("_l10")},
    )
    with pytest.raises(ValueError, match=r"arrays has 'weight_ci_l1', and only .* can be converted from 'torch'"):
        convert.weights(state | peepholes, "torch", layer=1)
    assert convert.weights(state | peepholes, "lstm_triton", layer=1)["peephole"].shape == (3, H)
    with pytest.raises(ValueError, match=r"arrays has 'norm_ih_l0.weight', and only"):
        convert.weights(state | {"norm_ih_l0.weight": torch.zeros(4 * H)}, "lstm_triton")
    with pytest.raises(ValueError, match=r"arrays has 'weight_cf_l1', and only"):
        convert.weights(state | peepholes, "lstm_triton", layer=1, coupled=True)
    del state["bias_hh_l0"], peepholes["weight_co_l1"]
    with pytest.raises(ValueError, match=r"arrays must have bias_hh_l0, got"):
        convert.weights(state, "torch")
    with pytest.raises(ValueError, match=r"arrays must have weight_co_l1, got"):
        convert.weights(state | peepholes, "lstm_triton", layer=1)
