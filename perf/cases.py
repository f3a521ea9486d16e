"""One cell of the sweep: what is computed, on which numbers, and the call that computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lstm_triton.spec import GATES

#: Storage dtype of each name on the command line. "tf32" is float32 storage with tf32 products; "fp32" forbids them.
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
#: "rnn" is tanh. relu is not a cell of its own here: the kernels, the plans and cuDNN's algorithm are the same.
CELLS = tuple(GATES)
#: inference: without autograd; forward: of training, keeping what backward needs; forward+backward: all gradients.
MODES = ("inference", "forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One cell of the sweep. The input is as wide as the hidden state."""

    cell: str
    dtype: str
    mode: str  # one of MODES
    batch: int
    hidden: int
    seq: int
    layers: int = 1
    bidirectional: bool = False

    @property
    def key(self) -> dict[str, object]:
        return asdict(self)

    @property
    def training(self) -> bool:
        return self.mode != "inference"

    @property
    def gradients(self) -> bool:
        return self.mode == "forward+backward"

    def __str__(self) -> str:
        extra = f" L={self.layers}" * (self.layers > 1) + " both directions" * self.bidirectional
        return f"{self.cell} {self.dtype} {self.mode} B={self.batch} H={self.hidden} T={self.seq}{extra}"


def torch_layer(case: Case, **options: object) -> nn.RNNBase:
    """torch.nn's layer for a case, on the CPU and in float32 unless `options` say otherwise."""
    kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[case.cell]
    return kind(case.hidden, case.hidden, case.layers, bidirectional=case.bidirectional, **options)


def oracle(case: Case, seed: int = 0) -> nn.Module:
    """The torch.nn layer that holds the weights, in float32 on the CPU."""
    torch.manual_seed(seed)
    return torch_layer(case)


def inputs(case: Case, device: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x [T, B, I] and the gradient by the output [T, B, D*H], normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    width = case.hidden * (1 + case.bidirectional)
    shapes = (case.seq, case.batch, case.hidden), (case.seq, case.batch, width)
    x, dy = (torch.randn(shape, generator=generator).to(DTYPES[case.dtype]).to(device) for shape in shapes)
    return x, dy


def runner(layer: nn.Module, case: Case, x: Tensor, dy: Tensor) -> Callable[[], dict[str, Tensor]]:
    """A call that does the case's work once and returns everything it computed, by name."""
    parameters = dict(layer.named_parameters())
    x = x.detach().requires_grad_(case.training)

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(case.training):
            y, state = layer(x)
        states = state if isinstance(state, tuple) else (state,)
        found = {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}
        if case.gradients:
            gradients = torch.autograd.grad(y, [x, *parameters.values()], dy)
            found |= {f"d{name}": value for name, value in zip(("x", *parameters), gradients, strict=True)}
        return found

    return run


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Products in tf32 or not, for all providers and for matmul and cuDNN alike."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
