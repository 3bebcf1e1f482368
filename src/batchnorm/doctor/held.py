"""What a module itself holds beside its Parameters: tensors, containers, and the graph behind the tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_DEPTH = 3
_MOST_NODES = 100_000


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and tensors in attributes and in containers in attributes, each with its name."""
    for name, value in module._buffers.items():
        if value is not None:
            yield name, value
    for name, value in module.__dict__.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            for inner, held in _within(name, value, _DEPTH):
                if isinstance(held, Tensor):
                    yield inner, held


def held_containers(module: nn.Module) -> Iterator[Any]:
    """Lists, dictionaries, sets and deques in attributes and in each other; torch's own of a module too."""
    for name, value in module.__dict__.items():
        for _, held in _within(name, value, _DEPTH):
            if isinstance(held, list | dict | set | deque):
                yield held


def graph_nodes(tensors: Iterable[Tensor]) -> int:
    """How many nodes of autograd's graph the tensors keep alive."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    found = set(pending)
    while pending and len(found) < _MOST_NODES:
        for node, _ in pending.pop().next_functions:
            if node is not None and node not in found:
                found.add(node)
                pending.append(node)
    return len(found)


def _within(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    yield name, value
    if not depth:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _within(f"{name}.{key}", item, depth - 1)
    elif isinstance(value, list | tuple | set | deque):
        for i, item in enumerate(value):
            yield from _within(f"{name}.{i}", item, depth - 1)
