"""When and how running statistics move: once per training forward, exponentially or cumulatively."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.context import in_backward
from batchnorm.moments import Moments


def moves(training: bool, track_running_stats: bool) -> bool:
    """Whether this forward moves running statistics: in training, tracked, and not run by a backward pass.

    Activation checkpointing runs a training forward a second time inside the backward pass; torch's own
    layers then count the batch twice (pytorch#96136).
    """
    return training and track_running_stats and not in_backward()


def averaging_factor(
    momentum: float | None, num_batches_tracked: Tensor | int | None, dtype: torch.dtype
) -> float | Tensor:
    """The weight of the new batch: `momentum`, or `1 / (num_batches_tracked + 1)` when it is None."""
    if momentum is not None:
        return momentum
    if num_batches_tracked is None:
        raise ValueError(
            "momentum=None is the cumulative average, which needs num_batches_tracked, the number of "
            "batches already in the running statistics: pass it, or a momentum in [0, 1]"
        )
    # A tensor all the way: float(num_batches_tracked) would sync a GPU and break torch.compile.
    seen = num_batches_tracked + 1
    return 1.0 / (seen.to(dtype) if isinstance(seen, Tensor) else seen)


@torch.no_grad()
def moved(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    *,
    factor: float | Tensor,
    correction: float = 1,
    skip_nonfinite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The running statistics after a batch, outside the autograd graph; writes into nothing.

    `running = (1 - factor) * running + factor * batch`, with the batch's `m2 / (count - correction)` as
    its variance. A channel with no more than `correction` values stays as it was, and with
    `skip_nonfinite` so does the whole layer when a moment of the batch is inf or NaN.

    Returns:
        mean and var, shape (C,), in the dtype of the running ones; and whether anything moved, a
        boolean of shape ().
    """
    # no_grad() alone would let the tangents of forward-mode AD through.
    running_mean, running_var = running_mean.detach(), running_var.detach()
    counted = moments.count > correction
    if skip_nonfinite:
        counted = counted & torch.isfinite(moments.mean).all() & torch.isfinite(moments.m2).all()
    mean = _average(running_mean, moments.mean, factor)
    var = _average(running_var, moments.var(correction), factor)
    return (
        torch.where(counted, mean, running_mean),
        torch.where(counted, var, running_var),
        counted.any(),
    )


def _average(running: Tensor, batch: Tensor, factor: float | Tensor) -> Tensor:
    dtype = torch.promote_types(running.dtype, batch.dtype)
    return ((1 - factor) * running.to(dtype) + factor * batch.detach()).to(running.dtype)
