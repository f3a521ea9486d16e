"""convert.weights and convert.to: which number goes where, and back; and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lstm_triton as lt
from lstm_triton import convert

pytestmark = pytest.mark.both

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


def with_one_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"bias_hh": torch.zeros_like(tensors["bias_hh"])}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert found[name].is_contiguous()


def assert_same_arrays(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, np.ndarray)
        assert one.dtype == other.dtype
        assert one.flags.c_contiguous
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("library", "cell"), THEIRS)
def test_every_number_goes_where_it_belongs_and_back(library: str, cell: str) -> None:
    arrays = theirs(library, cell)
    expected = ours(cell, peephole=(library, cell) == ("onnx", "lstm"))
    if library == "cs231n" or (library == "keras" and cell != "gru"):
        expected = with_one_bias(expected)
    found = convert.weights(arrays, library, cell)
    assert_equal(found, expected)
    back = convert.to(found, library, cell)
    assert_same_arrays(back, [array[None] for array in arrays] if library == "onnx" else arrays)
    assert_equal(convert.weights(back, library, cell), expected)


@pytest.mark.parametrize("kind", ["numpy", "tensor", "tuple", "strided"])
def test_kinds_of_arrays(kind: str) -> None:
    arrays: Any = theirs("keras", "lstm")
    if kind == "tensor":
        arrays = [nn.Parameter(torch.from_numpy(array)) for array in arrays]
    elif kind == "tuple":
        arrays = tuple(arrays)
    elif kind == "strided":
        arrays = [array[::-1].astype(">f8")[::-1] for array in arrays]
        arrays[0].flags.writeable = False
    found = convert.weights(arrays, "keras")
    assert_equal(found, with_one_bias(ours("lstm")))
    assert not any(tensor.requires_grad for tensor in found.values())


def test_no_memory_is_shared() -> None:
    for source, arrays in (
        ("onnx", theirs("onnx", "lstm")),
        ("torch", list(ours("lstm").values())),
        ("torch", [tensor.numpy() for tensor in ours("lstm").values()]),
    ):
        kept = [array.copy() if isinstance(array, np.ndarray) else array.clone() for array in arrays]
        found = convert.weights(arrays, source)
        memory = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
        assert len(memory) == len(found)
        for tensor in found.values():
            tensor.zero_()
        assert all((array == one).all() for array, one in zip(arrays, kept, strict=True))
    for target in ("onnx", "torch", "keras"):
        tensors = ours("rnn")
        back = convert.to(tensors, target, "rnn")
        for array in back.values() if target == "torch" else back:
            array[...] = 0
        assert_equal(tensors, ours("rnn"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in ours("gru").items()}
    assert_equal(convert.weights(convert.to(tensors, "torch", "gru"), "torch", "gru"), tensors)
    if dtype == torch.bfloat16:
        with pytest.raises(ValueError, match=r"numpy has no bfloat16: 'onnx'"):
            convert.to(tensors, "onnx", "gru")
        return
    arrays = convert.to(tensors, "onnx", "gru")
    assert {str(array.dtype) for array in arrays} == {str(dtype).removeprefix("torch.")}
    assert_equal(convert.weights(arrays, "onnx", "gru"), tensors)


@pytest.mark.parametrize(("library", "cell"), THEIRS)
def test_without_biases(library: str, cell: str) -> None:
    expected = {name: tensor for name, tensor in ours(cell).items() if not name.startswith("bias")}
    arrays = theirs(library, cell)[:2]
    for given in (arrays, [*arrays, None]):
        assert_equal(convert.weights(given, library, cell), expected)
    back = convert.to(expected, library, cell)
    if library == "onnx":
        assert back[2:] == [None] * (2 if cell == "lstm" else 1)
        back = [array[0] for array in back[:2]]
    assert_same_arrays(back, arrays)


def test_one_bias_of_two() -> None:
    """The functions take one alone; where there is room for both, the other is zeros."""
    tensors = ours("gru")
    del tensors["bias_ih"]
    expected = tensors | {"bias_ih": torch.zeros_like(tensors["bias_hh"])}
    for library in ("onnx", "keras", "torch"):
        assert_equal(convert.weights(convert.to(tensors, library, "gru"), library, "gru"), expected)


@pytest.mark.parametrize(
    ("library", "cell"), [("keras", "lstm"), ("keras", "rnn"), ("cs231n", "lstm"), ("cs231n", "rnn")]
)
def test_two_biases_become_their_sum(library: str, cell: str) -> None:
    tensors = ours(cell)
    found = convert.weights(convert.to(tensors, library, cell), library, cell)
    assert_equal(found, with_one_bias(tensors | {"bias_ih": tensors["bias_ih"] + tensors["bias_hh"]}))


def test_keras_gru_that_resets_before() -> None:
    kernel, recurrent, bias = theirs("keras", "gru")
    found = convert.weights([kernel, recurrent, bias[0]], "keras", "gru", reset_after=False)
    assert_equal(found, with_one_bias(ours("gru")))
    assert_same_arrays(convert.to(found, "keras", "gru", reset_after=False), [kernel, recurrent, bias[0]])
    summed = convert.to(ours("gru"), "keras", "gru", reset_after=False)
    assert_same_arrays(summed, [kernel, recurrent, bias.sum(0)])
    with pytest.raises(ValueError, match=r"bias must have shape \(2, 15\) \(3 gate\(s\), I=3, H=5, reset_after=True\)"):
        convert.weights([kernel, recurrent, bias[0]], "keras", "gru")
    with pytest.raises(ValueError, match=r"bias must have shape \(15,\) .*, got \(2, 15\)"):
        convert.weights([kernel, recurrent, bias], "keras", "gru", reset_after=False)


@pytest.mark.parametrize("before", [0, 1])
def test_onnx_gru_has_the_same_arrays_for_both_resets(before: int) -> None:
    found = convert.weights(theirs("onnx", "gru"), "onnx", "gru", linear_before_reset=before)
    assert_equal(found, ours("gru"))
    assert_same_arrays(
        convert.to(found, "onnx", "gru", linear_before_reset=before), [array[None] for array in theirs("onnx", "gru")]
    )


def test_onnx_coupled() -> None:
    """ONNX keeps the rows of the forget gate, and does not read them."""
    expected = ours("lstm", "igo", peephole=True)
    found = convert.weights(theirs("onnx", "lstm"), "onnx", input_forget=1)
    assert_equal(found, expected)
    assert found["peephole"].shape == (2, H)
    back = convert.to(found, "onnx", input_forget=1)
    for array, full in zip(back, theirs("onnx", "lstm"), strict=True):
        forget = [gate == "f" for gate in "iofg" for _ in range(H)]
        forget = forget * 2 if len(full) == 8 * H else forget[: len(full)]
        np.testing.assert_array_equal(array[0], np.where(np.reshape(forget, (-1, *[1] * (full.ndim - 1))), 0, full))
    assert_equal(convert.weights(back, "onnx", input_forget=True), expected)


def test_onnx_directions() -> None:
    arrays = theirs("onnx", "lstm")
    expected = ours("lstm", peephole=True)
    two = [np.stack([array, -array]) for array in arrays]
    assert_equal(convert.weights(two, "onnx", direction=0), expected)
    assert_equal(convert.weights(two, "onnx", direction=1), {name: -tensor for name, tensor in expected.items()})
    for direction in (None, 0):
        assert_equal(convert.weights([array[None] for array in arrays], "onnx", direction=direction), expected)
    with pytest.raises(ValueError, match=r"W has two directions, shape \(2, 20, 3\): direction must be 0 or 1"):
        convert.weights(two, "onnx")
    for given in (arrays, [array[None] for array in arrays]):
        with pytest.raises(ValueError, match=r"W must have two directions, got shape"):
            convert.weights(given, "onnx", direction=1)
    for wrong in (np.stack([arrays[0]] * 3), arrays[0][0], arrays[0][None, None]):
        with pytest.raises(ValueError, match=r"W must have 2 dimensions, or 3 with the first one of 1 or 2, got shape"):
            convert.weights([wrong, *arrays[1:]], "onnx")


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": P}, {"proj_size": P, "bias": False}], ids=str)
@pytest.mark.parametrize("cell", OURS)
def test_state_dicts_of_torch(cell: str, options: dict[str, Any]) -> None:
    if "proj_size" in options and cell != "lstm":
        options = {"num_layers": 1}
    layer = getattr(nn, cell.upper())(I, H, **{"num_layers": 2, "bidirectional": True} | options)
    state = layer.state_dict()
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    for number in range(layer.num_layers):
        for reverse in (False, True):
            suffix = f"_l{number}" + "_reverse" * reverse
            expected = {name: state[name + suffix] for name in names if name + suffix in state}
            found = convert.weights(state, "torch", cell, layer=number, reverse=reverse)
            assert_equal(found, expected)
            flat = layer.all_weights[2 * number + reverse]
            assert_equal(convert.weights(flat, "torch", cell), expected)
            back = convert.to(found, "torch", cell, layer=number, reverse=reverse)
            assert list(back) == [name + suffix for name in expected]
            assert_equal(back, {name + suffix: tensor for name, tensor in expected.items()})


def test_state_dict_of_a_cell() -> None:
    state = nn.GRUCell(I, H).state_dict()
    found = convert.weights(state, "torch", "gru", layer=None)
    assert_equal(found, dict(state))
    assert_equal(convert.to(found, "torch", "gru", layer=None), dict(state))
    with pytest.raises(ValueError, match=r"arrays must have weight_ih_l0, weight_hh_l0, got 'weight_ih', 'weight_hh'"):
        convert.weights(state, "torch", "gru")
    with pytest.raises(ValueError, match=r"reverse=True is of a layer, and layer=None of a cell"):
        convert.weights(state, "torch", "gru", layer=None, reverse=True)


@pytest.mark.parametrize("coupled", [False, True], ids=["uncoupled", "coupled"])
def test_state_dict_of_ours(coupled: bool) -> None:
    """Peepholes are three vectors there, or two; and what comes from ONNX can be loaded."""
    layer = lt.LSTM(I, H, peephole=True, coupled=coupled, dtype=torch.float64)
    tensors = ours("lstm", "igo" if coupled else "ifgo", peephole=True)
    state = convert.to(tensors, "lstm_triton", coupled=coupled)
    layer.load_state_dict(state)
    assert_equal(convert.weights(layer.state_dict(), "lstm_triton", coupled=coupled), tensors)
    assert ("weight_cf_l0" in state) is not coupled
    torch.testing.assert_close(state["weight_co_l0"], tensors["peephole"][-1])
    x = torch.randn(4, 2, I, dtype=torch.float64)
    layer.load_state_dict({name: tensor / 1e6 for name, tensor in state.items()})
    weights = {name: tensor / 1e6 for name, tensor in tensors.items()}
    peephole = weights.pop("peephole")
    y, h_n, c_n = lt.reference.lstm(x, None, None, *weights.values(), peephole=peephole, coupled=coupled)
    for found, expected in zip((layer(x)[0], *layer(x)[1]), (y, h_n[None], c_n[None]), strict=True):
        torch.testing.assert_close(found, expected)


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
