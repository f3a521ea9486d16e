"""Layer normalisation of rows that lie spread over a group's programs (Ba et al. 2016).

A row's two sums need every program of its group. Each program sends those of its own columns, waits once, and adds up
all of them in the same order: so every program has the same statistics, and a run repeats bit for bit. A program of its
own columns' mean and squares about it loses no digits where the mean is large (Chan et al. 1983).
"""

import triton
import triton.language as tl


@triton.jit
def own_moments(tiles, own_columns, masks_n, GATES: tl.constexpr, ACC: tl.constexpr):
    """The sum of each row over this program's columns, and the squares about their own mean.

    tiles: GATES for each of masks_n, zero in columns that are not there.
    """
    every = tiles[0]
    for tile in tl.static_range(1, len(tiles)):
        every += tiles[tile]
    total = tl.sum(every, 1)
    mean = total / tl.maximum(own_columns, 1).to(ACC)
    every = tl.zeros_like(every)
    for tile in tl.static_range(len(tiles)):
        off = tiles[tile] - mean[:, None]
        off = tl.where(masks_n[tile // GATES][None, :], off, tl.zeros_like(off))
        every += off * off
    squares = tl.sum(every, 1)
    return total, squares


@triton.jit
def send_sums(sums_ptr, first, second, offs_b, mask_b, member, N_H: tl.constexpr):
    """Two numbers for each row to where the group looks for them: sums_ptr [rows, N_H, 2]."""
    at = (offs_b * N_H + member) * 2
    tl.store(sums_ptr + at, first, mask=mask_b)
    tl.store(sums_ptr + at + 1, second, mask=mask_b)


@triton.jit
def group_sums(sums_ptr, offs_b, mask_b, N_H: tl.constexpr, POW2: tl.constexpr):
    """What every program of the group sent: two tiles [BLOCK_B, N_H], padded with zeros to a power of two."""
    members = tl.arange(0, POW2)
    at = (offs_b[:, None] * N_H + members[None, :]) * 2
    mask = mask_b[:, None] & (members < N_H)[None, :]
    return tl.load(sums_ptr + at, mask=mask, other=0.0), tl.load(sums_ptr + at + 1, mask=mask, other=0.0)


@triton.jit
def row_moments(
    totals, squares, sums_ptr, offs_b, mask_b, COLUMNS: tl.constexpr, OWN: tl.constexpr, GATES: tl.constexpr,
    N_H: tl.constexpr, MEMBERS: tl.constexpr, LOCAL: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of each row of GATES * COLUMNS, from what own_moments found in every program.

    A program has OWN columns of each gate, the last ones fewer or none.
    """
    if LOCAL:
        totals, squares = totals[:, None], squares[:, None]
    else:
        totals, squares = group_sums(sums_ptr, offs_b, mask_b, N_H, MEMBERS)
    members = tl.arange(0, 1 if LOCAL else MEMBERS)
    counts = (tl.minimum(tl.maximum(COLUMNS - members * OWN, 0), OWN) * GATES).to(totals.dtype)[None, :]
    mean = tl.sum(totals, 1) / (COLUMNS * GATES)
    off = totals / tl.maximum(counts, 1) - mean[:, None]
    variance = (tl.sum(squares, 1) + tl.sum(off * off * counts, 1)) / (COLUMNS * GATES)
    return mean, 1 / tl.sqrt(variance + EPSILON)


@triton.jit
def normalise(tiles, mean, scale, masks_n, GATES: tl.constexpr):
    """tiles, GATES for each of masks_n, less their row's mean, times its scale; zero in columns that are not there."""
    found = ()
    for tile in tl.static_range(len(tiles)):
        normal = (tiles[tile] - mean[:, None]) * scale[:, None]
        found = found + (tl.where(masks_n[tile // GATES][None, :], normal, tl.zeros_like(normal)),)
    return found


@triton.jit
def own_gradient_sums(dnormal, normal):
    """Of each row over this program's columns: the sum of dnormal, and of dnormal times the normalised values."""
    first = dnormal[0]
    second = dnormal[0] * normal[0]
    for tile in tl.static_range(1, len(dnormal)):
        first += dnormal[tile]
        second += dnormal[tile] * normal[tile]
    first, second = tl.sum(first, 1), tl.sum(second, 1)
    return first, second


@triton.jit
def row_gradients(
    dnormal, normal, scale, first, second, sums_ptr, offs_b, mask_b, poison, COLUMNS: tl.constexpr,
    N_H: tl.constexpr, MEMBERS: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """The gradients by what was normalised, rows of COLUMNS, from what own_gradient_sums found in every program."""
    if not LOCAL:
        firsts, seconds = group_sums(sums_ptr, offs_b, mask_b, N_H, MEMBERS)
        first, second = tl.sum(firsts, 1), tl.sum(seconds, 1)
    first, second = first / COLUMNS + poison, second / COLUMNS
    found = ()
    for tile in tl.static_range(len(dnormal)):
        off = dnormal[tile] - first[:, None] - normal[tile] * second[:, None]
        found = found + (off * scale[:, None],)
    return found
