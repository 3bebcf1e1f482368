"""Small architectures in the styles people use, for the verbs on whole models.

`ZOO[name]()` is a model and the inputs of one forward, `(model, inputs)`; `build(name)` the same with a
seed of its own and batch norms that have been trained for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Model = tuple[nn.Module, tuple[Tensor, ...]]
CLASSES = 5


def images(channels: int = 3, size: int = 16, batch: int = 4) -> tuple[Tensor]:
    return (torch.randn(batch, channels, size, size),)


def conv(before: int, after: int, size: int = 3, stride: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False, **options)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class ConvNormActivation(nn.Sequential):
    """As torchvision's: a Sequential with a class of its own."""

    def __init__(
        self,
        before: int,
        after: int,
        size: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        layers = [conv(before, after, size, stride, groups=groups), nn.BatchNorm2d(after)]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


# Plain stacks.


def lenet() -> Model:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 5), nn.BatchNorm2d(8), nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 12), nn.BatchNorm1d(12), nn.Sigmoid(),
        nn.Linear(12, CLASSES),
    )  # fmt: skip
    return model, images(1, 20)


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (6, "pool", 8, 8, "pool"):
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(32, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class MLP(nn.Module):
    """Linear layers, one of them applied to sequences (N, L, C) as (N, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(10, 12), nn.BatchNorm1d(12)
        self.fc2, self.bn2 = nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.gelu(self.bn1(self.fc1(x))))
        x = F.dropout(torch.tanh(self.bn2(self.fc2(x))), 0.1, self.training)
        return self.out(x)


class BatchNormFirst(nn.Module):
    """A batch norm on the inputs, before a linear layer, and one on the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm1d(10)
        self.fc1 = nn.Linear(10, 12)
        self.act = nn.ELU()
        self.fc2 = nn.Linear(12, CLASSES)
        self.bn2 = nn.BatchNorm1d(CLASSES, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.fc2(self.act(self.fc1(self.bn0(x)))))


# Residual networks.


class BasicBlock(nn.Module):
    """As torchvision's: one ReLU for both places, and an add in place."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(before, after, 3, stride), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(after, after), nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        inner = after // 2
        self.conv1, self.bn1 = conv(before, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, groups=groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, after, 1), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(x))


class PreactivationBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), conv(before, after, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), conv(after, after)
        if stride != 1 or before != after:
            self.shortcut = conv(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class WideBlock(nn.Module):
    """A wide residual block: dropout between the convolutions."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), conv(before, after)
        self.dropout = nn.Dropout(0.3)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), conv(after, after, 3, stride)
        self.shortcut = nn.Sequential(conv(before, after, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)


class ResNet(nn.Module):
    def __init__(self, block: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(block(8, 8, 1), block(8, 8, 1))
        self.layer2 = nn.Sequential(block(8, 12, 2), block(12, 12, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreactivationNet(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.layer1, self.layer2 = block(8, 8), block(8, 12, 2)
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.layer2(self.layer1(self.conv1(x)))))
        out = F.adaptive_avg_pool2d(out, 1)
        return self.fc(out.view(out.size(0), -1))


class FunctionalResNet(nn.Module):
    """Every way to write an activation and an add."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(1, 7):
            self.add_module(f"conv{i}", conv(3 if i == 1 else 6, 6))
            self.add_module(f"bn{i}", nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        x = F.relu(y, inplace=True)
        y = torch.add(x, self.bn3(self.conv3(x)))
        x = y.relu_()
        x = self.bn4(self.conv4(x)).add_(x).relu()
        x = torch.sigmoid(self.bn5(self.conv5(x)).add(x))
        x = F.leaky_relu(self.bn6(self.conv6(x)), 0.01)
        return self.fc(x.mean((2, 3)))


class CifarBlock(nn.Module):
    """As in the most copied ResNet for CIFAR: a shortcut without a projection is an empty Sequential."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(before, after, 3, stride), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = conv(after, after), nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def resnet_cifar() -> Model:
    return nn.Sequential(CifarBlock(3, 6), CifarBlock(6, 6), CifarBlock(6, 8, 2), head(8)), images(size=8)


# Mobile networks.


class DepthwiseSeparable(nn.Sequential):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__(
            ConvNormActivation(before, before, 3, stride, groups=before),
            ConvNormActivation(before, after, 1),
        )


def mobilenet_v1() -> Model:
    stem = ConvNormActivation(3, 6, stride=2)
    return nn.Sequential(stem, DepthwiseSeparable(6, 8), DepthwiseSeparable(8, 8, 2), head(8)), images()


class SqueezeExcitation(nn.Module):
    def __init__(
        self, channels: int, activation: Callable[[], nn.Module], scale: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.activation, self.scale_activation = activation(), scale()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class StochasticDepth(nn.Module):
    """Drops whole samples in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) >= self.p
        return x * kept.to(x.dtype) / (1 - self.p)


class InvertedResidual(nn.Module):
    def __init__(
        self,
        before: int,
        after: int,
        stride: int,
        activation: type[nn.Module],
        squeeze: Callable[[int], nn.Module] | None = None,
        drop: float | None = None,
    ) -> None:
        super().__init__()
        inner = 2 * before
        layers: list[nn.Module] = [
            ConvNormActivation(before, inner, 1, activation=activation),
            ConvNormActivation(inner, inner, 3, stride, groups=inner, activation=activation),
        ]
        if squeeze is not None:
            layers.append(squeeze(inner))
        layers += [conv(inner, after, 1), nn.BatchNorm2d(after)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and before == after
        if drop is not None:
            self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        if not self.use_res_connect:
            return self.conv(x)
        y = self.conv(x)
        if hasattr(self, "stochastic_depth"):
            y = self.stochastic_depth(y)
        return x + y


class MobileNet(nn.Module):
    def __init__(self, block: Callable[[int, int, int], nn.Module], activation: type[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, 6, stride=2, activation=activation),
            block(6, 6, 1),
            block(6, 8, 2),
            block(8, 8, 1),
            ConvNormActivation(8, 12, 1, activation=activation),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        return self.classifier(x)


def mobilenet_v2() -> Model:
    return MobileNet(partial(InvertedResidual, activation=nn.ReLU6), nn.ReLU6), images()


def mobilenet_v3() -> Model:
    squeeze = partial(SqueezeExcitation, activation=nn.ReLU, scale=nn.Hardsigmoid)
    return MobileNet(
        partial(InvertedResidual, activation=nn.Hardswish, squeeze=squeeze), nn.Hardswish
    ), images()


def efficientnet() -> Model:
    squeeze = partial(SqueezeExcitation, activation=nn.SiLU, scale=nn.Sigmoid)
    block = partial(InvertedResidual, activation=nn.SiLU, squeeze=squeeze, drop=0.2)
    return MobileNet(block, nn.SiLU), images()


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    n, channels, height, width = x.size()
    x = x.view(n, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(n, -1, height, width)


class ShuffleBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch2 = nn.Sequential(
            conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            conv(half, half, groups=half), nn.BatchNorm2d(half),
            conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((x1, self.branch2(x2)), dim=1), 2)


def shufflenet() -> Model:
    return nn.Sequential(ConvNormActivation(3, 8), ShuffleBlock(8), ShuffleBlock(8), head(8)), images(size=8)


class Fire(nn.Module):
    def __init__(self, before: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze, self.squeeze_bn = nn.Conv2d(before, squeeze, 1), nn.BatchNorm2d(squeeze)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_bn = nn.Conv2d(squeeze, expand, 1), nn.BatchNorm2d(expand)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3, self.expand3x3_bn = nn.Conv2d(squeeze, expand, 3, padding=1), nn.BatchNorm2d(expand)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze_bn(self.squeeze(x)))
        return torch.cat(
            [
                self.expand1x1_activation(self.expand1x1_bn(self.expand1x1(x))),
                self.expand3x3_activation(self.expand3x3_bn(self.expand3x3(x))),
            ],
            1,
        )


def squeezenet() -> Model:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(inplace=True))
    return nn.Sequential(stem, Fire(8, 4, 4), nn.MaxPool2d(2), Fire(8, 4, 6), head(12)), images()


class RegNetBlock(nn.Module):
    """As torchvision's: the activation after the add is a module of its own."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.proj = ConvNormActivation(before, after, 1, stride, activation=None) if stride != 1 else None
        self.f = nn.Sequential(
            ConvNormActivation(before, after, 1),
            ConvNormActivation(after, after, 3, stride, groups=2),
            SqueezeExcitation(after, nn.ReLU, nn.Sigmoid),
            ConvNormActivation(after, after, 1, activation=None),
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x) if self.proj is not None else x + self.f(x)
        return self.activation(x)


def regnet() -> Model:
    return nn.Sequential(
        ConvNormActivation(3, 8), RegNetBlock(8, 8, 1), RegNetBlock(8, 12, 2), head(12)
    ), images(size=8)


# Dense and branching networks.


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = conv(channels, 2 * growth, 1)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True)
        self.conv2 = conv(2 * growth, growth)

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor:
        features = [inputs] if isinstance(inputs, Tensor) else inputs
        new = self.conv2(self.relu2(self.norm2(self.bn_function(features))))
        return F.dropout(new, p=0.1, training=self.training)


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, channels: int, growth: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, 6),
            DenseBlock(2, 6, 4),
            nn.Sequential(nn.BatchNorm2d(14), nn.ReLU(inplace=True), conv(14, 8, 1), nn.AvgPool2d(2)),
            DenseBlock(2, 8, 4),
            nn.BatchNorm2d(16),
        )
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        out = torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1)
        return self.classifier(out)


class BasicConv2d(nn.Module):
    """As torchvision's GoogLeNet: eps of its own and a functional ReLU."""

    def __init__(self, before: int, after: int, size: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = conv(before, after, size), nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    def __init__(self, before: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(before, 4)
        self.branch2 = nn.Sequential(BasicConv2d(before, 4), BasicConv2d(4, 6, 3))
        self.branch3 = nn.Sequential(nn.MaxPool2d(3, 1, 1), BasicConv2d(before, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x)], 1)


def googlenet() -> Model:
    return nn.Sequential(
        BasicConv2d(3, 6, 3), Inception(6), nn.MaxPool2d(2), Inception(14), head(14)
    ), images(size=8)


class DoubleConv(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            conv(before, after), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
            conv(after, after), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down = DoubleConv(3, 4), nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 8))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.conv = DoubleConv(8, 4)
        self.outc = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x = self.norm(self.up(self.down(x1)))
        rows, columns = x1.size(2) - x.size(2), x1.size(3) - x.size(3)
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.outc(self.conv(torch.cat([x1, x], dim=1)))


def dcgan_generator() -> Model:
    model = nn.Sequential(
        nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True),
        nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip
    return model, images(6, 1)


def dcgan_discriminator() -> Model:
    """Its leaky ReLUs have a slope of 0.2, not the default."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(4, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(6, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(inplace=True),
        nn.Conv2d(8, 1, 2, 1, 0, bias=False), nn.Flatten(0), nn.Sigmoid(),
    )  # fmt: skip
    return model, images()


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ELU(),
            nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Mish(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.BatchNorm2d(4), nn.Softplus(),
            nn.ConvTranspose2d(4, 1, 2, 2), nn.BatchNorm2d(1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x)
        return self.decoder(code), code


# Other ranks.


class TemporalBlock(nn.Module):
    def __init__(self, before: int, after: int, dilation: int) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((2 * dilation, 0), 0.0)
        self.conv1 = nn.Conv1d(before, after, 3, dilation=dilation)
        self.bn1, self.relu1 = nn.BatchNorm1d(after), nn.ReLU()
        self.conv2 = nn.Conv1d(after, after, 3, dilation=dilation)
        self.bn2, self.relu2 = nn.BatchNorm1d(after), nn.ReLU()
        self.downsample = nn.Conv1d(before, after, 1) if before != after else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(self.pad(x))))
        out = self.relu2(self.bn2(self.conv2(self.pad(out))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def temporal_conv_net() -> Model:
    model = nn.Sequential(
        TemporalBlock(3, 6, 1),
        TemporalBlock(6, 6, 2),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )
    return model, (torch.randn(4, 3, 20),)


def conv_1d() -> Model:
    model = nn.Sequential(
        nn.Conv1d(3, 6, 5, stride=2), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.ReLU6(),
        nn.ConvTranspose1d(8, 4, 3), nn.BatchNorm1d(4), nn.Hardsigmoid(),
    )  # fmt: skip
    return model, (torch.randn(4, 3, 20),)


class Block3d(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(before, after, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(after)
        self.conv2 = nn.ConvTranspose3d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(after)
        self.shortcut = nn.Sequential(nn.Conv3d(before, after, 1), nn.BatchNorm3d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(out)))


def conv_3d() -> Model:
    model = nn.Sequential(
        Block3d(2, 4), nn.MaxPool3d(2), Block3d(4, 4), nn.Flatten(), nn.Linear(4 * 27, CLASSES)
    )
    return model, (torch.randn(3, 2, 6, 6, 6),)


class RecurrentNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU())
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.conv(x).transpose(1, 2))
        return self.out(torch.tanh(self.norm(states[:, -1])))


class AttentionNet(nn.Module):
    """A batch norm in the place of a transformer's layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm1, self.norm2 = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.feed = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm1(x.transpose(1, 2)).transpose(1, 2)
        x = self.norm2((x + self.feed(x)).transpose(1, 2))
        return self.out(x.mean(2))


# What breaks verbs.


class Siamese(nn.Module):
    """One branch for both inputs, and one batch norm under two names and after two layers."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(6)
        self.branch = nn.Sequential(nn.Linear(8, 6), norm, nn.ReLU(), nn.Linear(6, 6))
        self.norm = norm
        self.out = nn.Linear(6, 1)

    def embed(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.branch(x)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out((self.embed(a) - self.embed(b)).abs())


class SharedConv(nn.Module):
    """One convolution before two batch norms, and a batch norm whose output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.head = head(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.relu(self.bn1(self.conv(x)))
        z = self.bn2(self.conv(y))
        return self.head(self.relu(z) + z.sigmoid()), z


class Untraceable(nn.Module):
    """Data-dependent control flow around parts that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.small, self.large = MLPBlock(8), MLPBlock(8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.large(x) if x.abs().mean() > 100 else self.small(x)
        return F.relu(self.norm(x))


class MLPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.fc(x)) + x)


class Options(nn.Module):
    """Batch norms with every option."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False), nn.ReLU())
        self.batch = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
        self.cumulative = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, momentum=None), nn.SiLU())
        self.slow = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, eps=0.1, momentum=0.01), nn.Tanh())
        self.head = head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.slow(self.cumulative(self.batch(self.fixed(x)))))


def synchronised() -> Model:
    return nn.SyncBatchNorm.convert_sync_batchnorm(lenet()[0]), images(1, 20)


def lazy() -> Model:
    """Not run yet: its batch norms know no number of channels."""
    model = nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(6), nn.LazyBatchNorm1d(momentum=0.2), nn.Sigmoid(), nn.Linear(6, CLASSES),
    )  # fmt: skip
    return model, images(size=8)


def image_model(make: Callable[..., nn.Module], *args: Any, size: int = 16) -> Callable[[], Model]:
    return lambda: (make(*args), images(size=size))


ZOO: dict[str, Callable[[], Model]] = {
    "lenet": lenet,
    "vgg": image_model(VGG),
    "mlp": lambda: (MLP(), (torch.randn(8, 10),)),
    "batch norm first": lambda: (BatchNormFirst(), (torch.randn(8, 10) * 3 + 1,)),
    "resnet basic": image_model(ResNet, BasicBlock),
    "resnet bottleneck": image_model(ResNet, Bottleneck),
    "resnext": image_model(ResNet, partial(Bottleneck, groups=2)),
    "resnet preactivation": image_model(PreactivationNet, PreactivationBlock, size=8),
    "wide resnet": image_model(PreactivationNet, WideBlock, size=8),
    "resnet functional": image_model(FunctionalResNet, size=8),
    "resnet cifar": resnet_cifar,
    "mobilenet v1": mobilenet_v1,
    "mobilenet v2": mobilenet_v2,
    "mobilenet v3": mobilenet_v3,
    "efficientnet": efficientnet,
    "shufflenet": shufflenet,
    "squeezenet": squeezenet,
    "regnet": regnet,
    "densenet": image_model(DenseNet, size=8),
    "googlenet": googlenet,
    "u-net": image_model(UNet, size=9),
    "dcgan generator": dcgan_generator,
    "dcgan discriminator": dcgan_discriminator,
    "autoencoder": lambda: (Autoencoder(), images(1, 8)),
    "temporal conv net": temporal_conv_net,
    "conv 1d": conv_1d,
    "conv 3d": conv_3d,
    "recurrent": lambda: (RecurrentNet(), (torch.randn(4, 3, 7),)),
    "attention": lambda: (AttentionNet(), (torch.randn(4, 6, 3),)),
    "siamese": lambda: (Siamese(), (torch.randn(6, 8), torch.randn(6, 8))),
    "shared conv": image_model(SharedConv, size=8),
    "untraceable": lambda: (Untraceable(), (torch.randn(6, 6),)),
    "options": image_model(Options, size=8),
    "synchronised": synchronised,
    "lazy": lazy,
}


def build(name: str, seed: int = 0) -> Model:
    """The model and its inputs, always the same, with batch norms as training leaves them.

    Lazy layers are run once to learn their sizes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, inputs = ZOO[name]()
        if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
            with torch.no_grad():
                model(*inputs)
        season(model)
    return model, inputs


@torch.no_grad()
def season(model: nn.Module) -> nn.Module:
    """Give the batch norms weights, biases and running statistics that are far from their first ones."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if layer.weight is not None:
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.5)
            if layer.running_mean is not None:
                layer.running_mean.normal_(0, 0.5)
                layer.running_var.uniform_(0.5, 2)
                layer.num_batches_tracked.fill_(3)
    return model
