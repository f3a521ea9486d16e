"""One layer in one direction with its options, as a function of all tensors that have gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numerics import problem
from torch import Tensor

import lstm_triton as lt


@dataclass(frozen=True)
class Case:
    """What is computed. masked: some steps of some rows are skipped, some start anew, and one row is short."""

    cell: str
    masked: bool = False
    projected: bool = False
    cells: bool = False
    reverse: bool = False
    activation: str = "tanh"
    bias: bool = True

    def __str__(self) -> str:
        flags = [name for name in ("masked", "projected", "cells", "reverse") if getattr(self, name)]
        return "-".join([self.cell, *flags, *([self.activation] if self.activation != "tanh" else [])])

    def inputs(self, T: int, B: int, H: int, features: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """x, h0, (c0,) w_ih, w_hh, (b_ih, b_hh,) (w_hr): what `function` takes."""
        tensors = problem(self.cell, T, B, H, features, dtype, self.bias)
        if self.projected:
            P = (H + 1) // 2
            w_hr = problem("rnn", 1, P, H, dtype=dtype, seed=1)[1]
            tensors[1], tensors[4] = tensors[1][:, :P].contiguous(), tensors[4][:, :P].contiguous()
            tensors.append(w_hr)
        return tensors

    def masks(self, T: int, B: int) -> dict[str, Tensor]:
        """lengths, mask and reset, where the case has them."""
        if not self.masked:
            return {}
        lengths = torch.full((B,), T)
        lengths[-1] = T - T // 3
        pattern = 3 * torch.arange(T)[:, None] + 5 * torch.arange(B)
        return {"lengths": lengths, "mask": pattern % 4 != 1, "reset": pattern % 5 == 3}

    def function(self, module: Any, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
        """lt.functional's or lt.reference's, of the tensors of `inputs`, and of masks instead of the case's own."""
        function = getattr(module, self.cell)
        options |= {"reverse": self.reverse, "activation": self.activation}
        if self.cells:
            options["return_cells"] = True

        def run(*tensors: Tensor, **masks: Tensor) -> tuple[Tensor, ...]:
            given = self.masks(*tensors[0].shape[:2]) | masks | options
            if self.projected:
                *tensors, given["w_hr"] = tensors
            return function(*tensors, **given)

        return run

    def both(self, **options: Any) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
        """The function on the kernels, with `options`, and the reference."""
        return self.function(lt.functional, **options), self.function(lt.reference)


PLAIN = [Case("lstm"), Case("gru"), Case("rnn")]
#: Every option at least once, and with it the cells that it can meet.
WITH_OPTIONS = [
    Case("lstm", masked=True, projected=True, cells=True, reverse=True),
    Case("gru", masked=True, reverse=True),
    Case("rnn", masked=True, activation="relu"),
]
