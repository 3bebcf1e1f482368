"""Moments: count, mean and centred second moment per channel, taken from a tensor and merged exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.checks import check_mask, resolve_channel_dim, statistics_dtype


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred second moment `m2 = sum((x - mean)**2)` of each channel.

    `E[x**2] - E[x]**2` is used nowhere: it loses every digit once `|mean| / std` passes 1e4 in float32.

    Attributes:
        count: values per channel, float64, shape () when every channel has as many, else (C,). With
            weights it is their sum.
        mean: shape (C,), float64: a mean far from 0 that was rounded to float32 would spoil a merge.
        m2: shape (C,), sum of squared deviations from `mean`.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def from_tensor(cls, x: Tensor, *, channel_dim: int = 1, mask: Tensor | None = None) -> Moments:
        """Take the moments of `x` over every dimension but `channel_dim`; differentiable.

        `mean = sum(w*x) / sum(w)`, `m2 = sum(w * (x - mean)**2)`, two passes, the second one corrected
        for the rounding of the mean (Chan, Golub & LeVeque 1983, section 3). Half precision inputs are
        summed in float32.

        Args:
            x: floating point, rank 2 or more, the channels along `channel_dim`.
            mask: `w`, broadcastable to `x`: booleans (True counts) or non-negative weights (2 counts a
                value twice). What lies where it is zero is never read, NaN included.

        Raises:
            TypeError: `x` is not a floating point tensor.
            ValueError: wrong rank or channel dimension, or a mask that does not broadcast to `x` or has
                a negative or NaN weight (the weights are looked at on the CPU only).
        """
        channel_dim = resolve_channel_dim(x, channel_dim)
        if mask is not None:
            check_mask(mask, x)
        return take(x, tuple(dim for dim in range(x.ndim) if dim != channel_dim), mask)

    def merge(self, *others: Moments) -> Moments:
        """The moments of all the values together, exactly and stably (Chan, Golub & LeVeque 1979).

        With `d = b.mean - a.mean` and `n = a.count + b.count`:
        `mean = a.mean + d * b.count / n`, `m2 = a.m2 + b.m2 + d**2 * a.count * b.count / n`.
        Empty moments change nothing. `m2` is float64 too, so that thousands of merges in a row are as exact
        as one.
        """
        everyone = (self, *others)
        return Moments(
            torch.stack([moments.count.expand_as(moments.mean) for moments in everyone]),
            torch.stack([moments.mean for moments in everyone]),
            torch.stack([moments.m2 for moments in everyone]),
        ).merge_dim(0)

    def merge_dim(self, dim: int) -> Moments:
        """Merge moments that are stacked along dimension `dim` of `mean`: (K, C) becomes (C,)."""
        counts = self.count.expand_as(self.mean)
        means, m2 = self.mean.to(counts.dtype), self.m2.to(counts.dtype)
        total = counts.sum(dim, keepdim=True)
        share = counts / total.clamp_min(torch.finfo(total.dtype).tiny)
        # Differences from one of the means, so that a common offset costs no digits.
        origin = means.narrow(dim, 0, 1)
        mean = origin + (share * (means - origin)).sum(dim, keepdim=True)
        between = (counts * (means - mean).square()).sum(dim)
        return Moments(total.squeeze(dim), mean.squeeze(dim), m2.sum(dim) + between)

    def var(self, correction: float = 0) -> Tensor:
        """The variance `m2 / (count - correction)`, shape (C,).

        0 is the biased one that batch norm divides by, 1 the unbiased one that torch keeps as
        `running_var`. NaN where `count` is not above `correction` and `m2` is 0, as `torch.var` does.
        """
        return self.m2 / (self.count - correction).clamp_min(0).to(self.m2.dtype)


def take(x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None) -> Moments:
    """Moments over the dimensions `dims`, unchecked; `mean` has the shape of the dimensions left."""
    values = x.to(statistics_dtype(x))
    if mask is None:
        size = math.prod([x.shape[dim] for dim in dims])  # a list: torch.compile takes no generator here
        count = torch.full((), size, dtype=count_dtype(x), device=x.device)
        mean = values.sum(dims, keepdim=True) / max(size, 1)
        centred = values - mean
        shift = centred.sum(dims, keepdim=True) / max(size, 1)
        m2 = (centred - shift).square().sum(dims)
    else:
        count = mask.to(count_dtype(x)).expand_as(x).sum(dims)
        weights = mask.to(values.dtype)
        total = weights.expand_as(x).sum(dims, keepdim=True)
        total = total.where(total > 0, 1)
        values = values.where(mask != 0, 0)
        mean = (weights * values).sum(dims, keepdim=True) / total
        centred = values - mean
        shift = (weights * centred).sum(dims, keepdim=True) / total
        m2 = (weights * (centred - shift).square()).sum(dims)
    # What float32 cannot hold of the mean is in the shift.
    mean, shift = mean.to(count.dtype), shift.to(count.dtype)
    return Moments(count, (mean + shift).squeeze(dims), m2)


def count_dtype(x: Tensor) -> torch.dtype:
    """The dtype that values of `x` are counted in."""
    # float32 counts are inexact above 2**24; MPS has nothing wider.
    return torch.float32 if x.device.type == "mps" else torch.float64
