"""Models of the held-out corpus, each trained once for a moment."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from tests.doctor.heldout import nets
from tests.doctor.heldout.datasets import Batches, batches


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def bce(output: Tensor, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, batch[1])


def reconstruction(output: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(output, batch[0])


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(bn.parameter_groups(model, weight_decay=0.05), lr=3e-3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)


# name: (model, data, batch size, epochs, optimizer, loss)
RECIPES: dict[str, tuple[Callable[[], nn.Module], str, int, int, Any, Any]] = {
    "conv vit": (nets.ConvViT, "digits", 64, 6, adamw, cross_entropy),
    "mobilenet v3": (nets.MobileNetV3, "digits", 32, 3, sgd, cross_entropy),
    "densenet": (nets.DenseNet, "digits", 64, 4, sgd, cross_entropy),
    "audio": (nets.audio_net, "tones", 32, 6, adam, cross_entropy),
    "wine": (lambda: nets.tabular_net(13, 3), "wine", 16, 20, adam, cross_entropy),
    "raw wine": (
        lambda: nets.tabular_net(13, 3, inputs_normalised=True),
        "raw wine",
        32,
        20,
        adamw,
        cross_entropy,
    ),
    "cancer": (lambda: nets.tabular_net(30, 2), "cancer", 128, 30, adam, cross_entropy),
    "autoencoder": (nets.Autoencoder, "digits", 32, 4, adam, reconstruction),
    "unet": (nets.UNet, "photos", 16, 2, adam, bce),
    "unet in twos": (nets.UNet, "photos", 2, 1, adam, bce),
    "recurrent": (nets.Recurrent, "digits", 32, 4, adam, cross_entropy),
    "rep vgg": (nets.rep_vgg, "digits", 64, 4, sgd, cross_entropy),
    "rep vgg, half trained": (nets.rep_vgg, "digits", 64, 2, sgd, cross_entropy),
    "rep vgg, ten steps": (nets.rep_vgg, "digits", 256, 2, sgd, cross_entropy),
    "simsiam": (nets.SimSiam, "views", 64, 3, sgd, nets.simsiam_loss),
    "point net": (nets.PointNet, "points", 64, 6, adam, cross_entropy),
    "video": (nets.video_net, "videos", 64, 2, adam, cross_entropy),
    "text": (nets.TextNet, "words", 64, 4, adam, cross_entropy),
    "slow mobilenet": (lambda: nets.MobileNetV3(momentum=0.01), "digits", 16, 6, adam, cross_entropy),
    "shallow": (lambda: nets.tabular_net(64, 10), "digits", 512, 25, adam, cross_entropy),
}


def fit(
    model: nn.Module,
    data: Batches,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    loss: Any,
    after: Any = None,
) -> None:
    steps, total = 0, epochs * len(data)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for _ in range(epochs):
        for batch in data:
            optimizer.zero_grad()
            loss(model(batch[0]), batch).backward()
            optimizer.step()
            schedule.step()
            steps += 1
            if after:
                after(model)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@cache
def _trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    build, data, size, epochs, make_optimizer, loss = RECIPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = build()
        optimizer = make_optimizer(model)
        every = batches(data, size, most=10_000)
        if name == "shallow":
            every = [(x.flatten(1), y) for x, y in every]
        fit(model, every, epochs, optimizer, loss)
    return model, optimizer


def trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    return copy.deepcopy(_trained(name))
