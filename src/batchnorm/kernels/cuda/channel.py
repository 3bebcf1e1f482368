"""What the Triton kernels do with a channel: merge its moments, finish its statistics and its gradients.

In float64 throughout: it is little work, and a mean far from 0 keeps its digits. All of it takes one channel
or a vector of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of a layer's table: float64, one number per channel.
MEAN = tl.constexpr(0)
M2 = tl.constexpr(1)
INVSTD = tl.constexpr(2)
SCALE = tl.constexpr(3)
SHIFT = tl.constexpr(4)
COUNT = tl.constexpr(5)


@triton.jit
def merge(count, mean, m2, more, mean_of_more, m2_of_more):
    """The moments of both (Chan, Golub & LeVeque 1979), neither of them empty."""
    both = count + more
    d = mean_of_more - mean
    # Not mean + d * share: after an infinite mean, d is NaN or infinite the other way.
    mean = (mean * count + mean_of_more * more) / both
    return both, mean, m2 + m2_of_more + d * d * (count * more / both)


@triton.jit
def finish_statistics(
    c, there, count, mean, m2, table, channels, weight, bias,
    running_mean, running_var, num_batches_tracked, momentum, momentum_rest, eps, eps_rest,
):  # fmt: skip
    """Moves a channel's running statistics, writes its table; mean, scale and shift."""
    if running_mean is not None:
        m = tl.cast(momentum, tl.float64) + tl.cast(momentum_rest, tl.float64)
        old_mean = tl.load(running_mean + c, mask=there, other=0.0).to(tl.float64)
        old_var = tl.load(running_var + c, mask=there, other=1.0).to(tl.float64)
        store(running_mean + c, (1 - m) * old_mean + m * mean, there)
        store(running_var + c, (1 - m) * old_var + m * (m2 / (count - 1)), there)
    if num_batches_tracked is not None:
        if tl.program_id(0) == 0:
            tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1)
    return write_table(
        c, there, there, count, mean, m2, m2 / count, table, channels, weight, bias, eps, eps_rest
    )  # fmt: skip


@triton.jit
def write_table(
    c, there, write, count, mean, m2, var, table, channels, weight, bias, eps, eps_rest
):  # fmt: skip
    """A channel's mean, scale and shift, and all its numbers into the table, where `write`."""
    invstd = 1 / tl.sqrt(var + (tl.cast(eps, tl.float64) + tl.cast(eps_rest, tl.float64)))
    scale = invstd
    if weight is not None:
        scale = invstd * tl.load(weight + c, mask=there, other=0.0).to(tl.float64)
    shift = tl.zeros_like(invstd)
    if bias is not None:
        shift = tl.load(bias + c, mask=there, other=0.0).to(tl.float64)
    tl.store(table + MEAN * channels + c, mean, mask=write)
    tl.store(table + M2 * channels + c, m2, mask=write)
    tl.store(table + INVSTD * channels + c, invstd, mask=write)
    tl.store(table + SCALE * channels + c, scale, mask=write)
    tl.store(table + SHIFT * channels + c, shift, mask=write)
    tl.store(table + COUNT * channels + c, count, mask=write)
    return mean, scale, shift


@triton.jit
def load_statistics(table, c, there, channels):
    """Mean, scale and shift of a channel."""
    mean = tl.load(table + MEAN * channels + c, mask=there, other=0.0)
    scale = tl.load(table + SCALE * channels + c, mask=there, other=0.0)
    shift = tl.load(table + SHIFT * channels + c, mask=there, other=0.0)
    return mean, scale, shift


@triton.jit
def rounded(mean, scale, shift, WIDE: tl.constexpr):
    """The same in the dtype of the sums; what that cannot hold of the mean goes into the shift."""
    narrow = mean.to(WIDE)
    rest = rest_of(mean, narrow)
    shift = tl.where(rest == 0, shift, shift - rest * scale)
    return narrow, scale.to(WIDE), shift.to(WIDE)


@triton.jit
def rest_of(mean, narrow):
    """What was lost in rounding the mean; nothing of an infinite one."""
    rest = mean - narrow.to(tl.float64)
    return tl.where(rest == rest, rest, 0.0)


@triton.jit
def finish_gradient(
    c, there, first, second, table, channels, grad_weight, grad_bias, WIDE: tl.constexpr
):  # fmt: skip
    """Writes the gradients of a channel's weight and bias; `(by_x, constant)` of the gradient of x.

    `first = sum(g)` and `second = sum(g * (x - rounded mean))`, with which
    `grad_x = scale * (g - mean(g) - xhat * mean(g * xhat))`, where `xhat = (x - mean) * invstd`, is
    `scale * g + by_x * (x - rounded mean) + constant`.
    """
    mean = tl.load(table + MEAN * channels + c, mask=there, other=0.0)
    invstd = tl.load(table + INVSTD * channels + c, mask=there, other=0.0)
    scale = tl.load(table + SCALE * channels + c, mask=there, other=0.0)
    count = tl.load(table + COUNT * channels + c, mask=there, other=1.0)
    rest = rest_of(mean, mean.to(WIDE))
    dot = tl.where(rest == 0, second, second - rest * first)
    if grad_weight is not None:
        store(grad_weight + c, dot * invstd, there)
    if grad_bias is not None:
        store(grad_bias + c, first, there)
    by_x = -scale * invstd * invstd * (dot / count)
    constant = -scale * (first / count)
    return by_x, tl.where(rest == 0, constant, constant - rest * by_x)


@triton.jit
def store(pointers, values, mask):
    """Float64 values in whatever dtype the memory has."""
    if pointers.dtype.element_ty == tl.float64:
        tl.store(pointers, values, mask=mask)
    else:
        tl.store(pointers, values.to(tl.float32), mask=mask)
