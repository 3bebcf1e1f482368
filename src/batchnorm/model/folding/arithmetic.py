"""A scale and a shift per channel, in float64, and the modules that do what is left of a batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.kernels.reference import ACTIVATIONS


class Affine(NamedTuple):
    """`x * scale + shift`, float64, one value per channel."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
        """What batch norm does: scale = weight / sqrt(var + eps), shift = bias - mean * scale."""
        scale = (var.detach().double() + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.detach().double()
        shift = -mean.detach().double() * scale
        if bias is not None:
            shift = shift + bias.detach().double()
        return cls(scale, shift)

    def after(self, first: Affine) -> Affine:
        """`first`, then this."""
        return Affine(first.scale * self.scale, first.shift * self.scale + self.shift)

    def repeated(self, times: int) -> Affine:
        """For channels that a flatten has made `times` features each."""
        return Affine(self.scale.repeat_interleave(times), self.shift.repeat_interleave(times))

    def is_finite(self) -> bool:
        """Whether every scale and shift is."""
        return bool(self.scale.isfinite().all() and self.shift.isfinite().all())


class MultiplyAdd(nn.Module):
    """`activation(x * weight + bias + residual)`: batch norm in eval mode, as two numbers per channel.

    Modules in it are applied after that, in order.

    Args:
        affine: the scale and shift, (C,) each.
        dtype: that of `weight` and `bias`.
        channel_dim: where the channels are in `x`.
        activation: its name in the layers' vocabulary, or None.
        requires_grad: of `weight` and `bias`.
    """

    def __init__(
        self,
        affine: Affine,
        dtype: torch.dtype,
        channel_dim: int = 1,
        activation: str | None = None,
        requires_grad: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(affine.scale.to(dtype, copy=True), requires_grad)
        self.bias = nn.Parameter(affine.shift.to(dtype, copy=True), requires_grad)
        self.channel_dim = channel_dim
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """In the shape and dtype of `x`; `mask` is there for layers that took one, and changes nothing."""
        behind = -self.channel_dim if self.channel_dim < 0 else x.ndim - self.channel_dim
        shape = (-1, *[1] * (behind - 1))
        weight, bias = self.weight.reshape(shape), self.bias.reshape(shape)
        # Two operations: torch.addcmul takes twice as long where the channels are not last.
        y = (x.to(weight.dtype) * weight).add_(bias).to(x.dtype)
        y = _finish(y, residual, self.activation)
        for step in self._modules.values():
            y = step(y)  # type: ignore[misc]
        return y

    def extra_repr(self) -> str:
        """The number of channels, where they are, and the activation if there is one."""
        extra = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{self.weight.shape[0]}, channel_dim={self.channel_dim}{extra}"


class ResidualActivation(nn.Module):
    """`activation(x + residual)`: what is left of a batch norm that has gone into other weights.

    Args:
        activation: its name in the layers' vocabulary, or None.
    """

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """In the shape of `x`; `mask` is there for layers that took one, and changes nothing."""
        return _finish(x, residual, self.activation)

    def extra_repr(self) -> str:
        """The activation, None included."""
        return f"activation={self.activation!r}"


class Applies(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """What the function makes of `x`."""
        return self.function(x)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


def _finish(x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if residual is not None:
        x = x + residual
    return x if activation is None else ACTIVATIONS[activation](x)
