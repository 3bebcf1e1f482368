"""CPU kernels for contiguous inputs, (samples, channels, positions): each channel while it is in the cache.

A thread takes whole channels, a tile of neighbours at a time. Where channels are too few for the threads,
each takes a part of every channel, and they meet around the merge of what they found.

Statistics are taken block by block: sums centred at the mean so far, or, in the first block and where that
mean is far off, at the block's own, in a second pass while it is in the cache; then a merge in float64 (Chan,
Golub & LeVeque 1979). A block whose sums overflow float32 is summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu.activations import Real
from batchnorm.kernels.cpu.channel import (
    applied_statistics,
    barrier,
    finish_gradient,
    finish_statistics,
    grad_of_z,
    is_near_mean,
    merge,
    num_threads,
    tensor,
    thread_num,
)
from batchnorm.kernels.cpu.memory import at, call, fields_of, pointer
from batchnorm.kernels.cpu.runs import BLOCK, loop, reduction

# Values of the first block, which is read twice: for a mean that is near enough to centre the others by.
FIRST = 64


@reduction
def total(x, n, zero):
    """`sum(x)`, in the type of `zero`."""
    result = zero
    for i in range(n):
        result += x[i]
    return result


@reduction
def centred_sums(x, n, centre, zero):
    """`sum(x - centre)` and `sum((x - centre)**2)`."""
    first = zero
    second = zero
    for i in range(n):
        d = x[i] - centre
        first += d
        second += d * d
    return first, second


@loop
def exact_moments(x, channels, positions, c, n0, n1, p0, p1):
    """Mean and m2 of positions p0:p1 of samples n0:n1 of channel c, in float64."""
    size = p1 - p0
    mean = 0.0
    for n in range(n0, n1):
        mean += total(at(x, (n * channels + c) * positions + p0), size, 0.0)
    mean /= (n1 - n0) * size
    m2 = 0.0
    for n in range(n0, n1):
        m2 += centred_sums(at(x, (n * channels + c) * positions + p0), size, mean, 0.0)[1]
    return mean, m2


@loop
def sum_centred(x, channels, positions, c0, c1, n0, n1, p0, p1, centres, firsts, seconds, real):
    """Writes the sums of `x - centre` and of its square, with the centres rounded to the type of x."""
    for c in range(c0, c1):
        firsts[c] = 0.0
        seconds[c] = 0.0
    for n in range(n0, n1):
        for c in range(c0, c1):
            run = at(x, (n * channels + c) * positions + p0)
            first, second = centred_sums(run, p1 - p0, real(centres[c]), real(0))
            firsts[c] += first
            seconds[c] += second


@loop
def block_moments(x, channels, positions, c0, c1, n0, n1, p0, p1, count, table, real):
    """Take positions p0:p1 of samples n0:n1 into the channels c0:c1, which have taken in `count` values."""
    # These rows of the table are free until the statistics are finished.
    centres = at(table, f.SCALE * channels)
    firsts = at(table, f.SHIFT * channels)
    seconds = at(table, f.INVSTD * channels)
    more = (n1 - n0) * (p1 - p0)
    near = count > 0
    if near:
        for c in range(c0, c1):
            centres[c] = at(table, f.MEAN * channels)[c]
        sum_centred(x, channels, positions, c0, c1, n0, n1, p0, p1, centres, firsts, seconds, real)
        for c in range(c0, c1):
            near &= is_near_mean(firsts[c], seconds[c], more)
    if not near:
        for c in range(c0, c1):
            centres[c] = 0.0
        for n in range(n0, n1):
            for c in range(c0, c1):
                centres[c] += total(at(x, (n * channels + c) * positions + p0), p1 - p0, real(0))
        for c in range(c0, c1):
            centres[c] /= more
        sum_centred(x, channels, positions, c0, c1, n0, n1, p0, p1, centres, firsts, seconds, real)
    for c in range(c0, c1):
        mean = np.float64(real(centres[c])) + firsts[c] / more
        m2 = seconds[c] - firsts[c] * firsts[c] / more
        if not math.isfinite(m2):
            mean, m2 = exact_moments(x, channels, positions, c, n0, n1, p0, p1)
        merge(at(table, f.MEAN * channels), at(table, f.M2 * channels), c, count, more, mean, m2)
    return more


@loop
def moments(x, channels, positions, c0, c1, n0, n1, p0, p1, table, real):
    """Moments of the channels c0:c1 over positions p0:p1 of samples n0:n1, block after block."""
    size = p1 - p0
    # In the order of memory: of long runs, all of one channel's before the next channel's.
    channels_per_block = c1 - c0 if size <= BLOCK else 1
    n = n0
    while n < n1:
        next_n = min(n + max(1, (BLOCK if n > n0 else FIRST) // size), n1)
        c = c0
        while c < c1:
            next_c = c + channels_per_block
            count = (n - n0) * size
            p = p0
            while p < p1:
                next_p = min(p + BLOCK, p1)
                count += block_moments(
                    x, channels, positions, c, next_c, n, next_n, p, next_p, count, table, real
                )  # fmt: skip
                p = next_p
            c = next_c
        n = next_n


@loop
def bounds(raw, part):
    """The samples n0:n1 and positions p0:p1 of a part."""
    fields = fields_of(raw, np.int64)
    samples, positions = fields[f.SAMPLES], fields[f.POSITIONS]
    sample_parts, position_parts = fields[f.SAMPLE_PARTS], fields[f.POSITION_PARTS]
    n, p = part // position_parts, part % position_parts
    return (
        samples * n // sample_parts,
        samples * (n + 1) // sample_parts,
        positions * p // position_parts,
        positions * (p + 1) // position_parts,
    )


@loop
def merge_parts(raw, table, c):
    """The moments of channel c out of those of its parts."""
    fields = fields_of(raw, np.int64)
    channels = fields[f.CHANNELS]
    count = 0
    for part in range(fields[f.SAMPLE_PARTS] * fields[f.POSITION_PARTS]):
        n0, n1, p0, p1 = bounds(raw, part)
        more = (n1 - n0) * (p1 - p0)
        found = at(pointer(fields[f.WORK], np.float64), part * f.TABLE_ROWS * channels)
        mean, m2 = at(found, f.MEAN * channels)[c], at(found, f.M2 * channels)[c]
        merge(at(table, f.MEAN * channels), at(table, f.M2 * channels), c, count, more, mean, m2)
        count += more


@loop
def words_of(raw):
    """Words of bits of a channel of a sample."""
    return (fields_of(raw, np.int64)[f.POSITIONS] + f.WORD - 1) // f.WORD


@loop
def bits_of(raw, n, c):
    """The bits of channel c of sample n, where there are any: only where positions are not cut into parts."""
    fields = fields_of(raw, np.int64)
    return at(pointer(fields[f.BITS], np.int32), (n * fields[f.CHANNELS] + c) * words_of(raw))


@loop
def apply(raw, table, c0, c1, n0, n1, p0, p1, real):
    """Write y, where it is wanted, for positions p0:p1 of samples n0:n1 of the channels c0:c1."""
    fields = fields_of(raw, np.int64)
    if fields[f.APPLY] == 0:
        return
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    x, y, residual = tensor(raw, f.X, real), tensor(raw, f.Y, real), tensor(raw, f.EXTRA, real)
    means, scales, shifts = applied_statistics(raw, table)
    for n in range(n0, n1):
        first = (n * channels + c0) * positions + p0
        call(
            fields[f.APPLY],
            (
                at(x, first), at(residual, first), at(y, first), bits_of(raw, n, c0), c1 - c0, positions,
                words_of(raw), p1 - p0, at(means, c0), at(scales, c0), at(shifts, c0),
            ),
        )  # fmt: skip


@loop
def forward_by_channels(raw, table, c0, c1, real):
    """All of the channels c0:c1, tile after tile."""
    fields = fields_of(raw, np.int64)
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    n0, n1, p0, p1 = bounds(raw, 0)
    c = c0
    while c < c1:
        last = min(c + fields[f.TILE], c1)
        if fields[f.STATISTICS] == f.OF_BATCH:
            moments(tensor(raw, f.X, real), channels, positions, c, last, n0, n1, p0, p1, table, real)
        if fields[f.STATISTICS] != f.OF_TABLE:
            finish_statistics(raw, table, c, last, real)
        apply(raw, table, c, last, n0, n1, p0, p1, real)
        c = last


@loop
def forward_by_parts(raw, table, thread, team, real):
    """A share of the parts of every channel; the threads merge what they found in between."""
    fields = fields_of(raw, np.int64)
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    parts = fields[f.SAMPLE_PARTS] * fields[f.POSITION_PARTS]
    mine = range(parts * thread // team, parts * (thread + 1) // team)
    if fields[f.STATISTICS] == f.OF_BATCH:
        for part in mine:
            n0, n1, p0, p1 = bounds(raw, part)
            found = at(pointer(fields[f.WORK], np.float64), part * f.TABLE_ROWS * channels)
            c = 0
            while c < channels:
                last = min(c + fields[f.TILE], channels)
                moments(tensor(raw, f.X, real), channels, positions, c, last, n0, n1, p0, p1, found, real)
                c = last
    barrier()
    if fields[f.STATISTICS] != f.OF_TABLE:
        c0, c1 = channels * thread // team, channels * (thread + 1) // team
        if fields[f.STATISTICS] == f.OF_BATCH:
            for c in range(c0, c1):
                merge_parts(raw, table, c)
        finish_statistics(raw, table, c0, c1, real)
    barrier()
    for part in mine:
        n0, n1, p0, p1 = bounds(raw, part)
        apply(raw, table, 0, channels, n0, n1, p0, p1, real)


@loop
def reduce(raw, table, sums, c0, c1, n0, n1, p0, p1, real):
    """Write `sum(grad_z)` and `sum(grad_z * (x - mean))` of the channels c0:c1 to `sums`, side by side."""
    fields = fields_of(raw, np.int64)
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    grad_y, x = tensor(raw, f.GRAD_Y, real), tensor(raw, f.X, real)
    extra, grad_z = tensor(raw, f.EXTRA, real), tensor(raw, f.GRAD_Z, real)
    means, scales, shifts = applied_statistics(raw, table)
    for c in range(c0, c1):
        sums[2 * c] = 0
        sums[2 * c + 1] = 0
    if fields[f.REDUCE] == 0:
        return
    for n in range(n0, n1):
        first = (n * channels + c0) * positions + p0
        call(
            fields[f.REDUCE],
            (
                at(grad_y, first), at(x, first), at(extra, first), at(grad_z, first), bits_of(raw, n, c0),
                c1 - c0, positions, words_of(raw), p1 - p0,
                at(means, c0), at(scales, c0), at(shifts, c0), at(sums, 2 * c0),
            ),
        )  # fmt: skip


@loop
def gradient(raw, table, coefficients, c0, c1, n0, n1, p0, p1, real):
    """Write the gradient of x for positions p0:p1 of samples n0:n1 of the channels c0:c1."""
    fields = fields_of(raw, np.int64)
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    x, extra, grad_x = (
        tensor(raw, f.X, real),
        tensor(raw, f.EXTRA, real),
        tensor(raw, f.GRAD_X, real),
    )
    grad = grad_of_z(raw, real)
    means, scales, shifts = applied_statistics(raw, table)
    for n in range(n0, n1):
        first = (n * channels + c0) * positions + p0
        call(
            fields[f.GRADIENT],
            (
                at(grad, first), at(x, first), at(extra, first), at(grad_x, first), bits_of(raw, n, c0),
                c1 - c0, positions, words_of(raw), p1 - p0,
                at(means, c0), at(scales, c0), at(shifts, c0), at(coefficients, 3 * c0),
            ),
        )  # fmt: skip


@loop
def finish(raw, table, coefficients, c, first, second, real):
    """Coefficients of channel c out of its sums."""
    by_grad, by_x, constant = finish_gradient(raw, table, c, first, second, real)
    coefficients[3 * c] = by_grad
    coefficients[3 * c + 1] = by_x
    coefficients[3 * c + 2] = constant


@loop
def backward_by_channels(raw, table, c0, c1, real):
    """As `forward_by_channels`."""
    fields = fields_of(raw, np.int64)
    channels = fields[f.CHANNELS]
    n0, n1, p0, p1 = bounds(raw, 0)
    coefficients = pointer(fields[f.WORK], np.float64)
    sums = at(coefficients, 3 * channels)
    c = c0
    while c < c1:
        last = min(c + fields[f.TILE], c1)
        reduce(raw, table, sums, c, last, n0, n1, p0, p1, real)
        for k in range(c, last):
            finish(raw, table, coefficients, k, sums[2 * k], sums[2 * k + 1], real)
        if fields[f.GRAD_X] != 0:
            gradient(raw, table, coefficients, c, last, n0, n1, p0, p1, real)
        c = last


@loop
def backward_by_parts(raw, table, thread, team, real):
    """As `forward_by_parts`."""
    fields = fields_of(raw, np.int64)
    channels = fields[f.CHANNELS]
    coefficients = pointer(fields[f.WORK], np.float64)
    parts = fields[f.SAMPLE_PARTS] * fields[f.POSITION_PARTS]
    mine = range(parts * thread // team, parts * (thread + 1) // team)
    for part in mine:
        n0, n1, p0, p1 = bounds(raw, part)
        sums = at(coefficients, (3 + 2 * part) * channels)
        c = 0
        while c < channels:
            last = min(c + fields[f.TILE], channels)
            reduce(raw, table, sums, c, last, n0, n1, p0, p1, real)
            c = last
    barrier()
    for c in range(channels * thread // team, channels * (thread + 1) // team):
        first, second = 0.0, 0.0
        for part in range(parts):
            sums = at(coefficients, (3 + 2 * part) * channels)
            first += sums[2 * c]
            second += sums[2 * c + 1]
        finish(raw, table, coefficients, c, first, second, real)
    barrier()
    if fields[f.GRAD_X] != 0:
        for part in mine:
            n0, n1, p0, p1 = bounds(raw, part)
            gradient(raw, table, coefficients, 0, channels, n0, n1, p0, p1, real)


def forward(real: Real) -> Callable[[Any], None]:
    """The forward kernel: statistics, then `APPLY` on every run."""
    return _kernel(forward_by_channels, forward_by_parts, real)


def backward(real: Real) -> Callable[[Any], None]:
    """The backward kernel: `REDUCE` on every run, then `GRADIENT` where the gradient of x is wanted."""
    return _kernel(backward_by_channels, backward_by_parts, real)


def _kernel(by_channels: Any, by_parts: Any, real: Real) -> Callable[[Any], None]:
    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels = pointer(fields[f.TABLE], np.float64), fields[f.CHANNELS]
        if fields[f.SAMPLE_PARTS] * fields[f.POSITION_PARTS] > 1:
            by_parts(raw, table, thread, team, real)
        else:
            by_channels(raw, table, channels * thread // team, channels * (thread + 1) // team, real)

    return kernel
