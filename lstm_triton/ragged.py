"""Sequences of unequal length: a PackedSequence as padded steps and back, on its device, which is never waited for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the N steps of a PackedSequence lie among T padded steps of B rows, longest row first.

    steps: T; batch: B.
    index: [N] int64, on the data's device: packed step n is step index[n] of the T*B padded ones, each at most once.
    lengths: [B] int64, on the data's device, descending.
    """

    steps: int
    batch: int
    index: Tensor
    lengths: Tensor

    def pad(self, data: Tensor) -> Tensor:
        """[N, ...] -> [T, B, ...], zero past each row's length."""
        padded = data.new_zeros(self.steps * self.batch, *data.shape[1:]).index_copy(0, self.index, data)
        return padded.unflatten(0, (self.steps, self.batch))

    def pack(self, padded: Tensor) -> Tensor:
        """[T, B, ...] -> [N, ...]."""
        return padded.flatten(0, 1).index_select(0, self.index)


def packing_of(batch_sizes: Tensor, device: torch.device) -> Packing:
    """The packing of a PackedSequence with these batch_sizes [T] (int64 on the CPU, as torch has them) and its data on
    `device`.

    The host reads batch_sizes and sends one small copy of them; everything as long as the data is made on the device.
    Raises ValueError if they increase anywhere: no packed sequence does that.
    """
    if (batch_sizes.diff() > 0).any():
        raise ValueError(f"batch_sizes of a PackedSequence must not increase, got {batch_sizes.tolist()}")
    T, B, N = len(batch_sizes), int(batch_sizes[0]), int(batch_sizes.sum())
    # packed steps lie closer than padded ones: by B - batch_sizes[s] for each step s before theirs
    shifts = torch.arange(T) * B - (batch_sizes.cumsum(0) - batch_sizes)
    sizes, shifts = _send(torch.stack((batch_sizes, shifts)), device)
    index = torch.arange(N, device=device) + shifts.repeat_interleave(sizes, output_size=N)
    lengths = (torch.arange(B, device=device)[:, None] < sizes).sum(1)
    return Packing(T, B, index, lengths)


def _send(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on `device`, which need not have caught up: from pinned memory where it is a GPU."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def batch_of_one(
    lengths: Tensor | None, mask: Tensor | None, reset: Tensor | None, steps: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The arguments of an unbatched sequence of T steps, lengths [] and mask, reset [T], for a batch of one row.

    Raises ValueError naming the argument of another shape.
    """
    expected = {"lengths": (lengths, ()), "mask": (mask, (steps,)), "reset": (reset, (steps,))}
    for name, (given, shape) in expected.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for unbatched input, got {tuple(given.shape)}")
    return tuple(None if given is None else given.unsqueeze(-1) for given in (lengths, mask, reset))
