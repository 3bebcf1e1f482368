"""What batch norms are given in a pass over data, each batch of it normalised by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from batchnorm import checks
from batchnorm.model.function_calls import FunctionCalls, FunctionNorm
from batchnorm.model.gather import Normalises, Seen
from batchnorm.moments import Moments

# Taken to float64 at a time: on a CPU what stays in its cache, which is 5 times as fast; on a device, whose
# memory float64 copies should not fill, enough to keep it busy.
_ELEMENTS_ON_CPU, _ELEMENTS_ON_DEVICE = 2**18, 2**24


class InputMoments:
    """Hooks before layers: take the moments of the input, and let the layer normalise by them.

    By writing them into the running statistics: in eval mode a layer needs no more than that, whatever its
    options are. A batch with one value per channel cannot be normalised by itself: it is by all that the
    layer has been given so far, or, where that is nothing else, by the statistics that it had.

    Args:
        layers: and their names; `functions` finds those that are called as functions meanwhile.
        model: of the layers.
        meant: whether a batch norm that is called as a function is meant, too.
    """

    def __init__(
        self,
        layers: Mapping[Normalises, str],
        model: nn.Module,
        meant: Callable[[FunctionNorm], bool],
    ) -> None:
        self.layers = layers
        self.seen: dict[Normalises, Seen] = {}
        self.model, self._meant = model, meant
        self._had: dict[Normalises, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the hooks are there, after all other ones."""
        handles: list[RemovableHandle] = []
        try:
            for layer in self.layers:
                if isinstance(layer, nn.Module):
                    handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            with FunctionCalls(self.model, self._before_function):
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
        if mask is not None:
            checks.check_mask(mask, x)
        self._see(layer, x, channel_dim, mask)

    def _before_function(self, norm: FunctionNorm, x: Tensor) -> None:
        if x.is_floating_point() and x.ndim >= 2 and (norm in self.layers or self._meant(norm)):
            self._see(norm, x, 1, None)

    def _see(self, layer: Normalises, x: Tensor, channel_dim: int, mask: Tensor | None) -> None:
        if x.shape[channel_dim] != layer.num_features or x.numel() == 0:
            return
        moments = _moments(x.detach(), channel_dim, mask)
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
        self._normalise_by(layer, moments, self.seen[layer].moments)

    def _normalise_by(self, layer: Normalises, batch: Moments, so_far: Moments) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if layer not in self._had:
            self._had[layer] = layer.running_mean.clone(), layer.running_var.clone()
        mean, var = _mean_and_var(batch)
        if bool((batch.count <= 1).any()):
            of_all, had = _mean_and_var(so_far), self._had[layer]
            known = had[0].isfinite() & had[1].isfinite()
            had_mean, had_var = torch.where(known, had[0], mean), torch.where(known, had[1], 1)
            mean, var = (
                torch.where(batch.count > 1, own, torch.where(so_far.count > 1, merged, before))
                for own, merged, before in zip((mean, var), of_all, (had_mean, had_var), strict=True)
            )
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)


def _mean_and_var(moments: Moments) -> tuple[Tensor, Tensor]:
    return moments.mean, moments.m2 / moments.count.clamp_min(torch.finfo(moments.count.dtype).tiny)


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
