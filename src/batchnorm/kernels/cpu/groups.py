"""CPU kernels for contiguous inputs whose channels are short runs, such as 7 x 7 positions of a deep layer.

A call per run would cost more than the run. So a group of neighbouring channels is taken at once: in each
sample they are one row of columns, with a column of statistics and coefficients for every position. A thread
takes whole channels, as in `slabs.py`, and statistics are taken in blocks of samples and merged likewise.
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
    M2,
    MEAN,
    OF_BATCH,
    OF_TABLE,
    POSITIONS,
    REDUCE,
    REDUCE_ONE,
    SAMPLES,
    SCALE,
    SCRATCH,
    SHIFT,
    STATISTICS,
    STORED,
    TABLE,
    TILE,
    WORK,
    X,
    Y,
)  # fmt: skip
from batchnorm.kernels.cpu.memory import at, call, fields_of, pointer
from batchnorm.kernels.cpu.rows import BLOCK, add_centred_rows, add_rows
from batchnorm.kernels.cpu.runs import loop
from batchnorm.kernels.cpu.slabs import block_moments as slab_moments
from batchnorm.kernels.cpu.slabs import total
from batchnorm.kernels.cpu.statistics import (
    finish_gradient,
    finish_statistics,
    merge,
    num_threads,
    thread_num,
)

# Rows of numbers per column that a thread needs for its group.
THREAD_ROWS = 6


@loop
def own_row(raw, thread, k, real):
    fields = fields_of(raw, np.int64)
    width = fields[TILE] * fields[POSITIONS]
    return at(pointer(fields[SCRATCH], real), (THREAD_ROWS * thread + k) * width)


@loop
def fill(values, n, value):
    for i in range(n):
        values[i] = value


@loop
def samples_per_block(width):
    return max(4, BLOCK // width)


def forward(real: Real) -> Callable[[Any], None]:
    """The forward kernel: statistics, then `APPLY` on a group of channels of all samples."""

    @loop
    def take_block(raw, table, thread, c0, c1, n0, n1):
        fields = fields_of(raw, np.int64)
        channels, positions = fields[CHANNELS], fields[POSITIONS]
        x = at(pointer(fields[X], real), (n0 * channels + c0) * positions)
        width, stride, more = (c1 - c0) * positions, channels * positions, (n1 - n0) * positions
        centres, firsts, seconds = (
            own_row(raw, thread, 0, real),
            own_row(raw, thread, 1, real),
            own_row(raw, thread, 2, real),
        )
        fill(centres, width, real(0))
        fill(firsts, width, real(0))
        fill(seconds, width, real(0))
        add_rows(x, n1 - n0, width, stride, centres)
        for c in range(c1 - c0):
            column = at(centres, c * positions)
            fill(column, positions, real(total(column, positions, 0.0) / more))
        add_centred_rows(x, n1 - n0, width, stride, centres, firsts, seconds)
        for c in range(c0, c1):
            i = (c - c0) * positions
            first, second = total(at(firsts, i), positions, 0.0), total(at(seconds, i), positions, 0.0)
            if math.isfinite(second):
                mean = np.float64(centres[i]) + first / more
                m2 = second - first * first / more
                merge(at(table, MEAN * channels), at(table, M2 * channels), c, n0 * positions, more, mean, m2)
            else:
                slab_moments(
                    pointer(fields[X], real), channels, positions, c, c + 1, n0, n1, 0, positions,
                    n0 * positions, table, real,
                )  # fmt: skip

    @loop
    def apply(raw, table, thread, c0, c1):
        fields = fields_of(raw, np.int64)
        channels, positions = fields[CHANNELS], fields[POSITIONS]
        start, width = c0 * positions, (c1 - c0) * positions
        means, scales, shifts = (
            own_row(raw, thread, 0, real),
            own_row(raw, thread, 1, real),
            own_row(raw, thread, 2, real),
        )
        spread_table(raw, table, thread, c0, c1, real)
        call(
            fields[APPLY],
            (
                at(pointer(fields[X], real), start), at(pointer(fields[EXTRA], real), start),
                at(pointer(fields[Y], real), start), fields[SAMPLES], width, channels * positions,
                means, scales, shifts,
            ),
        )  # fmt: skip

    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels, samples = pointer(fields[TABLE], np.float64), fields[CHANNELS], fields[SAMPLES]
        c, end = channels * thread // team, channels * (thread + 1) // team
        while c < end:
            last = min(c + fields[TILE], end)
            if fields[STATISTICS] == OF_BATCH:
                n = 0
                while n < samples:
                    next_n = min(samples, n + samples_per_block((last - c) * fields[POSITIONS]))
                    take_block(raw, table, thread, c, last, n, next_n)
                    n = next_n
            if fields[STATISTICS] != OF_TABLE:
                for k in range(c, last):
                    finish_statistics(raw, table, k, samples * fields[POSITIONS], real)
            apply(raw, table, thread, c, last)
            c = last

    return kernel


@loop
def spread_table(raw, table, thread, c0, c1, real):
    """Write mean, scale and shift of the channels into the columns of the first three rows."""
    fields = fields_of(raw, np.int64)
    channels, positions = fields[CHANNELS], fields[POSITIONS]
    means, scales, shifts = (
        own_row(raw, thread, 0, real),
        own_row(raw, thread, 1, real),
        own_row(raw, thread, 2, real),
    )
    for c in range(c0, c1):
        i = (c - c0) * positions
        fill(at(means, i), positions, real(at(table, MEAN * channels)[c]))
        fill(at(scales, i), positions, real(at(table, SCALE * channels)[c]))
        fill(at(shifts, i), positions, real(at(table, SHIFT * channels)[c]))


def backward(real: Real) -> Callable[[Any], None]:
    """The backward kernel: `REDUCE` on a group, then `GRADIENT` where the gradient of x is wanted."""

    @loop
    def reduce_block(raw, thread, c0, c1, n0, n1):
        fields = fields_of(raw, np.int64)
        channels, positions = fields[CHANNELS], fields[POSITIONS]
        start, width = (n0 * channels + c0) * positions, (c1 - c0) * positions
        call(
            fields[REDUCE],
            (
                at(pointer(fields[GRAD_Y], real), start), at(pointer(fields[X], real), start),
                at(pointer(fields[EXTRA], real), start), at(pointer(fields[GRAD_Z], real), start),
                n1 - n0, width, channels * positions,
                own_row(raw, thread, 0, real), own_row(raw, thread, 1, real), own_row(raw, thread, 2, real),
                own_row(raw, thread, 3, real), own_row(raw, thread, 4, real),
            ),
        )  # fmt: skip

    @loop
    def exact_sums(raw, table, sums, c):
        """The sums of a channel by a call per run, which is in float64 where float32 overflows."""
        fields = fields_of(raw, np.int64)
        channels, positions = fields[CHANNELS], fields[POSITIONS]
        sums[0] = 0.0
        sums[1] = 0.0
        for n in range(fields[SAMPLES]):
            run = (n * channels + c) * positions
            call(
                fields[REDUCE_ONE],
                (
                    at(pointer(fields[GRAD_Y], real), run), at(pointer(fields[X], real), run),
                    at(pointer(fields[EXTRA], real), run), at(pointer(fields[GRAD_Z], real), run), positions,
                    real(at(table, MEAN * channels)[c]), real(at(table, SCALE * channels)[c]),
                    real(at(table, SHIFT * channels)[c]), sums,
                ),
            )  # fmt: skip

    @loop
    def reduce(raw, table, thread, c0, c1):
        fields = fields_of(raw, np.int64)
        samples, positions = fields[SAMPLES], fields[POSITIONS]
        sums, width = pointer(fields[WORK], np.float64), (c1 - c0) * positions
        firsts, seconds = own_row(raw, thread, 3, real), own_row(raw, thread, 4, real)
        for k in range(2 * c0, 2 * c1):
            sums[k] = 0.0
        if fields[REDUCE] == 0:
            return
        n = 0
        while n < samples:
            next_n = min(samples, n + samples_per_block(width))
            fill(firsts, width, real(0))
            fill(seconds, width, real(0))
            reduce_block(raw, thread, c0, c1, n, next_n)
            for c in range(c0, c1):
                i = (c - c0) * positions
                sums[2 * c] += total(at(firsts, i), positions, 0.0)
                sums[2 * c + 1] += total(at(seconds, i), positions, 0.0)
            n = next_n
        for c in range(c0, c1):
            if not math.isfinite(sums[2 * c + 1]):
                exact_sums(raw, table, at(sums, 2 * c), c)

    @loop
    def gradient(raw, table, thread, c0, c1):
        fields = fields_of(raw, np.int64)
        channels, positions = fields[CHANNELS], fields[POSITIONS]
        start, width = c0 * positions, (c1 - c0) * positions
        grad = pointer(fields[GRAD_Z] if fields[STORED] else fields[GRAD_Y], real)
        call(
            fields[GRADIENT],
            (
                at(grad, start), at(pointer(fields[X], real), start), at(pointer(fields[EXTRA], real), start),
                at(pointer(fields[GRAD_X], real), start), fields[SAMPLES], width, channels * positions,
                own_row(raw, thread, 0, real), own_row(raw, thread, 1, real), own_row(raw, thread, 2, real),
                own_row(raw, thread, 3, real), own_row(raw, thread, 4, real), own_row(raw, thread, 5, real),
            ),
        )  # fmt: skip

    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels, positions = pointer(fields[TABLE], np.float64), fields[CHANNELS], fields[POSITIONS]
        sums, count = pointer(fields[WORK], np.float64), fields[SAMPLES] * fields[POSITIONS]
        c, end = channels * thread // team, channels * (thread + 1) // team
        while c < end:
            last = min(c + fields[TILE], end)
            spread_table(raw, table, thread, c, last, real)
            reduce(raw, table, thread, c, last)
            for k in range(c, last):
                by_grad, by_x, constant = finish_gradient(
                    raw, table, k, count, sums[2 * k], sums[2 * k + 1], real
                )
                i = (k - c) * positions
                fill(at(own_row(raw, thread, 3, real), i), positions, real(by_grad))
                fill(at(own_row(raw, thread, 4, real), i), positions, real(by_x))
                fill(at(own_row(raw, thread, 5, real), i), positions, real(constant))
            if fields[GRAD_X] != 0:
                gradient(raw, table, thread, c, last)
            c = last

    return kernel
