"""The backward sequence kernel: back-propagation through time, the mirror image of forward.py, which has the schedules.

At each step, from the last to the first: dh = dy[t] + da[t+1] W_hh, the cell's backward, store da[t]. The gradients by
the weights are products over all time steps and not made here; those by what has one number a unit (peepholes, scales)
are summed in registers, row by row of the batch.
"""

import triton
import triton.language as tl

from .activations import clip
from .cells import gru_reset_backward, gru_update_backward
from .norm import own_gradient_sums, row_gradients, send
from .product import own_weights, product
from .sync import COUNTER_STRIDE, give_up, meet, publish
from .tiles import (
    as_type,
    hold,
    load_masks,
    load_tiles,
    load_vectors,
    one_of,
    store_tiles,
    this_program,
    times,
    zero_columns,
    zero_rows,
)
from .zoneout import draw_tiles, zone_gradient


@triton.jit
def load_saved(
    previous_ptr, gates_ptr, extra_ptr, row, own, SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """What the forward kernel saved of one step: the state before it, its gates tile by tile, and the extra tiles."""
    G: tl.constexpr = PLAN.G
    H: tl.constexpr = PLAN.H
    previous = load_tiles(previous_ptr, own, H)
    gates = load_tiles(gates_ptr + row * (G * H), own, H, G, G) if SAVE_GATES else ()
    extra = load_tiles(extra_ptr + row * H, own, H) if SAVE_EXTRA else previous
    return previous, gates, extra


@triton.jit
def column_weights(
    w_ptr, own, WIDTH: tl.constexpr, K: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_K: tl.constexpr, PLAN: tl.constexpr
):
    """This program's columns of a matrix [K, WIDTH], K in segments (see product.load_resident)."""
    ptrs = ()
    for tile in tl.static_range(len(own.columns)):
        ptrs += (w_ptr + own.columns[tile],)
    return own_weights(ptrs, own.column_masks, K, WIDTH, SEGMENT, BLOCK_K, PLAN)


@triton.jit
def h_gradient(
    da, rows_ptr, mask_b, weights, poison, masks_h, TILE: tl.constexpr, GATES: tl.constexpr, OPT: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """da[t+1] W_hh of one tile of h's columns, through the masks that h was multiplied by."""
    H: tl.constexpr = PLAN.H
    STRIDE: tl.constexpr = PLAN.D * H
    N: tl.constexpr = PLAN.BLOCK_H
    if OPT.masks > 1:
        total = tl.full((PLAN.BLOCK_B, N), 0, PLAN.ACC)
        for gate in tl.static_range(GATES):
            of_gate = da[gate * PLAN.TILES :][: PLAN.TILES]
            total += masks_h[gate * PLAN.TILES_P + TILE] * product(
                of_gate, rows_ptr + gate * H, STRIDE, mask_b, weights, poison, TILE, gate, N, H, PLAN.P, H,
                PLAN.BLOCK_K, PLAN,
            )  # fmt: skip
        return total
    else:
        SEGMENT: tl.constexpr = H if PLAN.LOCAL else GATES * H
        total = product(
            da, rows_ptr, STRIDE, mask_b, weights, poison, TILE, 0, N, GATES * H, PLAN.P, SEGMENT, PLAN.BLOCK_K, PLAN
        )
        return total * masks_h[TILE] if OPT.masks == 1 else total


@triton.jit
def add_rows(sums, found, counts, FIRST: tl.constexpr):
    """sums plus `found` from place FIRST on, in the rows that count."""
    added = ()
    for i in tl.static_range(len(found)):
        added += (sums[FIRST + i] + tl.where(counts, found[i], tl.zeros_like(found[i])),)
    return sums[:FIRST] + added + sums[FIRST + len(found) :]


@triton.jit
def through_cell(
    dout, dmade, dstate, kept, made, state_prev, extra, params, dparams, bits, counts, TILE: tl.constexpr,
    CELL: tl.constexpr, MASKED: tl.constexpr, OPT: tl.constexpr,
):  # fmt: skip
    """Back through one tile of the cell, and of zoneout and the skipped steps around it.

    dmade: by the state that the cell made, through h; with layer normalisation all of it.
    """
    dnew, dheld = dstate, tl.zeros_like(dstate)
    if OPT.has_c:
        dnew, dheld = zone_gradient(dstate, bits, OPT.zone_state, OPT.random)
        dnew = dmade if OPT.norm else dnew + dmade
    own_params = params[TILE * OPT.params :][: OPT.params]
    slots, dh_direct, dstate_prev, found = CELL(dout, dnew, kept, made, state_prev, extra, own_params, OPT)
    if OPT.has_c and OPT.zone_state[0] != 0.0:
        dstate_prev += dheld
    dstate_prev = hold(counts, dstate_prev, dstate, MASKED)
    return (
        zero_rows(slots, counts, MASKED), dh_direct, dstate_prev,
        add_rows(dparams, found, counts, TILE * OPT.dparams),
    )  # fmt: skip


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
    sums_ptr,  # [2, B, N_H, 2], ACC dtype, with OPT.norm and N_H > 1: what programs send one another
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
    CELL: tl.constexpr, OUTPUT: tl.constexpr, MADE: tl.constexpr, OPT: tl.constexpr, PLAN: tl.constexpr,
    PRODUCT: tl.constexpr, SECOND: tl.constexpr, CELLS: tl.constexpr, OUTPUTS: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, HAS_DCELLS: tl.constexpr, SAVE_GATES: tl.constexpr,
    SAVE_EXTRA: tl.constexpr,
):  # fmt: skip
    STORAGE: tl.constexpr = slots_ptr.dtype.element_ty
    ACC: tl.constexpr = PLAN.ACC
    G: tl.constexpr = PLAN.G
    D: tl.constexpr = PLAN.D
    H: tl.constexpr = PLAN.H
    P: tl.constexpr = PLAN.P
    TILES: tl.constexpr = PLAN.TILES
    ROWS: tl.constexpr = OPT.dparams
    GATES: tl.constexpr = 2 if OPT.reset_before else G  # of the first product
    NORM_C: tl.constexpr = OPT.norm and OPT.has_c
    HANDED_OVER: tl.constexpr = not (PLAN.LOCAL or PLAN.SYNC)
    OWNS_DH: tl.constexpr = PRODUCT or OPT.reset_before
    me = this_program(first_group, B, PLAN)
    first_b, mask_b, own, own_h = me.first_b, me.mask_b, me.own, me.own_h
    if PLAN.SYNC:
        counter_ptr += me.group * COUNTER_STRIDE
    sums_c_ptr = sums_ptr
    if OPT.norm and not PLAN.LOCAL:
        sums_ptr += first_b * (PLAN.N_H * 2)
        sums_c_ptr = sums_ptr + B.to(tl.int64) * (PLAN.N_H * 2)
    if OPT.norm and HANDED_OVER:
        scratch_ptr += first_b * ((G + 2) * H)
    SEGMENT: tl.constexpr = H if (PLAN.LOCAL or OPT.masks > 1) else GATES * H
    weights = column_weights(w_hh_ptr, own_h, P, GATES * H, SEGMENT, PLAN.BLOCK_K, PLAN)
    second = weights
    if OPT.projected:
        second = column_weights(w_hr_ptr, own, H, P, P, PLAN.BLOCK_K_R, PLAN)
    if OPT.reset_before:
        second = column_weights(w_hh_ptr + 2 * H * H, own, H, H, H, PLAN.BLOCK_K_R, PLAN)
    params = load_vectors(params_ptr, own, OPT.params, H, ACC)
    masks_h = load_masks(mask_ptr, first_b, B, own_h, OPT.masks, P, ACC)
    seed = tl.load(seed_ptr) if OPT.random else 0

    # Of step t, the first row of the group in a matrix [T * B, .].
    stride_t = -B.to(tl.int64) if REVERSE else B.to(tl.int64)
    row = start * B.to(tl.int64) + first_b
    dh = load_tiles(dh_ptr + first_b * P, own_h, P)
    dstate = load_tiles(dstate_ptr + first_b * H, own, H)
    state = as_type(load_tiles(states_ptr + row * H, own, H), ACC)
    dparams = load_tiles(dparams_ptr + first_b * (ROWS * H), own, H, ROWS, ROWS) if ROWS > 0 else ()
    da = ()
    if PLAN.LOCAL:
        for _tile in tl.static_range(GATES * TILES):
            da += (tl.full((PLAN.BLOCK_B, PLAN.BLOCK_H), 0, STORAGE),)
    keep_next = mask_b
    if MASKED:
        following = tl.load(steps_ptr + row + stride_t + own.rows, mask=mask_b & (own.rows * 0 + chained != 0), other=0)
        keep_next = (following & 2) == 0
    ok = True
    target = 0
    for step in tl.range(0, T, num_stages=1):
        previous_ptr = states_ptr + (row - stride_t) * H
        if (step + 1 == T) & (last != 0):
            previous_ptr = state0_ptr + first_b * H
        rows_ptr = slots_ptr + (row + stride_t) * (D * H) + PLAN.H_SLOT * H
        da_ptr = slots_ptr + row * (D * H)
        dy = load_tiles(dy_ptr + row * P, own_h, P) if PRODUCT else ()
        previous, gates, extra = load_saved(previous_ptr, gates_ptr, extra_ptr, row, own, SAVE_GATES, SAVE_EXTRA, PLAN)
        normed = ()
        scale_h, mean_c, scale_c = 0.0, 0.0, 0.0
        if OPT.norm:
            normed = load_tiles(normed_ptr + row * (G * H), own, H, G, G)
            scale_h = tl.load(stats_ptr + row * 4 + own.rows * 4 + 1, mask=mask_b, other=0.0)
            mean_c = tl.load(stats_ptr + row * 4 + own.rows * 4 + 2, mask=mask_b, other=0.0)
            scale_c = tl.load(stats_ptr + row * 4 + own.rows * 4 + 3, mask=mask_b, other=0.0)
        counts, keep_rows, keep = mask_b[:, None], keep_next, mask_b
        if MASKED:
            flags = tl.load(steps_ptr + row + own.rows, mask=mask_b, other=0)
            counts, keep = ((flags & 1) != 0)[:, None], (flags & 2) == 0
            keep_next = keep
        kept_rows = keep[:, None]
        t = first_step + (start + step if REVERSE else start - step)
        bits_h, bits_c = draw_tiles(seed, t, first_b, own, OPT.random)
        if OPT.projected:
            bits_h, _ = draw_tiles(seed, t, first_b, own_h, OPT.random)

        target, ok, poison = meet(counter_ptr, target, ok, PLAN)
        has_next = mask_b & ((step > 0) | (chained != 0))
        if MASKED:
            has_next = has_next & keep_rows
        if OPT.projected:
            has_next = has_next & (own.rows * 0 + me.member * PLAN.BLOCK_H < P)
        dh_next, dh_rows, da_next, dstate_next, state_next = (), (), (), (), ()
        if PRODUCT and OPT.two_products:
            for tile in tl.static_range(len(own_h.columns)):
                dh_t = h_gradient(da, rows_ptr, has_next, weights, poison, masks_h, tile, GATES, OPT, PLAN)
                dh_t = dy[tile].to(ACC) + dh[tile] + dh_t
                dnew, dheld = zone_gradient(dh_t, bits_h[tile], OPT.zone_h, OPT.random)
                if OPT.reset_before:
                    state_prev = zero_rows(as_type(previous[tile:][:1], ACC), kept_rows, MASKED)[0]
                    kept = as_type(gates[tile * G :][:G], ACC)
                    dz, dn, direct = gru_update_backward(dnew, kept, state_prev, OPT)
                    dheld = direct if OPT.zone_h[0] == 0.0 else dheld + direct
                    dz, dn = zero_rows((dz, dn), counts, MASKED)
                    store_tiles(da_ptr + H, one_of(own, tile), (dz, dn), H, 2, D)
                    da_next += (dz.to(STORAGE),)
                    dh_rows += (dn.to(STORAGE),)
                dh_next += (hold(counts, dheld, dh_t, MASKED),)
                if OPT.projected:
                    dh_rows += as_type(zero_rows((dnew,), counts, MASKED), STORAGE)
                    store_tiles(dh_all_ptr + row * P, one_of(own_h, tile), dh_rows[tile:], P)
            if PLAN.SYNC:
                publish(counter_ptr)
        if SECOND and OPT.two_products:
            if OPT.projected:  # the loads above then have no use, and are not made
                previous, gates, extra = load_saved(
                    previous_ptr, gates_ptr, extra_ptr, row, own, SAVE_GATES, SAVE_EXTRA, PLAN
                )
            target, ok, poison = meet(counter_ptr, target, ok, PLAN)
        if SECOND and OPT.reset_before:
            direct_next = dh if HANDED_OVER else dh_next
            dh_next, da_reset = (), ()
            for tile in tl.static_range(TILES):
                dreset = product(
                    dh_rows, da_ptr + 2 * H, D * H, mask_b, second, poison, tile, 0, PLAN.BLOCK_H, H, H, H,
                    PLAN.BLOCK_K_R, PLAN,
                )  # fmt: skip
                if OPT.masks > 0:
                    dreset *= masks_h[(2 if OPT.masks > 1 else 0) * PLAN.TILES_P + tile]
                state_prev = zero_rows(as_type(previous[tile:][:1], ACC), kept_rows, MASKED)[0]
                dr, direct = gru_reset_backward(dreset, gates[tile * G].to(ACC), state_prev, OPT)
                dr, direct = zero_rows((dr, direct), counts, MASKED)
                store_tiles(da_ptr, one_of(own, tile), (dr,), H, 1, D)
                da_reset += (dr.to(STORAGE),)
                dh_next += (direct_next[tile] + direct,)
            if PLAN.SYNC:
                publish(counter_ptr)
            if PLAN.LOCAL:
                da = zero_rows(da_reset + da_next, kept_rows, MASKED)

        douts, dmades, normal = (), (), ()
        first, second_sum = 0.0, 0.0
        if (SECOND or CELLS) and not OPT.reset_before:
            state_next = as_type(previous, ACC)
            for tile in tl.static_range(TILES):
                state_prev = zero_rows(state_next[tile:][:1], kept_rows, MASKED)[0]
                kept = as_type(gates[tile * G :][:G], ACC)
                made = MADE(kept, state[tile], state_prev, OPT)
                c = clip(made, OPT.cell_clip)
                if NORM_C:
                    normal += zero_columns(((c - mean_c[:, None]) * scale_c[:, None],), one_of(own, tile), 1)
                    norm_c = params[tile * OPT.params + OPT.norm_row + G :][:2]
                    c = normal[tile] * norm_c[0] + norm_c[1]
                dstate_t = dstate[tile]
                if HAS_DCELLS:
                    dstate_t += load_tiles(dcells_ptr + row * H, one_of(own, tile), H)[0].to(ACC)
                if SECOND:
                    if OPT.projected:
                        dh_t = product(
                            dh_rows, dh_all_ptr + row * P, P, mask_b, second, poison, tile, 0, PLAN.BLOCK_H, P, H, P,
                            PLAN.BLOCK_K_R, PLAN,
                        )  # fmt: skip
                        dnew = dh_t
                    else:
                        dh_t = h_gradient(da, rows_ptr, has_next, weights, poison, masks_h, tile, GATES, OPT, PLAN)
                        dh_t = dy[tile].to(ACC) + dh[tile] + dh_t
                        dnew, dheld = zone_gradient(dh_t, bits_h[tile], OPT.zone_h, OPT.random)
                    dout, dmade = OUTPUT(dnew, kept, c, OPT)
                    if NORM_C:
                        dmade += zone_gradient(dstate_t, bits_c[tile], OPT.zone_state, OPT.random)[0]
                        found = (dmade * normal[tile], dmade)
                        dparams = add_rows(dparams, found, counts, tile * ROWS + OPT.norm_row + G)
                        douts += (dout,)
                        dmades += zero_columns((dmade * norm_c[0],), one_of(own, tile), 1)
                        if not OPT.projected:
                            dh_next += (hold(counts, dheld, dh_t, MASKED),)
                if not NORM_C:
                    slots, direct, dstate_prev, dparams = through_cell(
                        dout, dmade, dstate_t, kept, made, state_prev, extra[tile].to(ACC), params, dparams,
                        bits_c[tile], counts, tile, CELL, MASKED, OPT,
                    )  # fmt: skip
                    if not OPT.projected:
                        if OPT.zone_h[0] != 0.0:
                            direct += dheld
                        dh_next += (hold(counts, direct, dh_t, MASKED),)
                    store_tiles(da_ptr, one_of(own, tile), slots, H, G if OPT.norm else D, D)
                    da_next += as_type(slots[OPT.h_slot :][:G], ACC if OPT.norm else STORAGE)
                    dstate_next += (dstate_prev,)

        if SECOND and NORM_C:
            first, second_sum = own_gradient_sums(dmades, normal)
            if HANDED_OVER:
                store_tiles(scratch_ptr, own, douts, H, 1, G + 2)
            made_ptr = scratch_ptr + H if HANDED_OVER else scratch_ptr
            send(first, second_sum, sums_c_ptr, dmades, made_ptr, counter_ptr, me, 1, PLAN)
        if CELLS and NORM_C:
            target, ok, poison = meet(counter_ptr, target, ok, PLAN)
            if HANDED_OVER:
                douts = load_tiles(scratch_ptr, own, H, 1, G + 2)
                dmades = load_tiles(scratch_ptr + H, own, H, 1, G + 2)
            dmades = row_gradients(dmades, normal, scale_c, first, second_sum, sums_c_ptr, me, poison, H, PLAN)
            for tile in tl.static_range(TILES):
                state_prev = zero_rows(state_next[tile:][:1], kept_rows, MASKED)[0]
                kept = as_type(gates[tile * G :][:G], ACC)
                dstate_t = dstate[tile]
                if HAS_DCELLS:
                    dstate_t += load_tiles(dcells_ptr + row * H, one_of(own, tile), H)[0].to(ACC)
                slots, _, dstate_prev, dparams = through_cell(
                    douts[tile], dmades[tile], dstate_t, kept, MADE(kept, state[tile], state_prev, OPT), state_prev,
                    extra[tile].to(ACC), params, dparams, bits_c[tile], counts, tile, CELL, MASKED, OPT,
                )  # fmt: skip
                store_tiles(da_ptr, one_of(own, tile), slots, H, G, D)
                da_next += as_type(slots, ACC)
                dstate_next += (dstate_prev,)

        if CELLS and OPT.norm:
            # da_next are the gradients by W_hh h[t-1], normalised, scaled and with its bias: tile by tile, G each.
            dnormal = ()
            for tile in tl.static_range(TILES):
                found = da_next[tile * G :][:G]
                scaled = times(found, as_type(normed[tile * G :][:G], ACC))
                dparams = add_rows(dparams, scaled, counts, tile * ROWS + OPT.norm_row)
                dparams = add_rows(dparams, found, counts, tile * ROWS + OPT.params)
                dnormal += times(found, params[tile * OPT.params + OPT.norm_row :][:G])
            dnormal = zero_columns(dnormal, own, G)
            first, second_sum = own_gradient_sums(dnormal, as_type(normed, ACC))
            send(first, second_sum, sums_ptr, dnormal, scratch_ptr, counter_ptr, me, G, PLAN)
        if OUTPUTS and OPT.norm:
            target, ok, poison = meet(counter_ptr, target, ok, PLAN)
            if HANDED_OVER:
                dnormal = load_tiles(scratch_ptr, own, H, G, G + 2)
            da_next = row_gradients(
                dnormal, as_type(normed, ACC), scale_h, first, second_sum, sums_ptr, me, poison, G * H, PLAN
            )
            da_next = as_type(da_next, STORAGE)
            store_tiles(da_ptr + PLAN.H_SLOT * H, own, da_next, H, G, D)

        if OUTPUTS and not OPT.reset_before:
            if PLAN.LOCAL:
                # The product walks K, so gate by gate; the loops above ran tile by tile.
                da = ()
                for i in tl.static_range(G * TILES):
                    da += (da_next[i % PLAN.TILES * G + i // PLAN.TILES],)
                da = zero_rows(da, kept_rows, MASKED)
            if PLAN.SYNC:
                publish(counter_ptr)
        if CELLS and not OPT.reset_before:
            dstate, state = zero_rows(dstate_next, kept_rows, MASKED), state_next
        if OWNS_DH:
            dh = zero_rows(dh_next, kept_rows, MASKED)
        row -= stride_t

    if OWNS_DH:
        store_tiles(dh_ptr + first_b * P, own_h, dh, P)
    if CELLS and not OPT.reset_before:
        store_tiles(dstate_ptr + first_b * H, own, dstate, H)
    if ROWS > 0:
        store_tiles(dparams_ptr + first_b * (ROWS * H), own, dparams, H, ROWS, ROWS)
    if PLAN.SYNC:
        give_up(counter_ptr, error_ptr, ok)
