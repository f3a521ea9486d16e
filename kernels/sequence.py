"""The two sequence kernels: gate product plus cell, over time. Every cell and every schedule is made from this text.

Programs form groups of N_H; a group owns BLOCK_B rows of the batch, a program TILES * BLOCK_H hidden units of every
gate. Forward, at each step: h_gates = h[t-1] W_hh^T, cell, store h[t]. Backward mirrors it: dh = da[t+1] W_hh, cell,
store da[t].
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

O (launch.Options) has the cell's own flags: O.projected, h[t] = r[t] W_hr^T has P columns, of which a program owns
TILES_P tiles (some programs own none). O.reset_before, the GRU that multiplies twice. O.masks, h[t-1] is multiplied by
one mask, or one a gate, before W_hh is (recurrent dropout; Gal and Ghahramani 2016). O.norm, layer normalisation.
MASKED reads a byte a row and step: bit 1, the step counts, else h and state are held and no gradient arises; bit 2,
h and state are zeroed before it.

Inside a tile of the product the gates are interleaved, unit-major with the gate fastest, LANES (their number rounded up
to a power of two) columns a unit: one product serves all gates, and splitting it into a tile a gate crosses no warp. In
memory nothing is interleaved. With a mask for each gate, every gate has rows, and so a product, of its own.
"""

import triton
import triton.language as tl

from .activations import clip
from .cells import (
    gru_reset,
    gru_reset_backward,
    gru_update,
    gru_update_backward,
    reopen,
)
from .norm import normalise, own_gradient_sums, own_moments, row_gradients, row_moments, send_sums
from .product import load_resident, product
from .sync import COUNTER_STRIDE, give_up, publish, wait
from .tiles import (
    as_type,
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
from .zoneout import draw, zone, zone_gradient


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
    TILE: tl.constexpr, O: tl.constexpr, TILES_P: tl.constexpr, P: tl.constexpr, LOCAL: tl.constexpr,
    MASKED: tl.constexpr, STORAGE: tl.constexpr,
):  # fmt: skip
    """Tile TILE of h[t], and of h[t] times the masks, to memory; returns what was stored. h: h[t-1], where it is held."""
    if O.has_c and O.zone_h[0] != 0.0:
        h_t = zone(h_t, h[TILE].to(h_t.dtype), bits[TILE] if O.random else 0, O.zone_h, O.random)
    stored = h_t.to(STORAGE)
    if MASKED:
        stored = tl.where(counts, stored, h[TILE])
    tl.store(h_ptr + h_own[TILE], stored, mask=h_masks[TILE])
    MASKS: tl.constexpr = O.masks
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
    w_hr_ptr,  # [P, H], with O.projected
    params_ptr,  # [O.params, H]
    mask_ptr,  # [O.masks, B, P]
    steps_ptr,  # [T, B] bytes, with MASKED
    seed_ptr,  # [1] int64, with O.random
    h0_ptr,  # [B, P]
    h_ptr,  # [T, B, P] out: h[t]
    state_ptr,  # [B, H], ACC dtype, in: the state before the first step; out: after the last
    extra_ptr,  # [T, B, H] out, with SAVE_EXTRA
    r_ptr,  # [T, B, H] out, with two products: the rows of the second
    drop_ptr,  # [T + 1, B, O.masks * P], with O.masks: h[t] times the masks; in: those of h0, where the first step reads
    normed_ptr,  # [T, B, G*H] out, with O.norm and SAVE_GATES: the normalised products, unscaled
    stats_ptr,  # [T, B, 4] out, ACC dtype, with O.norm and SAVE_GATES: mean and 1 / deviation of the products and of c
    sums_ptr,  # [4, B, N_H, 2], ACC dtype, with O.norm and N_H > 1: what programs send one another
    scratch_ptr,  # [B, (G + 2) * H], ACC dtype, with O.norm: what a part of a step hands over to the next launch
    counter_ptr,  # [groups * COUNTER_STRIDE] zeros, with SYNC
    error_ptr,  # [1], with SYNC
    T,  # steps of this launch
    B,
    start,  # where the first of them lies in memory
    chained,  # 1 where a launch before this one has done the steps before it
    first_group,  # of this launch: where the groups cannot all wait at once, they come in several
    CELL: tl.constexpr, OUTPUT: tl.constexpr, O: tl.constexpr, G: tl.constexpr, LANES: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr, TILES_P: tl.constexpr, N_H: tl.constexpr,
    MEMBERS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K_R: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    LOCAL: tl.constexpr, SYNC: tl.constexpr, RESIDENT: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRODUCT: tl.constexpr, CELLS: tl.constexpr, OUTPUTS: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
    SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    STORAGE: tl.constexpr = h_ptr.dtype.element_ty
    GATES: tl.constexpr = 2 if O.reset_before else G  # of the first product
    PER_GATE: tl.constexpr = O.masks > 1
    INTERLEAVED: tl.constexpr = not (PER_GATE or O.norm)
    NORM_C: tl.constexpr = O.norm and O.has_c
    ROW_STRIDE: tl.constexpr = P * (O.masks if O.masks > 0 else 1)
    HANDED_OVER: tl.constexpr = not (LOCAL or SYNC)
    DROPPED: tl.constexpr = O.masks > 0 and not LOCAL  # the group's rows are those times the masks
    PARAMS: tl.constexpr = O.params
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
    if CELLS or O.reset_before or (NORM_C and OUTPUTS):
        state = load_tiles(state_ptr + first_b * H, hidden, masks)
    second_ptrs = ()
    second_masks = ()
    second_bias = ()
    resident_r = ()
    if SECOND and O.projected:
        for tile in tl.static_range(TILES_P):
            second_ptrs = second_ptrs + (w_hr_ptr + offs_p[tile].to(tl.int64) * H,)
        second_masks = masks_p
    if SECOND and O.reset_before:
        for tile in tl.static_range(TILES):
            second_ptrs = second_ptrs + (w_hh_ptr + (2 * H + units[tile]).to(tl.int64) * H,)
            if HAS_BIAS:
                loaded = tl.load(b_hh_ptr + 2 * H + units[tile], mask=units_masks[tile], other=0.0)
                second_bias = second_bias + (loaded.to(ACC),)
        second_masks = units_masks
    if SECOND and O.two_products and RESIDENT:
        resident_r = load_resident(second_ptrs, second_masks, 1, H, H, BLOCK_K_R, SPLIT_K)
    params = load_params(params_ptr, units, units_masks, PARAMS, H, ACC)
    masks_h = load_masks(mask_ptr, first_b, B, h_own, h_masks, O.masks, P, ACC)
    seed = 0
    if O.random:
        seed = tl.load(seed_ptr)

    h_ptr += (start * stride_t + first_b) * P
    if O.two_products:
        r_ptr += (start * stride_t + first_b) * H
    if SAVE_EXTRA:
        extra_ptr += (start * stride_t + first_b) * H
    gates_ptr += (start * stride_t + first_b) * (G * H)
    if MASKED:
        steps_ptr += start * stride_t + first_b
    if O.norm:
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
    CARRIES_H: tl.constexpr = LOCAL or MASKED or (O.has_c and O.zone_h[0] != 0.0)
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
        if SECOND and O.reset_before:
            x_n = load_planes(gates_ptr + 2 * H, units, offs_b, masks, 1, H, G)
        mask_rows = mask_b
        counts = mask_b[:, None]
        if MASKED:
            counts = ((flags & 1) != 0)[:, None]
            keep = (flags & 2) == 0
            # The next step's come now: so they are not waited for, and no compiler can move them into the product.
            flags = tl.load(steps_ptr + stride_t + offs_b, mask=mask_b & (step + 1 < T), other=0).to(tl.int32)
            mask_rows = mask_b & keep
            h = zero_rows(h, keep)
            state = zero_rows(state, keep)
        bits_h = ()
        bits_state = ()
        if O.random:
            t = start - step if REVERSE else start + step
            for tile in tl.static_range(TILES):
                for_h, for_c = draw(seed, t, first_b + offs_b, units[tile])
                bits_state = bits_state + ((for_c if O.has_c else for_h),)
                if not O.projected:
                    bits_h = bits_h + (for_h,)
            if O.projected:
                for tile in tl.static_range(TILES_P):
                    bits_h = bits_h + (draw(seed, t, first_b + offs_b, offs_p[tile])[0],)
        poison = 0.0
        sums_t = sums_ptr
        sums_c = sums_ptr
        if O.norm and not LOCAL:
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
                rows = drop(h, masks_h, O.masks, STORAGE)
        products = ()
        totals, squares = 0.0, 0.0
        if O.norm and PRODUCT:
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
        if O.norm and CELLS:
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            if HANDED_OVER:
                products = load_planes(scratch_ptr, units, offs_b, masks, G, H, G + 2)
            mean, scale = row_moments(
                totals, squares, sums_t, offs_b, mask_b, H, TILES * BLOCK_H, G, N_H, MEMBERS, LOCAL, O.epsilon
            )  # fmt: skip
            products = normalise(products, mean + poison, scale, units_masks, G)
            if SAVE_GATES:
                store_planes(normed_ptr, units, offs_b, masks, products, 0, G, H, G, STORAGE)
                tl.store(stats_ptr + offs_b * 4, mean, mask=mask_b & (member == 0))
                tl.store(stats_ptr + offs_b * 4 + 1, scale, mask=mask_b & (member == 0))

        r = ()
        h_next = ()
        state_next = ()
        outs = ()
        made = ()
        update_gates = ()
        if CELLS:
            for tile in tl.static_range(TILES):
                h_tiles = ()
                if O.norm:
                    for gate in tl.static_range(G):
                        scaled = products[tile * G + gate] * params[tile * PARAMS + O.norm_row + gate]
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
                if O.reset_before:
                    r_t, z, kept = gru_reset(x_tiles, h_tiles, state[tile], O)
                    if O.masks > 0:
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
                    out, state_t, kept, extra = CELL(x_tiles, h_tiles, state[tile], own_params, O)
                    if NORM_C:
                        outs = outs + (out,)
                        made = made + (tl.where(units_masks[tile][None, :], state_t, tl.zeros_like(state_t)),)
                    else:
                        h_t = OUTPUT(out, state_t, O)
                    if not NORM_C:
                        state_t = zone(
                            state_t, state[tile], bits_state[tile] if O.random else 0, O.zone_state, O.random
                        )  # fmt: skip
                        if not O.has_c and O.zone_state[0] != 0.0:
                            h_t = state_t
                        if MASKED:
                            state_t = tl.where(counts, state_t, state[tile])
                            extra = tl.where(counts, extra, state[tile])
                        if O.has_c:
                            extra = state_t
                        state_next = state_next + (state_t,)
                    if O.projected and not NORM_C:
                        tl.store(r_ptr + hidden[tile], h_t.to(STORAGE), mask=masks[tile])
                        r = r + (h_t.to(STORAGE),)
                    elif not NORM_C:
                        h_next = h_next + (
                            emit(
                                h_t, h, bits_h, counts, h_ptr, h_own, h_masks, rows_ptr + stride_t * ROW_STRIDE, masks_h,
                                offs_b, offs_p, tile, O, TILES_P, P, LOCAL, MASKED, STORAGE,
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
            if not (O.reset_before or NORM_C):
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
                totals, squares, sums_c, offs_b, mask_b, H, TILES * BLOCK_H, 1, N_H, MEMBERS, LOCAL, O.epsilon
            )  # fmt: skip
            if SAVE_GATES:
                tl.store(stats_ptr + offs_b * 4 + 2, mean, mask=mask_b & (member == 0))
                tl.store(stats_ptr + offs_b * 4 + 3, scale, mask=mask_b & (member == 0))
            made = normalise(made, mean + poison, scale, units_masks, 1)
            for tile in tl.static_range(TILES):
                NORM_ROW: tl.constexpr = O.norm_row + G
                c = made[tile] * params[tile * PARAMS + NORM_ROW] + params[tile * PARAMS + NORM_ROW + 1]
                h_t = OUTPUT(outs[tile], c, O)
                c = zone(c, state[tile], bits_state[tile] if O.random else 0, O.zone_state, O.random)
                if MASKED:
                    c = tl.where(counts, c, state[tile])
                state_next = state_next + (c,)
                if O.projected:
                    tl.store(r_ptr + hidden[tile], h_t.to(STORAGE), mask=masks[tile])
                    r = r + (h_t.to(STORAGE),)
                else:
                    h_next = h_next + (
                        emit(
                            h_t, h, bits_h, counts, h_ptr, h_own, h_masks, rows_ptr + stride_t * ROW_STRIDE, masks_h,
                            offs_b, offs_p, tile, O, TILES_P, P, LOCAL, MASKED, STORAGE,
                        ),
                    )  # fmt: skip
            state = state_next
            if SYNC:
                publish(counter_ptr)
            if SAVE_EXTRA:
                store_planes(extra_ptr, units, offs_b, masks, state, 0, 1, H, 1, STORAGE)

        if SECOND and O.two_products:
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            has_second = mask_b
            if O.projected:
                has_second = mask_b & (member * BLOCK_H < P)
            if O.reset_before and HANDED_OVER:
                for tile in tl.static_range(TILES):
                    z = tl.load(gates_ptr + offs_b[:, None] * (G * H) + H + units[tile][None, :], mask=masks[tile], other=0.0)
                    update_gates = update_gates + (reopen(z.to(ACC), O.recurrent, O),)
            state_next = ()
            for tile in tl.static_range(TILES_P):
                h_t = product(
                    r, r_ptr, H, has_second, second_ptrs, second_masks, 1, resident_r, poison, tile, 0,
                    LOCAL, H, H, BLOCK_B, BLOCK_H, BLOCK_K_R, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                )  # fmt: skip
                kept_n = h_t
                if O.reset_before:
                    if HAS_BIAS:
                        h_t += second_bias[tile][None, :]
                    h_t, kept_n = gru_update(h_t + x_n[tile].to(ACC), update_gates[tile], state[tile], O)
                    h_t = zone(h_t, state[tile], bits_h[tile] if O.random else 0, O.zone_h, O.random)
                    state_t = h_t
                    if MASKED:
                        state_t = tl.where(counts, state_t, state[tile])
                    state_next = state_next + (state_t,)
                h_next = h_next + (
                    emit(
                        h_t, h, bits_h, counts, h_ptr, h_own, h_masks, rows_ptr + stride_t * ROW_STRIDE, masks_h,
                        offs_b, offs_p, tile, O, TILES_P, P, LOCAL, MASKED, STORAGE,
                    ),
                )  # fmt: skip
                if SYNC and O.reset_before:
                    publish(counter_ptr)
                if O.reset_before and SAVE_GATES:
                    store_planes(
                        gates_ptr, (units[tile],), offs_b, (masks[tile],), (kept_n,), 2, 1, H, G, STORAGE
                    )  # fmt: skip
            if O.reset_before:
                state = state_next
            if SYNC and O.projected:
                publish(counter_ptr)
        if CARRIES_H and len(h_next) > 0:
            h = h_next

        if DROPPED:
            rows_ptr += stride_t * ROW_STRIDE
        else:
            rows_ptr = h_ptr
        h_ptr += stride_t * P
        if O.two_products:
            r_ptr += stride_t * H
        if SAVE_EXTRA:
            extra_ptr += stride_t * H
        gates_ptr += stride_t * (G * H)
        if O.norm and SAVE_GATES:
            normed_ptr += stride_t * (G * H)
            stats_ptr += stride_t * 4
        if MASKED:
            steps_ptr += stride_t

    if SECOND if O.reset_before else (OUTPUTS if NORM_C else CELLS):
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
    """sums, ROWS tiles for each of a program's, with `found` added to those of TILE from row FIRST on, where it counts."""
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
    CELL: tl.constexpr, dout, dmade, dstate, kept, made, state_prev, extra, params, dparams, dcells_ptr, hidden, mask, bits,
    counts, TILE: tl.constexpr, O: tl.constexpr, HAS_DCELLS: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Back through one tile of the cell, and of zoneout and the skipped steps around it.

    dmade: by the state that the cell made, through h; with layer normalisation all of it.
    """
    dstate = dstate_now(dstate, dcells_ptr, hidden, mask, HAS_DCELLS)
    dnew = dstate
    if O.has_c:
        dnew, dheld = zone_gradient(dstate, bits, O.zone_state, O.random)
    if O.has_c and O.norm:
        dnew = dmade
    else:
        dnew += dmade
    slots, dh_direct, dstate_prev, found = CELL(
        dout, dnew, kept, made, state_prev, extra, part_of(params, TILE, O.params), O
    )
    if O.has_c:
        dstate_prev += dheld
    if MASKED:
        dstate_prev = tl.where(counts, dstate_prev, dstate)
        counted = ()
        for slot in tl.static_range(len(slots)):
            counted = counted + (tl.where(counts, slots[slot], tl.zeros_like(slots[slot])),)
        slots = counted
    if len(found) > 0:
        dparams = add_rows(dparams, found, counts, TILE, O.dparams, 0)
    return slots, dh_direct, dstate_prev, dparams


@triton.jit
def recurrent_slots(slots, O: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    """Those by the recurrent product."""
    found = ()
    for gate in tl.static_range(G):
        found = found + (slots[O.h_slot + gate].to(DTYPE),)
    return found


@triton.jit(do_not_specialize=["T", "B", "start", "first_step", "chained", "last", "first_group"])
def sequence_backward(
    dy_ptr,  # [T, B, P]
    dcells_ptr,  # [T, B, H] by state[t] from outside, with HAS_DCELLS
    gates_ptr,  # [T, B, G*H] the gates as the forward kernel left them, with SAVE_GATES
    states_ptr,  # [T, B, H] state[t]
    state0_ptr,  # [B, H] the state before the first step
    extra_ptr,  # [T, B, H], with SAVE_EXTRA
    normed_ptr,  # [T, B, G*H], with O.norm
    stats_ptr,  # [T, B, 4], with O.norm
    w_hh_ptr,  # [G*H, P]
    w_hr_ptr,  # [P, H], with O.projected
    params_ptr,  # [O.params, H]
    mask_ptr,  # [O.masks, B, P]
    steps_ptr,  # [T, B] bytes, with MASKED
    seed_ptr,  # [1] int64, with O.random
    slots_ptr,  # [T, B, D*H] out: gradients by the pre-activations
    dh_all_ptr,  # [T, B, P] out, with O.projected: the gradient by what h was projected to, where the step counts
    dh_ptr,  # [B, P], ACC dtype, in: by h after the last step; out: by h0, without what goes through W_hh
    dstate_ptr,  # [B, H], ACC dtype, in: by the state after the last step; out: by the state before the first
    dparams_ptr,  # [B, O.dparams * H], ACC dtype, in and out: by params, and with O.norm by b_hh, summed over time
    sums_ptr,  # [4, B, N_H, 2], ACC dtype, with O.norm and N_H > 1: what programs send one another
    scratch_ptr,  # [B, (G + 2) * H], ACC dtype, with O.norm: what a part of a step hands over to the next launch
    counter_ptr,  # [groups * COUNTER_STRIDE] zeros, with SYNC
    error_ptr,  # [1], with SYNC
    T,
    B,
    start,
    first_step,  # where step 0 in memory lies in the whole sequence
    chained,
    last,  # 1 where the last step of this launch is the first of the sequence
    first_group,
    CELL: tl.constexpr, OUTPUT: tl.constexpr, MADE: tl.constexpr, O: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    H_SLOT: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr, TILES_P: tl.constexpr, N_H: tl.constexpr,
    MEMBERS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K_R: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr, LOCAL: tl.constexpr, SYNC: tl.constexpr, RESIDENT: tl.constexpr, REVERSE: tl.constexpr,
    PRODUCT: tl.constexpr, SECOND: tl.constexpr, CELLS: tl.constexpr, OUTPUTS: tl.constexpr, MASKED: tl.constexpr,
    HAS_DCELLS: tl.constexpr, SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    STORAGE: tl.constexpr = slots_ptr.dtype.element_ty
    GATES: tl.constexpr = 2 if O.reset_before else G  # of the first product
    NORM_C: tl.constexpr = O.norm and O.has_c
    HANDED_OVER: tl.constexpr = not (LOCAL or SYNC)
    SEGMENT: tl.constexpr = H if (LOCAL or O.masks > 1) else GATES * H
    PARAMS: tl.constexpr = O.params
    ROWS: tl.constexpr = O.dparams
    OWNS_DH: tl.constexpr = PRODUCT or O.reset_before
    OWN_SLOTS: tl.constexpr = G if O.norm else D  # that the cell finds
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
    if O.projected:
        dh_all_ptr += (start * stride_t + first_b) * P
    if O.norm:
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
    if SECOND and O.projected:
        for tile in tl.static_range(TILES):
            second_ptrs = second_ptrs + (w_hr_ptr + units[tile],)
        if RESIDENT:
            resident_r = load_resident(second_ptrs, masks_n, H, P, P, BLOCK_K_R, SPLIT_K)
    if SECOND and O.reset_before:
        for tile in tl.static_range(TILES):
            second_ptrs = second_ptrs + (w_hh_ptr + 2 * H * H + units[tile],)
        if RESIDENT:
            resident_r = load_resident(second_ptrs, masks_n, H, H, H, BLOCK_K_R, SPLIT_K)
    dstate = ()
    state = ()
    dparams = ()
    if CELLS or (SECOND and O.norm):
        dstate = load_tiles(dstate_ptr + first_b * H, hidden, masks)
        for tile in tl.static_range(TILES):
            state = state + (tl.load(states_ptr + hidden[tile], mask=masks[tile], other=0.0).to(ACC),)
    params = load_params(params_ptr, units, masks_n, PARAMS, H, ACC)
    if ROWS > 0:
        dparams = load_planes(dparams_ptr + first_b * (ROWS * H), units, offs_b, masks, ROWS, H, ROWS)
    masks_h = load_masks(mask_ptr, first_b, B, h_own, h_masks, O.masks, P, ACC)
    seed = 0
    if O.random:
        seed = tl.load(seed_ptr)
    da = ()
    if LOCAL:
        for _ in tl.static_range(GATES * TILES):
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
        if PRODUCT:
            dy = load_tiles(dy_ptr, h_own, h_masks)
        previous = ()
        gates = ()
        extra = ()
        normed = ()
        scale_h, mean_c, scale_c = 0.0, 0.0, 0.0
        if not O.projected:
            previous, gates, extra = load_saved(
                previous_ptr, gates_ptr, extra_ptr, units, offs_b, hidden, masks, G, H, SAVE_GATES, SAVE_EXTRA
            )
        if O.norm:
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
        if O.random:
            t = first_step + (start + step if REVERSE else start - step)
            for tile in tl.static_range(TILES):
                for_h, for_c = draw(seed, t, first_b + offs_b, units[tile])
                bits_c = bits_c + (for_c,)
                if not O.projected:
                    bits_h = bits_h + (for_h,)
            if O.projected:
                for tile in tl.static_range(TILES_P):
                    bits_h = bits_h + (draw(seed, t, first_b + offs_b, offs_p[tile])[0],)
        sums_t = sums_ptr
        sums_c = sums_ptr
        if O.norm and not LOCAL:
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
        if O.projected:
            has_next = has_next & (member * BLOCK_H < P)
        dh_next = ()
        dh_tiles = ()
        da_next = ()
        if PRODUCT and O.two_products:
            for tile in tl.static_range(TILES_P):
                dh_t = h_gradient(
                    da, rows_ptr, has_next, column_ptrs, masks_p, resident, poison, masks_h, tile, TILES, TILES_P,
                    GATES, O.masks, D * H, LOCAL, H, P, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES,
                    DOT, ACC, PRECISION,
                )  # fmt: skip
                dh_t = dy[tile].to(ACC) + dh[tile] + dh_t
                dnew, dheld = zone_gradient(dh_t, bits_h[tile] if O.random else 0, O.zone_h, O.random)
                if O.reset_before:
                    state_prev = previous[tile].to(ACC)
                    if MASKED:
                        state_prev = tl.where(keep[:, None], state_prev, tl.zeros_like(state_prev))
                    kept = part_of(gates, tile, G)
                    kept = (kept[0].to(ACC), kept[1].to(ACC), kept[2].to(ACC))
                    dz, dn, direct = gru_update_backward(dnew, kept, state_prev, O)
                    dheld += direct
                    if MASKED:
                        dz = tl.where(counts, dz, tl.zeros_like(dz))
                        dn = tl.where(counts, dn, tl.zeros_like(dn))
                    store_planes(slots_ptr, (units[tile],), offs_b, (masks[tile],), (dz, dn), 1, 2, H, D, STORAGE)
                    da_next = da_next + (dz.to(STORAGE),)
                    dh_tiles = dh_tiles + (dn.to(STORAGE),)
                if MASKED:
                    dheld = tl.where(counts, dheld, dh_t)
                    dnew = tl.where(counts, dnew, tl.zeros_like(dnew))
                if O.projected:
                    tl.store(dh_all_ptr + h_own[tile], dnew.to(STORAGE), mask=h_masks[tile])
                    dh_tiles = dh_tiles + (dnew.to(STORAGE),)
                dh_next = dh_next + (dheld,)
            if SYNC:
                publish(counter_ptr)
        if SECOND and O.two_products:
            if O.projected:
                previous, gates, extra = load_saved(
                    previous_ptr, gates_ptr, extra_ptr, units, offs_b, hidden, masks, G, H, SAVE_GATES, SAVE_EXTRA
                )
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
        if SECOND and O.reset_before:
            if HANDED_OVER:
                dh_next = dh
            dh_reset = ()
            da_reset = ()
            for tile in tl.static_range(TILES):
                dreset = product(
                    dh_tiles, slots_ptr + 2 * H, D * H, mask_b, second_ptrs, masks_n, H, resident_r, poison, tile, 0,
                    LOCAL, H, H, BLOCK_B, BLOCK_H, BLOCK_K_R, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                )  # fmt: skip
                if O.masks > 0:
                    dreset *= masks_h[(2 if O.masks > 1 else 0) * TILES_P + tile]
                state_prev = previous[tile].to(ACC)
                if MASKED:
                    state_prev = tl.where(keep[:, None], state_prev, tl.zeros_like(state_prev))
                dr, direct = gru_reset_backward(dreset, gates[tile * G].to(ACC), state_prev, O)
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
        if (SECOND or CELLS) and not O.reset_before:
            for tile in tl.static_range(TILES):
                state_t = previous[tile].to(ACC)
                state_prev = state_t
                if MASKED:
                    state_prev = tl.where(keep[:, None], state_t, tl.zeros_like(state_t))
                kept = kept_gates(gates, tile, G, SAVE_GATES, ACC)
                made = MADE(kept, state[tile], state_prev, O)
                c = clip(made, O.cell_clip)
                if NORM_C:
                    c = (c - mean_c[:, None]) * scale_c[:, None]
                    c = tl.where(masks_n[tile][None, :], c, tl.zeros_like(c))
                    normal = normal + (c,)
                    scale = params[tile * PARAMS + O.norm_row + G]
                    c = c * scale + params[tile * PARAMS + O.norm_row + G + 1]
                if SECOND:
                    if O.projected:
                        dh_t = product(
                            dh_tiles, dh_all_ptr, P, mask_b, second_ptrs, masks_n, H, resident_r, poison, tile, 0,
                            LOCAL, P, P, BLOCK_B, BLOCK_H, BLOCK_K_R, SPLIT_K, RESIDENT, AHEAD, STAGES,
                            DOT, ACC, PRECISION,
                        )  # fmt: skip
                        dnew, dheld = dh_t, tl.zeros_like(dh_t)
                    else:
                        dh_t = h_gradient(
                            da, rows_ptr, has_next, column_ptrs, masks_p, resident, poison, masks_h, tile, TILES,
                            TILES_P, GATES, O.masks, D * H, LOCAL, H, P, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT,
                            AHEAD, STAGES, DOT, ACC, PRECISION,
                        )  # fmt: skip
                        dh_t = dy[tile].to(ACC) + dh[tile] + dh_t
                        dnew, dheld = zone_gradient(dh_t, bits_h[tile] if O.random else 0, O.zone_h, O.random)
                    dout, dmade = OUTPUT(dnew, kept, c, O)
                    if NORM_C:
                        dc = dstate_now(dstate[tile], dcells_ptr, hidden[tile], masks[tile], HAS_DCELLS)
                        dmade += zone_gradient(dc, bits_c[tile] if O.random else 0, O.zone_state, O.random)[0]
                        found = (dmade * normal[tile], dmade)
                        dparams = add_rows(dparams, found, counts, tile, ROWS, O.norm_row + G)
                        dmade = tl.where(masks_n[tile][None, :], dmade * scale, tl.zeros_like(dmade))
                        if not O.projected:
                            dh_next = dh_next + (tl.where(counts, dheld, dh_t) if MASKED else dheld,)
                if NORM_C:
                    if SECOND:
                        douts = douts + (dout,)
                        dmades = dmades + (dmade,)
                else:
                    slots, dh_direct, dstate_prev, dparams = through_cell(
                        CELL, dout, dmade, dstate[tile], kept, made, state_prev, extra[tile].to(ACC), params, dparams,
                        dcells_ptr, hidden[tile], masks[tile], bits_c[tile] if O.random else 0, counts, tile,
                        O, HAS_DCELLS, MASKED, ACC,
                    )  # fmt: skip
                    if not O.projected:
                        dh_direct += dheld
                        if MASKED:
                            dh_direct = tl.where(counts, dh_direct, dh_t)
                        dh_next = dh_next + (dh_direct,)
                    store_planes(slots_ptr, (units[tile],), offs_b, (masks[tile],), slots, 0, OWN_SLOTS, H, D, STORAGE)
                    da_next = da_next + recurrent_slots(slots, O, G, ACC if O.norm else STORAGE)
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
                dmades, normal, scale_c, first, second, sums_c, offs_b, mask_b, poison, H, N_H, MEMBERS, LOCAL
            )  # fmt: skip
            for tile in tl.static_range(TILES):
                state_prev = state_next[tile]
                if MASKED:
                    state_prev = tl.where(keep[:, None], state_prev, tl.zeros_like(state_prev))
                kept = kept_gates(gates, tile, G, SAVE_GATES, ACC)
                slots, _, dstate_prev, dparams = through_cell(
                    CELL, douts[tile], dmades[tile], dstate[tile], kept, MADE(kept, state[tile], state_prev, O),
                    state_prev, extra[tile].to(ACC), params, dparams, dcells_ptr, hidden[tile], masks[tile],
                    bits_c[tile] if O.random else 0, counts, tile, O, HAS_DCELLS, MASKED, ACC,
                )  # fmt: skip
                store_planes(slots_ptr, (units[tile],), offs_b, (masks[tile],), slots, 0, G, H, D, STORAGE)
                da_next = da_next + recurrent_slots(slots, O, G, ACC)
                dstate_next = dstate_next + (dstate_prev,)

        if O.norm and CELLS:
            # da_next are the gradients by W_hh h[t-1], normalised, scaled and with its bias: tile by tile, G each.
            dnormal = ()
            for tile in tl.static_range(TILES):
                found = part_of(da_next, tile, G)
                scaled = ()
                for gate in tl.static_range(G):
                    scaled = scaled + (found[gate] * normed[tile * G + gate].to(ACC),)
                    of_normal = found[gate] * params[tile * PARAMS + O.norm_row + gate]
                    dnormal = dnormal + (tl.where(masks_n[tile][None, :], of_normal, tl.zeros_like(of_normal)),)
                dparams = add_rows(dparams, scaled, counts, tile, ROWS, O.norm_row)
                dparams = add_rows(dparams, found, counts, tile, ROWS, PARAMS)
            first, second = own_gradient_sums(dnormal, as_type(normed, ACC))
            if not LOCAL:
                send_sums(sums_t, first, second, offs_b, mask_b, member, N_H)
            if HANDED_OVER:
                store_planes(scratch_ptr, units, offs_b, masks, dnormal, 0, G, H, G + 2, ACC)
            if SYNC:
                publish(counter_ptr)
        if O.norm and OUTPUTS:
            if SYNC:
                ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
                target += N_H
                poison = tl.where(ok, 0.0, float("nan"))
            if HANDED_OVER:
                dnormal = load_planes(scratch_ptr, units, offs_b, masks, G, H, G + 2)
            da_next = row_gradients(
                dnormal, as_type(normed, ACC), scale_h, first, second, sums_t, offs_b, mask_b, poison,
                G * H, N_H, MEMBERS, LOCAL,
            )  # fmt: skip
            da_next = as_type(da_next, STORAGE)
            store_planes(slots_ptr, units, offs_b, masks, da_next, H_SLOT, G, H, D, STORAGE)

        if OUTPUTS and not O.reset_before:
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
        if CELLS and not O.reset_before:
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
        if O.projected:
            dh_all_ptr -= stride_t * P
        if O.norm:
            normed_ptr -= stride_t * (G * H)
            stats_ptr -= stride_t * 4
        if MASKED:
            steps_ptr -= stride_t
        slots_ptr -= stride_t * (D * H)

    if OWNS_DH:
        store_tiles(dh_ptr + first_b * P, h_own, h_masks, dh)
    if CELLS and not O.reset_before:
        store_tiles(dstate_ptr + first_b * H, hidden, masks, dstate)
    if ROWS > 0:
        store_planes(dparams_ptr + first_b * (ROWS * H), units, offs_b, masks, dparams, 0, ROWS, H, ROWS, ACC)
    if SYNC:
        give_up(counter_ptr, error_ptr, ok)
