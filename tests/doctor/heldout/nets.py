"""Architectures of the held-out corpus: each is one that batch norm is used in, in the small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(before: int, after: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after)]


class ConvViT(nn.Module):
    """As LeViT: a convolutional stem, attention between linear layers with batch norm, residual."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *conv_bn(channels, 16, stride=2), nn.Hardswish(), *conv_bn(16, width, stride=2), nn.Hardswish()
        )
        self.qkv, self.qkv_bn = nn.Linear(width, 3 * width, bias=False), nn.BatchNorm1d(3 * width)
        self.out, self.out_bn = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head_bn, self.head = nn.BatchNorm1d(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv_bn(self.qkv(tokens).transpose(1, 2)).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.out_bn(self.out(attended).flatten(0, 1)).view_as(tokens)
        tokens = tokens + self.mlp(tokens)
        return self.head(self.head_bn(tokens.mean(1)))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    def __init__(self, before: int, after: int, stride: int, *, eps: float, momentum: float) -> None:
        super().__init__()
        wide = 3 * before
        self.block = nn.Sequential(
            *conv_bn(before, wide, 1),
            nn.Hardswish(),
            *conv_bn(wide, wide, 3, stride, groups=wide),
            nn.Hardswish(),
            SqueezeExcite(wide),
            *conv_bn(wide, after, 1),
        )
        self.residual = before == after and stride == 1
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps, layer.momentum = eps, momentum

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV3(nn.Module):
    def __init__(
        self, channels: int = 1, classes: int = 10, eps: float = 1e-3, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(channels, 8), nn.Hardswish())
        self.blocks = nn.ModuleList(
            InvertedResidual(8, after, stride, eps=eps, momentum=momentum)
            for after, stride in ((8, 1), (8, 2), (8, 1))
        )
        self.last = nn.Sequential(*conv_bn(8, 32, 1), nn.Hardswish())
        self.classifier = nn.Sequential(nn.Linear(32, 32), nn.Hardswish(), nn.Linear(32, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.last(x).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(before), nn.Conv2d(before, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class DenseNet(nn.Module):
    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            DenseLayer(8, 6),
            DenseLayer(14, 6),
            nn.AvgPool2d(2),
            DenseLayer(20, 6),
            DenseLayer(26, 6),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def audio_net(classes: int = 4) -> nn.Sequential:
    """As M5: strided convolutions over the waveform."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 16, 4, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 24, 3, padding=1, bias=False),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(24, classes),
    )


def tabular_net(features: int, classes: int, width: int = 48, inputs_normalised: bool = False) -> nn.Module:
    first: list[nn.Module] = [nn.BatchNorm1d(features)] if inputs_normalised else []
    return nn.Sequential(
        *first,
        nn.Linear(features, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


class Autoencoder(nn.Module):
    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *conv_bn(channels, 12, stride=2), nn.ReLU(), *conv_bn(12, 8, stride=2), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 12, 4, 2, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.ConvTranspose2d(12, channels, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def dcgan_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def discriminator(channels: int = 1) -> nn.Module:
    """As DCGAN's: no batch norm in the first layer, leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.LazyLinear(1),
    ).apply(dcgan_weights)


class UNet(nn.Module):
    def __init__(self, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = self.double(channels, width), self.double(width, 2 * width)
        self.middle = self.double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.merge2 = self.double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge1 = self.double(2 * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    @staticmethod
    def double(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(*conv_bn(before, after), nn.ReLU(), *conv_bn(after, after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        middle = self.middle(F.max_pool2d(second, 2))
        second = self.merge2(torch.cat([second, self.up2(middle)], 1))
        return self.out(self.merge1(torch.cat([first, self.up1(second)], 1)))


class Recurrent(nn.Module):
    """Rows of an image as a sequence: batch norm before and after the GRU, over batch and time."""

    def __init__(self, features: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.before = nn.BatchNorm1d(features)
        self.gru = nn.GRU(features, 24, batch_first=True)
        self.after = nn.BatchNorm1d(24)
        self.fc = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.before(x.squeeze(1).transpose(1, 2)).transpose(1, 2)
        states, _ = self.gru(rows)
        return self.fc(self.after(states.transpose(1, 2)).mean(2))


class RepVGGBlock(nn.Module):
    """Three branches, each with a batch norm, one of them of the input as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.large, self.small = (
            nn.Sequential(*conv_bn(width, width)),
            nn.Sequential(*conv_bn(width, width, 1)),
        )
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.large(x) + self.small(x) + self.identity(x))


def rep_vgg(channels: int = 1, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        *conv_bn(channels, 16),
        nn.ReLU(),
        RepVGGBlock(16),
        nn.MaxPool2d(2),
        RepVGGBlock(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


class SimSiam(nn.Module):
    """Two views through one encoder; its last batch norm has no scale and shift."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *conv_bn(1, 16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 32, bias=False),
            nn.BatchNorm1d(32, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 32)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one, two = self.encoder(x[:, 0]), self.encoder(x[:, 1])
        return self.predictor(one), self.predictor(two), one.detach(), two.detach()


def simsiam_loss(outputs: tuple[Tensor, ...], _: object) -> Tensor:
    p1, p2, z1, z2 = outputs
    return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2


class PointNet(nn.Module):
    """The bright pixels as a set of points: shared layers, then the maximum over points."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 24, 1, bias=False), nn.BatchNorm1d(24)
        self.conv2, self.bn2 = nn.Conv1d(24, 48, 1, bias=False), nn.BatchNorm1d(48)
        self.fc1, self.bn3, self.fc2 = (
            nn.Linear(48, 32, bias=False),
            nn.BatchNorm1d(32),
            nn.Linear(32, classes),
        )

    def forward(self, points: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(points)))
        x = F.relu(self.bn2(self.conv2(x))).amax(2)
        return self.fc2(F.relu(self.bn3(self.fc1(x))))


class TwoInputs(nn.Module):
    """An image and a table, called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(*conv_bn(1, 12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.table = nn.Sequential(nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU())
        self.head = nn.Linear(24, 10)

    def forward(self, *, image: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.cat([self.image(image), self.table(rows)], 1))}


def video_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm3d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


class FrozenBackbone(nn.Module):
    """As torchvision's and mmdetection's fine-tuning: the backbone's batch norms stay in eval mode."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        for parameter in backbone.parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenBackbone:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class TextNet(nn.Module):
    """Words in, padded with zeros at the end; batch norm over all positions."""

    def __init__(self, words: int = 64, classes: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 16, padding_idx=0)
        self.conv, self.bn = nn.Conv1d(16, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(self.embed(tokens).transpose(1, 2)))).amax(2))
