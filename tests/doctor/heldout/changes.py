"""Changes of one layer, or of the batches, that more than one family of faults makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.doctor.heldout.cases import Change
from tests.doctor.heldout.datasets import Batches


def by_class(given: Batches) -> Batches:
    x, y = torch.cat([b[0] for b in given]), torch.cat([b[1] for b in given])
    order = y.argsort(stable=True)
    size = len(given[0][0])
    return [(x[order[i : i + size]], y[order[i : i + size]]) for i in range(0, len(x), size)]


def in_layer(layer: str, act: Callable[[Any], Any]) -> Change:
    """Something done to the layer of that name."""

    def change(model: nn.Module) -> None:
        act(model.get_submodule(layer))

    return change


def setting(layer: str, **values: Any) -> Change:
    return in_layer(layer, lambda norm: [setattr(norm, name, value) for name, value in values.items()])


def filled(tensor: str, change_of: Callable[[Tensor], Tensor], channels: slice = slice(None)) -> Change:
    """The tensor of that name with some channels changed."""

    def change(model: nn.Module) -> None:
        layer, _, attribute = tensor.rpartition(".")
        values = getattr(model.get_submodule(layer), attribute).data
        values[channels] = change_of(values[channels])

    return change


def replaced(path: str, make: Callable[[nn.Module], nn.Module]) -> Change:
    def change(model: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)).train(owner.training))

    return change


def followed_by(path: str, make: Callable[[], nn.Module]) -> Change:
    """Another module behind the one at that path, as its `1`."""
    return replaced(path, lambda module: nn.Sequential(module, make()))


def scaled(factor: float, offset: float = 0.0) -> Callable[[Batches], Batches]:
    return lambda given: [(x * factor + offset, y) for x, y in given]
