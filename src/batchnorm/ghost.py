"""Ghost batches: a batch cut into virtual batches, each of which is normalised by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.moments import Moments


class Part(NamedTuple):
    """Virtual batches of one size: x of shape (K, size, ...), or a single batch as it is.

    `axes` are the dimensions that keep statistics of their own: (virtual batch, channel) or (channel,).
    """

    x: Tensor
    mask: Tensor | None
    axes: tuple[int, ...]

    @property
    def reduced(self) -> tuple[int, ...]:
        """The dimensions that statistics are taken over."""
        return tuple(dim for dim in range(self.x.ndim) if dim not in self.axes)

    def stacked(self, count: int, size: int) -> Part:
        """This batch as `count` virtual batches of `size` samples."""
        mask = None if self.mask is None else self.mask.unflatten(0, (count, size))
        return Part(self.x.unflatten(0, (count, size)), mask, (0, self.axes[0] + 1))


def each_virtual_batch(
    normalize: Callable[[Part], tuple[Tensor, Moments]],
    x: Tensor,
    mask: Tensor | None,
    ghost_batch_size: int | None,
    channel_dim: int,
) -> tuple[Tensor, Moments]:
    """The outputs of `normalize` put together again, and the moments of the whole batch."""
    if ghost_batch_size is None or ghost_batch_size >= x.shape[0]:
        return normalize(Part(x, mask, (channel_dim,)))
    ys, moments = [], []
    for part in _split(x, mask, ghost_batch_size, channel_dim):
        y, batch = normalize(part)
        virtual = len(part.axes) == 2
        ys.append(y.flatten(0, 1) if virtual else y)
        moments.append(batch.merge_dim(0) if virtual else batch)
    return torch.cat(ys), moments[0].merge(*moments[1:])


def _split(x: Tensor, mask: Tensor | None, size: int, channel_dim: int) -> list[Part]:
    # Not divmod: torch.compile has none for dynamic sizes.
    full, leftover = x.shape[0] // size, x.shape[0] % size
    if leftover == 1 and math.prod(x.shape[1:]) == x.shape[channel_dim]:
        # A value on its own has no variance, so it joins the virtual batch before it.
        full, leftover = full - 1, leftover + size
    cuts = [cut for cut in (full * size, leftover) if cut]
    # Not slices: the gradient of a split is one cat, which keeps the memory layout.
    xs = x.split(cuts)
    masks = [None] * len(cuts) if mask is None else mask.expand_as(x).split(cuts)
    parts = [Part(*pair, (channel_dim,)) for pair in zip(xs, masks, strict=True)]
    if full:
        parts[0] = parts[0].stacked(full, size)
    return parts
