"""CPU kernels for contiguous inputs, (samples, channels, positions): each channel while it is in the cache.

A thread takes whole channels, a tile of neighbours at a time. Where channels are too few for the threads,
each takes a part of every channel, and they meet around the merge of what they found.

Statistics are taken block by block: the mean of a block, then its centred sums while it is in the cache, then
a merge in float64 (Chan, Golub & LeVeque 1979). A block whose sums overflow float32 is summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm.kernels.cpu.activations import Real
from batchnorm.kernels.cpu.fields import (
    APPLY,
    CHANNELS,
    EXTRA,
    GRAD_X,
    GRAD_Y,
    GRAD_Z,
    GRADIENT,
    INVSTD,
    M2,
    MEAN,
    OF_BATCH,
    OF_TABLE,
    POSITION_PARTS,
    POSITIONS,
    REDUCE,
    SAMPLE_PARTS,
    SAMPLES,
    SCALE,
    SHIFT,
    STATISTICS,
    STORED,
    TABLE,
    TABLE_ROWS,
    TILE,
    WORK,
    X,
    Y,
)  # fmt: skip
from batchnorm.kernels.cpu.memory import at, call, fields_of, pointer
from batchnorm.kernels.cpu.runs import loop, reduction
from batchnorm.kernels.cpu.statistics import (
    barrier,
    finish_gradient,
    finish_statistics,
    merge,
    num_threads,
    thread_num,
)  # fmt: skip

# Values per block: 16 KiB of float32, half of a first-level cache.
BLOCK = 4096


@reduction
def total(x, n, zero):
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
def block_moments(x, channels, positions, c0, c1, n0, n1, p0, p1, count, table, real):
    """Take positions p0:p1 of samples n0:n1 into the channels c0:c1, which have taken in `count` values."""
    # These rows of the table are free until the statistics are finished.
    centres = at(table, SCALE * channels)
    firsts = at(table, SHIFT * channels)
    seconds = at(table, INVSTD * channels)
    size = p1 - p0
    more = (n1 - n0) * size
    for n in range(n0, n1):
        for c in range(c0, c1):
            found = np.float64(total(at(x, (n * channels + c) * positions + p0), size, real(0)))
            centres[c] = found if n == n0 else centres[c] + found
    for c in range(c0, c1):
        if not math.isfinite(centres[c]):
            centres[c] = 0
            for n in range(n0, n1):
                centres[c] += total(at(x, (n * channels + c) * positions + p0), size, 0.0)
    for n in range(n0, n1):
        for c in range(c0, c1):
            run = at(x, (n * channels + c) * positions + p0)
            centre = real(centres[c] / more)
            first, second = centred_sums(run, size, centre, real(0))
            first, second = np.float64(first), np.float64(second)
            if not math.isfinite(second):
                first, second = centred_sums(run, size, np.float64(centre), 0.0)
            firsts[c] = first if n == n0 else firsts[c] + first
            seconds[c] = second if n == n0 else seconds[c] + second
    for c in range(c0, c1):
        mean = centres[c] / more
        if math.isfinite(mean):
            mean = np.float64(real(mean)) + firsts[c] / more
        m2 = seconds[c] - firsts[c] * firsts[c] / more
        merge(at(table, MEAN * channels), at(table, M2 * channels), c, count, more, mean, m2)
    return more


@loop
def moments(x, channels, positions, c0, c1, n0, n1, p0, p1, table, real):
    """Moments of the channels c0:c1 over positions p0:p1 of samples n0:n1, block after block."""
    samples_per_block = max(1, BLOCK // (p1 - p0))
    count = 0
    n = n0
    while n < n1:
        next_n = min(n + samples_per_block, n1)
        p = p0
        while p < p1:
            next_p = min(p + BLOCK, p1)
            count += block_moments(x, channels, positions, c0, c1, n, next_n, p, next_p, count, table, real)
            p = next_p
        n = next_n


@loop
def bounds(raw, part):
    """The samples n0:n1 and positions p0:p1 of a part."""
    fields = fields_of(raw, np.int64)
    samples, positions = fields[SAMPLES], fields[POSITIONS]
    sample_parts, position_parts = fields[SAMPLE_PARTS], fields[POSITION_PARTS]
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
    channels = fields[CHANNELS]
    count = 0
    for part in range(fields[SAMPLE_PARTS] * fields[POSITION_PARTS]):
        n0, n1, p0, p1 = bounds(raw, part)
        more = (n1 - n0) * (p1 - p0)
        found = at(pointer(fields[WORK], np.float64), part * TABLE_ROWS * channels)
        mean, m2 = at(found, MEAN * channels)[c], at(found, M2 * channels)[c]
        merge(at(table, MEAN * channels), at(table, M2 * channels), c, count, more, mean, m2)
        count += more


def forward(real: Real) -> Callable[[Any], None]:
    """The forward kernel: statistics, then `APPLY` on every run."""

    @loop
    def apply(raw, table, c0, c1, n0, n1, p0, p1):
        fields = fields_of(raw, np.int64)
        channels, positions = fields[CHANNELS], fields[POSITIONS]
        x, y, residual = pointer(fields[X], real), pointer(fields[Y], real), pointer(fields[EXTRA], real)
        means, scales, shifts = (
            at(table, MEAN * channels),
            at(table, SCALE * channels),
            at(table, SHIFT * channels),
        )
        for k in range(n1 - n0):
            n = n1 - 1 - k  # backwards: the last samples are those still in the cache
            for c in range(c0, c1):
                run = (n * channels + c) * positions + p0
                mean, scale, shift = real(means[c]), real(scales[c]), real(shifts[c])
                call(fields[APPLY], (at(x, run), at(residual, run), at(y, run), p1 - p0, mean, scale, shift))

    @loop
    def by_channels(raw, table, c0, c1):
        fields = fields_of(raw, np.int64)
        samples, channels, positions = fields[SAMPLES], fields[CHANNELS], fields[POSITIONS]
        c = c0
        while c < c1:
            last = min(c + fields[TILE], c1)
            if fields[STATISTICS] == OF_BATCH:
                moments(
                    pointer(fields[X], real),
                    channels,
                    positions,
                    c,
                    last,
                    0,
                    samples,
                    0,
                    positions,
                    table,
                    real,
                )
            if fields[STATISTICS] != OF_TABLE:
                for k in range(c, last):
                    finish_statistics(raw, table, k, samples * positions, real)
            apply(raw, table, c, last, 0, samples, 0, positions)
            c = last

    @loop
    def by_parts(raw, table, thread, team):
        fields = fields_of(raw, np.int64)
        samples, channels, positions = fields[SAMPLES], fields[CHANNELS], fields[POSITIONS]
        parts = fields[SAMPLE_PARTS] * fields[POSITION_PARTS]
        mine = range(parts * thread // team, parts * (thread + 1) // team)
        if fields[STATISTICS] == OF_BATCH:
            for part in mine:
                n0, n1, p0, p1 = bounds(raw, part)
                found = at(pointer(fields[WORK], np.float64), part * TABLE_ROWS * channels)
                for c in range(channels):
                    moments(
                        pointer(fields[X], real), channels, positions, c, c + 1, n0, n1, p0, p1, found, real
                    )
        barrier()
        if fields[STATISTICS] != OF_TABLE:
            for c in range(channels * thread // team, channels * (thread + 1) // team):
                if fields[STATISTICS] == OF_BATCH:
                    merge_parts(raw, table, c)
                finish_statistics(raw, table, c, samples * positions, real)
        barrier()
        for part in mine:
            n0, n1, p0, p1 = bounds(raw, part)
            apply(raw, table, 0, channels, n0, n1, p0, p1)

    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels = pointer(fields[TABLE], np.float64), fields[CHANNELS]
        if fields[SAMPLE_PARTS] * fields[POSITION_PARTS] > 1:
            by_parts(raw, table, thread, team)
        else:
            by_channels(raw, table, channels * thread // team, channels * (thread + 1) // team)

    return kernel


def backward(real: Real) -> Callable[[Any], None]:
    """The backward kernel: `REDUCE` on every run, then `GRADIENT` where the gradient of x is wanted."""

    @loop
    def reduce(raw, table, sums, c0, c1, n0, n1, p0, p1):
        fields = fields_of(raw, np.int64)
        channels, positions = fields[CHANNELS], fields[POSITIONS]
        grad_y, x = pointer(fields[GRAD_Y], real), pointer(fields[X], real)
        extra, grad_z = pointer(fields[EXTRA], real), pointer(fields[GRAD_Z], real)
        means, scales, shifts = (
            at(table, MEAN * channels),
            at(table, SCALE * channels),
            at(table, SHIFT * channels),
        )
        for c in range(c0, c1):
            sums[2 * c] = 0
            sums[2 * c + 1] = 0
        if fields[REDUCE] == 0:
            return
        for n in range(n0, n1):
            for c in range(c0, c1):
                mean, scale, shift = real(means[c]), real(scales[c]), real(shifts[c])
                p = p0
                while p < p1:
                    run, size = (n * channels + c) * positions + p, min(BLOCK, p1 - p)
                    call(
                        fields[REDUCE],
                        (
                            at(grad_y, run), at(x, run), at(extra, run), at(grad_z, run),
                            size, mean, scale, shift, at(sums, 2 * c),
                        ),
                    )  # fmt: skip
                    p += size

    @loop
    def gradient(raw, table, coefficients, c0, c1, n0, n1, p0, p1):
        fields = fields_of(raw, np.int64)
        channels, positions = fields[CHANNELS], fields[POSITIONS]
        x, extra, grad_x = (
            pointer(fields[X], real),
            pointer(fields[EXTRA], real),
            pointer(fields[GRAD_X], real),
        )
        grad = pointer(fields[GRAD_Z] if fields[STORED] else fields[GRAD_Y], real)
        means, scales, shifts = (
            at(table, MEAN * channels),
            at(table, SCALE * channels),
            at(table, SHIFT * channels),
        )
        for k in range(n1 - n0):
            n = n1 - 1 - k
            for c in range(c0, c1):
                run = (n * channels + c) * positions + p0
                call(
                    fields[GRADIENT],
                    (
                        at(grad, run), at(x, run), at(extra, run), at(grad_x, run), p1 - p0,
                        real(means[c]), real(scales[c]), real(shifts[c]),
                        real(coefficients[3 * c]), real(coefficients[3 * c + 1]),
                        real(coefficients[3 * c + 2]),
                    ),
                )  # fmt: skip

    @loop
    def finish(raw, table, coefficients, c, first, second):
        fields = fields_of(raw, np.int64)
        count = fields[SAMPLES] * fields[POSITIONS]
        by_grad, by_x, constant = finish_gradient(raw, table, c, count, first, second, real)
        coefficients[3 * c] = by_grad
        coefficients[3 * c + 1] = by_x
        coefficients[3 * c + 2] = constant

    @loop
    def by_channels(raw, table, c0, c1):
        fields = fields_of(raw, np.int64)
        samples, channels, positions = fields[SAMPLES], fields[CHANNELS], fields[POSITIONS]
        coefficients = pointer(fields[WORK], np.float64)
        sums = at(coefficients, 3 * channels)
        c = c0
        while c < c1:
            last = min(c + fields[TILE], c1)
            reduce(raw, table, sums, c, last, 0, samples, 0, positions)
            for k in range(c, last):
                finish(raw, table, coefficients, k, sums[2 * k], sums[2 * k + 1])
            if fields[GRAD_X] != 0:
                gradient(raw, table, coefficients, c, last, 0, samples, 0, positions)
            c = last

    @loop
    def by_parts(raw, table, thread, team):
        fields = fields_of(raw, np.int64)
        channels = fields[CHANNELS]
        coefficients = pointer(fields[WORK], np.float64)
        parts = fields[SAMPLE_PARTS] * fields[POSITION_PARTS]
        mine = range(parts * thread // team, parts * (thread + 1) // team)
        for part in mine:
            n0, n1, p0, p1 = bounds(raw, part)
            sums = at(coefficients, (3 + 2 * part) * channels)
            for c in range(channels):
                reduce(raw, table, sums, c, c + 1, n0, n1, p0, p1)
        barrier()
        for c in range(channels * thread // team, channels * (thread + 1) // team):
            first, second = 0.0, 0.0
            for part in range(parts):
                sums = at(coefficients, (3 + 2 * part) * channels)
                first += sums[2 * c]
                second += sums[2 * c + 1]
            finish(raw, table, coefficients, c, first, second)
        barrier()
        if fields[GRAD_X] != 0:
            for part in mine:
                n0, n1, p0, p1 = bounds(raw, part)
                gradient(raw, table, coefficients, 0, channels, n0, n1, p0, p1)

    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels = pointer(fields[TABLE], np.float64), fields[CHANNELS]
        if fields[SAMPLE_PARTS] * fields[POSITION_PARTS] > 1:
            by_parts(raw, table, thread, team)
        else:
            by_channels(raw, table, channels * thread // team, channels * (thread + 1) // team)

    return kernel
