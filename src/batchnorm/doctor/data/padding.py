"""Padding: positions at the end of a sample that are all alike, and what they do to a layer's statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.doctor.data.noise import BatchStatistics, take
from batchnorm.model.packing import sent


@sent
@dataclass(frozen=True, eq=False)
class Padding:
    """Trailing positions that are equal, and a batch's statistics with and without them.

    Attributes:
        batch: its number.
        share: of the positions of the batch, less the share of equal ones at the beginning.
        shortest, longest: run of equal slices at a sample's end, of `length`.
        everything, without: the statistics of all positions, and of the others alone.
    """

    batch: int
    share: float
    shortest: int
    longest: int
    length: int
    everything: BatchStatistics
    without: BatchStatistics


@torch.no_grad()
def find_padding(x: Tensor, shape: torch.Size, channel_dim: int, batch: int) -> Padding | None:
    """The padding of a batch (N, C, positions) that came in `shape`, or None where there is none.

    Samples padded to the longest end in slices that are all equal, of a length that differs between samples.
    The black margin of an image does so too, but it is at the beginning as well.
    """
    if not isinstance(channel_dim, int) or len(shape) < 3 or len(x) < 2:
        return None
    spatial = [size for dim, size in enumerate(shape) if dim not in (0, channel_dim % len(shape))]
    values = x.reshape(x.shape[0], x.shape[1], *spatial)
    found = [_along(values, x, dim, batch) for dim in range(2, values.ndim) if values.shape[dim] > 2]
    return max((one for one in found if one is not None), key=lambda one: one.share, default=None)


def _along(values: Tensor, x: Tensor, dim: int, batch: int) -> Padding | None:
    length = values.shape[dim]
    trailing, leading = _run(values, dim), _run(values.flip(dim), dim)
    share = float((trailing - leading).double().mean() / length)
    if share <= 0.05 or int(trailing.min()) > length // 10 or float(trailing.double().std()) < 0.5:
        return None
    position = torch.arange(length, device=x.device)
    valid = position[None, :] < (length - trailing)[:, None]
    shape = [len(x), *[1] * (values.ndim - 1)]
    shape[dim] = length
    mask = valid.view(shape).expand_as(values).reshape(x.shape)
    return Padding(
        batch, share, int(trailing.min()), int(trailing.max()), length, take(x, None), take(x, mask)
    )


def _run(values: Tensor, dim: int) -> Tensor:
    """How many slices at the end of each sample equal the last one, and are constant in themselves; (N,)."""
    slices = values.movedim(dim, 1).flatten(3) if values.ndim > 3 else values.movedim(dim, 1)[..., None]
    last = slices[:, -1:, :, :1]
    equal = (slices == last).flatten(2).all(2).flip(1)
    run = equal.int().cumprod(1).sum(1)
    # One slice equals itself; a run begins with the second.
    return torch.where(run > 1, run, 0)
