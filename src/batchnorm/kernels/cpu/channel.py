"""What all CPU kernels do with a channel: merge its moments, finish its statistics and its gradients."""

from __future__ import annotations

import math

import numpy as np
from numba import types

from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu.memory import at, fields_of, get, pointer, put
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
def merge_side_by_side(means, m2s, n, count, more, found_means, found_m2s):
    """`merge` for n channels next to each other."""
    if count == 0:
        for c in range(n):
            put(means, c, get(found_means, c))
        for c in range(n):
            put(m2s, c, get(found_m2s, c))
        return
    before = np.float64(count) / (count + more)
    for c in range(n):
        d = get(found_means, c) - get(means, c)
        put(means, c, get(means, c) * before + get(found_means, c) * (1 - before))
        put(m2s, c, get(m2s, c) + (get(found_m2s, c) + d * d * (before * more)))


@loop
def finish_statistics(raw, table, c0, c1, real):
    """Scale, shift and invstd of the channels c0:c1, by their mean and m2 or by the running statistics.

    Moves the running statistics otherwise. A loop for each step, free of what is the same for all channels:
    these become vectors.
    """
    fields, numbers = fields_of(raw, np.int64), fields_of(raw, np.float64)
    n, channels, count, eps = c1 - c0, fields[f.CHANNELS], numbers[f.COUNT], numbers[f.EPS]
    means, m2s = at(table, f.MEAN * channels + c0), at(table, f.M2 * channels + c0)
    scales, shifts = at(table, f.SCALE * channels + c0), at(table, f.SHIFT * channels + c0)
    invstds = at(table, f.INVSTD * channels + c0)
    if fields[f.STATISTICS] == f.RUNNING:
        count = 1.0
        running_mean, running_var = tensor(raw, f.RUNNING_MEAN, real), tensor(raw, f.RUNNING_VAR, real)
        for c in range(n):
            put(means, c, np.float64(get(running_mean, c0 + c)))
        for c in range(n):
            put(m2s, c, np.float64(get(running_var, c0 + c)))
    elif fields[f.RUNNING_MEAN] != 0:
        move(at(tensor(raw, f.RUNNING_MEAN, real), c0), means, n, 1.0, numbers[f.MOMENTUM], real)
        move(at(tensor(raw, f.RUNNING_VAR, real), c0), m2s, n, count - 1, numbers[f.MOMENTUM], real)
    for c in range(n):
        put(invstds, c, 1 / math.sqrt(get(m2s, c) / count + eps))
    if fields[f.WEIGHT] != 0:
        weight = at(tensor(raw, f.WEIGHT, real), c0)
        for c in range(n):
            put(scales, c, get(invstds, c) * get(weight, c))
    else:
        for c in range(n):
            put(scales, c, get(invstds, c))
    for c in range(n):
        # What the values' dtype cannot hold of the mean goes into the shift.
        rest = get(means, c) - np.float64(real(get(means, c))) if math.isfinite(get(means, c)) else 0.0
        put(shifts, c, -rest * get(scales, c))
    if fields[f.BIAS] != 0:
        bias = at(tensor(raw, f.BIAS, real), c0)
        for c in range(n):
            put(shifts, c, get(shifts, c) + np.float64(get(bias, c)))
    if c0 == 0 < n and fields[f.STATISTICS] != f.RUNNING and fields[f.NUM_BATCHES] != 0:
        pointer(fields[f.NUM_BATCHES], np.int64)[0] += 1


@loop
def move(running, values, n, divisor, momentum, real):
    """Move running statistics towards `values / divisor`."""
    for c in range(n):
        of_batch = get(values, c) / divisor
        put(running, c, real((1 - momentum) * get(running, c) + momentum * of_batch))


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
