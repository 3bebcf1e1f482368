"""The tutorial's LeNet, with a choice of normalisation and activation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.lab.handwritten import HandwrittenBatchNorm
from batchnorm.layers import BatchNorm1d, BatchNorm2d

# What follows a convolution of C channels, and what follows a linear layer of C features.
NORMS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]] | None] = {
    "none": None,
    "handwritten": (
        lambda channels: HandwrittenBatchNorm(channels, after_convolution=True),
        lambda features: HandwrittenBatchNorm(features, after_convolution=False),
    ),
    "torch": (nn.BatchNorm2d, nn.BatchNorm1d),
    "batchnorm": (BatchNorm2d, BatchNorm1d),
}


class LeNet(nn.Module):
    """LeNet for (N, 1, 28, 28) images and 10 classes, normalised after each layer but the last.

    Args:
        norm: one of NORMS.
        activation: name of one of the layers' activations.

    Raises:
        ValueError: an unknown norm or activation.
    """

    def __init__(self, norm: str = "batchnorm", activation: str = "sigmoid") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}: expected one of {', '.join(NORMS)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        after_conv, after_linear = NORMS[norm] or (None, None)

        def normalised(
            layer: nn.Module, norm_layer: Callable[[int], nn.Module] | None, size: int
        ) -> list[nn.Module]:
            return [layer, *([] if norm_layer is None else [norm_layer(size)]), Activation(activation)]

        self.conv = nn.Sequential(
            *normalised(nn.Conv2d(1, 6, 5), after_conv, 6),
            nn.MaxPool2d(2),
            *normalised(nn.Conv2d(6, 16, 5), after_conv, 16),
            nn.MaxPool2d(2),
        )
        self.fc = nn.Sequential(
            *normalised(nn.Linear(16 * 4 * 4, 120), after_linear, 120),
            *normalised(nn.Linear(120, 84), after_linear, 84),
            nn.Linear(84, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 28, 28)."""
        return self.fc(self.conv(images).flatten(1))


class Activation(nn.Module):
    """An activation by its name in the layers' vocabulary."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """The activation of every element."""
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        """The name of the activation."""
        return self.name
