"""What a layer's statistics look like: running against population statistics, the spread of variances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from batchnorm.doctor.subject import Subject

# Channels drawn in a scatter: the ones that are furthest off, and some of the rest.
_MOST_POINTS = 200
_BARS = 24
# The side of a plot without its labels, in the units of its SVG.
SIDE = 160


@dataclass(frozen=True)
class LayerPicture:
    """The statistics of one layer, each a tensor of shape (C,).

    Attributes:
        layer: its qualified name.
        running_mean, running_var: what is in its buffers.
        population_mean, population_var: those of the data it was given (over the whole data, not of one
            batch); None where there was no data.
    """

    layer: str
    running_mean: Tensor
    running_var: Tensor
    population_mean: Tensor | None = None
    population_var: Tensor | None = None


@dataclass(frozen=True)
class Tick:
    """A label at a place on an axis, in the units of the plot."""

    at: float
    label: str


@dataclass(frozen=True)
class Plot:
    """What the page draws: points or bars in a square of `SIDE`, y downwards.

    Attributes:
        title: what is shown.
        x_label, y_label: what is along the axes.
        points: (x, y) of channels.
        bars: (x, width, height of the running variances, height of the population's).
        x_ticks, y_ticks: what is written along the axes.
    """

    title: str
    x_label: str
    y_label: str
    points: tuple[tuple[float, float], ...] = ()
    bars: tuple[tuple[float, float, float, float], ...] = ()
    x_ticks: tuple[Tick, ...] = ()
    y_ticks: tuple[Tick, ...] = ()


def pictures_of(subject: Subject) -> Iterable[LayerPicture]:
    """Pictures of what was observed; without data, of the buffers alone."""
    if subject.observed is not None:
        return subject.observed.pictures()
    return [
        LayerPicture(name, layer.running_mean.detach().clone(), layer.running_var.detach().clone())
        for name, layer in subject.batch_norms.items()
        if layer.running_mean is not None and layer.running_var is not None
    ]


def plots(picture: LayerPicture) -> Iterator[Plot]:
    """The plots of a layer: means and variances against the population's, and the spread of variances."""
    running_mean, running_var = _floats(picture.running_mean), _floats(picture.running_var)
    population_var = None
    if picture.population_mean is not None and picture.population_var is not None:
        population_var = _floats(picture.population_var)
        # In standard deviations of the channel, in which a shift does its harm.
        deviation = [math.sqrt(v) if v > 0 else 1.0 for v in population_var]
        means = [m / d for m, d in zip(_floats(picture.population_mean), deviation, strict=True)]
        running = [m / d for m, d in zip(running_mean, deviation, strict=True)]
        yield _scatter("means, in the data's standard deviations", means, running, lambda v: v, _label)
        yield _scatter("variances, on log scales", population_var, running_var, _log10, _power)
    yield _histogram(running_var, population_var)


def _scatter(
    title: str,
    population: Sequence[float],
    running: Sequence[float],
    scale: Callable[[float], float],
    label: Callable[[float], str],
) -> Plot:
    pairs = [(scale(x), scale(y)) for x, y in zip(population, running, strict=True)]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    low, high = _range([value for pair in pairs for value in pair])
    pairs = _thinned(pairs)
    points = tuple((_place(x, low, high), SIDE - _place(y, low, high)) for x, y in pairs)
    ticks = _ticks(low, high, label)
    down = tuple(Tick(SIDE - tick.at, tick.label) for tick in ticks)
    return Plot(title, "of the data", "running", points=points, x_ticks=ticks, y_ticks=down)


def _thinned(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(pairs) <= _MOST_POINTS:
        return pairs
    furthest_first = sorted(pairs, key=lambda pair: -abs(pair[0] - pair[1]))
    half = _MOST_POINTS // 2
    rest = furthest_first[half:]
    return furthest_first[:half] + rest[:: math.ceil(len(rest) / half)]


def _histogram(running: Sequence[float], population: Sequence[float] | None) -> Plot:
    def logs(values: Sequence[float] | None) -> list[float]:
        return [x for x in map(_log10, values or ()) if math.isfinite(x)]

    both = logs(running), logs(population)
    low, high = _range([*both[0], *both[1]])
    counts = [_counts(values, low, high) for values in both]
    most = max(1, *counts[0], *counts[1])
    width = SIDE / _BARS
    bars = tuple(
        (place * width, width, SIDE * ours / most, SIDE * theirs / most)
        for place, (ours, theirs) in enumerate(zip(*counts, strict=True))
    )
    y_ticks = (Tick(SIDE, "0"), Tick(0, str(most)))
    return Plot(
        "histogram of variances",
        "variance",
        "channels",
        bars=bars,
        x_ticks=_ticks(low, high, _power),
        y_ticks=y_ticks,
    )


def _counts(values: Sequence[float], low: float, high: float) -> list[int]:
    counts = [0] * _BARS
    for value in values:
        counts[min(_BARS - 1, int((value - low) / (high - low) * _BARS))] += 1
    return counts


def _floats(values: Tensor) -> list[float]:
    return values.detach().double().flatten().tolist()


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 and math.isfinite(value) else math.nan


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' range, somewhat wider, and never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    margin = max(0.08 * (high - low), 0.05)
    return low - margin, high + margin


def _place(value: float, low: float, high: float) -> float:
    return round((value - low) / (high - low) * SIDE, 1)


def _ticks(low: float, high: float, label: Callable[[float], str]) -> tuple[Tick, ...]:
    """Three or so round numbers within the range."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(s for s in (step / 5, step / 2, step, 2 * step, 5 * step) if (high - low) / s <= 4)
    first = math.ceil(low / step)
    last = math.floor(high / step)
    return tuple(Tick(_place(i * step, low, high), label(i * step)) for i in range(first, last + 1))


def _label(value: float) -> str:
    return f"{value:.3g}"


def _power(value: float) -> str:
    return f"{10**value:.2g}".replace("e-0", "e-").replace("e+0", "e")
