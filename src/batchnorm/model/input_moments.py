"""What batch norms are given in a pass over data, each batch of it normalised by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import checks
from batchnorm.model.gather import Seen
from batchnorm.moments import Moments
from batchnorm.names import quoted

# Taken to float64 at a time: on a CPU what stays in its cache, which is 5 times as fast; on a device, whose
# memory float64 copies should not fill, enough to keep it busy.
_ELEMENTS_ON_CPU, _ELEMENTS_ON_DEVICE = 2**18, 2**24


class _FewValues(ValueError):
    """Told apart from what a model raises by itself."""


class InputMoments:
    """Hooks before layers: take the moments of the input, and let the layer normalise by them.

    By writing them into the running statistics: in eval mode a layer needs no more than that, whatever its
    options are.
    """

    def __init__(self, layers: dict[_BatchNorm, str], one_value_is_enough: bool, verb: str) -> None:
        self.layers = layers
        self.one_value_is_enough = one_value_is_enough
        self.verb = verb
        self.seen: dict[_BatchNorm, Seen] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the hooks are there, after all other ones."""
        handles = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, _BatchNorm)
        x, mask = input_of(layer, args, kwargs)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            return  # the layer itself says what is wrong
        channel_dim = checks.resolve_channel_dim(x, getattr(layer, "channel_dim", 1))
        if x.shape[channel_dim] != layer.num_features or x.numel() == 0:
            return
        if mask is not None:
            checks.check_mask(mask, x)
        self._check_values(layer, x, mask, channel_dim)
        moments = _moments(x.detach(), channel_dim, mask)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.m2 / moments.count.clamp_min(torch.finfo(moments.count.dtype).tiny))
        samples = x.shape[1 if channel_dim == 0 else 0]
        before = self.seen.get(layer)
        if before is None:
            self.seen[layer] = Seen(1, samples, moments, len(self.seen))
        else:
            self.seen[layer] = before._replace(
                times=before.times + 1,
                samples=before.samples + samples,
                moments=before.moments.merge(moments),
            )

    def _check_values(self, layer: _BatchNorm, x: Tensor, mask: Tensor | None, channel_dim: int) -> None:
        if self.one_value_is_enough:
            return
        one = x.numel() == x.shape[channel_dim]
        if not one and mask is not None and checks.values_can_be_read(mask):
            counted = mask.expand_as(x).count_nonzero([dim for dim in range(x.ndim) if dim != channel_dim])
            one = bool((counted <= 1).any())
        if one:
            raise _FewValues(
                f"{self.verb}: {quoted(layer, self.layers[layer])} was given an input of shape "
                f"{tuple(x.shape)} with one value per channel, and normalising by the batch needs more. Use "
                "larger batches, drop the last incomplete one with DataLoader(..., drop_last=True), or "
                "recalibrate with sequential=True, which does not need them"
            )


def input_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
    """The input and the mask in the arguments of a batch norm's call: `(x, residual, mask)` for ours."""
    x = args[0] if args else kwargs.get("x", kwargs.get("input"))
    if not hasattr(layer, "channel_dim"):
        return x, None
    return x, args[2] if len(args) > 2 else kwargs.get("mask")


def _moments(x: Tensor, channel_dim: int, mask: Tensor | None) -> Moments:
    """Moments summed in float64; float32 sums of millions of values are wrong by some 1e-6."""
    dim = 1 if channel_dim == 0 else 0
    elements = _ELEMENTS_ON_CPU if x.device.type == "cpu" else _ELEMENTS_ON_DEVICE
    size = max(1, elements * x.shape[dim] // x.numel())
    xs = x.split(size, dim)
    masks = [None] * len(xs) if mask is None else mask.expand_as(x).split(size, dim)
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    parts = [
        Moments.from_tensor(part.to(dtype), channel_dim=channel_dim, mask=of_part)
        for part, of_part in zip(xs, masks, strict=True)
    ]
    return parts[0].merge(*parts[1:]) if len(parts) > 1 else parts[0]
