"""The two sequence kernels: gate product plus cell, over time. Every cell and every schedule is made from this text.

Programs form groups of N_H; a group owns BLOCK_B rows of the batch, a program TILES * BLOCK_H hidden units of every
gate. Forward, at each step: h_gates = h[t-1] W_hh^T, cell, store h[t]. Backward mirrors it: dh = da[t+1] W_hh, cell,
store da[t].
Constexpr flags make the schedules:

    LOCAL     N_H = 1: one program owns all hidden units and multiplies from its registers; no waiting at all
    SYNC      the group's programs wait for each other's tiles at every step
    RESIDENT  W_hh is loaded once, before the time loop, and stays on chip

    local: LOCAL. resident: SYNC and RESIDENT. streamed: SYNC. step: none of them, launched once a step with T = 1.

PROJECTED makes two products of a step's one: the cell gives r[t] [B, H], and h[t] = r[t] W_hr^T has P columns, of which
a program owns TILES_P tiles (some programs own none). Where programs wait, they wait twice a step. FIRST and SECOND say
which of the two a launch does; both, except in the step engine.
MASKED reads a byte a row and step: bit 1, the step counts, else h and state are held and no gradient arises; bit 2,
h and state are zeroed before it.

Inside a tile of the product the gates are interleaved, unit-major with the gate fastest, LANES (G rounded up to a power
of two) columns a unit: one product serves all gates, and splitting it into a tile a gate crosses no warp. In memory
nothing is interleaved.
"""

import triton
import triton.language as tl

from .product import load_resident, product
from .sync import COUNTER_STRIDE, give_up, publish, wait


@triton.jit
def split_gates(tile, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, LANES: tl.constexpr):
    """[BLOCK_B, BLOCK_H * LANES] -> LANES tiles [BLOCK_B, BLOCK_H]."""
    if LANES == 1:
        return (tile,)
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
def zero_rows(tiles, keep):
    """Zero in the rows that are not kept, whatever was there."""
    kept = ()
    for tile in tl.static_range(len(tiles)):
        kept = kept + (tl.where(keep[:, None], tiles[tile], tl.zeros_like(tiles[tile])),)
    return kept


@triton.jit(do_not_specialize=["T", "B", "start", "chained", "first_group"])
def sequence_forward(
    gates_ptr,  # [T, B, G*H] in: W_ih x + b_ih; out, with SAVE_GATES: the activated gates
    w_hh_ptr,  # [G*H, P]
    b_hh_ptr,  # [G*H], with HAS_BIAS
    w_hr_ptr,  # [P, H], with PROJECTED
    steps_ptr,  # [T, B] bytes, with MASKED
    h0_ptr,  # [B, P]
    h_ptr,  # [T, B, P] out: h[t]
    state_ptr,  # [B, H], ACC dtype, in: the state before the first step; out: after the last
    extra_ptr,  # [T, B, H] out, with SAVE_EXTRA
    r_ptr,  # [T, B, H] out, with PROJECTED: what is projected
    counter_ptr,  # [groups * COUNTER_STRIDE] zeros, with SYNC
    error_ptr,  # [1], with SYNC
    T,  # steps of this launch
    B,
    start,  # where the first of them lies in memory
    chained,  # 1 where a launch before this one has done the steps before it
    first_group,  # of this launch: where the groups cannot all wait at once, they come in several
    CELL: tl.constexpr, G: tl.constexpr, LANES: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr, TILES_P: tl.constexpr, N_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_K_R: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    LOCAL: tl.constexpr, SYNC: tl.constexpr, RESIDENT: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PROJECTED: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
    SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = BLOCK_H * LANES
    STORAGE: tl.constexpr = h_ptr.dtype.element_ty
    group = first_group + tl.program_id(0) // N_H
    member = tl.program_id(0) % N_H
    first_b = (group * BLOCK_B).to(tl.int64)
    stride_t = B.to(tl.int64)
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = first_b + offs_b < B
    if SYNC:
        counter_ptr += group * COUNTER_STRIDE

    # Where this program's hidden units lie, and its columns of h: the same, or those of the projection.
    _, _, hidden, masks = own_tiles(offs_b, mask_b, member * TILES, H, BLOCK_H, TILES)
    offs_p, masks_p, h_own, h_masks = own_tiles(offs_b, mask_b, member * TILES_P, P, BLOCK_H, TILES_P)
    column_ptrs = ()
    masks_n = ()
    bias = ()
    state = ()
    resident = ()
    if FIRST:
        for tile in tl.static_range(TILES):
            offs_n = tl.arange(0, N)
            unit = (member * TILES + tile) * BLOCK_H + offs_n // LANES
            mask_n = (offs_n % LANES < G) & (unit < H)
            row = offs_n % LANES * H + unit
            column_ptrs = column_ptrs + (w_hh_ptr + row.to(tl.int64) * P,)
            masks_n = masks_n + (mask_n,)
            if HAS_BIAS:
                bias = bias + (tl.load(b_hh_ptr + row, mask=mask_n, other=0.0).to(ACC),)
        state = load_tiles(state_ptr + first_b * H, hidden, masks)
        if RESIDENT:
            resident = load_resident(column_ptrs, masks_n, 1, P, P, BLOCK_K, SPLIT_K)
    projection_ptrs = ()
    resident_r = ()
    if SECOND and PROJECTED:
        for tile in tl.static_range(TILES_P):
            projection_ptrs = projection_ptrs + (w_hr_ptr + offs_p[tile].to(tl.int64) * H,)
        if RESIDENT:
            resident_r = load_resident(projection_ptrs, masks_p, 1, H, H, BLOCK_K_R, SPLIT_K)

    h_ptr += (start * stride_t + first_b) * P
    if PROJECTED:
        r_ptr += (start * stride_t + first_b) * H
    if SAVE_EXTRA:
        extra_ptr += (start * stride_t + first_b) * H
    gates_ptr += (start * stride_t + first_b) * (G * H)
    if MASKED:
        steps_ptr += start * stride_t + first_b
    if REVERSE:
        stride_t = -stride_t
    rows_ptr = h0_ptr + first_b * P
    if not (LOCAL or SYNC):  # noqa: SIM102 - the one is known when this is compiled, the other is not
        if chained != 0:
            rows_ptr = h_ptr - stride_t * P
    h = ()
    if LOCAL or MASKED:
        h = load_tiles(rows_ptr, h_own, h_masks)
    flags = mask_b.to(tl.int32)
    if MASKED:
        flags = tl.load(steps_ptr + offs_b, mask=mask_b, other=0).to(tl.int32)

    ok = True
    target = 0
    for step in tl.range(0, T, num_stages=1):
        x = ()
        if FIRST:
            for tile in tl.static_range(TILES):
                offs_h = (member * TILES + tile) * BLOCK_H + tl.arange(0, BLOCK_H)
                at = offs_b[:, None] * (G * H) + offs_h[None, :]
                for gate in tl.static_range(G):
                    x = x + (tl.load(gates_ptr + at + gate * H, mask=masks[tile], other=0.0),)
        mask_rows = mask_b
        if MASKED:
            counts = ((flags & 1) != 0)[:, None]
            keep = (flags & 2) == 0
            # The next step's come now: so they are not waited for, and no compiler can move them into the product.
            flags = tl.load(steps_ptr + stride_t + offs_b, mask=mask_b & (step + 1 < T), other=0).to(tl.int32)
            mask_rows = mask_b & keep
            h = zero_rows(h, keep)
            state = zero_rows(state, keep)

        r = ()
        h_next = ()
        if FIRST:
            poison = 0.0
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            state_next = ()
            for tile in tl.static_range(TILES):
                h_gates = product(
                    h, rows_ptr, P, mask_rows, column_ptrs, masks_n, 1, resident, poison, tile,
                    LOCAL, P, P, BLOCK_B, N, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                )  # fmt: skip
                if HAS_BIAS:
                    h_gates += bias[tile][None, :]
                x_tiles = ()
                for gate in tl.static_range(G):
                    x_tiles = x_tiles + (x[tile * G + gate].to(ACC),)
                h_tiles = split_gates(h_gates, BLOCK_B, BLOCK_H, LANES)
                h_t, state_t, gates, extra = CELL(x_tiles, h_tiles, state[tile])
                stored = h_t.to(STORAGE)
                if MASKED:
                    state_t = tl.where(counts, state_t, state[tile])
                    extra = tl.where(counts, extra, state[tile])
                if PROJECTED:
                    tl.store(r_ptr + hidden[tile], stored, mask=masks[tile])
                    r = r + (stored,)
                else:
                    if MASKED:
                        stored = tl.where(counts, stored, h[tile])
                    tl.store(h_ptr + hidden[tile], stored, mask=masks[tile])
                    h_next = h_next + (stored,)
                if SYNC:  # and so TILES == 1; what is saved for backward need not be out before the others go on
                    publish(counter_ptr)
                if SAVE_EXTRA:
                    tl.store(extra_ptr + hidden[tile], extra.to(STORAGE), mask=masks[tile])
                if SAVE_GATES:
                    offs_h = (member * TILES + tile) * BLOCK_H + tl.arange(0, BLOCK_H)
                    at = offs_b[:, None] * (G * H) + offs_h[None, :]
                    for gate in tl.static_range(G):
                        tl.store(gates_ptr + at + gate * H, gates[gate].to(STORAGE), mask=masks[tile])
                state_next = state_next + (state_t,)
            state = state_next
        if SECOND and PROJECTED:
            poison = 0.0
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            for tile in tl.static_range(TILES_P):
                h_t = product(
                    r, r_ptr, H, mask_b & (member * BLOCK_H < P), projection_ptrs, masks_p, 1, resident_r, poison, tile,
                    LOCAL, H, H, BLOCK_B, BLOCK_H, BLOCK_K_R, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                )  # fmt: skip
                stored = h_t.to(STORAGE)
                if MASKED:
                    stored = tl.where(counts, stored, h[tile])
                tl.store(h_ptr + h_own[tile], stored, mask=h_masks[tile])
                h_next = h_next + (stored,)
            if SYNC:
                publish(counter_ptr)
        if LOCAL or (MASKED and (SECOND or not PROJECTED)):
            h = h_next

        rows_ptr = h_ptr
        h_ptr += stride_t * P
        if PROJECTED:
            r_ptr += stride_t * H
        if SAVE_EXTRA:
            extra_ptr += stride_t * H
        gates_ptr += stride_t * (G * H)
        if MASKED:
            steps_ptr += stride_t

    if FIRST:
        store_tiles(state_ptr + first_b * H, hidden, masks, state)
    if SYNC:
        give_up(counter_ptr, error_ptr, ok)


@triton.jit
def load_saved(
    previous_ptr, gates_ptr, extra_ptr, units, offs_b, hidden, masks,
    G: tl.constexpr, H: tl.constexpr, SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr,
):  # fmt: skip
    """What the forward kernel saved of one step: the state before it, its gates tile by tile, and the extra tiles."""
    previous = load_tiles(previous_ptr, hidden, masks)
    extra = previous
    if SAVE_EXTRA:
        extra = load_tiles(extra_ptr, hidden, masks)
    gates = ()
    if SAVE_GATES:
        for tile in tl.static_range(len(units)):
            at = offs_b[:, None] * (G * H) + units[tile][None, :]
            for gate in tl.static_range(G):
                gates = gates + (tl.load(gates_ptr + at + gate * H, mask=masks[tile], other=0.0),)
    return previous, gates, extra


@triton.jit(do_not_specialize=["T", "B", "start", "chained", "last", "first_group"])
def sequence_backward(
    dy_ptr,  # [T, B, P]
    dcells_ptr,  # [T, B, H] by state[t] from outside, with HAS_DCELLS
    gates_ptr,  # [T, B, G*H] the activated gates, with SAVE_GATES
    states_ptr,  # [T, B, H] state[t]
    state0_ptr,  # [B, H] the state before the first step
    extra_ptr,  # [T, B, H], with SAVE_EXTRA
    w_hh_ptr,  # [G*H, P]
    w_hr_ptr,  # [P, H], with PROJECTED
    steps_ptr,  # [T, B] bytes, with MASKED
    slots_ptr,  # [T, B, D*H] out: gradients by the pre-activations
    dh_all_ptr,  # [T, B, P] out, with PROJECTED: the whole gradient by h[t], where the step counts
    dh_ptr,  # [B, P], ACC dtype, in: by h after the last step; out: by h0, without what goes through W_hh
    dstate_ptr,  # [B, H], ACC dtype, in: by the state after the last step; out: by the state before the first
    counter_ptr,  # [groups * COUNTER_STRIDE] zeros, with SYNC
    error_ptr,  # [1], with SYNC
    T,
    B,
    start,
    chained,
    last,  # 1 where the last step of this launch is the first of the sequence
    first_group,
    CELL: tl.constexpr, G: tl.constexpr, D: tl.constexpr, H_SLOT: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr, TILES_P: tl.constexpr, N_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_K_R: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    LOCAL: tl.constexpr, SYNC: tl.constexpr, RESIDENT: tl.constexpr, REVERSE: tl.constexpr,
    PROJECTED: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
    HAS_DCELLS: tl.constexpr, SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    STORAGE: tl.constexpr = slots_ptr.dtype.element_ty
    group = first_group + tl.program_id(0) // N_H
    member = tl.program_id(0) % N_H
    first_b = (group * BLOCK_B).to(tl.int64)
    stride_t = B.to(tl.int64)
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = first_b + offs_b < B
    if SYNC:
        counter_ptr += group * COUNTER_STRIDE

    dy_ptr += (start * stride_t + first_b) * P
    states_ptr += (start * stride_t + first_b) * H
    state0_ptr += first_b * H
    if HAS_DCELLS:
        dcells_ptr += (start * stride_t + first_b) * H
    if SAVE_EXTRA:
        extra_ptr += (start * stride_t + first_b) * H
    if SAVE_GATES:
        gates_ptr += (start * stride_t + first_b) * (G * H)
    if PROJECTED:
        dh_all_ptr += (start * stride_t + first_b) * P
    if MASKED:
        steps_ptr += start * stride_t + first_b
    slots_ptr += (start * stride_t + first_b) * (D * H)
    if REVERSE:
        stride_t = -stride_t
    rows_ptr = slots_ptr + stride_t * (D * H) + H_SLOT * H

    # This program's hidden units, and its columns of h: the same, or those of the projection.
    units, masks_n, hidden, masks = own_tiles(offs_b, mask_b, member * TILES, H, BLOCK_H, TILES)
    offs_p, masks_p, h_own, h_masks = own_tiles(offs_b, mask_b, member * TILES_P, P, BLOCK_H, TILES_P)
    column_ptrs = ()
    resident = ()
    dh = ()
    if FIRST:
        for tile in tl.static_range(TILES_P):
            column_ptrs = column_ptrs + (w_hh_ptr + offs_p[tile],)
        dh = load_tiles(dh_ptr + first_b * P, h_own, h_masks)
        if RESIDENT:
            resident = load_resident(column_ptrs, masks_p, P, G * H, H if LOCAL else G * H, BLOCK_K, SPLIT_K)
    projection_ptrs = ()
    resident_r = ()
    dstate = ()
    state = ()
    if SECOND:
        if PROJECTED:
            for tile in tl.static_range(TILES):
                projection_ptrs = projection_ptrs + (w_hr_ptr + units[tile],)
            if RESIDENT:
                resident_r = load_resident(projection_ptrs, masks_n, H, P, P, BLOCK_K_R, SPLIT_K)
        dstate = load_tiles(dstate_ptr + first_b * H, hidden, masks)
        for tile in tl.static_range(TILES):
            state = state + (tl.load(states_ptr + hidden[tile], mask=masks[tile], other=0.0).to(ACC),)
    da = ()
    if LOCAL:
        for _ in tl.static_range(G * TILES):
            da = da + (tl.zeros((BLOCK_B, BLOCK_H), STORAGE),)
    keep_next = mask_b
    if MASKED:
        following = tl.load(steps_ptr + stride_t + offs_b, mask=mask_b & (chained != 0), other=0)
        keep_next = (following & 2) == 0

    ok = True
    target = 0
    for step in tl.range(0, T, num_stages=1):
        previous_ptr = states_ptr - stride_t * H
        if (step + 1 == T) & (last != 0):
            previous_ptr = state0_ptr
        dy = ()
        if FIRST:
            dy = load_tiles(dy_ptr, h_own, h_masks)
        previous = ()
        gates = ()
        extra = ()
        if not PROJECTED:
            previous, gates, extra = load_saved(
                previous_ptr, gates_ptr, extra_ptr, units, offs_b, hidden, masks, G, H, SAVE_GATES, SAVE_EXTRA
            )
        keep_rows = keep_next
        if MASKED:
            flags = tl.load(steps_ptr + offs_b, mask=mask_b, other=0)
            counts = ((flags & 1) != 0)[:, None]
            keep = (flags & 2) == 0
            keep_next = keep

        poison = 0.0
        if SYNC:
            ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
            target += N_H
            poison = tl.where(ok, 0.0, float("nan"))
        has_next = mask_b & ((step > 0) | (chained != 0))
        if MASKED:
            has_next = has_next & keep_rows
        dh_next = ()
        dh_tiles = ()
        if PROJECTED and FIRST:
            for tile in tl.static_range(TILES_P):
                dh_w = product(
                    da, rows_ptr, D * H, has_next & (member * BLOCK_H < P), column_ptrs, masks_p, P, resident, poison,
                    tile, LOCAL, H, G * H, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES,
                    DOT, ACC, PRECISION,
                )  # fmt: skip
                dh_t = dy[tile].to(ACC) + dh[tile] + dh_w
                held = tl.zeros_like(dh_t)
                if MASKED:
                    held = tl.where(counts, held, dh_t)
                    dh_t = tl.where(counts, dh_t, tl.zeros_like(dh_t))
                tl.store(dh_all_ptr + h_own[tile], dh_t.to(STORAGE), mask=h_masks[tile])
                dh_tiles = dh_tiles + (dh_t.to(STORAGE),)
                dh_next = dh_next + (held,)
            if SYNC:
                publish(counter_ptr)
        if PROJECTED and SECOND:
            previous, gates, extra = load_saved(
                previous_ptr, gates_ptr, extra_ptr, units, offs_b, hidden, masks, G, H, SAVE_GATES, SAVE_EXTRA
            )
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
        if SECOND:
            da_next = ()
            dstate_next = ()
            state_next = ()
            for tile in tl.static_range(TILES):
                if PROJECTED:
                    dh_t = product(
                        dh_tiles, dh_all_ptr, P, mask_b, projection_ptrs, masks_n, H, resident_r, poison, tile,
                        LOCAL, P, P, BLOCK_B, BLOCK_H, BLOCK_K_R, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                    )  # fmt: skip
                else:
                    dh_w = product(
                        da, rows_ptr, D * H, has_next, column_ptrs, masks_n, P, resident, poison, tile,
                        LOCAL, H, G * H, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES,
                        DOT, ACC, PRECISION,
                    )  # fmt: skip
                    dh_t = dy[tile].to(ACC) + dh[tile] + dh_w
                saved = ()
                if SAVE_GATES:
                    for gate in tl.static_range(G):
                        saved = saved + (gates[tile * G + gate].to(ACC),)
                dstate_t = dstate[tile]
                if HAS_DCELLS:
                    dstate_t += tl.load(dcells_ptr + hidden[tile], mask=masks[tile], other=0.0).to(ACC)
                state_t = previous[tile].to(ACC)
                state_prev = state_t
                if MASKED:
                    state_prev = tl.where(keep[:, None], state_t, tl.zeros_like(state_t))
                slots, dh_direct, dstate_prev = CELL(
                    dh_t, dstate_t, saved, state[tile], state_prev, extra[tile].to(ACC)
                )
                at = offs_b[:, None] * (D * H) + ((member * TILES + tile) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
                if MASKED:
                    dh_direct = tl.where(counts, dh_direct, dh_t)
                    dstate_prev = tl.where(counts, dstate_prev, dstate_t)
                    counted = ()
                    for slot in tl.static_range(D):
                        counted = counted + (tl.where(counts, slots[slot], tl.zeros_like(slots[slot])),)
                    slots = counted
                for slot in tl.static_range(D):
                    tl.store(slots_ptr + at + slot * H, slots[slot].to(STORAGE), mask=masks[tile])
                for gate in tl.static_range(G):
                    da_next = da_next + (slots[H_SLOT + gate].to(STORAGE),)
                if not PROJECTED:
                    dh_next = dh_next + (dh_direct,)
                dstate_next = dstate_next + (dstate_prev,)
                state_next = state_next + (state_t,)
            dstate = dstate_next
            state = state_next
            if LOCAL:
                # The product walks K, so gate by gate; the loop above ran tile by tile.
                da = ()
                for gate in tl.static_range(G):
                    for tile in tl.static_range(TILES):
                        da = da + (da_next[tile * G + gate],)
            if SYNC:
                publish(counter_ptr)
            if MASKED:
                dstate = zero_rows(dstate, keep)
                da = zero_rows(da, keep)
        if FIRST:
            dh = dh_next
            if MASKED:
                dh = zero_rows(dh, keep)

        rows_ptr = slots_ptr + H_SLOT * H
        dy_ptr -= stride_t * P
        states_ptr -= stride_t * H
        if HAS_DCELLS:
            dcells_ptr -= stride_t * H
        if SAVE_EXTRA:
            extra_ptr -= stride_t * H
        if SAVE_GATES:
            gates_ptr -= stride_t * (G * H)
        if PROJECTED:
            dh_all_ptr -= stride_t * P
        if MASKED:
            steps_ptr -= stride_t
        slots_ptr -= stride_t * (D * H)

    if FIRST:
        store_tiles(dh_ptr + first_b * P, h_own, h_masks, dh)
    if SECOND:
        store_tiles(dstate_ptr + first_b * H, hidden, masks, dstate)
    if SYNC:
        give_up(counter_ptr, error_ptr, ok)
