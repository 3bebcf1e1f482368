"""The experiments by name and number, in the order of the page; each is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from batchnorm.lab.why.experiment import Experiment

# Number to the module, which is the experiment's name.
NAMES = {
    1: "sigmoids",
    2: "learning_rates",
    3: "covariate_shift",
    4: "scale_invariance",
    5: "moving_average",
    6: "batch_size",
    7: "dropout",
    8: "gamma_and_beta",
    9: "corruption",
    10: "accuracy",
}


def listed() -> str:
    """All of them, as an error or a help text has it."""
    return ", ".join(f"{number} {name}" for number, name in NAMES.items())


def experiment(name: str) -> Experiment:
    """The experiment of a name in NAMES."""
    found = importlib.import_module(f"batchnorm.lab.why.{name}").EXPERIMENT
    assert isinstance(found, Experiment)
    return found


def chosen(asked: Sequence[str]) -> list[Experiment]:
    """The experiments of these names or numbers, each once, in the page's order; all of them for none.

    Raises:
        ValueError: there is no such experiment.
    """
    known = {str(number): name for number, name in NAMES.items()} | {name: name for name in NAMES.values()}
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"no experiment {', '.join(map(repr, unknown))}: expected one of {listed()}")
    wanted = {known[name] for name in asked} or set(NAMES.values())
    return [experiment(name) for name in NAMES.values() if name in wanted]
