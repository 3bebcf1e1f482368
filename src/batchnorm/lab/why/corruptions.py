"""Corruptions of images in [0, 1], in five severities, after ImageNet-C's (Hendrycks & Dietterich 2019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

SEVERITIES = (1, 2, 3, 4, 5)

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]


def gaussian_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Add normal noise of standard deviation 0.08 to 0.4."""
    noise = torch.randn(images.shape, generator=generator)
    return (images + 0.08 * severity * noise).clamp(0, 1)


def impulse_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Replace 4 to 20 % of the pixels by black or white."""
    chance = torch.rand(images.shape, generator=generator)
    share = 0.04 * severity
    return images.where(chance >= share, (chance < share / 2).to(images.dtype))


def blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Convolve with a Gaussian of standard deviation 0.6 to 3 pixels, edges repeated."""
    sigma = 0.6 * severity
    reach = min(round(3 * sigma), images.shape[-1] - 1)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    line = line / line.sum()
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))


def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Keep 0.7 to 0.1 of each pixel's distance from the image's mean."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.85 - 0.15 * severity)


def brightness(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Add 0.1 to 0.5."""
    return (images + 0.1 * severity).clamp(0, 1)


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian noise": gaussian_noise,
    "impulse noise": impulse_noise,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
}


def corrupted(images: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Images, shifted and scaled in whatever way, with one of CORRUPTIONS, and again so shifted and scaled.

    Their smallest value is black, and their largest white.
    """
    black, white = images.min(), images.max()
    generator = torch.Generator().manual_seed(seed)
    return (
        CORRUPTIONS[name]((images - black) / (white - black), severity, generator) * (white - black) + black
    )
