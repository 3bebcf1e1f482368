"""Data of the held-out corpus: (inputs, labels), shuffled and standardised as a user would."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images, load_wine
from torch import Tensor

Batches = list[Any]


@cache
def dataset(name: str) -> tuple[Tensor, Tensor]:
    x, y = _DATA[name]()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    return x[order], y[order]


def _digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3) / 0.37, torch.tensor(y)


def _table(load: Callable[..., Any]) -> Callable[[], tuple[Tensor, Tensor]]:
    def read() -> tuple[Tensor, Tensor]:
        x, y = load(return_X_y=True)
        return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32), torch.tensor(y)

    return read


def _raw_wine() -> tuple[Tensor, Tensor]:
    x, y = load_wine(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def _photos() -> tuple[Tensor, Tensor]:
    """Patches of two photographs; the target of a segmentation is what is brighter than the middle."""
    patches = []
    for image in load_sample_images().images:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        patches.append(pixels.unfold(1, 32, 24).unfold(2, 32, 24).flatten(1, 2).transpose(0, 1))
    x = torch.cat(patches)
    return (x - 0.45) / 0.25, (x.mean(1, keepdim=True) > 0.45).float()


def _tones() -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(3)
    y = torch.randint(4, (640,), generator=noise)
    time = torch.arange(256) / 256
    pitch = (8 * 2.0**y).unsqueeze(1) * (1 + 0.1 * torch.rand(640, 1, generator=noise))
    phase = 6.28 * torch.rand(640, 1, generator=noise)
    loud = 0.3 + torch.rand(640, 1, generator=noise)
    x = loud * torch.sin(6.28 * pitch * time + phase) + 0.2 * torch.randn(640, 256, generator=noise)
    return x.unsqueeze(1), y


def _points() -> tuple[Tensor, Tensor]:
    """The 16 brightest pixels of every digit: where they are and how bright."""
    x, y = dataset("digits")
    bright, where = x.flatten(1).topk(16)
    rows, columns = where // 8 / 4.0 - 1, where % 8 / 4.0 - 1
    return torch.stack([rows, columns, bright], 1), y


def _videos() -> tuple[Tensor, Tensor]:
    x, y = dataset("digits")
    return torch.stack([x.roll(step, -1) for step in range(4)], 2), y


def _views() -> tuple[Tensor, Tensor]:
    """Two augmented versions of every digit: moved, brighter or darker, noisy."""
    x, y = dataset("digits")
    noise = torch.Generator().manual_seed(6)

    def view() -> Tensor:
        steps = torch.randint(-1, 2, (len(x),), generator=noise).tolist()
        moved = torch.stack([image.roll(step, -1) for image, step in zip(x, steps, strict=True)])
        brightness = 0.8 + 0.4 * torch.rand(len(x), 1, 1, 1, generator=noise)
        return brightness * moved + 0.1 * torch.randn(x.shape, generator=noise)

    return torch.stack([view(), view()], 1), y


def _words() -> tuple[Tensor, Tensor]:
    """Sentences of 4 to 24 words, zeros behind them."""
    noise = torch.Generator().manual_seed(5)
    x = torch.randint(1, 64, (512, 24), generator=noise)
    length = torch.randint(4, 25, (512, 1), generator=noise)
    return x * (torch.arange(24) < length), (x[:, 0] > 32).long()


_DATA: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "digits": _digits,
    "wine": _table(load_wine),
    "raw wine": _raw_wine,
    "cancer": _table(load_breast_cancer),
    "photos": _photos,
    "tones": _tones,
    "points": _points,
    "videos": _videos,
    "words": _words,
    "views": _views,
}


def batches(name: str, size: int, *, test: bool = False, most: int = 8) -> Batches:
    """Batches of the first three quarters of the data, or of the last quarter."""
    x, y = dataset(name)
    middle = 3 * len(x) // 4
    x, y = (x[middle:], y[middle:]) if test else (x[:middle], y[:middle])
    size = min(size, len(x))
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x) - size + 1, size)][:most]
