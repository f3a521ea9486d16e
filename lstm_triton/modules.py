"""LSTM, GRU and RNN layers with torch.nn's parameters, initialisation, arguments and errors, on `functional`."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional
from .spec import Activation, CellSpec, refuse_later_options

Device = torch.device | str | int | None


class RNNBase(nn.Module):
    """What the three layers share: parameters, checks, and the loop over layers and directions.

    Not a subclass of torch.nn.RNNBase, at which torch.compile breaks the graph. Parameters are read at every call and
    kept in no flat copy, so that parametrizations, weight dropping, `functional_call` and FSDP work.

    Parameters of layer k, with D directions (the backward one's names end in `_reverse`) and G gates:
        weight_ih_lk: [G*H, I] for k = 0, [G*H, D*H] above.
        weight_hh_lk: [G*H, H].
        bias_ih_lk, bias_hh_lk: [G*H], absent with bias=False.
    All are drawn from U(-1/sqrt(H), 1/sqrt(H)), in this order, as torch.nn does.
    """

    cell: ClassVar[str]
    states: ClassVar[int] = 1
    # torch.nn words this one error differently for each layer
    input_dim_error: ClassVar[str]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool, dropout: float,
        bidirectional: bool, proj_size: int, device: Device, dtype: torch.dtype | None, activation: Activation,
        engine: str, later: dict[str, object],
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.activation = activation
        self.engine = engine
        _check_arguments(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size)
        refuse_later_options(proj_size=proj_size, **later)
        functional.check_engine(engine)
        gates = CellSpec(self.cell, activation=activation, bias=bias).gates

        directions = 2 if bidirectional else 1
        rows = gates * hidden_size
        for layer in range(num_layers):
            columns = input_size if layer == 0 else directions * hidden_size
            for names in self._weight_names(layer):
                shapes = ((rows, columns), (rows, hidden_size), (rows,), (rows,))
                # not strict: without biases there are two names
                for name, shape in zip(names, shapes, strict=False):
                    setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels read each parameter where it is."""

    def _weight_names(self, layer: int) -> list[tuple[str, ...]]:
        """Parameter names of one layer, a tuple for each direction."""
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        return [tuple(f"{kind}_l{layer}{suffix}" for kind in kinds) for suffix in suffixes]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters, a list for each layer and direction."""
        return [
            [getattr(self, name) for name in names]
            for layer in range(self.num_layers)
            for names in self._weight_names(layer)
        ]

    def forward(
        self,
        input: Tensor,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Run all layers and directions over a sequence.

        input: [T, B, I], [B, T, I] with batch_first, or [T, I] unbatched.
        hx: the initial state, zeros where None: h_0 [L*D, B, H], for LSTM the pair (h_0, c_0); without B if unbatched.

        Returns output [T, B, D*H] in the input's layout, and the final state in the layout of hx.
        """
        refuse_later_options(lengths=lengths, mask=mask, reset=reset, return_cells=return_cells)
        if isinstance(input, PackedSequence):
            raise NotImplementedError("PackedSequence input is not available in this version of lstm_triton")
        if input.dim() not in (2, 3):
            raise ValueError(self.input_dim_error.format(input.dim()))
        batched = input.dim() == 3
        state = _split_state(hx, self.states, batched)
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            state = tuple(s.unsqueeze(1) for s in state)
        self._check_input(input)
        self._check_state(input, state)

        x, final = self._run_layers(input.transpose(0, 1) if self.batch_first else input, state)
        if not batched:
            x, final = x.squeeze(1), tuple(s.squeeze(1) for s in final)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, final if self.states > 1 else final[0]

    def _run_layers(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [T, B, I] and each state [L*D, B, H], or no state -> output [T, B, D*H] and final states."""
        run = getattr(functional, self.cell)
        # one initial state for each layer and direction
        rows = list(zip(*(s.unbind(0) for s in state), strict=True)) if state else None
        finals = []
        for layer in range(self.num_layers):
            outputs = []
            for direction, names in enumerate(self._weight_names(layer)):
                initial = rows[len(finals)] if rows else (None,) * self.states
                weights = [getattr(self, name) for name in names]
                y, *last = run(
                    x, *initial, *weights, activation=self.activation, reverse=direction == 1, engine=self.engine
                )
                outputs.append(y)
                finals.append(last)
            x = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))

    def _check_input(self, input: Tensor) -> None:
        weight = self.weight_ih_l0
        if input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check_state(self, input: Tensor, state: tuple[Tensor, ...]) -> None:
        batch, steps = input.shape[:2] if self.batch_first else input.shape[1::-1]
        expected = (self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size)
        for i, s in enumerate(state):
            if s.shape != expected:
                what = "hidden size" if self.states == 1 else f"hidden[{i}] size"
                raise RuntimeError(f"Expected {what} {expected}, got {list(s.shape)}")
        others = [("hidden", s) for s in state] + [("parameter", w) for names in self.all_weights for w in names]
        for name, other in others:
            if other.device != input.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, "
                    f"found input tensor at {input.device} and {name} tensor at {other.device}"
                )
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def extra_repr(self) -> str:
        shown = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "engine": "auto",
        }
        shown += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(shown)


class LSTM(RNNBase):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000), as torch.nn.LSTM.

        i, f, o = sigmoid(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh),  g = tanh(likewise)
        c[t] = f * c[t-1] + i * g
        h[t] = o * tanh(c[t])

    Arguments and state are torch.nn.LSTM's. engine: "auto", or the schedule to use, see `lt.functional.lstm`.
    An option that no kernel has yet raises NotImplementedError naming it.
    """

    cell = "lstm"
    states = 2
    input_dim_error = "LSTM: Expected input to be 2D or 3D, got {}D instead"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        device: Device = None, dtype: torch.dtype | None = None, *,
        peephole: bool = False, coupled: bool = False, cell_clip: float | None = None,
        output_activation: Activation | None = None,
        activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
        layer_norm: bool = False, zoneout: float | tuple[float, float] = 0.0, recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0, dropout_per_gate: bool = False, gate_clip: float | None = None,
        memory: str = "store", engine: str = "auto",
    ) -> None:  # fmt: skip
        later = {
            "peephole": peephole, "coupled": coupled, "cell_clip": cell_clip, "output_activation": output_activation,
            "recurrent_activation": recurrent_activation, "layer_norm": layer_norm, "zoneout": zoneout,
            "recurrent_dropout": recurrent_dropout, "input_dropout": input_dropout,
            "dropout_per_gate": dropout_per_gate, "gate_clip": gate_clip, "memory": memory,
        }  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype,
            activation, engine, later,
        )  # fmt: skip


class GRU(RNNBase):
    """Gated recurrent unit (Cho et al. 2014), reset after the product, as torch.nn.GRU.

        r, z = sigmoid(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh)
        n = tanh(W_in x[t] + b_in + r * (W_hn h[t-1] + b_hn))
        h[t] = (1 - z) * n + z * h[t-1]

    Arguments and state are torch.nn.GRU's. engine: "auto", or the schedule to use, see `lt.functional.gru`.
    An option that no kernel has yet raises NotImplementedError naming it.
    """

    cell = "gru"
    input_dim_error = "GRU: Expected input to be 2D or 3D, got {}D instead"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: Device = None, dtype: torch.dtype | None = None, *,
        reset_after: bool = True, activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
        layer_norm: bool = False, zoneout: float = 0.0, recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0, dropout_per_gate: bool = False, gate_clip: float | None = None,
        memory: str = "store", engine: str = "auto", **unsupported: object,
    ) -> None:  # fmt: skip
        _refuse_unsupported("GRU", unsupported)
        later = {
            "reset_after": reset_after,
            "recurrent_activation": recurrent_activation, "layer_norm": layer_norm, "zoneout": zoneout,
            "recurrent_dropout": recurrent_dropout, "input_dropout": input_dropout,
            "dropout_per_gate": dropout_per_gate, "gate_clip": gate_clip, "memory": memory,
        }  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            activation, engine, later,
        )  # fmt: skip


class RNN(RNNBase):
    """Elman network (1990), as torch.nn.RNN: h[t] = tanh(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh), or relu of it.

    Arguments and state are torch.nn.RNN's; `activation`, where it is not "tanh", wins over `nonlinearity`.
    engine: "auto", or the schedule to use, see `lt.functional.rnn`.
    An option that no kernel has yet raises NotImplementedError naming it.
    """

    cell = "rnn"
    input_dim_error = "RNN: Expected input to be 2D or 3D, got {}D tensor instead"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: Device = None, dtype: torch.dtype | None = None, *,
        activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
        layer_norm: bool = False, zoneout: float = 0.0, recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0, dropout_per_gate: bool = False, gate_clip: float | None = None,
        memory: str = "store", engine: str = "auto", **unsupported: object,
    ) -> None:  # fmt: skip
        _refuse_unsupported("RNN", unsupported)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        later = {
            "recurrent_activation": recurrent_activation, "layer_norm": layer_norm, "zoneout": zoneout,
            "recurrent_dropout": recurrent_dropout, "input_dropout": input_dropout,
            "dropout_per_gate": dropout_per_gate, "gate_clip": gate_clip, "memory": memory,
        }  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            nonlinearity if activation == "tanh" else activation, engine, later,
        )  # fmt: skip

    @property
    def nonlinearity(self) -> str:
        """torch.nn's name of the activation."""
        return self.activation


def _check_arguments(
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


def _refuse_unsupported(layer: str, options: dict[str, object]) -> None:
    """torch.nn takes proj_size for LSTM alone, and says so; any other name is no argument at all."""
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for name in options:
        raise TypeError(f"{layer}.__init__() got an unexpected keyword argument {name!r}")


def _split_state(hx: Tensor | tuple[Tensor, Tensor] | None, states: int, batched: bool) -> tuple[Tensor, ...]:
    """The layer's states as a tuple, empty where none was given."""
    if hx is None:
        return ()
    if states == 2 and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        raise RuntimeError("lstm expects two hidden states")
    state = (hx,) if states == 1 else tuple(hx)
    for s in state:
        if not isinstance(s, Tensor):
            raise TypeError(f"hx must hold tensors, got {type(s).__name__}")
    kind, dim = ("batched", 3) if batched else ("unbatched", 2)
    if any(s.dim() != dim for s in state):
        got = ", ".join(f"{s.dim()}-D" for s in state)
        names, got = ("hx", f"{got} tensor") if states == 1 else ("hx and cx", f"({got}) tensors")
        raise RuntimeError(f"For {kind} {dim}-D input, {names} should also be {dim}-D but got {got}")
    return state
