"""The page: one HTML file with all that it needs, from the outcomes of the experiments."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from batchnorm.lab.machine import machine_line
from batchnorm.lab.why.campaign import Outcome
from batchnorm.lab.why.statistics import Interval
from batchnorm.lab.why.theme import DARK, LIGHT, to_svg

WIDTHS = ("wide", "narrow")
MINUS = "\N{MINUS SIGN}"


def page(outcomes: Sequence[Outcome]) -> bytes:
    """The experiments in order: idea, figure, numbers, verdict, source, and the command that makes them."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    template = environment.from_string(files(__package__).joinpath("page.html").read_text("utf-8"))
    sections = [_section(outcome) for outcome in outcomes]
    return template.render(sections=sections, machine=machine_line(), themes=(LIGHT, DARK)).encode()


def number(value: float) -> str:
    """Three digits or so, with a true minus, as a reader wants it."""
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else f"{MINUS}∞" if value < 0 else "∞"
    if value == 0:
        return "0"
    value = float(f"{value:.3g}") if abs(value) < 100 else value
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"
    return text.replace("-", MINUS)


def _section(outcome: Outcome) -> dict[str, Any]:
    experiment = outcome.experiment
    scale, seeds = outcome.scale, len(outcome.results)
    return {
        "experiment": experiment,
        "verdict": outcome.verdict,
        "measures": [
            {"measure": measure, "interval": interval, "passes": _passes(interval, measure.above)}
            for measure, interval in outcome.measures
        ],
        "figures": _figures(outcome),
        "layers": None if experiment.layers is None else experiment.layers(outcome.results),
        "made_with": _made_with(outcome),
        "command": f"batchnorm why {shlex.quote(experiment.name)} --{scale} --seeds {seeds} --out why",
    }


def _made_with(outcome: Outcome) -> str:
    seeds = len(outcome.results)
    data = "" if outcome.data is None else f"{outcome.data}, "
    return f"{data}{outcome.scale} scale, {seeds} seed{'s' if seeds != 1 else ''}, {outcome.seconds:,.0f} s"


def _passes(interval: Interval, above: float | None) -> str | None:
    if above is None:
        return None
    return "yes" if interval.low > above else "no" if interval.high < above else "undecided"


def _figures(outcome: Outcome) -> list[dict[str, Any]]:
    drawn = []
    for theme in (LIGHT, DARK):
        for width, variant in zip(WIDTHS, (theme, theme.narrowed()), strict=True):
            name = f"{outcome.experiment.name}-{theme.name}-{width}"
            svg = to_svg(outcome.experiment.figure(outcome.results, variant), name)
            drawn.append({"theme": theme.name, "width": width, "svg": Markup(svg)})
    return drawn
