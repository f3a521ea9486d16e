"""The two that are compared, ours and torch.nn, built with the same weights and run the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lstm_triton.planner import LaunchPlan

#: Storage dtype of each name on the command line. "tf32" is float32 storage with tf32 products; "fp32" forbids them.
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
PROVIDERS = ("ours", "torch")


@dataclass(frozen=True)
class Case:
    """One cell of the sweep. The input is as wide as the hidden state."""

    cell: str
    dtype: str
    mode: str  # "fwd": inference; "fwdbwd": training forward and all gradients
    batch: int
    hidden: int
    seq: int
    layers: int = 1
    bidirectional: bool = False
    engine: str = "auto"

    @property
    def key(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        extra = f" L={self.layers}" * (self.layers > 1) + " both directions" * self.bidirectional
        engine = f" {self.engine}" * (self.engine != "auto")
        return f"{self.cell} {self.dtype} {self.mode} B={self.batch} H={self.hidden} T={self.seq}{extra}{engine}"


def oracle(case: Case, seed: int = 0) -> nn.Module:
    """The torch.nn layer that holds the weights, in float32 on the CPU."""
    torch.manual_seed(seed)
    kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[case.cell]
    return kind(case.hidden, case.hidden, case.layers, bidirectional=case.bidirectional)


def build(provider: str, case: Case, weights: dict[str, Tensor], device: str) -> nn.Module:
    """The layer of one provider, with these weights rounded to the case's dtype."""
    import lstm_triton as lt

    options = {"bidirectional": case.bidirectional, "device": device, "dtype": DTYPES[case.dtype]}
    if provider == "ours":
        kind = {"lstm": lt.LSTM, "gru": lt.GRU, "rnn": lt.RNN}[case.cell]
        options["engine"] = case.engine
    else:
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[case.cell]
    layer = kind(case.hidden, case.hidden, case.layers, **options)
    layer.load_state_dict(weights)
    # cuDNN takes the training flag, not autograd's, for whether to keep what backward needs.
    return layer.train(case.mode == "fwdbwd")


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
    x = x.detach().requires_grad_(case.mode == "fwdbwd")

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(case.mode == "fwdbwd"):
            y, state = layer(x)
        states = state if isinstance(state, tuple) else (state,)
        found = {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}
        if case.mode == "fwdbwd":
            gradients = torch.autograd.grad(y, [x, *parameters.values()], dy)
            found |= {f"d{name}": value for name, value in zip(("x", *parameters), gradients, strict=True)}
        return found

    return run


def plan(case: Case, device: str) -> LaunchPlan | None:
    """The schedule ours takes for each layer; None where no kernel of ours runs."""
    if device != "cuda":
        return None
    import lstm_triton as lt

    def like(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[case.dtype], device=device)

    rows = {"lstm": 4, "gru": 3, "rnn": 1}[case.cell] * case.hidden
    states = (None, None) if case.cell == "lstm" else (None,)
    w, b = like(rows, case.hidden), like(rows)
    with precision(case.dtype):
        x = like(case.seq, case.batch, case.hidden)
        return lt.plan(case.cell, x, *states, w, w, b, b, engine=case.engine)


def kernels(case: Case, device: str) -> list[tuple[LaunchPlan, str, bool]]:
    """What ours compiles for a case: plan, direction, and whether it saves for backward."""
    found = plan(case, device)
    if found is None:
        return []
    return [(found, "forward", False)] if case.mode == "fwd" else [(found, "forward", True), (found, "backward", True)]


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Products in tf32 or not, for both providers and for matmul and cuDNN alike."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
