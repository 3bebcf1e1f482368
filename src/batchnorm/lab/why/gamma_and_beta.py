"""Experiment 8: what scales and shifts alone can learn, in a network of random weights.

Claim: a residual network whose weights stay random reaches a higher accuracy by training only its gammas and
betas than by training two random weights per channel, and a deeper one a higher accuracy than a shallow one.
Source: Frankle, Schwab & Morcos 2020, Training BatchNorm and Only BatchNorm, section 4 (CIFAR-10: 48 % for
ResNet-14, 69.5 % for ResNet-110, 82 % for ResNet-866; two random weights per channel do worse).
Would refute it: one of the two differences in accuracy not above 0.
Measured (full: 12,000 images 4 times, depths 8, 14 and 26, 5 seeds, AMD EPYC, 2 cores, torch 2.13.0; mean
and 95 % interval): 42.9 points (33.3 to 52.5) more than by two weights per channel, 16.9 (13.7 to 20.0)
more at depth 26 than at 8; 74.6 % (73.0 to 76.2) where training everything gives 86.2 %; supported. In the
quick run, depths 8 and 14, depth is undecided.
Set-up: ResNets on Fashion-MNIST halved to 14x14, SGD at 0.1 in batches of 64; gammas from U(0, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.lab.data import Dataset
from batchnorm.lab.why.classifiers import Setting, fit, less, test_error
from batchnorm.lab.why.experiment import Experiment, Measure, Scale, SeedResult
from batchnorm.lab.why.theme import Theme, label_ends, panels

# Layers as ResNets are counted: two per block in three groups of blocks, and two more.
DEPTHS: dict[Scale, tuple[int, ...]] = {"quick": (8, 14), "full": (8, 14, 26)}
_WIDTH = 8
SETTINGS: dict[Scale, Setting] = {"quick": Setting(4096, 3, 2000), "full": Setting(12_000, 4, 10_000)}
_BATCH, _LR = 64, 0.1
# Below this a gamma switches its channel off (Frankle et al., section 5).
_OFF = 0.01


class ResNet(nn.Module):
    """A CIFAR ResNet (He et al. 2016) for 28x28 images halved to 14x14: three groups of `blocks` blocks.

    Gammas are drawn from U(0, 1), betas are 0, as in the paper.
    """

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        widths = [width] + [width * 2**group for group in range(3) for _ in range(blocks)]
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), bn.BatchNorm2d(width))
        pairs = pairwise(widths)
        self.blocks = nn.Sequential(*(Block(inputs, outputs) for inputs, outputs in pairs))
        self.head = nn.Linear(widths[-1], 10)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 28, 28)."""
        x = self.blocks(F.relu(self.stem(F.avg_pool2d(x, 2))))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """Two convolutions and a shortcut; where the width doubles, the image halves and 0 pads the shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.new = outputs - inputs
        stride = 2 if self.new else 1
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = bn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = bn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """relu(shortcut + two normalised convolutions)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new)) if self.new else x
        return F.relu(y + shortcut)


def gammas_and_betas(model: nn.Module) -> list[nn.Parameter]:
    """The weight and bias of each batch norm; all else is set not to require a gradient."""
    model.requires_grad_(False)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    trained = [parameter for layer in norms for parameter in layer.parameters()]
    for parameter in trained:
        parameter.requires_grad_()
    return trained


def two_weights_per_channel(model: nn.Module, generator: torch.Generator) -> list[nn.Parameter]:
    """The weights of the convolutions, of which two per output channel, drawn at random, get a gradient."""
    model.requires_grad_(False)
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    for weight in weights:
        chosen = torch.rand(weight.flatten(1).shape, generator=generator).topk(2, 1).indices
        mask = torch.zeros(weight.flatten(1).shape).scatter_(1, chosen, 1).view_as(weight)
        weight.requires_grad_()
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return weights


def run(seed: int, scale: Scale, on_steps: Callable[[int], None]) -> SeedResult:
    """Test accuracies in percent by depth, per set of trained parameters; equal depths start equal."""
    data = SETTINGS[scale].data()
    accuracy: dict[str, list[float]] = {"gamma and beta": [], "two weights": [], "everything": []}
    count, off = [], 0.0
    for depth in DEPTHS[scale]:
        model = _network(depth, seed, scale)
        trained = gammas_and_betas(model)
        count.append(sum(parameter.numel() for parameter in trained))
        accuracy["gamma and beta"].append(_fitted(model, trained, data, seed, scale, on_steps))
        gammas = torch.cat(
            [p for name, p in model.named_parameters() if "bn" in name and name.endswith("weight")]
        )
        off = float((gammas.abs() < _OFF).double().mean())

        model = _network(depth, seed, scale)
        trained = two_weights_per_channel(model, torch.Generator().manual_seed(seed))
        accuracy["two weights"].append(_fitted(model, trained, data, seed, scale, on_steps))

        model = _network(depth, seed, scale)
        accuracy["everything"].append(_fitted(model, list(model.parameters()), data, seed, scale, on_steps))
    return {"parameters": count, "accuracy": accuracy, "gammas off": off}


def _network(depth: int, seed: int, scale: Scale) -> ResNet:
    torch.manual_seed(seed)
    return ResNet((depth - 2) // 6, _WIDTH)


def _fitted(
    model: nn.Module,
    trained: list[nn.Parameter],
    data: Dataset,
    seed: int,
    scale: Scale,
    on_steps: Callable[[int], None],
) -> float:
    """The test accuracy, in percent, that training those parameters gives."""
    fit(
        model,
        data,
        epochs=SETTINGS[scale].epochs,
        batch_size=_BATCH,
        lr=_LR,
        seed=seed,
        on_steps=on_steps,
        parameters=trained,
    )
    return 100 - test_error(model, data)


def steps(scale: Scale) -> int:
    """One per epoch."""
    return 3 * len(DEPTHS[scale]) * SETTINGS[scale].epochs


def measures(results: Sequence[SeedResult]) -> list[Measure]:
    """At the largest depth, and against the smallest."""

    def accuracy(name: str, depth: int = -1) -> list[float]:
        return [result["accuracy"][name][depth] for result in results]

    trained = accuracy("gamma and beta")
    return [
        Measure(
            "accuracy by gamma and beta, less that by two random weights per channel",
            "points",
            less(trained, accuracy("two weights")),
            above=0,
        ),
        Measure(
            "accuracy by gamma and beta of the deepest network, less that of the shallowest",
            "points",
            less(trained, accuracy("gamma and beta", 0)),
            above=0,
        ),
        Measure("accuracy by gamma and beta, deepest network", "%", trained),
        Measure("accuracy by two random weights per channel, deepest network", "%", accuracy("two weights")),
        Measure("accuracy by training everything, deepest network", "%", accuracy("everything")),
        Measure(f"gammas below {_OFF} in size", "%", [100 * result["gammas off"] for result in results]),
    ]


def figure(results: Sequence[SeedResult], theme: Theme) -> Figure:
    """Accuracy against the number of gammas and betas, per set of trained parameters."""
    names = {
        "everything": ("all parameters", theme.foreground),
        "gamma and beta": ("only gamma and beta", theme.blue),
        "two weights": ("two weights a channel", theme.vermilion),
    }
    chart, (axes,) = panels(theme, "Training a part of a random network", height=3.8)
    count = results[0]["parameters"]
    labels = []
    for name, (label, color) in names.items():
        every = [result["accuracy"][name] for result in results]
        means = [fmean(values) for values in zip(*every, strict=True)]
        for values in every:
            axes.plot(count, values, ".", color=color, alpha=0.5, markersize=5)
        axes.plot(count, means, color=color, marker="o", markersize=5)
        labels.append((count[-1], means[-1], label, color))
    axes.axhline(10, color=theme.muted, linewidth=0.8, linestyle="--")
    axes.annotate("chance", (count[0], 11.5), color=theme.muted, fontsize=8.5)
    axes.set(xlabel="number of gammas and betas in the network", ylabel="test accuracy (%)")
    axes.set_ylim(0, 100)
    label_ends(axes, labels)
    return chart


EXPERIMENT = Experiment(
    number=8,
    name="gamma_and_beta",
    title="Scales and shifts alone can learn",
    in_short=(
        "Leave all the weights of a network random and train only batch norm's scale and shift: it still "
        "learns to tell clothes apart, by choosing among random features."
    ),
    claim=(
        "A residual network whose weights stay random reaches a higher accuracy by training only its gammas "
        "and betas than by training two random weights per channel, and a deeper one a higher accuracy than "
        "a shallow one."
    ),
    source="Frankle, Schwab & Morcos 2020, Training BatchNorm and Only BatchNorm, section 4 (2003.00152)",
    refuted_by="One of the two differences in accuracy not above 0.",
    run=run,
    steps=steps,
    measures=measures,
    figure=figure,
    data="fashion-mnist",
)
