"""Batch norm in plain differentiable torch: the oracle that every faster kernel is tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.checks import statistics_dtype
from batchnorm.moments import Moments, take

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
}


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
    """`activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`, and the moments of `x`."""
    moments = take(x, tuple(dim for dim in range(x.ndim) if dim != channel_dim))
    scale, shift = scale_and_shift(moments.var(), weight, bias, eps)
    y = apply(x, moments.mean, scale, shift, (channel_dim,))
    return finish(y, activation, residual), moments


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
    """`activation((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)`."""
    # A half precision model keeps half precision statistics, in which eps may be nothing.
    dtype = torch.promote_types(running_var.dtype, statistics_dtype(x))
    scale, shift = scale_and_shift(running_var.to(dtype), weight, bias, eps)
    return finish(apply(x, running_mean, scale, shift, (channel_dim,)), activation, residual)


def scale_and_shift(
    var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """What a centred value is multiplied by, and what is added to it, per channel."""
    scale = torch.rsqrt(var + eps)
    return (scale if weight is None else scale * weight), bias


def apply(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor | None, axes: tuple[int, ...]) -> Tensor:
    """`(x - mean) * scale + shift`, in the dtype and memory layout of `x`.

    Args:
        mean, scale, shift: one value per index along the last of `axes`, or along all of them.
    """
    # Centred before it is scaled: folding the mean into the shift would cancel when |mean| >> std.
    y = (x - _along(mean.to(scale.dtype), x, axes)) * _along(scale, x, axes)
    if shift is not None:
        y = y + _along(shift, x, axes)
    return y.to(x.dtype)


def finish(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """`activation(y + residual)`."""
    if residual is not None:
        y = y + residual
    return y if activation is None else ACTIVATIONS[activation](y)


def _along(values: Tensor, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    shape = [1] * x.ndim
    for axis, size in zip(axes[-values.ndim :], values.shape, strict=True):
        shape[axis] = size
    return values.reshape(shape)
