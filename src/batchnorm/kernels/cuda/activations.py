"""Activations and their gradients as the Triton kernels compute them, in float32 or float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, NAME: tl.constexpr):
    """The activation of z."""
    # "Not at or below 0" rather than "above 0", so that NaN stays NaN, as in torch.
    if NAME == "relu":
        y = tl.where(z <= 0, 0.0, z)
    elif NAME == "relu6":
        y = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif NAME == "leaky_relu":
        y = tl.where(z > 0, z, z * 0.01)
    elif NAME == "elu":
        y = tl.where(z > 0, z, _expm1(tl.where(z > 0, 0.0, z)))
    elif NAME == "hardsigmoid":
        y = _hardsigmoid(z)
    elif NAME == "hardswish":
        y = z * _hardsigmoid(z)
    elif NAME == "sigmoid":
        y = _sigmoid(z)
    elif NAME == "silu":
        y = z * _sigmoid(z)
    elif NAME == "tanh":
        y = _tanh(z)
    elif NAME == "mish":
        y = z * _tanh_of_softplus(z)
    elif NAME == "gelu":
        y = z * _normal_cdf(z)
    else:
        tl.static_assert(NAME == "none")
        y = z
    return y


@triton.jit
def differentiate(grad_y, z, NAME: tl.constexpr):
    """`grad_y` times the slope of the activation at z; 0 where torch's is, whatever `grad_y` is there."""
    if NAME == "relu":
        grad_z = tl.where(z <= 0, 0.0, grad_y)
    elif NAME == "relu6":
        grad_z = tl.where((z <= 0) | (z >= 6), 0.0, grad_y)
    elif NAME == "leaky_relu":
        grad_z = tl.where(z > 0, grad_y, grad_y * 0.01)
    elif NAME == "elu":
        grad_z = tl.where(z > 0, grad_y, grad_y * tl.exp(tl.where(z > 0, 0.0, z)))
    elif NAME == "hardsigmoid":
        grad_z = tl.where((z <= -3) | (z >= 3), 0.0, grad_y * (1 / 6))
    elif NAME == "hardswish":
        slope = tl.where(z >= 3, 1.0, z * (1 / 3) + 0.5)
        grad_z = tl.where(z <= -3, 0.0, grad_y * slope)
    elif NAME == "sigmoid":
        share = _sigmoid(z)
        grad_z = grad_y * (share * (1 - share))
    elif NAME == "silu":
        share = _sigmoid(z)
        grad_z = grad_y * (share * (1 + z * (1 - share)))
    elif NAME == "tanh":
        share = _tanh(z)
        grad_z = grad_y * (1 - share * share)
    elif NAME == "mish":
        share = _tanh_of_softplus(z)
        grad_z = grad_y * (share + z * (1 - share * share) * _sigmoid(z))
    elif NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        grad_z = grad_y * (_normal_cdf(z) + z * density)
    else:
        tl.static_assert(NAME == "none")
        grad_z = grad_y
    return grad_z


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _hardsigmoid(z):
    shifted = z + 3
    return tl.where(shifted < 0, 0.0, tl.where(shifted > 6, 6.0, shifted)) * (1 / 6)


@triton.jit
def _expm1(z):
    """`e**z - 1`, near 0 by its Taylor series: the difference would have no digits left there."""
    terms: tl.constexpr = 15 if z.dtype == tl.float64 else 9
    r = tl.where(tl.abs(z) < 0.5, z, 0.0)
    series = 1.0 + r * (1.0 / terms)
    for k in tl.static_range(terms - 2):
        series = 1.0 + r * series * (1.0 / (terms - 1 - k))
    return tl.where(tl.abs(z) < 0.5, r * series, tl.exp(z) - 1)


@triton.jit
def _tanh(z):
    size = tl.abs(z)
    e = _expm1(2 * tl.where(size > 20, 20.0, size))
    y = e / (e + 2)
    return tl.where(z < 0, -y, y)


@triton.jit
def _tanh_of_softplus(z):
    """`tanh(log(1 + e)) = (e**2 + 2e) / (e**2 + 2e + 2)` with `e = exp(z)`."""
    e = tl.exp(tl.where(z > 20, 20.0, z))
    w = e * (e + 2)
    return w / (w + 2)


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476))
