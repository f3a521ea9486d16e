"""The mathematics of one time step, on tiles [BLOCK_B, BLOCK_H] in fp32 (fp64 for fp64 storage). No pointers here.

Every cell is four functions under one contract, which forward.py and backward.py call:

    forward(x, h, state, params, OPT)                   -> out, state, kept, extra
    output(out, state, OPT)                             -> h
    backward_output(dh, kept, state, OPT)               -> dout, dstate
    backward(dout, dstate, kept, state, state_prev, extra, params, OPT) -> slots, dh_direct, dstate_prev, dparams

x, h        tuples of G tiles: W_ih x[t] + b_ih and W_hh h[t-1] + b_hh, one a gate, in torch.nn's gate order. They stay
            apart because the GRU needs its recurrent product alone.
state       what a unit carries through time in full precision: c for the LSTM, h for the others
out         what h comes from, with the state: the LSTM's gate o, h itself for the others
kept        tuple of G gates, what backward reads again, see `keep`
extra       one more tile that backward reads: the GRU's recurrent product of gate n. Unused elsewhere.
params      tuple of [1, BLOCK_H], a number for each unit: the peepholes
dh, dstate  the loss's gradient by h[t] (all of it) and by state[t] (what came from step t+1, and by `output`)
slots       tuple of D gradients by the pre-activations, in the order in which they are stored. `slots[:G]` are those
            by x, `slots[H_SLOT:][:G]` those by h: the same four for the LSTM; the GRU keeps four for its three gates,
            since only gate n differs between the two.
dh_direct   the gradient by h[t-1] that does not go through W_hh
dparams     of each of params, of this step and each row
OPT         the options (constexprs.Options)
"""

import triton
import triton.language as tl

from .activations import activate, activation_gradient, clip, clip_gradient


@triton.jit
def gate(a, ACT: tl.constexpr, OPT: tl.constexpr):
    """A gate from its pre-activation."""
    return activate(clip(a, OPT.gate_clip), ACT)


@triton.jit
def keep(a, value, ACT: tl.constexpr, OPT: tl.constexpr):
    """What backward reads of a gate: its value, or what that came from, where the value does not tell the derivative.

    With a mark where it was clipped, which no rounding can blur: twice the bound, or as a value 2 or -2.
    """
    kept = value if ACT[3] else a
    if OPT.gate_clip is not None:
        mark = clip(a, OPT.gate_clip) * (2 / OPT.gate_clip if ACT[3] else 2)
        kept = tl.where(tl.abs(a) > tl.zeros_like(a) + OPT.gate_clip, mark, kept)
    return kept


@triton.jit
def reopen(kept, ACT: tl.constexpr, OPT: tl.constexpr):
    """The gate again, from what was kept of it."""
    if not ACT[3]:
        return gate(kept, ACT, OPT)
    elif OPT.gate_clip is not None:
        bound = tl.zeros_like(kept) + OPT.gate_clip
        return tl.where(kept > 1.5, activate(bound, ACT), tl.where(kept < -1.5, activate(-bound, ACT), kept))
    else:
        return kept


@triton.jit
def gate_gradient(dy, kept, value, ACT: tl.constexpr, OPT: tl.constexpr):
    """By the pre-activation, from dy by the gate's value."""
    if OPT.gate_clip is not None:
        a = kept if ACT[3] else clip(kept, OPT.gate_clip)
        marked = tl.abs(kept) > tl.zeros_like(kept) + (1.5 if ACT[3] else 1.5 * OPT.gate_clip)
        return tl.where(marked, tl.zeros_like(dy), activation_gradient(dy, a, value, ACT))
    else:
        return activation_gradient(dy, kept, value, ACT)


@triton.jit
def lstm_forward(x, h, state, params, OPT: tl.constexpr):
    """c[t] = f c[t-1] + i g, h[t] = o phi(c[t]) (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    Peepholes: i and f read c[t-1], o reads c[t] (Gers and Schmidhuber 2000). Coupled: f = 1 - i (Greff et al. 2017).
    """
    a_i, a_g, a_o = x[0] + h[0], x[OPT.g] + h[OPT.g], x[OPT.g + 1] + h[OPT.g + 1]
    if OPT.peephole:
        a_i += params[0] * state
    i = gate(a_i, OPT.recurrent, OPT)
    g = gate(a_g, OPT.activation, OPT)
    if OPT.coupled:
        c = state + i * (g - state)
    else:
        a_f = x[1] + h[1]
        if OPT.peephole:
            a_f += params[1] * state
        f = gate(a_f, OPT.recurrent, OPT)
        c = f * state + i * g
    c = clip(c, OPT.cell_clip)
    if OPT.peephole:
        a_o += params[OPT.g] * c
    o = gate(a_o, OPT.recurrent, OPT)
    if OPT.coupled:
        kept = (keep(a_i, i, OPT.recurrent, OPT), keep(a_g, g, OPT.activation, OPT), keep(a_o, o, OPT.recurrent, OPT))
    else:
        kept = (
            keep(a_i, i, OPT.recurrent, OPT),
            keep(a_f, f, OPT.recurrent, OPT),
            keep(a_g, g, OPT.activation, OPT),
            keep(a_o, o, OPT.recurrent, OPT),
        )
    return o, c, kept, c


@triton.jit
def lstm_output(o, c, OPT: tl.constexpr):
    return o * activate(c, OPT.output)


@triton.jit
def lstm_backward_output(dh, kept, c, OPT: tl.constexpr):
    o = reopen(kept[OPT.g + 1], OPT.recurrent, OPT)
    phi = activate(c, OPT.output)
    return dh * phi, activation_gradient(dh * o, c, phi, OPT.output)


@triton.jit
def lstm_candidate(kept, state, state_prev, OPT: tl.constexpr):
    """c[t] as the step made it: before zoneout, which of the two was kept, and before it was clipped."""
    if OPT.remake_cell:
        i = reopen(kept[0], OPT.recurrent, OPT)
        g = reopen(kept[OPT.g], OPT.activation, OPT)
        if OPT.coupled:
            return state_prev + i * (g - state_prev)
        else:
            return reopen(kept[1], OPT.recurrent, OPT) * state_prev + i * g
    else:
        return state


@triton.jit
def lstm_backward(dout, dstate, kept, state, state_prev, extra, params, OPT: tl.constexpr):
    """Slots i, f, g, o. Of `state` only what lstm_candidate gives is read."""
    i = reopen(kept[0], OPT.recurrent, OPT)
    g = reopen(kept[OPT.g], OPT.activation, OPT)
    o = reopen(kept[OPT.g + 1], OPT.recurrent, OPT)
    do = gate_gradient(dout, kept[OPT.g + 1], o, OPT.recurrent, OPT)
    dc = dstate
    if OPT.peephole:
        dc += params[OPT.g] * do
    dc = clip_gradient(dc, state, OPT.cell_clip)
    dg = gate_gradient(dc * i, kept[OPT.g], g, OPT.activation, OPT)
    if OPT.coupled:
        di = gate_gradient(dc * (g - state_prev), kept[0], i, OPT.recurrent, OPT)
        slots = (di, dg, do)
        dprev = dc * (1 - i)
    else:
        f = reopen(kept[1], OPT.recurrent, OPT)
        di = gate_gradient(dc * g, kept[0], i, OPT.recurrent, OPT)
        df = gate_gradient(dc * state_prev, kept[1], f, OPT.recurrent, OPT)
        slots = (di, df, dg, do)
        dprev = dc * f
    dparams = ()
    if OPT.peephole:
        dprev += params[0] * di
        dparams = (di * state_prev,)
        if not OPT.coupled:
            dprev += params[1] * df
            dparams = dparams + (df * state_prev,)
        dparams = dparams + (do * clip(state, OPT.cell_clip),)
    return slots, tl.zeros_like(dout), dprev, dparams


@triton.jit
def gru_forward(x, h, state, params, OPT: tl.constexpr):
    """n = phi(x_n + r (W_hn h[t-1] + b_hn)), h[t] = (1 - z) n + z h[t-1] (Cho et al. 2014; torch.nn's reset after)."""
    a_r, a_z = x[0] + h[0], x[1] + h[1]
    r, z = gate(a_r, OPT.recurrent, OPT), gate(a_z, OPT.recurrent, OPT)
    a_n = x[2] + r * h[2]
    n = gate(a_n, OPT.activation, OPT)
    h_t = n + z * (state - n)
    return (
        h_t,
        h_t,
        (keep(a_r, r, OPT.recurrent, OPT), keep(a_z, z, OPT.recurrent, OPT), keep(a_n, n, OPT.activation, OPT)),
        h[2],
    )


@triton.jit
def gru_backward(dout, dstate, kept, state, state_prev, extra, params, OPT: tl.constexpr):
    """Slots n (by x), r, z, n (by h): the first three serve dW_ih and dx, the last three dW_hh and the recurrence."""
    r, z, n = (
        reopen(kept[0], OPT.recurrent, OPT),
        reopen(kept[1], OPT.recurrent, OPT),
        reopen(kept[2], OPT.activation, OPT),
    )
    dn = gate_gradient(dout * (1 - z), kept[2], n, OPT.activation, OPT)
    dz = gate_gradient(dout * (state_prev - n), kept[1], z, OPT.recurrent, OPT)
    dr = gate_gradient(dn * extra, kept[0], r, OPT.recurrent, OPT)
    return (dn, dr, dz, dn * r), dout * z, dstate, ()


@triton.jit
def gru_reset(x, h, state, OPT: tl.constexpr):
    """The first half of a GRU whose reset comes before the product (Cho et al. 2014): r h[t-1], and z."""
    a_r, a_z = x[0] + h[0], x[1] + h[1]
    r, z = gate(a_r, OPT.recurrent, OPT), gate(a_z, OPT.recurrent, OPT)
    return r * state, z, (keep(a_r, r, OPT.recurrent, OPT), keep(a_z, z, OPT.recurrent, OPT))


@triton.jit
def gru_update(a_n, z, state, OPT: tl.constexpr):
    """The second half: n = phi(a_n), a_n = x_n + W_hn (r h[t-1]) + b_hn, h[t] = (1 - z) n + z h[t-1]."""
    n = gate(a_n, OPT.activation, OPT)
    return n + z * (state - n), keep(a_n, n, OPT.activation, OPT)


@triton.jit
def gru_update_backward(dh, kept, state_prev, OPT: tl.constexpr):
    """By z's and n's pre-activation, and by h[t-1] directly."""
    z, n = reopen(kept[1], OPT.recurrent, OPT), reopen(kept[2], OPT.activation, OPT)
    dn = gate_gradient(dh * (1 - z), kept[2], n, OPT.activation, OPT)
    dz = gate_gradient(dh * (state_prev - n), kept[1], z, OPT.recurrent, OPT)
    return dz, dn, dh * z


@triton.jit
def gru_reset_backward(dreset, kept_r, state_prev, OPT: tl.constexpr):
    """By r's pre-activation and by h[t-1], from dreset by r h[t-1]."""
    r = reopen(kept_r, OPT.recurrent, OPT)
    return gate_gradient(dreset * state_prev, kept_r, r, OPT.recurrent, OPT), dreset * r


@triton.jit
def rnn_forward(x, h, state, params, OPT: tl.constexpr):
    """h[t] = phi(x + W_hh h[t-1] + b_hh) (Elman 1990)."""
    a = x[0] + h[0]
    h_t = gate(a, OPT.activation, OPT)
    return h_t, h_t, (keep(a, h_t, OPT.activation, OPT),), h_t


@triton.jit
def rnn_backward(dout, dstate, kept, state, state_prev, extra, params, OPT: tl.constexpr):
    """One slot. Where the gate was not kept, it is the state."""
    if OPT.keep_gates:
        da = gate_gradient(dout, kept[0], reopen(kept[0], OPT.activation, OPT), OPT.activation, OPT)
    else:
        da = activation_gradient(dout, state, state, OPT.activation)
    return (da,), tl.zeros_like(dout), dstate, ()


@triton.jit
def same_output(out, state, OPT: tl.constexpr):
    return out


@triton.jit
def same_backward_output(dh, kept, state, OPT: tl.constexpr):
    return dh, tl.zeros_like(dh)


@triton.jit
def same_candidate(kept, state, state_prev, OPT: tl.constexpr):
    return state
