"""The mathematics of one time step, on tiles [BLOCK_B, BLOCK_H] in fp32 (fp64 for fp64 storage). No pointers here.

Every cell is two functions under one contract, which kernels/sequence.py calls:

    forward(x, h, state)  -> h, state, gates, extra
    backward(dh, dstate, gates, state, state_prev, extra)  -> slots, dh_direct, dstate_prev

x, h        tuples of G tiles: W_ih x[t] + b_ih and W_hh h[t-1] + b_hh, one a gate, in torch.nn's gate order. They stay
            apart because the GRU needs its recurrent product alone.
state       what a unit carries through time in full precision: c for the LSTM, h for the others
gates       tuple of G activated gates, what backward reads again
extra       one more tile that backward reads: the GRU's recurrent product of gate n. Unused elsewhere.
dh, dstate  the loss's gradient by h[t] (all of it) and by state[t] (what came from step t+1)
slots       tuple of D gradients by the pre-activations, in the order in which they are stored. `slots[:G]` are those
            by x, `slots[H_SLOT:][:G]` those by h: the same four for the LSTM; the GRU keeps four for its three gates,
            since only gate n differs between the two.
dh_direct   the gradient by h[t-1] that does not go through W_hh
"""

import triton
import triton.language as tl

from .activations import dsigmoid, dtanh, relu, relu_gradient, sigmoid, tanh


@triton.jit
def lstm_forward(x, h, state):
    """c[t] = f c[t-1] + i g, h[t] = o tanh(c[t]) (Hochreiter and Schmidhuber 1997; Gers et al. 2000)."""
    i = sigmoid(x[0] + h[0])
    f = sigmoid(x[1] + h[1])
    g = tanh(x[2] + h[2])
    o = sigmoid(x[3] + h[3])
    c = f * state + i * g
    return o * tanh(c), c, (i, f, g, o), c


@triton.jit
def lstm_backward(dh, dstate, gates, state, state_prev, extra):
    """Slots i, f, g, o."""
    i, f, g, o = gates
    tanh_c = tanh(state)
    dc = dstate + dh * o * dtanh(tanh_c)
    di = dc * g * dsigmoid(i)
    df = dc * state_prev * dsigmoid(f)
    dg = dc * i * dtanh(g)
    do = dh * tanh_c * dsigmoid(o)
    return (di, df, dg, do), tl.zeros_like(dh), dc * f


@triton.jit
def gru_forward(x, h, state):
    """n = tanh(x_n + r (W_hn h[t-1] + b_hn)), h[t] = (1 - z) n + z h[t-1] (Cho et al. 2014; torch.nn's reset after)."""
    r = sigmoid(x[0] + h[0])
    z = sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    h_t = n + z * (state - n)
    return h_t, h_t, (r, z, n), h[2]


@triton.jit
def gru_backward(dh, dstate, gates, state, state_prev, extra):
    """Slots n (by x), r, z, n (by h): the first three serve dW_ih and dx, the last three dW_hh and the recurrence."""
    r, z, n = gates
    dn = dh * (1 - z) * dtanh(n)
    dz = dh * (state_prev - n) * dsigmoid(z)
    dr = dn * extra * dsigmoid(r)
    return (dn, dr, dz, dn * r), dh * z, dstate


@triton.jit
def rnn_tanh_forward(x, h, state):
    """h[t] = tanh(x + W_hh h[t-1] + b_hh) (Elman 1990)."""
    h_t = tanh(x[0] + h[0])
    return h_t, h_t, (h_t,), h_t


@triton.jit
def rnn_tanh_backward(dh, dstate, gates, state, state_prev, extra):
    """One slot."""
    return (dh * dtanh(state),), tl.zeros_like(dh), dstate


@triton.jit
def rnn_relu_forward(x, h, state):
    """h[t] = max(x + W_hh h[t-1] + b_hh, 0)."""
    h_t = relu(x[0] + h[0])
    return h_t, h_t, (h_t,), h_t


@triton.jit
def rnn_relu_backward(dh, dstate, gates, state, state_prev, extra):
    """One slot."""
    return (relu_gradient(dh, state),), tl.zeros_like(dh), dstate
