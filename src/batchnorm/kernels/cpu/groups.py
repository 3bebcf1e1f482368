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

from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu.activations import Real
from batchnorm.kernels.cpu.channel import (
    applied_statistics,
    finish_gradient,
    finish_statistics,
    grad_of_z,
    is_near_mean,
    merge,
    num_threads,
    tensor,
    thread_num,
)
from batchnorm.kernels.cpu.columns import add_rows, fill, sum_centred_rows
from batchnorm.kernels.cpu.memory import at, call, fields_of, pointer
from batchnorm.kernels.cpu.rows import rows_per_block
from batchnorm.kernels.cpu.runs import loop
from batchnorm.kernels.cpu.slabs import exact_moments, total

# Values of the first block, as in `slabs.py`: more, as each block of samples fills rows of columns.
FIRST = 512


@loop
def own_row(raw, thread, k, real):
    """Row k of this thread's numbers per column."""
    fields = fields_of(raw, np.int64)
    width = fields[f.TILE] * fields[f.POSITIONS]
    return at(tensor(raw, f.SCRATCH, real), (f.COLUMN_ROWS * thread + k) * width)


@loop
def first_rows(raw, thread, real):
    """The rows of this thread that hold means, scales and shifts, and before those the sums for them."""
    return (
        own_row(raw, thread, f.MEANS, real),
        own_row(raw, thread, f.SCALES, real),
        own_row(raw, thread, f.SHIFTS, real),
    )


@loop
def spread_table(raw, table, thread, c0, c1, real):
    """Write mean, scale and shift of the channels into their columns."""
    fields = fields_of(raw, np.int64)
    positions, of_channels = fields[f.POSITIONS], applied_statistics(raw, table)
    means, scales, shifts = first_rows(raw, thread, real)
    for c in range(c0, c1):
        i = (c - c0) * positions
        fill(at(means, i), positions, real(of_channels[0][c]))
        fill(at(scales, i), positions, real(of_channels[1][c]))
        fill(at(shifts, i), positions, real(of_channels[2][c]))


@loop
def take_block(raw, table, thread, c0, c1, n0, n1, real):
    """Take samples n0:n1 into the moments of the channels c0:c1, which have taken in those before."""
    fields = fields_of(raw, np.int64)
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    x = at(tensor(raw, f.X, real), (n0 * channels + c0) * positions)
    width, stride, more = (c1 - c0) * positions, channels * positions, (n1 - n0) * positions
    centres, firsts, seconds = first_rows(raw, thread, real)
    near = n0 > 0
    if near:
        for c in range(c0, c1):
            fill(at(centres, (c - c0) * positions), positions, real(at(table, f.MEAN * channels)[c]))
        sum_centred_rows(x, n1 - n0, width, stride, centres, firsts, seconds, real)
        for c in range(c1 - c0):
            i = c * positions
            first, second = total(at(firsts, i), positions, 0.0), total(at(seconds, i), positions, 0.0)
            near &= is_near_mean(first, second, more)
    if not near:
        fill(centres, width, real(0))
        add_rows(x, n1 - n0, width, stride, centres)
        for c in range(c1 - c0):
            column = at(centres, c * positions)
            fill(column, positions, real(total(column, positions, 0.0) / more))
        sum_centred_rows(x, n1 - n0, width, stride, centres, firsts, seconds, real)
    for c in range(c0, c1):
        i = (c - c0) * positions
        first, second = total(at(firsts, i), positions, 0.0), total(at(seconds, i), positions, 0.0)
        mean = np.float64(centres[i]) + first / more
        m2 = second - first * first / more
        if not math.isfinite(m2):
            whole = tensor(raw, f.X, real)
            mean, m2 = exact_moments(whole, channels, positions, c, n0, n1, np.int64(0), positions)
        merge(at(table, f.MEAN * channels), at(table, f.M2 * channels), c, n0 * positions, more, mean, m2)


@loop
def apply(raw, table, thread, c0, c1, real):
    """Write y, where it is wanted, for the channels c0:c1."""
    fields = fields_of(raw, np.int64)
    if fields[f.APPLY] == 0:
        return
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    start, width = c0 * positions, (c1 - c0) * positions
    means, scales, shifts = first_rows(raw, thread, real)
    spread_table(raw, table, thread, c0, c1, real)
    call(
        fields[f.APPLY],
        (
            at(tensor(raw, f.X, real), start), at(tensor(raw, f.EXTRA, real), start),
            at(tensor(raw, f.Y, real), start), fields[f.SAMPLES], width, channels * positions,
            means, scales, shifts,
        ),
    )  # fmt: skip


@loop
def reduce_block(raw, thread, c0, c1, n0, n1, real):
    """Add the sums of samples n0:n1 to the rows of BY_GRAD and BY_X, which are free until then."""
    fields = fields_of(raw, np.int64)
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    start, width = (n0 * channels + c0) * positions, (c1 - c0) * positions
    means, scales, shifts = first_rows(raw, thread, real)
    call(
        fields[f.REDUCE],
        (
            at(tensor(raw, f.GRAD_Y, real), start), at(tensor(raw, f.X, real), start),
            at(tensor(raw, f.EXTRA, real), start), at(tensor(raw, f.GRAD_Z, real), start),
            n1 - n0, width, channels * positions, means, scales, shifts,
            own_row(raw, thread, f.BY_GRAD, real), own_row(raw, thread, f.BY_X, real),
        ),
    )  # fmt: skip


@loop
def exact_sums(raw, table, sums, c, real):
    """The sums of a channel by a call per run, which is in float64 where float32 overflows."""
    fields = fields_of(raw, np.int64)
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    means, scales, shifts = applied_statistics(raw, table)
    grad, x, extra = grad_of_z(raw, real), tensor(raw, f.X, real), tensor(raw, f.EXTRA, real)
    sums[0] = 0.0
    sums[1] = 0.0
    for n in range(fields[f.SAMPLES]):
        run = (n * channels + c) * positions
        call(
            fields[f.REDUCE_ONE],
            (
                at(grad, run), at(x, run), at(extra, run), pointer(0, real), pointer(0, np.int32),
                1, positions, 0, positions, at(means, c), at(scales, c), at(shifts, c), sums,
            ),
        )  # fmt: skip


@loop
def reduce(raw, table, thread, c0, c1, real):
    """Write `sum(grad_z)` and `sum(grad_z * (x - mean))` of the channels c0:c1 side by side."""
    fields = fields_of(raw, np.int64)
    samples, positions = fields[f.SAMPLES], fields[f.POSITIONS]
    sums, width = pointer(fields[f.WORK], np.float64), (c1 - c0) * positions
    firsts, seconds = own_row(raw, thread, f.BY_GRAD, real), own_row(raw, thread, f.BY_X, real)
    for k in range(2 * c0, 2 * c1):
        sums[k] = 0.0
    if fields[f.REDUCE] == 0:
        return
    n = 0
    while n < samples:
        next_n = min(samples, n + rows_per_block(width))
        fill(firsts, width, real(0))
        fill(seconds, width, real(0))
        reduce_block(raw, thread, c0, c1, n, next_n, real)
        for c in range(c0, c1):
            i = (c - c0) * positions
            sums[2 * c] += total(at(firsts, i), positions, 0.0)
            sums[2 * c + 1] += total(at(seconds, i), positions, 0.0)
        n = next_n
    for c in range(c0, c1):
        if not math.isfinite(sums[2 * c] + sums[2 * c + 1]):
            exact_sums(raw, table, at(sums, 2 * c), c, real)


@loop
def gradient(raw, table, thread, c0, c1, real):
    """Write the gradient of x for the channels c0:c1."""
    fields = fields_of(raw, np.int64)
    channels, positions = fields[f.CHANNELS], fields[f.POSITIONS]
    start, width = c0 * positions, (c1 - c0) * positions
    means, scales, shifts = first_rows(raw, thread, real)
    call(
        fields[f.GRADIENT],
        (
            at(grad_of_z(raw, real), start), at(tensor(raw, f.X, real), start),
            at(tensor(raw, f.EXTRA, real), start), at(tensor(raw, f.GRAD_X, real), start),
            fields[f.SAMPLES], width, channels * positions, means, scales, shifts,
            own_row(raw, thread, f.BY_GRAD, real), own_row(raw, thread, f.BY_X, real),
            own_row(raw, thread, f.CONSTANTS, real),
        ),
    )  # fmt: skip


@loop
def spread_coefficients(raw, table, thread, c0, c1, real):
    """Write the coefficients of the channels' gradients into their columns."""
    fields = fields_of(raw, np.int64)
    sums, positions = pointer(fields[f.WORK], np.float64), fields[f.POSITIONS]
    for c in range(c0, c1):
        found = finish_gradient(raw, table, c, sums[2 * c], sums[2 * c + 1], real)
        i = (c - c0) * positions
        fill(at(own_row(raw, thread, f.BY_GRAD, real), i), positions, real(found[0]))
        fill(at(own_row(raw, thread, f.BY_X, real), i), positions, real(found[1]))
        fill(at(own_row(raw, thread, f.CONSTANTS, real), i), positions, real(found[2]))


@loop
def forward_of_group(raw, table, thread, c0, c1, real):
    """All of the forward for the channels c0:c1."""
    fields = fields_of(raw, np.int64)
    samples, positions = fields[f.SAMPLES], fields[f.POSITIONS]
    if fields[f.STATISTICS] == f.OF_BATCH:
        n = 0
        while n < samples:
            more = rows_per_block((c1 - c0) * positions) if n > 0 else max(1, FIRST // positions)
            next_n = min(samples, n + more)
            take_block(raw, table, thread, c0, c1, n, next_n, real)
            n = next_n
    if fields[f.STATISTICS] != f.OF_TABLE:
        finish_statistics(raw, table, c0, c1, real)
    apply(raw, table, thread, c0, c1, real)


@loop
def backward_of_group(raw, table, thread, c0, c1, real):
    """All of the backward for the channels c0:c1."""
    spread_table(raw, table, thread, c0, c1, real)
    reduce(raw, table, thread, c0, c1, real)
    spread_coefficients(raw, table, thread, c0, c1, real)
    if fields_of(raw, np.int64)[f.GRAD_X] != 0:
        gradient(raw, table, thread, c0, c1, real)


def forward(real: Real) -> Callable[[Any], None]:
    """The forward kernel: statistics, then `APPLY` on a group of channels of all samples."""
    return _kernel(forward_of_group, real)


def backward(real: Real) -> Callable[[Any], None]:
    """The backward kernel: `REDUCE` on a group, then `GRADIENT` where the gradient of x is wanted."""
    return _kernel(backward_of_group, real)


def _kernel(of_group: Any, real: Real) -> Callable[[Any], None]:
    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels = pointer(fields[f.TABLE], np.float64), fields[f.CHANNELS]
        c, end = channels * thread // team, channels * (thread + 1) // team
        while c < end:
            last = min(c + fields[f.TILE], end)
            of_group(raw, table, thread, c, last, real)
            c = last

    return kernel
