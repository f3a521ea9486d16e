"""The forward sequence kernel: gate product plus cell, over time. Every cell and schedule is made from this text.

Programs form groups of N_H; a group owns BLOCK_B rows of the batch, a program TILES * BLOCK_H hidden units of every
gate. At each step: h_gates = h[t-1] W_hh^T, cell, store h[t]. The backward kernel (backward.py) mirrors it:
dh = da[t+1] W_hh, cell, store da[t].
Constexpr flags make the schedules:

    LOCAL     N_H = 1: one program owns all hidden units and multiplies from its registers; no waiting at all
    SYNC      the group's programs wait for each other's tiles at every step
    RESIDENT  W_hh is loaded once, before the time loop, and stays on chip

    local: LOCAL. resident: SYNC and RESIDENT. streamed: SYNC. step: none of them, launched once a step with T = 1.

A step has up to four parts, each of which needs something from all programs of the group: so where programs wait they
wait at the beginning of each, and the step engine launches them one after another, handing tiles over in scratch_ptr.

                forward                                      backward
    PRODUCT     h_gates = h[t-1] W_hh^T                      dh = da[t+1] W_hh
    CELLS       the cell; apart from PRODUCT where h_gates   the cell's backward; apart where c was normalised
                is normalised first
    OUTPUTS     h; apart from CELLS where c is normalised    da; apart from CELLS where h_gates was normalised
    SECOND      h = r W_hr^T, or n of W_hn (r h[t-1])        dr = dh W_hr, or d(r h[t-1]) = dn W_hn

OPT (launch.Options) has the cell's own flags: OPT.projected, h[t] = r[t] W_hr^T has P columns, of which a program owns
TILES_P tiles (some programs own none). OPT.reset_before, the GRU that multiplies twice. OPT.masks, h[t-1] is multiplied
by one mask, or one a gate, before W_hh is (recurrent dropout; Gal and Ghahramani 2016). OPT.norm, layer normalisation.
MASKED reads a byte a row and step: bit 1, the step counts, else h and state are held and no gradient arises; bit 2,
h and state are zeroed before it.

Inside a tile of the product the gates are interleaved, unit-major with the gate fastest, LANES (their number rounded up
to a power of two) columns a unit: one product serves all gates, and splitting it into a tile a gate crosses no warp. In
memory nothing is interleaved. With a mask for each gate, every gate has rows, and so a product, of its own.
"""

import triton
import triton.language as tl

from .cells import gru_reset, gru_update, reopen
from .norm import normalise, own_moments, row_moments, send_sums
from .product import load_resident, product
from .sync import COUNTER_STRIDE, give_up, publish, wait
from .tiles import (
    load_masks,
    load_params,
    load_planes,
    load_tiles,
    own_tiles,
    part_of,
    split_gates,
    store_planes,
    store_tiles,
    zero_rows,
)
from .zoneout import draw, zone


@triton.jit
def drop(h, masks_h, MASKS: tl.constexpr, STORAGE: tl.constexpr):
    """h times each mask, mask by mask; h itself where there is none."""
    if MASKS == 0:
        return h
    else:
        dropped = ()
        for i in tl.static_range(len(masks_h)):
            dropped = dropped + ((h[i % len(h)].to(masks_h[i].dtype) * masks_h[i]).to(STORAGE),)
        return dropped


@triton.jit
def emit(
    h_t, h, bits, counts, h_ptr, h_own, h_masks, drop_ptr, masks_h, offs_b, offs_p,
    TILE: tl.constexpr, OPT: tl.constexpr, TILES_P: tl.constexpr, P: tl.constexpr, LOCAL: tl.constexpr,
    MASKED: tl.constexpr, STORAGE: tl.constexpr,
):  # fmt: skip
    """Tile TILE of h[t], and of h[t] times the masks, to memory; returns what was stored. h: h[t-1], if it may stay."""
    if OPT.has_c and OPT.zone_h[0] != 0.0:
        h_t = zone(h_t, h[TILE].to(h_t.dtype), bits[TILE] if OPT.random else 0, OPT.zone_h, OPT.random)
    stored = h_t.to(STORAGE)
    if MASKED:
        stored = tl.where(counts, stored, h[TILE])
    tl.store(h_ptr + h_own[TILE], stored, mask=h_masks[TILE])
    MASKS: tl.constexpr = OPT.masks
    if MASKS > 0 and not LOCAL:
        at = offs_b[:, None] * (MASKS * P) + offs_p[TILE][None, :]
        for mask in tl.static_range(MASKS):
            m = masks_h[mask * TILES_P + TILE]
            tl.store(drop_ptr + at + mask * P, (stored.to(m.dtype) * m).to(STORAGE), mask=h_masks[TILE])
    return stored


@triton.jit
def gate_products(
    rows, rows_ptr, mask_b, column_ptrs, masks_n, resident, poison, bias, TILE: tl.constexpr, TILES_P: tl.constexpr,
    GATES: tl.constexpr, LANES: tl.constexpr, PER_GATE: tl.constexpr, ROW_STRIDE: tl.constexpr, ADD_BIAS: tl.constexpr,
    LOCAL: tl.constexpr, P: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h[t-1] W_hh^T of one tile of units, a tile [BLOCK_B, BLOCK_H] for each gate."""
    if PER_GATE:
        tiles = ()
        for gate in tl.static_range(GATES):
            own = ()
            if LOCAL:
                own = part_of(rows, gate, TILES_P)
            acc = product(
                own, rows_ptr + gate * P, ROW_STRIDE, mask_b, column_ptrs, masks_n, 1, resident, poison,
                TILE * GATES + gate, 0, LOCAL, P, P, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES,
                DOT, ACC, PRECISION,
            )  # fmt: skip
            if ADD_BIAS:
                acc += bias[TILE * GATES + gate][None, :]
            tiles = tiles + (acc,)
        return tiles
    else:
        acc = product(
            rows, rows_ptr, ROW_STRIDE, mask_b, column_ptrs, masks_n, 1, resident, poison, TILE, 0,
            LOCAL, P, P, BLOCK_B, BLOCK_H * LANES, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
        )  # fmt: skip
        if ADD_BIAS:
            acc += bias[TILE][None, :]
        return split_gates(acc, BLOCK_B, BLOCK_H, LANES)


@triton.jit(do_not_specialize=["T", "B", "start", "chained", "first_group"])
def sequence_forward(
    gates_ptr,  # [T, B, G*H] in: W_ih x + b_ih; out, with SAVE_GATES: the gates, as backward reads them
    w_hh_ptr,  # [G*H, P]
    b_hh_ptr,  # [G*H], with HAS_BIAS
    w_hr_ptr,  # [P, H], with OPT.projected
    params_ptr,  # [OPT.params, H]
    mask_ptr,  # [OPT.masks, B, P]
    steps_ptr,  # [T, B] bytes, with MASKED
    seed_ptr,  # [1] int64, with OPT.random
    h0_ptr,  # [B, P]
    h_ptr,  # [T, B, P] out: h[t]
    state_ptr,  # [B, H], ACC dtype, in: the state before the first step; out: after the last
    extra_ptr,  # [T, B, H] out, with SAVE_EXTRA
    r_ptr,  # [T, B, H] out, with two products: the rows of the second
    drop_ptr,  # [T + 1, B, OPT.masks * P] out, with OPT.masks: h[t] times the masks; in: h0's, where step 0 reads
    normed_ptr,  # [T, B, G*H] out, with OPT.norm and SAVE_GATES: the normalised products, unscaled
    stats_ptr,  # [T, B, 4] out, ACC dtype, with OPT.norm and SAVE_GATES: mean and 1 / deviation of products and c
    sums_ptr,  # [4, B, N_H, 2], ACC dtype, with OPT.norm and N_H > 1: what programs send one another
    scratch_ptr,  # [B, (G + 2) * H], ACC dtype, with OPT.norm: what a part of a step hands over to the next launch
    counter_ptr,  # [groups * COUNTER_STRIDE] zeros, with SYNC
    error_ptr,  # [1], with SYNC
    T,  # steps of this launch
    B,
    start,  # where the first of them lies in memory
    chained,  # 1 where a launch before this one has done the steps before it
    first_group,  # of this launch: where the groups cannot all wait at once, they come in several
    CELL: tl.constexpr, OUTPUT: tl.constexpr, OPT: tl.constexpr,
    G: tl.constexpr, LANES: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr, TILES_P: tl.constexpr, N_H: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K_R: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    LOCAL: tl.constexpr, SYNC: tl.constexpr, RESIDENT: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRODUCT: tl.constexpr, CELLS: tl.constexpr, OUTPUTS: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
    SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    STORAGE: tl.constexpr = h_ptr.dtype.element_ty
    GATES: tl.constexpr = 2 if OPT.reset_before else G  # of the first product
    PER_GATE: tl.constexpr = OPT.masks > 1
    INTERLEAVED: tl.constexpr = not (PER_GATE or OPT.norm)
    NORM_C: tl.constexpr = OPT.norm and OPT.has_c
    ROW_STRIDE: tl.constexpr = P * (OPT.masks if OPT.masks > 0 else 1)
    HANDED_OVER: tl.constexpr = not (LOCAL or SYNC)
    DROPPED: tl.constexpr = OPT.masks > 0 and not LOCAL  # the group's rows are those times the masks
    PARAMS: tl.constexpr = OPT.params
    group = first_group + tl.program_id(0) // N_H
    member = tl.program_id(0) % N_H
    first_b = (group * BLOCK_B).to(tl.int64)
    stride_t = B.to(tl.int64)
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = first_b + offs_b < B
    if SYNC:
        counter_ptr += group * COUNTER_STRIDE

    # Where this program's hidden units lie, and its columns of h: the same, or those of the projection.
    units, units_masks, hidden, masks = own_tiles(offs_b, mask_b, member * TILES, H, BLOCK_H, TILES)
    offs_p, masks_p, h_own, h_masks = own_tiles(offs_b, mask_b, member * TILES_P, P, BLOCK_H, TILES_P)
    own_units = tl.minimum(tl.maximum(H - member * (TILES * BLOCK_H), 0), TILES * BLOCK_H)
    column_ptrs = ()
    masks_n = ()
    bias = ()
    resident = ()
    state = ()
    if CELLS or OPT.reset_before or (NORM_C and OUTPUTS):
        state = load_tiles(state_ptr + first_b * H, hidden, masks)
    if PRODUCT or CELLS:
        for tile in tl.static_range(TILES):
            if INTERLEAVED:
                offs_n = tl.arange(0, BLOCK_H * LANES)
                unit = (member * TILES + tile) * BLOCK_H + offs_n // LANES
                mask_n = (offs_n % LANES < GATES) & (unit < H)
                row = offs_n % LANES * H + unit
                column_ptrs = column_ptrs + (w_hh_ptr + row.to(tl.int64) * P,)
                masks_n = masks_n + (mask_n,)
                if HAS_BIAS:
                    bias = bias + (tl.load(b_hh_ptr + row, mask=mask_n, other=0.0).to(ACC),)
            else:
                for gate in tl.static_range(GATES):
                    if HAS_BIAS:
                        loaded = tl.load(b_hh_ptr + gate * H + units[tile], mask=units_masks[tile], other=0.0)
                        bias = bias + (loaded.to(ACC),)
                    if PER_GATE:
                        column_ptrs = column_ptrs + (w_hh_ptr + (gate * H + units[tile]).to(tl.int64) * P,)
                        masks_n = masks_n + (units_masks[tile],)
                if not PER_GATE:
                    offs_n = tl.arange(0, BLOCK_H * LANES)
                    unit = (member * TILES + tile) * BLOCK_H + offs_n // LANES
                    row = offs_n % LANES * H + unit
                    column_ptrs = column_ptrs + (w_hh_ptr + row.to(tl.int64) * P,)
                    masks_n = masks_n + ((offs_n % LANES < GATES) & (unit < H),)
        if PRODUCT and RESIDENT:
            resident = load_resident(column_ptrs, masks_n, 1, P, P, BLOCK_K, SPLIT_K)
    second_ptrs = ()
    second_masks = ()
    second_bias = ()
    resident_r = ()
    if SECOND and OPT.projected:
        for tile in tl.static_range(TILES_P):
            second_ptrs = second_ptrs + (w_hr_ptr + offs_p[tile].to(tl.int64) * H,)
        second_masks = masks_p
    if SECOND and OPT.reset_before:
        for tile in tl.static_range(TILES):
            second_ptrs = second_ptrs + (w_hh_ptr + (2 * H + units[tile]).to(tl.int64) * H,)
            if HAS_BIAS:
                loaded = tl.load(b_hh_ptr + 2 * H + units[tile], mask=units_masks[tile], other=0.0)
                second_bias = second_bias + (loaded.to(ACC),)
        second_masks = units_masks
    if SECOND and OPT.two_products and RESIDENT:
        resident_r = load_resident(second_ptrs, second_masks, 1, H, H, BLOCK_K_R, SPLIT_K)
    params = load_params(params_ptr, units, units_masks, PARAMS, H, ACC)
    masks_h = load_masks(mask_ptr, first_b, B, h_own, h_masks, OPT.masks, P, ACC)
    seed = 0
    if OPT.random:
        seed = tl.load(seed_ptr)

    h_ptr += (start * stride_t + first_b) * P
    if OPT.two_products:
        r_ptr += (start * stride_t + first_b) * H
    if SAVE_EXTRA:
        extra_ptr += (start * stride_t + first_b) * H
    gates_ptr += (start * stride_t + first_b) * (G * H)
    if MASKED:
        steps_ptr += start * stride_t + first_b
    if OPT.norm:
        if SAVE_GATES:
            normed_ptr += (start * stride_t + first_b) * (G * H)
            stats_ptr += (start * stride_t + first_b) * 4
        if not LOCAL:
            sums_ptr += first_b * (N_H * 2)
        if HANDED_OVER:
            scratch_ptr += first_b * ((G + 2) * H)
    if DROPPED:
        drop_ptr += ((start + (1 if REVERSE else 0)) * stride_t + first_b) * ROW_STRIDE
    if REVERSE:
        stride_t = -stride_t
    first_ptr = h0_ptr + first_b * P
    if not (LOCAL or SYNC):  # noqa: SIM102 - the one is known when this is compiled, the other is not
        if chained != 0:
            first_ptr = h_ptr - stride_t * P
    rows_ptr = drop_ptr if DROPPED else first_ptr
    CARRIES_H: tl.constexpr = LOCAL or MASKED or (OPT.has_c and OPT.zone_h[0] != 0.0)
    h = ()
    if CARRIES_H:
        h = load_tiles(first_ptr, h_own, h_masks)
    flags = mask_b.to(tl.int32)
    if MASKED:
        flags = tl.load(steps_ptr + offs_b, mask=mask_b, other=0).to(tl.int32)

    ok = True
    target = 0
    for step in tl.range(0, T, num_stages=1):
        x = ()
        if CELLS:
            x = load_planes(gates_ptr, units, offs_b, masks, GATES, H, G)
        x_n = ()
        if SECOND and OPT.reset_before:
            x_n = load_planes(gates_ptr + 2 * H, units, offs_b, masks, 1, H, G)
        mask_rows = mask_b
        counts = mask_b[:, None]
        if MASKED:
            counts = ((flags & 1) != 0)[:, None]
            keep = (flags & 2) == 0
            # The next step's come now: so they are not waited for, and no compiler can move them into the product.
            more = mask_b & (offs_b * 0 + step + 1 < T)
            flags = tl.load(steps_ptr + stride_t + offs_b, mask=more, other=0).to(tl.int32)
            mask_rows = mask_b & keep
            h = zero_rows(h, keep)
            state = zero_rows(state, keep)
        bits_h = ()
        bits_state = ()
        if OPT.random:
            t = start - step if REVERSE else start + step
            for tile in tl.static_range(TILES):
                for_h, for_c = draw(seed, t, first_b + offs_b, units[tile])
                bits_state = bits_state + ((for_c if OPT.has_c else for_h),)
                if not OPT.projected:
                    bits_h = bits_h + (for_h,)
            if OPT.projected:
                for tile in tl.static_range(TILES_P):
                    bits_h = bits_h + (draw(seed, t, first_b + offs_b, offs_p[tile])[0],)
        poison = 0.0
        sums_t = sums_ptr
        sums_c = sums_ptr
        if OPT.norm and not LOCAL:
            # Alternating: what was sent a step ago may still be read.
            sums_t = sums_ptr + step % 2 * (B.to(tl.int64) * (N_H * 2))
            sums_c = sums_t + B.to(tl.int64) * (N_H * 4)

        rows = ()
        if PRODUCT:
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            if LOCAL:
                rows = drop(h, masks_h, OPT.masks, STORAGE)
        products = ()
        totals, squares = 0.0, 0.0
        if OPT.norm and PRODUCT:
            for tile in tl.static_range(TILES):
                tiles = gate_products(
                    rows, rows_ptr, mask_rows, column_ptrs, masks_n, resident, poison, bias, tile, TILES_P,
                    G, LANES, PER_GATE, ROW_STRIDE, False, LOCAL, P, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT,
                    AHEAD, STAGES, DOT, ACC, PRECISION,
                )  # fmt: skip
                products = products + part_of(tiles, 0, G)
            totals, squares = own_moments(products, own_units * G, units_masks, G, ACC)
            if not LOCAL:
                send_sums(sums_t, totals, squares, offs_b, mask_b, member, N_H)
            if HANDED_OVER:
                store_planes(scratch_ptr, units, offs_b, masks, products, 0, G, H, G + 2, ACC)
            if SYNC:
                publish(counter_ptr)
        if OPT.norm and CELLS:
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            if HANDED_OVER:
                products = load_planes(scratch_ptr, units, offs_b, masks, G, H, G + 2)
            mean, scale = row_moments(
                totals, squares, sums_t, offs_b, mask_b, H, TILES * BLOCK_H, G, N_H, CHUNK, LOCAL, OPT.epsilon, ACC
            )  # fmt: skip
            products = normalise(products, mean + poison, scale, units_masks, G)
            if SAVE_GATES:
                store_planes(normed_ptr, units, offs_b, masks, products, 0, G, H, G, STORAGE)
                tl.store(stats_ptr + offs_b * 4, mean, mask=mask_b & (offs_b * 0 + member == 0))
                tl.store(stats_ptr + offs_b * 4 + 1, scale, mask=mask_b & (offs_b * 0 + member == 0))

        r = ()
        h_next = ()
        state_next = ()
        outs = ()
        made = ()
        update_gates = ()
        if CELLS:
            for tile in tl.static_range(TILES):
                h_tiles = ()
                if OPT.norm:
                    for gate in tl.static_range(G):
                        scaled = products[tile * G + gate] * params[tile * PARAMS + OPT.norm_row + gate]
                        if HAS_BIAS:
                            scaled += bias[tile * G + gate][None, :]
                        h_tiles = h_tiles + (scaled,)
                else:
                    h_tiles = gate_products(
                        rows, rows_ptr, mask_rows, column_ptrs, masks_n, resident, poison, bias, tile, TILES_P,
                        GATES, LANES, PER_GATE, ROW_STRIDE, HAS_BIAS, LOCAL, P, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K,
                        RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                    )  # fmt: skip
                x_tiles = ()
                for gate in tl.static_range(GATES):
                    x_tiles = x_tiles + (x[tile * GATES + gate].to(ACC),)
                if OPT.reset_before:
                    r_t, z, kept = gru_reset(x_tiles, h_tiles, state[tile], OPT)
                    if OPT.masks > 0:
                        r_t *= masks_h[(2 if PER_GATE else 0) * TILES_P + tile]
                    tl.store(r_ptr + hidden[tile], r_t.to(STORAGE), mask=masks[tile])
                    r = r + (r_t.to(STORAGE),)
                    update_gates = update_gates + (z,)
                    if SYNC:
                        publish(counter_ptr)
                    if SAVE_GATES or HANDED_OVER:
                        store_planes(
                            gates_ptr, (units[tile],), offs_b, (masks[tile],), kept, 0, 2, H, G, STORAGE
                        )  # fmt: skip
                else:
                    own_params = part_of(params, tile, PARAMS)
                    out, state_t, kept, extra = CELL(x_tiles, h_tiles, state[tile], own_params, OPT)
                    if NORM_C:
                        outs = outs + (out,)
                        made = made + (tl.where(units_masks[tile][None, :], state_t, tl.zeros_like(state_t)),)
                    else:
                        h_t = OUTPUT(out, state_t, OPT)
                    if not NORM_C:
                        state_t = zone(
                            state_t, state[tile], bits_state[tile] if OPT.random else 0, OPT.zone_state, OPT.random
                        )  # fmt: skip
                        if not OPT.has_c and OPT.zone_state[0] != 0.0:
                            h_t = state_t
                        if MASKED:
                            state_t = tl.where(counts, state_t, state[tile])
                            extra = tl.where(counts, extra, state[tile])
                        if OPT.has_c:
                            extra = state_t
                        state_next = state_next + (state_t,)
                    if OPT.projected and not NORM_C:
                        tl.store(r_ptr + hidden[tile], h_t.to(STORAGE), mask=masks[tile])
                        r = r + (h_t.to(STORAGE),)
                    elif not NORM_C:
                        h_next = h_next + (
                            emit(
                                h_t, h, bits_h, counts, h_ptr, h_own, h_masks, rows_ptr + stride_t * ROW_STRIDE,
                                masks_h, offs_b, offs_p, tile, OPT, TILES_P, P, LOCAL, MASKED, STORAGE,
                            ),
                        )  # fmt: skip
                    if SYNC and not NORM_C:  # and so TILES == 1; what backward needs may come after the others go on
                        publish(counter_ptr)
                    if SAVE_EXTRA and not NORM_C:
                        tl.store(extra_ptr + hidden[tile], extra.to(STORAGE), mask=masks[tile])
                    if SAVE_GATES:
                        store_planes(
                            gates_ptr, (units[tile],), offs_b, (masks[tile],), kept, 0, G, H, G, STORAGE
                        )  # fmt: skip
            if not (OPT.reset_before or NORM_C):
                state = state_next

        if NORM_C and CELLS:
            totals, squares = own_moments(made, own_units, units_masks, 1, ACC)
            if not LOCAL:
                send_sums(sums_c, totals, squares, offs_b, mask_b, member, N_H)
            if HANDED_OVER:
                store_planes(scratch_ptr, units, offs_b, masks, outs, G, 1, H, G + 2, ACC)
                store_planes(scratch_ptr, units, offs_b, masks, made, G + 1, 1, H, G + 2, ACC)
            if SYNC:
                publish(counter_ptr)
        if NORM_C and OUTPUTS:
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            if HANDED_OVER:
                outs = load_planes(scratch_ptr + G * H, units, offs_b, masks, 1, H, G + 2)
                made = load_planes(scratch_ptr + (G + 1) * H, units, offs_b, masks, 1, H, G + 2)
            mean, scale = row_moments(
                totals, squares, sums_c, offs_b, mask_b, H, TILES * BLOCK_H, 1, N_H, CHUNK, LOCAL, OPT.epsilon, ACC
            )  # fmt: skip
            if SAVE_GATES:
                tl.store(stats_ptr + offs_b * 4 + 2, mean, mask=mask_b & (offs_b * 0 + member == 0))
                tl.store(stats_ptr + offs_b * 4 + 3, scale, mask=mask_b & (offs_b * 0 + member == 0))
            made = normalise(made, mean + poison, scale, units_masks, 1)
            for tile in tl.static_range(TILES):
                c = made[tile] * params[tile * PARAMS + OPT.norm_row + G] + params[tile * PARAMS + OPT.norm_row + G + 1]
                h_t = OUTPUT(outs[tile], c, OPT)
                c = zone(c, state[tile], bits_state[tile] if OPT.random else 0, OPT.zone_state, OPT.random)
                if MASKED:
                    c = tl.where(counts, c, state[tile])
                state_next = state_next + (c,)
                if OPT.projected:
                    tl.store(r_ptr + hidden[tile], h_t.to(STORAGE), mask=masks[tile])
                    r = r + (h_t.to(STORAGE),)
                else:
                    h_next = h_next + (
                        emit(
                            h_t, h, bits_h, counts, h_ptr, h_own, h_masks, rows_ptr + stride_t * ROW_STRIDE, masks_h,
                            offs_b, offs_p, tile, OPT, TILES_P, P, LOCAL, MASKED, STORAGE,
                        ),
                    )  # fmt: skip
            state = state_next
            if SYNC:
                publish(counter_ptr)
            if SAVE_EXTRA:
                store_planes(extra_ptr, units, offs_b, masks, state, 0, 1, H, 1, STORAGE)

        if SECOND and OPT.two_products:
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            has_second = mask_b
            if OPT.projected:
                has_second = mask_b & (offs_b * 0 + member * BLOCK_H < P)
            if OPT.reset_before and HANDED_OVER:
                for tile in tl.static_range(TILES):
                    z = tl.load(
                        gates_ptr + offs_b[:, None] * (G * H) + H + units[tile][None, :], mask=masks[tile], other=0.0
                    )
                    update_gates = update_gates + (reopen(z.to(ACC), OPT.recurrent, OPT),)
            state_next = ()
            for tile in tl.static_range(TILES_P):
                h_t = product(
                    r, r_ptr, H, has_second, second_ptrs, second_masks, 1, resident_r, poison, tile, 0,
                    LOCAL, H, H, BLOCK_B, BLOCK_H, BLOCK_K_R, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                )  # fmt: skip
                kept_n = h_t
                if OPT.reset_before:
                    if HAS_BIAS:
                        h_t += second_bias[tile][None, :]
                    h_t, kept_n = gru_update(h_t + x_n[tile].to(ACC), update_gates[tile], state[tile], OPT)
                    h_t = zone(h_t, state[tile], bits_h[tile] if OPT.random else 0, OPT.zone_h, OPT.random)
                    state_t = h_t
                    if MASKED:
                        state_t = tl.where(counts, state_t, state[tile])
                    state_next = state_next + (state_t,)
                h_next = h_next + (
                    emit(
                        h_t, h, bits_h, counts, h_ptr, h_own, h_masks, rows_ptr + stride_t * ROW_STRIDE, masks_h,
                        offs_b, offs_p, tile, OPT, TILES_P, P, LOCAL, MASKED, STORAGE,
                    ),
                )  # fmt: skip
                if SYNC and OPT.reset_before:
                    publish(counter_ptr)
                if OPT.reset_before and SAVE_GATES:
                    store_planes(
                        gates_ptr, (units[tile],), offs_b, (masks[tile],), (kept_n,), 2, 1, H, G, STORAGE
                    )  # fmt: skip
            if OPT.reset_before:
                state = state_next
            if SYNC and OPT.projected:
                publish(counter_ptr)
        if CARRIES_H and len(h_next) > 0:
            h = h_next

        if DROPPED:
            rows_ptr += stride_t * ROW_STRIDE
        else:
            rows_ptr = h_ptr
        h_ptr += stride_t * P
        if OPT.two_products:
            r_ptr += stride_t * H
        if SAVE_EXTRA:
            extra_ptr += stride_t * H
        gates_ptr += stride_t * (G * H)
        if OPT.norm and SAVE_GATES:
            normed_ptr += stride_t * (G * H)
            stats_ptr += stride_t * 4
        if MASKED:
            steps_ptr += stride_t

    if SECOND if OPT.reset_before else (OUTPUTS if NORM_C else CELLS):
        store_tiles(state_ptr + first_b * H, hidden, masks, state)
    if SYNC:
        give_up(counter_ptr, error_ptr, ok)
