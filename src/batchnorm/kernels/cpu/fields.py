"""The struct that a CPU kernel is given: fields of 8 bytes, in this order."""

from __future__ import annotations

# Addresses of tensors, 0 for those that are not there.
X, Y, EXTRA, GRAD_Y, GRAD_X, GRAD_Z = range(6)
WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR, GRAD_WEIGHT, GRAD_BIAS = range(6, 12)
# Addresses of scratch memory, and of the compiled functions of `runs.py`.
TABLE, WORK, SCRATCH, APPLY, REDUCE, REDUCE_ONE, GRADIENT = range(12, 19)
# (samples, channels, positions) of slabs; (rows, channels, channels side by side) of rows.
SAMPLES, CHANNELS, POSITIONS = range(19, 22)
# How many channels to work on at a time; into how many parts to cut samples and positions.
TILE, SAMPLE_PARTS, POSITION_PARTS = range(22, 25)
STATISTICS, BY_BATCH, STORED = range(25, 28)
# Address of the layer's num_batches_tracked.
NUM_BATCHES = 28
EPS, MOMENTUM = range(29, 31)

FORMAT = "29q2d"

# What STATISTICS says to normalise by.
OF_BATCH, RUNNING, OF_TABLE = range(3)

# Rows of a layer's table: float64, one number per channel.
MEAN, M2, SCALE, SHIFT, INVSTD = range(5)
TABLE_ROWS = 5
