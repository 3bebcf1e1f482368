"""Ways to plant one fault in a trained model or its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm.lab.nets import LeNet
from tests.doctor.data.digits import Case, Make, batches, trained


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
