"""The struct that a CPU kernel is given: fields of 8 bytes, in this order.

NumPy's integers, because Numba compiles a function once more for each Python integer it is called with.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def _count(start: int, stop: int) -> Iterator[np.int64]:
    return map(np.int64, range(start, stop))


# Addresses of tensors, 0 for those that are not there.
X, Y, EXTRA, GRAD_Y, GRAD_X, GRAD_Z = _count(0, 6)
WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR, GRAD_WEIGHT, GRAD_BIAS = _count(6, 12)
# Addresses of scratch memory, and of the compiled functions of `runs.py`.
TABLE, WORK, SCRATCH, APPLY, REDUCE, REDUCE_ONE, GRADIENT = _count(12, 19)
# Positions are 1 where the channels are last.
SAMPLES, CHANNELS, POSITIONS = _count(19, 22)
# How many channels to work on at a time, or of rows, how many samples make one; into how many parts to cut
# samples and positions.
TILE, SAMPLE_PARTS, POSITION_PARTS = _count(22, 25)
STATISTICS, BY_BATCH, STORED = _count(25, 28)
# Address of the layer's num_batches_tracked.
NUM_BATCHES = np.int64(28)
# Addresses of two numbers per channel: sums to leave; coefficients to take, instead of those by the sums.
SUMS, COEFFICIENTS = _count(29, 31)
# Address of the slope's bits: see `runs.FROM_BITS`.
BITS = np.int64(31)
# Of all the values in the statistics, some of which other processes may have, per channel.
COUNT, EPS, MOMENTUM = _count(32, 35)

FORMAT = "32q3d"

# What STATISTICS says to normalise by: OF_MOMENTS is by those in the table. Kernels only compare with these,
# and every call packs one: Python's integers, which is faster.
OF_BATCH, RUNNING, OF_TABLE, OF_MOMENTS = range(4)

# Rows of a layer's table: float64, one number per channel.
MEAN, M2, SCALE, SHIFT, INVSTD = _count(0, 5)
TABLE_ROWS = 5

# Rows of numbers per column, in the tensors' dtype, that `groups.py` and `rows.py` apply and sum by.
MEANS, SCALES, SHIFTS, BY_GRAD, BY_X, CONSTANTS = _count(0, 6)
COLUMN_ROWS = 6

# Float64 numbers in a cache line: vectors that lie across two are read and written at half the speed.
LINE = np.int64(8)

# Values whose bits are one word. Each run begins with a word of its own.
WORD = 32
