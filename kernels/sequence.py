"""The two sequence kernels: gate product plus cell, over time. Every cell and every schedule is made from this text.

Programs form groups of N_H; a group owns BLOCK_B rows of the batch, a program TILES * BLOCK_H hidden units of every
gate. Forward, at each step: h_gates = h[t-1] W_hh^T, cell, store h[t]. Backward mirrors it: dh = da[t+1] W_hh, cell,
store da[t].
Constexpr flags make the schedules:

    LOCAL     N_H = 1: one program owns all hidden units and multiplies from its registers; no waiting at all
    SYNC      the group's programs wait for each other's tiles at every step
    RESIDENT  W_hh is loaded once, before the time loop, and stays on chip

    local: LOCAL. resident: SYNC and RESIDENT. streamed: SYNC. step: none of them, launched once a step with T = 1.

Inside a tile of the product the gates are interleaved, unit-major with the gate fastest, LANES (G rounded up to a power
of two) columns a unit: one product serves all gates, and splitting it into a tile a gate crosses no warp. In memory
nothing is interleaved.
"""

import triton
import triton.language as tl

from .product import load_resident, product_from_memory, product_from_registers
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


@triton.jit(do_not_specialize=["T", "B", "start", "chained", "first_group"])
def sequence_forward(
    gates_ptr,  # [T, B, G*H] in: W_ih x + b_ih; out, with SAVE_GATES: the activated gates
    w_hh_ptr,  # [G*H, H]
    b_hh_ptr,  # [G*H], with HAS_BIAS
    h0_ptr,  # [B, H]
    y_ptr,  # [T, B, H] out: h[t]
    state_ptr,  # [B, H], ACC dtype, in: the state before the first step; out: after the last
    extra_ptr,  # [T, B, H] out, with SAVE_EXTRA
    counter_ptr,  # [groups * COUNTER_STRIDE] zeros, with SYNC
    error_ptr,  # [1], with SYNC
    T,  # steps of this launch
    B,
    start,  # where the first of them lies in memory
    chained,  # 1 where a launch before this one has done the steps before it
    first_group,  # of this launch: where the groups cannot all wait at once, they come in several
    CELL: tl.constexpr, G: tl.constexpr, LANES: tl.constexpr, H: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr, N_H: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    LOCAL: tl.constexpr, SYNC: tl.constexpr, RESIDENT: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = BLOCK_H * LANES
    STORAGE: tl.constexpr = y_ptr.dtype.element_ty
    group = first_group + tl.program_id(0) // N_H
    member = tl.program_id(0) % N_H
    first_b = (group * BLOCK_B).to(tl.int64)
    stride_t = B.to(tl.int64)
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = first_b + offs_b < B
    if SYNC:
        counter_ptr += group * COUNTER_STRIDE

    # Where this program's hidden units lie: a tuple entry a tile.
    column_ptrs = ()
    masks_n = ()
    hidden = ()
    masks = ()
    bias = ()
    state = ()
    h = ()
    for tile in tl.static_range(TILES):
        offs_n = tl.arange(0, N)
        unit = (member * TILES + tile) * BLOCK_H + offs_n // LANES
        mask_n = (offs_n % LANES < G) & (unit < H)
        row = offs_n % LANES * H + unit
        column_ptrs = column_ptrs + (w_hh_ptr + row.to(tl.int64) * H,)
        masks_n = masks_n + (mask_n,)
        offs_h = (member * TILES + tile) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = mask_b[:, None] & (offs_h < H)[None, :]
        own = offs_b[:, None] * H + offs_h[None, :]
        hidden = hidden + (own,)
        masks = masks + (mask,)
        if HAS_BIAS:
            bias = bias + (tl.load(b_hh_ptr + row, mask=mask_n, other=0.0).to(ACC),)
        state = state + (tl.load(state_ptr + first_b * H + own, mask=mask, other=0.0),)
        if LOCAL:
            h = h + (tl.load(h0_ptr + first_b * H + own, mask=mask, other=0.0),)
    resident = ()
    if RESIDENT:
        resident = load_resident(column_ptrs, masks_n, 1, H, H, BLOCK_K, SPLIT_K)

    y_ptr += (start * stride_t + first_b) * H
    if SAVE_EXTRA:
        extra_ptr += (start * stride_t + first_b) * H
    gates_ptr += (start * stride_t + first_b) * (G * H)
    if REVERSE:
        stride_t = -stride_t
    rows_ptr = h0_ptr + first_b * H
    if chained != 0:
        rows_ptr = y_ptr - stride_t * H

    ok = True
    target = 0
    for _ in tl.range(0, T, num_stages=1):
        x = ()
        for tile in tl.static_range(TILES):
            offs_h = (member * TILES + tile) * BLOCK_H + tl.arange(0, BLOCK_H)
            at = offs_b[:, None] * (G * H) + offs_h[None, :]
            for gate in tl.static_range(G):
                x = x + (tl.load(gates_ptr + at + gate * H, mask=masks[tile], other=0.0),)

        poison = 0.0
        if SYNC:
            ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
            target += N_H
            poison = tl.where(ok, 0.0, float("nan"))
        h_next = ()
        state_next = ()
        for tile in tl.static_range(TILES):
            if LOCAL:
                h_gates = product_from_registers(
                    h, column_ptrs, masks_n, 1, resident, tile,
                    H, BLOCK_B, N, BLOCK_K, SPLIT_K, RESIDENT, DOT, ACC, PRECISION,
                )  # fmt: skip
            else:
                h_gates = product_from_memory(
                    rows_ptr, H, mask_b, column_ptrs[tile], masks_n[tile], 1, resident, poison,
                    H, BLOCK_B, N, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                )  # fmt: skip
            if HAS_BIAS:
                h_gates += bias[tile][None, :]
            x_tiles = ()
            for gate in tl.static_range(G):
                x_tiles = x_tiles + (x[tile * G + gate].to(ACC),)
            h_tiles = split_gates(h_gates, BLOCK_B, BLOCK_H, LANES)
            h_t, state_t, gates, extra = CELL(x_tiles, h_tiles, state[tile])

            stored = h_t.to(STORAGE)
            tl.store(y_ptr + hidden[tile], stored, mask=masks[tile])
            if SYNC:  # and so TILES == 1; what is saved for backward need not be out before the others go on
                publish(counter_ptr)
            if SAVE_EXTRA:
                tl.store(extra_ptr + hidden[tile], extra.to(STORAGE), mask=masks[tile])
            if SAVE_GATES:
                offs_h = (member * TILES + tile) * BLOCK_H + tl.arange(0, BLOCK_H)
                at = offs_b[:, None] * (G * H) + offs_h[None, :]
                for gate in tl.static_range(G):
                    tl.store(gates_ptr + at + gate * H, gates[gate].to(STORAGE), mask=masks[tile])
            h_next = h_next + (stored,)
            state_next = state_next + (state_t,)
        state = state_next
        if LOCAL:
            h = h_next

        rows_ptr = y_ptr
        y_ptr += stride_t * H
        if SAVE_EXTRA:
            extra_ptr += stride_t * H
        gates_ptr += stride_t * (G * H)

    for tile in tl.static_range(TILES):
        tl.store(state_ptr + first_b * H + hidden[tile], state[tile], mask=masks[tile])
    if SYNC:
        give_up(counter_ptr, error_ptr, ok)


@triton.jit(do_not_specialize=["T", "B", "start", "chained", "last", "first_group"])
def sequence_backward(
    dy_ptr,  # [T, B, H]
    gates_ptr,  # [T, B, G*H] the activated gates, with SAVE_GATES
    states_ptr,  # [T, B, H] state[t]
    state0_ptr,  # [B, H] the state before the first step
    extra_ptr,  # [T, B, H], with SAVE_EXTRA
    w_hh_ptr,  # [G*H, H]
    slots_ptr,  # [T, B, D*H] out: gradients by the pre-activations
    dh_ptr,  # [B, H], ACC dtype, in: by h after the last step; out: by h0, without what goes through W_hh
    dstate_ptr,  # [B, H], ACC dtype, in: by the state after the last step; out: by the state before the first
    counter_ptr,  # [groups * COUNTER_STRIDE] zeros, with SYNC
    error_ptr,  # [1], with SYNC
    T,
    B,
    start,
    chained,
    last,  # 1 where the last step of this launch is the first of the sequence
    first_group,
    CELL: tl.constexpr, G: tl.constexpr, D: tl.constexpr, H_SLOT: tl.constexpr, H: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TILES: tl.constexpr, N_H: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    LOCAL: tl.constexpr, SYNC: tl.constexpr, RESIDENT: tl.constexpr, REVERSE: tl.constexpr,
    SAVE_GATES: tl.constexpr, SAVE_EXTRA: tl.constexpr,
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

    dy_ptr += (start * stride_t + first_b) * H
    states_ptr += (start * stride_t + first_b) * H
    state0_ptr += first_b * H
    if SAVE_EXTRA:
        extra_ptr += (start * stride_t + first_b) * H
    if SAVE_GATES:
        gates_ptr += (start * stride_t + first_b) * (G * H)
    slots_ptr += (start * stride_t + first_b) * (D * H)
    if REVERSE:
        stride_t = -stride_t
    rows_ptr = slots_ptr + stride_t * (D * H) + H_SLOT * H

    column_ptrs = ()
    masks_n = ()
    hidden = ()
    masks = ()
    dh = ()
    dstate = ()
    state = ()
    for tile in tl.static_range(TILES):
        offs_h = (member * TILES + tile) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask_n = offs_h < H
        mask = mask_b[:, None] & mask_n[None, :]
        own = offs_b[:, None] * H + offs_h[None, :]
        column_ptrs = column_ptrs + (w_hh_ptr + offs_h,)
        masks_n = masks_n + (mask_n,)
        hidden = hidden + (own,)
        masks = masks + (mask,)
        dh = dh + (tl.load(dh_ptr + first_b * H + own, mask=mask, other=0.0),)
        dstate = dstate + (tl.load(dstate_ptr + first_b * H + own, mask=mask, other=0.0),)
        state = state + (tl.load(states_ptr + own, mask=mask, other=0.0).to(ACC),)
    da = ()
    if LOCAL:
        for _ in tl.static_range(G * TILES):
            da = da + (tl.zeros((BLOCK_B, BLOCK_H), STORAGE),)
    resident = ()
    if RESIDENT:
        resident = load_resident(column_ptrs, masks_n, H, G * H, H if LOCAL else G * H, BLOCK_K, SPLIT_K)

    ok = True
    target = 0
    for step in tl.range(0, T, num_stages=1):
        previous_ptr = states_ptr - stride_t * H
        if (step + 1 == T) & (last != 0):
            previous_ptr = state0_ptr
        dy = ()
        previous = ()
        gates = ()
        extra = ()
        for tile in tl.static_range(TILES):
            dy = dy + (tl.load(dy_ptr + hidden[tile], mask=masks[tile], other=0.0),)
            previous = previous + (tl.load(previous_ptr + hidden[tile], mask=masks[tile], other=0.0),)
            if SAVE_EXTRA:
                extra = extra + (tl.load(extra_ptr + hidden[tile], mask=masks[tile], other=0.0),)
            else:
                extra = extra + (previous[tile],)
            if SAVE_GATES:
                offs_h = (member * TILES + tile) * BLOCK_H + tl.arange(0, BLOCK_H)
                at = offs_b[:, None] * (G * H) + offs_h[None, :]
                for gate in tl.static_range(G):
                    gates = gates + (tl.load(gates_ptr + at + gate * H, mask=masks[tile], other=0.0),)

        poison = 0.0
        if SYNC:
            ok = wait(counter_ptr, target, tl.where(ok, POLLS, 0)) & ok
            target += N_H
            poison = tl.where(ok, 0.0, float("nan"))
        has_next = mask_b & ((step > 0) | (chained != 0))
        da_next = ()
        dh_next = ()
        dstate_next = ()
        state_next = ()
        for tile in tl.static_range(TILES):
            if LOCAL:
                dh_w = product_from_registers(
                    da, column_ptrs, masks_n, H, resident, tile,
                    H, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT, DOT, ACC, PRECISION,
                )  # fmt: skip
            else:
                dh_w = product_from_memory(
                    rows_ptr, D * H, has_next, column_ptrs[tile], masks_n[tile], H, resident, poison,
                    G * H, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT_K, RESIDENT, AHEAD, STAGES, DOT, ACC, PRECISION,
                )  # fmt: skip
            saved = ()
            if SAVE_GATES:
                for gate in tl.static_range(G):
                    saved = saved + (gates[tile * G + gate].to(ACC),)
            state_prev = previous[tile].to(ACC)
            slots, dh_direct, dstate_prev = CELL(
                dy[tile].to(ACC) + dh[tile] + dh_w, dstate[tile], saved, state[tile], state_prev, extra[tile].to(ACC)
            )
            at = offs_b[:, None] * (D * H) + ((member * TILES + tile) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
            for slot in tl.static_range(D):
                tl.store(slots_ptr + at + slot * H, slots[slot].to(STORAGE), mask=masks[tile])
            for gate in tl.static_range(G):
                da_next = da_next + (slots[H_SLOT + gate].to(STORAGE),)
            dh_next = dh_next + (dh_direct,)
            dstate_next = dstate_next + (dstate_prev,)
            state_next = state_next + (state_prev,)
        dh = dh_next
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

        rows_ptr = slots_ptr + H_SLOT * H
        dy_ptr -= stride_t * H
        states_ptr -= stride_t * H
        if SAVE_EXTRA:
            extra_ptr -= stride_t * H
        if SAVE_GATES:
            gates_ptr -= stride_t * (G * H)
        slots_ptr -= stride_t * (D * H)

    for tile in tl.static_range(TILES):
        tl.store(dh_ptr + first_b * H + hidden[tile], dh[tile], mask=masks[tile])
        tl.store(dstate_ptr + first_b * H + hidden[tile], dstate[tile], mask=masks[tile])
    if SYNC:
        give_up(counter_ptr, error_ptr, ok)
