"""Sick and healthy models for the checks with data: one planted fault each, on real images.

The images are scikit-learn's handwritten digits, which need no download. A trained model is trained once per
session and copied. `SICK` is (name, make, code, layer), `HEALTHY` is (name, make); `make()` gives the model,
its batches and what else a `Subject` takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.doctor.check import CHECKS
from batchnorm.doctor.data import observe
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject
from batchnorm.lab.data import Dataset, load
from batchnorm.lab.handwritten import HandwrittenBatchNorm
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


# Healthy models.


def untrained(name: str, size: int = 32, count: int = 8) -> Make:
    def make() -> Case:
        model, shape, classes = new(name)
        return model, batches(shape, size, count, classes=classes), {}

    return make


def after_training(
    name: str,
    size: int = 32,
    count: int = 8,
    change: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> Make:
    def make() -> Case:
        model, shape, classes = trained(name, size)
        if change is not None:
            change(model)
        return model, batches(shape, size, count, classes=classes, **options), {}

    return make


def fine_tuned(model: nn.Module) -> None:
    """Frozen batch norms, and some more steps of the rest."""
    bn.freeze(model)
    train(model, (3, 16, 16), 8, CLASSES, steps=10, rate=0.005)


def recalibrated(name: str) -> Make:
    def make() -> Case:
        model, shape, classes = trained(name)
        bn.recalibrate(model, batches(shape, 32, 16, classes=classes))
        return model, batches(shape, 32, 8, classes=classes), {}

    return make


def converted(name: str, is_trained: bool) -> Make:
    def make() -> Case:
        model, shape, classes = trained(name) if is_trained else new(name)
        return bn.convert(model), batches(shape, classes=classes), {}

    return make


HEALTHY: list[tuple[str, Make]] = [
    *[
        (f"untrained {name}, batch {size}", untrained(name, size, count))
        for name, size, count in [
            ("lab/torch/relu", 32, 8), ("lab/batchnorm/sigmoid", 64, 4), ("vgg", 16, 8), ("resnet basic", 8, 8),
            ("resnet bottleneck", 32, 8), ("mobilenet v2", 64, 4), ("densenet", 128, 4), ("googlenet", 256, 4),
            ("u-net", 8, 8), ("resnet preactivation", 512, 2), ("conv 1d", 32, 8), ("synchronised", 32, 8),
        ]
    ],
    *[
        (f"trained {name}, batch {size}", after_training(name, size, count))
        for name, size, count in [
            ("lab/torch/sigmoid", 32, 8), ("lab/torch/relu", 64, 4), ("lab/batchnorm/relu", 128, 4), ("vgg", 32, 8),
            ("resnet basic", 16, 8), ("resnet bottleneck", 32, 8), ("resnext", 32, 8), ("wide resnet", 32, 8),
            ("resnet functional", 64, 4), ("mobilenet v2", 64, 4), ("mobilenet v3", 64, 4), ("shufflenet", 64, 4),
            ("squeezenet", 256, 4), ("regnet", 64, 4), ("densenet", 64, 4), ("googlenet", 512, 2), ("conv 1d", 64, 4),
            ("temporal conv net", 64, 4), ("u-net", 2, 8), ("autoencoder", 4, 8), ("mlp", 64, 4), ("lazy", 128, 4),
        ]
    ],
    ("trained vgg, in eval mode", after_training("vgg", 32, 8, lambda model: model.eval())),
    ("trained vgg, test images", after_training("vgg", 32, 8, lambda model: model.eval(), split="test")),
    ("trained resnet, test images", after_training("resnet basic", 16, 8, lambda m: m.eval(), split="test")),
    ("trained lenet, one batch", after_training("lab/torch/relu", 64, 1)),
    ("trained resnet, frozen", after_training("resnet basic", 16, 8, bn.freeze)),
    ("fine-tuned resnet, batch 8", after_training("resnet basic", 8, 8, fine_tuned)),
    ("recalibrated resnet", recalibrated("resnet bottleneck")),
    ("converted vgg", converted("vgg", True)),
    ("converted resnet", converted("resnet bottleneck", True)),
    ("converted mobilenet, untrained", converted("mobilenet v2", False)),
]  # fmt: skip
