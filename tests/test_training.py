"""Ways to train: checkpointing, several processes, threads and streams, CUDA graphs, and tensors that are views."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from numerics import CELLS, TOLERANCE, problem, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lstm_triton as lt

pytestmark = pytest.mark.both

LAYERS = {"LSTM": (lt.LSTM, nn.LSTM), "GRU": (lt.GRU, nn.GRU), "RNN": (lt.RNN, nn.RNN)}
T, B, I, H = 3, 2, 3, 5  # noqa: E741


def gradients(y: Tensor, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """By a fixed random combination of y."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return list(torch.autograd.grad((y * weight.to(y)).sum(), tensors, **options))


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert ours.shape == theirs.shape, i
        assert relative_error(ours, theirs) <= TOLERANCE[ours.dtype], i


class Stack(nn.Module):
    def __init__(self, checkpointed: dict[str, Any] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.first = nn.Linear(I, H)
        self.rnn = lt.LSTM(H, H, 2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y, h = self.run(x) if self.checkpointed is None else checkpoint(self.run, x, **self.checkpointed)
        return y + h.sum(0)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Flat, since use_reentrant=True leaves tensors inside of tuples out of the graph."""
        y, (h, _) = self.rnn(x)
        return y, h


def trained(checkpointed: dict[str, Any] | None) -> tuple[list[Tensor], int]:
    """Output and gradients of one step, and the bytes that autograd kept for it, parameters and input aside."""
    model = Stack(checkpointed)
    kept: dict[int, int] = {}
    x = torch.randn(T, B, I, generator=torch.Generator().manual_seed(1), requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    size = sum(kept.values())
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())], size


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    """The same numbers, dropout's among them, from less memory."""
    wanted, kept_plainly = trained(None)
    found, kept = trained({"use_reentrant": use_reentrant})
    assert_close(found, wanted)
    assert kept < kept_plainly / 4
    other, _ = trained({"use_reentrant": use_reentrant, "preserve_rng_state": False})
    assert_close(other[:1], wanted[:1])
    assert relative_error(other[1], wanted[1]) > 0.01


class Model(nn.Module):
    """The GRU's nine rows do not divide among two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.LSTM(I, H)
        self.second = nn.GRU(H, 3, bidirectional=True)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0])


def take_steps(model: nn.Module, share: slice) -> None:
    """Two steps on this share of every batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step in range(2):
        x = torch.randn(3, 2 * B, I, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x[:, share]) - 1).square().mean().backward()
        optimizer.step()


def train_in_a_group(rank: int, folder: str) -> None:
    """One of two processes: DistributedDataParallel, then FSDP; the parameters that come out go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    share = slice(rank * B, (rank + 1) * B)

    parallel = DistributedDataParallel(lt.replace(Model().double()), gradient_as_bucket_view=True)
    take_steps(parallel, share)
    results = {"DistributedDataParallel": [p.detach() for p in parallel.module.parameters()]}

    sharded = lt.replace(Model().double())
    mesh = init_device_mesh("cpu", (2,))
    for layer in (sharded.first, sharded.second, sharded):
        fully_shard(layer, mesh=mesh)
    assert isinstance(sharded.first, lt.LSTM) and isinstance(sharded.first, FSDPModule)
    assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in sharded.second.parameters())
    take_steps(sharded, share)
    results["fully_shard"] = [p.full_tensor().detach() for p in sharded.parameters()]

    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run_in_two_processes(worker: Callable[[int, str], None], folder: Path, seconds: float = 120) -> None:
    context = torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2, join=False)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"two processes took longer than {seconds} s"
    finally:
        for process in context.processes:
            process.kill()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """What each of the two found, by the way to train."""
    folder = tmp_path_factory.mktemp("group")
    run_in_two_processes(train_in_a_group, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", ["DistributedDataParallel", "fully_shard"])
def test_two_processes_train_as_one(way: str, of_two_processes: list[dict[str, list[Tensor]]]) -> None:
    start, single = Model().double(), Model().double()
    take_steps(single, slice(None))
    for found in of_two_processes:
        for ours, wanted, old in zip(found[way], single.parameters(), start.parameters(), strict=True):
            assert not torch.equal(wanted, old)
            assert relative_error(ours - old, wanted - old) <= 1e-12


def stepper(cell: str, seed: int, dtype: torch.dtype, **options: Any) -> Callable[[], list[Tensor]]:
    """A layer and its input; each call is a forward and a backward pass."""
    torch.manual_seed(seed)
    layer = LAYERS[cell][0](I, H + seed, dtype=dtype, **options)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)

    def step() -> list[Tensor]:
        y, _ = layer(x)
        return [y.detach(), *gradients(y, [x, *layer.parameters()])]

    return step


def test_threads_do_not_disturb_each_other() -> None:
    steps = [
        stepper("LSTM", 0, torch.float32),
        stepper("GRU", 1, torch.float64, bidirectional=True),
        stepper("RNN", 2, torch.float32, nonlinearity="relu"),
        stepper("LSTM", 3, torch.float16, bias=False),
    ]
    alone = [step() for step in steps]
    gate = threading.Barrier(len(steps), timeout=60)

    def repeat(step: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
        gate.wait()
        return [step() for _ in range(2)]

    with ThreadPoolExecutor(len(steps)) as pool:
        together = list(pool.map(repeat, steps))
    for found, wanted in zip(together, alone, strict=True):
        for once in found:
            assert all(torch.equal(ours, other) for ours, other in zip(once, wanted, strict=True))


@pytest.mark.parametrize("cell", LAYERS)
def test_threads_go_back_through_one_graph(cell: str) -> None:
    layer = LAYERS[cell][0](I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    y, _ = layer(x)
    leaves = [x, *layer.parameters()]
    wanted = gradients(y, leaves, retain_graph=True)
    gate = threading.Barrier(3, timeout=60)

    def back(_: int) -> list[Tensor]:
        gate.wait()
        return gradients(y, leaves, retain_graph=True)

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(back, range(3)):
            assert all(torch.equal(ours, other) for ours, other in zip(found, wanted, strict=True))


def scattered(tensor: Tensor) -> Tensor:
    """Equal, but no two elements neighbours in memory, the last dimension outermost."""
    turned = tensor.detach().movedim(-1, 0)
    storage = torch.full((*turned.shape, 2), torch.nan, dtype=tensor.dtype)
    storage[..., 1] = turned
    return storage[..., 1].movedim(0, -1)


def expanded(tensor: Tensor) -> Tensor:
    """Every row of the batch the first one, in one row's memory."""
    dim = tensor.dim() - 2
    return tensor.detach().narrow(dim, 0, 1).expand_as(tensor)


LAYOUTS = {"scattered": scattered, "expanded": expanded}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", LAYERS)
def test_inputs_states_and_gradients_in_any_layout(cell: str, layout: str) -> None:
    layers = []
    for layer in LAYERS[cell]:
        torch.manual_seed(0)
        layers.append(layer(I, H, bidirectional=True, dtype=torch.float64))
    shapes = [(T, B, I), (2, B, H), (2, B, H)][: 3 if cell == "LSTM" else 2]
    results = []
    for layer, arrange in zip(layers, (LAYOUTS[layout], lambda t: LAYOUTS[layout](t).contiguous()), strict=True):
        generator = torch.Generator().manual_seed(1)
        inputs = [arrange(torch.randn(s, generator=generator, dtype=torch.float64)).requires_grad_() for s in shapes]
        x, *state = inputs
        y, last = layer(x, tuple(state) if cell == "LSTM" else state[0])
        outputs = [y, *(last if cell == "LSTM" else (last,))]
        grads = [arrange(torch.randn(t.shape, generator=generator, dtype=torch.float64)) for t in outputs]
        assert not any(t.is_contiguous() for t in inputs + grads) or layer is layers[1]
        results.append(outputs + list(torch.autograd.grad(outputs, [*inputs, *layer.parameters()], grads)))
    for found, wanted in zip(*results, strict=True):
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) <= 1e-13


def views(flat: Tensor, shapes: list[torch.Size], transposed: bool) -> list[Tensor]:
    """One big tensor as many, every matrix a transposed one."""
    pieces = flat.split([shape.numel() for shape in shapes])
    return [
        p.view(s[::-1]).t() if transposed and len(s) == 2 else p.view(s) for p, s in zip(pieces, shapes, strict=True)
    ]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_are_views_of_one_parameter(cell: str, transposed: bool) -> None:
    """By function; the gradient arrives in the one parameter."""
    inputs = problem(cell, T, B, H, dtype=torch.float64)
    weights = inputs[-4:]
    flat = torch.cat([(w.t() if transposed and w.dim() == 2 else w).flatten() for w in weights]).requires_grad_()
    results = []
    for module in (lt.functional, lt.reference):
        y, *final = getattr(module, cell)(*inputs[:-4], *views(flat, [w.shape for w in weights], transposed))
        results.append([y, *final, *gradients(y, [flat])])
    assert_close(*results)
    plain = getattr(lt.functional, cell)(*inputs)
    assert_close(results[0][: len(plain)], list(plain))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_layer_whose_weights_are_views_of_one_parameter(cell: str, transposed: bool) -> None:
    ours, theirs = (layer(I, H, bidirectional=True, dtype=torch.float64) for layer in LAYERS[cell])
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    flat = torch.randn(sum(shape.numel() for shape in shapes.values()), dtype=torch.float64, requires_grad=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        weights = views(flat, list(shapes.values()), transposed)
        y, _ = torch.func.functional_call(layer, dict(zip(shapes, weights, strict=True)), (x,))
        results.append([y, *gradients(y, [flat])])
    for found, wanted in zip(*results, strict=True):
        assert relative_error(found, wanted) <= 1e-13


@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_that_share_one_storage(transposed: bool) -> None:
    """As flat-buffer optimizers lay them out: what is written into the buffer is what the layer computes with."""
    ours, theirs = (layer(I, H, dtype=torch.float64) for layer in LAYERS["LSTM"])
    shapes = [p.shape for p in ours.parameters()]
    flat = torch.zeros(sum(shape.numel() for shape in shapes), dtype=torch.float64)
    for p, view in zip(ours.parameters(), views(flat, shapes, transposed), strict=True):
        p.data = view
    x = torch.randn(T, B, I, dtype=torch.float64)
    for _ in range(2):
        flat.normal_()
        theirs.load_state_dict(ours.state_dict())
        results = []
        for layer in (ours, theirs):
            layer.zero_grad()
            y, _ = layer(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in layer.parameters())])
        for found, wanted in zip(*results, strict=True):
            assert relative_error(found, wanted) <= 1e-13
    assert torch.equal(ours.weight_hh_l0, views(flat, shapes, transposed)[1])


def cuda_layers() -> Iterator[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    for layer in (lt.LSTM(32, 96, 2, bidirectional=True), lt.GRU(32, 64), lt.RNN(32, 160, nonlinearity="relu")):
        yield layer.to("cuda", torch.float16), torch.randn(50, 8, 32, device="cuda", dtype=torch.float16)


@pytest.mark.gpu
def test_streams() -> None:
    """Different layers on streams of their own at once, forward and backward, give what they give alone."""

    def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
        y, _ = layer(x)
        return [y.detach(), *torch.autograd.grad(y, list(layer.parameters()), torch.ones_like(y))]

    pairs = list(cuda_layers())
    alone = [step(*pair) for pair in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in pairs]
    for _ in range(5):
        together = []
        for stream, pair in zip(streams, pairs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                together.append(step(*pair))
        torch.cuda.synchronize()
        for found, wanted in zip(together, alone, strict=True):
            assert all(torch.equal(ours, other) for ours, other in zip(found, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("which", [0, 1, 2], ids=LAYERS)
def test_a_captured_training_step_reads_new_lengths(which: int) -> None:
    """Nothing waits for the device, and the lengths are read there: a replay takes what lies in the inputs by then."""
    layer, x = list(cuda_layers())[which]
    x.requires_grad_()
    lengths = torch.full((x.shape[1],), x.shape[0], device="cuda")
    tensors = [x, *layer.parameters()]

    def step() -> list[Tensor]:
        y, last = layer(x, lengths=lengths)
        outputs = [y, *(last if isinstance(last, tuple) else (last,))]
        return [*outputs, *torch.autograd.grad(outputs, tensors, [torch.ones_like(t) for t in outputs])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and chooses products
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=generator))
            lengths.copy_(torch.randint(0, x.shape[0] + 1, lengths.shape, generator=generator))
        for tensor in captured:
            tensor.detach().fill_(torch.nan)
        graph.replay()
        wanted = step()
        ends = torch.arange(x.shape[0], device="cuda")[:, None] >= lengths
        assert not captured[0][ends].any()
        assert all(torch.equal(ours, eager) for ours, eager in zip(captured, wanted, strict=True))
