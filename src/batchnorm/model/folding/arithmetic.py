"""Scale and shift per channel, put into weights: the arithmetic of fold, in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.model.folding.graph import CONVOLUTIONS, TRANSPOSED


class Affine(NamedTuple):
    """`x * scale + shift`, float64, one value per channel."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, layer: _BatchNorm) -> Affine:
        """What `layer` does in eval mode: scale = weight / sqrt(var + eps), shift = bias - mean * scale."""
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var = layer.running_mean.detach().double(), layer.running_var.detach().double()
        scale = (var + layer.eps).rsqrt()
        if layer.weight is not None:
            scale = scale * layer.weight.detach().double()
        shift = -mean * scale
        if layer.bias is not None:
            shift = shift + layer.bias.detach().double()
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
        y = torch.addcmul(bias, x.to(weight.dtype), weight).to(x.dtype)
        return _finish(y, residual, self.activation)

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


def _finish(x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if residual is not None:
        x = x + residual
    return x if activation is None else ACTIVATIONS[activation](x)


class Weights:
    """Weight and bias of a convolution or linear layer, in float64 until all is folded into them."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._transposed = isinstance(layer, TRANSPOSED)
        self._groups: int = getattr(layer, "groups", 1)
        weight: Tensor = layer.weight.detach().double()
        # (groups, outputs, inputs, ...) of a group; (groups, inputs, outputs, ...) where transposed.
        self._weight = weight.unflatten(0, (self._groups, -1))
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        self._bias = weight.new_zeros(outputs) if layer.bias is None else layer.bias.detach().double()

    def put_after(self, affine: Affine) -> None:
        """The layer, then `affine` on its outputs."""
        self._weight = self._weight * self._along(affine.scale, 2 if self._transposed else 1)
        self._bias = self._bias * affine.scale + affine.shift

    def put_before(self, affine: Affine) -> None:
        """`affine` on the inputs, then the layer."""
        inputs = 1 if self._transposed else 2
        shifted = self._weight * self._along(affine.shift, inputs)
        dims = [dim for dim in range(1, shifted.ndim) if dim != (2 if self._transposed else 1)]
        self._bias = self._bias + shifted.sum(dims).flatten()
        self._weight = self._weight * self._along(affine.scale, inputs)

    def write(self) -> bool:
        """Make them the layer's Parameters, rounded once to its dtype; whether they are finite there."""
        layer = self._layer
        weight, trains = layer.weight.detach(), layer.weight.requires_grad
        if parametrize.is_parametrized(layer):
            # Not by remove_parametrizations: that changes the class, which layers copied from this share.
            layer.__class__ = parametrize.type_before_parametrizations(layer)
            del layer.parametrizations
        folded = torch.empty_like(weight).copy_(self._weight.flatten(0, 1))
        layer.weight = nn.Parameter(folded, trains)
        layer.bias = nn.Parameter(self._bias.to(weight.dtype), trains)
        return bool(folded.isfinite().all() and layer.bias.isfinite().all())

    def _along(self, values: Tensor, dim: int) -> Tensor:
        shape = [1] * self._weight.ndim
        shape[0], shape[dim] = self._groups, -1
        return values.reshape(shape)


def shift_meets_zeros(layer: Any) -> bool:
    """Whether outputs of `layer` may read zeros that are no inputs: a shift before it does not reach them."""
    if isinstance(layer, CONVOLUTIONS):
        if layer.padding_mode != "zeros" or layer.padding == "valid":
            return False
        if layer.padding == "same":
            return any(size > 1 for size in layer.kernel_size)
        return any(layer.padding)
    if isinstance(layer, TRANSPOSED):
        one_to_one = math.prod(layer.kernel_size) == math.prod(layer.stride) == 1
        return not one_to_one or any(layer.padding) or any(layer.output_padding)
    return False
