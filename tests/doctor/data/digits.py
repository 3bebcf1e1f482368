"""Digits in any shape, models trained on them for a moment, and what the data checks find in one.

The images are scikit-learn's handwritten digits, which need no download. A trained model is trained once per
session and copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.doctor.check import CHECKS
from batchnorm.doctor.data import observe
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject
from batchnorm.lab.data import Dataset, load
from batchnorm.lab.nets import LeNet
from tests.model.zoo import CLASSES, ZOO

Case = tuple[nn.Module, list[Any], dict[str, Any]]
Make = Callable[[], Case]


@cache
def digits() -> Dataset:
    return load("digits").standardized()


@cache
def pictures(shape: tuple[int, ...], split: str = "train") -> Tensor:
    """The digits in the shape of one input: (C, H, W), or (C, L) and (features,) out of their rows."""
    images = getattr(digits(), f"{split}_images")
    if len(shape) == 3:
        images = F.interpolate(images, size=shape[1:], mode="bilinear", align_corners=False)
        return images.expand(-1, shape[0], -1, -1).contiguous()
    if len(shape) == 2:
        return F.interpolate(images, size=shape, mode="bilinear", align_corners=False)[:, 0].contiguous()
    side = max(1, int(shape[0] ** 0.5))
    small = F.adaptive_avg_pool2d(images[..., 4:24, 6:22], (side, -(-shape[0] // side)))
    return small.flatten(1)[:, : shape[0]].contiguous()


def batches(
    shape: tuple[int, ...], size: int = 32, count: int = 8, *, classes: int = CLASSES, split: str = "train",
    seed: int = 1,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Random batches of images and labels, drawn without replacement while there are enough."""
    images, labels = pictures(shape, split), getattr(digits(), f"{split}_labels") % classes
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(4)])
    parts = [order[i * size : (i + 1) * size] for i in range(min(count, len(order) // size))]
    return [(images[part], labels[part]) for part in parts]


def new(name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """A model of the zoo, or a LeNet of the lab ("lab/torch/relu"), the shape of its input, its classes."""
    torch.manual_seed(0)
    if name.startswith("lab/"):
        return LeNet(*name.split("/")[1:]), (1, 28, 28), 10
    model, inputs = ZOO[name]()
    if name == "lazy":
        model(*inputs)
    return model, tuple(inputs[0].shape[1:]), CLASSES


def train(
    model: nn.Module, shape: tuple[int, ...], size: int, classes: int, steps: int = 80, rate: float = 0.05
) -> nn.Module:
    """Some steps with a rate that falls to 0, as is usual, so that the running statistics come after."""
    data = batches(shape, size, 40, classes=classes, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for i in range(steps):
        x, y = data[i % len(data)]
        optimizer.zero_grad()
        output = model(x)
        output = output[0] if isinstance(output, tuple) else output
        target = (
            F.cross_entropy(output, y)
            if output.ndim == 2
            else (output - x[:, : output.shape[1]]).square().mean()
        )
        target.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return model


@cache
def _trained(name: str, size: int) -> tuple[nn.Module, tuple[int, ...], int]:
    model, shape, classes = new(name)
    return train(model, shape, size, classes), shape, classes


def trained(name: str, size: int = 32) -> tuple[nn.Module, tuple[int, ...], int]:
    model, shape, classes = _trained(name, size)
    return copy.deepcopy(model), shape, classes


def examine(case: Case) -> list[Finding]:
    """What the data checks find."""
    model, loader, options = case
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    subject = Subject(model, norms, batches=loader, **options)
    subject.observed = observe(subject, lambda steps: None)
    failure = subject.observed.failure
    found = [] if failure is None else [failure]
    for check in list(CHECKS.values()):
        if check.needs_data:
            found += check.find(subject)
    return found
