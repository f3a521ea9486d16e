"""torch.compile, torch.export and autocast around layers and functions: on ATen and on interpreted kernels.

And that nothing in Python around the operators makes the CPU wait for a GPU.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import CELLS, ONEDNN_HAS_BFLOAT16, TOLERANCE, problem, relative_error
from sequence_cases import Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lstm_triton as lt
from lstm_triton import calls, launch
from lstm_triton.spec import GATES

pytestmark = pytest.mark.both

ENGINES = ("local", "step") if launch.INTERPRETED else ("auto",)
LAYERS = {"lstm": (lt.LSTM, nn.LSTM), "gru": (lt.GRU, nn.GRU), "rnn": (lt.RNN, nn.RNN)}
#: T, B. The first ones differ from each other and from all sizes below, as the compiler takes equal ones for the same.
#: None is 1, which is a graph of its own.
SIZES = [(5, 3), (2, 4), (4, 2)]
INPUTS, HIDDEN, PROJ = 7, 8, 6


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a cache of its own: what was traced before a change to the operators' gradients would be found again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()


def draw_lengths(T: int, B: int) -> Tensor:
    """From none to one more than all."""
    return torch.arange(B) % (T + 2)


def draw_masks(T: int, B: int) -> tuple[Tensor, Tensor]:
    numbers = torch.arange(T * B).view(T, B)
    return numbers % 3 > 0, numbers % 5 == 0


def results(function: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> list[Tensor]:
    """Everything that a function returns, and its gradients by the inputs that have one and by the parameters."""
    inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = tree_leaves(function(*inputs))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    leaves = [t for t in inputs if t.requires_grad] + list(parameters)
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def assert_compiles_once(
    function: Callable[..., Any], draw: Callable[[int, int], list[Tensor]], backend: str,
    parameters: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    """Outputs and gradients as without the compiler, at all sizes, from one graph without breaks."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, B in SIZES:
            inputs = draw(T, B)
            found, wanted = (results(f, inputs, parameters) for f in (compiled, function))
            assert len(found) == len(wanted)
            for ours, other in zip(found, wanted, strict=True):
                assert (ours.dtype, ours.shape) == (other.dtype, other.shape)
                assert relative_error(ours, other) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("cell", "with_lengths"),
    [
        pytest.param("lstm", True, marks=pytest.mark.native),
        pytest.param("gru", False, marks=pytest.mark.native),
        ("rnn", True),
    ],
)
def test_layers_compile_once(cell: str, with_lengths: bool) -> None:
    """Two layers in two directions, by inductor, which needs a C++ compiler."""
    torch.manual_seed(0)
    layer = LAYERS[cell][0](INPUTS, HIDDEN, num_layers=2, bidirectional=True, engine=ENGINES[0])

    def draw(T: int, B: int) -> list[Tensor]:
        return [torch.randn(T, B, INPUTS), *([draw_lengths(T, B)] if with_lengths else [])]

    def run(x: Tensor, lengths: Tensor | None = None) -> Any:
        return layer(x, lengths=lengths)

    assert_compiles_once(run, draw, "inductor", list(layer.parameters()))


@pytest.mark.parametrize(("steps", "engine"), [("lengths", ENGINES[0]), ("masks", ENGINES[-1])])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_functions_compile_once(cell: str, steps: str, engine: str) -> None:
    """Weights and states are arguments here, with sizes to compile for; of the LSTM also projection and cell states."""
    function = getattr(lt.functional, cell)

    def draw(T: int, B: int) -> list[Tensor]:
        inputs = problem(cell, T, B, HIDDEN, INPUTS)
        if cell == "lstm":
            inputs[1], inputs[4] = (t[:, :PROJ].contiguous() for t in (inputs[1], inputs[4]))
            inputs.append(torch.randn(PROJ, HIDDEN, generator=torch.Generator().manual_seed(2)))
        return [*([draw_lengths(T, B)] if steps == "lengths" else draw_masks(T, B)), *inputs]

    def run(*inputs: Tensor) -> Any:
        if steps == "lengths":
            lengths, *inputs = inputs
            options = {"lengths": lengths, "reverse": True}
        else:
            mask, reset, *inputs = inputs
            options = {"mask": mask, "reset": reset}
        if cell == "lstm":
            *inputs, w_hr = inputs
            options |= {"w_hr": w_hr, "return_cells": steps == "masks"}
        return function(*inputs, engine=engine, **options)

    assert_compiles_once(run, draw, "aot_eager")


@pytest.mark.parametrize("cell", CELLS)
def test_one_tensor_in_two_places(cell: str) -> None:
    x, *_ = problem(cell, 3, 2, HIDDEN, HIDDEN)
    square = torch.randn(len(GATES[cell]) * HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))

    def run(x: Tensor, square: Tensor) -> Any:
        states = (x[0], x[0]) if cell == "lstm" else (x[0],)
        return getattr(lt.functional, cell)(x, *states, square, square, square[:, 0], square[:, 0])

    found, wanted = (results(f, [x, square]) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run))
    assert max(relative_error(*pair) for pair in zip(found, wanted, strict=True)) <= TOLERANCE[torch.float32]


class Reader(nn.Module):
    """A layer between others, as programs are exported."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, INPUTS)
        self.layer = LAYERS[cell][0](INPUTS, HIDDEN, num_layers=2, bidirectional=True, engine=ENGINES[0])

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.layer(self.embed(x), lengths=lengths)[0].amax(0)


def exported(model: Reader, strict: bool) -> nn.Module:
    """Of any T and B; written to a file and read again."""
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    inputs = (torch.randn(5, 3, INPUTS), draw_lengths(5, 3))
    program = torch.export.export(model, inputs, dynamic_shapes=({0: T, 1: B}, {0: B}), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(("cell", "strict"), [("lstm", True), ("lstm", False), ("gru", False), ("rnn", True)])
def test_export(cell: str, strict: bool) -> None:
    torch.manual_seed(0)
    model = Reader(cell).eval()
    with torch.no_grad():
        program = exported(model, strict)
        for T, B in SIZES[1:]:
            inputs = torch.randn(T, B, INPUTS), draw_lengths(T, B)
            assert torch.equal(program(*inputs), model(*inputs))


def traced(model: Reader) -> nn.Module:
    """Likewise, by torch.jit.trace."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (torch.randn(4, 3, INPUTS), draw_lengths(4, 3))), file)
    file.seek(0)
    return torch.jit.load(file)


PROGRAMS = {
    "exported": lambda model: exported(model, strict=False),
    "exported strictly": lambda model: exported(model, strict=True),
    "exported without gradients": torch.no_grad()(lambda model: exported(model, strict=False)),
    "traced": traced,
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("made", PROGRAMS)
def test_programs_train(made: str, memory: str) -> None:
    """First and second derivatives, by parameters and input."""
    torch.manual_seed(0)
    model = Reader("lstm" if memory == "store" else "gru")
    model.layer.memory = memory
    program = PROGRAMS[made](model)
    x, lengths = torch.randn(4, 3, INPUTS), draw_lengths(4, 3)
    found = []
    for m in (program, model):
        parameters = dict(m.named_parameters())
        leaves = [x.requires_grad_(), *(parameters[name] for name, _ in model.named_parameters())]
        loss = m(x, lengths).sin().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), leaves)
        found.append([loss, *torch.autograd.grad(m(x, lengths).sin().sum(), leaves), *first, *second])
    assert max(relative_error(*pair) for pair in zip(*found, strict=True)) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("made", ["exported", "traced"] if launch.INTERPRETED else ["exported"])
def test_forward_mode_of_programs_is_refused(made: str) -> None:
    """PyTorch would take the operator's tangents as zeros. (Without kernels it is torch's own layer that is traced.)"""
    program = PROGRAMS[made](Reader("lstm"))
    x, lengths = torch.randn(4, 3, INPUTS), draw_lengths(4, 3)
    with pytest.raises(RuntimeError, match="forward-mode derivatives"):
        torch.func.jvp(lambda x: program(x, lengths), (x,), (x,))


@pytest.mark.native
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", [Case("lstm", projected=True), Case("gru", bias=False), Case("rnn")], ids=str)
def test_opcheck(case: Case, training: bool) -> None:
    """Schema, fakes and tracing, also where a dispatch mode is active. And results that share no memory."""
    x, h0, *rest = (t.requires_grad_(training) for t in case.inputs(3, 2, HIDDEN, INPUTS, torch.float32))
    c0 = rest.pop(0) if case.cell == "lstm" else None
    w_hr = rest.pop() if case.projected else None
    biases = rest[2:] or [None, None]
    lengths, (mask, reset) = torch.tensor([3, 0]), draw_masks(3, 2)
    operators = torch.ops.lstm_triton
    for steps, cells in (((lengths, None, None), False), ((lengths, mask, reset), case.cell == "lstm")):
        arguments = (x, h0, c0, *rest[:2], *biases, w_hr, None, None, *steps, None, case.cell, False, cells)
        torch.library.opcheck(operators.host_forward.default, arguments)
        y, h_n, c_n, c = (torch.ones_like(t) for t in operators.host_forward(*arguments))
        grads = (y, h_n, None if c0 is None else c_n, c if cells else None)
        torch.library.opcheck(operators.host_backward.default, (*grads, *arguments))
        gradients = [t for t in operators.host_backward(*grads, *arguments) if t.numel()]
        assert len({t.untyped_storage().data_ptr() for t in gradients}) == len(gradients)
        assert all(t.is_contiguous() for t in gradients)


@pytest.mark.native
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_inside_a_compiled_function(transform: str) -> None:
    inputs = problem("lstm", 3, 2, HIDDEN, dtype=torch.float64)
    lengths = torch.tensor([3, 1])

    def function(x: Tensor) -> Tensor:
        return lt.functional.lstm(x, *inputs[1:], lengths=lengths)[0]

    def run(x: Tensor) -> Tensor:
        if transform == "grad":
            return torch.func.grad(lambda x: function(x).square().sum())(x)
        if transform == "jvp":
            return torch.func.jvp(function, (x,), (x.cos(),))[1]
        return torch.func.vmap(function)(torch.stack((x, x.cos())))

    x = inputs[0]
    wanted = {
        "grad": lambda: torch.autograd.functional.vjp(function, x, 2 * function(x))[1],
        "jvp": lambda: torch.autograd.functional.jvp(function, x, x.cos())[1],
        "vmap": lambda: torch.stack((function(x), function(x.cos()))),
    }[transform]()
    for found in (run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)):
        assert relative_error(found, wanted) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(("cell", "compiled"), [("lstm", False), ("lstm", True), ("gru", False), ("rnn", False)])
def test_autocast_as_torch(cell: str, compiled: bool) -> None:
    """The dtypes of outputs, final states and gradients, and what is in them."""
    ours, theirs = LAYERS[cell]
    torch.manual_seed(0)
    layer, other = ours(INPUTS, HIDDEN, num_layers=2), theirs(INPUTS, HIDDEN, num_layers=2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 2, INPUTS)

    def under_autocast(model: nn.Module) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return run

    run = under_autocast(layer)
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = results(run, [x], list(layer.parameters()))
    # without oneDNN torch leaves the LSTM in float32, rather than raise
    with torch.backends.mkldnn.flags(enabled=ONEDNN_HAS_BFLOAT16, allow_tf32=None):
        wanted = results(under_autocast(other), [x], list(other.parameters()))
    dtypes = [t.dtype for t in wanted]
    if cell == "gru" or (cell == "lstm" and not ONEDNN_HAS_BFLOAT16):  # left in float32, on the CPU alone
        outputs = 3 if cell == "lstm" else 2
        dtypes[:outputs] = [torch.bfloat16] * outputs
    assert [t.dtype for t in found] == dtypes
    assert found[0].dtype == torch.bfloat16 and found[-1].dtype == torch.float32
    assert max(relative_error(*pair) for pair in zip(found, wanted, strict=True)) <= TOLERANCE[torch.bfloat16]


class NoSynchronisation(TorchDispatchMode):
    """Refuses every operator whose result depends on values that only the GPU knows, and every copy between devices."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise AssertionError(f"{func} waits for the GPU")
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        target = (kwargs or {}).get("device")
        if len(devices) > 1 or (devices and target is not None and devices != {torch.device(target).type}):
            raise AssertionError(f"{func} copies between {devices} and {target}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_value_is_looked_at(cell: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way to the kernels and back nothing makes the CPU wait for a GPU: tensors without values will do."""
    monkeypatch.setattr(calls, "on_kernels", lambda x: True)
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: nullcontext())  # it knows no such device
    inputs = [torch.empty(t.shape, device="meta", requires_grad=True) for t in problem(cell, 5, 3, HIDDEN)]
    mask, reset = torch.empty(2, 5, 3, device="meta", dtype=torch.bool)
    lengths = torch.empty(3, device="meta", dtype=torch.int32)
    own = {"return_cells": True} if cell == "lstm" else {}
    if cell == "lstm":
        inputs[1], inputs[4] = inputs[1][:, :PROJ], inputs[4][:, :PROJ]
        own["w_hr"] = torch.empty(PROJ, HIDDEN, device="meta", requires_grad=True)
    function = getattr(lt.functional, cell)
    with NoSynchronisation():
        for steps in ({}, {"lengths": lengths}, {"mask": mask, "reset": reset, "lengths": lengths}):
            outputs = function(*inputs, **steps, **own, memory=memory, reverse=True)
            assert {t.device.type for t in outputs} == {"meta"}
            gradients = torch.autograd.grad(outputs, inputs, [torch.empty_like(t) for t in outputs])
            assert {t.device.type for t in gradients} == {"meta"}
            with torch.no_grad():
                function(*inputs, **steps, **own, memory=memory)


@pytest.mark.parametrize(
    "wait",
    [Tensor.item, Tensor.cpu, Tensor.nonzero, lambda t: t[t > 0], lambda t: t if t > 0 else -t,
     lambda t: t + torch.zeros((), device="cpu")],
    ids=["item", "cpu", "nonzero", "mask", "bool", "mixed"],
)  # fmt: skip
def test_waiting_would_be_seen(wait: Callable[[Tensor], Any]) -> None:
    with NoSynchronisation(), pytest.raises(AssertionError, match=r"waits for the GPU|copies between"):
        wait(torch.ones(1, device="meta"))
