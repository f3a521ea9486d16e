"""Tuples of tiles: what a program owns of a matrix, loaded, stored, split by gate."""

import triton
import triton.language as tl


@triton.jit
def split_gates(tile, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, LANES: tl.constexpr):
    """[BLOCK_B, BLOCK_H * LANES] -> LANES tiles [BLOCK_B, BLOCK_H]."""
    if LANES == 1:
        return (tile,)
    elif LANES == 2:
        gate0, gate1 = tl.split(tl.reshape(tile, (BLOCK_B, BLOCK_H, 2)))
        return gate0, gate1
    else:
        even, odd = tl.split(tl.reshape(tile, (BLOCK_B, BLOCK_H, 2, 2)))
        gate0, gate2 = tl.split(even)
        gate1, gate3 = tl.split(odd)
        return gate0, gate1, gate2, gate3


@triton.jit
def own_tiles(
    offs_b, mask_b, first, COLUMNS: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Of this program's tiles in a matrix with COLUMNS columns: columns, their masks, offsets and masks."""
    columns = ()
    masks_n = ()
    offsets = ()
    masks = ()
    for tile in tl.static_range(TILES):
        offs = (first + tile) * BLOCK_H + tl.arange(0, BLOCK_H)
        columns = columns + (offs,)
        masks_n = masks_n + (offs < COLUMNS,)
        offsets = offsets + (offs_b[:, None] * COLUMNS + offs[None, :],)
        masks = masks + (mask_b[:, None] & (offs < COLUMNS)[None, :],)
    return columns, masks_n, offsets, masks


@triton.jit
def load_tiles(ptr, offsets, masks):
    tiles = ()
    for tile in tl.static_range(len(offsets)):
        tiles = tiles + (tl.load(ptr + offsets[tile], mask=masks[tile], other=0.0),)
    return tiles


@triton.jit
def store_tiles(ptr, offsets, masks, tiles):
    for tile in tl.static_range(len(offsets)):
        tl.store(ptr + offsets[tile], tiles[tile], mask=masks[tile])


@triton.jit
def load_planes(ptr, units, offs_b, masks, PLANES: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr):
    """Of a matrix [B, WIDTH * H] the first PLANES of each unit's WIDTH numbers: tile by tile, PLANES tiles each."""
    tiles = ()
    for tile in tl.static_range(len(units)):
        at = offs_b[:, None] * (WIDTH * H) + units[tile][None, :]
        for plane in tl.static_range(PLANES):
            tiles = tiles + (tl.load(ptr + at + plane * H, mask=masks[tile], other=0.0),)
    return tiles


@triton.jit
def store_planes(
    ptr, units, offs_b, masks, tiles, FIRST: tl.constexpr, PLANES: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The inverse, from plane FIRST on."""
    for tile in tl.static_range(len(units)):
        at = offs_b[:, None] * (WIDTH * H) + units[tile][None, :]
        for plane in tl.static_range(PLANES):
            stored = tiles[tile * PLANES + plane].to(DTYPE)
            tl.store(ptr + at + (FIRST + plane) * H, stored, mask=masks[tile])


@triton.jit
def load_params(ptr, units, masks_n, PARAMS: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr):
    """params [PARAMS, H]: tile by tile, PARAMS rows [1, BLOCK_H] each."""
    rows = ()
    for tile in tl.static_range(len(units)):
        for row in tl.static_range(PARAMS):
            loaded = tl.load(ptr + row * H + units[tile], mask=masks_n[tile], other=0.0)
            rows = rows + (loaded.to(ACC)[None, :],)
    return rows


@triton.jit
def load_masks(mask_ptr, first_b, B, h_own, h_masks, MASKS: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr):
    """mask [MASKS, B, P]: mask by mask, one tile for each of this program's tiles of h."""
    tiles = ()
    for mask in tl.static_range(MASKS):
        base_ptr = mask_ptr + (mask * B.to(tl.int64) + first_b) * P
        for tile in tl.static_range(len(h_own)):
            tiles = tiles + (tl.load(base_ptr + h_own[tile], mask=h_masks[tile], other=0.0).to(ACC),)
    return tiles


@triton.jit
def part_of(tiles, PART: tl.constexpr, COUNT: tl.constexpr):
    """tiles[PART * COUNT :][:COUNT]"""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tiles[PART * COUNT + i],)
    return found


@triton.jit
def zero_rows(tiles, keep):
    """Zero in the rows that are not kept, whatever was there."""
    kept = ()
    for tile in tl.static_range(len(tiles)):
        kept = kept + (tl.where(keep[:, None], tiles[tile], tl.zeros_like(tiles[tile])),)
    return kept


@triton.jit
def as_type(tiles, DTYPE: tl.constexpr):
    found = ()
    for tile in tl.static_range(len(tiles)):
        found = found + (tiles[tile].to(DTYPE),)
    return found
