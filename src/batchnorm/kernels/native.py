"""torch's own batch norm operator behind the kernels' signatures: the fast choice where it applies."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.backends import cudnn
from torch.compiler import is_compiling

from batchnorm.checks import statistics_dtype
from batchnorm.kernels.reference import finish
from batchnorm.moments import Moments, count_dtype

_HALF = (torch.float16, torch.bfloat16)


def supports(x: Tensor, parameters: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether torch's operator takes `x` with per-channel tensors of these dtypes."""
    dtype = x.dtype
    wanted = torch.float32 if dtype in _HALF else dtype
    for parameter in parameters:
        if parameter is not None and parameter.dtype is not wanted:
            return False
    return x.numel() > 0


def training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """As `reference.training`."""
    size = x.shape[channel_dim]
    values = x.numel() // size
    mean = torch.zeros(size, dtype=statistics_dtype(x), device=x.device)
    var = torch.ones_like(mean)
    # A running average with momentum 1 is the batch's own mean and unbiased variance.
    y = _call(x, weight, bias, mean, var, True, 1.0, eps, channel_dim)
    count = torch.full((), values, dtype=count_dtype(x), device=x.device)
    return finish(y, activation, residual), Moments(count, mean, var * (values - 1))


def inference(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `reference.inference`."""
    y = _call(x, weight, bias, running_mean, running_var, False, 0.0, eps, channel_dim)
    return y if activation is None and residual is None else finish(y, activation, residual)


def training_and_moving(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `training`, and moves the running statistics in place."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is not None and running_var is not None and not is_compiling():
        # The operator saves them for a backward that does not read them. Under version counters of their
        # own, DDP may overwrite the buffers before that backward (pytorch#65907).
        running_mean, running_var = running_mean.data, running_var.data
    y = _call(x, weight, bias, running_mean, running_var, True, momentum, eps, channel_dim)
    return y if activation is None and residual is None else finish(y, activation, residual)


def _call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    channel_dim: int,
) -> Tensor:
    """`torch.batch_norm` for channels along any dimension; moves the running statistics when training."""
    rest = (weight, bias, running_mean, running_var, training, momentum, eps, cudnn.enabled)
    if channel_dim == 1:
        return torch.batch_norm(x, *rest)
    if not x.is_contiguous():
        return torch.batch_norm(x.movedim(channel_dim, 1), *rest).movedim(1, channel_dim)
    # (before, C, after), or (before, C) when the channels are last: a view, and a layout it is fast on.
    after = () if channel_dim == x.ndim - 1 else (-1,)
    flat = x.reshape(math.prod(x.shape[:channel_dim]), x.shape[channel_dim], *after)
    return torch.batch_norm(flat, *rest).reshape(x.shape)
