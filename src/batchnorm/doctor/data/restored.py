"""restored: run a model as often as needed, and leave it exactly as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards everything in `model` is as it was, also after an exception.

    Parameters, gradients, buffers, tensors and lists in attributes, hooks, training flags and the states of
    the random number generators (torch's, Python's, NumPy's). Tensors keep their identity, and their version
    where their values did not change.
    """
    modules = [(module, _Contents(module)) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    tensors = {id(tensor): (tensor, tensor.detach().clone()) for tensor in _tensors(model)}
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = sorted({t.device.index for t, _ in tensors.values() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for module, contents in modules:
                contents.put_back(module)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for tensor, value in tensors.values():
                    if not torch.equal(tensor, value):
                        tensor.data.copy_(value)
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


class _Contents:
    """The attributes of a module, and what its lists, dictionaries and sets hold."""

    def __init__(self, module: nn.Module) -> None:
        self.attributes = dict(module.__dict__)
        self.containers = [
            (value, value.copy())
            for value in self.attributes.values()
            if isinstance(value, list | dict | set)
        ]

    def put_back(self, module: nn.Module) -> None:
        module.__dict__.clear()
        module.__dict__.update(self.attributes)
        for container, before in self.containers:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module itself holds beside its Parameters: buffers, attributes, in containers."""
    for name, value in module._buffers.items():
        if value is not None:
            yield name, value
    for name, value in module.__dict__.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield from _within(name, value, depth=3)


def _within(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict) and depth:
        for key, item in value.items():
            yield from _within(f"{name}.{key}", item, depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for i, item in enumerate(value):
            yield from _within(f"{name}.{i}", item, depth - 1)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():
        for _, tensor in held_tensors(module):
            yield tensor
