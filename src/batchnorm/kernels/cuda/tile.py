"""Where a tile of a tensor lies: for channels in their own runs of memory, and for rows of all channels.

A program works on the tiles of one block of channels: of one channel, whose tiles are (samples, positions),
or, over rows, of as many channels as a tile is wide. What belongs to a channel is then a number, or a vector
along the tile's second axis.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channels_of(block, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of a block, and whether there are such channels."""
    if ROWS:
        c = block * WIDTH + tl.arange(0, WIDTH)
    else:
        c = block
    return c, c < channels


@triton.jit
def from_the_end(blocks):
    """The block and tile of a program of a pass that follows another over the same tensors.

    Last tiles first: what the pass before has read last may still be in the second-level cache.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    return program % blocks, program // blocks


@triton.jit
def place(
    c, tile, samples, channels, positions, tiles_of_positions,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Offsets of the tile's elements, whether they are in the tensor, and how many of each channel are."""
    if ROWS:
        n = tile * HEIGHT + tl.arange(0, HEIGHT)
        offsets = n.to(tl.int64)[:, None] * channels + c[None, :]
        inside = (n < samples)[:, None] & (c < channels)[None, :]
        count = tl.minimum(samples - tile * HEIGHT, HEIGHT)
    else:
        first_n = (tile // tiles_of_positions) * HEIGHT
        first_p = (tile % tiles_of_positions) * WIDTH
        n = first_n + tl.arange(0, HEIGHT)
        p = first_p + tl.arange(0, WIDTH)
        offsets = (n.to(tl.int64)[:, None] * channels + c) * positions + p[None, :]
        inside = (n < samples)[:, None] & (p < positions)[None, :]
        count = tl.minimum(samples - first_n, HEIGHT) * tl.minimum(positions - first_p, WIDTH)
    return offsets, inside, count


@triton.jit
def total(values, ROWS: tl.constexpr):
    """The sum of each channel's values in a tile."""
    if ROWS:
        found = tl.sum(values, 0)
    else:
        found = tl.sum(tl.sum(values, 1), 0)
    return found


@triton.jit
def moments_of(values, inside, count, ROWS: tl.constexpr):
    """Mean and m2 of each channel in a tile, in float64.

    Two passes over registers, the second corrected for the rounding of the mean (Chan, Golub & LeVeque 1983,
    section 3).
    """
    share = (1.0 / count.to(tl.float32)).to(values.dtype)
    mean = total(values * share, ROWS)
    centred = tl.where(inside, values - mean, 0.0)
    rest = total(centred, ROWS) * share
    rest = tl.where(rest == rest, rest, 0.0)  # after an infinite mean, which is the mean
    m2 = total(centred * centred, ROWS) - rest * rest * count
    m2 = tl.where(m2 < 0, 0.0, m2)
    return mean.to(tl.float64) + rest.to(tl.float64), m2.to(tl.float64)
