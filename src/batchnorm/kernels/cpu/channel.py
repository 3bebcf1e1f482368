"""What all CPU kernels do with a channel: merge its moments, finish its statistics and its gradients."""

from __future__ import annotations

import math

import numpy as np
from numba import types

from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu.memory import at, fields_of, pointer
from batchnorm.kernels.cpu.runs import loop

thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())


@loop
def tensor(raw, field, real):
    """The tensor whose address is in a field."""
    return pointer(fields_of(raw, np.int64)[field], real)


@loop
def applied_statistics(raw, table):
    """Mean, scale and shift of all channels."""
    channels = fields_of(raw, np.int64)[f.CHANNELS]
    return at(table, f.MEAN * channels), at(table, f.SCALE * channels), at(table, f.SHIFT * channels)


@loop
def grad_of_z(raw, real):
    """What the gradient of x is computed from: grad_z where the sums have left it, else grad_y."""
    fields = fields_of(raw, np.int64)
    return pointer(fields[f.GRAD_Z] if fields[f.STORED] else fields[f.GRAD_Y], real)


@loop
def is_near_mean(first, second, count):
    """Whether `sum(x - centre)` and `sum((x - centre)**2)` of `count` values tell their variance.

    While `(mean - centre)**2` is at most 4 variances, `second - first**2 / count` loses little more than 2
    bits, and another pass, with the mean itself as the centre, is saved.
    """
    return first * first * 1.25 <= count * second


@loop
def merge(means, m2s, c, count, more, mean, m2):
    """Add `more` values of this mean and m2 to a channel that has taken in `count` (Chan et al. 1979)."""
    if count == 0:
        means[c] = mean
        m2s[c] = m2
        return
    both = count + more
    d = mean - means[c]
    # Not means[c] + d * share: after an infinite mean, d is NaN or infinite the other way.
    means[c] = (means[c] * count + mean * more) / both
    m2s[c] += m2 + d * d * (np.float64(count) * more / both)


@loop
def finish_statistics(raw, table, c, real):
    """Scale, shift and invstd of channel c by its mean and m2, or by the running statistics; moves those."""
    fields, numbers = fields_of(raw, np.int64), fields_of(raw, np.float64)
    channels = fields[f.CHANNELS]
    means, m2s = at(table, f.MEAN * channels), at(table, f.M2 * channels)
    running_mean, running_var = pointer(fields[f.RUNNING_MEAN], real), pointer(fields[f.RUNNING_VAR], real)
    if fields[f.STATISTICS] == f.RUNNING:
        means[c] = running_mean[c]
        var = np.float64(running_var[c])
    else:
        count = numbers[f.COUNT]
        var = m2s[c] / count
        if fields[f.RUNNING_MEAN] != 0:
            momentum = numbers[f.MOMENTUM]
            running_mean[c] = (1 - momentum) * running_mean[c] + momentum * means[c]
            running_var[c] = (1 - momentum) * running_var[c] + momentum * (m2s[c] / (count - 1))
        if c == 0 and fields[f.NUM_BATCHES] != 0:
            pointer(fields[f.NUM_BATCHES], np.int64)[0] += 1
    invstd = 1 / math.sqrt(var + numbers[f.EPS])
    scale = invstd
    if fields[f.WEIGHT] != 0:
        scale *= pointer(fields[f.WEIGHT], real)[c]
    shift = 0.0
    if fields[f.BIAS] != 0:
        shift = np.float64(pointer(fields[f.BIAS], real)[c])
    # What the values' dtype cannot hold of the mean goes into the shift.
    rest = means[c] - np.float64(real(means[c])) if math.isfinite(means[c]) else 0.0
    at(table, f.INVSTD * channels)[c] = invstd
    at(table, f.SCALE * channels)[c] = scale
    at(table, f.SHIFT * channels)[c] = shift - rest * scale


@loop
def finish_gradient(raw, table, c, first, second, real):
    """Sums and gradients of weight and bias of channel c; `(by_grad, by_x, constant)` of the gradient of x.

    `grad_x = scale * (grad_z - mean(grad_z) - xhat * mean(grad_z * xhat))` with `xhat = (x - mean) * invstd`.
    """
    fields, count = fields_of(raw, np.int64), fields_of(raw, np.float64)[f.COUNT]
    channels = fields[f.CHANNELS]
    mean, invstd = at(table, f.MEAN * channels)[c], at(table, f.INVSTD * channels)[c]
    rest = mean - np.float64(real(mean))
    dot = second - rest * first
    if fields[f.GRAD_WEIGHT] != 0:
        pointer(fields[f.GRAD_WEIGHT], real)[c] = dot * invstd
    if fields[f.GRAD_BIAS] != 0:
        pointer(fields[f.GRAD_BIAS], real)[c] = first
    if fields[f.SUMS] != 0:
        sums = pointer(fields[f.SUMS], np.float64)
        sums[c], sums[channels + c] = first, second
    scale = at(table, f.SCALE * channels)[c]
    if fields[f.COEFFICIENTS] != 0:
        given = pointer(fields[f.COEFFICIENTS], np.float64)
        return scale, given[c], given[channels + c]
    if fields[f.BY_BATCH] == 0:
        return scale, 0.0, 0.0
    by_x = -scale * invstd * invstd * (dot / count)
    return scale, by_x, -scale * (first / count) - rest * by_x
