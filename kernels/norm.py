"""Layer normalisation of rows that lie spread over a group's programs (Ba et al. 2016).

A row's two sums need every program of its group. Each program sends those of its own columns, waits once, and adds up
all of them in the same order: so every program has the same statistics, and a run repeats bit for bit. A program of its
own columns' mean and squares about it loses no digits where the mean is large (Chan et al. 1983).
"""

import triton
import triton.language as tl

from .sync import publish
from .tiles import store_tiles, zero_columns


@triton.jit
def own_moments(tiles, me, GATES: tl.constexpr, PLAN: tl.constexpr):
    """The sum of each row over this program's columns, and the squares about their own mean.

    tiles: GATES for each of own's, zero in columns that are not there.
    """
    OWN: tl.constexpr = PLAN.TILES * PLAN.BLOCK_H
    columns = tl.minimum(tl.maximum(PLAN.H - me.member * OWN, 1), OWN) * GATES
    every = tiles[0]
    for tile in tl.static_range(1, len(tiles)):
        every += tiles[tile]
    total = tl.sum(every, 1)
    mean = total / columns.to(PLAN.ACC)
    every = tl.zeros_like(every)
    for tile in tl.static_range(len(tiles)):
        off = tiles[tile] - mean[:, None]
        off = tl.where(me.own.column_masks[tile // GATES][None, :], off, tl.zeros_like(off))
        every += off * off
    return total, tl.sum(every, 1)


@triton.jit
def send(
    first, second, sums_ptr, tiles, scratch_ptr, counter_ptr, me, PLANES: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Two numbers for each row to where the group looks for them: sums_ptr [rows, N_H, 2].

    And the tiles they are of to scratch_ptr, where the rest of the step is another launch's.
    """
    if not PLAN.LOCAL:
        at = (me.own.rows * PLAN.N_H + me.member) * 2
        tl.store(sums_ptr + at, first, mask=me.mask_b)
        tl.store(sums_ptr + at + 1, second, mask=me.mask_b)
        if PLAN.SYNC:
            publish(counter_ptr)
        else:
            store_tiles(scratch_ptr, me.own, tiles, PLAN.H, PLANES, PLAN.G + 2)


@triton.jit
def load_sums(sums_ptr, first, me, PLAN: tl.constexpr):
    """What CHUNK programs of the group sent, from `first` on: two tiles [BLOCK_B, CHUNK], zero beyond the last."""
    members = first + tl.arange(0, PLAN.CHUNK)
    at = (me.own.rows[:, None] * PLAN.N_H + members[None, :]) * 2
    mask = me.mask_b[:, None] & (members < PLAN.N_H)[None, :]
    return tl.load(sums_ptr + at, mask=mask, other=0.0), tl.load(sums_ptr + at + 1, mask=mask, other=0.0)


@triton.jit
def group_sums(sums_ptr, me, PLAN: tl.constexpr):
    """The sums of each row over all programs of the group, CHUNK of them at a time: large groups fit the registers."""
    first = tl.full((PLAN.BLOCK_B, PLAN.CHUNK), 0, PLAN.ACC)
    second = tl.full((PLAN.BLOCK_B, PLAN.CHUNK), 0, PLAN.ACC)
    for member in tl.range(0, PLAN.N_H, PLAN.CHUNK, num_stages=1):
        a, b = load_sums(sums_ptr, member, me, PLAN)
        first += a
        second += b
    return tl.sum(first, 1), tl.sum(second, 1)


@triton.jit
def row_moments(
    total, squares, sums_ptr, me, GATES: tl.constexpr, EPSILON: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Mean and 1 / standard deviation of each row of GATES * H, from what own_moments found in every program."""
    OWN: tl.constexpr = PLAN.TILES * PLAN.BLOCK_H  # columns of each gate, of the last programs fewer or none
    COUNT: tl.constexpr = PLAN.H * GATES
    if PLAN.LOCAL:
        mean = total / COUNT
    else:
        total, squares = group_sums(sums_ptr, me, PLAN)
        mean = total / COUNT
        between = tl.full((PLAN.BLOCK_B, PLAN.CHUNK), 0, PLAN.ACC)
        for member in tl.range(0, PLAN.N_H, PLAN.CHUNK, num_stages=1):
            columns = PLAN.H - (member + tl.arange(0, PLAN.CHUNK)) * OWN
            count = (tl.minimum(tl.maximum(columns, 0), OWN) * GATES).to(PLAN.ACC)
            of_member, _ = load_sums(sums_ptr, member, me, PLAN)
            off = of_member * (1 / tl.maximum(count, 1))[None, :] - mean[:, None]
            between += off * off * count[None, :]
        squares += tl.sum(between, 1)
    return mean, 1 / tl.sqrt(squares / COUNT + EPSILON)


@triton.jit
def store_moments(stats_ptr, mean, scale, me):
    """To stats_ptr [rows, 4], by the first program of the group."""
    mask = me.mask_b & (me.own.rows * 0 + me.member == 0)
    tl.store(stats_ptr + me.own.rows * 4, mean, mask=mask)
    tl.store(stats_ptr + me.own.rows * 4 + 1, scale, mask=mask)


@triton.jit
def normalise(tiles, mean, scale, own, GATES: tl.constexpr):
    """tiles, GATES for each of own's, less their row's mean, times its scale; zero in columns that are not there."""
    normal = ()
    for tile in tl.static_range(len(tiles)):
        normal += ((tiles[tile] - mean[:, None]) * scale[:, None],)
    return zero_columns(normal, own, GATES)


@triton.jit
def own_gradient_sums(dnormal, normal):
    """Of each row over this program's columns: the sum of dnormal, and of dnormal times the normalised values."""
    first = dnormal[0]
    second = dnormal[0] * normal[0]
    for tile in tl.static_range(1, len(dnormal)):
        first += dnormal[tile]
        second += dnormal[tile] * normal[tile]
    return tl.sum(first, 1), tl.sum(second, 1)


@triton.jit
def row_gradients(
    dnormal, normal, scale, first, second, sums_ptr, me, poison, COUNT: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """The gradients by what was normalised, rows of COUNT, from what own_gradient_sums found in every program."""
    if not PLAN.LOCAL:
        first, second = group_sums(sums_ptr, me, PLAN)
    first, second = first / COUNT + poison, second / COUNT
    found = ()
    for tile in tl.static_range(len(dnormal)):
        off = dnormal[tile] - first[:, None] - normal[tile] * second[:, None]
        found += (off * scale[:, None],)
    return found
