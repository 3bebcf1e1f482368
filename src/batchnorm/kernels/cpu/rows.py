"""CPU kernels for channels_last inputs and (N, C): rows of channels, a share of the rows for each thread.

Narrow rows are taken several at a time as one wide row, in which each channel has several columns, so that
vectors are full. The threads meet around a merge: what they found per column becomes statistics of channels,
a share of the channels for each thread, and the result goes back out to the columns.
"""

from __future__ import annotations

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
    WORK,
    X,
    Y,
)  # fmt: skip
from batchnorm.kernels.cpu.memory import add_to_first, add_to_second, at, call, fields_of, get, pointer
from batchnorm.kernels.cpu.runs import loop
from batchnorm.kernels.cpu.statistics import (
    barrier,
    finish_gradient,
    finish_statistics,
    merge,
    num_threads,
    thread_num,
)  # fmt: skip

# Columns worked on at a time, and values per block: sums of a tile stay in the first-level cache, a block in
# the second.
TILE_COLUMNS = 512
BLOCK = 16384

# Rows of numbers, as wide as a wide row, that a kernel needs beside its tables: shared, and for each thread.
SHARED_ROWS = 6
THREAD_ROWS = 3


@loop
def add_rows(x, rows, width, stride, sums):
    """Adds to `sums` the sum of each column."""
    fours = rows // 4
    for four in range(fours):
        # Four rows at a time: a quarter of the traffic to the sums.
        a = 4 * four * stride
        b = a + stride
        c = b + stride
        d = c + stride
        for i in range(width):
            add_to_first(sums, i, (get(x, a + i) + get(x, b + i)) + (get(x, c + i) + get(x, d + i)))
    for row in range(4 * fours, rows):
        for i in range(width):
            add_to_first(sums, i, get(x, row * stride + i))


@loop
def add_centred_rows(x, rows, width, stride, centre, first, second):
    """Adds to `first` and `second` the sums of `x - centre` and of its square, for each column."""
    fours = rows // 4
    for four in range(fours):
        a = 4 * four * stride
        b = a + stride
        c = b + stride
        d = c + stride
        for i in range(width):
            m = get(centre, i)
            xa, xb = get(x, a + i) - m, get(x, b + i) - m
            xc, xd = get(x, c + i) - m, get(x, d + i) - m
            add_to_first(first, i, (xa + xb) + (xc + xd))
            add_to_second(second, i, (xa * xa + xb * xb) + (xc * xc + xd * xd))
    for row in range(4 * fours, rows):
        for i in range(width):
            xa = get(x, row * stride + i) - get(centre, i)
            add_to_first(first, i, xa)
            add_to_second(second, i, xa * xa)


@loop
def block_moments(x, rows, width, stride, count, means, m2s, scratch, real):
    """Take a block of rows into the moments of its columns, which have taken in `count` rows."""
    centre, first, second = scratch, at(scratch, width), at(scratch, 2 * width)
    for i in range(3 * width):
        scratch[i] = real(0)
    add_rows(x, rows, width, stride, centre)
    for i in range(width):
        centre[i] /= real(rows)
    add_centred_rows(x, rows, width, stride, centre, first, second)
    finite = True
    for i in range(width):
        finite &= abs(second[i]) < np.inf
    if not finite:
        exact_block_moments(x, rows, width, stride, count, means, m2s)
        return
    share = np.float64(rows) / (count + rows)
    for i in range(width):
        rest = np.float64(first[i]) / rows
        mean = np.float64(centre[i]) + rest
        d = mean - means[i]
        # Not means[i] + d * share: after an infinite mean, d is infinite the other way.
        means[i] = means[i] * (1 - share) + mean * share
        m2s[i] += (second[i] - rest * first[i]) + d * d * (count * share)


@loop
def exact_block_moments(x, rows, width, stride, count, means, m2s):
    """As `block_moments`, in float64 and slowly, where float32 overflows or is not finite."""
    for i in range(width):
        mean = 0.0
        for row in range(rows):
            mean += x[row * stride + i]
        mean /= rows
        m2 = 0.0
        for row in range(rows):
            m2 += (x[row * stride + i] - mean) ** 2
        merge(means, m2s, i, count, rows, mean, m2)


@loop
def shape_of(raw, thread, team):
    """Columns of a wide row, wide rows, values left over, and the wide rows that are this thread's."""
    fields = fields_of(raw, np.int64)
    width = fields[CHANNELS] * fields[POSITIONS]
    wide = fields[SAMPLES] // fields[POSITIONS]
    left_over = fields[SAMPLES] % fields[POSITIONS] * fields[CHANNELS]
    return width, wide, left_over, wide * thread // team, wide * (thread + 1) // team


@loop
def shared_row(raw, k, real):
    """Row k of the numbers per column that all threads read."""
    fields = fields_of(raw, np.int64)
    return at(pointer(fields[SCRATCH], real), k * fields[CHANNELS] * fields[POSITIONS])


@loop
def own_rows(raw, thread, real):
    """The numbers per column that are this thread's own."""
    return shared_row(raw, SHARED_ROWS + THREAD_ROWS * thread, real)


@loop
def found_by(raw, thread):
    """Two float64 numbers per column that this thread leaves for the merge, and two it keeps behind them."""
    fields = fields_of(raw, np.int64)
    width = fields[CHANNELS] * fields[POSITIONS]
    first = at(pointer(fields[WORK], np.float64), (2 * width + 2) * thread)
    return first, at(first, width)


@loop
def rows_per_block(width):
    return max(4, BLOCK // min(width, TILE_COLUMNS))


@loop
def spread(raw, k, c, value, real):
    """Write the value of channel c into its columns of shared row k."""
    fields = fields_of(raw, np.int64)
    row = shared_row(raw, k, real)
    for j in range(fields[POSITIONS]):
        row[j * fields[CHANNELS] + c] = real(value)


@loop
def spread_table(raw, table, c, real):
    channels = fields_of(raw, np.int64)[CHANNELS]
    spread(raw, 0, c, at(table, MEAN * channels)[c], real)
    spread(raw, 1, c, at(table, SCALE * channels)[c], real)
    spread(raw, 2, c, at(table, SHIFT * channels)[c], real)


def forward(real: Real) -> Callable[[Any], None]:
    """The forward kernel: statistics, then `APPLY` on blocks of rows."""

    @loop
    def moments(raw, thread, team):
        width, _, _, start, end = shape_of(raw, thread, team)
        x = pointer(fields_of(raw, np.int64)[X], real)
        means, m2s = found_by(raw, thread)
        for i in range(2 * width):
            means[i] = 0.0
        row = start
        while row < end:
            i = 0
            rows = min(rows_per_block(width), end - row)
            while i < width:
                columns = min(TILE_COLUMNS, width - i)
                block_moments(
                    at(x, row * width + i), rows, columns, width, row - start, at(means, i), at(m2s, i),
                    own_rows(raw, thread, real), real,
                )  # fmt: skip
                i += columns
            row += rows

    @loop
    def merge_channel(raw, table, c, team):
        fields = fields_of(raw, np.int64)
        channels = fields[CHANNELS]
        means, m2s = at(table, MEAN * channels), at(table, M2 * channels)
        count = 0
        for thread in range(team):
            width, wide, left_over, start, end = shape_of(raw, thread, team)
            found_means, found_m2s = found_by(raw, thread)
            if end > start:
                for j in range(fields[POSITIONS]):
                    i = j * channels + c
                    merge(means, m2s, c, count, end - start, found_means[i], found_m2s[i])
                    count += end - start
        width, wide, left_over, _, _ = shape_of(raw, 0, team)
        for j in range(left_over // channels):
            value = pointer(fields[X], real)[wide * width + j * channels + c]
            merge(means, m2s, c, count, 1, np.float64(value), 0.0 * value)
            count += 1

    @loop
    def apply_block(raw, start, rows, columns):
        fields = fields_of(raw, np.int64)
        width = fields[CHANNELS] * fields[POSITIONS]
        x, residual, y = pointer(fields[X], real), pointer(fields[EXTRA], real), pointer(fields[Y], real)
        i = 0
        while i < columns:
            tile, first = min(TILE_COLUMNS, columns - i), start * width + i
            call(
                fields[APPLY],
                (
                    at(x, first), at(residual, first), at(y, first), rows, tile, width,
                    at(shared_row(raw, 0, real), i), at(shared_row(raw, 1, real), i),
                    at(shared_row(raw, 2, real), i),
                ),
            )  # fmt: skip
            i += tile

    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels = pointer(fields[TABLE], np.float64), fields[CHANNELS]
        if fields[STATISTICS] == OF_BATCH:
            moments(raw, thread, team)
        barrier()
        for c in range(channels * thread // team, channels * (thread + 1) // team):
            if fields[STATISTICS] == OF_BATCH:
                merge_channel(raw, table, c, team)
            if fields[STATISTICS] != OF_TABLE:
                finish_statistics(raw, table, c, fields[SAMPLES], real)
            spread_table(raw, table, c, real)
        barrier()
        width, wide, left_over, start, end = shape_of(raw, thread, team)
        while end > start:  # backwards: the last rows are those still in the cache
            rows = min(rows_per_block(width), end - start)
            end -= rows
            apply_block(raw, end, rows, width)
        if thread == team - 1 and left_over > 0:
            apply_block(raw, wide, 1, left_over)

    return kernel


def backward(real: Real) -> Callable[[Any], None]:
    """The backward kernel: `REDUCE` on blocks of rows, then `GRADIENT` where the gradient of x is wanted."""

    @loop
    def exact_sums(raw, thread, start, rows, width, mean, scale, shift):
        """The sums of a column by a call per value, which is in float64 where float32 overflows."""
        fields = fields_of(raw, np.int64)
        grad_y, x = pointer(fields[GRAD_Y], real), pointer(fields[X], real)
        extra, grad_z = pointer(fields[EXTRA], real), pointer(fields[GRAD_Z], real)
        sums = at(found_by(raw, thread)[1], width)
        sums[0] = 0.0
        sums[1] = 0.0
        for row in range(rows):
            k = start + row * width
            call(
                fields[REDUCE_ONE],
                (at(grad_y, k), at(x, k), at(extra, k), at(grad_z, k), 1, mean, scale, shift, sums),
            )
        return sums[0], sums[1]

    @loop
    def reduce_block(raw, thread, start, rows, columns):
        fields = fields_of(raw, np.int64)
        width = fields[CHANNELS] * fields[POSITIONS]
        grad_y, x = pointer(fields[GRAD_Y], real), pointer(fields[X], real)
        extra, grad_z = pointer(fields[EXTRA], real), pointer(fields[GRAD_Z], real)
        firsts, seconds = found_by(raw, thread)
        i = 0
        while i < columns:
            tile, at_block = min(TILE_COLUMNS, columns - i), start * width + i
            first, second = own_rows(raw, thread, real), at(own_rows(raw, thread, real), tile)
            for k in range(2 * tile):
                first[k] = real(0)
            mean, scale, shift = shared_row(raw, 0, real), shared_row(raw, 1, real), shared_row(raw, 2, real)
            call(
                fields[REDUCE],
                (
                    at(grad_y, at_block), at(x, at_block), at(extra, at_block), at(grad_z, at_block),
                    rows, tile, width, at(mean, i), at(scale, i), at(shift, i), first, second,
                ),
            )  # fmt: skip
            for k in range(tile):
                if abs(second[k]) < np.inf:
                    firsts[i + k] += first[k]
                    seconds[i + k] += second[k]
                else:
                    first_sum, second_sum = exact_sums(
                        raw, thread, at_block + k, rows, width, mean[i + k], scale[i + k], shift[i + k]
                    )
                    firsts[i + k] += first_sum
                    seconds[i + k] += second_sum
            i += tile

    @loop
    def reduce(raw, thread, team):
        width, wide, left_over, start, end = shape_of(raw, thread, team)
        firsts, _ = found_by(raw, thread)
        for i in range(2 * width):
            firsts[i] = 0.0
        if fields_of(raw, np.int64)[REDUCE] == 0:
            return
        while start < end:
            rows = min(rows_per_block(width), end - start)
            reduce_block(raw, thread, start, rows, width)
            start += rows
        if thread == team - 1 and left_over > 0:
            reduce_block(raw, thread, wide, 1, left_over)

    @loop
    def finish(raw, table, c, team):
        fields = fields_of(raw, np.int64)
        first, second = 0.0, 0.0
        for thread in range(team):
            firsts, seconds = found_by(raw, thread)
            for j in range(fields[POSITIONS]):
                first += firsts[j * fields[CHANNELS] + c]
                second += seconds[j * fields[CHANNELS] + c]
        by_grad, by_x, constant = finish_gradient(raw, table, c, fields[SAMPLES], first, second, real)
        spread(raw, 3, c, by_grad, real)
        spread(raw, 4, c, by_x, real)
        spread(raw, 5, c, constant, real)

    @loop
    def gradient_block(raw, start, rows, columns):
        fields = fields_of(raw, np.int64)
        width = fields[CHANNELS] * fields[POSITIONS]
        x, extra, grad_x = (
            pointer(fields[X], real),
            pointer(fields[EXTRA], real),
            pointer(fields[GRAD_X], real),
        )
        grad = pointer(fields[GRAD_Z] if fields[STORED] else fields[GRAD_Y], real)
        i = 0
        while i < columns:
            tile, k = min(TILE_COLUMNS, columns - i), start * width + i
            call(
                fields[GRADIENT],
                (
                    at(grad, k), at(x, k), at(extra, k), at(grad_x, k), rows, tile, width,
                    at(shared_row(raw, 0, real), i), at(shared_row(raw, 1, real), i),
                    at(shared_row(raw, 2, real), i),
                    at(shared_row(raw, 3, real), i), at(shared_row(raw, 4, real), i),
                    at(shared_row(raw, 5, real), i),
                ),
            )  # fmt: skip
            i += tile

    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels = pointer(fields[TABLE], np.float64), fields[CHANNELS]
        c0, c1 = channels * thread // team, channels * (thread + 1) // team
        for c in range(c0, c1):
            spread_table(raw, table, c, real)
        barrier()
        reduce(raw, thread, team)
        barrier()
        for c in range(c0, c1):
            finish(raw, table, c, team)
        barrier()
        if fields[GRAD_X] == 0:
            return
        width, wide, left_over, start, end = shape_of(raw, thread, team)
        if thread == team - 1 and left_over > 0:
            gradient_block(raw, wide, 1, left_over)
        while end > start:  # backwards: the last rows are those still in the cache
            rows = min(rows_per_block(width), end - start)
            end -= rows
            gradient_block(raw, end, rows, width)

    return kernel
