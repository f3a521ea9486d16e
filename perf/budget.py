"""What one time step costs, read from machine code: instructions by class, barriers, and an estimate of cycles.

The counts are exact for the way taken: what one warp executes in one step, nested loops as often as they turn. The
waiting loop is counted once: the poll before it in vain, the one in it with success, as it is when a program arrives
before the last of its group. What a step meets only when something is wrong is left out (`sass.Code.step`).

The cycles are an ESTIMATE, which no GPU has confirmed. It serves to rank two ways of writing one step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from .flow import Instruction, nested
from .sass import Code, name

#: Classes of instructions: the first that matches `opcode operands`. Together they are all instructions but NOP.
CLASSES = {
    "BAR": r"BAR\b",
    "WAIT": r"(MEMBAR|ERRBAR|CGAERRBAR|CCTL|FENCE|DEPBAR|LDGDEPBAR|WARPGROUP|SYNCS|UTCBAR|ELECT|NANOSLEEP)\b",
    "SHFL": r"SHFL\b",
    "LDS": r"LDS\b",
    "STS": r"STS\b|STSM\b",
    "LDSM": r"LDSM\b",
    "MMA": r"\w*MMA\b",  # HMMA, DMMA, HGMMA, UTCHMMA: every product on tensor cores
    "TMEM": r"(LDTM|STTM|UTC\w+)\b",  # to and from tensor memory
    "LDG": r"(LDG|LDGSTS)\b",  # the asynchronous copies from global to shared memory among them
    "STG": r"STG\b",
    "ATOM": r"(ATOM|RED)G?\b",
    "LDL": r"(LDL|STL)\b",  # spills
    "MUFU": r"MUFU\b",
    "CVT": r"(F2FP|F2F|F2I|I2F|I2FP|F2IP|FRND)\b|HADD2\.F32\b",
    "MOVE": r"(MOV|UMOV|IMAD\.MOV|CS2R|CS2UR|S2R|S2UR|R2UR|LDC|ULDC|LDCU|SEL|USEL|FSEL|PRMT|UPRMT|R2P|P2R)\b"
    r"|HFMA2\S* R\d+, -RZ, RZ,",  # a constant
    "FP": r"(FFMA|FMUL|FADD|FHADD|FHFMA|FMNMX|FMNMX3|HFMA2|HMUL2|HADD2|HMNMX2|DFMA|DMUL|DADD|DMNMX)2?\b",
    "PRED": r"(ISETP|UISETP|FSETP|DSETP|HSETP2|PLOP3|UPLOP3|VOTE|VOTEU|REDUX|FCHK)\b",
    "INT": r"(U?IADD3?|U?IMAD|U?LEA|U?LOP3|U?SHF|U?SHL|U?SHR|U?SGXT|U?BMSK|U?FLO|U?POPC|U?BREV|U?IABS|U?IMNMX|"
    r"U?VIADD|U?VIADDMNMX|U?VIMNMX3?|IDP)\b",
    "BRA": r"(BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|WARPSYNC|YIELD|KILL|BPT)\b",
    "OTHER": r"",
}
_CLASSES = {known: re.compile(pattern) for known, pattern in CLASSES.items()}
#: sm_100 waits by an addition that never happens.
_NOP = re.compile(r"NOP\b|UIADD3 URZ, UPT, UPT, URZ, URZ, URZ")
#: Wait for the tensor cores: all of wgmma's, or tcgen05's.
_AWAITS_PRODUCTS = re.compile(r"WARPGROUP\.DEPBAR.* 0x0$|SYNCS\.PHASECHK.*TRYWAIT")

#: The table of the estimate, of which this project has measured nothing.
#:
#: Cycles until a result is there. Fixed-latency instructions (FP, INT, HMMA) need none: the assembler spaces them, and
#: its stall counts are counted. L2: loads that chase pointers, 281 on a GH200 and 295 on a B200 (github.com/markdewing/
#: AI_kernels), +-30 % with the distance from SM to slice; taken for all. Shared memory: 29 to 33 in the literature. The
#: fence waits until the program's stores have reached L2, so a round trip and more, +-50 %; it is on the chain of every
#: step. The others are guesses, +-50 %, and weigh little.
LATENCY = {"L2": 280, "shared": 30, "fence": 400, "MEMBAR": 20, "BAR": 20}
LATENCY |= {"SHFL": 25, "MUFU": 20, "DMMA": 30, "wgmma": 60, "other": 25}
#: Cycles for which a warp's instruction holds a unit, by compute capability. HMMA: how far apart the assembler sets
#: independent ones. The others: 32 lanes, or the multiply-adds of a DMMA, over a partition's rate in the data sheets.
HELD = {
    80: {"HMMA": 8, "DMMA": 16, "fp32": 2, "fp64": 4, "MUFU": 8},
    90: {"HMMA": 6, "DMMA": 8, "fp32": 1, "fp64": 2, "MUFU": 8},
    100: {"HMMA": 8, "DMMA": 8, "fp32": 1, "fp64": 2, "MUFU": 8},
}
#: Bytes per clock and SM: L1 and shared memory by the data sheets, and what one SM draws from L2 when all do (+-30 %).
SHARED_BYTES_PER_CLOCK = 128
L2_BYTES_PER_CLOCK = 64
PARTITIONS = 4  # of an SM: a scheduler and its units each
#: Products that run beside the warp, which waits for them by an instruction of its own.
ASYNCHRONOUS = ("HGMMA", "UTCHMMA")


@dataclass(frozen=True)
class Budget:
    """What one time step makes one warp execute."""

    counted: str  # "time step", "launch" where a step is one, "whole kernel" where the compiler left no loop
    k_trips: int  # of the loop over K tiles; 0 where there is none, or the compiler unrolled it
    counts: dict[str, int]  # "all", and by class
    est_cycles: int


def budget(code: Code, *, launched: bool, k_tiles: int, products_per_tile: int, warps: int, capability: int) -> Budget:
    """Count one step.

    launched: a step is a launch of its own.
    k_tiles, products_per_tile: of the gate product: K tiles by the plan, and how many product instructions one takes by
        the PTX (`ptx.products_per_tile`), by which the trips of the loop over K are known: the assembler unrolls it.
    """
    k_loop = _k_loop(code)
    k_trips = _trips(code, k_loop, launched, k_tiles * products_per_tile) if k_loop else 0
    path = code.step(lambda loop: k_trips if loop == k_loop else 1, launched)
    step = [code.instructions[i] for i in path]
    counted = "launch" if launched else "time step" if code.loop else "whole kernel"
    estimate = cycles(step, warps, capability)
    if counted == "time step":  # the first starts with nothing under way
        estimate = cycles(step * 2, warps, capability) - estimate
    return Budget(counted, k_trips, counts(step), round(estimate))


def counts(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many there are in all and of each class."""
    met = Counter(kind(one) for one in instructions)
    found = {known: met[known] for known in CLASSES}
    return {"all": sum(found.values()), **found}


@lru_cache(maxsize=1 << 14)
def kind(instruction: Instruction) -> str:
    """The class of an instruction, "NOP" if it does nothing."""
    text = f"{instruction.opcode} {instruction.operands}"
    if _NOP.match(text):
        return "NOP"
    return next(known for known, pattern in _CLASSES.items() if pattern.match(text))


def _k_loop(code: Code) -> set[int]:
    """The loop over K tiles: the one inside the time loop that multiplies."""
    products = [loop for loop in nested(code.successors, code.loop) if _products(code, loop)] if code.loop else []
    if len(products) > 1:
        raise ValueError(f"{len(products)} loops with products inside the time loop, expected one over K")
    return products[0] if products else set()


def _trips(code: Code, k_loop: set[int], launched: bool, needed: int) -> int:
    """How often the loop over K turns: the products a step needs, without those peeled off the loop, over its own."""
    inside = _products(code, k_loop)
    # Other arithmetic of the step uses FFMA too, so that with those nothing can be said to be peeled; nothing is.
    tensor = any(kind(code.instructions[i]) == "MMA" for i in k_loop)
    peeled = _products(code, code.step(lambda loop: 1, launched)) - inside if tensor else 0
    trips, rest = divmod(needed - peeled, inside)
    if trips < 1 or rest:
        raise ValueError(
            f"the trips of the loop over K are unknown: {needed} products a step, {inside} in it, {peeled} beside it"
        )
    return trips


def _products(code: Code, which: Iterable[int]) -> int:
    """Product instructions, packed pairs as two: those on tensor cores, or in a kernel without any, FMA."""
    opcodes = [code.instructions[i] for i in which]
    on_tensor_cores = sum(kind(one) == "MMA" for one in opcodes)
    return on_tensor_cores or sum({"FFMA": 1, "FFMA2": 2, "DFMA": 1}.get(name(one), 0) for one in opcodes)


def cycles(step: Iterable[Instruction], warps: int, capability: int) -> float:
    """ESTIMATE of the cycles that a program alone on its SM takes for these instructions, its warps in lockstep.

    The machine issues in order. What an instruction waits for is in its encoding: a stall count after the one before,
    and the scoreboards that earlier ones of variable latency set. To this come the units, which all warps share.
    """
    now = 0.0
    scoreboards = [0.0] * 8  # six; the last is named by those that set none
    free: dict[str, float] = {}  # when each unit can take another instruction
    copies: list[float] = []  # when each group of asynchronous copies has arrived
    copied = multiplied = 0.0
    for one in step:
        if one.control is None:
            raise ValueError(f"line {one.line} of the listing comes without its encoding")
        control = one.control >> 41
        stall, sets, reads, waits = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        start = max([now, *(scoreboards[i] for i in range(6) if waits >> i & 1)])
        opcode = name(one)
        if opcode == "DEPBAR":
            left = re.search(r"SB0, 0x(\w+)", one.operands)
            if left and len(copies) > int(left[1], 16):
                start = max(start, copies[-1 - int(left[1], 16)])
        elif _AWAITS_PRODUCTS.match(f"{one.opcode} {one.operands}"):
            start = max(start, multiplied)
        unit, held, latency = _work(one, warps, capability)
        begun = max(start, free.get(unit, 0.0)) if unit else start
        done = begun + held + latency
        if unit:
            free[unit] = begun + held
        if opcode == "LDGSTS":
            copied = max(copied, done)
        elif opcode == "LDGDEPBAR":
            copies.append(copied)
        elif unit == "tensor":
            multiplied = done
        scoreboards[sets] = max(scoreboards[sets], done)
        scoreboards[reads] = max(scoreboards[reads], begun + held)
        # Barriers and fences hold the next instruction up, and so does a unit without a queue.
        if opcode in ("BAR", "MEMBAR"):
            start = done
        elif unit in ("tensor", "fp32", "fp64") and opcode not in ASYNCHRONOUS:
            start = begun
        now = start + max(stall, warps / PARTITIONS)
    return now


@lru_cache(maxsize=1 << 14)
def _work(one: Instruction, warps: int, capability: int) -> tuple[str, float, float]:
    """The unit an instruction takes, for how long if all warps issue it at once, and the latency that comes on top."""
    held = HELD[min(HELD, key=lambda known: abs(known - capability))]
    here = warps / PARTITIONS  # warps that share a partition's unit
    opcode, group = name(one), kind(one)
    if group in ("LDG", "ATOM"):
        return "L2", 32 * _bytes(one) / L2_BYTES_PER_CLOCK * warps, LATENCY["L2"]
    if group in ("LDS", "STS", "LDSM", "STG", "LDL"):
        return "shared", 32 * _bytes(one) / SHARED_BYTES_PER_CLOCK * warps, LATENCY["shared"]
    if group == "SHFL":
        return "shared", warps, LATENCY["SHFL"]
    if group == "MUFU":
        return "MUFU", held["MUFU"] * here, LATENCY["MUFU"]
    if opcode in ("BAR", "MEMBAR"):
        return "", 0, LATENCY["fence" if one.opcode.endswith("GPU") else opcode]
    if opcode in ASYNCHRONOUS:
        # 64 rows by N columns by 32 bytes of K: N / 2 cycles of all four partitions. UTCHMMA does not say N: 64.
        columns = re.search(r"\.64x(\d+)x", one.opcode)
        return "tensor", max(16, int(columns[1]) / 2 if columns else 32), LATENCY["wgmma"]
    if opcode == "DMMA":
        size = 8 if "16x8x16" in one.opcode else 1  # of the smallest, 8x8x4
        return "tensor", held["DMMA"] * size * here, LATENCY["DMMA"]
    if group == "MMA":
        return "tensor", held["HMMA"] * here, 0
    if group == "FP":
        return ("fp64", held["fp64"] * here, LATENCY["other"]) if opcode[0] == "D" else ("fp32", held["fp32"] * here, 0)
    return "", 0, LATENCY["other"]


def _bytes(one: Instruction) -> int:
    """Bytes a lane moves: `LDG.E.128`, `LDS.U.64`, `STG.E.U16`; of LDSM four for each of its matrices, `.M88.4`."""
    if name(one) in ("LDSM", "STSM"):
        return 4 * int(one.opcode[-1]) if one.opcode.endswith((".2", ".4")) else 4
    widths = re.findall(r"\.[US]?(\d+)\b", one.opcode)
    return int(widths[-1]) // 8 if widths else 4
