"""Sick and healthy models for the checks that need no data: one planted fault each, on real architectures.

In the form of `corpus_data`: `SICK` is (name, make, code, layer), `HEALTHY` is (name, make), and `make()`
gives the model, its batches (none here) and what else `diagnose` takes. Models are trained on the digits or
have the statistics of `zoo.build`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.lab.handwritten import HandwrittenBatchNorm
from batchnorm.lab.nets import LeNet
from tests.doctor.data.digits import Case, Make, new, trained
from tests.model.zoo import build

Change = Callable[[nn.Module], Any]


def changed(name: str, change: Change | None = None) -> Make:
    """A model of the zoo with statistics as training leaves them, and a change."""

    def make() -> Case:
        model, _ = build(name)
        options = change(model) if change is not None else None
        return model, [], options or {}

    return make


def trained_and_changed(name: str, change: Change | None = None) -> Make:
    """A model trained on the digits, and a change."""

    def make() -> Case:
        model, _, _ = trained(name)
        options = change(model) if change is not None else None
        return model, [], options or {}

    return make


def untrained(name: str, change: Change | None = None) -> Make:
    def make() -> Case:
        model, _, _ = new(name)
        options = change(model) if change is not None else None
        return model, [], options or {}

    return make


def at(layer: str, change: Callable[[Any], Any]) -> Change:
    """A change of one layer."""

    def of_model(model: nn.Module) -> None:
        with torch.no_grad():
            change(model.get_submodule(layer))

    return of_model


def attributes(**values: Any) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        for name, value in values.items():
            setattr(layer, name, value)

    return change


def filled(name: str, value: float, channel: int | None = None) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        tensor = getattr(layer, name)
        (tensor if channel is None else tensor[channel : channel + 1]).fill_(value)

    return change


def replaced(name: str, new_child: nn.Module) -> Change:
    def change(model: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new_child)

    return change


def with_optimizer(make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Change:
    return lambda model: {"optimizer": make_optimizer(model)}


def frozen_weights(layer: nn.Module) -> None:
    layer.requires_grad_(False)


def half_alive(layer: Any) -> None:
    layer.weight[: len(layer.weight) * 3 // 4] = 1e-6


def one_of_them(model: Any) -> None:
    model.layer1[1].bn1 = model.layer1[0].bn1


def in_eval_but_one(model: nn.Module) -> None:
    model.eval()
    model.get_submodule("layer2.0.bn2").train()


class SelfMadeWithBuffers(nn.Module):
    """A hand-written batch norm whose statistics are buffers that keep the graph."""

    def __init__(self, channels: int, *, persistent: bool, detached: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels), persistent=persistent)
        self.register_buffer("var", torch.ones(channels), persistent=persistent)
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            new_mean, new_var = (mean.detach(), var.detach()) if self.detached else (mean, var)
            self.mean = self.mean + 0.1 * (new_mean - self.mean)
            self.var = self.var + 0.1 * (new_var - self.var)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return x * self.scale.view(shape) + self.offset.view(shape)


class PoolingHead(nn.Module):
    """As DeepLab's image pooling: pooled to 1x1, a convolution, a batch norm."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv2d(before, after, 1, bias=False)
        self.bn, self.fc = nn.BatchNorm2d(after), nn.Linear(after, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(self.pool(x))).relu().flatten(1))


def pooled() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), PoolingHead(8, 6))
    return model, [torch.randn(1, 3, 12, 12) for _ in range(2)], {}


def logits() -> Case:
    model, _ = build("mlp")
    model.out = nn.Sequential(model.out, nn.BatchNorm1d(5), nn.LogSoftmax(1))
    return model, [], {}


def tutorial() -> Case:
    """The tutorial's script as it is written: its test loop calls the model in training mode."""
    torch.manual_seed(0)
    net = LeNet("handwritten")
    images = torch.randn(3, 4, 1, 28, 28)

    def test() -> None:
        for batch in images:
            net(batch).argmax(1)

    return net, [], {"evaluate": test, "optimizer": torch.optim.Adam(net.parameters(), lr=0.01)}


def sgd(**options: Any) -> Change:
    return with_optimizer(lambda model: torch.optim.SGD(model.parameters(), **options))


SICK: list[tuple[str, Make, str, str | None]] = [
    ("bias before batch norm, vgg", trained_and_changed("vgg"), "BN101", "features.0"),
    ("bias before batch norm, temporal", changed("temporal conv net"), "BN101", "0.conv1"),
    ("strong weight decay", changed("resnet basic", sgd(lr=0.1, weight_decay=0.01)), "BN102", "layer1.0.bn1"),
    ("dropout before batch norm", trained_and_changed("wide resnet"), "BN103", "layer1.bn2"),
    (
        "dropout in a sequential",
        changed("lenet", replaced("9", nn.Sequential(nn.Linear(32, 12), nn.Dropout(0.5)))),
        "BN103",
        "10",
    ),
    ("batch norm on the logits", logits, "BN104", "out.1"),
    ("batch norm after pooling, batch of 1", pooled, "BN105", "3.bn"),
    (
        "momentum 0.9",
        trained_and_changed("resnet basic", at("layer1.0.bn1", attributes(momentum=0.9))),
        "BN106",
        "layer1.0.bn1",
    ),
    (
        "momentum 0.99, densenet",
        changed("densenet", at("features.4", attributes(momentum=0.99))),
        "BN106",
        "features.4",
    ),
    (
        "momentum 0.001",
        changed("mobilenet v2", at("features.0.1", attributes(momentum=0.001))),
        "BN106",
        "features.0.1",
    ),
    (
        "eps 1",
        trained_and_changed("resnet bottleneck", at("layer2.0.bn1", attributes(eps=1.0))),
        "BN107",
        "layer2.0.bn1",
    ),
    ("eps 0", changed("u-net", at("norm", attributes(eps=0.0))), "BN107", "norm"),
    ("eps 1e-12", changed("googlenet", at("1.branch1.bn", attributes(eps=1e-12))), "BN107", "1.branch1.bn"),
    (
        "never updated",
        trained_and_changed("resnet basic", at("layer2.1.bn1", lambda m: m.reset_running_stats())),
        "BN108",
        "layer2.1.bn1",
    ),
    (
        "never updated, 3d",
        changed("conv 3d", at("2.bn1", lambda m: m.reset_running_stats())),
        "BN108",
        "2.bn1",
    ),
    (
        "NaN in the running mean",
        trained_and_changed("vgg", at("features.5", filled("running_mean", torch.nan, 2))),
        "BN109",
        "features.5",
    ),
    (
        "inf in the running variance",
        changed("regnet", at("0.1", filled("running_var", torch.inf, 0))),
        "BN109",
        "0.1",
    ),
    (
        "negative running variance",
        changed("shufflenet", at("0.1", filled("running_var", -0.1, 3))),
        "BN109",
        "0.1",
    ),
    ("zero running variance", changed("conv 1d", at("4", filled("running_var", 0.0, 1))), "BN109", "4"),
    (
        "a dead layer",
        trained_and_changed("resnet bottleneck", at("layer1.0.bn3", filled("weight", 1e-7))),
        "BN110",
        "layer1.0.bn3",
    ),
    ("most channels dead", changed("mobilenet v3", at("features.4.1", half_alive)), "BN110", "features.4.1"),
    (
        "training mode in an eval model",
        trained_and_changed("resnet basic", in_eval_but_one),
        "BN111",
        "layer2.0.bn2",
    ),
    (
        "fixed weights, moving statistics",
        trained_and_changed("resnet basic", at("layer1.1.bn2", frozen_weights)),
        "BN112",
        "layer1.1.bn2",
    ),
    (
        "eval mode in a training model",
        changed("efficientnet", at("features.0.1", lambda m: m.eval())),
        "BN112",
        "features.0.1",
    ),
    ("half precision", changed("resnext", at("bn1", lambda m: m.half())), "BN113", "bn1"),
    ("bfloat16", trained_and_changed("vgg", at("features.1", lambda m: m.bfloat16())), "BN113", "features.1"),
    (
        "NaN in gamma",
        changed("squeezenet", at("1.squeeze_bn", filled("weight", torch.nan, 1))),
        "BN115",
        "1.squeeze_bn",
    ),
    ("beta of one", untrained("resnet basic", at("bn1", filled("bias", 1.0))), "BN116", "bn1"),
    ("the tutorial tests in training mode", tutorial, "BN117", "conv.1"),
    ("the tutorial's state_dict", tutorial, "BN120", "conv.1"),
    ("the tutorial's graph", tutorial, "BN121", "fc.1"),
    ("the tutorial's beta", tutorial, "BN116", "conv.5"),
    ("the tutorial's momentum", tutorial, "BN106", "fc.4"),
    (
        "one batch norm in two places",
        trained_and_changed("resnet basic", one_of_them),
        "BN118",
        "layer1.0.bn1",
    ),
    (
        "buffers that keep the graph",
        changed("u-net", replaced("norm", SelfMadeWithBuffers(4, persistent=True, detached=False))),
        "BN121",
        "norm",
    ),
    (
        "buffers that are not saved",
        changed("u-net", replaced("norm", SelfMadeWithBuffers(4, persistent=False, detached=True))),
        "BN120",
        "norm",
    ),
    (
        "the tutorial's layer in a resnet",
        changed("resnet basic", replaced("bn1", HandwrittenBatchNorm(8, after_convolution=True))),
        "BN120",
        "bn1",
    ),
]


# Healthy models: nothing above a note.


def as_keras(model: nn.Module) -> None:
    """eps and momentum as of TensorFlow's models, as timm has them for EfficientNet."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps, layer.momentum = 1e-3, 0.01


def zero_gamma(model: nn.Module) -> None:
    """The last scale of every residual branch at 0, as ResNets are started."""
    for name, layer in model.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(layer.weight)


def dcgan(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)


def frozen_as_by_detectors(model: nn.Module) -> None:
    """The first stage in eval mode with fixed weights."""
    for name in ("bn1", "layer1"):
        model.get_submodule(name).eval().requires_grad_(False)


def own_evaluation(model: nn.Module) -> dict[str, Any]:
    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            model(torch.randn(4, 3, 16, 16))
        model.train()

    return {"evaluate": evaluate}


def adam_without_decay(model: nn.Module) -> dict[str, Any]:
    return {"optimizer": torch.optim.AdamW(bn.parameter_groups(model, 0.05), lr=1e-3)}


def self_made(model: nn.Module) -> None:
    model.norm = SelfMadeWithBuffers(4, persistent=True, detached=True)


HEALTHY: list[tuple[str, Make]] = [
    *[
        (f"new {name}", untrained(name))
        for name in (
            "vgg",
            "resnet basic",
            "mobilenet v2",
            "densenet",
            "lenet",
            "efficientnet",
            "conv 3d",
            "autoencoder",
        )
    ],
    *[
        (f"with statistics, {name}", changed(name))
        for name in (
            "resnext",
            "mobilenet v1",
            "mobilenet v3",
            "u-net",
            "dcgan generator",
            "recurrent",
            "attention",
            "googlenet",
            "shufflenet",
            "regnet",
            "synchronised",
            "lazy",
            "untraceable",
            "shared conv",
        )
    ],
    *[
        (f"trained {name}", trained_and_changed(name))
        for name in ("vgg", "resnet basic", "resnet bottleneck")
    ],
    ("as Keras", changed("efficientnet", as_keras)),
    ("gamma of 0, new", untrained("resnet basic", zero_gamma)),
    ("DCGAN's start", untrained("dcgan discriminator", dcgan)),
    ("frozen", trained_and_changed("resnet basic", lambda model: bn.freeze(model) and None)),
    (
        "frozen with its weights",
        trained_and_changed("resnet basic", lambda m: bn.freeze(m, affine=True) and None),
    ),
    ("frozen weights alone", changed("vgg", lambda m: bn.freeze(m, statistics=False, affine=True) and None)),
    ("first stage frozen", trained_and_changed("resnet basic", frozen_as_by_detectors)),
    ("converted", trained_and_changed("resnet basic", lambda model: bn.convert(model) and None)),
    ("in eval mode", trained_and_changed("vgg", lambda model: model.eval() and None)),
    ("half precision to deploy", trained_and_changed("vgg", lambda model: model.eval().half() and None)),
    ("SGD as usual", changed("resnet basic", sgd(lr=0.1, momentum=0.9, weight_decay=5e-4))),
    ("AdamW, no decay of batch norms", changed("mobilenet v2", adam_without_decay)),
    ("an evaluation in eval mode", trained_and_changed("resnet basic", own_evaluation)),
    ("hand-written and right", changed("u-net", self_made)),
]
