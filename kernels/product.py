"""The gate product of one time step: rows of h (or of gate gradients) times this program's columns of W_hh.

K is walked in tiles of BLOCK_K; with SPLIT_K > 1 a tile is [SPLIT_K, ., BLOCK_K / SPLIT_K], a slice of K for each warp.
Operands are cast to DOT, multiplied as PRECISION says (fp32: tf32 or ieee) and summed in ACC.
"""

import triton
import triton.language as tl


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
def product_from_memory(
    rows_ptr, row_stride, mask_b, column_ptrs, masks_n, stride_k, resident, poison, TILE: tl.constexpr,
    PART: tl.constexpr,
    K: tl.constexpr, BLOCK_B: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    RESIDENT: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows [BLOCK_B, K] times tile TILE of the weights [K, N], where the rows are the whole group's, read from memory.

    The weights' rows are those of segment PART, of K each.
    With SPLIT_K each warp takes a slice of K, since a plain product of 16 rows would be done again by every warp.
    """
    MASK_K: tl.constexpr = K % BLOCK_K != 0
    TILES: tl.constexpr = len(column_ptrs)
    K_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if SPLIT_K == 1:
        acc = tl.full((BLOCK_B, N), 0, ACC) + poison
    else:
        acc = tl.full((SPLIT_K, BLOCK_B, N), 0, ACC) + poison
    row_ptrs, row_k, row_mask = row_tile(rows_ptr, row_stride, mask_b, BLOCK_B, BLOCK_K, SPLIT_K)
    if RESIDENT:
        # AHEAD tiles are under way at any time: a barrier stands between two products, and no load passes it.
        rows = ()
        for k in tl.static_range(0, min(K, AHEAD * BLOCK_K), BLOCK_K):
            rows = rows + (load_tile(row_ptrs + k, row_mask, row_k, K - k, MASK_K),)
        for k in tl.static_range(0, K, BLOCK_K):
            if k + AHEAD * BLOCK_K < K:
                ptrs = row_ptrs + (k + AHEAD * BLOCK_K)
                rows = rows + (load_tile(ptrs, row_mask, row_k, K - k - AHEAD * BLOCK_K, MASK_K),)
            acc = dot(rows[k // BLOCK_K], resident[(PART * K_TILES + k // BLOCK_K) * TILES + TILE], acc, DOT, PRECISION)
    else:
        ptrs, offs_k, mask = weight_tile(column_ptrs[TILE], masks_n[TILE], stride_k, BLOCK_K, SPLIT_K)
        if PART > 0:
            ptrs += PART * K * stride_k
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            rows = load_tile(row_ptrs, row_mask, row_k, K - k, MASK_K)
            weights = load_tile(ptrs, mask, offs_k, K - k, MASK_K)
            acc = dot(rows, weights, acc, DOT, PRECISION)
            row_ptrs += BLOCK_K
            ptrs += BLOCK_K * stride_k
    if SPLIT_K > 1:
        acc = sum_slices(acc, BLOCK_B, N, SPLIT_K)
    return acc


@triton.jit
def product_from_registers(
    rows, column_ptrs, masks_n, stride_k, resident, TILE: tl.constexpr, PART: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_B: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    RESIDENT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same where the rows are this program's own: a tuple of tiles [BLOCK_B, BLOCK_K], from segment PART on."""
    TILES: tl.constexpr = len(column_ptrs)
    K_TILES: tl.constexpr = (SEGMENT + BLOCK_K - 1) // BLOCK_K  # of a segment
    if SPLIT_K == 1:
        acc = tl.full((BLOCK_B, N), 0, ACC)
    else:
        acc = tl.full((SPLIT_K, BLOCK_B, N), 0, ACC)
    for k in tl.static_range(len(rows)):
        if RESIDENT:
            weights = resident[(PART * K_TILES + k) * TILES + TILE]
        else:
            ptrs, offs_k, mask = weight_tile(column_ptrs[TILE], masks_n[TILE], stride_k, BLOCK_K, SPLIT_K)
            ptrs += ((PART + k // K_TILES) * SEGMENT + k % K_TILES * BLOCK_K) * stride_k
            weights = load_tile(ptrs, mask, offs_k, SEGMENT - k % K_TILES * BLOCK_K, SEGMENT % BLOCK_K != 0)
        if SPLIT_K == 1:
            acc = dot(rows[k], weights, acc, DOT, PRECISION)
        else:
            slices = tl.permute(tl.reshape(rows[k], (BLOCK_B, SPLIT_K, BLOCK_K // SPLIT_K)), (1, 0, 2))
            acc = dot(slices, weights, acc, DOT, PRECISION)
    if SPLIT_K > 1:
        acc = sum_slices(acc, BLOCK_B, N, SPLIT_K)
    return acc


@triton.jit
def product(
    rows, rows_ptr, row_stride, mask_b, column_ptrs, masks_n, stride_k, resident, poison, TILE: tl.constexpr,
    PART: tl.constexpr,
    LOCAL: tl.constexpr, SEGMENT: tl.constexpr, K: tl.constexpr, BLOCK_B: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile TILE of rows times the weights from segment PART on: LOCAL from the program's own rows, else the group's."""
    if LOCAL:
        return product_from_registers(
            rows, column_ptrs, masks_n, stride_k, resident, TILE, PART,
            SEGMENT, BLOCK_B, N, BLOCK_K, SPLIT_K, RESIDENT, DOT, ACC, PRECISION,
        )  # fmt: skip
    else:
        return product_from_memory(
            rows_ptr, row_stride, mask_b, column_ptrs, masks_n, stride_k, resident, poison, TILE,
            PART, K, BLOCK_B, N, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
        )  # fmt: skip
