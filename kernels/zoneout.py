"""Zoneout: a unit keeps what it was, at random, or in expectation (Krueger et al. 2017).

What is kept follows from the seed, the unit, the row and the time step alone, by the counter-based generator Philox
4x32-10 (Salmon et al. 2011): nothing is stored, and backward draws the same again.
"""

import triton
import triton.language as tl


@triton.jit
def draw(seed, t, rows, units):
    """24 random bits for each element of [BLOCK_B, BLOCK_H], twice: for h and for c."""
    zero = tl.zeros((rows.shape[0], units.shape[0]), tl.uint32)
    unit, row = units[None, :].to(tl.uint32) + zero, rows[:, None].to(tl.uint32) + zero
    first, second, _, _ = tl.philox(seed, unit, row, zero + t.to(tl.uint32), zero)
    return (first >> 8).to(tl.int32), (second >> 8).to(tl.int32)


@triton.jit
def draw_tiles(seed, t, first_b, own, RANDOM: tl.constexpr):
    """The same for each tile that a program owns, all those for h and all those for c."""
    for_h, for_c = (), ()
    for tile in tl.static_range(len(own.columns)):
        if RANDOM:
            of_h, of_c = draw(seed, t, first_b + own.rows, own.columns[tile])
            for_h, for_c = for_h + (of_h,), for_c + (of_c,)
        else:
            for_h, for_c = for_h + (0,), for_c + (0,)
    return for_h, for_c


@triton.jit
def zone(new, old, bits, ZONE: tl.constexpr, RANDOM: tl.constexpr):
    """`old` with probability ZONE[0] (ZONE[1] of 2^24), else `new`; or the mean of that."""
    if ZONE[0] == 0.0:
        return new
    elif RANDOM:
        return tl.where(bits < ZONE[1], old, new)
    else:
        return new * (1 - ZONE[0]) + old * ZONE[0]


@triton.jit
def zone_gradient(dy, bits, ZONE: tl.constexpr, RANDOM: tl.constexpr):
    """By `new` and by `old`."""
    if ZONE[0] == 0.0:
        return dy, tl.zeros_like(dy)
    elif RANDOM:
        held = bits < ZONE[1]
        return tl.where(held, tl.zeros_like(dy), dy), tl.where(held, dy, tl.zeros_like(dy))
    else:
        return dy * (1 - ZONE[0]), dy * ZONE[0]
