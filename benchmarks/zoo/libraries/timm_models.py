"""The models of timm, all of them: which contain batch norm is known once they are built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.libraries import torchvision_operators
from benchmarks.zoo.libraries.entry import Entry, Example, batch_norms, evaluating

SMALL = 60_000_000  # parameters
SIZES = (96, 128)  # tried in this order, then the model's own size


def entries() -> dict[str, Entry]:
    torchvision_operators.define()
    import timm

    return {name: _entry(name) for name in timm.list_models()}


def has_batch_norm_and_is_small(build: Callable[[], nn.Module]) -> bool:
    """Whether a model has a batch norm and at most 60 million parameters, without its memory if possible."""
    model = _without_memory(build)
    return sum(parameter.numel() for parameter in model.parameters()) <= SMALL and bool(batch_norms(model))


def _without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # whatever a builder does with numbers that a meta tensor does not have
        return build()


def _entry(name: str) -> Entry:
    import timm

    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    return Entry(name, family, partial(_build, name), _example)


def _build(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def _example(model: nn.Module, batch: int) -> Example:
    for shape in _shapes(model.default_cfg):  # type: ignore[arg-type]
        if _takes(model, shape):
            return (torch.randn(batch, *shape),)
    raise ValueError(f"{type(model).__name__} does not take an image of its own size {shape}.")


def _shapes(default_cfg: dict[str, Any]) -> list[tuple[int, ...]]:
    channels, *size = default_cfg["input_size"]
    return [*((channels, small, small) for small in SIZES if small < min(size)), (channels, *size)]


def _takes(model: nn.Module, shape: tuple[int, ...]) -> bool:
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            model(torch.zeros(1, *shape, device=device))
    except Exception:  # asserts, shape errors and others: there is no one error for a wrong size
        return False
    return True
