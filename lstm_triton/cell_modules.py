"""LSTMCell, GRUCell and RNNCell: one time step, with torch.nn's parameters, arguments and errors, on `functional`."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from . import functional
from .calls import check_engine
from .checks import check_attributes
from .modules import PARAMETER_NAMES, Device, shown_options
from .spec import CellSpec


class RNNCellBase(nn.Module):
    """What the three cells share.

    Parameters, with G gates: weight_ih [G*H, I], weight_hh [G*H, H], bias_ih and bias_hh [G*H], None with bias=False.
    All are drawn from U(-1/sqrt(H), 1/sqrt(H)), in this order, as torch.nn does.
    """

    cell: ClassVar[str]

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, device: Device, dtype: torch.dtype | None, engine: str
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.engine = engine
        check_engine(engine)
        for argument, shape in CellSpec(self.cell).parameters(input_size, hidden_size).items():
            name = PARAMETER_NAMES[argument]
            if bias or name.startswith("weight"):
                setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            else:
                self.register_parameter(name, None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def _step(self, input: Tensor, state: tuple[Tensor, ...], **options: str) -> list[Tensor]:
        """One step of `functional` from the states given, or from zeros -> the new states."""
        batched = input.dim() == 2
        if not batched:
            input, state = input.unsqueeze(0), tuple(s.unsqueeze(0) for s in state)
        parameters = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        self._check_sizes(input, state, parameters[0].size(1))
        check_attributes(input, state, [p for p in parameters if p is not None])
        states = 2 if self.cell == "lstm" else 1
        if self.hidden_size == 0:
            # nothing to compute, but part of the graph: no layer has this, but torch.nn's cells do
            last = [nn.functional.linear(input, self.weight_ih) for _ in range(states)]
        else:
            run = getattr(functional, self.cell)
            initial = state or (None,) * states
            _, *last = run(input.unsqueeze(0), *initial, *parameters, engine=self.engine, **options)
        return last if batched else [s.squeeze(0) for s in last]

    def _check_sizes(self, input: Tensor, state: tuple[Tensor, ...], input_size: int) -> None:
        """ATen's checks, in its words."""
        if input.size(1) != input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {input_size}")
        for i, s in enumerate(state):
            if s.size(0) != input.size(0):
                raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden{i} batch size {s.size(0)}")
            if s.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{i} has inconsistent hidden_size: got {s.size(1)}, expected {self.hidden_size}"
                )

    def _check_dim(self, what: str, tensor: Tensor) -> None:
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{self.cell.upper()}Cell: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")

    def extra_repr(self) -> str:
        """The sizes, and what is not at its default, as torch.nn shows it."""
        return f"{self.input_size}, {self.hidden_size}" + shown_options(self, bias=True, engine="auto")


class LSTMCell(RNNCellBase):
    """One step of an LSTM, see `LSTM`, as torch.nn.LSTMCell. engine: "auto", or one that `lt.functional.lstm` takes."""

    cell = "lstm"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Device = None,
        dtype: torch.dtype | None = None, *, engine: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, bias, device, dtype, engine)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """input [B, I] or [I], hx = (h_0, c_0), each [B, H] or [H], zeros where None -> (h_1, c_1), of hx's shapes.

        Raises what torch.nn.LSTMCell raises.
        """
        self._check_dim("input", input)
        state = ()
        if hx is not None:
            for i, s in enumerate(hx):
                self._check_dim(f"hx[{i}]", s)
            if input.dim() == 2 and isinstance(hx, Tensor):
                raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
            # as torch.nn, which reads the first two for unbatched input
            if input.dim() == 2 and len(hx) != 2:
                raise RuntimeError("lstm_cell expects two hidden states")
            state = (hx[0], hx[1])
        h, c = self._step(input, state)
        return h, c


class GRUCell(RNNCellBase):
    """One step of a GRU, see `GRU`, as torch.nn.GRUCell. engine: "auto", or one that `lt.functional.gru` takes."""

    cell = "gru"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Device = None,
        dtype: torch.dtype | None = None, *, engine: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, bias, device, dtype, engine)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input [B, I] or [I], hx [B, H] or [H], zeros where None -> the new state, of hx's shape.

        Raises what torch.nn.GRUCell raises.
        """
        self._check_dim("input", input)
        if hx is not None:
            self._check_dim("hidden", hx)
        return self._step(input, () if hx is None else (hx,))[0]


class RNNCell(RNNCellBase):
    """One step of an Elman network, see `RNN`, as torch.nn.RNNCell. nonlinearity: "tanh" or "relu"; engine: "auto", or
    one that `lt.functional.rnn` takes.
    """

    cell = "rnn"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
        device: Device = None, dtype: torch.dtype | None = None, *, engine: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(input_size, hidden_size, bias, device, dtype, engine)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input [B, I] or [I], hx [B, H] or [H], zeros where None -> the new state, of hx's shape.

        Raises what torch.nn.RNNCell raises, RuntimeError for an unknown nonlinearity too.
        """
        self._check_dim("input", input)
        if hx is not None:
            self._check_dim("hidden", hx)
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._step(input, () if hx is None else (hx,), activation=self.nonlinearity)[0]

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + shown_options(
            self, bias=True, nonlinearity="tanh", engine="auto"
        )
