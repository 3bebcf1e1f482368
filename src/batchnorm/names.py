"""The name a layer has in the model that is calling it, for error messages."""

from __future__ import annotations

import sys

import torch
from torch import nn


def describe(module: nn.Module) -> str:
    """Class and qualified name of `module`, such as "BatchNorm2d 'features.1'".

    A module does not know its name, so the callers' frames are searched for the outermost module that
    contains it; a module that is called by itself is described by its class alone.
    """
    if torch.compiler.is_compiling():
        return type(module).__name__
    name = None
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner is not module:
            name = next((path for path, child in owner.named_modules() if child is module), name)
        frame = frame.f_back  # type: ignore[assignment]
    return type(module).__name__ if name is None else f"{type(module).__name__} {name!r}"


def quoted(module: nn.Module, name: str) -> str:
    """Class and qualified name, as in `BatchNorm2d 'features.1'`."""
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__
