"""Padding: what lies where a mask is 0 may be inf or NaN, and spoils no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm.context import values_can_be_read
from batchnorm.moments import Moments


def left_out_of(
    normalize: Callable[[Tensor], tuple[Tensor, Moments]], x: Tensor, mask: Tensor
) -> tuple[Tensor, Moments]:
    """`normalize(x)`, less what is not finite in `x` where `mask` is 0: it stays as it is, with gradient 0.

    The gradient that a loss has masked away is 0 there, and times inf or NaN it is NaN, which the sums of the
    backward pass give to every position.
    """
    if values_can_be_read(x) and bool(x.detach().sum().isfinite()):
        return normalize(x)  # to look costs less than the copies
    # abs() is one pass where isfinite() is four.
    kept = (x.detach().abs() < torch.inf) | (mask != 0)
    y, moments = normalize(x.where(kept, 0))
    return torch.where(kept, y, x.detach()), moments
