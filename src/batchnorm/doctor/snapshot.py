"""A model as it was found, to be put back: tensors, gradients, containers, flags, hooks, random numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from batchnorm.doctor.held import held_containers, held_tensors


class Snapshot:
    """All of a model (and its optimizer) that `restore` puts back, in the objects that were there."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        self.modules = [_Module(module) for module in model.modules()]
        self.tensors = [_Tensor(tensor) for tensor in _tensors(model)]
        self.optimizer = None if optimizer is None else _Optimizer(optimizer)
        self.random = Generators()

    def restore(self) -> None:
        """Put everything back as it was when the snapshot was taken; as often as it is called."""
        for module in self.modules:
            module.restore()
        for tensor in self.tensors:
            tensor.restore()
        if self.optimizer is not None:
            self.optimizer.restore()
        self.random.restore()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Snapshot]:
    """Whatever happens inside, the model and the random numbers are as before at the end.

    Yields the snapshot: its `restore` begins afresh in between.
    """
    snapshot = Snapshot(model)
    try:
        yield snapshot
    finally:
        snapshot.restore()


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, and the other tensors that the modules hold, each once."""
    found: dict[int, Tensor] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        found |= {id(tensor): tensor for _, tensor in held_tensors(module)}
    return list(found.values())


class _Module:
    """The attributes of one module, and what its containers hold, those of hooks and children too."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls = module, type(module)
        self.attributes = dict(module.__dict__)
        self.containers = [
            (container, dict(container) if isinstance(container, dict) else list(container))
            for container in held_containers(module)
        ]

    def restore(self) -> None:
        for container, content in self.containers:
            container.clear()
            if isinstance(container, dict | set):
                container.update(content)
            else:
                container.extend(content)
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        if type(self.module) is not self.cls:
            self.module.__class__ = self.cls


class _Tensor:
    """The values, the storage, the gradient and the flag of one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.data, self.values = tensor, tensor.data, tensor.detach().clone()
        self.requires_grad, self.is_leaf = tensor.requires_grad, tensor.is_leaf
        self.grad = tensor.grad if tensor.is_leaf else None
        self.grad_values = None if self.grad is None else self.grad.detach().clone()

    def restore(self) -> None:
        tensor = self.tensor
        # By `.data`: values that are the same again should not look changed to a graph that saved them.
        now = tensor.dtype, tensor.shape, tensor.data_ptr()
        if now != (self.data.dtype, self.data.shape, self.data.data_ptr()):
            tensor.data = self.data
        tensor.data.copy_(self.values)
        if self.is_leaf and not tensor.is_leaf:
            tensor.detach_()  # an update in place made it part of a graph
        if tensor.is_leaf:
            tensor.requires_grad_(self.requires_grad)
            tensor.grad = self.grad
            if self.grad is not None and self.grad_values is not None:
                self.grad.data.copy_(self.grad_values)


class _Optimizer:
    """The groups and the state of an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.groups = [(group, group | {"params": list(group["params"])}) for group in optimizer.param_groups]
        self.state = {parameter: dict(state) for parameter, state in optimizer.state.items()}
        self.tensors = [
            _Tensor(leaf) for leaf in tree_leaves(list(self.state.values())) if isinstance(leaf, Tensor)
        ]

    def restore(self) -> None:
        for group, content in self.groups:
            group.clear()
            group.update(content)
        self.optimizer.param_groups[:] = [group for group, _ in self.groups]
        self.optimizer.state.clear()
        for parameter, state in self.state.items():
            self.optimizer.state[parameter] = state
        for tensor in self.tensors:
            tensor.restore()


class Generators:
    """The generators of Python, NumPy and torch, on all devices that are in use."""

    def __init__(self) -> None:
        self.python, self.cpu = random.getstate(), torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        numpy: Any = sys.modules.get("numpy")
        self.numpy = None if numpy is None else (numpy.random, numpy.random.get_state())

    def restore(self) -> None:
        """Set them to the states that they had; NumPy's and CUDA's where they were in use then."""
        random.setstate(self.python)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.numpy is not None:
            generator, state = self.numpy
            generator.set_state(state)
