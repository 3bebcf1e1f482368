"""What a run of the example does with each module of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Calls:
    """What a forward pass of the example did with a module.

    `shapes` are those of its first input. `constants` are the arguments that are no tensors, by name, if they
    were the same in all calls, else None.
    """

    count: int = 0
    shapes: list[torch.Size] = field(default_factory=list)
    constants: dict[str, Any] | None = field(default_factory=dict)
    with_residual: bool = False

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of one call."""
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
        except (TypeError, ValueError):
            given = dict(enumerate(args))  # type: ignore[arg-type]
        first = next(iter(given.values()), None)
        if isinstance(first, Tensor):
            self.shapes.append(first.shape)
        constants = {
            name: value
            for name, value in given.items()
            if value is None or isinstance(value, (bool, int, float, str))
        }
        self.constants = constants if self.count == 0 or self.constants == constants else None
        self.with_residual |= given.get("residual") is not None or given.get("mask") is not None
        self.count += 1


def record_calls(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, Calls]:
    """What `run()` does with each module of `model`."""
    calls = {module: Calls() for module in model.modules()}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module].add(module, args, kwargs)

    scripted = torch.jit.ScriptModule
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in calls
        if not isinstance(module, scripted)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls
