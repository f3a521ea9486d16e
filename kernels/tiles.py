"""Tuples of tiles: what a program owns of a matrix, loaded, stored, masked, split by gate."""

from typing import NamedTuple

import triton
import triton.language as tl


class Owned(NamedTuple):
    """Where a program's tiles lie in a matrix: its rows, and of each tile the columns and what of it is there."""

    rows: tl.tensor  # [BLOCK_B]
    columns: tuple  # each [BLOCK_H]
    column_masks: tuple  # each [BLOCK_H]
    masks: tuple  # each [BLOCK_B, BLOCK_H]


@triton.jit
def own_tiles(rows, mask_b, first, COLUMNS: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr):
    """TILES tiles from tile `first` on, of a matrix with COLUMNS columns."""
    columns = ()
    column_masks = ()
    masks = ()
    for tile in tl.static_range(TILES):
        offs = (first + tile) * BLOCK_H + tl.arange(0, BLOCK_H)
        columns = columns + (offs,)
        column_masks = column_masks + (offs < COLUMNS,)
        masks = masks + (mask_b[:, None] & (offs < COLUMNS)[None, :],)
    return Owned(rows, columns, column_masks, masks)


class Program(NamedTuple):
    """What a program owns: BLOCK_B rows, with the other programs of its group; hidden units; columns of h.

    The columns are those of the units, or with a projection those of what it gives.
    """

    group: tl.tensor
    member: tl.tensor  # of the group
    first_b: tl.tensor  # its first row, in 64 bits
    mask_b: tl.tensor  # [BLOCK_B], which of its rows are there
    own: Owned  # of a matrix [BLOCK_B, H]
    own_h: Owned  # of a matrix [BLOCK_B, P]


@triton.jit
def this_program(first_group, B, PLAN: tl.constexpr):
    group = first_group + tl.program_id(0) // PLAN.N_H
    member = tl.program_id(0) % PLAN.N_H
    first_b = (group * PLAN.BLOCK_B).to(tl.int64)
    rows = tl.arange(0, PLAN.BLOCK_B)
    mask_b = first_b + rows < B
    own = own_tiles(rows, mask_b, member * PLAN.TILES, PLAN.H, PLAN.BLOCK_H, PLAN.TILES)
    own_h = own_tiles(rows, mask_b, member * PLAN.TILES_P, PLAN.P, PLAN.BLOCK_H, PLAN.TILES_P)
    return Program(group, member, first_b, mask_b, own, own_h)


@triton.jit
def one_of(own, TILE: tl.constexpr):
    return Owned(own.rows, (own.columns[TILE],), (own.column_masks[TILE],), (own.masks[TILE],))


@triton.jit
def load_tiles(ptr, own, COLUMNS: tl.constexpr, PLANES: tl.constexpr = 1, WIDTH: tl.constexpr = 1):
    """Of a matrix [B, WIDTH * COLUMNS] the first PLANES of each column's WIDTH numbers: tile by tile, PLANES each."""
    tiles = ()
    for tile in tl.static_range(len(own.columns)):
        at = own.rows[:, None] * (WIDTH * COLUMNS) + own.columns[tile][None, :]
        for plane in tl.static_range(PLANES):
            tiles = tiles + (tl.load(ptr + at + plane * COLUMNS, mask=own.masks[tile], other=0.0),)
    return tiles


@triton.jit
def store_tiles(ptr, own, tiles, COLUMNS: tl.constexpr, PLANES: tl.constexpr = 1, WIDTH: tl.constexpr = 1):
    """The inverse, in the dtype that ptr points to."""
    for tile in tl.static_range(len(own.columns)):
        at = own.rows[:, None] * (WIDTH * COLUMNS) + own.columns[tile][None, :]
        for plane in tl.static_range(PLANES):
            stored = tiles[tile * PLANES + plane].to(ptr.dtype.element_ty)
            tl.store(ptr + at + plane * COLUMNS, stored, mask=own.masks[tile])


@triton.jit
def load_vectors(ptr, own, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """[ROWS, COLUMNS], a number for each column: tile by tile, ROWS of [1, BLOCK_H] each."""
    vectors = ()
    for tile in tl.static_range(len(own.columns)):
        for row in tl.static_range(ROWS):
            loaded = tl.load(ptr + row * COLUMNS + own.columns[tile], mask=own.column_masks[tile], other=0.0)
            vectors = vectors + (loaded.to(ACC)[None, :],)
    return vectors


@triton.jit
def load_masks(ptr, first_b, B, own, MASKS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """[MASKS, B, COLUMNS]: mask by mask, all tiles of each."""
    tiles = ()
    for mask in tl.static_range(MASKS):
        tiles = tiles + as_type(load_tiles(ptr + (mask * B.to(tl.int64) + first_b) * COLUMNS, own, COLUMNS), ACC)
    return tiles


@triton.jit
def part_of(tiles, PART: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr = 0):
    """tiles[FIRST + PART * COUNT :][:COUNT]"""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tiles[FIRST + PART * COUNT + i],)
    return found


@triton.jit
def as_type(tiles, DTYPE: tl.constexpr):
    found = ()
    for tile in tl.static_range(len(tiles)):
        found = found + (tiles[tile].to(DTYPE),)
    return found


@triton.jit
def times(tiles, others):
    found = ()
    for tile in tl.static_range(len(tiles)):
        found = found + (tiles[tile] * others[tile],)
    return found


@triton.jit
def plus(tiles, others):
    found = ()
    for tile in tl.static_range(len(tiles)):
        found = found + (tiles[tile] + others[tile],)
    return found


@triton.jit
def hold(counts, new, old, MASKED: tl.constexpr):
    """`new` in the rows that count, `old` in the others."""
    if MASKED:
        return tl.where(counts, new, old)
    else:
        return new


@triton.jit
def zero_rows(tiles, kept, MASKED: tl.constexpr):
    """Zero in the rows that are not kept, whatever was there."""
    found = ()
    for tile in tl.static_range(len(tiles)):
        found = found + (hold(kept, tiles[tile], tl.zeros_like(tiles[tile]), MASKED),)
    return found


@triton.jit
def zero_columns(tiles, own, PLANES: tl.constexpr):
    """Zero in columns that are not there; PLANES tiles for each tile of `own`."""
    found = ()
    for tile in tl.static_range(len(tiles)):
        there = own.column_masks[tile // PLANES][None, :]
        found = found + (tl.where(there, tiles[tile], tl.zeros_like(tiles[tile])),)
    return found


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
