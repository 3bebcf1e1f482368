"""How a case of the held-out corpus is made: a model, its batches, and what else `diagnose` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.doctor.data.digits import Case, Make
from tests.doctor.heldout.datasets import Batches, batches
from tests.doctor.heldout.training import RECIPES, trained

Change = Callable[[nn.Module], Any]


def judged(
    name: str,
    *,
    training: bool = False,
    size: int | None = None,
    optimizer: bool = False,
    loss: bool = False,
    change: Change | None = None,
    on: Callable[[Batches], Batches] = list,
    data: bool = True,
    **options: Any,
) -> Make:
    """A trained model, changed, with training batches in training mode and with test batches in eval mode."""

    def make() -> Case:
        model, its_optimizer = trained(name)
        model.train(training)
        changed = change(model) if change else None
        model = changed if isinstance(changed, nn.Module) else model
        if optimizer:
            options["optimizer"] = its_optimizer
        if loss:
            options["loss"] = RECIPES[name][5]
        given = batches(RECIPES[name][1], size or RECIPES[name][2], test=not training) if data else []
        if name == "shallow":
            given = [(x.flatten(1), y) for x, y in given]
        return model, on(given), dict(options)

    return make


def untrained(
    build: Callable[[], nn.Module],
    data: str,
    size: int,
    on: Callable[[Batches], Batches] = list,
    change: Change | None = None,
    **options: Any,
) -> Make:
    """A new model, changed, in training mode with training batches."""

    def make() -> Case:
        torch.manual_seed(5)
        model = build().train()
        if change:
            change(model)
        return model, on(batches(data, size)), options

    return make


def new_with_optimizer(build: Callable[[], nn.Module], data: str, size: int, make_optimizer: Any) -> Make:
    def make() -> Case:
        torch.manual_seed(6)
        model = build().train()
        return model, batches(data, size), {"optimizer": make_optimizer(model)}

    return make
