"""LSTM, GRU and RNN layers with torch.nn's parameters, initialisation, arguments and errors, on `functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import refuse_unsupported
from .layer_base import BATCHED, RNNBase
from .layer_options import OPTIONS, PARAMETER_NAMES, Device, State, shown_options, spec_of
from .spec import Activation, activation_of

__all__ = ["GRU", "LSTM", "OPTIONS", "PARAMETER_NAMES", "RNN", "Device", "RNNBase", "State", "shown_options", "spec_of"]


class LSTM(RNNBase):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000), as torch.nn.LSTM.

        i, f, o = sigmoid(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh),  g = tanh(likewise)
        c[t] = f * c[t-1] + i * g
        h[t] = o * tanh(c[t]), with proj_size W_hr times that (Sak et al. 2014)

    Arguments and state are torch.nn.LSTM's. Options, in any combination:
        peephole: before their sigmoid, i and f also get weight_ci * c[t-1] and weight_cf * c[t-1], o gets weight_co *
            c[t] (Gers and Schmidhuber 2000).
        coupled: f = 1 - i, and three gates instead of four, i, g, o (Greff et al. 2017).
        activation, recurrent_activation, output_activation: in place of tanh for g, of sigmoid for i, f, o, and of tanh
            for c[t], where None is as activation. A name or (name, alpha, beta), see `lt.functional.lstm`.
        cell_clip: c[t] is held within +- this, before o's peephole reads it. gate_clip: every gate is, before its
            activation. The gradient through either is 1 within and on the bound, 0 beyond.
        layer_norm: W_ih x[t] and W_hh h[t-1] are normalised over all gates before they are added up with the biases,
            and f * c[t-1] + i * g to become c[t], which is carried on so (Ba et al. 2016, who carry it unnormalised; as
            PyTorch's benchmark of custom LSTMs).
        zoneout: one probability, or one for h and one for c. In training each unit keeps its h[t-1] or c[t-1] with
            that probability; in evaluation h[t] = z * h[t-1] + (1 - z) * (what the step gives) (Krueger et al. 2017).
        recurrent_dropout, input_dropout: in training h[t-1] or x[t] of each layer and direction is multiplied by one
            mask for the whole sequence, before the products: zero with this probability, else 1 / (1 - probability)
            (Gal and Ghahramani 2016). dropout_per_gate: by a mask of its own for each gate.
        memory: "store", or "recompute" to keep less for backward and compute it there. engine: "auto", or the schedule
            to use, see `lt.functional.lstm`.
    Raises ValueError or TypeError naming a wrong one.
    """

    cell = "lstm"
    states = 2
    told = (
        "activation", "recurrent_activation", "output_activation", "coupled", "cell_clip", "gate_clip", "zoneout"
    )  # fmt: skip
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
        options = {
            "peephole": peephole, "coupled": coupled, "cell_clip": cell_clip, "output_activation": output_activation,
            "activation": activation, "recurrent_activation": recurrent_activation, "layer_norm": layer_norm,
            "zoneout": zoneout, "recurrent_dropout": recurrent_dropout, "input_dropout": input_dropout,
            "dropout_per_gate": dropout_per_gate, "gate_clip": gate_clip,
        }  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype,
            memory, engine, options,
        )  # fmt: skip

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """The shape of c_0 for this input: (L*D, B, H)."""
        return self._state_size(input, batch_sizes)

    def check_forward_args(self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        sizes = self.get_expected_hidden_size(input, batch_sizes), self.get_expected_cell_size(input, batch_sizes)
        for i, size in enumerate(sizes):
            self.check_hidden_size(hidden[i], size, f"Expected hidden[{i}] size {{}}, got {{}}")

    def permute_hidden(self, hx: tuple[Tensor, Tensor], permutation: Tensor | None) -> tuple[Tensor, Tensor]:
        return hx if permutation is None else (hx[0].index_select(1, permutation), hx[1].index_select(1, permutation))

    def _split_state(self, hx: tuple[Tensor, Tensor], input_dim: int | None) -> tuple[Tensor, Tensor]:
        if input_dim is not None and not hx[0].dim() == hx[1].dim() == input_dim:
            raise RuntimeError(
                f"For {BATCHED[input_dim]} {input_dim}-D input, hx and cx should also be {input_dim}-D "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        # as torch.nn, which reads the first two of anything for unbatched input
        if input_dim != 2:
            if not isinstance(hx, (tuple, list)):
                raise TypeError(f"lstm(): argument 'hx' (position 2) must be tuple of Tensors, not {type(hx).__name__}")
            if len(hx) != 2:
                raise RuntimeError("lstm expects two hidden states")
        return hx[0], hx[1]

    def _join_state(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return state


class GRU(RNNBase):
    """Gated recurrent unit (Cho et al. 2014), as torch.nn.GRU.

        r, z = sigmoid(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh)
        n = tanh(W_in x[t] + b_in + r * (W_hn h[t-1] + b_hn))
        h[t] = (1 - z) * n + z * h[t-1]

    Arguments and state are torch.nn.GRU's. reset_after=False: the reset is before the product, as in the paper, n =
    tanh(W_in x[t] + b_in + W_hn (r * h[t-1]) + b_hn); layer_norm cannot go with it. recurrent_dropout masks the h[t-1]
    of the products alone. The options that are here are as LSTM's; activation is n's, recurrent_activation r's and z's.
    """

    cell = "gru"
    told = ("activation", "recurrent_activation", "reset_after", "gate_clip", "zoneout")
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
        refuse_unsupported("GRU", unsupported)
        options = {
            "reset_after": reset_after, "activation": activation, "recurrent_activation": recurrent_activation,
            "layer_norm": layer_norm, "zoneout": zoneout, "recurrent_dropout": recurrent_dropout,
            "input_dropout": input_dropout, "dropout_per_gate": dropout_per_gate, "gate_clip": gate_clip,
        }  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            memory, engine, options,
        )  # fmt: skip


class RNN(RNNBase):
    """Elman network (1990), as torch.nn.RNN: h[t] = tanh(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh), or relu of it.

    Arguments and state are torch.nn.RNN's; `activation`, where it is not "tanh", wins over `nonlinearity`. The options
    that are here are as LSTM's; there are no gates, and so no recurrent_activation but the default.
    """

    cell = "rnn"
    told = ("activation", "gate_clip", "zoneout")
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
        refuse_unsupported("RNN", unsupported)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        options = {
            "activation": nonlinearity if activation == "tanh" else activation,
            "recurrent_activation": recurrent_activation, "layer_norm": layer_norm, "zoneout": zoneout,
            "recurrent_dropout": recurrent_dropout, "input_dropout": input_dropout,
            "dropout_per_gate": dropout_per_gate, "gate_clip": gate_clip,
        }  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            memory, engine, options,
        )  # fmt: skip

    @property
    def nonlinearity(self) -> Activation:
        """The activation, under torch.nn's name of it."""
        return self.activation

    @property
    def mode(self) -> str:
        return f"RNN_{activation_of(self.activation)[0].upper()}"

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        # torch.nn does not show its nonlinearities
        return shown.replace(", activation=relu", "") if self.activation == "relu" else shown
