"""Activations, finite for every finite input, NaN for NaN; derivatives are taken from the output."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity for large -x, which gives the right 0."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def dsigmoid(y):
    """The derivative of sigmoid where it has the value y."""
    return y * (1 - y)


@triton.jit
def tanh(x):
    """tanh to a few ulp of fp32: an odd minimax polynomial near 0, where the quotient would cancel."""
    wide = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    wide = tl.where(x < 0, -wide, wide)
    if x.dtype == tl.float64:
        return wide
    s = x * x
    p = 2.06390887954e-2 - 5.70498872745e-3 * s
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    return tl.where(s < 0.390625, x + x * s * p, wide)


@triton.jit
def dtanh(y):
    """The derivative of tanh where it has the value y."""
    return 1 - y * y


@triton.jit
def relu(x):
    """max(x, 0), written so that NaN stays NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_gradient(dy, y):
    """dy times the derivative of relu where it has the value y: 0 where that is 0, for infinite dy too."""
    return tl.where(y <= 0, 0.0, dy)
