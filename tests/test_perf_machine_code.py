"""Reading what the compiler made: loops and the way through them in SASS, the order of publish and wait in PTX."""

from __future__ import annotations

from pathlib import Path

import pytest
from lstm_triton.perf import budget, flow, ptx, sass

pytestmark = pytest.mark.both

# Recorded from a persistent kernel of three lines (wait, tile product, publish), sm_80, encodings dropped.
LISTING = (Path(__file__).parent / "data" / "waiting_kernel_sm80.sass").read_text()
LOOP = 0x460 // 16, 0xBC0 // 16  # its time loop: what the last backward branch jumps to, and that branch
USAGE = " Function toy:\n  REG:54 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0\n"


def once(loop: set[int]) -> int:
    return 1


def listing(*texts: str) -> str:
    """A disassembly of these instructions, at 0x0, 0x10, ..."""
    return "\n".join(f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate(texts))


def counts(code: sass.Code, launched: bool = False) -> dict[str, int]:
    return budget.counts(code.instructions[i] for i in code.step(once, launched))


def test_loops_nest_and_come_largest_first() -> None:
    # 0 -> 1 -> 2 -> 3 -> 1, with 2 <-> 4 inside it; 5 <-> 6 apart; 7 jumps to itself as the trap after a kernel does
    successors = [[1], [2], [3, 4], [1, 5], [2], [6], [5, 7], [7]]
    assert flow.loops(successors) == [{1, 2, 3, 4}, {5, 6}]
    assert flow.nested(successors, {1, 2, 3, 4}) == [{2, 4}]
    assert flow.reachable(successors, [5]) == {5, 6, 7}


def test_way_through_a_loop() -> None:
    # 1 -> (2 | 3 4) -> 5 -> 1, where 4 leaves the loop for 7 or goes on, and 5 <-> 6 turn inside it
    successors = [[1], [2, 3], [5], [4], [5, 7], [6, 1], [5], []]
    loop = {1, 2, 3, 4, 5, 6}
    assert flow.once_through(successors, loop, once) == [1, 3, 4, 5, 6]
    assert flow.once_through(successors, loop, lambda nested: 3) == [1, 3, 4, 5, 6, 5, 6, 5, 6]
    assert flow.once_through(successors, loop, once, avoid={3}) == [1, 2, 5, 6]
    assert flow.once_through(successors, loop, once, avoid={1}) == [1, 3, 4, 5, 6]  # no way round it
    assert flow.way(successors, range(8), 0, {7}, once) == [0, 1, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="no way"):
        flow.way(successors, loop, 1, {7}, once)


def test_loop_with_two_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="2 entries"):
        flow.entry([[1, 2], [2], [1]], {1, 2})


def test_recorded_listing() -> None:
    code = sass.read_listing(USAGE + LISTING)
    assert (code.registers, code.stack_bytes) == (54, 16)
    # counted by hand, between the loop's head and its backward branch
    first, last = LOOP
    assert min(code.loop) == first and max(code.loop) == last
    lines = LISTING.splitlines()
    inside = [line.split("*/")[1].split() for line in lines if line.lstrip().startswith("/*")][first : last + 1]
    opcodes = [words[1] if words[0].startswith("@") else words[0] for words in inside]
    found = counts(code)
    assert found["all"] == len([opcode for opcode in opcodes if opcode != "NOP"])  # no code in it is rare
    for column, start in {"BAR": "BAR.", "MMA": "HMMA.", "LDSM": "LDSM.", "STG": "STG.", "MUFU": "MUFU."}.items():
        assert found[column] == sum(opcode.startswith(start) for opcode in opcodes) > 0, column
    assert found["ATOM"] == 1 and found["SHFL"] == 0


def test_whole_kernel_is_counted_where_no_loop_is_left() -> None:
    code = sass.read_listing(
        USAGE + listing("MOV R1, c[0x0][0x28]", "LDG.E R2, [R4.64]", "MUFU.EX2 R2, R2", "EXIT", "BRA 0x40")
    )
    assert code.loop == set()
    found = counts(code)
    assert found["all"] == 4 and found["LDG"] == 1 and found["MUFU"] == 1  # the trap after EXIT is never met


def test_a_launch_is_counted_from_the_first_instruction_to_the_last() -> None:
    code = sass.read_listing(
        USAGE + listing("MOV R1, RZ", "MUFU.EX2 R2, R2", "@P0 BRA 0x10", "STG.E [R2.64], R2", "EXIT")
    )
    assert counts(code)["all"] == 2
    assert counts(code, launched=True)["all"] == 5


def test_subroutine_called_from_the_loop_belongs_to_it() -> None:
    texts = ["MOV R1, RZ", "CALL.REL.NOINC 0x50", "MUFU.EX2 R2, R2", "@P0 BRA 0x10", "EXIT", "DFMA R2, R2, R2, R2"]
    texts += ["DADD R2, R2, R2", "RET.REL.NODEC R2 0x0", "BRA 0x80"]
    assert counts(sass.read_listing(USAGE + listing(*texts)))["all"] == 6


def test_subroutine_that_a_branch_goes_round_is_for_what_is_rare() -> None:
    texts = ["MOV R1, RZ", "MUFU.RCP64H R2, R2", "@P1 BRA 0x40", "CALL.REL.NOINC 0x60", "@P0 BRA 0x10", "EXIT"]
    texts += ["DFMA R2, R2, R2, R2", "RET.REL.NODEC R2 0x0"]
    found = counts(sass.read_listing(USAGE + listing(*texts)))
    assert found["all"] == 3 and found["FP"] == 0


def test_jump_out_of_the_loop_written_as_a_call_does_not_count() -> None:
    texts = ["MOV R1, RZ", "MUFU.EX2 R2, R2", "@!P2 CALL.REL.NOINC 0x40", "BRA 0x10", "STG.E [R2.64], R2", "EXIT"]
    found = counts(sass.read_listing(USAGE + listing(*texts)))
    assert found["all"] == 3 and found["STG"] == 0


def test_what_a_wait_in_vain_leads_to_is_left_out() -> None:
    """A poll once, a way out of the loop that gives up not at all."""
    texts = ["MOV R1, RZ", "LDG.E.STRONG.GPU R2, [R4.64]", "@P0 BRA 0x10", "@P1 BRA 0x70", "STG.E [R6.64], R2"]
    texts += ["RED.E.ADD.STRONG.GPU [R4.64], R5", "@P2 BRA 0x10", "ATOMG.E.EXCH R2, [R8.64], R9", "EXIT"]
    found = counts(sass.read_listing(USAGE + listing(*texts)))
    assert (found["all"], found["LDG"], found["STG"], found["ATOM"]) == (6, 1, 1, 1)


def test_empty_listing_is_refused() -> None:
    with pytest.raises(ValueError, match="no SASS instruction"):
        sass.read_listing(USAGE + "no code here")
    with pytest.raises(ValueError, match="no register count"):
        sass.read_listing(LISTING)


BARRIER = "bar.sync 	0;"
STORE = "st.global.b32 [ %rd1 + 0 ], { %r5 };"
RELEASE = "@%p1 atom.global.gpu.release.add.u32 %r6, [ %rd3 + 0 ], %r7;"
ACQUIRE = "@%p1 ld.global.gpu.acquire.b32 %r1, [ %rd3 + 0 ];"
LOAD = "cp.async.cg.shared.global [ %r2 + 0 ], [ %rd5 + 0 ], 0x10, %r4;"
LOAD_X = "ld.global.b32 { %r8 }, [ %rd2 + 0 ];"

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2,
	.param .u32 kernel_param_3
)
{
	.reg .b32 	%r<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	ld.param.b64 	%rd3, [kernel_param_2];
	ld.param.b32 	%r3, [kernel_param_3];
	mul.wide.s32 	%rd4, %r3, 2;
	sub.s64 	%rd5, %rd1, %rd4;
"""


def kernel(step: list[str], before: list[str] | None = None, after: list[str] | None = None) -> str:
    """A time loop around `step`, its second half laid out before its first as the compiler does."""
    half = step.index(SPIN_END)
    blocks = {
        "entry": [*(before or []), "bra.uni $L__BB0_2;"],
        "$L__BB0_3": [*step[half + 1 :], "setp.ne.b32 %p3, %r1, %r3;", "@%p3 bra $L__BB0_2;", "bra.uni $L__BB0_5;"],
        "$L__BB0_2": [*step[:half], "@%p2 bra $L__BB0_4;", "bra.uni $L__BB0_3;"],
        "$L__BB0_4": [ACQUIRE, "@%p2 bra $L__BB0_4;", "bra.uni $L__BB0_3;"],
        "$L__BB0_5": [*(after or []), "ret;"],
    }
    return "\n".join([HEAD, *(line for label, lines in blocks.items() for line in (f"{label}:", *lines)), "}"])


SPIN_END = "-"
STEP = [LOAD_X, ACQUIRE, SPIN_END, BARRIER, LOAD, BARRIER, "mma.sync %r5, %r8, %r2;", STORE, BARRIER, RELEASE]


def changed(*edits: tuple[int, list[str]]) -> list[str]:
    step: list[list[str]] = [[text] for text in STEP]
    for index, texts in edits:
        step[index] = texts
    return [text for texts in step for text in texts]


def test_right_order_passes() -> None:
    assert ptx.ptx_order(kernel(STEP)) == []
    assert ptx.ptx_order(kernel(STEP), published={0}) == []
    # closing stores and the release of a group that gave up come after the loop
    after = [STORE.replace("%rd1", "%rd2"), RELEASE]
    assert ptx.ptx_order(kernel(STEP, after=after), published={0}, own={1}) == []


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (changed((8, [])), "release without a barrier after the last store"),
        (changed((7, []), (8, [BARRIER, STORE])), "release without a barrier after the last store"),
        (changed((7, []), (9, [RELEASE, STORE])), "release before this part's store"),
        (changed((9, [RELEASE, STORE, BARRIER, RELEASE])), "release without a wait since the last one"),
        (changed((3, [])), "without a barrier after the acquire"),
        (changed((0, [LOAD, LOAD_X])), "load of h, which is published, above the wait"),
        (changed((9, [RELEASE, LOAD])), "load of h, which is published, above the wait"),
        (changed((9, [RELEASE.replace(".release", ".relaxed")])), "no release found"),
        (changed((7, [STORE.replace("%rd1", "%rd2")])), "no store of h found"),
        (changed((4, [LOAD.replace("%rd5", "%rd2")])), "no load of h found"),
        (
            changed((7, [STORE, STORE.replace("%rd1", "%rd2")])),
            "parameter 1 is stored and loaded, and said to be neither",
        ),
    ],
)
def test_planted_faults_are_found(step: list[str], problem: str) -> None:
    assert any(problem in found for found in ptx.ptx_order(kernel(step), published={0}, own=(), names={0: "h"}))


STORE_R, LOAD_R = (text.replace("%rd1", "%rd2").replace("%rd5", "%rd2") for text in (STORE, LOAD))
#: A step in two parts: of h comes r, and of all of r the next h.
PARTS = [ACQUIRE, SPIN_END, BARRIER, LOAD, STORE_R, BARRIER, RELEASE, ACQUIRE, BARRIER, LOAD_R, STORE, BARRIER, RELEASE]
BOTH = {0: "h", 1: "r"}


def moved(text: str, to: int) -> list[str]:
    """PARTS with one instruction, of which there is one, elsewhere among the others."""
    rest = [other for other in PARTS if other != text]
    return [*rest[:to], text, *rest[to:]]


def test_every_part_of_a_step_has_an_order_of_its_own() -> None:
    assert ptx.ptx_order(kernel(PARTS), BOTH.keys(), names=BOTH) == []
    # gradients that the second part adds to are stored and loaded in both
    again = [text for text in PARTS for text in ([text, STORE] if text == STORE_R else [text])]
    assert ptx.ptx_order(kernel(again), BOTH.keys(), names=BOTH) == []


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (moved(LOAD_R, 5), "load of r, which is published, above the wait"),
        (moved(LOAD_R, 7), "load of r, which is published, above the wait"),
        (moved(LOAD_R, 8), "load of r, which is published, without a barrier after the acquire"),
        (moved(STORE_R, 6), "release before this part's store"),
        (moved(STORE_R, 9), "release before this part's store"),
        (moved(LOAD, 9), ""),  # later than it may be
        (moved(LOAD, 12), "load of h, which is published, above the wait"),
        (moved(STORE, 7), ""),  # earlier than it has to be
        (moved(STORE, 12), "load of h, which is published, above the wait"),
        (moved(STORE_R, 11), "release without a barrier after the last store of r"),
        ([text for i, text in enumerate(PARTS) if i != 5], "release without a barrier after the last store of r"),
        ([text for i, text in enumerate(PARTS) if i not in (7, 8)], "release without a wait since the last one"),
    ],
)
def test_faults_planted_in_a_step_of_two_parts_are_found(step: list[str], problem: str) -> None:
    found = ptx.ptx_order(kernel(step), BOTH.keys(), names=BOTH)
    assert any(problem in line for line in found) if problem else found == []


def test_prefetch_before_the_loop_is_found() -> None:
    found = ptx.ptx_order(kernel(STEP, before=[LOAD]), published={0})
    assert any("outside the time loop" in problem for problem in found)


def test_a_kernel_that_publishes_nothing_is_found() -> None:
    assert ptx.ptx_order(kernel(STEP).replace("st.global", "st.shared")) == ["nothing is published"]


def test_wait_without_acquire_is_found() -> None:
    assert ptx.ptx_order(kernel(STEP).replace(".acquire", ".relaxed"), published={0}) == ["no acquire found"]


def test_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown label"):
        ptx.ptx_order(kernel(STEP).replace("$L__BB0_5:", "$L__BB0_6:"))


def k_loop(*products: str) -> str:
    """A kernel whose time loop multiplies in a loop of its own, after one product before it."""
    blocks = ["$L__BB0_1:", "mul.f32 %r1, %r1, %r1;", "fma.rn.f32 %r2, %r1, %r1, %r2;", "$L__BB0_2:", *products]
    blocks += ["@%p1 bra $L__BB0_2;", "@%p2 bra $L__BB0_1;", "ret;"]
    return "\n".join([HEAD, *blocks, "}"])


def test_products_of_a_k_tile() -> None:
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };"
    assert ptx.products_per_tile(k_loop(mma, mma, "fma.rn.f32 %r2, %r1, %r1, %r2;")) == 2
    assert ptx.products_per_tile(k_loop("fma.rn.f32 %r2, %r1, %r1, %r2;")) == 1
    assert (
        ptx.products_per_tile(k_loop("fma.rn.f32x2 %rd2, %rd1, %rd1, %rd2;", "fma.rn.f64 %rd2, %rd1, %rd1, %rd2;")) == 3
    )
    assert ptx.products_per_tile(k_loop("add.f32 %r2, %r2, %r2;")) == 0
    assert ptx.products_per_tile(kernel(STEP)) == 0
