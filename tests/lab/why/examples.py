"""An experiment that takes no time, for the tests of what is around experiments."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from batchnorm.lab.why.experiment import Experiment, Measure, Scale, SeedResult
from batchnorm.lab.why.theme import Theme, panels


def make(
    number: int,
    name: str,
    *,
    above: float = 0.0,
    run: Callable[[int, Scale, Callable[[int], None]], SeedResult] | None = None,
    layers: Callable[[Sequence[SeedResult]], Any] | None = None,
) -> Experiment:
    """An experiment whose seed k gives k + 1."""

    def run_once(seed: int, scale: Scale, on_steps: Callable[[int], None]) -> SeedResult:
        on_steps(1)
        return {"value": seed + 1.0}

    return Experiment(
        number=number,
        name=name,
        title=f"Title of <{name}>",
        in_short="In short.",
        claim="Values are above a threshold & more.",
        source="A paper",
        refuted_by="Values that are not.",
        run=run_once if run is None else run,
        steps=lambda scale: 1,
        measures=lambda results: [
            Measure("value", "points", [result["value"] for result in results], above),
            Measure("twice", "ratio", [2 * result["value"] for result in results]),
        ],
        figure=figure,
        layers=layers,
    )


def figure(results: Sequence[SeedResult], theme: Theme) -> Figure:
    """A line through the values."""
    drawn, (axes,) = panels(theme, "values")
    axes.plot([result["value"] for result in results], color=theme.blue)
    return drawn


def two_layers(results: Sequence[SeedResult]) -> dict[str, Any]:
    """Distributions that move to the right in three steps."""
    shares = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    layers = [{"name": f"layer {place}", "shares": shares} for place in (1, 2)]
    nets = [
        {"name": f"{name} batch norm", "accuracy": [0.1, 0.5, 0.9], "layers": layers}
        for name in ("without", "with")
    ]
    return {"steps": [0, 10, 1000], "edges": [-3, -1, 1, 3], "axis": "input", "nets": nets}
