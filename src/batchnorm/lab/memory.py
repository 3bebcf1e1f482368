"""Memory that a norm gains from step to step: resident memory, and nodes of autograd graphs kept alive."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.nets import LeNet

_WARM_UP = 30


@dataclass(frozen=True)
class MemoryGrowth:
    """Growth per 100 steps: resident KiB while training, resident KiB while testing in training mode
    (forwards that no backward follows), and graph nodes kept alive while training."""

    train_kib: float
    test_kib: float
    graph_nodes: float


def memory_growth(norm: str, *, batch_size: int, steps: int = 200) -> MemoryGrowth:
    """Measure a LeNet with this norm on random images, on the CPU.

    The leak of a hand-written layer is a gigabyte per 100 steps of 128 images: keep the batch small.
    What a step leaves behind is kept by the layers, whatever the device.
    """
    torch.manual_seed(0)
    model = LeNet(norm)
    images, labels = torch.rand(batch_size, 1, 28, 28), torch.randint(10, (batch_size,))
    optimizer = torch.optim.Adam(model.parameters())

    def train_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def test_step() -> None:
        model(images)

    train_kib, graph_nodes = _growth(train_step, model, steps)
    test_kib, _ = _growth(test_step, model, steps)
    return MemoryGrowth(train_kib, test_kib, graph_nodes)


def count_graph_nodes(module: nn.Module) -> int:
    """Nodes of autograd graphs that the module's own tensors, Parameters aside, keep alive."""
    seen = set()
    waiting = [tensor.grad_fn for child in module.modules() for tensor in _own_tensors(child)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
    return len(seen)


def _growth(step: Callable[[], None], model: nn.Module, steps: int) -> tuple[float, float]:
    for _ in range(_WARM_UP):
        step()
    memory, nodes = _resident_kib(), count_graph_nodes(model)
    for _ in range(steps):
        step()
    per_100 = 100 / steps
    return (_resident_kib() - memory) * per_100, (count_graph_nodes(model) - nodes) * per_100


def _own_tensors(module: nn.Module) -> list[Tensor]:
    values = [*vars(module).values(), *module.buffers(recurse=False)]
    return [value for value in values if isinstance(value, Tensor)]


def _resident_kib() -> float:
    gc.collect()
    # glibc keeps freed memory to itself; without giving it back first, readings wander by megabytes.
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return psutil.Process().memory_info().rss / 1024
