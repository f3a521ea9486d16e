"""convert.weights and convert.to, to and from every library: which number goes where, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tagged_weights import OURS, THEIRS, H, I, P, assert_equal, ours, theirs
from torch import Tensor, nn

import lstm_triton as lt
from lstm_triton import convert

pytestmark = pytest.mark.both


def with_one_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"bias_hh": torch.zeros_like(tensors["bias_hh"])}


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
