"""docs/kernels.md and docs/facts.md: the numbers, messages and mnemonics they quote, and facts no other test holds.

The tables come from docs/figures/ladder.py. A failing comparison says what the page should have.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from concurrency import concurrent
from concurrency.faults import (
    no_wait,
    plant,
    publish_relaxed,
    publish_without_barrier,
    wait_for_one_less,
    wait_without_barrier,
)
from lstm_triton.kernels import forward as forward_text
from numerics import TOLERANCE, problem, relative_error

import lstm_triton as lt
from lstm_triton import constexprs, launch
from lstm_triton.devices import device_named
from lstm_triton.planner import MAX_LOCAL_TILES

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
PAGE = (ROOT / "docs" / "kernels.md").read_text()
FACTS = (ROOT / "docs" / "facts.md").read_text()


def imported(path: Path, name: str) -> ModuleType:
    """The file at `path` as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def script(name: str) -> ModuleType:
    return imported(FIGURES / f"{name}.py", f"docs_figures_{name}")


def quoted(text: str, page: str = PAGE) -> None:
    assert text in page, f"the page should have:\n{text}"


def indented(text: str) -> str:
    """As Markdown's code."""
    return "".join(f"    {line}\n" for line in text.splitlines())


# The tables


@pytest.mark.native
@pytest.mark.parametrize("table", ["steps_table", "forms_table", "code_table"])
def test_tables_are_what_is_counted(table: str) -> None:
    quoted("\n\n" + getattr(script("ladder"), table)() + "\n")


@pytest.mark.both
def test_loops_are_those_that_are_counted() -> None:
    ladder = script("ladder")
    for loop in (ladder.eager, ladder.hoisted):
        source = inspect.getsource(loop)
        quoted(source.replace(f'    """{loop.__doc__}"""\n', ""))


def test_loops_compute_the_layer() -> None:
    x, h, c, w_ih, w_hh, b, _ = problem("lstm", 3, 2, 8, dtype=torch.float64)
    _, wanted, _ = lt.reference.lstm(x, h, c, w_ih, w_hh, b)
    for loop in (script("ladder").eager, script("ladder").hoisted):
        assert relative_error(loop(x, h, c, w_ih, w_hh, b), wanted) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("form", ["four dots", "one dot", "one dot, K split"])
def test_ladder_s_kernel_computes_the_layer_without_a_race(form: str) -> None:
    T, B, H = 3, 16, 64
    x, h0, _, w_ih, w_hh, b, _ = problem("lstm", T, B, H)
    wanted, _, _ = lt.reference.lstm(*(t.double() for t in (x, h0, torch.zeros(B, H), w_ih, w_hh, b)))
    gates = torch.nn.functional.linear(x, w_ih, b)
    h = torch.cat([h0[None], torch.full((T, B, H), float("nan"))])
    counter = torch.zeros(1, dtype=torch.int32)
    with concurrent(0) as run:
        script("ladder").lstm_steps[(H // 8,)](gates, w_hh, h, counter, T, 1000, H=H, BLOCK_B=B, BLOCK_H=8, FORM=form)
    assert form in script("ladder").FORMS and run.switches > 20
    assert not run.races, run.describe()
    assert relative_error(h[1:], wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("engine", ["local", "resident", "streamed", "step"])
def test_engines_launch_as_often_as_the_page_says(engine: str) -> None:
    """The real calls: the page's column is made of the plan's parts."""
    ladder = script("ladder")
    a_step, once = ladder.launches(ladder.planned(engine, ladder.SMALL if engine == "local" else ladder.H))
    for T in (1, 3):
        with concurrent(0) as run:
            lt.functional.lstm(*problem("lstm", T, 2, 16), engine=engine, tile=(16, 16 if engine == "local" else 8))
        assert run.launches == a_step * T + once


# The figures


def test_figures_are_those_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedules = script("schedules")
    monkeypatch.setattr(schedules, "FOLDER", tmp_path)
    schedules.main()
    for name in ("tiles.svg", "step.svg"):
        drawn, committed = (
            [re.sub(r"\s+", " ", text) for text in re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(), re.DOTALL)]
            for path in (tmp_path / name, FIGURES / name)
        )
        assert drawn == committed and len(drawn) > 30
        assert f"(figures/{name})" in PAGE


# Waiting


def shown(described: str) -> str:
    """A race as the page has it: on two lines, without line numbers."""
    first = described.splitlines()[0]
    first = re.sub(r"(\w+\.py):\d+", r"\1", first).removeprefix("sequence_forward: ")
    return first.replace(" races with", "\n    races with")


def in_place(tmp_path: Path) -> ModuleType:
    """The forward kernel with one tile for all steps: h[t] is written where h[t-1] is."""
    text = Path(forward_text.__file__).read_text()
    for per_step in ("h_ptr + row * PLAN.P", "h_ptr + (row - stride_t) * P\n        if (step"):
        assert text.count(per_step) == 1
        text = text.replace(per_step, re.sub(r"h_ptr \+ .* \* \S*P", "h_ptr", per_step))
    path = tmp_path / "forward.py"
    path.write_text(text)
    return imported(path, "lstm_triton.kernels.in_place")


#: What is spoilt, as the page calls it.
FAULTS: dict[str, tuple[str, Any]] = {
    "no wait": ("wait", no_wait),
    "one count too few": ("wait", wait_for_one_less),
    "no barrier after the acquire": ("wait", wait_without_barrier),
    "no barrier before the release": ("publish", publish_without_barrier),
    "relaxed, not release": ("publish", publish_relaxed),
}


def race(patch: Callable[[pytest.MonkeyPatch], None]) -> str:
    """The first that the check reports, under the first schedule in which there is one."""
    for seed in range(4):
        with pytest.MonkeyPatch.context() as monkeypatch, concurrent(seed) as run:
            patch(monkeypatch)
            lt.functional.lstm(*problem("lstm", 3, 2, 16), engine="resident", tile=(16, 8))
        if run.races:
            return shown(run.describe())
    raise AssertionError("no race")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of what is read before it is written
def test_races_are_what_the_check_prints(tmp_path: Path) -> None:
    found = {name: race(lambda monkeypatch, fault=fault: plant(monkeypatch, *fault)) for name, fault in FAULTS.items()}
    kernel = in_place(tmp_path).sequence_forward
    found["one tile for all steps"] = race(lambda monkeypatch: monkeypatch.setattr(launch, "sequence_forward", kernel))
    text = "\n\n".join(f"{name}\n{indented(lines)}".rstrip() for name, lines in found.items())
    quoted("\n" + indented(text).replace("    \n", "\n"))


def test_a_wait_that_ran_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constexprs, "POLLS", 20)
    with torch.no_grad(), pytest.raises(RuntimeError) as raised:
        lt.functional.lstm(*problem("lstm", 2, 2, 16), engine="resident", tile=(16, 8))
    words = str(raised.value).split()
    assert " ".join(words) in " ".join(PAGE.split())


# Plans, generated code, names


@pytest.fixture(scope="module")
def example() -> Any:
    """The plan of the page's example, as its block makes it."""
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(import torch\nimport lstm_triton as lt\n\nx, w.*?)```", PAGE, re.DOTALL)[1], names)
    return names["plan"]


@pytest.mark.native
def test_explanation_is_as_quoted(example: Any) -> None:
    """But for the model's numbers, which measured constants change."""
    quoted(without_estimates("\n" + indented(example.explain())), without_estimates(PAGE))


def without_estimates(text: str) -> str:
    return re.sub(r"constants for this GPU: .*", "", re.sub(r"\d+\.\d\d", "#", text))


@pytest.mark.native
def test_machine_code_is_as_quoted(example: Any) -> None:
    """Every opcode of the page's excerpt, in this order, in a time step of that kernel."""
    from lstm_triton.perf import sass

    code = sass.read_cubin(launch.compile_ahead(example, "forward").asm["cubin"])
    opcodes = [code.instructions[i].opcode for i in code.step(lambda loop: 1)]
    excerpt = re.search(r"operands too:\n\n((?:    .*\n)+)", PAGE)[1]
    quotes = [line.split()[0] for line in excerpt.splitlines()]
    rest = iter(opcodes)
    missing = [quote for quote in quotes if quote not in rest]
    assert not missing and len(quotes) > 20
    barriers = [i for i, opcode in enumerate(quotes) if opcode.startswith("BAR")]
    rows, stored, counted = (quotes.index(name) for name in ("LDG.E.128", "STG.E.U16", "REDG.E.ADD.STRONG.GPU"))
    assert any(quotes.index("CCTL.IVALL") < i < rows for i in barriers) and any(stored < i < counted for i in barriers)
    for listed in re.findall(
        r"^\| (`[A-Z].*?) \| ", PAGE.partition("| opcode |")[2].partition("\n\n")[0], re.MULTILINE
    ):
        for opcode in re.findall(r"`([A-Z][\w.]*)`", listed):
            if opcode not in ("HGMMA", "LDL", "STL"):
                assert any(found.startswith(opcode) for found in opcodes), opcode


def sources(*folders: str) -> dict[str, str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


@pytest.mark.both
def test_names_are_where_the_page_puts_them() -> None:
    text = sources("kernels", "lstm_triton", "perf", "tests/concurrency", "docs/figures")
    text["tests/test_races.py"] = (ROOT / "tests" / "test_races.py").read_text()
    rows = re.findall(r"^\| ([\w/]+\.py.*?) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 15
    for files, idea in rows:
        together = "".join(text[file] for file in files.split(", "))
        for name in re.findall(r"`(\w+)`", idea):
            assert re.search(rf"(def|class) {name}\b", together), (files, name)
    everything = "".join(text.values())
    for name in re.findall(r"`(?:tl\.)?(\w+)`", PAGE):
        assert re.search(rf"\b{name}\b", everything), name
    for path in re.findall(r"\b((?:kernels|lstm_triton|perf|tests|docs)/[\w/.]+?)(?=[.,;:)]?\s)", PAGE):
        assert (ROOT / path).exists(), path


@pytest.mark.both
def test_facts_name_tests_that_are_there() -> None:
    named = re.findall(r"`(test_\w+)\.py::(\w+)`", FACTS)
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), (file, test)
    assert len(named) > 30
    brackets = re.findall(r"\[([^\]]*(?:once|source|::)[^\]]*)\]", FACTS.partition("## Compiling")[2])
    facts = re.findall(r"^- ", FACTS.partition("## Compiling")[2], re.MULTILINE)
    assert len(brackets) >= len(facts)  # each says how it is known


@pytest.mark.both
def test_words_are_those_of_the_devices() -> None:
    h100 = device_named("H100")
    assert f"an H100 has {h100.sms}" in PAGE and f"up to {h100.shared_per_program // 1024} KiB" in PAGE
    assert MAX_LOCAL_TILES == 8 and "up to eight tiles" in PAGE


# Facts that no other test holds: small kernels, compiled for sm_90 unless they say otherwise, or interpreted


def ptx(kernel: Any, types: dict[str, str], capability: int = 90, **constants: Any) -> str:
    return launch.compile_kernel(kernel, types, constants, capability, {"num_warps": 4}).asm["ptx"]


def kinds(ptx: str, pattern: str) -> list[str]:
    """What of a pattern there is in the PTX, in its order."""
    return re.findall(pattern, ptx)


@triton.jit
def store_and_release(x_ptr, counter_ptr, BARRIER: tl.constexpr):
    offs = tl.arange(0, 1024)
    tl.store(x_ptr + offs, offs)
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@pytest.mark.native
def test_a_release_has_no_barrier_of_its_own() -> None:
    order = r"st\.global|bar\.sync|atom\.global\.gpu\.release|red\.global\.gpu\.release"
    types = {"x_ptr": "i32", "counter_ptr": "i32"}
    plain, barred = (kinds(ptx(store_and_release, types, BARRIER=barrier), order) for barrier in (False, True))
    assert plain == ["st.global", "st.global", "atom.global.gpu.release"]
    assert barred == ["st.global", "st.global", "bar.sync", "atom.global.gpu.release"]


@triton.jit
def rows_times_weights(counter_ptr, x_ptr, w_ptr, T, STAGES: tl.constexpr):
    offs_k = tl.arange(0, 64)
    offs = tl.arange(0, 128)[:, None] * 64 + offs_k[None, :]
    w = tl.load(w_ptr + offs_k[:, None] * 64 + offs_k[None, :])
    acc = tl.zeros((128, 64), tl.float32)
    for _ in tl.range(0, T, num_stages=STAGES):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        acc = tl.dot(tl.load(x_ptr + offs), w, acc) + seen.to(tl.float32)
        x_ptr += 128 * 64
    tl.store(w_ptr + offs, acc.to(tl.bfloat16))


@pytest.mark.native
def test_the_pipeliner_loads_above_a_wait() -> None:
    types = {"counter_ptr": "i32", "x_ptr": "bf16", "w_ptr": "bf16"}
    for stages, above in ((1, False), (3, True)):
        text = ptx(rows_times_weights, types, STAGES=stages)
        acquire = text.index(".acquire")
        assert ("cp.async" in text[:acquire]) == above
        rows = "cp.async" if above else "ld.global.v4"
        assert rows in text[acquire:]


@pytest.mark.native
def test_an_acquiring_add_of_zero_is_a_load() -> None:
    text = ptx(rows_times_weights, {"counter_ptr": "i32", "x_ptr": "bf16", "w_ptr": "bf16"}, STAGES=1)
    assert "ld.global.gpu.acquire" in text and "atom" not in text


@pytest.mark.native
def test_weights_loaded_before_the_loop_stay_on_chip() -> None:
    constants = {"H": 128, "BLOCK_B": 16, "BLOCK_H": 8, "FORM": "one dot, K split"}
    types = dict.fromkeys(("gates_ptr", "w_hh_ptr", "h_ptr"), "bf16") | {"counter_ptr": "i32"}
    made = launch.compile_kernel(script("ladder").lstm_steps, types, constants, 90, {"num_warps": 4})
    before, loop, after = made.asm["ttgir"].partition("scf.for")
    assert loop and before.count("ttg.local_alloc") == 1 and "tt.load" in after


@triton.jit
def load_so(x_ptr, y_ptr, HOW: tl.constexpr):
    offs = tl.arange(0, 128)
    x = tl.load(x_ptr + offs, volatile=True) if HOW == "volatile" else tl.load(x_ptr + offs, cache_modifier=HOW)
    tl.store(y_ptr + offs, x)


@pytest.mark.native
def test_cache_modifiers() -> None:
    types = {"x_ptr": "i32", "y_ptr": "i32"}
    found = {how: kinds(ptx(load_so, types, HOW=how), r"ld\.[\w.]*global[\w.]*") for how in (".cg", ".cv", "volatile")}
    assert found == {".cg": ["ld.global.cg.b32"], ".cv": ["ld.global.b32"], "volatile": ["ld.volatile.global.b32"]}


@triton.jit
def multiply(
    a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    offs_m, offs_n, offs_k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b = tl.load(a_ptr + offs_m * K + offs_k[None, :]), tl.load(b_ptr + offs_k[:, None] * N + offs_n)
    c = tl.dot(a, b) if PRECISION is None else tl.dot(a, b, input_precision=PRECISION)
    tl.store(c_ptr + offs_m * N + offs_n, c)


def products(M: int, N: int, K: int, dtype: str = "bf16", precision: str | None = None, capability: int = 90) -> str:
    types = {"a_ptr": dtype, "b_ptr": dtype, "c_ptr": "fp32"}
    return ptx(multiply, types, capability, M=M, N=N, K=K, PRECISION=precision)


@pytest.mark.native
def test_what_a_dot_takes() -> None:
    for M, N in ((16, 8), (8, 16), (16, 4), (32, 16)):
        text = products(M, N, 16)
        assert "mma.sync.aligned.m16n8k16" in text and "wgmma" not in text
    assert "wgmma.mma_async" in products(64, 16, 16)
    with pytest.raises(triton.CompilationError, match=r"(?s).") as raised:
        products(16, 16, 8)
    assert "K >= 16" in str(raised.value.__cause__ or raised.value)


@pytest.mark.native
def test_precision_of_float32_products() -> None:
    found = {}
    for precision in (None, "tf32", "ieee", "tf32x3"):
        text = products(16, 16, 16, "fp32", precision, 80)
        found[precision] = len(kinds(text, r"mma\.sync\S*tf32")), len(kinds(text, r"fma\.rn\.f32"))
    assert found[None] == found["tf32"] and found["tf32"][0] > 0 and found["tf32"][1] == 0
    assert found["ieee"][0] == 0 and found["ieee"][1] > 0
    assert found["tf32x3"][0] > 3 * found["tf32"][0]


@triton.jit
def count_down(x_ptr, polls):
    while polls > 0:
        tl.atomic_add(x_ptr, 1)
        polls -= 1


@triton.jit
def count_down_from_a_literal(x_ptr):
    count_down(x_ptr, 3)


@pytest.mark.native
def test_a_literal_cannot_be_counted_down() -> None:
    assert "atom" in ptx(count_down, {"x_ptr": "i32"}) or "red" in ptx(count_down, {"x_ptr": "i32"})
    with pytest.raises(triton.CompilationError) as raised:
        ptx(count_down_from_a_literal, {"x_ptr": "i32"})
    assert "polls changed type" in str(raised.value.__cause__ or raised.value)


@pytest.mark.both
def test_what_the_language_has() -> None:
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    for name in ("atomic_poll", "atomic_load", "atomic_store"):
        assert hasattr(tl, name) == (version >= (3, 9))
    assert not hasattr(tl, "tanh") and hasattr(tl, "sigmoid")


@triton.jit
def add(a_ptr, b_ptr, c_ptr, IN_FLOAT32: tl.constexpr):
    offs = tl.arange(0, 16)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    if IN_FLOAT32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(c_ptr + offs, (a + b).to(c_ptr.dtype.element_ty))


def test_bfloat16_in_the_interpreter() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        half, found = torch.full((16,), 0.5, dtype=dtype), torch.zeros(16, dtype=dtype)
        add[(1,)](half, half, found, IN_FLOAT32=False)
        assert found.eq(1).all() == (dtype != torch.bfloat16), dtype
    add[(1,)](half.bfloat16(), half.bfloat16(), whole := torch.zeros(16, dtype=torch.bfloat16), IN_FLOAT32=True)
    assert whole.eq(1).all()
    unit = torch.eye(16, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        found = torch.zeros(16, 16)
        multiply[(1,)](unit.to(dtype), unit.to(dtype), found, M=16, N=16, K=16, PRECISION=None)
        assert torch.equal(found, unit.float()) == (dtype != torch.bfloat16)


@triton.jit
def store_t(x_ptr, T):
    for t in tl.range(0, T):
        tl.store(x_ptr + t.to(tl.int64), t)


def test_a_loop_s_variable_in_the_interpreter() -> None:
    with pytest.raises(Exception, match="'int' object has no attribute 'to'"):
        store_t[(1,)](torch.zeros(4, dtype=torch.int32), 4)


@triton.jit
def move(x_ptr):
    offs = tl.arange(0, 16)
    x = tl.load(x_ptr + offs)
    x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + offs, x)


def test_no_inline_assembly_in_the_interpreter() -> None:
    with pytest.raises(Exception, match="inline_asm not supported in interpreter mode"):
        move[(1,)](torch.zeros(16, dtype=torch.int32))
