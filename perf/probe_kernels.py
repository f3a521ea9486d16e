"""The kernels that `probe` times: each is one thing that a time step of the kernels does, and nothing else.

Whatever is read or computed ends in what is stored, and the host checks that: nothing can be optimised away unseen.
"""

import triton
import triton.language as tl
from lstm_triton.kernels.product import dot, load_resident, row_tile, sum_slices
from lstm_triton.kernels.sync import give_up, publish, wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: In a slot to which nothing was stored yet, as two bfloat16 NaNs are. Words that are stored are below 2^30.
EMPTY = tl.constexpr(-1)
WORD_MASK = tl.constexpr((1 << 30) - 1)
#: A tile of 16 rows and 8 bfloat16 values, as the kernels' smallest: words of two.
ROWS, WORDS = tl.constexpr(16), tl.constexpr(4)


@triton.jit
def publish_flag(flag_ptr, step):
    """Make what this program stored so far visible to every program that sees its flag."""
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, step, sem="release", scope="gpu")


@triton.jit
def see_flags(flag_ptrs, INTERPRETED: tl.constexpr):
    """The lowest of a vector of flags, each lane with an acquire of its own."""
    if INTERPRETED:
        flags = tl.atomic_add(flag_ptrs, 0, sem="acquire", scope="gpu")
    else:  # a vector's atomic_add would become as many read-modify-writes, and tl.atomic_poll is not in every version
        flags = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [flag_ptrs], dtype=tl.int32, is_pure=False, pack=1
        )
    return tl.min(flags)


@triton.jit
def wait_flags(flag_ptrs, step, polls, INTERPRETED: tl.constexpr):
    """Poll all flags with one vector load until none is below `step`; returns whether that came about."""
    seen = see_flags(flag_ptrs, INTERPRETED)
    while (seen < step) & (polls > 0):
        seen = see_flags(flag_ptrs, INTERPRETED)
        polls -= 1
    tl.debug_barrier()
    return seen >= step


@triton.jit
def wait_data(ptrs, mask, polls):
    """Poll the tiles themselves until no slot is empty; returns the lowest word, EMPTY if that did not come about."""
    lowest = tl.min(tl.load(ptrs, mask=mask, other=WORD_MASK, volatile=True))
    while (lowest < 0) & (polls > 0):
        lowest = tl.min(tl.load(ptrs, mask=mask, other=WORD_MASK, volatile=True))
        polls -= 1
    return lowest


@triton.jit(do_not_specialize=["steps", "polls"])
def exchange(
    tiles_ptr,  # [steps, ROWS, programs * WORDS] EMPTY; out: every program's tile at every step
    last_ptr,  # [ROWS, programs * WORDS] out: the tiles after the last step
    sync_ptr,  # zeros: a counter, or a flag for each program
    error_ptr,  # [1] zero; out: 1 where a wait ran out
    steps,
    polls,  # of one wait, at most
    PROTOCOL: tl.constexpr,
    MEMBERS: tl.constexpr,  # number of programs, rounded up to a power of two; unused by "counter"
    INTERPRETED: tl.constexpr,
):
    """At each step every program stores a tile, publishes it, waits for all, and makes its next tile from others'.

    Of the others it reads one tile, another program's at each step; with "data" it has read all of them by then. The
    tiles of a step are memory of their own, so that what stands there in the end is the whole exchange.
    """
    member = tl.program_id(0)
    programs = tl.num_programs(0)
    width = programs * WORDS
    offs = tl.arange(0, ROWS)[:, None] * width + tl.arange(0, WORDS)[None, :]
    own = offs + member * WORDS
    members = tl.arange(0, MEMBERS)
    # Lanes beyond the last program look at its flag again.
    flag_ptrs = sync_ptr + tl.minimum(members, programs - 1)
    columns = tl.arange(0, MEMBERS * WORDS)
    every = tl.arange(0, ROWS)[:, None] * width + columns[None, :]
    in_row = (columns < width)[None, :]
    tile = own % 1021
    other = member
    ok = True
    for step in tl.range(0, steps, num_stages=1):
        tl.store(tiles_ptr + own, tile)
        limit = tl.where(ok, polls, 0)
        other = tl.where(other + 1 < programs, other + 1, 0)
        if PROTOCOL == "data":
            seen = wait_data(tiles_ptr + every, in_row, limit)
            ok = (seen >= 0) & ok
        else:
            if PROTOCOL == "counter":
                publish(sync_ptr)
                ok = wait(sync_ptr, (step + 1) * programs, limit) & ok
            else:
                publish_flag(sync_ptr + member, step + 1)
                ok = wait_flags(flag_ptrs, step + 1, limit, INTERPRETED) & ok
            seen = tl.load(tiles_ptr + offs + other * WORDS)
        tile = (3 * tile + seen + 1) & WORD_MASK
        tiles_ptr += ROWS * width
    tl.store(last_ptr + own, tile)
    if PROTOCOL == "counter":
        give_up(sync_ptr, error_ptr, ok)
    else:
        tl.atomic_xchg(error_ptr, 1, mask=ok == 0, sem="relaxed", scope="sys")


@triton.jit(do_not_specialize=["repeats", "apart"])
def read_l2(
    x_ptr,  # [tiles, CHUNKS * LOADS * BLOCK] int32
    sum_ptr,  # [programs, BLOCK] out: of what was read
    repeats,
    apart,  # tiles from one program's to the next's: 1, or 0 where all read the same
    BLOCK: tl.constexpr,
    LOADS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Read a tile over and over, past L1: each time one of its chunks, in so many loads that are under way together."""
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x_ptr += (program * apart).to(tl.int64) * (CHUNKS * LOADS * BLOCK)
    acc = tl.zeros((BLOCK,), tl.int32)
    for repeat in tl.range(0, repeats, num_stages=1):
        chunk_ptr = x_ptr + repeat % CHUNKS * (LOADS * BLOCK)
        for load in tl.static_range(LOADS):
            acc += tl.load(chunk_ptr + load * BLOCK + offs, cache_modifier=".cg")
    tl.store(sum_ptr + program * BLOCK + offs, acc)


@triton.jit
def touch(
    count_ptr,  # [programs] int32: one more after each launch
    PDL: tl.constexpr,
):
    """The least a launch can do and still be seen to have come after the one before it."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    count_ptr += tl.program_id(0)
    tl.store(count_ptr, tl.load(count_ptr) + 1)


@triton.jit(do_not_specialize=["repeats"])
def multiply(
    rows_ptr,  # [ROWS, K]
    weights_ptr,  # [N, K]
    out_ptr,  # [programs, ROWS, N] ACC dtype, out: `repeats` times their product
    repeats,
    K: tl.constexpr,
    N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One K tile of the kernels' product, over and over, both operands on chip: a slice of K a warp, or plain."""
    DTYPE: tl.constexpr = rows_ptr.dtype.element_ty
    offs_b = tl.arange(0, ROWS)
    offs_n = tl.arange(0, N)
    weights = load_resident((weights_ptr + offs_n * K,), (offs_n < N,), 1, K, K, K, SPLIT_K)
    row_ptrs, _, _ = row_tile(rows_ptr, K, offs_b < ROWS, ROWS, K, SPLIT_K)
    rows = tl.load(row_ptrs)
    if SPLIT_K == 1:  # noqa: SIM108 (Triton)
        acc = tl.full((ROWS, N), 0, ACC)
    else:
        acc = tl.full((SPLIT_K, ROWS, N), 0, ACC)
    for _ in tl.range(0, repeats, num_stages=1):
        # As between two steps: no operand stays in registers from one product to the next.
        tl.debug_barrier()
        acc = dot(rows, weights[0], acc, DTYPE, PRECISION)
    if SPLIT_K > 1:
        acc = sum_slices(acc, ROWS, N, SPLIT_K)
    out_ptr += tl.program_id(0) * (ROWS * N)
    tl.store(out_ptr + offs_b[:, None] * N + offs_n[None, :], acc)
