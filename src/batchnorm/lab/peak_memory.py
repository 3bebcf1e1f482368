"""Memory of a training step of ResNet-50: torch.nn's layers, converted ones, and memory-efficient ones."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.bench_nets import MEMORY_EFFICIENT
from batchnorm.lab.bench_probes import held_bytes
from batchnorm.lab.bench_results import OURS, TORCH
from batchnorm.lab.resnet50 import ResNet50
from batchnorm.model import convert

_WARM_UP = 2

NETS: dict[str, Callable[[nn.Module], nn.Module]] = {
    TORCH: lambda model: model,
    OURS: convert,
    MEMORY_EFFICIENT: lambda model: convert(model, memory_efficient=True),
}


@dataclass(frozen=True)
class Setup:
    """A training step of ResNet-50: on `batch` images of `image_size`, with `width` channels at first.

    `half` trains under bfloat16 autocast with channels last; without, in float32 and contiguous.
    """

    half: bool
    device: str = "cuda"
    batch: int = 128
    image_size: int = 224
    width: int = 64
    classes: int = 1000

    @property
    def name(self) -> str:
        """In words."""
        return "bfloat16 channels_last" if self.half else "float32 contiguous"


class Step:
    """A training step: forward, backward, and SGD with momentum."""

    def __init__(self, setup: Setup, change: Callable[[nn.Module], nn.Module]) -> None:
        layout = torch.channels_last if setup.half else torch.contiguous_format
        torch.manual_seed(0)
        model = ResNet50(setup.classes, setup.width).to(setup.device)
        model.to(memory_format=layout)  # type: ignore[call-overload] # torch's own stub lacks it
        self.device, self._half = torch.device(setup.device), setup.half
        self.model = change(model)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        size = setup.batch, 3, setup.image_size, setup.image_size
        self._images = torch.randn(size, device=self.device).to(memory_format=layout)
        self._labels = torch.randint(setup.classes, (setup.batch,), device=self.device)

    def forward(self) -> Tensor:
        """The loss, whose graph holds what the backward needs."""
        with self._autocast():
            return F.cross_entropy(self.model(self._images), self._labels)

    def __call__(self) -> None:
        """One step; gradients of the step before are cleared first."""
        self._optimizer.zero_grad()
        self.forward().backward()
        self._optimizer.step()

    def _autocast(self) -> AbstractContextManager[object]:
        if not self._half:
            return nullcontext()
        # Without the cache of converted weights, which outlives a forward that is only measured.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)


def peak_of_device(step: Step) -> int:
    """Most bytes that tensors take on the GPU during a step, all of the training's included."""
    for _ in range(_WARM_UP):
        step()
    gc.collect()
    torch.cuda.synchronize(step.device)
    torch.cuda.reset_peak_memory_stats(step.device)
    step()
    torch.cuda.synchronize(step.device)
    return torch.cuda.max_memory_allocated(step.device)


def saved_for_backward(step: Step) -> int:
    """Bytes that a forward keeps for its backward: what can be told on the CPU."""
    return held_bytes(step.forward)


def step_memory(setup: Setup, measure: Callable[[Step], int]) -> dict[str, int]:
    """Bytes by each of NETS, one after another."""
    return dict(_in_turn(setup, measure))


def _in_turn(setup: Setup, measure: Callable[[Step], int]) -> Iterator[tuple[str, int]]:
    for name, change in NETS.items():
        step = Step(setup, change)
        yield name, measure(step)
        del step
        gc.collect()
        if setup.device != "cpu":
            torch.cuda.empty_cache()
