"""The budget of one step: classes of instructions, trips of the loop over K, and what the estimate of cycles counts."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from lstm_triton.perf import budget, ptx, resources, sass
from lstm_triton.perf.flow import Instruction

from lstm_triton.devices import device_named
from lstm_triton.planner import make_plan
from lstm_triton.spec import CellSpec

pytestmark = pytest.mark.both

USAGE = " Function toy:\n  REG:54 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
#: Met in kernels for sm_80, sm_90 and sm_100.
OPCODES = {
    "BAR": "BAR.SYNC.DEFER_BLOCKING 0x0",
    "WAIT": "MEMBAR.ALL.GPU; MEMBAR.ALL.CTA; ERRBAR; CGAERRBAR; CCTL.IVALL; DEPBAR.LE SB0, 0x2; LDGDEPBAR;"
    "FENCE.VIEW.ASYNC.S; WARPGROUP.ARRIVE; WARPGROUP.DEPBAR.LE gsb0, 0x1; UTCBAR [UR16], URZ;"
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR16], R4; ELECT P5, URZ, PT",
    "SHFL": "SHFL.BFLY PT, R2, R3, 0x1, 0x1f",
    "LDS": "LDS.U16 R2, [R3]",
    "STS": "STS.128 [R3], R4; STSM.16.M88.4 [R3], R4",
    "LDSM": "LDSM.16.MT88.4 R4, [R3]",
    "MMA": "HMMA.16816.F32.BF16 R4, R8, R12, R4; HMMA.1688.F32.TF32 R4, R8, R12, R4; DMMA.884 R4, R8, R9, R4;"
    "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8].tnspB, R24; UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR19], UPT",
    "TMEM": "LDTM.16dp32bit_t0_t15.x16 R4, tmem[UR18]; STTM.16dp32bit_t0_t15.x16 tmem[UR18], R4",
    "LDG": "LDG.E.STRONG.GPU R2, [R4.64]; LDGSTS.E.BYPASS.128 [R94], desc[UR12][R24.64], P3",
    "STG": "STG.E.U16 [R2.64], R4",
    "ATOM": "ATOMG.E.EXCH.STRONG.SYS PT, RZ, [R2.64], R5; REDG.E.ADD.STRONG.GPU [R2.64], R5; RED.E.ADD [R2], R5",
    "LDL": "LDL.64 R2, [R1]; STL [R1], R2",
    "MUFU": "MUFU.EX2 R2, R3",
    "CVT": "F2FP.BF16.F32.PACK_AB R2, R3, R4; F2F.F64.F32 R2, R4; HADD2.F32 R2, -RZ, R3.H0_H0",
    "MOVE": "IMAD.MOV.U32 R2, RZ, RZ, R3; MOV R2, R3; CS2R R2, SRZ; S2UR UR4, SR_CTAID.X; ULDC.64 UR4, c[0x0][0x8];"
    "LDCU UR4, c[0x0][0x8]; PRMT R2, R3, 0x7632, R2; FSEL R2, R3, R4, P0; HFMA2.MMA R2, -RZ, RZ, 0, 0;"
    "HFMA2 R2, -RZ, RZ, 1.875, 0; R2P PR, R2, 0x7f; USEL UR4, UR5, UR6, UP0",
    "FP": "FFMA R2, R3, R4, R5; FFMA2 R2, R4.F32x2.HI_LO, R6.F32x2.HI_LO, R8; FMUL R2, R3, R4; FADD2 R2, R4, R6;"
    "DFMA R2, R4, R6, R8; HFMA2.BF16_V2 R2, R3, R4, R5; HADD2 R2, R3, R4; FHADD R2, R3, R4; DADD R2, R4, R6",
    "PRED": "ISETP.GE.AND P2, PT, R8, R9, PT; FSETP.GT.AND P2, PT, R2, R3, PT; PLOP3.LUT P0, PT, P0; VOTEU.ANY UP0, P0",
    "INT": "IADD3 R2, P2, R3, R4, RZ; IMAD.WIDE R2, R3, 0x2, R4; IMAD.U32 R2, R3, 0x10000, RZ; LEA.HI.X R2, R3, R4, R5;"
    "ULOP3.LUT UR4, UR5, UR6, URZ, 0xc0, !UPT; SHF.R.U32.HI R2, RZ, 0x5, R3; VIADD R2, R3, 0x80; POPC R2, UR6;"
    "UFLO.U32 UR7, UR6; USGXT UR4, UR5, 0x18; VIADDMNMX R2, R3, R4, R5, PT; UIADD3 UR4, UR4, 0x1, URZ",
    "BRA": "BRA 0x10; BSSY B0, 0x2850; BSYNC B0; EXIT; CALL.REL.NOINC 0x50; RET.REL.NODEC R2 0x0; WARPSYNC.ALL",
    "NOP": "NOP; UIADD3 URZ, UPT, UPT, URZ, URZ, URZ",
    "OTHER": "TEX R2, R3",
}
EXAMPLES = [(kind, text.strip()) for kind, texts in OPCODES.items() for text in texts.split(";")]


def instruction(text: str, control: int | None = None) -> Instruction:
    opcode, _, operands = text.partition(" ")
    return Instruction(opcode, operands, "", 1, control)


@pytest.mark.parametrize(("wanted", "text"), EXAMPLES)
def test_class_of_an_instruction(wanted: str, text: str) -> None:
    assert budget.kind(instruction(text)) == wanted


def test_classes_add_up_to_all_and_have_a_column_each() -> None:
    found = budget.counts(instruction(text) for _, text in EXAMPLES)
    assert found.pop("all") == sum(found.values()) == sum(kind != "NOP" for kind, _ in EXAMPLES)
    assert set(found) == set(OPCODES) - {"NOP"} and {"all", *found} <= set(resources.COLUMNS)


# A time loop with a loop over K in it, of two products and a barrier; one product is peeled off before it.
TEXTS = ["MOV R1, RZ", "LDG.E R2, [R4.64]", "HMMA.16816.F32.BF16 R8, R4, R6, R8", "BAR.SYNC 0x0"]
TEXTS += ["HMMA.16816.F32.BF16 R8, R4, R6, R8", "HMMA.16816.F32.BF16 R8, R4, R6, R8", "@P1 BRA 0x30"]
TEXTS += ["STG.E [R4.64], R8", "@P0 BRA 0x10", "EXIT"]


def code(texts: list[str], stall: int = 1) -> sass.Code:
    """The listing of these instructions as cuobjdump writes it, encodings included."""
    encoded = control(stall)
    lines = []
    for i, text in enumerate(texts):
        lines.append(f"        /*{16 * i:04x}*/                   {text} ;     /* 0x0000000000007918 */")
        lines.append(f"                                               /* 0x{encoded:016x} */")
    return sass.read_listing(USAGE + "\n".join(lines))


def control(stall: int = 1, waits: int = 0, sets: int = 7, reads: int = 7) -> int:
    """The upper half of an encoding: what the assembler scheduled."""
    return (stall | sets << 5 | reads << 8 | waits << 11) << 41


def count(kernel: sass.Code, k_tiles: int, products_per_tile: int, launched: bool = False) -> budget.Budget:
    return budget.budget(
        kernel, launched=launched, k_tiles=k_tiles, products_per_tile=products_per_tile, warps=4, capability=90
    )


def test_loop_over_k_is_counted_as_often_as_it_turns() -> None:
    """Nine products, one of them peeled off, two a trip: four trips, as of nine tiles of one or of three of three."""
    for k_tiles, products_per_tile in ((9, 1), (3, 3)):
        found = count(code(TEXTS), k_tiles, products_per_tile)
        assert (found.counted, found.k_trips) == ("time step", 4)
        assert (found.counts["MMA"], found.counts["BAR"], found.counts["BRA"], found.counts["LDG"]) == (9, 4, 5, 1)
        assert found.counts["all"] == 2 + 4 * 4 + 2
    assert count(code(TEXTS), 9, 1, launched=True).counts["all"] == 2 + 4 * 4 + 2 + 2


@pytest.mark.parametrize(("k_tiles", "products_per_tile"), [(8, 1), (0, 0), (1, 1)])
def test_trips_that_do_not_come_out_even_are_refused(k_tiles: int, products_per_tile: int) -> None:
    with pytest.raises(ValueError, match="trips of the loop over K are unknown"):
        count(code(TEXTS), k_tiles, products_per_tile)


def test_scalar_products_count_packed_ones_twice_and_leave_the_cell_s_own_out() -> None:
    texts = [text.replace("HMMA.16816.F32.BF16 R8, R4", "FFMA R8, R4") for text in TEXTS]
    texts[4] = "FFMA2 R8, R4, R6, R8"
    assert count(code(texts), 4, 3).k_trips == 4


def test_kernel_without_a_loop_over_k() -> None:
    found = count(code([text for text in TEXTS if "@P1" not in text]), 9, 1)
    assert (found.k_trips, found.counts["MMA"], found.counts["BAR"]) == (0, 3, 1)


def estimate(*step: tuple[str, int], warps: int = 4, capability: int = 90) -> float:
    return budget.cycles([instruction(text, encoded) for text, encoded in step], warps, capability)


def test_estimate_counts_stalls_and_issue_slots() -> None:
    step = [("IADD3 R2, R3, R4, RZ", control(stall)) for stall in (1, 4, 2)]
    assert estimate(*step) == 7
    assert estimate(*step, warps=8) == 2 + 4 + 2  # two warps on each scheduler


def test_estimate_waits_on_scoreboards() -> None:
    load = ("LDG.E R2, [R4.64]", control(sets=3))
    independent, dependent = (("FADD R3, R2, R2", control(waits=waits)) for waits in (1 << 2, 1 << 3))
    transfer = 32 * 4 / budget.L2_BYTES_PER_CLOCK * 4
    assert estimate(load, independent) == 2
    assert estimate(load, dependent) == transfer + budget.LATENCY["L2"] + 1
    assert estimate(load, load, dependent) == 2 * transfer + budget.LATENCY["L2"] + 1  # both under way at once
    two = 2 * (transfer + budget.LATENCY["L2"])
    assert estimate(load, ("LDG.E R2, [R2.64]", control(sets=3, waits=1 << 3)), dependent) == two + 1


def test_estimate_waits_for_copies_of_the_group_asked_for() -> None:
    copy, commit = ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", control()), ("LDGDEPBAR", control())
    transfer = 32 * 16 / budget.L2_BYTES_PER_CLOCK * 4
    one = estimate(copy, commit, copy, commit, ("DEPBAR.LE SB0, 0x1", control()))
    both = estimate(copy, commit, copy, commit, ("DEPBAR.LE SB0, 0x0", control()))
    assert one == transfer + budget.LATENCY["L2"] + 1 and both == one + transfer
    assert estimate(copy, commit, ("DEPBAR.LE SB0, 0x1", control())) == 3  # a group may stay under way


def test_estimate_of_products() -> None:
    hmma = ("HMMA.16816.F32.BF16 R8, R4, R6, R8", control())
    assert estimate(hmma, hmma, hmma) == 2 * 6 + 1
    assert estimate(hmma, hmma, hmma, warps=8) == 2 * 12 + 2  # two warps share a tensor core
    assert estimate(hmma, hmma, hmma, capability=80) == 2 * 8 + 1
    wgmma = ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", control())
    assert estimate(wgmma, ("FADD R3, R2, R2", control())) == 2  # beside the warp
    waited = estimate(wgmma, ("WARPGROUP.DEPBAR.LE gsb0, 0x0", control()))
    assert waited == 64 + budget.LATENCY["wgmma"] + 1


def test_barriers_and_fences_hold_everything_up() -> None:
    add = ("IADD3 R2, R3, R4, RZ", control())
    assert estimate(("BAR.SYNC 0x0", control()), add) == budget.LATENCY["BAR"] + 2
    assert estimate(("MEMBAR.ALL.GPU", control()), add) == budget.LATENCY["fence"] + 2
    assert estimate(("MEMBAR.ALL.CTA", control()), add) == budget.LATENCY["MEMBAR"] + 2


def test_estimate_of_a_step_leaves_out_that_the_first_starts_with_nothing_under_way() -> None:
    kernel = code(["MOV R1, RZ", "FADD R3, R2, R2", "LDG.E R2, [R4.64]", "@P0 BRA 0x10", "EXIT"])
    kernel.instructions[1] = replace(kernel.instructions[1], control=control(waits=1))
    kernel.instructions[2] = replace(kernel.instructions[2], control=control(sets=0))
    assert count(kernel, 0, 0).est_cycles > budget.LATENCY["L2"]  # the load's, which the next step waits for


def test_listing_without_encodings_has_no_estimate() -> None:
    with pytest.raises(ValueError, match="without its encoding"):
        estimate(("FADD R3, R2, R2", None))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("LDG.E.128 R2, [R4]", 16),
        ("LDG.E.U16 R2, [R4]", 2),
        ("LDG.E.STRONG.GPU R2, [R4]", 4),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R2], [R4]", 16),
        ("STS.U8 [R2], R4", 1),
        ("LDS.U.64 R4, [R2]", 8),
        ("LDSM.16.MT88.4 R4, [R2]", 16),
        ("LDSM.16.M88 R4, [R2]", 4),
    ],
)
def test_bytes_of_an_access(text: str, wanted: int) -> None:
    assert budget._bytes(instruction(text)) == wanted


#: Multiply-adds of one product instruction by a warp, by the opcode; HGMMA's are by the four warps of a warpgroup.
SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16x8x16": 16 * 8 * 16, "884": 8 * 8 * 4}


@pytest.mark.native
@pytest.mark.parametrize(
    ("target", "cell", "direction", "dtype", "H", "B", "engine", "trips"),
    [
        ("sm_80", "lstm", "forward", torch.bfloat16, 512, 16, "resident", False),
        ("sm_90", "lstm", "forward", torch.bfloat16, 1024, 16, "resident", False),
        ("sm_90", "lstm", "backward", torch.float64, 64, 16, "resident", False),
        ("sm_100", "lstm", "backward", torch.float16, 256, 16, "resident", False),
        ("sm_80", "lstm", "backward", torch.float64, 64, 16, "resident", False),
        ("sm_80", "lstm", "backward", torch.bfloat16, 2048, 1, "streamed", True),
        ("sm_80", "gru", "backward", torch.float32, 2048, 256, "step", True),
        ("sm_90", "gru", "backward", torch.bfloat16, 1536, 256, "streamed", True),  # wgmma, unrolled
        ("sm_100", "rnn", "forward", torch.float16, 2048, 256, "streamed", True),  # tcgen05, one trip peeled off
        ("sm_90", "gru", "backward", torch.float32, 500, 16, "streamed", True),  # the last K tile is not full
    ],
)
def test_products_of_a_step_are_those_of_its_tile(
    target: str, cell: str, direction: str, dtype: torch.dtype, H: int, B: int, engine: str, trips: bool
) -> None:
    """What all warps multiply in one step is rows x columns x K of the plan: no product missed, none counted twice."""
    from lstm_triton.launch import compile_ahead

    plan = make_plan(CellSpec(cell), 32, B, H, dtype, device_named(target), engine=engine)
    kernel = getattr(plan, direction)
    compiled = compile_ahead(plan, direction)
    row = resources.inspect(compiled, plan, direction)
    assert (row.k_trips > 0) == trips and row.counted == ("launch" if engine == "step" else "time step")
    assert row.OTHER == 0

    depth = H * (plan.spec.gates if direction == "backward" else 1)
    columns = kernel.block_h * (1 if direction == "backward" else 1 << (plan.spec.gates - 1).bit_length())
    multiplied = -(-depth // kernel.block_k) * kernel.block_k * kernel.block_b * columns
    (opcode,) = {one.opcode for one in sass.read_cubin(compiled.asm["cubin"]).instructions if budget.kind(one) == "MMA"}
    if opcode.startswith("UTCHMMA"):  # one thread's, and its shape is in a descriptor: 64 rows, 32 bytes of K
        each = 64 * columns * 32 // dtype.itemsize
    elif wgmma := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        each = int(wgmma[1]) * int(wgmma[2]) * int(wgmma[3]) * kernel.num_warps // 4
    else:
        each = SHAPES[opcode.split(".")[1]] * kernel.num_warps
    assert row.MMA * each == multiplied
    assert ptx.products_per_tile(compiled.asm["ptx"]) > 0 or not trips


@pytest.mark.native
def test_estimate_ranks_two_ways_of_writing_one_step() -> None:
    """Resident weights against weights read at every step, and inference against training."""
    rows = {}
    for engine, direction in (("resident", "forward"), ("streamed", "forward"), ("resident", "inference")):
        plan = make_plan(CellSpec("lstm"), 32, 16, 512, torch.bfloat16, device_named("sm_90"), engine=engine)
        (rows[engine, direction],) = resources.compile_group([(plan, direction)])
    resident, streamed, inference = (row.est_cycles for row in rows.values())
    assert inference <= resident < streamed
    assert 1000 < resident < 10000  # a few L2 round trips, and well below the launch of a kernel
