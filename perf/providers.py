"""Who is compared: ours, by engine; torch.nn; and peers. All with the same weights, run the same way."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton.planner import ENGINES
from lstm_triton.spec import GATES

from . import cudnn, peers
from .cases import DTYPES, Case, precision, torch_layer
from .precompile import Kernel

if TYPE_CHECKING:
    from lstm_triton.plans import LaunchPlan


@dataclass(frozen=True)
class Provider:
    """One way to run a layer."""

    includes: str  # what its time includes, a sentence for reports
    layer: Callable[..., nn.Module]  # (case, device=, dtype=); ValueError for what it cannot do
    module: str = "torch"  # what must be importable
    distribution: str = "torch"  # whose version counts
    engine: str = ""  # ours: which engine

    @property
    def version(self) -> str:
        if self.engine:
            return lstm_triton.__version__
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def _ours(engine: str) -> Provider:
    def layer(case: Case, **options: object) -> nn.Module:
        kind = {"lstm": lstm_triton.LSTM, "gru": lstm_triton.GRU, "rnn": lstm_triton.RNN}[case.cell]
        return kind(case.hidden, case.hidden, case.layers, bidirectional=case.bidirectional, engine=engine, **options)

    which = "engines and tiles as planned" if engine == "auto" else f"engine {engine} by name"
    includes = f"{which}: input product, recurrence, and in backward the products for dx and the weights."
    return Provider(includes, layer, engine=engine)


def _torch(case: Case, **options: object) -> nn.Module:
    """torch.nn's layer, cuDNN's weights in one piece in bfloat16, too.

    PyTorch sees to that in the other dtypes; in bfloat16 it hands the layer to cuDNN, but copies the weights together
    at every call.
    """
    layer = torch_layer(case, **options)
    weights = layer._flat_weights
    if weights[0].is_cuda and weights[0].dtype == torch.bfloat16 and cudnn.label(case, cudnn.Gpu.here()) != "ATen":
        mode = torch.backends.cudnn.rnn.get_cudnn_mode(layer.mode)
        with torch.no_grad():
            torch._cudnn_rnn_flatten_weight(
                weights, 4, layer.input_size, mode, layer.hidden_size, 0, layer.num_layers, False, layer.bidirectional
            )
    return layer


def _peer(includes: str, sequence: Callable[[Case], peers.Sequence], *names: str) -> Provider:
    def layer(case: Case, **options: object) -> nn.Module:
        return peers.Layered(torch_layer(case, **options), sequence(case))

    return Provider(includes, layer, *names)


PROVIDERS: dict[str, Provider] = {
    "ours": _ours("auto"),
    **{f"ours:{engine}": _ours(engine) for engine in ENGINES},
    "torch": Provider(
        "torch.nn: on a GPU cuDNN, with the algorithm that PyTorch picks (inferred from its source), its weights in "
        "one piece, in bf16 too, where PyTorch would copy them at every call; on the CPU ATen.",
        _torch,
    ),
    "loop": _peer("a Python loop over the cell in eager PyTorch, its input product done once before.", peers.loop),
    "compiled": _peer("the same loop over a step from torch.compile, whose compile time is left out.", peers.compiled),
    "flashrnn": _peer(
        "input product in PyTorch, FlashRNN's cuda_fused kernels (alternating for the GRU); building them is left out.",
        peers.flashrnn,
        "flashrnn",
        "flashrnn",
    ),
    "torchrl": _peer(
        "TorchRL's Triton backend, x and y transposed for its batch-first layout; its tuning is left out.",
        peers.torchrl,
        "torchrl.modules.tensordict_module._rnn_triton",
        "torchrl",
    ),
    "gru-qat": _peer(
        "input product in PyTorch, gru-qat's dense persistent scan without quantization; compiling is left out.",
        peers.gru_qat,
        "gru_qat.triton_kernels.scan",
        "gru-qat",
    ),
}


def absence(name: str) -> str:
    """Why a provider is not importable here; empty where it is."""
    try:
        importlib.import_module(PROVIDERS[name].module)
    except Exception as error:  # a foreign package: whatever its import raises
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return ""


def build(name: str, case: Case, weights: dict[str, Tensor], device: str) -> nn.Module:
    """The layer of one provider, with these weights rounded to the case's dtype. ValueError for what it cannot do."""
    layer = PROVIDERS[name].layer(case, device=device, dtype=DTYPES[case.dtype])
    layer.load_state_dict(weights)
    # cuDNN takes the training flag, not autograd's, for whether to keep what backward needs.
    return layer.train(case.training)


def label(name: str, case: Case, device: str) -> str:
    """How a provider would run a case, as a table shows it; empty where nothing is known."""
    if PROVIDERS[name].engine:
        found = plan(name, case, device)
        return "ATen" if found is None else found.label
    if name == "torch":
        return cudnn.label(case, cudnn.Gpu.here()) if device == "cuda" else "ATen"
    return ""


def plan(name: str, case: Case, device: str) -> LaunchPlan | None:
    """The schedule ours takes for each layer; None where no kernel of ours runs. ValueError where it cannot."""
    engine = PROVIDERS[name].engine
    if device != "cuda":
        if engine != "auto":
            raise ValueError(f"engine {engine} runs on a GPU alone")
        return None

    def like(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[case.dtype], device=device)

    rows = len(GATES[case.cell]) * case.hidden
    states = (None, None) if case.cell == "lstm" else (None,)
    w, b = like(rows, case.hidden), like(rows)
    with precision(case.dtype):
        x = like(case.hidden).expand(case.seq, case.batch, case.hidden)
        return lstm_triton.plan(case.cell, x, *states, w, w, b, b, engine=engine)


def kernels(case: Case, names: Iterable[str], device: str) -> list[Kernel]:
    """What ours compiles for a case."""
    wanted = []
    for name in names:
        if PROVIDERS[name].engine:
            try:
                found = plan(name, case, device)
            except ValueError:  # said when it is judged
                continue
            if found is not None:
                for reverse in (False, True)[: 1 + case.bidirectional]:
                    wanted.append(Kernel(found, "forward", case.training, reverse))
                    wanted += [Kernel(found, "backward", True, reverse)] * case.gradients
    return wanted
