"""Activations, finite for every finite input, NaN for NaN, and their derivatives.

ACT is (name, alpha, beta, whether the value is enough), with ONNX's meaning. The derivatives of tanh, sigmoid and relu
are taken from the value, the others from the argument.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity for large -x, which gives the right 0."""
    return 1 / (1 + tl.exp(-x))


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
def expm1(x):
    """exp(x) - 1 for x <= 0, without its cancellation near 0."""
    t = tanh(0.5 * x)
    return 2 * t / (1 - t)


@triton.jit
def softplus(x):
    """log(1 + exp(x)); log(1 + e) as Kahan computes it, to a few ulp also where e vanishes beside 1."""
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    return tl.where(x < 0, tl.zeros_like(x), x) + tl.where(u == 1, e, tl.log(u) * e / tl.where(u == 1, u, u - 1))


@triton.jit
def clip(x, LIMIT: tl.constexpr):
    """x within +-LIMIT, NaN where it is; as it is without one."""
    if LIMIT is None:
        return x
    else:
        bound = tl.zeros_like(x) + LIMIT
        return tl.clamp(x, -bound, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clip_gradient(dy, x, LIMIT: tl.constexpr):
    """dy where clip left x as it was, 0 where it did not."""
    if LIMIT is None:
        return dy
    else:
        return tl.where(tl.abs(x) > tl.zeros_like(x) + LIMIT, tl.zeros_like(dy), dy)


@triton.jit
def activate(x, ACT: tl.constexpr):
    if ACT[0] == "tanh":
        return tanh(x)
    elif ACT[0] == "sigmoid":
        return sigmoid(x)
    elif ACT[0] == "relu":
        return tl.where(x < 0, tl.zeros_like(x), x)
    elif ACT[0] == "hard_sigmoid":
        y = x * ACT[1] + ACT[2]
        return tl.where(y < 0, tl.zeros_like(x), tl.where(y > 1, tl.zeros_like(x) + 1, y))
    elif ACT[0] == "linear":
        return x
    elif ACT[0] == "affine":
        return x * ACT[1] + ACT[2]
    elif ACT[0] == "elu":
        return tl.where(x > 0, x, expm1(tl.where(x > 0, tl.zeros_like(x), x)) * ACT[1])
    elif ACT[0] == "leaky_relu":
        return tl.where(x > 0, x, x * ACT[1])
    elif ACT[0] == "scaled_tanh":
        return tanh(x * ACT[2]) * ACT[1]
    elif ACT[0] == "softplus":
        return softplus(x)
    elif ACT[0] == "softsign":
        return x / (1 + tl.abs(x))
    else:
        tl.static_assert(ACT[0] == "thresholded_relu")
        return tl.where(x <= tl.zeros_like(x) + ACT[1], tl.zeros_like(x), x)


@triton.jit
def activation_gradient(dy, x, y, ACT: tl.constexpr):
    """dy times the derivative at x, where the value is y: 0 where that is 0, for infinite dy too, if it has kinks."""
    zero = tl.zeros_like(dy)
    if ACT[0] == "tanh":
        return dy * (1 - y * y)
    elif ACT[0] == "sigmoid":
        return dy * (y * (1 - y))
    elif ACT[0] == "relu":
        return tl.where(y <= 0, zero, dy)
    elif ACT[0] == "hard_sigmoid":
        inside = x * ACT[1] + ACT[2]
        return tl.where((inside < 0) | (inside > 1), zero, dy * ACT[1])
    elif ACT[0] == "linear":
        return dy
    elif ACT[0] == "affine":
        return dy * ACT[1]
    elif ACT[0] == "elu":
        return tl.where(x > 0, dy, dy * (tl.exp(tl.where(x > 0, zero, x)) * ACT[1]))
    elif ACT[0] == "leaky_relu":
        return tl.where(x > 0, dy, dy * ACT[1])
    elif ACT[0] == "scaled_tanh":
        t = tanh(x * ACT[2])
        return dy * ((1 - t * t) * (ACT[1] * ACT[2]))
    elif ACT[0] == "softplus":
        return dy * sigmoid(x)
    elif ACT[0] == "softsign":
        scale = 1 + tl.abs(x)
        return dy / (scale * scale)
    else:
        return tl.where(x <= zero + ACT[1], zero, dy)
