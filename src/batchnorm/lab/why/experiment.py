"""What an experiment is: a claim, its source, what would refute it, a run per seed, and a verdict by rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.figure import Figure

from batchnorm.lab.why.theme import Theme

Verdict = Literal["supported", "not supported", "undecided here"]
Scale = Literal["quick", "full"]

# What one seed gives: numbers and lists by name, ready for JSON.
SeedResult = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A number per seed, with the claim it decides.

    Attributes:
        name: what it is, as a reader says it ("accuracy gained by recalibration").
        unit: its unit ("points", "steps", "ratio").
        values: one per seed, paired over the seed where two things are compared (their difference or ratio).
        above: the claim holds where the mean is above this; None where the number decides nothing.
    """

    name: str
    unit: str
    values: Sequence[float]
    above: float | None = None


@dataclass(frozen=True)
class Experiment:
    """One claim and how it is tried.

    Attributes:
        number: its place on the page, 1 to 10.
        name: one word for the command line, such as `"sigmoids"`.
        title: the idea, as a headline.
        in_short: a sentence that a newcomer understands.
        claim: what is claimed, in a sentence that can be wrong.
        source: paper, section, figure.
        refuted_by: the measurement that would refute it.
        run: `(seed, scale, on_steps) -> SeedResult`; equal arguments give equal results.
        steps: `(scale) -> how often run calls on_steps(1)`.
        measures: `(results of all seeds) -> measures`; the verdict follows from those with `above`.
        figure: `(results of all seeds, theme) -> a matplotlib figure` in the theme's colours.
        data: the data set that `run` gets from `images.load_images`; None where it needs none.
        layers: `(results of all seeds) -> what the page's slider over training steps shows`, see
            `page.layers_of`; None for no slider.
    """

    number: int
    name: str
    title: str
    in_short: str
    claim: str
    source: str
    refuted_by: str
    run: Callable[[int, Scale, Callable[[int], None]], SeedResult]
    steps: Callable[[Scale], int]
    measures: Callable[[Sequence[SeedResult]], Sequence[Measure]]
    figure: Callable[[Sequence[SeedResult], Theme], Figure]
    data: str | None = None
    layers: Callable[[Sequence[SeedResult]], Mapping[str, Any]] | None = None
