"""Faults of steps: what moves, or is kept, that should not be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.doctor.data.digits import Make
from tests.doctor.heldout import nets
from tests.doctor.heldout.cases import judged, untrained
from tests.doctor.heldout.changes import followed_by, replaced
from tests.doctor.heldout.training import cross_entropy


class OwnNorm(nn.Module):
    """Hand-written in the way of a blog post."""

    def __init__(self, width: int, *, buffers: bool = False, detach: bool = True) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))
        self.detach = detach
        mu, var = torch.zeros(1, width, 1, 1), torch.ones(1, width, 1, 1)
        if buffers:
            self.register_buffer("avg_mean", mu)
            self.register_buffer("avg_var", var)
        else:
            self.avg_mean, self.avg_var = mu, var

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mu, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            seen = (mu.detach(), var.detach()) if self.detach else (mu, var)
            self.avg_mean = 0.9 * self.avg_mean + 0.1 * seen[0]
            self.avg_var = 0.9 * self.avg_var + 0.1 * seen[1]
        else:
            mu, var = self.avg_mean, self.avg_var
        return self.g * (x - mu) * torch.rsqrt(var + 1e-5) + self.b


def own(**options: Any) -> Make:
    def build() -> nn.Module:
        model = nets.rep_vgg()
        model[1] = OwnNorm(16, **options)
        return model

    return untrained(build, "digits", 32, loss=cross_entropy)


class AlwaysTraining(nn.Module):
    """A layer of somebody who wanted batch statistics at test time too."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.train()(x)


class Functional(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Remembering(nn.Module):
    """Keeps an average of its input, with its graph, or a list of all that it saw."""

    def __init__(self, *, graph: bool) -> None:
        super().__init__()
        self.graph, self.total, self.seen = graph, torch.zeros(()), []

    def forward(self, x: Tensor) -> Tensor:
        if self.graph:
            self.total = 0.9 * self.total + 0.1 * x.mean()
        else:
            self.seen.append(x.detach())
        return x


def perturbed_twice(model: nn.Module, batch: Any) -> Tensor:
    """A consistency loss whose second forward moves the statistics once more."""
    x = batch[0]
    return model(x) + 0 * model(x).detach()


SICK: list[tuple[str, Make, str, str | None]] = [
    ("own layer, no buffers", own(), "BN120", "1"),
    ("own layer, keeps the graph", own(buffers=True, detach=False), "BN121", "1"),
    (
        "a layer that trains itself",
        judged("rep vgg", change=replaced("1", AlwaysTraining)),
        "BN210",
        "1.norm",
    ),
    (
        "functional batch norm, always training",
        judged("rep vgg", change=replaced("1", lambda _: Functional(16))),
        "BN210",
        "1",
    ),
    (
        "checkpointed block",
        judged("rep vgg", training=True, loss=True, change=replaced("3", Checkpointed)),
        "BN211",
        "3.inner.large.1",
    ),
    (
        "a second forward on the same batch",
        judged("densenet", training=True, loss=True, forward=perturbed_twice),
        "BN212",
        "features.1.norm",
    ),
    (
        "an average with its graph",
        judged(
            "audio",
            training=True,
            loss=True,
            change=followed_by("3", lambda: Remembering(graph=True)),
        ),
        "BN213",
        "3.1",
    ),
    (
        "a list of activations",
        judged(
            "densenet",
            training=True,
            loss=True,
            change=followed_by("features.3", lambda: Remembering(graph=False)),
        ),
        "BN214",
        "features.3.1",
    ),
]
