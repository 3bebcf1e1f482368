"""A corpus written after the doctor, from its documentation, by someone who had not seen the first one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images, load_wine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from tests.doctor import heldout_nets as nets

Case = tuple[nn.Module, list[Any], dict[str, Any]]
Make = Callable[[], Case]
Batches = list[Any]


# Data: (inputs, labels), shuffled, standardised by nothing that a user would not do.


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


# Models, each trained once for a moment.


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


def judged(
    name: str,
    *,
    training: bool = False,
    size: int | None = None,
    optimizer: bool = False,
    loss: bool = False,
    change: Callable[[nn.Module], Any] | None = None,
    on: Callable[[Batches], Batches] = list,
    data: bool = True,
    **options: Any,
) -> Make:
    """A trained model, changed, with training batches in training mode and with test batches in eval mode."""

    def make() -> Case:
        model, its_optimizer = trained(name)
        model.train(training)
        changed = change(model) if change else None
        model = changed if isinstance(changed, nn.Module) else model
        if optimizer:
            options["optimizer"] = its_optimizer
        if loss:
            options["loss"] = RECIPES[name][5]
        given = batches(RECIPES[name][1], size or RECIPES[name][2], test=not training) if data else []
        if name == "shallow":
            given = [(x.flatten(1), y) for x, y in given]
        return model, on(given), dict(options)

    return make


def untrained(
    build: Callable[[], nn.Module],
    data: str,
    size: int,
    on: Callable[[Batches], Batches] = list,
    **options: Any,
) -> Make:
    def make() -> Case:
        torch.manual_seed(5)
        return build().train(), on(batches(data, size)), options

    return make


def new_with_optimizer(build: Callable[[], nn.Module], data: str, size: int, make_optimizer: Any) -> Make:
    def make() -> Case:
        torch.manual_seed(6)
        model = build().train()
        return model, batches(data, size), {"optimizer": make_optimizer(model)}

    return make


# Healthy models.


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


def ema_of_parameters_by_hand() -> Case:
    """As in many a repository: a copy of the model made early, in which parameters alone are averaged."""
    torch.manual_seed(2)
    model = nets.DenseNet()
    data = batches("digits", 64, most=100)
    optimizer = adam(model)
    fit(model, data[:8], 1, optimizer, cross_entropy)
    average = copy.deepcopy(model)

    def update(source: nn.Module) -> None:
        with torch.no_grad():
            for mine, its in zip(average.parameters(), source.parameters(), strict=True):
                mine.lerp_(its, 0.05)

    fit(model, data, 6, optimizer, cross_entropy, update)
    return average.train(), batches("digits", 64), {}


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


def by_class(given: Batches) -> Batches:
    x, y = torch.cat([b[0] for b in given]), torch.cat([b[1] for b in given])
    order = y.argsort(stable=True)
    size = len(given[0][0])
    return [(x[order[i : i + size]], y[order[i : i + size]]) for i in range(0, len(x), size)]


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


# Sick models.

Change = Callable[[nn.Module], Any]


def setting(layer: str, **values: Any) -> Change:
    def change(model: nn.Module) -> None:
        for name, value in values.items():
            setattr(model.get_submodule(layer), name, value)

    return change


def filled(tensor: str, change_of: Callable[[Tensor], Tensor], channels: slice = slice(None)) -> Change:
    """The tensor of that name with some channels changed."""

    def change(model: nn.Module) -> None:
        layer, _, attribute = tensor.rpartition(".")
        values = getattr(model.get_submodule(layer), attribute).data
        values[channels] = change_of(values[channels])

    return change


def replaced(path: str, make: Callable[[nn.Module], nn.Module]) -> Change:
    def change(model: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)).train(owner.training))

    return change


def means_off(layer: str, deviations: float) -> Change:
    def change(model: nn.Module) -> None:
        norm = model.get_submodule(layer)
        norm.running_mean += deviations * norm.running_var.sqrt()

    return change


def both(*changes: Change) -> Change:
    def change(model: nn.Module) -> None:
        for one in changes:
            one(model)

    return change


def in_training(layer: str) -> Change:
    def change(model: nn.Module) -> None:
        model.get_submodule(layer).train()

    return change


def in_dtype(layer: str, dtype: torch.dtype) -> Change:
    def change(model: nn.Module) -> None:
        model.get_submodule(layer).to(dtype)

    return change


def reset_statistics(layer: str) -> Change:
    return lambda model: model.get_submodule(layer).reset_running_stats()


def with_decay(build: Callable[[], nn.Module], kind: Any, lr: float, decay: float) -> Make:
    return new_with_optimizer(
        build, "digits", 32, lambda model: kind(model.parameters(), lr=lr, weight_decay=decay)
    )


def scaled(factor: float, offset: float = 0.0) -> Callable[[Batches], Batches]:
    return lambda given: [(x * factor + offset, y) for x, y in given]


def with_bias(layer: nn.Module) -> nn.Module:
    """The layer with a bias, as torch starts it."""
    if isinstance(layer, nn.Linear):
        new: Any = nn.Linear(layer.in_features, layer.out_features)
    else:
        assert isinstance(layer, nn.Conv2d)
        new = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            groups=layer.groups,
        )
    new.weight.data.copy_(layer.weight.data)
    return new


class Pooled(nn.Module):
    """A context branch as in ASPP: pooled to 1x1, convolved, normalised, spread out again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*nets.conv_bn(3, 8), nn.ReLU())
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), *nets.conv_bn(8, 8, 1), nn.ReLU())
        self.out = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(torch.cat([x, self.context(x).expand_as(x)], 1))


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
        )
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.one(x)))
        return self.fc(F.relu(self.norm(self.two(x))).mean((2, 3)))


class LogSoftmaxOfNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*nets.conv_bn(1, 12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc, self.norm = nn.Linear(12, 10), nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.norm(self.fc(self.body(x))), dim=1)


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


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0)


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


class Overflowing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).log()


def perturbed_twice(model: nn.Module, batch: Any) -> Tensor:
    """A consistency loss whose second forward moves the statistics once more."""
    x = batch[0]
    return model(x) + 0 * model(x).detach()


def evaluated_in_training_mode() -> Case:
    model, _ = trained("densenet")
    test = batches("digits", 64, test=True)
    model.train()

    def evaluate() -> int:
        with torch.no_grad():
            return sum(int((model(x).argmax(1) == y).sum()) for x, y in test)

    return model, [], {"evaluate": evaluate}


def half_frozen(layer: str, *, weights: bool, mode: bool) -> Change:
    def change(model: nn.Module) -> None:
        norm = model.get_submodule(layer)
        norm.train(mode)
        for parameter in norm.parameters():
            parameter.requires_grad_(weights)

    return change


def fine_tuned_from_another_preprocessing(model: nn.Module) -> None:
    """Statistics of images from 0 to 255."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.mul_(3.0)
            layer.running_var.mul_(9.0)


def ill_timed_recalibration(model: nn.Module) -> None:
    """Statistics of three steps at momentum 0.1, on top of the first ones."""
    was = model.training
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
    model.train()
    with torch.no_grad():
        for x, _ in batches("digits", 64, most=3):
            model(x)
    model.train(was)


def timestamps(given: Batches) -> Batches:
    """A column of seconds since 1970 among the features."""
    out = []
    for x, y in given:
        x = x.clone()
        x[:, 4] = 1.7e9 + 3e4 * x[:, 4]
        out.append((x, y))
    return out


def zeroed_columns(given: Batches) -> Batches:
    return [(torch.cat([x[:, :9], torch.zeros_like(x[:, 9:])], 1), y) for x, y in given]


def inverted(given: Batches) -> Batches:
    return [(0.7 / 0.37 - x, y) for x, y in given]


SICK: list[tuple[str, Make, str, str | None]] = [
    # Without data.
    (
        "bias in a depthwise block",
        judged("mobilenet v3", change=replaced("blocks.1.block.3", with_bias), data=False),
        "BN101",
        "blocks.1.block.3",
    ),
    ("bias of a linear layer", judged("wine", change=replaced("4", with_bias)), "BN101", "4"),
    (
        "bias of a branch",
        judged("rep vgg", change=replaced("5.small.0", with_bias), data=False),
        "BN101",
        "5.small.0",
    ),
    ("weight decay 0.2 by AdamW", with_decay(nets.ConvViT, torch.optim.AdamW, 1e-3, 0.2), "BN102", "stem.1"),
    (
        "weight decay 0.05 by SGD at 0.1",
        with_decay(nets.DenseNet, torch.optim.SGD, 0.1, 0.05),
        "BN102",
        "features.1.norm",
    ),
    (
        "weight decay 1e-3 by SGD at 1",
        with_decay(nets.MobileNetV3, torch.optim.SGD, 1.0, 1e-3),
        "BN102",
        "stem.1",
    ),
    (
        "dropout of 0.5 before batch norm",
        untrained(
            lambda: nn.Sequential(
                nn.Linear(13, 24), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(24), nn.Linear(24, 3)
            ),
            "wine",
            32,
        ),
        "BN103",
        "3",
    ),
    (
        "dropout of 0.1 before batch norm",
        untrained(
            lambda: nn.Sequential(
                nn.Linear(13, 24), nn.Dropout(0.1), nn.Tanh(), nn.BatchNorm1d(24), nn.Linear(24, 3)
            ),
            "wine",
            32,
        ),
        "BN103",
        "3",
    ),
    ("batch norm before log_softmax", untrained(LogSoftmaxOfNorm, "digits", 32), "BN104", "norm"),
    (
        "a context branch with one image",
        judged("unet", training=True, size=1, change=lambda model: Pooled()),
        "BN105",
        "context.2",
    ),
    (
        "momentum 0.9",
        judged("unet", training=True, optimizer=True, change=setting("merge2.1", momentum=0.9)),
        "BN106",
        "merge2.1",
    ),
    (
        "momentum 0.5",
        judged("audio", training=True, data=False, change=setting("5", momentum=0.5)),
        "BN106",
        "5",
    ),
    (
        "momentum 0.999",
        judged("recurrent", training=True, optimizer=True, change=setting("after", momentum=0.999)),
        "BN106",
        "after",
    ),
    (
        "momentum 0.0005",
        untrained(lambda: (m := nets.rep_vgg(), setting("3.identity", momentum=0.0005)(m))[0], "digits", 32),
        "BN106",
        "3.identity",
    ),
    (
        "momentum 1.5",
        judged("video", training=True, data=False, change=setting("1", momentum=1.5)),
        "BN106",
        "1",
    ),
    ("eps 0.1", judged("conv vit", data=False, change=setting("out_bn", eps=0.1)), "BN107", "out_bn"),
    ("eps 1e-12", judged("point net", data=False, change=setting("bn2", eps=1e-12)), "BN107", "bn2"),
    ("eps 0", judged("autoencoder", data=False, change=setting("decoder.1", eps=0.0)), "BN107", "decoder.1"),
    (
        "statistics of one layer lost",
        judged("unet", change=reset_statistics("middle.4")),
        "BN108",
        "middle.4",
    ),
    (
        "statistics lost, no data",
        judged("recurrent", data=False, change=reset_statistics("after")),
        "BN108",
        "after",
    ),
    (
        "statistics not loaded, counter is",
        judged(
            "densenet",
            change=both(
                filled("features.6.running_mean", torch.zeros_like),
                filled("features.6.running_var", torch.ones_like),
            ),
        ),
        "BN108",
        "features.6",
    ),
    (
        "one variance is NaN",
        judged("audio", change=filled("5.running_var", lambda v: v * float("nan"), slice(3, 4))),
        "BN109",
        "5",
    ),
    (
        "one variance is negative",
        judged("conv vit", data=False, change=filled("head_bn.running_var", torch.neg, slice(3, 4))),
        "BN109",
        "head_bn",
    ),
    (
        "one variance is inf",
        judged("video", data=False, change=filled("5.running_var", lambda v: v + float("inf"), slice(3, 4))),
        "BN109",
        "5",
    ),
    (
        "half of the scales are dead",
        judged("rep vgg", change=filled("3.large.1.weight", torch.zeros_like, slice(0, 8))),
        "BN110",
        "3.large.1",
    ),
    (
        "all scales are dead",
        judged("mobilenet v3", change=filled("last.1.weight", lambda w: w * 1e-5)),
        "BN110",
        "last.1",
    ),
    (
        "one layer in training mode",
        judged("densenet", change=in_training("features.4.norm")),
        "BN111",
        "features.4.norm",
    ),
    (
        "one layer in training mode, tabular",
        judged("cancer", data=False, change=in_training("5")),
        "BN111",
        "5",
    ),
    (
        "weights fixed, statistics moving",
        judged(
            "unet", training=True, optimizer=True, change=half_frozen("down1.1", weights=False, mode=True)
        ),
        "BN112",
        "down1.1",
    ),
    (
        "eval mode, weights learning",
        judged(
            "rep vgg",
            training=True,
            optimizer=True,
            change=half_frozen("3.small.1", weights=True, mode=False),
        ),
        "BN112",
        "3.small.1",
    ),
    (
        "one layer in half precision",
        judged("densenet", training=True, data=False, change=in_dtype("features.2.norm", torch.float16)),
        "BN113",
        "features.2.norm",
    ),
    (
        "statistics in bfloat16",
        judged("wine", training=True, change=in_dtype("1", torch.bfloat16), data=False),
        "BN113",
        "1",
    ),
    (
        "a scale is NaN",
        judged("autoencoder", change=filled("encoder.1.weight", lambda w: w * float("nan"), slice(2, 3))),
        "BN115",
        "encoder.1",
    ),
    (
        "a shift is inf",
        judged("point net", data=False, change=filled("bn3.bias", lambda w: w + float("inf"), slice(0, 1))),
        "BN115",
        "bn3",
    ),
    (
        "beta of one",
        untrained(lambda: (m := nets.audio_net(), filled("5.bias", torch.ones_like)(m))[0], "tones", 32),
        "BN116",
        "5",
    ),
    ("test loop in training mode", evaluated_in_training_mode, "BN117", "features.1.norm"),
    ("one batch norm for two convolutions", untrained(SharedNorm, "digits", 32), "BN118", "norm"),
    ("own layer, no buffers", own(), "BN120", "1"),
    ("own layer, keeps the graph", own(buffers=True, detach=False), "BN121", "1"),
    # With data.
    (
        "variance four times too large",
        judged("densenet", change=filled("features.6.running_var", lambda v: 4 * v)),
        "BN202",
        "features.6",
    ),
    (
        "variances 2.5 times too small",
        judged("unet", training=True, change=filled("merge1.1.running_var", lambda v: v / 2.5)),
        "BN202",
        "merge1.1",
    ),
    (
        "means half a std off",
        judged("rep vgg", training=True, change=means_off("5.large.1", 0.5)),
        "BN202",
        "5.large.1",
    ),
    (
        "one channel's variance 100 times too large",
        judged(
            "mobilenet v3",
            training=True,
            change=filled("blocks.0.block.1.running_var", lambda v: 100 * v, slice(5, 6)),
        ),
        "BN202",
        "blocks.0.block.1",
    ),
    (
        "statistics of an audio layer 9 times too large",
        judged("audio", training=True, change=filled("5.running_var", lambda v: 9 * v)),
        "BN202",
        "5",
    ),
    (
        "statistics of an audio layer 9 times too large, end to end",
        judged("audio", training=True, change=filled("5.running_var", lambda v: 9 * v)),
        "BN201",
        "5",
    ),
    ("tabular means off by a std", judged("cancer", training=True, change=means_off("5", 1.0)), "BN202", "5"),
    (
        "statistics of three steps",
        judged("rep vgg", training=True, change=ill_timed_recalibration),
        "BN202",
        "1",
    ),
    ("ema of the parameters by hand", ema_of_parameters_by_hand, "BN202", "features.6"),
    (
        "statistics of another preprocessing",
        judged("densenet", training=True, change=fine_tuned_from_another_preprocessing),
        "BN201",
        "features.1.norm",
    ),
    (
        "statistics of a model ten steps old",
        judged("rep vgg, ten steps", training=True, optimizer=True),
        "BN202",
        "1",
    ),
    (
        "patches of photographs in twos",
        judged("unet in twos", training=True, optimizer=True),
        "BN203",
        "down1.1",
    ),
    ("three values per channel", judged("cancer", training=True, size=3), "BN203", "1"),
    ("two values per channel", judged("wine", training=True, size=2), "BN203", "1"),
    ("four channels of zeros", judged("raw wine", training=True, on=zeroed_columns), "BN204", "0"),
    (
        "dead filters",
        judged("rep vgg", training=True, change=filled("3.large.0.weight", torch.zeros_like, slice(0, 6))),
        "BN204",
        "3.large.1",
    ),
    (
        "a third dead after ReLU",
        judged("unet", training=True, size=16, change=filled("down2.1.bias", lambda b: b - 12, slice(0, 6))),
        "BN205",
        "down2.1",
    ),
    (
        "half dead after ReLU, tabular",
        judged("cancer", training=True, change=filled("5.bias", lambda b: b - 20, slice(0, 24))),
        "BN205",
        "5",
    ),
    (
        "inputs scaled away",
        untrained(
            lambda: nn.Sequential(*nets.conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 1, 1)),
            "photos",
            16,
            on=scaled(1e-3),
        ),
        "BN206",
        "1",
    ),
    ("a column of seconds since 1970", judged("raw wine", training=True, on=timestamps), "BN207", "0"),
    (
        "an offset of 5000 stds",
        untrained(
            lambda: nets.tabular_net(13, 3, inputs_normalised=True), "wine", 32, on=scaled(1.0, 5000.0)
        ),
        "BN207",
        "0",
    ),
    ("padding in sentences", judged("text", training=True), "BN208", "bn"),
    (
        "log of what may be negative",
        untrained(
            lambda: nn.Sequential(nn.Linear(13, 24), nn.BatchNorm1d(24), Overflowing(), nn.Linear(24, 3)),
            "wine",
            64,
        ),
        "BN209",
        "2",
    ),
    (
        "a weight is NaN",
        judged(
            "unet", training=True, change=filled("middle.0.weight", lambda w: w * float("nan"), slice(0, 1))
        ),
        "BN209",
        "middle.0",
    ),
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
            change=replaced("3", lambda pool: nn.Sequential(pool, Remembering(graph=True))),
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
            change=replaced("features.3", lambda pool: nn.Sequential(pool, Remembering(graph=False))),
        ),
        "BN214",
        "features.3.1",
    ),
    ("test images inverted", judged("rep vgg", on=inverted), "BN215", "1"),
    ("test sounds three times as loud", judged("audio", on=scaled(3.0)), "BN215", "1"),
    ("test images from 0 to 255", judged("unet", on=scaled(63.75, 114.75)), "BN215", "down1.1"),
    (
        "no running statistics",
        judged(
            "densenet",
            change=lambda m: [
                setattr(m.features[6], n, v)
                for n, v in (("running_mean", None), ("running_var", None), ("track_running_stats", False))
            ],
        ),
        "BN216",
        "features.6",
    ),
    (
        "centred over the batch",
        judged("audio", change=replaced("3", lambda pool: nn.Sequential(pool, Centred()))),
        "BN216",
        "3.1",
    ),
    ("training data in order of class", judged("rep vgg", training=True, on=by_class), "BN217", None),
    ("audio in order of class", judged("audio", training=True, optimizer=True, on=by_class), "BN217", None),
]
