"""Batch norms that are constants for good, whoever wrote them: known by what they hold and compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.probe import is_constant, multiply_add_of, twin_of
from batchnorm.model.registry import applied


def frozen_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The frozen batch norms of `model` by qualified name, such as torchvision's FrozenBatchNorm2d.

    They have `running_mean` and `running_var`, and a `weight` and `bias` like these; they compute one
    `x * scale + shift`, in training mode and in eval mode (and then what they are registered to apply), and
    move none of their tensors.
    """
    return {name: module for name, module in model.named_modules() if is_frozen_batch_norm(module)}


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm that is constant for good."""
    channels = None if isinstance(module, _BatchNorm) else _channels(module)
    return channels is not None and is_constant(without_steps(module), channels)


def scale_and_shift_of(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What a module with running statistics multiplies with and adds in eval mode, by what it computes.

    Without what it is registered to apply after. None where it computes something else.
    """
    channels = _channels(module)
    return None if channels is None else multiply_add_of(without_steps(module), channels)


def without_steps(module: nn.Module) -> Any:
    """A copy of a layer that applies nothing after its normalisation."""
    twin = twin_of(module)
    steps = [step for step in applied(twin) if isinstance(step, nn.Module)]
    for name, child in twin._modules.items():
        if any(child is step for step in steps):
            twin._modules[name] = nn.Identity()
    return twin


def _channels(module: nn.Module) -> int | None:
    """How many values its running mean has, if its other tensors per channel have as many."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    mean, var = module._buffers.get("running_mean"), module._buffers.get("running_var")
    if mean is None or var is None or mean.ndim != 1 or mean.is_meta:
        return None
    alike = (var, getattr(module, "weight", None), getattr(module, "bias", None))
    fits = all(isinstance(tensor, Tensor) and tensor.shape == mean.shape for tensor in alike)
    return len(mean) if fits else None
