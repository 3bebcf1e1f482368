"""Moments of columns over rows of memory, as `rows.py` and `groups.py` take them, and numbers for columns."""

from __future__ import annotations

import numpy as np

from batchnorm.kernels.cpu.channel import is_near_mean, merge
from batchnorm.kernels.cpu.memory import add_to_first, add_to_second, at, get, put
from batchnorm.kernels.cpu.runs import loop
from batchnorm.kernels.cpu.slabs import centred_sums, total


@loop
def add_rows(x, rows, width, stride, sums):
    """Adds to `sums` the sum of each column."""
    quarter = rows // 4
    for row in range(quarter):
        a, b, c, d = four_rows(row, quarter, stride)
        for i in range(width):
            add_to_first(sums, i, (get(x, a + i) + get(x, b + i)) + (get(x, c + i) + get(x, d + i)))
    for row in range(4 * quarter, rows):
        for i in range(width):
            add_to_first(sums, i, get(x, row * stride + i))


@loop
def add_centred_rows(x, rows, width, stride, centre, first, second):
    """Adds to `first` and `second` the sums of `x - centre` and of its square, for each column."""
    quarter = rows // 4
    for row in range(quarter):
        a, b, c, d = four_rows(row, quarter, stride)
        for i in range(width):
            m = get(centre, i)
            xa, xb = get(x, a + i) - m, get(x, b + i) - m
            xc, xd = get(x, c + i) - m, get(x, d + i) - m
            add_to_first(first, i, (xa + xb) + (xc + xd))
            add_to_second(second, i, (xa * xa + xb * xb) + (xc * xc + xd * xd))
    for row in range(4 * quarter, rows):
        for i in range(width):
            xa = get(x, row * stride + i) - get(centre, i)
            add_to_first(first, i, xa)
            add_to_second(second, i, xa * xa)


@loop
def four_rows(row, quarter, stride):
    """Where a row of each quarter of a block begins.

    Several rows at a time are a part of the traffic to the sums; and far apart, as memory is fetched ahead
    page by page, and rows on one page are in each other's way.
    """
    return row * stride, (row + quarter) * stride, (row + 2 * quarter) * stride, (row + 3 * quarter) * stride


@loop
def block_moments(x, rows, width, stride, count, means, m2s, scratch, real):
    """Take a block of rows into the moments of its columns, which have taken in `count` rows."""
    centre, first, second = scratch, at(scratch, width), at(scratch, 2 * width)
    near = count > 0
    if near:
        for i in range(width):
            centre[i] = real(means[i])
        sum_centred_rows(x, rows, width, stride, centre, first, second, real)
        for i in range(width):
            near &= is_near_mean(first[i], second[i], real(rows))
    if not near:
        for i in range(width):
            centre[i] = real(0)
        add_rows(x, rows, width, stride, centre)
        for i in range(width):
            centre[i] /= real(rows)
        sum_centred_rows(x, rows, width, stride, centre, first, second, real)
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
def sum_centred_rows(x, rows, width, stride, centre, first, second, real):
    """Writes what `add_centred_rows` adds."""
    for i in range(width):
        first[i] = real(0)
        second[i] = real(0)
    add_centred_rows(x, rows, width, stride, centre, first, second)


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
def merge_columns(means, m2s, n, positions, count, rows, found_means, found_m2s):
    """`merge` for n channels next to each other, of each a column of so many rows for every position."""
    for c in range(n):
        of_columns = at(found_means, c * positions)
        mean = total(of_columns, positions, 0.0) / positions
        between = centred_sums(of_columns, positions, mean, 0.0)[1]
        within = total(at(found_m2s, c * positions), positions, 0.0)
        merge(means, m2s, c, count, rows * positions, mean, within + rows * between)


@loop
def fill(values, n, value):
    """Write a value n times."""
    for i in range(n):
        values[i] = value


@loop
def convert(values, to, n, real):
    """Write n values in the tensors' dtype."""
    for i in range(n):
        put(to, i, real(get(values, i)))
