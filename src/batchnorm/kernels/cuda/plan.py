"""How the Triton kernels go about a tensor: its layout, its tiles, and how many programs share it.

The numbers in this file have not been measured: no GPU was at hand. They are to be set by
`batchnorm bench --device cuda`, and err on the side of torch's own operators.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from batchnorm.kernels.layout import Layout, layout_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Kernels count samples, positions and channels by int32, with room for a tile beyond the end and for the rows
# of a table; only offsets are int64.
MOST_VALUES, MOST_CHANNELS = 1 << 30, 1 << 27

# Elements of a tile, powers of 2: of tiles that are read one after another, and of those that stay in
# registers between reading and writing, in the forward and in the backward, which reads more tensors.
TILE, WHOLE_FORWARD, WHOLE_BACKWARD = 4096, 16384, 8192
# Channels side by side in a tile of rows: 64 bytes of half precision, two sectors of memory.
ROW_CHANNELS = 32
# Programs that keep a multiprocessor busy with loads under way, and the most parts of a channel that one
# program can merge.
PROGRAMS_PER_MULTIPROCESSOR, MOST_PARTS = 4, 512
# Numbers per row that the merging kernels hold.
MERGED = 2048
# Elements of a tile for each warp.
PER_WARP = 1024


class Cut(NamedTuple):
    """Tiles of `height` x `width`: `tiles` of them in each of `blocks` blocks of channels, shared by `parts`
    programs; `across` is how many lie side by side along the positions."""

    height: int
    width: int
    blocks: int
    tiles: int
    across: int
    parts: int
    warps: int


class Plan(NamedTuple):
    """The tensor's layout, the cut for passes over memory, and those for passes that read once, if any."""

    layout: Layout
    passes: Cut
    whole_forward: Cut | None
    whole_backward: Cut | None


@lru_cache(maxsize=4096)
def plan(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, channel_dim: int, multiprocessors: int
) -> Plan | None:
    """The plan for a tensor, or None when its memory is neither contiguous nor channels last, or when it is
    too large to be counted."""
    layout = layout_of(shape, strides, channel_dim)
    if layout is None or not can_count(shape, channel_dim):
        return None
    shrink = 2 if dtype == torch.float64 else 1
    return Plan(
        layout,
        _passes(layout, TILE // shrink, multiprocessors * PROGRAMS_PER_MULTIPROCESSOR),
        _whole(layout, WHOLE_FORWARD // shrink, multiprocessors),
        _whole(layout, WHOLE_BACKWARD // shrink, multiprocessors),
    )


def can_count(shape: torch.Size, channel_dim: int) -> bool:
    """Whether the kernels can count the values and channels of a tensor of this shape."""
    channels = shape[channel_dim]
    return channels <= MOST_CHANNELS and math.prod(shape) <= MOST_VALUES * channels


def merging(parts: int) -> tuple[int, int]:
    """Powers of 2: parts, and channels that a merging program takes on."""
    rows = _power_of_2(parts)
    return rows, max(1, min(64, MERGED // rows))


def _passes(layout: Layout, size: int, programs: int) -> Cut:
    if layout.rows:
        width = min(_power_of_2(layout.channels), ROW_CHANNELS, size)
        height = min(_power_of_2(layout.samples), size // width)
        blocks, across = -(-layout.channels // width), 1
    else:
        width = min(_power_of_2(layout.positions), size)
        height = min(_power_of_2(layout.samples), size // width)
        blocks, across = layout.channels, -(-layout.positions // width)
    tiles = -(-layout.samples // height) * across
    parts = max(1, min(-(-programs // blocks), tiles, MOST_PARTS))
    return Cut(height, width, blocks, tiles, across, parts, _warps(height * width))


def _whole(layout: Layout, size: int, multiprocessors: int) -> Cut | None:
    """A cut into one tile per block, where that keeps at least half of the card busy."""
    height = _power_of_2(layout.samples)
    if layout.rows:
        width = min(_power_of_2(layout.channels), ROW_CHANNELS, max(size // height, 1))
        if width < min(ROW_CHANNELS // 4, layout.channels):
            return None  # less than a sector of memory for each row
        blocks = -(-layout.channels // width)
    else:
        width, blocks = _power_of_2(layout.positions), layout.channels
    if height * width > size or 2 * blocks < multiprocessors:
        return None
    return Cut(height, width, blocks, 1, 1, 1, _warps(height * width))


def _warps(elements: int) -> int:
    return max(1, min(16, _power_of_2(elements) // PER_WARP))


def _power_of_2(number: int) -> int:
    """The next one from `number` on."""
    return 1 << max(number - 1, 0).bit_length()
