"""Healthy models of the held-out corpus: nothing above a note is to be found in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import batchnorm as bn
from tests.doctor.data.digits import Case, Make
from tests.doctor.heldout import nets
from tests.doctor.heldout.cases import judged, new_with_optimizer, untrained
from tests.doctor.heldout.changes import by_class
from tests.doctor.heldout.datasets import Batches, batches, dataset
from tests.doctor.heldout.training import adam, adamw, cross_entropy, fit, sgd, trained


@cache
def _averaged(buffers: bool) -> nn.Module:
    torch.manual_seed(2)
    model = nets.DenseNet()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=buffers)
    data = batches("digits", 64, most=100)
    fit(model, data, 5, adam(model), cross_entropy, average.update_parameters)
    return average


def ema_of_everything() -> Case:
    return copy.deepcopy(_averaged(True)).eval(), batches("digits", 64, test=True), {}


def ema_then_update_bn() -> Case:
    average = copy.deepcopy(_averaged(False))
    update_bn(batches("digits", 64, most=100), average)
    return average.eval(), batches("digits", 64, test=True), {}


def ema_with_the_last_buffers() -> Case:
    """use_buffers=False: the average has the buffers of the model as it is."""
    return copy.deepcopy(_averaged(False)).eval(), batches("digits", 64, test=True), {}


def frozen_by_verb() -> Case:
    model, _ = trained("densenet")
    model.train()
    bn.freeze(model)
    model.classifier = nn.Linear(32, 10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    return model, batches("digits", 32), {"optimizer": optimizer, "loss": cross_entropy}


def frozen_by_train() -> Case:
    torch.manual_seed(4)
    features = trained("densenet")[0].features
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    model = nets.FrozenBackbone(features, head).train()
    return model, batches("digits", 32), {"optimizer": adam(head), "loss": cross_entropy}


def frozen_with_a_new_head_that_has_batch_norm() -> Case:
    torch.manual_seed(4)
    features = trained("densenet")[0].features
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 24, bias=False),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )
    model = nets.FrozenBackbone(features, head).train()
    optimizer = adam(head)
    fit(model, batches("digits", 64, most=20), 3, optimizer, cross_entropy)
    return model, batches("digits", 64), {"optimizer": optimizer, "loss": cross_entropy}


def two_inputs(trained_too: bool) -> Make:
    def make() -> Case:
        torch.manual_seed(1)
        model = nets.TwoInputs()
        x, y = dataset("digits")
        data = [
            {"image": x[i : i + 32], "rows": x[i : i + 32].mean((1, 2)), "labels": y[i : i + 32]}
            for i in range(0, 1280, 32)
        ]
        optimizer = adamw(model)

        def run(model: nn.Module, batch: Any) -> Any:
            return model(image=batch["image"], rows=batch["rows"])["logits"]

        def loss(output: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(output, batch["labels"])

        if trained_too:
            model.train()
            for batch in data * 3:
                optimizer.zero_grad()
                loss(run(model, batch), batch).backward()
                optimizer.step()
        return model, data[:8], {"optimizer": optimizer, "loss": loss, "forward": run}

    return make


def momentum_none(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = None
            layer.reset_running_stats()
    model.train()
    with torch.no_grad():
        for x, _ in batches("digits", 64, most=20):
            model(x)
    model.eval()


def zero_gamma(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Goyal et al. 2017: the last scale of every residual branch starts at zero."""

    def make() -> nn.Module:
        model = build()
        for block in model.blocks:
            if block.residual:
                block.block[-1].weight.data.zero_()
        return model

    return make


def lazy_discriminator() -> nn.Module:
    model = nets.discriminator()
    model(torch.zeros(2, 1, 8, 8))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    return model


def ragged(given: Batches) -> Batches:
    return [*given[:5], tuple(part[:3] for part in given[5])]


def channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def synced(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()


HEALTHY: list[tuple[str, Make]] = [
    ("conv vit in training", judged("conv vit", training=True, optimizer=True, loss=True)),
    ("conv vit on test data", judged("conv vit")),
    ("mobilenet v3 on test data", judged("mobilenet v3")),
    ("mobilenet v3, sgd, decay on all", judged("mobilenet v3", training=True, optimizer=True)),
    ("mobilenet v3, momentum 0.01", judged("slow mobilenet", training=True, optimizer=True)),
    ("densenet on test data", judged("densenet")),
    ("densenet converted", judged("densenet", training=True, change=bn.convert, optimizer=True)),
    ("densenet, channels last", judged("densenet", change=channels_last)),
    ("densenet, momentum None", judged("densenet", change=momentum_none)),
    ("densenet, DataParallel", judged("densenet", change=nn.DataParallel)),
    ("densenet, batches of 512", judged("densenet", training=True, size=448)),
    ("audio in training", judged("audio", training=True, optimizer=True, loss=True)),
    ("audio on test data", judged("audio", size=16)),
    ("wine", judged("wine")),
    ("wine in training", judged("wine", training=True, optimizer=True)),
    ("wine, inputs as they are", judged("raw wine", training=True, optimizer=True)),
    ("breast cancer", judged("cancer", training=True, optimizer=True, loss=True)),
    ("breast cancer, all in one batch", judged("cancer", size=512)),
    ("digits as rows, batches of 512", judged("shallow", training=True, optimizer=True)),
    ("autoencoder", judged("autoencoder", training=True, optimizer=True, loss=True)),
    ("autoencoder on test data", judged("autoencoder")),
    ("unet", judged("unet", training=True, optimizer=True, loss=True)),
    ("unet on test data", judged("unet", size=8)),
    ("recurrent", judged("recurrent", training=True, optimizer=True, loss=True)),
    ("recurrent on test data", judged("recurrent")),
    ("rep vgg", judged("rep vgg", training=True, optimizer=True)),
    ("rep vgg after two epochs", judged("rep vgg, half trained", training=True, optimizer=True)),
    ("simsiam", judged("simsiam", training=True, optimizer=True, loss=True)),
    ("point net", judged("point net", training=True, optimizer=True)),
    ("video", judged("video")),
    ("a last batch of three", judged("mobilenet v3", training=True, optimizer=True, on=ragged)),
    ("test data in order of class", judged("densenet", on=by_class)),
    ("SyncBatchNorm, one process", judged("mobilenet v3", change=synced)),
    ("without data", judged("unet", data=False, training=True, optimizer=True)),
    ("ema of weights and buffers", ema_of_everything),
    ("ema, then update_bn", ema_then_update_bn),
    ("ema with the last buffers", ema_with_the_last_buffers),
    ("fine-tuned under bn.freeze", frozen_by_verb),
    ("fine-tuned, train() overridden", frozen_by_train),
    ("a new head with batch norm on a frozen backbone", frozen_with_a_new_head_that_has_batch_norm),
    ("two inputs by name", two_inputs(True)),
    ("new, two inputs by name", two_inputs(False)),
    ("new discriminator", untrained(lazy_discriminator, "digits", 64)),
    ("new mobilenet v3, zero gamma", new_with_optimizer(zero_gamma(nets.MobileNetV3), "digits", 32, sgd)),
    ("new autoencoder, batches of 2", untrained(nets.Autoencoder, "digits", 2)),
    ("new video net", new_with_optimizer(nets.video_net, "videos", 16, adam)),
    ("new conv vit, batches of 16", new_with_optimizer(nets.ConvViT, "digits", 16, adamw)),
]
