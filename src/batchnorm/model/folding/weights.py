"""Convolutions and linear layers, and subclasses of them, whose weights take in a scale and a shift."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm.model.folding.arithmetic import Affine
from batchnorm.model.folding.calls import Calls
from batchnorm.model.probe import twin_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
_TOLERANCE = 1e-10


def inherits_forward(module: nn.Module) -> bool:
    """Whether `module` is a convolution or linear layer that computes what torch's computes."""
    for kind in WEIGHTED:
        if isinstance(module, kind):
            same = [
                getattr(type(module), method, None) is getattr(kind, method, None)
                for method in ("forward", "_conv_forward", "__call__")
            ]
            return all(same) and "forward" not in vars(module)
    return False


def takes_scale_after(module: nn.Module, calls: Calls) -> bool:
    """Whether scaled and shifted weights give scaled and shifted outputs: of a subclass, by trying it.

    One that pads its input by itself does; one that standardises its weights does not.
    """
    if inherits_forward(module):
        return True
    if not isinstance(module, WEIGHTED) or not calls.shapes or "forward" in vars(module):
        return False
    try:
        return _scales(module, calls.shapes[0])
    except Exception:  # whatever a module does with an input that it was not made for
        return False


class Weights:
    """Weight and bias of a convolution or linear layer, in float64 until all is folded into them."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._transposed = isinstance(layer, TRANSPOSED)
        self._groups: int = getattr(layer, "groups", 1)
        weight: Tensor = layer.weight.detach().double()
        # (groups, outputs, inputs, ...) of a group; (groups, inputs, outputs, ...) where transposed.
        self._weight = weight.unflatten(0, (self._groups, -1))
        self.outputs: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        self._bias = weight.new_zeros(self.outputs) if layer.bias is None else layer.bias.detach().double()

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


@torch.no_grad()
def _scales(module: nn.Module, shape: torch.Size) -> bool:
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    options["generator"] = torch.Generator("cpu").manual_seed(0)
    twin = twin_of(module).eval()
    scaled, x = copy.deepcopy(twin), torch.randn(1, *shape[1:], **options)
    weights = Weights(scaled)
    affine = Affine(torch.rand(weights.outputs, **options) + 0.5, torch.randn(weights.outputs, **options))
    weights.put_after(affine)
    weights.write()
    y, got = twin(x.clone()), scaled(x.clone())
    dim = y.ndim - 1 if isinstance(module, nn.Linear) else 1
    along = [-1 if d == dim else 1 for d in range(y.ndim)]
    wanted = y * affine.scale.view(along) + affine.shift.view(along)
    return got.shape == wanted.shape and bool(((got - wanted).abs() <= _TOLERANCE * (1 + wanted.abs())).all())
