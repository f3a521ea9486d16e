"""What the layers and cells refuse: what torch.nn does, with its exceptions and in its and ATen's words, and more."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor


def check_arguments(
    input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool, dropout: float, proj_size: int
) -> None:
    """torch.nn's checks, in its order and its words."""
    if not isinstance(dropout, numbers.Number) or not 0 <= dropout <= 1 or isinstance(dropout, bool):
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects num_layers "
            f"greater than 1, but got dropout={dropout} and num_layers={num_layers}",
            stacklevel=4,  # the line that builds the layer
        )
    for name, value, kind in (
        ("bias", bias, bool),
        ("batch_first", batch_first, bool),
        ("input_size", input_size, int),
        ("hidden_size", hidden_size, int),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} should be of type {kind.__name__}, got: {type(value).__name__}")
        if kind is int and value <= 0:
            raise ValueError(f"{name} must be greater than zero")
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if proj_size >= hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")


def check_dropouts(recurrent_dropout: float, input_dropout: float, dropout_per_gate: bool) -> None:
    """ValueError unless they are probabilities, TypeError unless dropout_per_gate is a bool."""
    for name, p in (("recurrent_dropout", recurrent_dropout), ("input_dropout", input_dropout)):
        if not isinstance(p, numbers.Real) or isinstance(p, bool) or not 0 <= p <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {p!r}")
    if type(dropout_per_gate) is not bool:
        raise TypeError(f"dropout_per_gate must be True or False, got {dropout_per_gate!r}")


def refuse_unsupported(layer: str, options: dict[str, object]) -> None:
    """torch.nn takes proj_size for LSTM alone, and says so; any other name is no argument at all."""
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for name in options:
        raise TypeError(f"{layer}.__init__() got an unexpected keyword argument {name!r}")


def autocasts(input: Tensor) -> bool:
    """Autocast chooses the dtype that this input is computed in."""
    return input.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(input.device.type)


def check_attributes(input: Tensor, hidden: Iterable[Tensor], parameters: Iterable[Tensor]) -> None:
    """ATen's RuntimeError for a state or a parameter of another device, or, outside autocast, of another dtype."""
    check_dtype = not autocasts(input)
    for kind, tensors in (("hidden", hidden), ("parameter", parameters)):
        for tensor in tensors:
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, "
                    f"found input tensor at {input.device} and {kind} tensor at {tensor.device}"
                )
            if check_dtype and tensor.dtype != input.dtype:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, "
                    f"found input tensor with {_aten_dtype(input)} and {kind} tensor with {_aten_dtype(tensor)}"
                )


def _aten_dtype(tensor: Tensor) -> str:
    """ATen's name of the dtype: "Float" for torch.float32."""
    return tensor.type().rpartition(".")[2].removesuffix("Tensor")
