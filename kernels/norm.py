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
def load_sums(sums_ptr, first, offs_b, mask_b, N_H: tl.constexpr, CHUNK: tl.constexpr):
    """What CHUNK programs of the group sent, from `first` on: two tiles [BLOCK_B, CHUNK], zero beyond the last."""
    members = first + tl.arange(0, CHUNK)
    at = (offs_b[:, None] * N_H + members[None, :]) * 2
    mask = mask_b[:, None] & (members < N_H)[None, :]
    return tl.load(sums_ptr + at, mask=mask, other=0.0), tl.load(sums_ptr + at + 1, mask=mask, other=0.0)


@triton.jit
def group_sums(sums_ptr, offs_b, mask_b, N_H: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr):
    """The sums of each row over all programs of the group, CHUNK of them at a time: large groups fit the registers."""
    first = tl.zeros((offs_b.shape[0], CHUNK), ACC)
    second = tl.zeros((offs_b.shape[0], CHUNK), ACC)
    for member in tl.range(0, N_H, CHUNK, num_stages=1):
        a, b = load_sums(sums_ptr, member, offs_b, mask_b, N_H, CHUNK)
        first += a
        second += b
    return tl.sum(first, 1), tl.sum(second, 1)


@triton.jit
def row_moments(
    totals, squares, sums_ptr, offs_b, mask_b, COLUMNS: tl.constexpr, OWN: tl.constexpr, GATES: tl.constexpr,
    N_H: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, EPSILON: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of each row of GATES * COLUMNS, from what own_moments found in every program.

    A program has OWN columns of each gate, the last ones fewer or none.
    """
    if LOCAL:
        mean = totals / (COLUMNS * GATES)
    else:
        total, squares = group_sums(sums_ptr, offs_b, mask_b, N_H, CHUNK, ACC)
        mean = total / (COLUMNS * GATES)
        between = tl.zeros((offs_b.shape[0], CHUNK), ACC)
        for member in tl.range(0, N_H, CHUNK, num_stages=1):
            columns = COLUMNS - (member + tl.arange(0, CHUNK)) * OWN
            count = (tl.minimum(tl.maximum(columns, 0), OWN) * GATES).to(ACC)
            of_member, _ = load_sums(sums_ptr, member, offs_b, mask_b, N_H, CHUNK)
            off = of_member * (1 / tl.maximum(count, 1))[None, :] - mean[:, None]
            between += off * off * count[None, :]
        squares += tl.sum(between, 1)
    return mean, 1 / tl.sqrt(squares / (COLUMNS * GATES) + EPSILON)


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
    N_H: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients by what was normalised, rows of COLUMNS, from what own_gradient_sums found in every program."""
    if not LOCAL:
        first, second = group_sums(sums_ptr, offs_b, mask_b, N_H, CHUNK, ACC)
    first, second = first / COLUMNS + poison, second / COLUMNS
    found = ()
    for tile in tl.static_range(len(dnormal)):
        off = dnormal[tile] - first[:, None] - normal[tile] * second[:, None]
        found = found + (off * scale[:, None],)
    return found
