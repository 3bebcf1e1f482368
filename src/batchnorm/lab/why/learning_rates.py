"""Experiment 2: batch norm bears larger learning rates; does its gain come from them?

Claim: with batch norm a network still trains at a rate more than 5 times as large as without; at five times
the base rate it reaches 75 % in fewer steps than the network without at the base rate; and the larger rate
is where the gain comes from: at one and the same base rate batch norm gains less than at each one's best.
Source: Ioffe & Szegedy 2015, Batch Normalization, section 4.2.2 and figure 3 (x1, x5, x30); Bjorck et al.
2018, Understanding Batch Normalization, section 3 and figure 1.
Would refute it: the largest rate is at most 5 times that without, or it takes as many steps, or as much is
gained at the base rate as at the best rates.
Measured (full: 4,000 steps per rate, 5 seeds, AMD EPYC, 2 cores, torch 2.13.0; mean and 95 % interval):
rates 8.40 times (4.32 to 12.5) as large, 3.43 times (1.89 to 4.98) fewer steps; at the best rates batch
norm gains 0.192 points (-0.195 to 0.579) more than at the base rate; undecided here.
Set-up: five layers of 100 ReLUs on Fashion-MNIST, SGD without momentum, batches of 60, one rate after the
other, the same batches for all. The base rate, 0.1, was the best without batch norm of a grid 3 apart after
600 steps. A rate still trains if half of the test images are right in the end (chance is a tenth). A network
that never reaches 75 % is counted with the steps that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from batchnorm.lab.why.experiment import Experiment, Measure, Scale, SeedResult
from batchnorm.lab.why.images import load_images
from batchnorm.lab.why.theme import Theme, label_ends, panels
from batchnorm.lab.why.training import accuracy, minibatches, perceptron
from batchnorm.layers import BatchNorm1d

NETS = {"without": None, "with": BatchNorm1d}
SIZES = (784, 100, 100, 100, 100, 100, 10)
BASE = 0.1
# Of the base rate: the paper's 1, 5 and 30, and finer steps around the largest that train.
MULTIPLES = (0.1, 1, 2.5, 5, 7.5, 10, 30, 45, 65, 100)
FIVE_TIMES = 5
TRAINS, FIXED = 0.5, 0.75


@dataclass(frozen=True)
class Setting:
    """How much is done: training steps per rate, steps between looks, and images to test with."""

    steps: int
    look_every: int
    test_images: int


SETTINGS = {"quick": Setting(400, 20, 1000), "full": Setting(4000, 50, 5000)}


def run(seed: int, scale: Scale, on_steps: Callable[[int], None]) -> SeedResult:
    """Train both networks at every rate; gives the accuracies (rates, looks) of each."""
    setting = SETTINGS[scale]
    return {
        "looks": list(range(setting.look_every, setting.steps + 1, setting.look_every)),
        **{
            name: [_train(norm, BASE * multiple, seed, setting, on_steps) for multiple in MULTIPLES]
            for name, norm in NETS.items()
        },
    }


def _train(
    norm: Callable[[int], nn.Module] | None,
    rate: float,
    seed: int,
    setting: Setting,
    on_steps: Callable[[int], None],
) -> list[float]:
    data = load_images("fashion-mnist")
    test = data.test_images[: setting.test_images], data.test_labels[: setting.test_images]
    torch.manual_seed(seed)
    model = perceptron(SIZES, norm, nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    accuracies = []
    batches = minibatches(len(data.train_images), 60, seed)
    for step in range(1, setting.steps + 1):
        batch = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch]).backward()
        optimizer.step()
        if step % setting.look_every == 0:
            accuracies.append(accuracy(model, *test))
        on_steps(1)
    return accuracies


def measures(results: Sequence[SeedResult]) -> list[Measure]:
    """The three numbers of the claim decide; steps to the fixed accuracy are told beside."""

    def largest(result: SeedResult, name: str) -> float:
        trained = [m for m, values in zip(MULTIPLES, result[name], strict=True) if values[-1] >= TRAINS]
        return max(trained, default=float("nan"))

    def steps(result: SeedResult, name: str, multiple: float) -> float:
        reached = zip(result["looks"], result[name][MULTIPLES.index(multiple)], strict=True)
        return next((step for step, value in reached if value >= FIXED), result["looks"][-1])

    def gain_at_base(result: SeedResult) -> float:
        base = MULTIPLES.index(1)
        return 100 * (result["with"][base][-1] - result["without"][base][-1])

    def gain_at_best(result: SeedResult) -> float:
        best = {name: max(values[-1] for values in result[name]) for name in NETS}
        return 100 * (best["with"] - best["without"])

    return [
        Measure(
            "largest rate that still trains, with / without",
            "times",
            [largest(result, "with") / largest(result, "without") for result in results],
            above=FIVE_TIMES,
        ),
        Measure(
            f"steps to {FIXED:.0%}, without at x1 / with at x5",
            "ratio",
            [steps(result, "without", 1) / steps(result, "with", FIVE_TIMES) for result in results],
            above=1,
        ),
        Measure(
            "gain in accuracy at each one's best rate, minus gain at the base rate",
            "points",
            [gain_at_best(result) - gain_at_base(result) for result in results],
            above=0,
        ),
        Measure("gain at the base rate", "points", [gain_at_base(result) for result in results]),
        Measure("gain at each one's best rate", "points", [gain_at_best(result) for result in results]),
        *(
            Measure(
                f"steps to {FIXED:.0%}, {name} at x{multiple}",
                "steps",
                [float(steps(result, name, multiple)) for result in results],
            )
            for name, multiple in (("without", 1), ("with", 1), ("with", 5), ("with", 30))
        ),
    ]


def figure(results: Sequence[SeedResult], theme: Theme) -> Figure:
    """Last accuracy against the rate, and accuracy against steps at x1, x5 and x30."""
    drawn, (rates, curves) = panels(theme, "accuracy in the end, at each rate", "accuracy at x1, x5, x30")
    colors = {"without": theme.vermilion, "with": theme.blue}
    grid = [BASE * multiple for multiple in MULTIPLES]
    for name, color in colors.items():
        for result in results:
            ends = [100 * values[-1] for values in result[name]]
            rates.plot(grid, ends, color=color, alpha=0.25, linewidth=0.8)
        means = [_mean(results, name, place)[-1] for place in range(len(grid))]
        rates.plot(grid, means, "o-", color=color, linewidth=2, markersize=4)
        last = max((k for k, value in enumerate(means) if value > 50), default=0)
        rates.annotate(
            name,
            (grid[last], means[last]),
            xytext=(4, 6) if name == "with" else (-30, -16),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
        )
    rates.set(xscale="log", xlabel="learning rate", ylabel="test images right, %", ylim=(0, 100))
    looks = results[0]["looks"]
    ends = []
    for name, multiple, dashes in (
        ("without", 1, "-"),
        ("with", 1, "-"),
        ("with", 5, (0, (5, 2))),
        ("with", 30, (0, (1, 1))),
    ):
        means = _mean(results, name, MULTIPLES.index(multiple))
        curves.plot(looks, means, color=colors[name], linewidth=2, linestyle=dashes)
        ends.append((looks[-1], means[-1], f"{name}, x{multiple}", colors[name]))
    curves.axhline(100 * FIXED, color=theme.muted, linewidth=0.8)
    curves.set(xlabel="training steps", ylabel="test images right, %", ylim=(0, 100))
    curves.set_xlim(0, looks[-1])
    label_ends(curves, ends)
    return drawn


def _mean(results: Sequence[SeedResult], name: str, place: int) -> list[float]:
    """The mean over seeds, in percent, at each look."""
    rows = [result[name][place] for result in results]
    return [100 * sum(values) / len(values) for values in zip(*rows, strict=True)]


EXPERIMENT = Experiment(
    number=2,
    name="learning_rates",
    title="Batch norm bears larger learning rates",
    in_short="The learning rate is how far a network moves in each step. Too far, and it never learns; batch "
    "norm lets it go further.",
    claim="With batch norm a network still trains at a rate more than 5 times as large as without; at five "
    "times the base rate it reaches 75 % in fewer steps than the network without; and at one and the same "
    "base rate batch norm gains less accuracy than with each network at its best rate.",
    source="Ioffe & Szegedy 2015, Batch Normalization, section 4.2.2, figure 3 (arXiv 1502.03167); Bjorck et "
    "al. 2018, Understanding Batch Normalization, section 3 (arXiv 1806.02375)",
    refuted_by="The largest rate is at most 5 times that without, or it takes as many steps to 75 %, or "
    "batch norm gains as much at the base rate as at the best rates.",
    run=run,
    steps=lambda scale: len(NETS) * len(MULTIPLES) * SETTINGS[scale].steps,
    measures=measures,
    figure=figure,
    data="fashion-mnist",
)
