"""The mathematics of one time step, on tiles [BLOCK_B, BLOCK_H] in fp32 (fp64 for fp64 storage). No pointers here.

Every cell is four functions under one contract, which kernels/sequence.py calls:

    forward(x, h, state, params, O)                   -> out, state, kept, extra
    output(out, state, O)                             -> h
    backward_output(dh, kept, state, O)               -> dout, dstate
    backward(dout, dstate, kept, state, state_prev, extra, params, O) -> slots, dh_direct, dstate_prev, dparams

x, h        tuples of G tiles: W_ih x[t] + b_ih and W_hh h[t-1] + b_hh, one a gate, in torch.nn's gate order. They stay
            apart because the GRU needs its recurrent product alone.
state       what a unit carries through time in full precision: c for the LSTM, h for the others
out         what h comes from, with the state: the LSTM's gate o, h itself for the others
kept        tuple of G gates, what backward reads again: activated, or with O.preactivations before that
extra       one more tile that backward reads: the GRU's recurrent product of gate n. Unused elsewhere.
params      tuple of [1, BLOCK_H], a number for each unit: the peepholes
dh, dstate  the loss's gradient by h[t] (all of it) and by state[t] (what came from step t+1, and by `output`)
slots       tuple of D gradients by the pre-activations, in the order in which they are stored. `slots[:G]` are those
            by x, `slots[H_SLOT:][:G]` those by h: the same four for the LSTM; the GRU keeps four for its three gates,
            since only gate n differs between the two.
dh_direct   the gradient by h[t-1] that does not go through W_hh
dparams     of each of params, of this step and each row
O           the options (launch.Options)
"""

import triton
import triton.language as tl

from .activations import activate, activation_gradient, clip, clip_gradient


@triton.jit
def gate(a, ACT: tl.constexpr, O: tl.constexpr):
    """A gate from its pre-activation."""
    return activate(clip(a, O.gate_clip), ACT)


@triton.jit
def keep(a, value, O: tl.constexpr):
    """What backward reads of a gate: its value, or 2 or -2, which none has, where it was clipped; or what it came from."""
    if O.preactivations:
        return a
    elif O.gate_clip is not None:
        mark = clip(a, O.gate_clip) * (2 / O.gate_clip)
        return tl.where(tl.abs(a) > tl.zeros_like(a) + O.gate_clip, mark, value)
    else:
        return value


@triton.jit
def reopen(kept, ACT: tl.constexpr, O: tl.constexpr):
    """The gate again, from what was kept of it."""
    if O.preactivations:
        return gate(kept, ACT, O)
    elif O.gate_clip is not None:
        bound = tl.zeros_like(kept) + O.gate_clip
        return tl.where(kept > 1.5, activate(bound, ACT), tl.where(kept < -1.5, activate(-bound, ACT), kept))
    else:
        return kept


@triton.jit
def gate_gradient(dy, kept, value, ACT: tl.constexpr, O: tl.constexpr):
    """By the pre-activation, from dy by the gate's value."""
    if O.preactivations:
        return clip_gradient(activation_gradient(dy, clip(kept, O.gate_clip), value, ACT), kept, O.gate_clip)
    elif O.gate_clip is not None:
        return tl.where(tl.abs(kept) > 1.5, tl.zeros_like(dy), activation_gradient(dy, kept, value, ACT))
    else:
        return activation_gradient(dy, kept, value, ACT)


@triton.jit
def lstm_forward(x, h, state, params, O: tl.constexpr):
    """c[t] = f c[t-1] + i g, h[t] = o phi(c[t]) (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    Peepholes: i and f read c[t-1], o reads c[t] (Gers and Schmidhuber 2000). Coupled: f = 1 - i (Greff et al. 2017).
    """
    a_i, a_g, a_o = x[0] + h[0], x[O.g] + h[O.g], x[O.g + 1] + h[O.g + 1]
    if O.peephole:
        a_i += params[0] * state
    i = gate(a_i, O.recurrent, O)
    g = gate(a_g, O.activation, O)
    if O.coupled:
        c = state + i * (g - state)
    else:
        a_f = x[1] + h[1]
        if O.peephole:
            a_f += params[1] * state
        f = gate(a_f, O.recurrent, O)
        c = f * state + i * g
    c = clip(c, O.cell_clip)
    if O.peephole:
        a_o += params[O.g] * c
    o = gate(a_o, O.recurrent, O)
    if O.coupled:
        kept = (keep(a_i, i, O), keep(a_g, g, O), keep(a_o, o, O))
    else:
        kept = (keep(a_i, i, O), keep(a_f, f, O), keep(a_g, g, O), keep(a_o, o, O))
    return o, c, kept, c


@triton.jit
def lstm_output(o, c, O: tl.constexpr):
    return o * activate(c, O.output)


@triton.jit
def lstm_backward_output(dh, kept, c, O: tl.constexpr):
    o = reopen(kept[O.g + 1], O.recurrent, O)
    phi = activate(c, O.output)
    return dh * phi, activation_gradient(dh * o, c, phi, O.output)


@triton.jit
def lstm_candidate(kept, state, state_prev, O: tl.constexpr):
    """c[t] as the step made it: before zoneout, which of the two was kept, and before it was clipped."""
    if O.remake_cell:
        i = reopen(kept[0], O.recurrent, O)
        g = reopen(kept[O.g], O.activation, O)
        if O.coupled:
            return state_prev + i * (g - state_prev)
        else:
            return reopen(kept[1], O.recurrent, O) * state_prev + i * g
    else:
        return state


@triton.jit
def lstm_backward(dout, dstate, kept, state, state_prev, extra, params, O: tl.constexpr):
    """Slots i, f, g, o. Of `state` only what lstm_candidate gives is read."""
    i = reopen(kept[0], O.recurrent, O)
    g = reopen(kept[O.g], O.activation, O)
    o = reopen(kept[O.g + 1], O.recurrent, O)
    do = gate_gradient(dout, kept[O.g + 1], o, O.recurrent, O)
    dc = dstate
    if O.peephole:
        dc += params[O.g] * do
    dc = clip_gradient(dc, state, O.cell_clip)
    dg = gate_gradient(dc * i, kept[O.g], g, O.activation, O)
    if O.coupled:
        di = gate_gradient(dc * (g - state_prev), kept[0], i, O.recurrent, O)
        slots = (di, dg, do)
        dprev = dc * (1 - i)
    else:
        f = reopen(kept[1], O.recurrent, O)
        di = gate_gradient(dc * g, kept[0], i, O.recurrent, O)
        df = gate_gradient(dc * state_prev, kept[1], f, O.recurrent, O)
        slots = (di, df, dg, do)
        dprev = dc * f
    dparams = ()
    if O.peephole:
        dprev += params[0] * di
        dparams = (di * state_prev,)
        if not O.coupled:
            dprev += params[1] * df
            dparams = dparams + (df * state_prev,)
        dparams = dparams + (do * clip(state, O.cell_clip),)
    return slots, tl.zeros_like(dout), dprev, dparams


@triton.jit
def gru_forward(x, h, state, params, O: tl.constexpr):
    """n = phi(x_n + r (W_hn h[t-1] + b_hn)), h[t] = (1 - z) n + z h[t-1] (Cho et al. 2014; torch.nn's reset after)."""
    a_r, a_z = x[0] + h[0], x[1] + h[1]
    r, z = gate(a_r, O.recurrent, O), gate(a_z, O.recurrent, O)
    a_n = x[2] + r * h[2]
    n = gate(a_n, O.activation, O)
    h_t = n + z * (state - n)
    return h_t, h_t, (keep(a_r, r, O), keep(a_z, z, O), keep(a_n, n, O)), h[2]


@triton.jit
def gru_backward(dout, dstate, kept, state, state_prev, extra, params, O: tl.constexpr):
    """Slots n (by x), r, z, n (by h): the first three serve dW_ih and dx, the last three dW_hh and the recurrence."""
    r, z, n = reopen(kept[0], O.recurrent, O), reopen(kept[1], O.recurrent, O), reopen(kept[2], O.activation, O)
    dn = gate_gradient(dout * (1 - z), kept[2], n, O.activation, O)
    dz = gate_gradient(dout * (state_prev - n), kept[1], z, O.recurrent, O)
    dr = gate_gradient(dn * extra, kept[0], r, O.recurrent, O)
    return (dn, dr, dz, dn * r), dout * z, dstate, ()


@triton.jit
def gru_reset(x, h, state, O: tl.constexpr):
    """The first half of a GRU whose reset comes before the product (Cho et al. 2014): r h[t-1], and z."""
    a_r, a_z = x[0] + h[0], x[1] + h[1]
    r, z = gate(a_r, O.recurrent, O), gate(a_z, O.recurrent, O)
    return r * state, z, (keep(a_r, r, O), keep(a_z, z, O))


@triton.jit
def gru_update(a_n, z, state, O: tl.constexpr):
    """The second half: n = phi(a_n), a_n = x_n + W_hn (r h[t-1]) + b_hn, h[t] = (1 - z) n + z h[t-1]."""
    n = gate(a_n, O.activation, O)
    return n + z * (state - n), keep(a_n, n, O)


@triton.jit
def gru_update_backward(dh, kept, state_prev, O: tl.constexpr):
    """By z's and n's pre-activation, and by h[t-1] directly."""
    z, n = reopen(kept[1], O.recurrent, O), reopen(kept[2], O.activation, O)
    dn = gate_gradient(dh * (1 - z), kept[2], n, O.activation, O)
    dz = gate_gradient(dh * (state_prev - n), kept[1], z, O.recurrent, O)
    return dz, dn, dh * z


@triton.jit
def gru_reset_backward(dreset, kept_r, state_prev, O: tl.constexpr):
    """By r's pre-activation and by h[t-1], from dreset by r h[t-1]."""
    r = reopen(kept_r, O.recurrent, O)
    return gate_gradient(dreset * state_prev, kept_r, r, O.recurrent, O), dreset * r


@triton.jit
def rnn_forward(x, h, state, params, O: tl.constexpr):
    """h[t] = phi(x + W_hh h[t-1] + b_hh) (Elman 1990)."""
    a = x[0] + h[0]
    h_t = gate(a, O.activation, O)
    return h_t, h_t, (keep(a, h_t, O),), h_t


@triton.jit
def rnn_backward(dout, dstate, kept, state, state_prev, extra, params, O: tl.constexpr):
    """One slot. Where the gate was not kept, it is the state."""
    if O.keep_gates:
        da = gate_gradient(dout, kept[0], reopen(kept[0], O.activation, O), O.activation, O)
    else:
        da = activation_gradient(dout, state, state, O.activation)
    return (da,), tl.zeros_like(dout), dstate, ()


@triton.jit
def same_output(out, state, O: tl.constexpr):
    return out


@triton.jit
def same_backward_output(dh, kept, state, O: tl.constexpr):
    return dh, tl.zeros_like(dh)


@triton.jit
def same_candidate(kept, state, state_prev, O: tl.constexpr):
    return state
