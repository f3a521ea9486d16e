"""What LSTM, GRU and RNN share: parameters and initialisation, a call's way through layers and directions, checks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from . import functional
from .calls import check_engine
from .checks import autocasts, check_arguments, check_attributes, check_dropouts
from .layer_options import OPTIONS, PARAMETER_NAMES, Device, State, shown_options, spec_of
from .ragged import Packing, Steps, batch_of_one, packing_of
from .reference import check_memory
from .spec import EPSILON, zoneout_of

BATCHED = {2: "unbatched", 3: "batched"}


class RNNBase(nn.Module):
    """What the three layers share: parameters, checks, and the loop over layers and directions.

    Not a subclass of torch.nn.RNNBase, at which torch.compile breaks the graph. Parameters are read once at every call
    and kept in no flat copy, so that parametrizations, weight dropping, `functional_call` and FSDP work.

    Parameters of layer k, with D directions (the backward one's names end in `_reverse`), G gates, and P columns of h,
    which are proj_size of them where it is given, H otherwise:
        weight_ih_lk: [G*H, I] for k = 0, [G*H, D*P] above.
        weight_hh_lk: [G*H, P].
        bias_ih_lk, bias_hh_lk: [G*H], absent with bias=False.
        weight_hr_lk: [P, H], present with proj_size.
        weight_ci_lk, weight_cf_lk, weight_co_lk: [H], present with peephole; without weight_cf_lk if coupled.
    All are drawn from U(-1/sqrt(H), 1/sqrt(H)), in this order, as torch.nn does. With layer_norm there are also modules
        norm_ih_lk, norm_hh_lk: torch.nn.LayerNorm(G*H), norm_c_lk: torch.nn.LayerNorm(H), of LSTM;
    of which weight and bias are read, ones and zeros to begin with.
    """

    cell: ClassVar[str]
    states: ClassVar[int] = 1
    # of OPTIONS, those that the function of the cell takes
    told: ClassVar[tuple[str, ...]]
    # torch.nn words this one error differently for each layer
    input_dim_error: ClassVar[str]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool, dropout: float,
        bidirectional: bool, proj_size: int, device: Device, dtype: torch.dtype | None, memory: str, engine: str,
        options: dict[str, Any],
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
        self.memory = memory
        self.engine = engine
        for name, value in options.items():
            setattr(self, name, value)
        check_arguments(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size)
        check_dropouts(self.recurrent_dropout, self.input_dropout, self.dropout_per_gate)
        check_engine(engine)
        check_memory(memory)

        spec = spec_of(self)
        G, H = spec.gates, hidden_size
        norms = {"norm_ih": G * H, "norm_hh": G * H, "norm_c": H} if spec.layer_norm else {}
        if self.cell != "lstm":
            norms.pop("norm_c", None)
        self._arguments = tuple(name for name in spec.parameters(input_size, H) if name != "peephole")
        suffixes = ("", "_reverse") if bidirectional else ("",)
        self._all_weights = []
        self._all_norms = []
        for layer in range(num_layers):
            inputs = input_size if layer == 0 else len(suffixes) * spec.output(H)
            shapes = spec.parameters(inputs, H)
            for suffix in (f"_l{layer}{direction}" for direction in suffixes):
                weights = {PARAMETER_NAMES[argument] + suffix: shapes[argument] for argument in self._arguments}
                weights |= {f"weight_c{gate}{suffix}": (H,) for gate in spec.peepholes}
                for name, shape in weights.items():
                    setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                for norm, columns in norms.items():
                    setattr(self, norm + suffix, nn.LayerNorm(columns, EPSILON, device=device, dtype=dtype))
                self._all_weights.append(list(weights))
                self._all_norms.append({norm: norm + suffix for norm in norms})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.hidden_size)
        norms = [getattr(self, name) for names in self._all_norms for name in names.values()]
        of_norms = {id(parameter) for norm in norms for parameter in norm.parameters()}
        for weight in self.parameters():
            if id(weight) not in of_norms:
                nn.init.uniform_(weight, -bound, bound)
        for norm in norms:
            norm.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels read each parameter where it is."""

    @property
    def mode(self) -> str:
        """torch.nn's name of what is computed."""
        return self.cell.upper()

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters as they are now, a list for each layer and direction; those of layer_norm are not in it."""
        return self._read_weights()

    def _read_weights(self) -> list[list[Tensor]]:
        # not in the property: nn.Module would say of a missing parameter that all_weights is missing
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights_names(self) -> list[str]:
        return list(chain(*self._all_weights))

    @property
    def _flat_weights(self) -> tuple[Tensor | None, ...]:
        """A tuple: what somebody put into torch.nn's list would count for nothing here."""
        return tuple(getattr(self, name, None) for name in self._flat_weights_names)

    @_flat_weights.setter
    def _flat_weights(self, weights: Iterable[Tensor | None]) -> None:
        """Nothing to do for who lists the parameters anew, as torch.nn wants it of those who replace one."""
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is not getattr(self, name, None) and not is_parametrized(self, name):
                raise ValueError(f"_flat_weights must hold the parameters themselves: set {name} to change one")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """Run all layers and directions over a sequence.

        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        hx: the initial state, zeros where None: h_0 [L*D, B, P], for LSTM the pair (h_0, c_0) with c_0 [L*D, B, H];
            without B if unbatched; in the order of the caller's rows for a PackedSequence.
        lengths: int [B], on the input's device, [] if unbatched, none for a PackedSequence, which has its own. Steps
            past a row's length give zeros, and the final state is that of its last step; the backward direction starts
            at each row's own end.
        mask: bool [T, B], [T] if unbatched, whatever batch_first says. Where false the step is skipped: its state held,
            its output zero.
        reset: bool, shaped as mask. Where true the state is zeroed before that step.
        return_cells: LSTM only; also return c after every step of the last layer.

        Returns output [T, B, D*P], in the input's layout, and the final state in the layout of hx. With return_cells
        also cells [T, B, D*H], [T, D*H] if unbatched, a PackedSequence for a PackedSequence.

        Raises what torch.nn raises for a wrong input or hx, and ValueError naming any other wrong argument.
        """
        if return_cells and self.cell != "lstm":
            raise ValueError(f"return_cells must be False for {type(self).__name__}, which has no cell state")
        weights = self._read_weights()
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None for a PackedSequence, which has its own")
            return self._forward_packed(input, hx, weights, {"mask": mask, "reset": reset}, return_cells)
        steps = {"lengths": lengths, "mask": mask, "reset": reset}
        if input.dim() not in (2, 3):
            raise ValueError(self.input_dim_error.format(input.dim()))
        state = () if hx is None else self._split_state(hx, input.dim())
        batched = input.dim() == 3
        if not batched:
            steps = batch_of_one(steps, input.size(0))
            input = input.unsqueeze(0 if self.batch_first else 1)
            state = tuple(s.unsqueeze(1) for s in state)
        self._check_call(input, state, weights, None)

        x = input.transpose(0, 1) if self.batch_first else input
        x, state, cells = self._run_layers(x, state, weights, steps, return_cells)
        if not batched:
            x, state, cells = x.squeeze(1), tuple(s.squeeze(1) for s in state), [c.squeeze(1) for c in cells]
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, self._join_state(state), *cells

    def _forward_packed(
        self, input: PackedSequence, hx: State | None, weights: list[list[Tensor]], masks: Steps, return_cells: bool
    ) -> tuple[Any, ...]:
        """On padded steps, rows sorted by length; results in the caller's packing, states in the caller's order."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        state = () if hx is None else self._split_state(self.permute_hidden(hx, sorted_indices), None)
        self._check_call(data, state, weights, batch_sizes)

        packing = packing_of(batch_sizes, data.device)
        steps = {"lengths": packing.lengths} | packing.sort(masks, sorted_indices)
        x, state, cells = self._run_layers(packing.pad(data), state, weights, steps, return_cells, packing)
        x, *cells = (
            PackedSequence(packing.pack(t), batch_sizes, sorted_indices, unsorted_indices) for t in (x, *cells)
        )
        return x, self.permute_hidden(self._join_state(state), unsorted_indices), *cells

    def _run_layers(
        self, x: Tensor, state: tuple[Tensor, ...], weights: list[list[Tensor]], steps: Steps, return_cells: bool,
        packing: Packing | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:  # fmt: skip
        """x [T, B, I] and each state [L*D, B, ...], or no state -> output [T, B, D*P], final states, and with
        return_cells a list of the last layer's cells [T, B, D*H].
        """
        run = getattr(functional, self.cell)
        options = {name: getattr(self, name) for name in self.told}
        options |= {"memory": self.memory, "engine": self.engine, **steps}
        # one initial state for each layer and direction
        initial = list(zip(*(s.unbind(0) for s in state), strict=True)) or [(None,) * self.states] * len(weights)
        directions = 2 if self.bidirectional else 1
        if len(weights) != self.num_layers * directions:
            raise RuntimeError(
                f"num_layers={self.num_layers}, bidirectional={self.bidirectional} do not fit the parameters, "
                f"which are of {len(weights)} layers and directions"
            )
        finals = []
        for layer in range(self.num_layers):
            last = layer == self.num_layers - 1
            if last and self.cell == "lstm":
                options["return_cells"] = return_cells
            outputs, cells = [], []
            for direction in range(directions):
                k = layer * directions + direction
                parameters = self._parameters_of(k, weights[k])
                drawn = self._draw(x, parameters) if self.training else {}
                y, *rest = run(x, *initial[k], **parameters, **drawn, reverse=direction == 1, **options)
                outputs.append(y)
                finals.append(rest[: self.states])
                cells += rest[self.states :]
            x = _concatenate(outputs)
            if not last and self.training and self.dropout:
                # torch.nn draws for the steps that there are, not for padding
                x = F.dropout(x if packing is None else packing.pack(x), self.dropout)
                x = x if packing is None else packing.pad(x)
        return x, tuple(torch.stack(s) for s in zip(*finals, strict=True)), [_concatenate(cells)] if cells else []

    def _parameters_of(self, k: int, weights: list[Tensor]) -> dict[str, Any]:
        """Of one layer and direction, as the functions call them."""
        own, peepholes = weights[: len(self._arguments)], weights[len(self._arguments) :]
        parameters: dict[str, Any] = dict(zip(self._arguments, own, strict=True))
        if peepholes:
            parameters["peephole"] = torch.stack(peepholes)
        for argument, name in self._all_norms[k].items():
            norm = getattr(self, name)
            parameters[argument] = (norm.weight, norm.bias)
        return parameters

    def _draw(self, x: Tensor, parameters: dict[str, Any]) -> dict[str, Tensor]:
        """What training draws anew for each layer and direction of each call on x [T, B, I]: masks, zoneout's seed."""
        drawn: dict[str, Tensor] = {}
        if not (self.input_dropout or self.recurrent_dropout or self.zoneout):
            return drawn
        batch, inputs = x.shape[1:]
        _, outputs = parameters["w_hh"].shape
        gates = (parameters["w_hh"].shape[0] // self.hidden_size,) if self.dropout_per_gate else ()
        if self.input_dropout:
            drawn["input_mask"] = F.dropout(x.new_ones(*gates, batch, inputs), self.input_dropout)
        if self.recurrent_dropout:
            drawn["recurrent_mask"] = F.dropout(x.new_ones(*gates, batch, outputs), self.recurrent_dropout)
        if any(zoneout_of(self.cell, self.zoneout)):
            lowest, highest = -(2**63), 2**63 - 1
            drawn["seed"] = torch.randint(lowest, highest, (1,), dtype=torch.int64, device=x.device)
        return drawn

    def _check_call(
        self, input: Tensor, state: tuple[Tensor, ...], weights: list[list[Tensor]], batch_sizes: Tensor | None
    ) -> None:
        """torch.nn's checks in its order: its own, then ATen's."""
        for name, weight in zip(self._flat_weights_names, chain(*weights), strict=True):
            if weight is None:
                raise TypeError(f"{name} must be a Tensor, got None")
        if batch_sizes is not None and self.cell == "lstm":
            # this one torch.nn leaves to ATen altogether
            check_attributes(input, state, chain(*weights))
        if state:
            self.check_forward_args(input, self._join_state(state), batch_sizes)
        else:
            self.check_input(input, batch_sizes)
        check_attributes(input, state, chain(*weights))
        if batch_sizes is None and input.size(1 if self.batch_first else 0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise ValueError or RuntimeError for an input [T, B, I], or packed data [N, I], of another dtype or shape."""
        dtype = self.weight_ih_l0.dtype
        if input.dtype != dtype and not autocasts(input):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        dims = 3 if batch_sizes is None else 2
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def get_expected_hidden_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """The shape of h_0 for this input: (L*D, B, P)."""
        layers, batch, hidden = self._state_size(input, batch_sizes)
        return layers, batch, self.proj_size or hidden

    def _state_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """(L*D, B, H)."""
        batch = input.size(0 if self.batch_first else 1) if batch_sizes is None else int(batch_sizes[0])
        return len(self._all_weights), batch, self.hidden_size

    def check_hidden_size(
        self, hx: Tensor, expected_hidden_size: tuple[int, int, int], msg: str = "Expected hidden size {}, got {}"
    ) -> None:
        """Raise RuntimeError(msg) if hx has another shape."""
        if hx.size() != expected_hidden_size:
            raise RuntimeError(msg.format(expected_hidden_size, list(hx.size())))

    def check_forward_args(self, input: Tensor, hidden: State, batch_sizes: Tensor | None) -> None:
        """Raise what torch.nn raises for an input [T, B, I], or packed data [N, I], and a state that do not fit."""
        self.check_input(input, batch_sizes)
        self.check_hidden_size(hidden, self.get_expected_hidden_size(input, batch_sizes))

    def permute_hidden(self, hx: State, permutation: Tensor | None) -> State:
        """The state with its rows in the order of `permutation` [B]."""
        return hx if permutation is None else hx.index_select(1, permutation)

    def _split_state(self, hx: State, input_dim: int | None) -> tuple[Tensor, ...]:
        """hx as a tuple; of as many dimensions as the input, if its are given."""
        if input_dim is not None and hx.dim() != input_dim:
            raise RuntimeError(
                f"For {BATCHED[input_dim]} {input_dim}-D input, hx should also be {input_dim}-D "
                f"but got {hx.dim()}-D tensor"
            )
        return (hx,)

    def _join_state(self, state: tuple[Tensor, ...]) -> State:
        return state[0]

    def extra_repr(self) -> str:
        """The sizes, and what is not at its default, as torch.nn shows it."""
        return f"{self.input_size}, {self.hidden_size}" + shown_options(
            self, proj_size=0, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False,
            **{name: default for name, default in OPTIONS.items() if hasattr(self, name)},
            memory="store", engine="auto",
        )  # fmt: skip


def _concatenate(directions: list[Tensor]) -> Tensor:
    return directions[0] if len(directions) == 1 else torch.cat(directions, dim=-1)
