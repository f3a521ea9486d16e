"""The gate product of one time step: rows of h (or of gate gradients) times this program's columns of W_hh.

K is walked in tiles of BLOCK_K; with SPLIT_K > 1 a tile is [SPLIT_K, ., BLOCK_K / SPLIT_K], a slice of K for each warp:
a plain product of 16 rows would be done again by every warp. Operands are cast to PLAN.DOT, multiplied as
PLAN.PRECISION says (fp32: tf32 or ieee) and summed in PLAN.ACC.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Weights(NamedTuple):
    """A program's tiles of a matrix [K, .]: pointers to the columns of each, their masks, and what stays on chip."""

    column_ptrs: tuple  # each [N]
    masks: tuple  # each [N]
    resident: tuple


@triton.jit
def row_tile(ptr, stride, mask_b, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """Pointers, K indices and row mask of the first K tile of this group's rows.

    [BLOCK_B, BLOCK_K], or [SPLIT_K, BLOCK_B, BLOCK_K / SPLIT_K]. A later tile is the same pointers plus k, an immediate
    offset: pointers made anew for each tile would fill the registers.
    """
    offs_b = tl.arange(0, BLOCK_B)
    if SPLIT_K == 1:
        offs_k = tl.arange(0, BLOCK_K)[None, :]
        return ptr + offs_b[:, None] * stride + offs_k, offs_k, mask_b[:, None]
    else:
        SLICE: tl.constexpr = BLOCK_K // SPLIT_K
        offs_k = tl.arange(0, SPLIT_K)[:, None, None] * SLICE + tl.arange(0, SLICE)[None, None, :]
        return ptr + offs_b[None, :, None] * stride + offs_k, offs_k, mask_b[None, :, None]


@triton.jit
def weight_tile(column_ptr, mask_n, stride_k, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """The same of the weights whose columns start at column_ptr: [BLOCK_K, N], or [SPLIT_K, BLOCK_K / SPLIT_K, N]."""
    if SPLIT_K == 1:
        offs_k = tl.arange(0, BLOCK_K)[:, None]
        return column_ptr[None, :] + offs_k * stride_k, offs_k, mask_n[None, :]
    else:
        SLICE: tl.constexpr = BLOCK_K // SPLIT_K
        offs_k = tl.arange(0, SPLIT_K)[:, None, None] * SLICE + tl.arange(0, SLICE)[None, :, None]
        return column_ptr[None, None, :] + offs_k * stride_k, offs_k, mask_n[None, None, :]


@triton.jit
def load_tile(ptrs, mask, offs_k, k_left, MASK_K: tl.constexpr):
    """One K tile, zero outside: k_left is how much of K is left from this tile on."""
    if MASK_K:
        mask = mask & (offs_k < k_left)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def dot(rows, weights, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(rows.to(DOT), weights.to(DOT), acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_resident(
    column_ptrs, masks_n, stride_k, K: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr
):
    """All the weights a program needs, K tile by K tile: what stays on chip for the whole sequence.

    A segment is a run of K that tiles do not cross: all of K, or one gate's rows in the local backward.
    """
    weights = ()
    for segment in tl.static_range(0, K, SEGMENT):
        for k in tl.static_range(0, SEGMENT, BLOCK_K):
            for tile in tl.static_range(len(column_ptrs)):
                ptrs, offs_k, mask = weight_tile(column_ptrs[tile], masks_n[tile], stride_k, BLOCK_K, SPLIT_K)
                ptrs += (segment + k) * stride_k
                weights = weights + (load_tile(ptrs, mask, offs_k, SEGMENT - k, SEGMENT % BLOCK_K != 0),)
    return weights


@triton.jit
def own_weights(
    column_ptrs, masks, K: tl.constexpr, STRIDE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_K: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """The weights whose columns begin there, K of them STRIDE apart; loaded where they stay on chip."""
    resident = ()
    if PLAN.RESIDENT:
        resident = load_resident(column_ptrs, masks, STRIDE, K, SEGMENT, BLOCK_K, PLAN.SPLIT_K)
    return Weights(column_ptrs, masks, resident)


@triton.jit
def sum_slices(acc, BLOCK_B: tl.constexpr, N: tl.constexpr, SPLIT_K: tl.constexpr):
    """[SPLIT_K, BLOCK_B, N] -> [BLOCK_B, N], by one exchange between the warps.

    tl.sum would shuffle besides, and leave the result in the matrix unit's layout, so that every tile of the cell takes
    an exchange of its own after its load and before its store: three times the barriers in backward.
    """
    acc = tl.permute(acc, (1, 2, 0))
    if SPLIT_K == 8:
        a, b = tl.split(tl.reshape(acc, (BLOCK_B, N, 4, 2)))
        acc = a + b
    if SPLIT_K >= 4:
        a, b = tl.split(tl.reshape(acc, (BLOCK_B, N, 2, 2)))
        acc = a + b
    a, b = tl.split(acc)
    return a + b


@triton.jit
def product(
    rows, rows_ptr, row_stride, mask_b, weights, poison, TILE: tl.constexpr, PART: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_K: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """rows [BLOCK_B, K] times tile TILE of the weights [., N], from their segment PART on.

    LOCAL: the rows are this program's own, a tuple of tiles. Else the whole group's, read from memory.
    """
    SPLIT_K: tl.constexpr = PLAN.SPLIT_K
    PRECISION: tl.constexpr = PLAN.PRECISION
    IN_SEGMENT: tl.constexpr = (SEGMENT + BLOCK_K - 1) // BLOCK_K  # K tiles
    K_TILES: tl.constexpr = len(rows) if PLAN.LOCAL else (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = len(weights.column_ptrs)
    MASK_K: tl.constexpr = SEGMENT % BLOCK_K != 0
    if SPLIT_K == 1:
        acc = tl.full((PLAN.BLOCK_B, N), 0, PLAN.ACC) + poison
    else:
        acc = tl.full((SPLIT_K, PLAN.BLOCK_B, N), 0, PLAN.ACC) + poison
    if not PLAN.LOCAL:
        row_ptrs, row_k, row_mask = row_tile(rows_ptr, row_stride, mask_b, PLAN.BLOCK_B, BLOCK_K, SPLIT_K)
    if not PLAN.RESIDENT:
        ptrs, offs_k, mask = weight_tile(weights.column_ptrs[TILE], weights.masks[TILE], STRIDE, BLOCK_K, SPLIT_K)
        ptrs += PART * SEGMENT * STRIDE
    if PLAN.LOCAL or PLAN.RESIDENT:
        # AHEAD tiles are under way at any time: a barrier stands between two products, and no load passes it.
        if not PLAN.LOCAL:
            rows = ()
            for k in tl.static_range(min(K_TILES, PLAN.AHEAD)):
                rows = rows + (load_tile(row_ptrs + k * BLOCK_K, row_mask, row_k, K - k * BLOCK_K, MASK_K),)
        for k in tl.static_range(K_TILES):
            if not PLAN.LOCAL and k + PLAN.AHEAD < K_TILES:
                next_k = (k + PLAN.AHEAD) * BLOCK_K
                rows = rows + (load_tile(row_ptrs + next_k, row_mask, row_k, K - next_k, MASK_K),)
            if PLAN.RESIDENT:
                columns = weights.resident[(PART * IN_SEGMENT + k) * TILES + TILE]
            else:
                in_segment = k % IN_SEGMENT * BLOCK_K
                at = k // IN_SEGMENT * SEGMENT + in_segment
                columns = load_tile(ptrs + at * STRIDE, mask, offs_k, SEGMENT - in_segment, MASK_K)
            row = rows[k]
            if PLAN.LOCAL and SPLIT_K > 1:
                row = tl.permute(tl.reshape(row, (PLAN.BLOCK_B, SPLIT_K, BLOCK_K // SPLIT_K)), (1, 0, 2))
            acc = dot(row, columns, acc, PLAN.DOT, PRECISION)
    else:
        for k in tl.range(0, K, BLOCK_K, num_stages=PLAN.STAGES):
            row = load_tile(row_ptrs, row_mask, row_k, K - k, MASK_K)
            acc = dot(row, load_tile(ptrs, mask, offs_k, K - k, MASK_K), acc, PLAN.DOT, PRECISION)
            row_ptrs += BLOCK_K
            ptrs += BLOCK_K * STRIDE
    if SPLIT_K > 1:
        acc = sum_slices(acc, PLAN.BLOCK_B, N, SPLIT_K)
    return acc
