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
            ("lab/torch/relu", 32, 8),
            ("lab/batchnorm/sigmoid", 64, 4),
            ("vgg", 16, 8),
            ("resnet basic", 8, 8),
            ("resnet bottleneck", 32, 8),
            ("mobilenet v2", 64, 4),
            ("densenet", 128, 4),
            ("googlenet", 256, 4),
            ("u-net", 8, 8),
            ("resnet preactivation", 512, 2),
            ("conv 1d", 32, 8),
            ("synchronised", 32, 8),
        ]
    ],
    *[
        (f"trained {name}, batch {size}", after_training(name, size, count))
        for name, size, count in [
            ("lab/torch/sigmoid", 32, 8),
            ("lab/torch/relu", 64, 4),
            ("lab/batchnorm/relu", 128, 4),
            ("vgg", 32, 8),
            ("resnet basic", 16, 8),
            ("resnet bottleneck", 32, 8),
            ("resnext", 32, 8),
            ("resnet preactivation", 32, 8),
            ("resnet functional", 64, 4),
            ("mobilenet v2", 64, 4),
            ("mobilenet v3", 64, 4),
            ("shufflenet", 64, 4),
            ("squeezenet", 256, 4),
            ("regnet", 64, 4),
            ("densenet", 64, 4),
            ("googlenet", 512, 2),
            ("mobilenet v1", 64, 4),
            ("temporal conv net", 64, 4),
            ("u-net", 2, 8),
            ("autoencoder", 4, 8),
            ("mlp", 64, 4),
            ("lazy", 128, 4),
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
]


# Sick models.


def spoiled(name: str, spoil: Callable[[nn.Module], Any], size: int = 32, **options: Any) -> Make:
    """A trained model with a fault in its layers."""

    def make() -> Case:
        model, shape, classes = trained(name)
        with torch.no_grad():
            spoil(model)
        return model, batches(shape, size, classes=classes), options

    return make


def statistics(layer: str, mean: float = 0.0, factor: float = 1.0, channels: slice = slice(None)) -> Any:
    """Running means moved by standard deviations, running variances multiplied."""

    def spoil(model: nn.Module) -> None:
        norm = model.get_submodule(layer)
        norm.running_mean[channels] += mean * norm.running_var[channels].sqrt()
        norm.running_var[channels] *= factor

    return spoil


def forgotten(model: nn.Module) -> None:
    """A checkpoint without buffers: the counter goes on, the statistics are new ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.zero_()
            module.running_var.fill_(1)


def scaled(layer: str, factor: float) -> Any:
    def spoil(model: nn.Module) -> None:
        model.get_submodule(layer).weight.mul_(factor)

    return spoil


def half_zero(layer: str) -> Any:
    """Half of a layer's filters are zero."""

    def spoil(model: nn.Module) -> None:
        module = model.get_submodule(layer)
        module.weight[::2] = 0

    return spoil


def dead(layer: str) -> Any:
    def spoil(model: nn.Module) -> None:
        model.get_submodule(layer).bias[::2] = -20

    return spoil


def far_bias(layer: str) -> Any:
    def spoil(model: nn.Module) -> None:
        model.get_submodule(layer).bias += 1e4

    return spoil


def not_a_number(layer: str) -> Any:
    def spoil(model: nn.Module) -> None:
        model.get_submodule(layer).weight[0] = float("nan")

    return spoil


def with_data(name: str, change: Callable[[list[Any]], list[Any]], mode: bool = True, size: int = 32) -> Make:
    """A trained model on spoiled data."""

    def make() -> Case:
        model, shape, classes = trained(name)
        return model.train(mode), change(batches(shape, size, classes=classes)), {}

    return make


def images_changed(change: Callable[[Tensor], Tensor]) -> Callable[[list[Any]], list[Any]]:
    return lambda data: [(change(x), y) for x, y in data]


def ordered(data: list[Any]) -> list[Any]:
    """The same batches, sorted by class."""
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    order = y.argsort(stable=True)
    size = len(data[0][0])
    return list(zip(x[order].split(size), y[order].split(size), strict=True))


def unlabelled(data: Iterable[Any]) -> list[Any]:
    return [x for x, _ in data]


def with_an_inf(data: list[Any]) -> list[Any]:
    data[3][0][5, 0, 4, 4] = float("inf")
    return data


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise IndexError("index 7 is out of range")


class MovesInEval(nn.Module):
    """A hand-written batch norm that does not look at `training`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
            self.running_var.lerp_(x.var((0, 2, 3)), 0.1)
        mean, var = self.running_mean[:, None, None], self.running_var[:, None, None]
        return (x - mean) / (var + 1e-5).sqrt()


class Collects(nn.ReLU):
    """Keeps the features of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features.append(x.detach())
        return super().forward(x)


class CentresTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.body, self.use_reentrant = body, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.use_reentrant and torch.is_grad_enabled() else x
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def replaced(name: str, layer: str, module: Callable[[nn.Module], nn.Module], **options: Any) -> Make:
    """A trained model with one of its modules exchanged."""

    def make() -> Case:
        model, shape, classes = trained(name)
        parent = model.get_submodule(layer.rpartition(".")[0])
        setattr(parent, layer.rpartition(".")[2], module(model.get_submodule(layer)))
        return model, batches(shape, classes=classes), options

    return make


def checkpointed(name: str, use_reentrant: bool) -> Make:
    def make() -> Case:
        model, shape, classes = trained(name)
        return Checkpointed(model, use_reentrant), batches(shape, classes=classes), {}

    return make


def handwritten() -> Case:
    torch.manual_seed(0)
    return LeNet("handwritten", "sigmoid"), batches((1, 28, 28), classes=10), {}


def evaluates_in_training_mode(model: nn.Module, batch: Any) -> Tensor:
    model.train()
    return model(batch[0])


def two_forwards(model: nn.Module, batch: Any) -> Tensor:
    model(batch[0])
    return model(batch[0])


def real_and_generated(model: nn.Module, batch: Any) -> Tensor:
    fake = torch.rand(batch[0].shape, generator=torch.Generator().manual_seed(0))
    return model(batch[0]) - model(fake)


def small_batches(name: str, size: int) -> Make:
    def make() -> Case:
        model, shape, classes = trained(name)
        return model, batches(shape, size, classes=classes), {}

    return make


def padded() -> Case:
    """Sequences of digits' rows of different lengths, padded with zeros to the longest."""
    model, shape, classes = trained("temporal conv net")
    data = batches(shape, 32, classes=classes)
    generator = torch.Generator().manual_seed(0)
    for x, _ in data:
        for sample in x:
            sample[:, int(torch.randint(6, x.shape[2] + 1, (), generator=generator)) :] = 0
        x[0, :, -1] = 1
    return nn.Sequential(nn.Conv1d(shape[0], shape[0], 1), nn.BatchNorm1d(shape[0]), model), data, {}


def without_running_statistics(norm: nn.Module) -> nn.Module:
    return type(norm)(norm.num_features, track_running_stats=False)


SICK: list[tuple[str, Make, str, str | None]] = [
    ("a module raises", replaced("vgg", "features.5", lambda _: Raises()), "BN200", "features.5"),
    (
        "a running variance is a tenth",
        spoiled("resnet basic", statistics("layer2.0.bn1", factor=0.1)),
        "BN202",
        "layer2.0.bn1",
    ),
    ("running means are off", spoiled("vgg", statistics("features.5", mean=1.0)), "BN202", "features.5"),
    (
        "one channel's mean is off",
        spoiled("mobilenet v2", statistics("features.0.1", mean=4.0, channels=slice(1))),
        "BN202",
        "features.0.1",
    ),
    ("a convolution was rescaled", spoiled("resnet bottleneck", scaled("conv1", 5.0)), "BN202", "bn1"),
    ("statistics were not loaded", spoiled("lab/torch/relu", forgotten), "BN202", "conv.1"),
    (
        "outputs by a wrong variance",
        spoiled("lab/torch/sigmoid", statistics("fc.1", factor=0.01)),
        "BN201",
        "fc.1",
    ),
    (
        "outputs by a wrong mean",
        spoiled("shufflenet", statistics("1.branch2.1", mean=3.0)),
        "BN201",
        "1.branch2.1",
    ),
    ("dropout shifts the variance", after_training("wide resnet"), "BN201", "layer2.bn2"),
    ("batches of 2 before a linear layer", small_batches("lab/torch/relu", 2), "BN203", "fc.1"),
    ("batches of 3 features", small_batches("mlp", 3), "BN203", "bn1"),
    ("half of the filters are zero", spoiled("lab/torch/relu", half_zero("conv.0")), "BN204", "conv.1"),
    (
        "zero filters in a residual branch",
        spoiled("resnet basic", half_zero("layer1.0.conv1")),
        "BN204",
        "layer1.0.bn1",
    ),
    ("dead ReLUs", spoiled("vgg", dead("features.1")), "BN205", "features.1"),
    ("dead ReLUs of functions", spoiled("googlenet", dead("1.branch1.bn")), "BN205", "1.branch1.bn"),
    (
        "weights far too small",
        spoiled("resnet basic", scaled("layer2.0.conv1", 1e-4)),
        "BN206",
        "layer2.0.bn1",
    ),
    (
        "images of thousandths",
        with_data("lab/torch/relu", images_changed(lambda x: x * 1e-4)),
        "BN206",
        "conv.1",
    ),
    ("a bias of ten thousand", spoiled("lab/torch/relu", far_bias("conv.0")), "BN207", "conv.1"),
    ("padded sequences", padded, "BN208", "1"),
    ("NaN weights", spoiled("densenet", not_a_number("features.2.2")), "BN209", "features.2.2"),
    ("inf in an image", with_data("vgg", with_an_inf), "BN209", None),
    (
        "a hand-written layer moves in eval mode",
        replaced("vgg", "features.1", lambda n: MovesInEval(n.num_features)),
        "BN210",
        "features.1",
    ),
    (
        "evaluated in training mode",
        spoiled("lab/torch/relu", lambda m: None, forward=evaluates_in_training_mode),
        "BN210",
        "conv.1",
    ),
    ("a checkpoint moves twice", checkpointed("resnet basic", False), "BN211", "body.bn1"),
    ("a reentrant checkpoint moves twice", checkpointed("vgg", True), "BN211", "body.features.1"),
    (
        "a second forward of the batch",
        spoiled("vgg", lambda m: None, forward=two_forwards),
        "BN212",
        "features.1",
    ),
    (
        "real and generated images",
        spoiled("regnet", lambda m: None, forward=real_and_generated),
        "BN212",
        "0.1",
    ),
    ("the tutorial's layer", handwritten, "BN213", "conv.1"),
    ("features are collected", replaced("vgg", "features.2", lambda _: Collects()), "BN214", "features.2"),
    (
        "test images inverted",
        with_data("lab/torch/relu", images_changed(lambda x: 1 - x), mode=False),
        "BN215",
        "conv.1",
    ),
    (
        "test images brighter",
        with_data("resnet basic", images_changed(lambda x: 3 * x + 1), mode=False),
        "BN215",
        "bn1",
    ),
    (
        "no running statistics",
        replaced("resnet bottleneck", "layer1.0.bn1", without_running_statistics),
        "BN216",
        "layer1.0.bn1",
    ),
    (
        "features centred over the batch",
        replaced("vgg", "features.2", lambda _: CentresTheBatch()),
        "BN216",
        "features.2",
    ),
    ("sorted by class", with_data("lab/torch/relu", ordered), "BN217", None),
    (
        "sorted, without labels",
        with_data("resnet basic", lambda data: unlabelled(ordered(data))),
        "BN217",
        None,
    ),
]
