"""Who is compared: every provider gives torch.nn's results from torch.nn's weights, and what it cannot do it says.

Other libraries are stood in for by modules written here from their documented shapes, with the mathematics in PyTorch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from lstm_triton.perf import cudnn, numerics, peers, providers
from lstm_triton.perf.cases import CELLS, DTYPES, MODES, Case, inputs, oracle, torch_layer
from lstm_triton.perf.cudnn import SMALL, STANDARD, STATIC, Gpu
from lstm_triton.perf.precompile import Kernel
from torch import Tensor

import lstm_triton

H200 = Gpu(9, 0, 132, 91701)
CASE = Case("lstm", "fp32", "forward+backward", 3, 8, 5)
STACKED = replace(CASE, layers=2, bidirectional=True)


def check(name: str, case: Case) -> numerics.Check:
    """One provider on a case, against float64."""
    exact, (x, dy) = oracle(case), inputs(case, "cpu")
    layer = providers.build(name, case, exact.state_dict(), "cpu")
    return numerics.check_layer(layer, case, x, dy, numerics.LayerReference()(case, exact, x, dy))


def scan(cell: str, gates_x: Tensor, w_hh: Tensor, b_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A recurrence step by step: gates_x [T, B, G*H], torch.nn's layout -> y [T, B, H], h_n, c_n [B, H]."""
    outputs = []
    for x in gates_x:
        gates = h @ w_hh.t() + b_hh
        if cell == "lstm":
            i, f, g, o = (x + gates).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        elif cell == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, dim=-1), gates.chunk(3, dim=-1)
            z = torch.sigmoid(x_z + h_z)
            h = (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n) + z * h
        else:
            h = torch.tanh(x + gates)
        outputs.append(h)
    return torch.stack(outputs), h, c


def fake_flashrnn(
    Wx: Tensor, R: Tensor, b: Tensor, states: None = None, *, function: str, backend: str, dtype: str
) -> tuple[Tensor, Tensor]:
    """Wx [B, T, G, N, D], R [G, N, D, D], b [G', N, D] -> states [S, B, T, N, D] and the last [S, B, 1, N, D]."""
    assert states is None and backend == "cuda_fused" and dtype == str(Wx.dtype).removeprefix("torch.")
    batch, _, gates, heads, size = Wx.shape
    assert heads == 1 and R.shape == (3 if function == "gru" else gates, 1, size, size)
    gates_x, w_hh, zeros = Wx.flatten(2).transpose(0, 1), R.reshape(-1, size), Wx.new_zeros(batch, size)
    if function == "gru":  # recurrent gates n, r, z; biases of n's recurrent part, of r, of z, of n's input
        n, r, z = R[:, 0]
        w_hh = torch.cat((r, z, n))
        b_hh = torch.cat((b.new_zeros(2 * size), b[0, 0]))
        gates_x = gates_x + torch.cat((b[1, 0], b[2, 0], b[3, 0]))
    else:
        b_hh = b.flatten()
    cell = {"lstm": "lstm", "gru": "gru", "elman": "rnn"}[function]
    h, c = zeros, zeros
    found = []
    for x in gates_x:
        _, h, c = scan(cell, x[None], w_hh, b_hh, h, c)
        found.append(torch.stack((h, c) if cell == "lstm" else (h,)))
    every = torch.stack(found, dim=2).unsqueeze(3)
    return every, every[:, :, -1:]


def fake_torchrl(cell: str) -> Callable[..., tuple[Tensor, ...]]:
    """x [B, T, I], a state to reset to for each step, weights as torch.nn's, is_init [B, T]; the first step resets."""

    def run(x: Tensor, hidden: Tensor, *rest: Tensor, input_precision: str) -> tuple[Tensor, ...]:
        cell_state, rest = (rest[0], rest[1:]) if cell == "lstm" else (hidden, rest)
        w_ih, w_hh, b_ih, b_hh, is_init = rest
        assert hidden.shape == (*x.shape[:2], w_hh.shape[1]) and is_init.shape == x.shape[:2]
        assert is_init.dtype == torch.bool and not is_init.any() and input_precision in ("ieee", "tf32")
        gates_x = (x @ w_ih.t() + b_ih).transpose(0, 1)
        y, h, c = scan(cell, gates_x, w_hh, b_hh, hidden[:, 0], cell_state[:, 0])
        y = y.transpose(0, 1)
        return (y, y.detach(), h, c) if cell == "lstm" else (y, h)

    return run


def fake_gru_qat(gi: Tensor, h0: Tensor, Wh_cat: Tensor, bh_cat: Tensor) -> Tensor:
    """gi [T, B, 3H] with its bias, h0 [B, H], Wh_cat [3H, H], bh_cat [3H] -> [T, B, H]."""
    return scan("gru", gi, Wh_cat, bh_cat, h0, h0)[0]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The three libraries, as modules of the names that they have."""

    def module(name: str, **contents: object) -> ModuleType:
        found = ModuleType(name)
        found.__path__ = []
        found.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, found)
        return found

    module("flashrnn", flashrnn=fake_flashrnn)
    module("gru_qat")
    module("gru_qat.triton_kernels")
    module("gru_qat.triton_kernels.scan", gru_scan_persistent=fake_gru_qat)
    for name in ("torchrl", "torchrl.modules"):
        module(name)
    kernels = module(
        "torchrl.modules.tensordict_module._rnn_triton",
        lstm_triton=fake_torchrl("lstm"),
        gru_triton=fake_torchrl("gru"),
    )
    module("torchrl.modules.tensordict_module", _rnn_triton=kernels)
    yield


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its code generator, which takes seconds and needs a compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["ours", "torch", "loop", "flashrnn", "torchrl", "gru-qat"])
def test_same_weights_give_the_same_results(name: str, cell: str, mode: str, installed: None) -> None:
    case = replace(STACKED, cell=cell, mode=mode)
    if (name, cell) in {("torchrl", "rnn"), ("gru-qat", "lstm"), ("gru-qat", "rnn")}:
        with pytest.raises(ValueError, match=f"not {cell} in fp32"):
            check(name, case)
        return
    found = check(name, case)
    assert found.passed, found.detail


@pytest.mark.parametrize("cell", CELLS)
def test_compiled_loop_gives_the_same_results(cell: str, traced: None) -> None:
    found = check("compiled", replace(CASE, cell=cell))
    assert found.passed, found.detail


def test_steps_of_many_shapes_are_all_compiled(traced: None) -> None:
    """torch.compile stops after some shapes of one function, silently: here it would raise."""
    for hidden in range(1, torch._dynamo.config.recompile_limit + 2):
        assert check("compiled", replace(CASE, hidden=hidden, mode="inference")).passed


@pytest.mark.parametrize(
    ("name", "dtype"), [("flashrnn", "fp64"), ("torchrl", "bf16"), ("torchrl", "fp64"), ("gru-qat", "fp16")]
)
def test_peers_refuse_dtypes_that_they_lack(name: str, dtype: str, installed: None) -> None:
    with pytest.raises(ValueError, match=dtype if name != "flashrnn" else "float64"):
        check(name, replace(CASE, cell="gru", dtype=dtype))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_16_bit_weights_are_rounded_once(dtype: str, installed: None) -> None:
    case = replace(CASE, dtype=dtype)
    weights = oracle(case).state_dict()
    for name in ("ours", "torch", "loop", "flashrnn"):
        for key, value in providers.build(name, case, weights, "cpu").state_dict().items():
            assert torch.equal(value, weights[key].to(DTYPES[dtype])), (name, key)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ours", "torch", "loop"])
def test_inference_is_in_eval_mode(name: str, mode: str) -> None:
    case = replace(CASE, mode=mode)
    assert providers.build(name, case, oracle(case).state_dict(), "cpu").training is (mode != "inference")


def test_absence_is_said(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name in providers.PROVIDERS if providers.absence(name)] == []
    for name in ("flashrnn", "gru_qat"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    monkeypatch.delitem(sys.modules, "gru_qat.triton_kernels.scan")
    monkeypatch.delitem(sys.modules, "gru_qat.triton_kernels")
    assert [name for name in providers.PROVIDERS if providers.absence(name)] == ["flashrnn", "gru-qat"]
    assert "flashrnn" in providers.absence("flashrnn")


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "gru-qat":  # run from its sources
            raise importlib.metadata.PackageNotFoundError(name)
        return f"{name} 1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {name: provider.version for name, provider in providers.PROVIDERS.items()}
    assert found["ours"] == found["ours:local"] == lstm_triton.__version__
    assert found["torch"] == found["loop"] == "torch 1.0"
    assert (found["flashrnn"], found["torchrl"], found["gru-qat"]) == ("flashrnn 1.0", "torchrl 1.0", "unknown")


def test_engines_are_refused_on_the_cpu() -> None:
    assert providers.label("ours", CASE, "cpu") == providers.label("torch", CASE, "cpu") == "ATen"
    assert providers.label("loop", CASE, "cpu") == ""
    for engine in ("local", "resident", "streamed", "step"):
        with pytest.raises(ValueError, match="runs on a GPU alone"):
            providers.label(f"ours:{engine}", CASE, "cpu")
    assert providers.kernels(CASE, list(providers.PROVIDERS), "cpu") == []


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("inference", [("forward", False)]),
        ("forward", [("forward", True)]),
        ("forward+backward", [("forward", True), ("backward", True)]),
    ],
)
def test_kernels_to_compile(mode: str, expected: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(name: str, case: Case, device: str) -> str:
        if name == "ours:local":
            raise ValueError("too wide")
        return name

    monkeypatch.setattr(providers, "plan", plan)
    names = ["ours", "torch", "ours:local", "ours:step"]
    found = providers.kernels(replace(CASE, mode=mode), names, "cuda")
    assert found == [Kernel(name, *kernel) for name in ("ours", "ours:step") for kernel in expected]
    both = providers.kernels(replace(STACKED, mode=mode), ["ours"], "cuda")
    assert both == [Kernel("ours", *kernel, reverse) for reverse in (False, True) for kernel in expected]


def test_plan_goes_by_shape_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def plan(cell: str, x: Tensor, *rest: object, engine: str) -> None:
        seen.append((cell, tuple(x.shape), x.dtype, len(rest), engine, torch.backends.cudnn.allow_tf32))

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: real(*size, **options))
    monkeypatch.setattr(lstm_triton, "plan", plan)
    providers.plan("ours:step", Case("gru", "tf32", "inference", 4, 16, 7), "cuda")
    providers.plan("ours", Case("lstm", "fp32", "inference", 4, 16, 7), "cuda")
    assert seen == [
        ("gru", (7, 4, 16), torch.float32, 5, "step", True),
        ("lstm", (7, 4, 16), torch.float32, 6, "auto", False),
    ]


@pytest.mark.parametrize(
    ("cell", "dtype", "batch", "hidden", "expected"),
    [
        ("lstm", "fp16", 16, 768, STATIC),
        ("lstm", "fp16", 128, 1024, STATIC),
        ("lstm", "fp16", 12, 768, STANDARD),  # batches of 8s
        ("lstm", "fp16", 136, 768, STANDARD),  # up to 128
        ("lstm", "fp16", 16, 700, STANDARD),  # 128s of hidden units
        ("lstm", "fp16", 16, 1152, STANDARD),  # up to 1024
        ("lstm", "bf16", 16, 768, STANDARD),  # fp16 alone
        ("lstm", "tf32", 16, 768, STANDARD),
        ("gru", "fp16", 16, 768, STANDARD),  # no GRU
        ("rnn", "fp16", 64, 1024, STATIC),
        ("rnn", "fp16", 96, 1024, STANDARD),  # wide and many
        ("rnn", "fp16", 96, 768, STATIC),
        ("lstm", "bf16", 1, 192, SMALL),
        ("gru", "fp32", 3, 100, SMALL),
        ("lstm", "bf16", 1, 193, STANDARD),
        ("rnn", "bf16", 1, 384, SMALL),
        ("rnn", "bf16", 1, 385, STANDARD),
        ("lstm", "fp64", 16, 64, STANDARD),
    ],
)
def test_cudnn_algorithm(cell: str, dtype: str, batch: int, hidden: int, expected: str) -> None:
    assert cudnn.algorithm(Case(cell, dtype, "inference", batch, hidden, 512), H200, forward=True) == expected


def test_cudnn_algorithm_of_stacks_and_other_gpus() -> None:
    case = Case("lstm", "fp16", "inference", 16, 768, 512)
    for other in (replace(case, layers=2), replace(case, bidirectional=True)):
        assert cudnn.algorithm(other, H200, True) == STANDARD
        assert cudnn.algorithm(replace(other, hidden=128), H200, True) == SMALL  # knows no such limit
    assert cudnn.algorithm(case, replace(H200, sms=60), True) == STANDARD
    assert cudnn.algorithm(case, replace(H200, major=8, minor=6), True) == STANDARD
    volta = Gpu(7, 0, 80, 91701)
    assert cudnn.algorithm(case, volta, True) == STATIC
    assert cudnn.algorithm(replace(case, seq=8), volta, True) == STANDARD
    assert cudnn.algorithm(replace(case, batch=112), volta, True) == STANDARD
    assert cudnn.algorithm(case, replace(volta, minor=5), True) == STANDARD


def test_cudnn_label_names_both_directions_where_they_differ() -> None:
    case = Case("lstm", "bf16", "forward+backward", 16, 160, 512)
    assert cudnn.label(case, H200) == f"cuDNN {SMALL} / {STANDARD}"
    assert cudnn.label(replace(case, mode="forward"), H200) == f"cuDNN {SMALL}"
    assert cudnn.label(replace(case, hidden=128), H200) == f"cuDNN {SMALL}"
    assert cudnn.label(case, replace(H200, cudnn=91002)) == "ATen"  # PyTorch gave bf16 to cuDNN from 9.13 on
    assert cudnn.label(replace(case, dtype="fp16"), replace(H200, cudnn=91002)) != "ATen"
    assert cudnn.label(replace(case, dtype="fp16"), replace(H200, cudnn=0)) == "ATen"


def test_layered_has_torch_parameters() -> None:
    like = torch_layer(STACKED)
    layer = peers.Layered(like, peers.loop(STACKED))
    assert {name: p.shape for name, p in layer.named_parameters()} == {n: p.shape for n, p in like.named_parameters()}
    assert all(a is not b for a, b in zip(layer.parameters(), like.parameters(), strict=True))
