"""Experiment 4: before batch norm the length of a weight only sets the learning rate.

Claim: the gradient of a layer before batch norm is orthogonal to its weight, and ten times smaller for a
weight ten times as long; weights ten times as long with a rate a hundred times as large train in the same
way; and all that weight decay does to such a layer is to set its effective learning rate, rate / |weight|^2:
a network without decay that has these lengths imposed trains in the same way.
Source: Ioffe & Szegedy 2015, Batch Normalization, section 3.3; van Laarhoven 2017, L2 Regularization versus
Batch and Weight Normalization, sections 2 and 3; Hoffer et al. 2018, Norm matters, section 3.
Would refute it: an angle that is not 90 degrees, a gradient that shrinks less, or networks that after
training differ on more than 1 % of the test images where the claim says that they are the same.
Set-up: three layers of 64 ReLUs on Fashion-MNIST in float64, so that rounding does not blur what is the
same; SGD at 0.1, decay 0.01 on the weights before batch norm. The last layer, after which no batch norm
comes, keeps its own rate and has no decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.why.experiment import Experiment, Measure, Scale, SeedResult
from batchnorm.lab.why.images import load_images
from batchnorm.lab.why.theme import Theme, label_ends, panels
from batchnorm.lab.why.training import minibatches, perceptron
from batchnorm.layers import BatchNorm1d

NETS = {"without": None, "with": BatchNorm1d}
RATE, DECAY, LONGER = 0.1, 0.01, 10.0
LENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
SAME = 99.0


@dataclass(frozen=True)
class Setting:
    """How much is done: training steps of each run, and images to test with."""

    steps: int
    test_images: int


SETTINGS = {"quick": Setting(300, 1000), "full": Setting(5000, 10_000)}


@dataclass
class Trained:
    """A network after training: its predictions, and the hidden weights' length at every step."""

    predictions: Tensor
    accuracy: float
    lengths: list[list[float]]


def run(seed: int, scale: Scale, on_steps: Callable[[int], None]) -> SeedResult:
    """Look at the gradients of an untrained network, then train pairs that should be the same."""
    return {name: _try(norm, seed, SETTINGS[scale], on_steps) for name, norm in NETS.items()}


def _try(
    norm: Callable[[int], nn.Module] | None, seed: int, setting: Setting, on_steps: Callable[[int], None]
) -> dict[str, Any]:
    def train(**how: Any) -> Trained:
        return _train(norm, seed, setting, on_steps, **how)

    plain = train()
    longer = train(longer=LONGER, rate=RATE * LONGER**2)
    decayed = train(decay=DECAY)
    imposed = train(impose=decayed.lengths, rate=RATE / (1 - RATE * DECAY))
    angles, gradients = _gradients(norm, seed)
    return {
        "angle_off_90": angles,
        "gradients": gradients,
        "same_if_longer": _same(plain, longer),
        "same_if_imposed": _same(decayed, imposed),
        "same_with_decay": _same(plain, decayed),
        "accuracy": {"plain": plain.accuracy, "decayed": decayed.accuracy, "imposed": imposed.accuracy},
        "rates": {
            kind: _effective_rates(trained.lengths)
            for kind, trained in (("plain", plain), ("decayed", decayed))
        },
    }


def _train(
    norm: Callable[[int], nn.Module] | None,
    seed: int,
    setting: Setting,
    on_steps: Callable[[int], None],
    *,
    longer: float = 1.0,
    rate: float = RATE,
    decay: float = 0.0,
    impose: Sequence[Sequence[float]] | None = None,
) -> Trained:
    data = load_images("fashion-mnist")
    model, hidden = _make(norm, seed, longer)
    others = [parameter for parameter in model.parameters() if all(parameter is not w for w in hidden)]
    groups: list[dict[str, Any]] = [
        {"params": hidden, "lr": rate, "weight_decay": decay},
        {"params": others},
    ]
    optimizer = torch.optim.SGD(groups, lr=RATE)
    batches = minibatches(len(data.train_images), 60, seed)
    lengths = []
    for step in range(setting.steps):
        batch = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images[batch].double()), data.train_labels[batch]).backward()
        optimizer.step()
        with torch.no_grad():
            if impose is not None:
                for weight, length in zip(hidden, impose[step], strict=True):
                    weight.mul_(length / weight.norm())
            lengths.append([weight.norm().item() for weight in hidden])
        on_steps(1)
    model.eval()
    with torch.no_grad():
        predictions = model(data.test_images[: setting.test_images].double()).argmax(1)
    right = (predictions == data.test_labels[: setting.test_images]).double().mean().item()
    return Trained(predictions, right, lengths)


def _make(
    norm: Callable[[int], nn.Module] | None, seed: int, longer: float
) -> tuple[nn.Sequential, list[Tensor]]:
    """The network, and the weights of its hidden layers."""
    torch.manual_seed(seed)
    model = perceptron((784, 64, 64, 64, 10), norm, nn.ReLU).double()
    hidden = [layer.weight for layer in list(model)[:-1] if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for weight in hidden:
            weight.mul_(longer)
    return model, hidden


def _gradients(norm: Callable[[int], nn.Module] | None, seed: int) -> tuple[float, list[float]]:
    """How far the angle between gradient and weight is from 90 degrees at most, and how long gradients are.

    Lengths are of all hidden weights' gradients together, for weights LENGTHS times as long.
    """
    data = load_images("fashion-mnist")
    images, labels = data.train_images[:500].double(), data.train_labels[:500]
    off, lengths = [], []
    for longer in LENGTHS:
        model, hidden = _make(norm, seed, longer)
        gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), hidden)
        lengths.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))
        if longer == 1:
            cosines = [
                F.cosine_similarity(w.flatten(), g.flatten(), dim=0)
                for w, g in zip(hidden, gradients, strict=True)
            ]
            off = [abs(90 - math.degrees(math.acos(cosine.item()))) for cosine in cosines]
    return max(off), lengths


def _same(one: Trained, other: Trained) -> float:
    return 100 * (one.predictions == other.predictions).double().mean().item()


def _effective_rates(lengths: Sequence[Sequence[float]]) -> list[float]:
    """rate / |weight|^2 of the first hidden layer, at 50 steps of training or so."""
    first = [RATE / layers[0] ** 2 for layers in lengths]
    return first[:: max(1, len(first) // 50)]


def measures(results: Sequence[SeedResult]) -> list[Measure]:
    """What is claimed of the network with batch norm decides; the one without stands beside it."""

    def shrunk(result: SeedResult, name: str) -> float:
        gradients = result[name]["gradients"]
        return gradients[LENGTHS.index(1.0)] / gradients[LENGTHS.index(LONGER)]

    def measures_of(name: str, decides: bool) -> list[Measure]:
        def measure(what: str, unit: str, values: Sequence[float], above: float) -> Measure:
            return Measure(f"{what}, {name}", unit, values, above if decides else None)

        return [
            measure(
                "angle between weight and gradient, the one furthest from 90",
                "degrees",
                [90 - result[name]["angle_off_90"] for result in results],
                89.9,
            ),
            measure(
                "gradient shrinks for weights 10 times as long",
                "times",
                [shrunk(result, name) for result in results],
                9.9,
            ),
            measure(
                "same predictions with weights 10 times as long at 100 times the rate",
                "%",
                [result[name]["same_if_longer"] for result in results],
                SAME,
            ),
            measure(
                "same predictions with decay, and without but with its lengths",
                "%",
                [result[name]["same_if_imposed"] for result in results],
                SAME,
            ),
        ]

    def faster(result: SeedResult) -> float:
        rates = result["with"]["rates"]
        return rates["decayed"][-1] / rates["plain"][-1]

    return [
        *measures_of("with", decides=True),
        *measures_of("without", decides=False),
        Measure(
            "same predictions with decay and without, with",
            "%",
            [result["with"]["same_with_decay"] for result in results],
        ),
        Measure(
            "effective rate at the end, with decay / without decay, with",
            "ratio",
            [faster(result) for result in results],
        ),
    ]


def figure(results: Sequence[SeedResult], theme: Theme) -> Figure:
    """Gradient against the weight's length, and the effective rate over training with and without decay."""
    drawn, (gradients, rates) = panels(
        theme, "gradient, for longer weights", "effective rate of the first layer, with"
    )
    gradients.set(xscale="log", yscale="log", xlabel="length of the weights, times the first")
    gradients.set(ylabel="length of the gradient, times the first")
    ends = []
    for name, color in (("without", theme.vermilion), ("with", theme.blue)):
        for result in results:
            found = result[name]["gradients"]
            relative = [value / found[LENGTHS.index(1.0)] for value in found]
            gradients.plot(LENGTHS, relative, "o-", color=color, linewidth=1.2, markersize=3, alpha=0.6)
        ends.append((LENGTHS[-1], relative[-1], name, color))
    label_ends(gradients, ends)
    ends = []
    for kind, text, color in (("plain", "no decay", theme.green), ("decayed", "decay", theme.purple)):
        rows = [result["with"]["rates"][kind] for result in results]
        for row in rows:
            share = [100 * place / (len(row) - 1) for place in range(len(row))]
            rates.plot(share, row, color=color, linewidth=1.2, alpha=0.6)
        ends.append((100.0, rows[-1][-1], text, color))
    rates.set(xlabel="training done, %", ylabel="rate / |weight|²")
    rates.set_xlim(0, 100)
    label_ends(rates, ends)
    return drawn


EXPERIMENT = Experiment(
    number=4,
    name="scale_invariance",
    title="Before batch norm, the length of a weight is a learning rate",
    in_short="Batch norm divides by the size of what it is given, so that doubling a layer's weights changes "
    "nothing, except how strongly the next step turns them. Weight decay works through that alone.",
    claim="The gradient of a layer before batch norm is orthogonal to its weight and ten times smaller for a "
    "weight ten times as long; weights ten times as long at a hundred times the rate train the same network; "
    "and so does imposing the lengths that weight decay leads to, in place of weight decay.",
    source="Ioffe & Szegedy 2015, Batch Normalization, section 3.3 (arXiv 1502.03167); van Laarhoven 2017, L2 "
    "Regularization versus Batch and Weight Normalization (arXiv 1706.05350); Hoffer et al. 2018, Norm "
    "matters (arXiv 1803.01814)",
    refuted_by="An angle that is not 90 degrees, a gradient that shrinks less, or networks that differ after "
    "training on more than 1 % of the test images where the claim says that they are the same.",
    run=run,
    steps=lambda scale: 4 * len(NETS) * SETTINGS[scale].steps,
    measures=measures,
    figure=figure,
    data="fashion-mnist",
)
