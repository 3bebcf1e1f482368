"""What is known of a model of a library: its name, how to build it and an input that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

Example = tuple[Any, ...] | dict[str, Any]  # positional arguments, or keyword arguments


@dataclass(frozen=True)
class Entry:
    """A model of a library that can be built with random weights."""

    name: str
    family: str  # a short name of the architecture family
    build: Callable[[], nn.Module]
    example: Callable[[nn.Module, int], Example]  # a small input of so many samples, for eval mode
    trains: bool = True  # whether model.train(); model(*example) runs without targets


def images(*shape: int) -> Callable[[nn.Module, int], Example]:
    """An example of one tensor: so many samples of this shape."""

    def example(model: nn.Module, batch: int) -> Example:
        return (torch.randn(batch, *shape),)

    return example


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a model, among them the frozen ones that libraries write themselves."""
    return [module for module in model.modules() if _is_batch_norm(module)]


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return not isinstance(module, _InstanceNorm)
    buffers = dict(module.named_buffers(recurse=False))
    return {"running_mean", "running_var"} <= buffers.keys() and not isinstance(module, _InstanceNorm)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and afterwards every module's own mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was
