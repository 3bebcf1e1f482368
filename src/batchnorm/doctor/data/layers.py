"""The layers that are observed: batch norms, and hand-made ones that are known by what they keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import distributed
from batchnorm.doctor.handwritten import Handwritten
from batchnorm.doctor.held import held_tensors
from batchnorm.doctor.subject import Subject
from batchnorm.model.batch_norms import batches_counted, is_number
from batchnorm.model.calling import unwrapped
from batchnorm.model.freeze import is_frozen
from batchnorm.model.frozen import is_frozen_batch_norm
from batchnorm.model.input_moments import input_of


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that normalises by the batch and keeps running statistics, or none.

    Attributes:
        name: its qualified name.
        module: the layer.
        frozen: whether it normalises by its running statistics in training too: by `bn.freeze`, by its mode,
            or for good, as torchvision's FrozenBatchNorm2d.
        handmade: whether it is none of torch.nn's and this package's.
        kept: of a handmade one that was seen to follow the batch: the names of its running mean and variance.
    """

    name: str
    module: Any
    frozen: bool
    handmade: bool
    kept: tuple[str, str] | None = None

    @property
    def eps(self) -> float:
        """The module's own eps; torch's default, 1e-5, where it has none that is one number."""
        eps = getattr(self.module, "eps", None)
        return float(eps) if is_number(eps) else 1e-5

    @property
    def running(self) -> tuple[Tensor, Tensor] | None:
        """The running mean and variance themselves, in the layer's own shape; None without any."""
        if not self.handmade:
            mean, var = self.module.running_mean, self.module.running_var
            return None if mean is None or var is None else (mean, var)
        if self.kept is not None:
            mean, var = (getattr(self.module, name, None) for name in self.kept)
            return (mean, var) if isinstance(mean, Tensor) and isinstance(var, Tensor) else None
        return running_of(self.module)

    @property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """A copy of the running mean and variance: shape (C,), float64, on the CPU."""
        if self.running is None:
            return None
        mean, var = (tensor.detach().to("cpu", torch.float64).flatten() for tensor in self.running)
        return mean.clone(), var.clone()

    @property
    def processes(self) -> int:
        """How many processes' batches it normalises by in training."""
        if isinstance(self.module, nn.SyncBatchNorm):
            return torch.distributed.get_world_size(self.module.process_group)
        group = distributed.group_of(getattr(self.module, "_sync", False))
        return 1 if group is None else torch.distributed.get_world_size(group)

    @property
    def never_moved(self) -> bool:
        """Whether the running statistics are the ones that a new layer has."""
        if self.statistics is None:
            return False
        counted = batches_counted(self.module)
        if counted is not None and not self.handmade:
            return counted == 0
        mean, var = self.statistics
        return bool((mean == 0).all()) and bool((var == var[0]).all()) and float(var[0]) in (0.0, 1.0)

    @property
    def batches_averaged(self) -> float:
        """How many batches' noise is in the running statistics: `(2 - m) / m` for the momentum m.

        The variance of an exponential average of independent values is `m / (2 - m)` times theirs; a
        cumulative average is over the batches that were counted.
        """
        if self.handmade:
            return 1.0  # its momentum may be of either convention
        momentum = self.module.momentum
        counted = batches_counted(self.module)
        batches = float("inf") if counted is None else max(float(counted), 1.0)
        if momentum is None:
            return min(batches, 1e6)
        return min((2 - momentum) / momentum if momentum > 0 else 1e6, batches)

    @torch.no_grad()
    def write(self, mean: Tensor, var: Tensor) -> None:
        """Write statistics of shape (C,) into the running ones."""
        assert self.running is not None
        for tensor, value in zip(self.running, (mean, var), strict=True):
            tensor.data.copy_(value.to(tensor.device, tensor.dtype).view(tensor.shape))

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        """The input as (N, C, positions), and the mask broadcast to it; None where it is neither."""
        x, mask = input_of(self.module, args, kwargs)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or x.numel() == 0:
            return None
        channel_dim = getattr(self.module, "channel_dim", 1)
        if not isinstance(channel_dim, int) or self.handmade:
            channel_dim, mask = 1, None
        x = x.detach()
        mask = None if mask is None else mask.detach().expand_as(x).movedim(channel_dim, 1)
        x = x.movedim(channel_dim, 1)
        channels = x.shape[1]
        if self.running is not None and self.running[0].numel() != channels:
            return None
        flat = x.reshape(x.shape[0], channels, -1)
        return flat, None if mask is None else mask.reshape(flat.shape)


def layers_of(subject: Subject) -> dict[str, Layer]:
    """The subject's batch norms and hand-made layers, by qualified name."""
    network = unwrapped(subject.model)
    layers = {}
    known = {id(module) for module in subject.batch_norms.values()}
    for name, module in network.named_modules():
        handmade = not isinstance(module, _BatchNorm)
        kept = _kept(subject.handwritten[name]) if name in subject.handwritten else None
        if id(module) in known or kept is not None or (handmade and running_of(module) is not None):
            frozen = is_frozen(module) if isinstance(module, _BatchNorm) else is_frozen_batch_norm(module)
            frozen = frozen or (network.training and not module.training)
            layers[name] = Layer(name, module, frozen, handmade, kept)
    return layers


def _kept(seen: Handwritten) -> tuple[str, str] | None:
    names = {kept.statistic: kept.name for kept in seen.kept}
    return (names["mean"], names["variance"]) if len(names) == 2 else None


def running_of(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Two floating point tensors of one size that are named after a mean and a variance, or None."""
    if isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        return None
    found: dict[str, Tensor] = {}
    for name, tensor in held_tensors(module):
        for kind in ("mean", "var"):
            if kind in name.lower() and tensor.is_floating_point() and tensor.numel() > 1:
                found.setdefault(kind, tensor)
    if len(found) == 2 and found["mean"].numel() == found["var"].numel():
        return found["mean"], found["var"]
    return None
