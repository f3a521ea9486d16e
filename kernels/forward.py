"""The forward sequence kernel: gate product plus cell, over time. Every cell and schedule is made from this text.

Programs form groups of N_H; a group owns BLOCK_B rows of the batch, a program TILES * BLOCK_H hidden units of every
gate. At each step: h_gates = h[t-1] W_hh^T, cell, store h[t]. The backward kernel (backward.py) mirrors it:
dh = da[t+1] W_hh, cell, store da[t].
PLAN (constexprs.Plan) makes the schedules:

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

OPT (constexprs.Options) has the cell's own flags: OPT.projected, h[t] = r[t] W_hr^T has P columns, of which a program
owns TILES_P tiles (some programs own none). OPT.reset_before, the GRU that multiplies twice. OPT.masks, h[t-1] is
multiplied by one mask, or one a gate, before W_hh is (recurrent dropout; Gal and Ghahramani 2016). OPT.norm, layer
normalisation. MASKED reads a byte a row and step: bit 1, the step counts, else h and state are held and no gradient
arises; bit 2, h and state are zeroed before it.

Inside a tile of the product the gates are interleaved, unit-major with the gate fastest, LANES (their number rounded up
to a power of two) columns a unit: one product serves all gates, and splitting it into a tile a gate crosses no warp. In
memory nothing is interleaved. With a mask for each gate, every gate has rows, and so a product, of its own.
"""

import triton
import triton.language as tl

from .cells import gru_reset, gru_update, reopen
from .norm import normalise, own_moments, row_moments, send, store_moments
from .product import own_weights, product
from .sync import COUNTER_STRIDE, give_up, meet, publish
from .tiles import (
    as_type,
    hold,
    load_masks,
    load_tiles,
    load_vectors,
    one_of,
    plus,
    split_gates,
    store_tiles,
    this_program,
    times,
    zero_columns,
    zero_rows,
)
from .zoneout import draw_tiles, zone


@triton.jit
def drop(h, masks_h, STORAGE: tl.constexpr):
    """h times each mask, mask by mask; h itself where there is none."""
    if len(masks_h) == 0:
        return h
    else:
        dropped = ()
        for i in tl.static_range(len(masks_h)):
            dropped += ((h[i % len(h)].to(masks_h[i].dtype) * masks_h[i]).to(STORAGE),)
        return dropped


@triton.jit
def gate_weights(w_hh_ptr, me, GATES: tl.constexpr, OPT: tl.constexpr, PLAN: tl.constexpr):
    """This program's columns of W_hh^T [P, G*H]: a tile for each of its tiles, the gates interleaved, or one a gate."""
    ptrs = ()
    masks = ()
    for tile in tl.static_range(len(me.own.columns)):
        if OPT.masks > 1:
            for gate in tl.static_range(GATES):
                ptrs += (w_hh_ptr + (gate * PLAN.H + me.own.columns[tile]).to(tl.int64) * PLAN.P,)
                masks += (me.own.column_masks[tile],)
        else:
            lanes = tl.arange(0, PLAN.BLOCK_H * PLAN.LANES)
            gate, unit = lanes % PLAN.LANES, (me.member * PLAN.TILES + tile) * PLAN.BLOCK_H + lanes // PLAN.LANES
            ptrs += (w_hh_ptr + (gate * PLAN.H + unit).to(tl.int64) * PLAN.P,)
            masks += ((gate < GATES) & (unit < PLAN.H),)
    return own_weights(ptrs, masks, PLAN.P, 1, PLAN.P, PLAN.BLOCK_K, PLAN)


@triton.jit
def gate_products(
    rows, rows_ptr, mask_b, weights, poison, TILE: tl.constexpr, GATES: tl.constexpr, OPT: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """h[t-1] W_hh^T of one tile of units, a tile [BLOCK_B, BLOCK_H] for each gate."""
    P: tl.constexpr = PLAN.P
    if OPT.masks > 1:
        tiles = ()
        for gate in tl.static_range(GATES):
            of_gate = rows[gate * PLAN.TILES_P :][: PLAN.TILES_P]
            acc = product(
                of_gate, rows_ptr + gate * P, OPT.masks * P, mask_b, weights, poison, TILE * GATES + gate, 0,
                PLAN.BLOCK_H, P, 1, P, PLAN.BLOCK_K, PLAN,
            )  # fmt: skip
            tiles += (acc,)
        return tiles
    else:
        N: tl.constexpr = PLAN.BLOCK_H * PLAN.LANES
        acc = product(rows, rows_ptr, P, mask_b, weights, poison, TILE, 0, N, P, 1, P, PLAN.BLOCK_K, PLAN)
        return split_gates(acc, PLAN.BLOCK_B, PLAN.BLOCK_H, PLAN.LANES)[:GATES]


@triton.jit
def emit(
    h_t, h, bits, counts, h_ptr, drop_ptr, masks_h, own, TILE: tl.constexpr, MASKED: tl.constexpr,
    OPT: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Tile TILE of h[t], and of h[t] times the masks, to memory; returns what was stored. h: h[t-1], if it may stay."""
    if OPT.has_c and OPT.zone_h[0] != 0.0:
        h_t = zone(h_t, h[TILE].to(h_t.dtype), bits[TILE], OPT.zone_h, OPT.random)
    stored = h_t.to(h_ptr.dtype.element_ty)
    if MASKED:
        stored = tl.where(counts, stored, h[TILE])
    store_tiles(h_ptr, one_of(own, TILE), (stored,), PLAN.P)
    if OPT.masks > 0 and not PLAN.LOCAL:
        dropped = ()
        MASKS: tl.constexpr = OPT.masks
        for mask in tl.static_range(MASKS):
            m = masks_h[mask * PLAN.TILES_P + TILE]
            dropped += (stored.to(m.dtype) * m,)
        store_tiles(drop_ptr, one_of(own, TILE), dropped, PLAN.P, OPT.masks, OPT.masks)
    return stored


@triton.jit
def finish(
    out, c, extra, old, h, bits_h, bits_state, counts, row, h_ptr, r_ptr, drop_ptr, extra_ptr, counter_ptr, masks_h, me,
    TILE: tl.constexpr, OUTPUT: tl.constexpr, MASKED: tl.constexpr, SAVE_EXTRA: tl.constexpr, OPT: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """From what the cell made of tile TILE: h[t], or the rows of the projection, to memory; and the state it leaves."""
    h_t = OUTPUT(out, c, OPT)
    c = zone(c, old, bits_state[TILE], OPT.zone_state, OPT.random)
    if not OPT.has_c and OPT.zone_state[0] != 0.0:
        h_t = c
    c = hold(counts, c, old, MASKED)
    if OPT.projected:
        stored = h_t.to(r_ptr.dtype.element_ty)
        store_tiles(r_ptr + row * PLAN.H, one_of(me.own, TILE), (stored,), PLAN.H)
    else:
        stored = emit(
            h_t, h, bits_h, counts, h_ptr + row * PLAN.P, drop_ptr, masks_h, me.own_h, TILE, MASKED, OPT, PLAN
        )
    if PLAN.SYNC:
        publish(counter_ptr)  # TILES is 1; what backward needs may come after the others go on
    if SAVE_EXTRA:
        extra = c if OPT.has_c else hold(counts, extra, old, MASKED)
        store_tiles(extra_ptr + row * PLAN.H, one_of(me.own, TILE), (extra,), PLAN.H)
    return c, stored


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
    sums_ptr,  # [2, B, N_H, 2], ACC dtype, with OPT.norm and N_H > 1: what programs send one another
    scratch_ptr,  # [B, (G + 2) * H], ACC dtype, with OPT.norm: what a part of a step hands over to the next launch
    counter_ptr,  # [groups * COUNTER_STRIDE] zeros, with SYNC
    error_ptr,  # [1], with SYNC
    T,  # steps of this launch
    B,
    start,  # where the first of them lies in memory
    chained,  # 1 where a launch before this one has done the steps before it
    first_group,  # of this launch: where the groups cannot all wait at once, they come in several
    CELL: tl.constexpr, OUTPUT: tl.constexpr, OPT: tl.constexpr, PLAN: tl.constexpr,
    PRODUCT: tl.constexpr, CELLS: tl.constexpr, OUTPUTS: tl.constexpr, SECOND: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_GATES: tl.constexpr,
    SAVE_EXTRA: tl.constexpr,
):  # fmt: skip
    STORAGE: tl.constexpr = h_ptr.dtype.element_ty
    ACC: tl.constexpr = PLAN.ACC
    G: tl.constexpr = PLAN.G
    H: tl.constexpr = PLAN.H
    P: tl.constexpr = PLAN.P
    TILES: tl.constexpr = PLAN.TILES
    GATES: tl.constexpr = 2 if OPT.reset_before else G  # of the first product
    NORM_C: tl.constexpr = OPT.norm and OPT.has_c
    DROPPED: tl.constexpr = OPT.masks > 0 and not PLAN.LOCAL  # the group's rows are those times the masks
    HANDED_OVER: tl.constexpr = not (PLAN.LOCAL or PLAN.SYNC)
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
    weights = gate_weights(w_hh_ptr, me, GATES, OPT, PLAN)
    second = weights
    if OPT.two_products:
        second_ptrs = ()
        for tile in tl.static_range(len(own_h.columns)):
            row = own_h.columns[tile].to(tl.int64)
            second_ptrs += (w_hr_ptr + row * H if OPT.projected else w_hh_ptr + (2 * H + row) * H,)
        second = own_weights(second_ptrs, own_h.column_masks, H, 1, H, PLAN.BLOCK_K_R, PLAN)
    bias = load_vectors(b_hh_ptr, own, G if HAS_BIAS else 0, H, ACC)
    params = load_vectors(params_ptr, own, OPT.params, H, ACC)
    masks_h = load_masks(mask_ptr, first_b, B, own_h, OPT.masks, P, ACC)
    seed = tl.load(seed_ptr) if OPT.random else 0

    # Of step t, the first row of the group in a matrix [T * B, .].
    stride_t = -B.to(tl.int64) if REVERSE else B.to(tl.int64)
    row = start * B.to(tl.int64) + first_b
    CARRIES_H: tl.constexpr = PLAN.LOCAL or MASKED or (OPT.has_c and OPT.zone_h[0] != 0.0)
    h = ()
    if CARRIES_H:
        before_ptr = h0_ptr + first_b * P
        if HANDED_OVER:  # noqa: SIM102 - the one is known when this is compiled, the other is not
            if chained != 0:
                before_ptr = h_ptr + (row - stride_t) * P
        h = load_tiles(before_ptr, own_h, P)
    state = load_tiles(state_ptr + first_b * H, own, H)
    flags = tl.load(steps_ptr + row + own.rows, mask=mask_b, other=0).to(tl.int32) if MASKED else 0
    ok = True
    target = 0
    for step in tl.range(0, T, num_stages=1):
        x = load_tiles(gates_ptr + row * (G * H), own, H, GATES, G) if CELLS else ()
        x_n = load_tiles(gates_ptr + row * (G * H) + 2 * H, own, H, 1, G) if SECOND and OPT.reset_before else ()
        counts, mask_rows = mask_b[:, None], mask_b
        if MASKED:
            counts, keep = ((flags & 1) != 0)[:, None], (flags & 2) == 0
            mask_rows = mask_b & keep
            h, state = zero_rows(h, keep[:, None], MASKED), zero_rows(state, keep[:, None], MASKED)
            # The next step's come now: so they are not waited for, and no compiler can move them into the product.
            more = mask_b & (own.rows * 0 + step + 1 < T)
            flags = tl.load(steps_ptr + row + stride_t + own.rows, mask=more, other=0).to(tl.int32)
        t = start - step if REVERSE else start + step
        bits_h, bits_c = draw_tiles(seed, t, first_b, own, OPT.random)
        bits_state = bits_c if OPT.has_c else bits_h
        if OPT.projected:
            bits_h, _ = draw_tiles(seed, t, first_b, own_h, OPT.random)
        rows_ptr = h_ptr + (row - stride_t) * P
        if (step == 0) & (chained == 0):
            rows_ptr = h0_ptr + first_b * P
        if DROPPED:
            rows_ptr = drop_ptr + (row - stride_t if REVERSE else row) * (OPT.masks * P)
        dropped_ptr = rows_ptr + stride_t * (OPT.masks * P)

        rows = drop(h, masks_h, STORAGE) if PLAN.LOCAL else ()
        products = ()
        total, squares = 0.0, 0.0
        target, ok, poison = meet(counter_ptr, target, ok, PLAN)
        if PRODUCT and OPT.norm:
            for tile in tl.static_range(TILES):
                products += gate_products(rows, rows_ptr, mask_rows, weights, poison, tile, G, OPT, PLAN)
            total, squares = own_moments(products, me, G, PLAN)
            send(total, squares, sums_ptr, products, scratch_ptr, counter_ptr, me, G, PLAN)
        if CELLS and OPT.norm:
            target, ok, poison = meet(counter_ptr, target, ok, PLAN)
            if HANDED_OVER:
                products = load_tiles(scratch_ptr, own, H, G, G + 2)
            mean, scale = row_moments(total, squares, sums_ptr, me, G, OPT.epsilon, PLAN)
            products = normalise(products, mean + poison, scale, own, G)
            if SAVE_GATES:
                store_tiles(normed_ptr + row * (G * H), own, products, H, G, G)
                store_moments(stats_ptr + row * 4, mean, scale, me)

        outs, made, states, done, update_gates = (), (), (), (), ()
        if CELLS:
            for tile in tl.static_range(TILES):
                if OPT.norm:
                    h_tiles = times(products[tile * G :][:G], params[tile * OPT.params + OPT.norm_row :][:G])
                else:
                    h_tiles = gate_products(rows, rows_ptr, mask_rows, weights, poison, tile, GATES, OPT, PLAN)
                if HAS_BIAS:
                    h_tiles = plus(h_tiles, bias[tile * G :][:GATES])
                x_tiles = as_type(x[tile * GATES :][:GATES], ACC)
                if OPT.reset_before:
                    r_t, z, kept = gru_reset(x_tiles, h_tiles, state[tile], OPT)
                    if OPT.masks > 0:
                        r_t *= masks_h[(2 if OPT.masks > 1 else 0) * PLAN.TILES_P + tile]
                    done += (r_t.to(STORAGE),)
                    store_tiles(r_ptr + row * H, one_of(own, tile), done[tile:], H)
                    update_gates += (z,)
                    if PLAN.SYNC:
                        publish(counter_ptr)
                else:
                    own_params = params[tile * OPT.params :][: OPT.params]
                    out, c, kept, extra = CELL(x_tiles, h_tiles, state[tile], own_params, OPT)
                    if NORM_C:
                        outs += (out,)
                        made += zero_columns((c,), one_of(own, tile), 1)
                    else:
                        c, stored = finish(
                            out, c, extra, state[tile], h, bits_h, bits_state, counts, row, h_ptr, r_ptr, dropped_ptr,
                            extra_ptr, counter_ptr, masks_h, me, tile, OUTPUT, MASKED, SAVE_EXTRA, OPT, PLAN,
                        )  # fmt: skip
                        states, done = states + (c,), done + (stored,)
                if SAVE_GATES or (OPT.reset_before and HANDED_OVER):
                    store_tiles(gates_ptr + row * (G * H), one_of(own, tile), kept, H, GATES, G)

        if CELLS and NORM_C:
            total, squares = own_moments(made, me, 1, PLAN)
            if HANDED_OVER:
                store_tiles(scratch_ptr + G * H, own, outs, H, 1, G + 2)
            c_ptr = scratch_ptr + (G + 1) * H if HANDED_OVER else scratch_ptr
            send(total, squares, sums_c_ptr, made, c_ptr, counter_ptr, me, 1, PLAN)
        if OUTPUTS and NORM_C:
            target, ok, poison = meet(counter_ptr, target, ok, PLAN)
            if HANDED_OVER:
                outs = load_tiles(scratch_ptr + G * H, own, H, 1, G + 2)
                made = load_tiles(scratch_ptr + (G + 1) * H, own, H, 1, G + 2)
            mean, scale = row_moments(total, squares, sums_c_ptr, me, 1, OPT.epsilon, PLAN)
            made = normalise(made, mean + poison, scale, own, 1)
            if SAVE_GATES:
                store_moments(stats_ptr + row * 4 + 2, mean, scale, me)
            for tile in tl.static_range(TILES):
                norm_c = params[tile * OPT.params + OPT.norm_row + G :][:2]
                c = made[tile] * norm_c[0] + norm_c[1]
                c, stored = finish(
                    outs[tile], c, c, state[tile], h, bits_h, bits_state, counts, row, h_ptr, r_ptr, dropped_ptr,
                    extra_ptr, counter_ptr, masks_h, me, tile, OUTPUT, MASKED, SAVE_EXTRA, OPT, PLAN,
                )  # fmt: skip
                states, done = states + (c,), done + (stored,)

        if SECOND and OPT.two_products:
            target, ok, poison = meet(counter_ptr, target, ok, PLAN)
            r, done = done, ()
            if OPT.reset_before and HANDED_OVER:
                z = load_tiles(gates_ptr + row * (G * H) + H, own, H, 1, G)
                for tile in tl.static_range(TILES):
                    update_gates += (reopen(z[tile].to(ACC), OPT.recurrent, OPT),)
            owns = mask_b & (own.rows * 0 + me.member * PLAN.BLOCK_H < P)
            for tile in tl.static_range(len(own_h.columns)):
                h_t = product(
                    r, r_ptr + row * H, H, owns, second, poison, tile, 0, PLAN.BLOCK_H, H, 1, H, PLAN.BLOCK_K_R, PLAN
                )
                kept_n = h_t
                if OPT.reset_before:
                    a_n = x_n[tile].to(ACC) + h_t
                    if HAS_BIAS:
                        a_n += bias[tile * G + 2]
                    h_t, kept_n = gru_update(a_n, update_gates[tile], state[tile], OPT)
                    h_t = zone(h_t, state[tile], bits_h[tile], OPT.zone_h, OPT.random)
                    states += (hold(counts, h_t, state[tile], MASKED),)
                stored = emit(
                    h_t, h, bits_h, counts, h_ptr + row * P, dropped_ptr, masks_h, own_h, tile, MASKED, OPT, PLAN
                )
                done += (stored,)
                if PLAN.SYNC:
                    publish(counter_ptr)
                if OPT.reset_before and SAVE_GATES:
                    store_tiles(gates_ptr + row * (G * H) + 2 * H, one_of(own, tile), (kept_n,), H, 1, G)

        if CARRIES_H and len(done) > 0:
            h = done
        if len(states) > 0:
            state = states
        row += stride_t

    if SECOND if OPT.reset_before else (OUTPUTS if NORM_C else CELLS):
        store_tiles(state_ptr + first_b * H, own, state, H)
    if PLAN.SYNC:
        give_up(counter_ptr, error_ptr, ok)
