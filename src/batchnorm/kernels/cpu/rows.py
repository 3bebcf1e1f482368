"""CPU kernels for channels_last inputs, (N, C) and many small samples: rows, a share of them for each thread.

Narrow rows are taken several at a time as one wide row, in which each channel has several columns, so that
vectors are full. The threads meet around a merge: what they found per column becomes statistics of channels,
a share of the channels for each thread, and the result goes back out to the columns.
"""

from __future__ import annotations

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
    merge,
    merge_side_by_side,
    num_threads,
    tensor,
    thread_num,
)
from batchnorm.kernels.cpu.columns import block_moments, convert, fill, merge_columns
from batchnorm.kernels.cpu.memory import at, call, fields_of, pointer
from batchnorm.kernels.cpu.runs import loop
from batchnorm.kernels.cpu.slabs import total

# Columns worked on at a time, and values per block; no more rows, as float32 holds the sums of a block.
TILE_COLUMNS = 2048
BLOCK = 262144
MOST_ROWS = 256
# Rows of the first block, which is read twice: for a mean that is near enough to centre the others by.
FIRST_ROWS = 32

# Rows of sums, as wide as a wide row, that each thread needs behind those that all share.
THREAD_ROWS = 3


@loop
def shape_of(raw, thread, team):
    """Columns of a wide row, wide rows, values left over, and the wide rows that are this thread's."""
    fields = fields_of(raw, np.int64)
    samples, together = fields[f.SAMPLES], fields[f.TILE]
    wide, left_over = samples // together, samples % together * fields[f.CHANNELS] * fields[f.POSITIONS]
    return width_of(raw), wide, left_over, wide * thread // team, wide * (thread + 1) // team


@loop
def width_of(raw):
    """Columns of a wide row."""
    fields = fields_of(raw, np.int64)
    return fields[f.TILE] * fields[f.CHANNELS] * fields[f.POSITIONS]


@loop
def column_of(raw, j, c):
    """The first column of channel c in sample j of a wide row; its other positions follow."""
    fields = fields_of(raw, np.int64)
    return (j * fields[f.CHANNELS] + c) * fields[f.POSITIONS]


@loop
def shared_row(raw, k, real):
    """Row k of the numbers per column that all threads read."""
    return at(tensor(raw, f.SCRATCH, real), k * width_of(raw))


@loop
def own_rows(raw, thread, real):
    """The numbers per column that are this thread's own."""
    return shared_row(raw, f.COLUMN_ROWS + THREAD_ROWS * thread, real)


@loop
def found_by(raw, thread):
    """Two float64 numbers per column that this thread leaves for the merge, and two it keeps behind them."""
    width = width_of(raw)
    first = at(pointer(fields_of(raw, np.int64)[f.WORK], np.float64), (2 * width + f.LINE) * thread)
    return first, at(first, width)


@loop
def rows_per_block(width):
    """Wide rows that make a block, a tile of columns at a time."""
    return max(4, min(MOST_ROWS, BLOCK // min(width, TILE_COLUMNS)))


@loop
def spread(raw, k, c, value, real):
    """Write the value of channel c into its columns of shared row k."""
    fields = fields_of(raw, np.int64)
    for j in range(fields[f.TILE]):
        fill(at(shared_row(raw, k, real), column_of(raw, j, c)), fields[f.POSITIONS], real(value))


@loop
def spread_table(raw, table, c0, c1, real):
    """Write mean, scale and shift of the channels c0:c1 into their columns of the shared rows."""
    fields = fields_of(raw, np.int64)
    means, scales, shifts = applied_statistics(raw, table)
    if fields[f.POSITIONS] > 1:  # else columns of neighbours are side by side, and a loop over them vectors
        for c in range(c0, c1):
            spread(raw, f.MEANS, c, means[c], real)
            spread(raw, f.SCALES, c, scales[c], real)
            spread(raw, f.SHIFTS, c, shifts[c], real)
        return
    for j in range(fields[f.TILE]):
        first = column_of(raw, j, c0)
        convert(at(means, c0), at(shared_row(raw, f.MEANS, real), first), c1 - c0, real)
        convert(at(scales, c0), at(shared_row(raw, f.SCALES, real), first), c1 - c0, real)
        convert(at(shifts, c0), at(shared_row(raw, f.SHIFTS, real), first), c1 - c0, real)


@loop
def moments(raw, thread, team, real):
    """Leave the moments of this thread's rows, per column."""
    width, _, _, start, end = shape_of(raw, thread, team)
    x = tensor(raw, f.X, real)
    means, m2s = found_by(raw, thread)
    for i in range(2 * width):
        means[i] = 0.0
    row = start
    while row < end:
        i = 0
        rows = min(rows_per_block(width) if row > start else FIRST_ROWS, end - row)
        while i < width:
            columns = min(TILE_COLUMNS, width - i)
            block_moments(
                at(x, row * width + i), rows, columns, width, row - start, at(means, i), at(m2s, i),
                own_rows(raw, thread, real), real,
            )  # fmt: skip
            i += columns
        row += rows


@loop
def merge_found(raw, table, c0, c1, team, real):
    """The moments of the channels c0:c1 out of what the threads found, and of the values left over."""
    fields = fields_of(raw, np.int64)
    channels, positions, n = fields[f.CHANNELS], fields[f.POSITIONS], c1 - c0
    means, m2s = at(table, f.MEAN * channels + c0), at(table, f.M2 * channels + c0)
    count = 0
    for thread in range(team):
        _, _, _, start, end = shape_of(raw, thread, team)
        found_means, found_m2s = found_by(raw, thread)
        if end > start:
            for j in range(fields[f.TILE]):
                i = column_of(raw, j, c0)
                if positions == 1:  # likewise
                    merge_side_by_side(
                        means, m2s, n, count, end - start, at(found_means, i), at(found_m2s, i)
                    )
                else:
                    merge_columns(
                        means, m2s, n, positions, count, end - start, at(found_means, i), at(found_m2s, i)
                    )
                count += (end - start) * positions
    width, wide, left_over, _, _ = shape_of(raw, 0, team)
    for j in range(left_over // (channels * positions)):
        values = at(tensor(raw, f.X, real), wide * width + column_of(raw, j, c0))
        for c in range(n):
            for p in range(positions):
                value = values[c * positions + p]
                merge(means, m2s, c, count + p, 1, np.float64(value), 0.0 * value)
        count += positions


@loop
def apply_block(raw, start, rows, columns, real):
    """Write y for some wide rows."""
    fields, width = fields_of(raw, np.int64), width_of(raw)
    x, residual, y = tensor(raw, f.X, real), tensor(raw, f.EXTRA, real), tensor(raw, f.Y, real)
    i = 0
    while i < columns:
        tile, first = min(TILE_COLUMNS, columns - i), start * width + i
        call(
            fields[f.APPLY],
            (
                at(x, first), at(residual, first), at(y, first), rows, tile, width,
                at(shared_row(raw, f.MEANS, real), i), at(shared_row(raw, f.SCALES, real), i),
                at(shared_row(raw, f.SHIFTS, real), i),
            ),
        )  # fmt: skip
        i += tile


def forward(real: Real) -> Callable[[Any], None]:
    """The forward kernel: statistics, then `APPLY` on blocks of rows."""

    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels = pointer(fields[f.TABLE], np.float64), fields[f.CHANNELS]
        if fields[f.STATISTICS] == f.OF_BATCH:
            moments(raw, thread, team, real)
        barrier()
        c0, c1 = channels * thread // team, channels * (thread + 1) // team
        if fields[f.STATISTICS] == f.OF_BATCH:
            merge_found(raw, table, c0, c1, team, real)
        if fields[f.STATISTICS] != f.OF_TABLE:
            finish_statistics(raw, table, c0, c1, real)
        spread_table(raw, table, c0, c1, real)
        barrier()
        if fields[f.APPLY] == 0:
            return
        width, wide, left_over, start, end = shape_of(raw, thread, team)
        block = rows_per_block(width)
        # Backwards: the last blocks are still in the cache.
        while start < end:
            first = max(start, end - block)
            apply_block(raw, first, end - first, width, real)
            end = first
        if thread == team - 1 and left_over > 0:
            apply_block(raw, wide, 1, left_over, real)

    return kernel


@loop
def exact_sums(raw, thread, start, rows, width, c, real):
    """The sums of a column of channel c by a call per value, which is in float64 where float32 overflows."""
    fields = fields_of(raw, np.int64)
    means, scales, shifts = applied_statistics(raw, pointer(fields[f.TABLE], np.float64))
    grad, x, extra = grad_of_z(raw, real), tensor(raw, f.X, real), tensor(raw, f.EXTRA, real)
    sums = at(found_by(raw, thread)[1], width)
    sums[0] = 0.0
    sums[1] = 0.0
    for row in range(rows):
        k = start + row * width
        call(
            fields[f.REDUCE_ONE],
            (
                at(grad, k), at(x, k), at(extra, k), pointer(0, real), pointer(0, np.int32),
                1, 1, 0, 1, at(means, c), at(scales, c), at(shifts, c), sums,
            ),
        )  # fmt: skip
    return sums[0], sums[1]


@loop
def reduce_block(raw, thread, start, rows, columns, real):
    """Add the sums of some wide rows to what this thread has found."""
    fields, width = fields_of(raw, np.int64), width_of(raw)
    grad_y, x = tensor(raw, f.GRAD_Y, real), tensor(raw, f.X, real)
    extra, grad_z = tensor(raw, f.EXTRA, real), tensor(raw, f.GRAD_Z, real)
    firsts, seconds = found_by(raw, thread)
    i = 0
    while i < columns:
        tile, at_block = min(TILE_COLUMNS, columns - i), start * width + i
        first, second = own_rows(raw, thread, real), at(own_rows(raw, thread, real), tile)
        for k in range(2 * tile):
            first[k] = real(0)
        mean, scale, shift = (
            shared_row(raw, f.MEANS, real),
            shared_row(raw, f.SCALES, real),
            shared_row(raw, f.SHIFTS, real),
        )
        call(
            fields[f.REDUCE],
            (
                at(grad_y, at_block), at(x, at_block), at(extra, at_block), at(grad_z, at_block),
                rows, tile, width, at(mean, i), at(scale, i), at(shift, i), first, second,
            ),
        )  # fmt: skip
        for k in range(tile):
            if abs(first[k] + second[k]) < np.inf:
                firsts[i + k] += first[k]
                seconds[i + k] += second[k]
            else:
                c = (i + k) // fields[f.POSITIONS] % fields[f.CHANNELS]
                first_sum, second_sum = exact_sums(raw, thread, at_block + k, rows, width, c, real)
                firsts[i + k] += first_sum
                seconds[i + k] += second_sum
        i += tile


@loop
def reduce(raw, thread, team, real):
    """Leave the sums of this thread's rows, per column."""
    width, wide, left_over, start, end = shape_of(raw, thread, team)
    firsts, _ = found_by(raw, thread)
    for i in range(2 * width):
        firsts[i] = 0.0
    if fields_of(raw, np.int64)[f.REDUCE] == 0:
        return
    while start < end:
        rows = min(rows_per_block(width), end - start)
        reduce_block(raw, thread, start, rows, width, real)
        start += rows
    if thread == team - 1 and left_over > 0:
        reduce_block(raw, thread, wide, 1, left_over, real)


@loop
def finish(raw, table, c, team, real):
    """Coefficients of channel c out of what the threads found, spread into shared rows."""
    fields = fields_of(raw, np.int64)
    first, second = 0.0, 0.0
    for thread in range(team):
        firsts, seconds = found_by(raw, thread)
        for j in range(fields[f.TILE]):
            i = column_of(raw, j, c)
            first += total(at(firsts, i), fields[f.POSITIONS], 0.0)
            second += total(at(seconds, i), fields[f.POSITIONS], 0.0)
    by_grad, by_x, constant = finish_gradient(raw, table, c, first, second, real)
    spread(raw, f.BY_GRAD, c, by_grad, real)
    spread(raw, f.BY_X, c, by_x, real)
    spread(raw, f.CONSTANTS, c, constant, real)


@loop
def gradient_block(raw, start, rows, columns, real):
    """Write the gradient of x for some wide rows."""
    fields, width = fields_of(raw, np.int64), width_of(raw)
    x, extra, grad_x = (
        tensor(raw, f.X, real),
        tensor(raw, f.EXTRA, real),
        tensor(raw, f.GRAD_X, real),
    )
    grad = grad_of_z(raw, real)
    i = 0
    while i < columns:
        tile, k = min(TILE_COLUMNS, columns - i), start * width + i
        call(
            fields[f.GRADIENT],
            (
                at(grad, k), at(x, k), at(extra, k), at(grad_x, k), rows, tile, width,
                at(shared_row(raw, f.MEANS, real), i), at(shared_row(raw, f.SCALES, real), i),
                at(shared_row(raw, f.SHIFTS, real), i),
                at(shared_row(raw, f.BY_GRAD, real), i), at(shared_row(raw, f.BY_X, real), i),
                at(shared_row(raw, f.CONSTANTS, real), i),
            ),
        )  # fmt: skip
        i += tile


def backward(real: Real) -> Callable[[Any], None]:
    """The backward kernel: `REDUCE` on blocks of rows, then `GRADIENT` where the gradient of x is wanted."""

    def kernel(raw):
        fields = fields_of(raw, np.int64)
        thread, team = np.int64(thread_num()), np.int64(num_threads())
        table, channels = pointer(fields[f.TABLE], np.float64), fields[f.CHANNELS]
        c0, c1 = channels * thread // team, channels * (thread + 1) // team
        spread_table(raw, table, c0, c1, real)
        barrier()
        reduce(raw, thread, team, real)
        barrier()
        for c in range(c0, c1):
            finish(raw, table, c, team, real)
        barrier()
        if fields[f.GRAD_X] == 0:
            return
        width, wide, left_over, start, end = shape_of(raw, thread, team)
        if thread == team - 1 and left_over > 0:
            gradient_block(raw, wide, 1, left_over, real)
        block = rows_per_block(width)
        # Backwards: the last blocks are still in the cache.
        while start < end:
            first = max(start, end - block)
            gradient_block(raw, first, end - first, width, real)
            end = first

    return kernel
