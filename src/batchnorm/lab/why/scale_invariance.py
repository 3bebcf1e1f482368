"""Experiment 4: before batch norm the length of a weight only sets the learning rate.

Claim: the gradient of a layer before batch norm is orthogonal to its weight, and ten times smaller for a
weight ten times as long; weights ten times as long with a rate a hundred times as large train in the same
way; and all that weight decay does to such a layer is to set its effective learning rate, rate / |weight|^2:
without decay, with weights held at their first length and the effective rate that decay leads to, the
network trains in the same way.
Source: Ioffe & Szegedy 2015, Batch Normalization, section 3.3; van Laarhoven 2017, L2 Regularization versus
Batch and Weight Normalization, sections 2 and 3; Hoffer et al. 2018, Norm matters, section 3.
Would refute it: an angle that is not 90 degrees, a gradient that shrinks less, or networks that after
training differ on more than 1 % of the test images where the claim says that they are the same.
Measured (full: 5,000 steps, 5 seeds, AMD EPYC, 2 cores, torch 2.13.0; means): 90.0 degrees, 10.0 times
smaller, 100 % and 100 % the same predictions; without batch norm 89.3 degrees, 0.00537 times, 9.87 % and
94.2 %; supported. With the usual eps of 1e-5 networks drift apart: 95.1 % (95.0 to 95.3) are the same.
Set-up: three layers of 64 ReLUs on Fashion-MNIST in float64 and with eps = 1e-12, so that neither rounding
nor eps blurs what is the same; SGD at 0.1, decay 0.01 on the weights before batch norm. The last layer, after
which no batch norm comes, keeps its rate and has no decay. The usual eps of 1e-5 stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from batchnorm.model import hold

Norm = Callable[[int], nn.Module] | None
NETS: dict[str, Norm] = {"without": None, "with": partial(BatchNorm1d, eps=1e-12)}
USUAL_EPS = "with, eps 1e-5"
RATE, DECAY, LONGER = 0.1, 0.01, 10.0
LENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
SAME = 99.0


@dataclass(frozen=True)
class Setting:
    """How much is done: training steps of each run, and images to test with."""

    steps: int
    test_images: int


SETTINGS = {"quick": Setting(300, 1000), "full": Setting(5000, 10_000)}


@dataclass(frozen=True)
class Trained:
    """A network after training: its predictions, and each hidden weight's rate / |weight|^2 in every step."""

    predictions: Tensor
    effective_rates: list[list[float]]


def run(seed: int, scale: Scale, on_steps: Callable[[int], None]) -> SeedResult:
    """Look at the gradients of an untrained network, then train pairs that should be the same."""
    setting = SETTINGS[scale]
    usual = {longer: _Training(BatchNorm1d, seed, longer).run(setting, on_steps) for longer in (1.0, LONGER)}
    return {
        **{name: _try(norm, seed, setting, on_steps) for name, norm in NETS.items()},
        USUAL_EPS: {"same_if_longer": _same(usual[1.0], usual[LONGER])},
    }


def _try(norm: Norm, seed: int, setting: Setting, on_steps: Callable[[int], None]) -> dict[str, Any]:
    plain = _Training(norm, seed).run(setting, on_steps)
    longer = _Training(norm, seed, longer=LONGER).run(setting, on_steps)
    decayed = _Training(norm, seed, decay=DECAY).run(setting, on_steps)
    held = _Training(norm, seed, effective=decayed.effective_rates).run(setting, on_steps)
    off_90, gradients = _gradients(norm, seed)
    return {
        "off_90": off_90,
        "gradients": gradients,
        "same_if_longer": _same(plain, longer),
        "same_if_held": _same(decayed, held),
        "same_with_decay": _same(plain, decayed),
        "effective_rates": {
            "plain": [rates[0] for rates in plain.effective_rates],
            "decayed": [rates[0] for rates in decayed.effective_rates],
        },
    }


class _Training:
    """A network's training with the rule of its hidden weights: decay, or held lengths at effective rates.

    Args:
        longer: how many times as long the hidden weights start, at a rate that is the square as large.
        decay: of the hidden weights.
        effective: rates / |weight|^2 of each hidden weight in each step, for weights held at their length.
    """

    def __init__(
        self,
        norm: Norm,
        seed: int,
        longer: float = 1.0,
        decay: float = 0.0,
        effective: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.seed, self.rate, self.decay, self.effective = seed, RATE * longer**2, decay, effective
        self.model, self.hidden = _make(norm, seed, longer)
        hidden = {id(weight) for weight in self.hidden}
        self.others = [weight for weight in self.model.parameters() if id(weight) not in hidden]
        self.effective_rates: list[list[float]] = []

    def run(self, setting: Setting, on_steps: Callable[[int], None]) -> Trained:
        """Train from beginning to end."""
        data = load_images("fashion-mnist")
        batches = minibatches(len(data.train_images), 60, self.seed)
        for step in range(setting.steps):
            batch = next(batches)
            loss = F.cross_entropy(self.model(data.train_images[batch].double()), data.train_labels[batch])
            gradients = torch.autograd.grad(loss, [*self.hidden, *self.others])
            with torch.no_grad():
                for weight, gradient in zip(self.others, gradients[len(self.hidden) :], strict=True):
                    weight.sub_(RATE * gradient)
                self._turn(step, gradients)
            on_steps(1)
        # By the test images' own statistics: running ones remember for a while that they began at 0 and 1.
        with torch.no_grad(), hold(self.model):
            predictions = self.model(data.test_images[: setting.test_images].double()).argmax(1)
        return Trained(predictions, self.effective_rates)

    def _turn(self, step: int, gradients: Sequence[Tensor]) -> None:
        """A step of the hidden weights. Decay shrinks first, so that the rate counts for a shorter weight."""
        kept = 1 - self.rate * self.decay
        squares = [weight.square().sum().item() for weight in self.hidden]
        self.effective_rates.append([self.rate / kept / square for square in squares])
        for place, (weight, gradient) in enumerate(zip(self.hidden, gradients, strict=False)):
            if self.effective is None:
                weight.mul_(kept).sub_(self.rate * gradient)
            else:
                weight.sub_(self.effective[step][place] * squares[place] * gradient)
                weight.mul_(squares[place] ** 0.5 / weight.norm())


def _make(norm: Norm, seed: int, longer: float) -> tuple[nn.Sequential, list[Tensor]]:
    """The network, and the weights of its hidden layers."""
    torch.manual_seed(seed)
    model = perceptron((784, 64, 64, 64, 10), norm, nn.ReLU).double()
    hidden = [layer.weight for layer in list(model)[:-1] if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for weight in hidden:
            weight.mul_(longer)
    return model, hidden


def _gradients(norm: Norm, seed: int) -> tuple[float, list[float]]:
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
                [90 - result[name]["off_90"] for result in results],
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
                "same predictions with decay, and without at its effective rates",
                "%",
                [result[name]["same_if_held"] for result in results],
                SAME,
            ),
        ]

    def faster(result: SeedResult) -> float:
        rates = result["with"]["effective_rates"]
        return rates["decayed"][-1] / rates["plain"][-1]

    return [
        *measures_of("with", decides=True),
        *measures_of("without", decides=False),
        Measure(
            f"same predictions with weights 10 times as long at 100 times the rate, {USUAL_EPS}",
            "%",
            [result[USUAL_EPS]["same_if_longer"] for result in results],
        ),
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
        rows = [result["with"]["effective_rates"][kind] for result in results]
        for row in rows:
            rates.plot(range(len(row)), row, color=color, linewidth=1.2, alpha=0.6)
        ends.append((len(rows[-1]) - 1, rows[-1][-1], text, color))
    rates.set(xlabel="training steps", ylabel="rate / |weight|²")
    rates.set_xlim(0, len(rows[-1]) - 1)
    label_ends(rates, ends)
    return drawn


EXPERIMENT = Experiment(
    number=4,
    name="scale_invariance",
    title="Before batch norm, the length of a weight is a learning rate",
    in_short="Batch norm divides by the size of what it is given, so that doubling a layer's weights changes "
    "nothing, except how strongly the next step turns them. Weight decay works through that alone.",
    claim="The gradient of a layer before batch norm is orthogonal to its weight and ten times smaller for a "
    "weight ten times as long; weights ten times as long at a hundred times the rate train the same "
    "network; and weight decay can be replaced by the rates that it leads to, with weights held at their "
    "length.",
    source="Ioffe & Szegedy 2015, Batch Normalization, section 3.3 (arXiv 1502.03167); van Laarhoven 2017, "
    "L2 Regularization versus Batch and Weight Normalization (arXiv 1706.05350); Hoffer et al. 2018, Norm "
    "matters (arXiv 1803.01814)",
    refuted_by="An angle that is not 90 degrees, a gradient that shrinks less, or networks that differ after "
    "training on more than 1 % of the test images where the claim says that they are the same.",
    run=run,
    steps=lambda scale: (4 * len(NETS) + 2) * SETTINGS[scale].steps,
    measures=measures,
    figure=figure,
    data="fashion-mnist",
)
