"""Whole networks with the layers: bytes that a stack saves for backward, and the step time of a ResNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.lab.bench_cases import Shape
from batchnorm.lab.bench_probes import Contender, Timing, held_bytes, take_turns
from batchnorm.lab.bench_results import OURS, TORCH

MEMORY_EFFICIENT, NO_NORM = "batchnorm, memory-efficient", "without batch norm"

_BLOCKS = 8


@dataclass(frozen=True)
class Nets:
    """Bytes that the conv-BN-ReLU stack keeps from forward to backward, and times of a ResNet-18's step.

    `stack_shape` and `images_shape` are those of their inputs.
    """

    stack_shape: Shape
    images_shape: Shape
    saved_bytes: dict[str, int]
    steps: dict[str, Timing]

    def saved_ratio(self, name: str) -> float:
        """Of its bytes to torch.nn's."""
        return self.saved_bytes[name] / self.saved_bytes[TORCH]

    def step_ratio(self, name: str) -> float:
        """Of its step time to that without batch norm."""
        return self.steps[name].ms / self.steps[NO_NORM].ms

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the ratios."""
        return {
            **asdict(self),
            "saved_ratios": {name: self.saved_ratio(name) for name in self.saved_bytes},
            "step_ratios": {name: self.step_ratio(name) for name in self.steps},
        }


def measure_nets(
    seconds: float, *, stack_size: int = 32, batch: int = 16, image_size: int = 64, width: int = 64
) -> Nets:
    """Measure both.

    Args:
        seconds: to time the ResNet for.
        stack_size: channels, height and width of the stack's inputs.
        batch: images of a step.
        image_size: their height and width.
        width: channels of the ResNet's first stage; 64 is ResNet-18's.
    """
    stack_shape, images_shape = (8, stack_size, stack_size, stack_size), (batch, 3, image_size, image_size)
    return Nets(
        stack_shape, images_shape, _stack_bytes(stack_shape), _step_times(seconds, images_shape, width)
    )


def _stack_bytes(shape: Shape) -> dict[str, int]:
    size = shape[1]
    stacks = {
        TORCH: _stack(lambda: [nn.BatchNorm2d(size), nn.ReLU()], size),
        OURS: _stack(lambda: [batchnorm.BatchNorm2d(size, activation="relu")], size),
    }
    model = _stack(lambda: [batchnorm.BatchNorm2d(size, activation="relu")], size)
    stacks[MEMORY_EFFICIENT] = batchnorm.memory_efficient(model)
    return {name: held_bytes(partial(_loss, stack, shape)) for name, stack in stacks.items()}


def _loss(model: nn.Module, shape: Shape) -> Tensor:
    return model(torch.zeros(shape)).sum()


def _stack(tail: Callable[[], list[nn.Module]], size: int) -> nn.Module:
    blocks = [[nn.Conv2d(size, size, 3, padding=1, bias=False), *tail()] for _ in range(_BLOCKS)]
    return nn.Sequential(*(layer for block in blocks for layer in block))


def _step_times(seconds: float, shape: Shape, width: int) -> dict[str, Timing]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator)
    labels = torch.randint(10, shape[:1], generator=generator)

    def contender(model: nn.Module) -> Contender:
        return Contender(lambda: F.cross_entropy(model(images), labels).backward(), list(model.parameters()))

    return take_turns({name: contender(ResNet18(tail, width)) for name, tail in TAILS.items()}, seconds)


class _TorchTail(nn.Module):
    """What follows a convolution, as torchvision writes it: add and ReLU in place."""

    def __init__(self, norm: nn.Module, relu: bool) -> None:
        super().__init__()
        self.norm, self.relu = norm, relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if residual is not None:
            x += residual
        return F.relu(x, inplace=True) if self.relu else x


# By contender, what follows a convolution of C channels, with or without a ReLU at the end.
TAILS: dict[str, Callable[[int, bool], nn.Module]] = {
    NO_NORM: lambda channels, relu: _TorchTail(nn.Identity(), relu),
    TORCH: lambda channels, relu: _TorchTail(nn.BatchNorm2d(channels), relu),
    OURS: lambda channels, relu: batchnorm.BatchNorm2d(channels, activation="relu" if relu else None),
}


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2015) for 10 classes.

    Args:
        tail: one of TAILS.
        width: channels of the first of the four stages.
    """

    def __init__(self, tail: Callable[[int, bool], nn.Module], width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            tail(width, True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        channels, blocks = width, []
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(_BasicBlock(tail, channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 3, H, W)."""
        return self.fc(self.blocks(self.stem(images)).mean((2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, tail: Callable[[int, bool], nn.Module], before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.tail1 = tail(after, True)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.tail2 = tail(after, True)
        self.shortcut = (
            nn.Identity()
            if before == after
            else nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), tail(after, False))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.tail1(self.conv1(x)))
        return self.tail2(y, self.shortcut(x))
