"""The backward sequence kernel: back-propagation through time, the mirror image of forward.py, which has the schedules.

At each step, from the last to the first: dh = dy[t] + da[t+1] W_hh, the cell's backward, store da[t]. The gradients by
the weights are products over all time steps and not made here; those by what has one number a unit (peepholes, scales)
are summed in registers, row by row of the batch.
"""

import triton
import triton.language as tl

from .activations import clip
from .cells import gru_reset_backward, gru_update_backward
from .norm import own_gradient_sums, row_gradients, send_sums
from .product import load_resident, product
from .sync import COUNTER_STRIDE, give_up, publish, wait
from .tiles import (
    as_type,
    load_masks,
    load_params,
    load_planes,
    load_tiles,
    own_tiles,
    part_of,
    store_planes,
    store_tiles,
    zero_rows,
)
from .zoneout import draw, zone_gradient


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
        gates = load_planes(gates_ptr, units, offs_b, masks, G, H, G)
    return previous, gates, extra


@triton.jit
def h_gradient(
    da, rows_ptr, mask_b, column_ptrs, masks_p, resident, poison, masks_h, TILE: tl.constexpr, TILES: tl.constexpr,
    TILES_P: tl.constexpr, GATES: tl.constexpr, MASKS: tl.constexpr, ROW_STRIDE: tl.constexpr, LOCAL: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da[t+1] W_hh of one tile of h's columns, through the masks that h was multiplied by."""
    if MASKS > 1:
        total = tl.zeros((BLOCK_B, BLOCK_H), ACC)
        for gate in tl.static_range(GATES):
            own = ()
            if LOCAL:
                own = part_of(da, gate, TILES)
            total += masks_h[gate * TILES_P + TILE] * product(
                own, rows_ptr + gate * H, ROW_STRIDE, mask_b, column_ptrs, masks_p, P, resident, poison, TILE, gate,
                LOCAL, H, H, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
            )  # fmt: skip
        return total
    else:
        total = product(
            da, rows_ptr, ROW_STRIDE, mask_b, column_ptrs, masks_p, P, resident, poison, TILE, 0,
            LOCAL, H, GATES * H, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
        )  # fmt: skip
        if MASKS == 1:
            total *= masks_h[TILE]
        return total


@triton.jit
def add_rows(sums, found, counts, TILE: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr):
    """sums, ROWS for each of a program's tiles, plus `found` to those of TILE from row FIRST on, where it counts."""
    added = ()
    for i in tl.static_range(len(sums)):
        if i // ROWS == TILE and i % ROWS >= FIRST and i % ROWS < FIRST + len(found):
            more = found[i % ROWS - FIRST]
            added = added + (sums[i] + tl.where(counts, more, tl.zeros_like(more)),)
        else:
            added = added + (sums[i],)
    return added


@triton.jit
def kept_gates(gates, TILE: tl.constexpr, G: tl.constexpr, SAVE_GATES: tl.constexpr, ACC: tl.constexpr):
    """The gates of one tile, where there are any."""
    kept = ()
    if SAVE_GATES:
        kept = as_type(part_of(gates, TILE, G), ACC)
    return kept


@triton.jit
def dstate_now(dstate, dcells_ptr, hidden, mask, HAS_DCELLS: tl.constexpr):
    """The gradient by state[t]: what came from step t+1, and what came from outside."""
    if HAS_DCELLS:
        dstate += tl.load(dcells_ptr + hidden, mask=mask, other=0.0).to(dstate.dtype)
    return dstate


@triton.jit
def through_cell(
    CELL: tl.constexpr, dout, dmade, dstate, kept, made, state_prev, extra, params, dparams, dcells_ptr, hidden, mask,
    bits, counts, TILE: tl.constexpr, OPT: tl.constexpr, HAS_DCELLS: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Back through one tile of the cell, and of zoneout and the skipped steps around it.

    dmade: by the state that the cell made, through h; with layer normalisation all of it.
    """
    dstate = dstate_now(dstate, dcells_ptr, hidden, mask, HAS_DCELLS)
    dnew = dstate
    if OPT.has_c:
        dnew, dheld = zone_gradient(dstate, bits, OPT.zone_state, OPT.random)
    if OPT.has_c:
        dnew = dmade if OPT.norm else dnew + dmade
    slots, dh_direct, dstate_prev, found = CELL(
        dout, dnew, kept, made, state_prev, extra, part_of(params, TILE, OPT.params), OPT
    )
    if OPT.has_c and OPT.zone_state[0] != 0.0:
        dstate_prev += dheld
    if MASKED:
        dstate_prev = tl.where(counts, dstate_prev, dstate)
        counted = ()
        for slot in tl.static_range(len(slots)):
            counted = counted + (tl.where(counts, slots[slot], tl.zeros_like(slots[slot])),)
        slots = counted
    if len(found) > 0:
        dparams = add_rows(dparams, found, counts, TILE, OPT.dparams, 0)
    return slots, dh_direct, dstate_prev, dparams


@triton.jit
def recurrent_slots(slots, OPT: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    """Those by the recurrent product."""
    found = ()
    for gate in tl.static_range(G):
        found = found + (slots[OPT.h_slot + gate].to(DTYPE),)
    return found


@triton.jit(do_not_specialize=["T", "B", "start", "first_step", "chained", "last", "first_group"])
def sequence_backward(
    dy_ptr,  # [T, B, P]
    dcells_ptr,  # [T, B, H] by state[t] from outside, with HAS_DCELLS
    gates_ptr,  # [T, B, G*H] the gates as the forward kernel left them, with SAVE_GATES
    states_ptr,  # [T, B, H] state[t]
    state0_ptr,  # [B, H] the state before the first step
    extra_ptr,  # [T, B, H], with SAVE_EXTRA
    normed_ptr,  # [T, B, G*H], with OPT.norm
    stats_ptr,  # [T, B, 4], with OPT.norm
    w_hh_ptr,  # [G*H, P]
    w_hr_ptr,  # [P, H], with OPT.projected
    params_ptr,  # [OPT.params, H]
    mask_ptr,  # [OPT.masks, B, P]
    steps_ptr,  # [T, B] bytes, with MASKED
    seed_ptr,  # [1] int64, with OPT.random
    slots_ptr,  # [T, B, D*H] out: gradients by the pre-activations
    dh_all_ptr,  # [T, B, P] out, with OPT.projected: the gradient by what h was projected to, where the step counts
    dh_ptr,  # [B, P], ACC dtype, in: by h after the last step; out: by h0, without what goes through W_hh
    dstate_ptr,  # [B, H], ACC dtype, in: by the state after the last step; out: by the state before the first
    dparams_ptr,  # [B, OPT.dparams * H], ACC dtype, in and out: by params, and with OPT.norm by b_hh, summed over time
    sums_ptr,  # [4, B, N_H, 2], ACC dtype, with OPT.norm and N_H > 1: what programs send one another
    scratch_ptr,  # [B, (G + 2) * H], ACC dtype, with OPT.norm: what a part of a step hands over to the next launch
    counter_ptr,  # [groups * COUNTER_STRIDE] zeros, with SYNC
    error_ptr,  # [1], with SYNC
    T,
    B,
    start,
    first_step,  # where step 0 in memory lies in the whole sequence
    chained,
    last,  # 1 where the last step of this launch is the first of the sequence
    first_group,
    CELL: tl.constexpr, OUTPUT: tl.constexpr, MADE: tl.constexpr, OPT: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    H_SLOT: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr, TILES_P: tl.constexpr, N_H: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K_R: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr, LOCAL: tl.constexpr, SYNC: tl.constexpr, RESIDENT: tl.constexpr, REVERSE: tl.constexpr,
    PRODUCT: tl.constexpr, SECOND: tl.constexpr, CELLS: tl.constexpr, OUTPUTS: tl.constexpr, MASKED: tl.constexpr,
    HAS_DCELLS: tl.constexpr, SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    STORAGE: tl.constexpr = slots_ptr.dtype.element_ty
    GATES: tl.constexpr = 2 if OPT.reset_before else G  # of the first product
    NORM_C: tl.constexpr = OPT.norm and OPT.has_c
    HANDED_OVER: tl.constexpr = not (LOCAL or SYNC)
    SEGMENT: tl.constexpr = H if (LOCAL or OPT.masks > 1) else GATES * H
    PARAMS: tl.constexpr = OPT.params
    ROWS: tl.constexpr = OPT.dparams
    OWNS_DH: tl.constexpr = PRODUCT or OPT.reset_before
    OWN_SLOTS: tl.constexpr = G if OPT.norm else D  # that the cell finds
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
    if OPT.projected:
        dh_all_ptr += (start * stride_t + first_b) * P
    if OPT.norm:
        normed_ptr += (start * stride_t + first_b) * (G * H)
        stats_ptr += (start * stride_t + first_b) * 4
        if not LOCAL:
            sums_ptr += first_b * (N_H * 2)
        if HANDED_OVER:
            scratch_ptr += first_b * ((G + 2) * H)
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
    if PRODUCT:
        for tile in tl.static_range(TILES_P):
            column_ptrs = column_ptrs + (w_hh_ptr + offs_p[tile],)
        if RESIDENT:
            resident = load_resident(column_ptrs, masks_p, P, GATES * H, SEGMENT, BLOCK_K, SPLIT_K)
    if OWNS_DH:
        dh = load_tiles(dh_ptr + first_b * P, h_own, h_masks)
    second_ptrs = ()
    resident_r = ()
    if SECOND and OPT.projected:
        for tile in tl.static_range(TILES):
            second_ptrs = second_ptrs + (w_hr_ptr + units[tile],)
        if RESIDENT:
            resident_r = load_resident(second_ptrs, masks_n, H, P, P, BLOCK_K_R, SPLIT_K)
    if SECOND and OPT.reset_before:
        for tile in tl.static_range(TILES):
            second_ptrs = second_ptrs + (w_hh_ptr + 2 * H * H + units[tile],)
        if RESIDENT:
            resident_r = load_resident(second_ptrs, masks_n, H, H, H, BLOCK_K_R, SPLIT_K)
    dstate = ()
    state = ()
    dparams = ()
    if CELLS or (SECOND and OPT.norm):
        dstate = load_tiles(dstate_ptr + first_b * H, hidden, masks)
        for tile in tl.static_range(TILES):
            state = state + (tl.load(states_ptr + hidden[tile], mask=masks[tile], other=0.0).to(ACC),)
    params = load_params(params_ptr, units, masks_n, PARAMS, H, ACC)
    if ROWS > 0:
        dparams = load_planes(dparams_ptr + first_b * (ROWS * H), units, offs_b, masks, ROWS, H, ROWS)
    masks_h = load_masks(mask_ptr, first_b, B, h_own, h_masks, OPT.masks, P, ACC)
    seed = 0
    if OPT.random:
        seed = tl.load(seed_ptr)
    da = ()
    if LOCAL:
        for _tile in tl.static_range(GATES * TILES):
            da = da + (tl.zeros((BLOCK_B, BLOCK_H), STORAGE),)
    keep_next = mask_b
    if MASKED:
        following = tl.load(steps_ptr + stride_t + offs_b, mask=mask_b & (offs_b * 0 + chained != 0), other=0)
        keep_next = (following & 2) == 0

    ok = True
    target = 0
    for step in tl.range(0, T, num_stages=1):
        previous_ptr = states_ptr - stride_t * H
        if (step + 1 == T) & (last != 0):
            previous_ptr = state0_ptr
        dy = ()
        if PRODUCT:
            dy = load_tiles(dy_ptr, h_own, h_masks)
        previous = ()
        gates = ()
        extra = ()
        normed = ()
        scale_h, mean_c, scale_c = 0.0, 0.0, 0.0
        if not (OPT.projected and SECOND):
            previous, gates, extra = load_saved(
                previous_ptr, gates_ptr, extra_ptr, units, offs_b, hidden, masks, G, H, SAVE_GATES, SAVE_EXTRA
            )
        if OPT.norm:
            normed = load_planes(normed_ptr, units, offs_b, masks, G, H, G)
            scale_h = tl.load(stats_ptr + offs_b * 4 + 1, mask=mask_b, other=0.0)
            mean_c = tl.load(stats_ptr + offs_b * 4 + 2, mask=mask_b, other=0.0)
            scale_c = tl.load(stats_ptr + offs_b * 4 + 3, mask=mask_b, other=0.0)
        keep_rows = keep_next
        keep = mask_b
        counts = mask_b[:, None]
        if MASKED:
            flags = tl.load(steps_ptr + offs_b, mask=mask_b, other=0)
            counts = ((flags & 1) != 0)[:, None]
            keep = (flags & 2) == 0
            keep_next = keep
        bits_h = ()
        bits_c = ()
        if OPT.random:
            t = first_step + (start + step if REVERSE else start - step)
            for tile in tl.static_range(TILES):
                for_h, for_c = draw(seed, t, first_b + offs_b, units[tile])
                bits_c = bits_c + (for_c,)
                if not OPT.projected:
                    bits_h = bits_h + (for_h,)
            if OPT.projected:
                for tile in tl.static_range(TILES_P):
                    bits_h = bits_h + (draw(seed, t, first_b + offs_b, offs_p[tile])[0],)
        sums_t = sums_ptr
        sums_c = sums_ptr
        if OPT.norm and not LOCAL:
            sums_t = sums_ptr + step % 2 * (B.to(tl.int64) * (N_H * 2))
            sums_c = sums_t + B.to(tl.int64) * (N_H * 4)

        poison = 0.0
        if SYNC:
            ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
            target += N_H
            poison = tl.where(ok, 0.0, float("nan"))
        has_next = mask_b & ((step > 0) | (chained != 0))
        if MASKED:
            has_next = has_next & keep_rows
        if OPT.projected:
            has_next = has_next & (offs_b * 0 + member * BLOCK_H < P)
        dh_next = ()
        dh_tiles = ()
        da_next = ()
        if PRODUCT and OPT.two_products:
            for tile in tl.static_range(TILES_P):
                dh_t = h_gradient(
                    da, rows_ptr, has_next, column_ptrs, masks_p, resident, poison, masks_h, tile, TILES, TILES_P,
                    GATES, OPT.masks, D * H, LOCAL, H, P, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES,
                    DOT, ACC, PRECISION,
                )  # fmt: skip
                dh_t = dy[tile].to(ACC) + dh[tile] + dh_t
                dnew, dheld = zone_gradient(dh_t, bits_h[tile] if OPT.random else 0, OPT.zone_h, OPT.random)
                if OPT.reset_before:
                    state_prev = previous[tile].to(ACC)
                    if MASKED:
                        state_prev = tl.where(keep[:, None], state_prev, tl.zeros_like(state_prev))
                    kept = part_of(gates, tile, G)
                    kept = (kept[0].to(ACC), kept[1].to(ACC), kept[2].to(ACC))
                    dz, dn, direct = gru_update_backward(dnew, kept, state_prev, OPT)
                    dheld = direct if OPT.zone_h[0] == 0.0 else dheld + direct
                    if MASKED:
                        dz = tl.where(counts, dz, tl.zeros_like(dz))
                        dn = tl.where(counts, dn, tl.zeros_like(dn))
                    store_planes(slots_ptr, (units[tile],), offs_b, (masks[tile],), (dz, dn), 1, 2, H, D, STORAGE)
                    da_next = da_next + (dz.to(STORAGE),)
                    dh_tiles = dh_tiles + (dn.to(STORAGE),)
                if MASKED:
                    dheld = tl.where(counts, dheld, dh_t)
                    dnew = tl.where(counts, dnew, tl.zeros_like(dnew))
                if OPT.projected:
                    tl.store(dh_all_ptr + h_own[tile], dnew.to(STORAGE), mask=h_masks[tile])
                    dh_tiles = dh_tiles + (dnew.to(STORAGE),)
                dh_next = dh_next + (dheld,)
            if SYNC:
                publish(counter_ptr)
        if SECOND and OPT.two_products:
            if OPT.projected:
                previous, gates, extra = load_saved(
                    previous_ptr, gates_ptr, extra_ptr, units, offs_b, hidden, masks, G, H, SAVE_GATES, SAVE_EXTRA
                )
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
        if SECOND and OPT.reset_before:
            if HANDED_OVER:
                dh_next = dh
            dh_reset = ()
            da_reset = ()
            for tile in tl.static_range(TILES):
                dreset = product(
                    dh_tiles, slots_ptr + 2 * H, D * H, mask_b, second_ptrs, masks_n, H, resident_r, poison, tile, 0,
                    LOCAL, H, H, BLOCK_B, BLOCK_H, BLOCK_K_R, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                )  # fmt: skip
                if OPT.masks > 0:
                    dreset *= masks_h[(2 if OPT.masks > 1 else 0) * TILES_P + tile]
                state_prev = previous[tile].to(ACC)
                if MASKED:
                    state_prev = tl.where(keep[:, None], state_prev, tl.zeros_like(state_prev))
                dr, direct = gru_reset_backward(dreset, gates[tile * G].to(ACC), state_prev, OPT)
                if MASKED:
                    dr = tl.where(counts, dr, tl.zeros_like(dr))
                    direct = tl.where(counts, direct, tl.zeros_like(direct))
                store_planes(slots_ptr, (units[tile],), offs_b, (masks[tile],), (dr,), 0, 1, H, D, STORAGE)
                da_reset = da_reset + (dr.to(STORAGE),)
                dh_reset = dh_reset + (dh_next[tile] + direct,)
            dh_next = dh_reset
            if SYNC:
                publish(counter_ptr)
            if LOCAL:
                da = zero_rows(da_reset + da_next, keep) if MASKED else da_reset + da_next

        dstate_next = ()
        state_next = ()
        douts = ()
        dmades = ()
        normal = ()
        first, second = 0.0, 0.0
        if (SECOND or CELLS) and not OPT.reset_before:
            for tile in tl.static_range(TILES):
                state_t = previous[tile].to(ACC)
                state_prev = state_t
                if MASKED:
                    state_prev = tl.where(keep[:, None], state_t, tl.zeros_like(state_t))
                kept = kept_gates(gates, tile, G, SAVE_GATES, ACC)
                made = MADE(kept, state[tile], state_prev, OPT)
                c = clip(made, OPT.cell_clip)
                if NORM_C:
                    c = (c - mean_c[:, None]) * scale_c[:, None]
                    c = tl.where(masks_n[tile][None, :], c, tl.zeros_like(c))
                    normal = normal + (c,)
                    scale = params[tile * PARAMS + OPT.norm_row + G]
                    c = c * scale + params[tile * PARAMS + OPT.norm_row + G + 1]
                if SECOND:
                    if OPT.projected:
                        dh_t = product(
                            dh_tiles, dh_all_ptr, P, mask_b, second_ptrs, masks_n, H, resident_r, poison, tile, 0,
                            LOCAL, P, P, BLOCK_B, BLOCK_H, BLOCK_K_R, SPLIT_K, RESIDENT, AHEAD, STAGES,
                            DOT, ACC, PRECISION,
                        )  # fmt: skip
                        dnew, dheld = dh_t, tl.zeros_like(dh_t)
                    else:
                        dh_t = h_gradient(
                            da, rows_ptr, has_next, column_ptrs, masks_p, resident, poison, masks_h, tile, TILES,
                            TILES_P, GATES, OPT.masks, D * H, LOCAL, H, P, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT,
                            AHEAD, STAGES, DOT, ACC, PRECISION,
                        )  # fmt: skip
                        dh_t = dy[tile].to(ACC) + dh[tile] + dh_t
                        dnew, dheld = zone_gradient(dh_t, bits_h[tile] if OPT.random else 0, OPT.zone_h, OPT.random)
                    dout, dmade = OUTPUT(dnew, kept, c, OPT)
                    if NORM_C:
                        dc = dstate_now(dstate[tile], dcells_ptr, hidden[tile], masks[tile], HAS_DCELLS)
                        dmade += zone_gradient(dc, bits_c[tile] if OPT.random else 0, OPT.zone_state, OPT.random)[0]
                        found = (dmade * normal[tile], dmade)
                        dparams = add_rows(dparams, found, counts, tile, ROWS, OPT.norm_row + G)
                        dmade = tl.where(masks_n[tile][None, :], dmade * scale, tl.zeros_like(dmade))
                        if not OPT.projected:
                            dh_next = dh_next + (tl.where(counts, dheld, dh_t) if MASKED else dheld,)
                if NORM_C:
                    if SECOND:
                        douts = douts + (dout,)
                        dmades = dmades + (dmade,)
                else:
                    slots, dh_direct, dstate_prev, dparams = through_cell(
                        CELL, dout, dmade, dstate[tile], kept, made, state_prev, extra[tile].to(ACC), params, dparams,
                        dcells_ptr, hidden[tile], masks[tile], bits_c[tile] if OPT.random else 0, counts, tile,
                        OPT, HAS_DCELLS, MASKED, ACC,
                    )  # fmt: skip
                    if not OPT.projected:
                        if OPT.zone_h[0] != 0.0:
                            dh_direct += dheld
                        if MASKED:
                            dh_direct = tl.where(counts, dh_direct, dh_t)
                        dh_next = dh_next + (dh_direct,)
                    store_planes(slots_ptr, (units[tile],), offs_b, (masks[tile],), slots, 0, OWN_SLOTS, H, D, STORAGE)
                    da_next = da_next + recurrent_slots(slots, OPT, G, ACC if OPT.norm else STORAGE)
                    dstate_next = dstate_next + (dstate_prev,)
                state_next = state_next + (state_t,)

        if NORM_C and SECOND:
            first, second = own_gradient_sums(dmades, normal)
            if not LOCAL:
                send_sums(sums_c, first, second, offs_b, mask_b, member, N_H)
            if HANDED_OVER:
                store_planes(scratch_ptr, units, offs_b, masks, douts, 0, 1, H, G + 2, ACC)
                store_planes(scratch_ptr, units, offs_b, masks, dmades, 1, 1, H, G + 2, ACC)
            if SYNC:
                publish(counter_ptr)
        if NORM_C and CELLS:
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            if HANDED_OVER:
                douts = load_planes(scratch_ptr, units, offs_b, masks, 1, H, G + 2)
                dmades = load_planes(scratch_ptr + H, units, offs_b, masks, 1, H, G + 2)
            dmades = row_gradients(
                dmades, normal, scale_c, first, second, sums_c, offs_b, mask_b, poison, H, N_H, CHUNK, LOCAL, ACC
            )  # fmt: skip
            for tile in tl.static_range(TILES):
                state_prev = state_next[tile]
                if MASKED:
                    state_prev = tl.where(keep[:, None], state_prev, tl.zeros_like(state_prev))
                kept = kept_gates(gates, tile, G, SAVE_GATES, ACC)
                slots, _, dstate_prev, dparams = through_cell(
                    CELL, douts[tile], dmades[tile], dstate[tile], kept, MADE(kept, state[tile], state_prev, OPT),
                    state_prev, extra[tile].to(ACC), params, dparams, dcells_ptr, hidden[tile], masks[tile],
                    bits_c[tile] if OPT.random else 0, counts, tile, OPT, HAS_DCELLS, MASKED, ACC,
                )  # fmt: skip
                store_planes(slots_ptr, (units[tile],), offs_b, (masks[tile],), slots, 0, G, H, D, STORAGE)
                da_next = da_next + recurrent_slots(slots, OPT, G, ACC)
                dstate_next = dstate_next + (dstate_prev,)

        if OPT.norm and CELLS:
            # da_next are the gradients by W_hh h[t-1], normalised, scaled and with its bias: tile by tile, G each.
            dnormal = ()
            for tile in tl.static_range(TILES):
                found = part_of(da_next, tile, G)
                scaled = ()
                for gate in tl.static_range(G):
                    scaled = scaled + (found[gate] * normed[tile * G + gate].to(ACC),)
                    of_normal = found[gate] * params[tile * PARAMS + OPT.norm_row + gate]
                    dnormal = dnormal + (tl.where(masks_n[tile][None, :], of_normal, tl.zeros_like(of_normal)),)
                dparams = add_rows(dparams, scaled, counts, tile, ROWS, OPT.norm_row)
                dparams = add_rows(dparams, found, counts, tile, ROWS, PARAMS)
            first, second = own_gradient_sums(dnormal, as_type(normed, ACC))
            if not LOCAL:
                send_sums(sums_t, first, second, offs_b, mask_b, member, N_H)
            if HANDED_OVER:
                store_planes(scratch_ptr, units, offs_b, masks, dnormal, 0, G, H, G + 2, ACC)
            if SYNC:
                publish(counter_ptr)
        if OPT.norm and OUTPUTS:
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            if HANDED_OVER:
                dnormal = load_planes(scratch_ptr, units, offs_b, masks, G, H, G + 2)
            da_next = row_gradients(
                dnormal, as_type(normed, ACC), scale_h, first, second, sums_t, offs_b, mask_b, poison,
                G * H, N_H, CHUNK, LOCAL, ACC,
            )  # fmt: skip
            da_next = as_type(da_next, STORAGE)
            store_planes(slots_ptr, units, offs_b, masks, da_next, H_SLOT, G, H, D, STORAGE)

        if OUTPUTS and not OPT.reset_before:
            if LOCAL:
                # The product walks K, so gate by gate; the loops above ran tile by tile.
                da = ()
                for gate in tl.static_range(G):
                    for tile in tl.static_range(TILES):
                        da = da + (da_next[tile * G + gate],)
            if SYNC:
                publish(counter_ptr)
            if MASKED:
                da = zero_rows(da, keep)
        if CELLS and not OPT.reset_before:
            dstate = dstate_next
            state = state_next
            if MASKED:
                dstate = zero_rows(dstate, keep)
        if OWNS_DH:
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
        if OPT.projected:
            dh_all_ptr -= stride_t * P
        if OPT.norm:
            normed_ptr -= stride_t * (G * H)
            stats_ptr -= stride_t * 4
        if MASKED:
            steps_ptr -= stride_t
        slots_ptr -= stride_t * (D * H)

    if OWNS_DH:
        store_tiles(dh_ptr + first_b * P, h_own, h_masks, dh)
    if CELLS and not OPT.reset_before:
        store_tiles(dstate_ptr + first_b * H, hidden, masks, dstate)
    if ROWS > 0:
        store_planes(dparams_ptr + first_b * (ROWS * H), units, offs_b, masks, dparams, 0, ROWS, H, ROWS, ACC)
    if SYNC:
        give_up(counter_ptr, error_ptr, ok)
