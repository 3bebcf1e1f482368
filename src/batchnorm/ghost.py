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
    full, leftover = divmod(x.shape[0], size)
    positions = math.prod(x.shape[1:]) // x.shape[channel_dim]
    if leftover * positions == 1:
        # A value on its own has no variance, so it joins the virtual batch before it.
        full, leftover = full - 1, leftover + size
    if mask is not None:
        mask = mask.expand_as(x)
    parts = []
    if full:
        cut = full * size
        head = None if mask is None else mask[:cut].unflatten(0, (full, size))
        parts.append(Part(x[:cut].unflatten(0, (full, size)), head, (0, channel_dim + 1)))
    if leftover:
        tail = None if mask is None else mask[-leftover:]
        parts.append(Part(x[-leftover:], tail, (channel_dim,)))
    return parts
