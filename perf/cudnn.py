"""Which algorithm PyTorch asks cuDNN for, inferred: its decision written down anew, since cuDNN does not tell.

After get_algo and its heuristics in PyTorch's aten/src/ATen/native/cudnn/RNN.cpp and use_cudnn in native/RNN.cpp, for
PyTorch 2.10 and newer; inputs as wide as the hidden state, no projection, nothing packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cases import Case

STANDARD, STATIC, SMALL = "standard", "persist static", "persist static small H"
#: Largest hidden size of the small-H algorithm, forward and backward.
SMALL_H = {"lstm": (192, 128), "gru": (192, 128), "rnn": (384, 256)}
#: From this version on PyTorch hands bfloat16 to cuDNN; before, ATen's own step-by-step kernels run.
BF16_SINCE = 91300


@dataclass(frozen=True)
class Gpu:
    """What the decision asks of the device and of cuDNN."""

    major: int
    minor: int
    sms: int
    cudnn: int  # version, 0 where PyTorch does not use it

    @classmethod
    def here(cls) -> Gpu:
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        version = torch.backends.cudnn.version() if torch.backends.cudnn.enabled else None
        return cls(p.major, p.minor, p.multi_processor_count, version or 0)


def label(case: Case, gpu: Gpu) -> str:
    """The algorithm of a case as a table shows it, forward and, where it differs, backward."""
    if not gpu.cudnn or (case.dtype == "bf16" and (gpu.cudnn < BF16_SINCE or gpu.major < 8)):
        return "ATen"
    found = [algorithm(case, gpu, forward) for forward in ((True, False) if case.gradients else (True,))]
    return f"cuDNN {' / '.join(dict.fromkeys(found))}"


def algorithm(case: Case, gpu: Gpu, forward: bool) -> str:
    """Of one direction."""
    if case.dtype != "fp64" and case.hidden <= SMALL_H[case.cell][0 if forward else 1]:
        return SMALL
    one_chain = case.layers == 1 and not case.bidirectional
    if case.dtype == "fp16" and one_chain and case.hidden <= 1024 and case.hidden % 128 == 0:
        return STATIC if _suits_static(case, gpu) else STANDARD
    return STANDARD


def _suits_static(case: Case, gpu: Gpu) -> bool:
    batch = case.batch
    if gpu.major == 7:
        lengths = (case.seq >= 40 and batch <= 128) or (case.seq >= 20 and batch <= 96)
        lengths = lengths or (case.seq >= 10 and batch <= 32)
        return gpu.minor != 5 and ((batch % 16 == 0 and batch not in (80, 112)) or batch == 8) and lengths
    if gpu.major < 8 or gpu.sms < 98 or gpu.minor == 6 or case.cell == "gru":
        return False
    wide = case.cell == "rnn" and batch >= 96 and case.hidden >= 896
    return batch % 8 == 0 and batch <= 128 and not wide
