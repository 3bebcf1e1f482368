"""Memory that a norm gains from step to step: bytes allocated, and nodes of autograd graphs kept alive."""

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
    """Growth per 100 steps: KiB of memory while training, KiB while testing in training mode
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


def allocated_kib() -> float:
    """Memory that this process has allocated; where the C library does not say, what is resident of it."""
    gc.collect()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallinfo2 = getattr(libc, "mallinfo2", None)  # glibc 2.33 and newer
    if mallinfo2 is None:
        return psutil.Process().memory_info().rss / 1024
    # Resident memory would not show a leak that fits what the process has freed before and not given back.
    mallinfo2.restype = _MallocInfo
    allocated = mallinfo2()
    return (allocated.uordblks + allocated.hblkhd) / 1024


def _growth(step: Callable[[], None], model: nn.Module, steps: int) -> tuple[float, float]:
    for _ in range(_WARM_UP):
        step()
    memory, nodes = allocated_kib(), count_graph_nodes(model)
    for _ in range(steps):
        step()
    per_100 = 100 / steps
    return (allocated_kib() - memory) * per_100, (count_graph_nodes(model) - nodes) * per_100


def _own_tensors(module: nn.Module) -> list[Tensor]:
    values = [*vars(module).values(), *module.buffers(recurse=False)]
    return [value for value in values if isinstance(value, Tensor)]


class _MallocInfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]
