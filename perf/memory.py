"""What a run needs: the peak on the device, and what stays between forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .cases import Case, runner
from .timing import Run

MIB = 1 << 20


def peak_mib(run: Run) -> float:
    """Most of the device's memory in use at once during a run, over what was in use before it; its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # As asked for: what is allocated also depends on which blocks the cache happened to have.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run()
    torch.cuda.synchronize()
    return (torch.cuda.memory_stats()["requested_bytes.all.peak"] - before) / MIB


def saved_mib(layer: nn.Module, case: Case, x: Tensor, dy: Tensor) -> float:
    """What autograd keeps of a training forward, each storage once; parameters and x, which are there anyway, are not
    counted. Inference keeps nothing.
    """
    if not case.training:
        return 0.0
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a saved result would otherwise hold itself alive

    forward = runner(layer, replace(case, mode="forward"), x, dy)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = forward()  # held, so that no storage is freed and its address given out again
    free = _addresses([x, *layer.parameters()])
    del results
    return sum(size for address, size in kept.items() if address not in free) / MIB


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
