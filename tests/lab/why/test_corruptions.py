"""Corruptions of images, against what they should do to mean and variance."""

import pytest
import torch
from torch import Tensor

from batchnorm.lab.why.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from batchnorm.lab.why.images import load_images


@pytest.fixture
def images() -> Tensor:
    x = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1
    return x


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_is_worse_with_severity_repeatable_and_in_range(name: str) -> None:
    images = load_images("digits").test_images[:100]
    images = (images - images.min()) / (images.max() - images.min())
    distances = []
    for severity in SEVERITIES:
        bad = corrupted(images, name, severity, seed=1)
        assert bad.shape == images.shape
        assert bad.min() >= -1e-6
        assert bad.max() <= 1 + 1e-6
        assert torch.equal(bad, corrupted(images, name, severity, seed=1))
        distances.append((bad - images).square().mean().item())
    assert distances == sorted(distances)
    assert distances[0] > 0


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shift_and_scale_of_the_images_come_back(name: str, images: Tensor) -> None:
    expected = corrupted(images, name, 3, seed=1) * 5 - 2
    torch.testing.assert_close(corrupted(images * 5 - 2, name, 3, seed=1), expected, rtol=1e-4, atol=1e-5)


def test_contrast_scales_the_deviation_and_keeps_the_mean(images: Tensor) -> None:
    bad = corrupted(images, "contrast", 5, seed=0)
    torch.testing.assert_close(bad.mean((1, 2, 3)), images.mean((1, 2, 3)))
    torch.testing.assert_close(bad.std((1, 2, 3)), 0.1 * images.std((1, 2, 3)))


def test_brightness_adds_and_noise_has_its_variance(images: Tensor) -> None:
    inside = images.clamp(0.4, 0.6)
    inside[0, 0, 0, 0], inside[0, 0, 0, 1] = 0, 1
    assert (corrupted(inside, "brightness", 2, seed=0) - inside).median().item() == pytest.approx(0.2)
    noise = corrupted(inside, "gaussian noise", 1, seed=0) - inside
    assert noise.std().item() == pytest.approx(0.08, rel=0.05)
    changed = (corrupted(inside, "impulse noise", 5, seed=0) != inside).double().mean().item()
    assert changed == pytest.approx(0.2, abs=0.02)


def test_blur_leaves_a_flat_image_flat() -> None:
    flat = torch.full((1, 1, 28, 28), 0.5)
    images = torch.cat([flat, torch.zeros_like(flat), torch.ones_like(flat)])
    torch.testing.assert_close(corrupted(images, "blur", 5, seed=0), images)
