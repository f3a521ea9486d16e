"""Sequences of unequal length: a PackedSequence as padded steps and back, on its device, which is never waited for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: `lengths`, `mask` and `reset` by name, None where not given.
Steps = dict[str, Tensor | None]


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
        """[N, ...] -> [T, B, ...], zero past each row's length. Raises ValueError for another number of steps."""
        if len(data) != len(self.index):
            raise ValueError(f"data of a PackedSequence holds {len(data)} steps, its batch_sizes {len(self.index)}")
        padded = data.new_zeros(self.steps * self.batch, *data.shape[1:]).index_copy_(0, self.index, data)
        return padded.unflatten(0, (self.steps, self.batch))

    def pack(self, padded: Tensor) -> Tensor:
        """[T, B, ...] -> [N, ...]."""
        return padded.flatten(0, 1).index_select(0, self.index)

    def sort(self, masks: Steps, sorted_indices: Tensor | None) -> Steps:
        """mask and reset [T, B] of the caller's rows with the rows in the packing's order.

        Raises TypeError or ValueError naming a wrong one.
        """
        for name, given in masks.items():
            _check_shape(name, given, (self.steps, self.batch), "this PackedSequence")
        if sorted_indices is None:
            return masks
        return {name: None if given is None else given.index_select(1, sorted_indices) for name, given in masks.items()}


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
    shifts = torch.arange(T, device=batch_sizes.device) * B - (batch_sizes.cumsum(0) - batch_sizes)
    sizes, shifts = _send(torch.stack((batch_sizes, shifts)), device)
    index = torch.arange(N, device=device) + shifts.repeat_interleave(sizes, output_size=N)
    lengths = (torch.arange(B, device=device)[:, None] < sizes).sum(1)
    return Packing(T, B, index, lengths)


def _send(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on `device`, which need not have caught up: from pinned memory where it is a GPU."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def batch_of_one(steps: Steps, T: int) -> Steps:
    """lengths [] and mask, reset [T] of an unbatched sequence as those of a batch: [1] and [T, 1].

    Raises TypeError or ValueError naming a wrong one.
    """
    for name, given in steps.items():
        _check_shape(name, given, () if name == "lengths" else (T,), "unbatched input")
    return {name: None if given is None else given.unsqueeze(-1) for name, given in steps.items()}


def _check_shape(name: str, given: Tensor | None, shape: tuple[int, ...], of: str) -> None:
    if given is None:
        return
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(given).__name__}")
    if given.shape != shape:
        raise ValueError(f"{name} must have shape {shape} for {of}, got {tuple(given.shape)}")
