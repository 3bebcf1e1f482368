"""Experiments by seeds: every seed that is done is kept in the output folder, and not done again."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from batchnorm.files import write_atomically
from batchnorm.lab.machine import machine, versions
from batchnorm.lab.why import experiment as ground
from batchnorm.lab.why import theme
from batchnorm.lab.why.experiment import Experiment, Measure, Scale, SeedResult, Verdict
from batchnorm.lab.why.images import load_images
from batchnorm.lab.why.statistics import Interval, verdict

PARTS = "parts"


@dataclass(frozen=True)
class Outcome:
    """What the seeds of an experiment gave.

    `data` is the data set that was used, `seconds` the time of all seeds when they were run.
    """

    experiment: Experiment
    scale: Scale
    data: str | None
    results: list[SeedResult]
    seconds: float

    @cached_property
    def measures(self) -> list[tuple[Measure, Interval]]:
        """The experiment's numbers with their confidence intervals."""
        return [(measure, Interval.of(measure.values)) for measure in self.experiment.measures(self.results)]

    @property
    def verdict(self) -> Verdict:
        """By rule, from the measures."""
        return verdict([measure for measure, _ in self.measures])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite is None."""
        about = self.experiment
        return {
            "number": about.number,
            "name": about.name,
            "title": about.title,
            "claim": about.claim,
            "source": about.source,
            "refuted_by": about.refuted_by,
            "verdict": self.verdict,
            "data": self.data,
            "seeds": len(self.results),
            "seconds": round(self.seconds, 1),
            "measures": [
                {
                    "name": measure.name,
                    "unit": measure.unit,
                    "above": measure.above,
                    "mean": _finite(interval.mean),
                    "low": _finite(interval.low),
                    "high": _finite(interval.high),
                    "values": [_finite(value) for value in measure.values],
                }
                for measure, interval in self.measures
            ],
        }


def run(
    experiments: Sequence[Experiment],
    seeds: int,
    scale: Scale,
    folder: Path,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> list[Outcome]:
    """Run the seeds 0 to `seeds - 1` of each experiment, but for those that the folder has already.

    A seed's result is reused where experiment, source, scale, data set and library versions are the same.

    Args:
        folder: gets a file per seed in `parts`, written whole as soon as the seed is done.
        on_steps: told how many of the experiments' steps were done or need not be.
    """
    parts = folder / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    # All of them now: files may be edited while the first ones run.
    sources = [_source_of(inspect.getmodule(experiment.run)) for experiment in experiments]
    with _one_thread():
        return [
            _run(experiment, source, seeds, scale, parts, on_steps)
            for experiment, source in zip(experiments, sources, strict=True)
        ]


def results_json(outcomes: Sequence[Outcome]) -> bytes:
    """All numbers, with versions and machine."""
    content = {
        "scale": outcomes[0].scale,
        "experiments": [outcome.as_dict() for outcome in outcomes],
        "versions": versions(),
        "machine": machine(),
    }
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _run(
    experiment: Experiment,
    source: str,
    seeds: int,
    scale: Scale,
    parts: Path,
    on_steps: Callable[[int], None],
) -> Outcome:
    data = None if experiment.data is None else load_images(experiment.data).name
    finished = []
    for seed in range(seeds):
        path = parts / f"{experiment.name}-{scale}-{seed}.json"
        key = {
            "experiment": experiment.name,
            "source": source,
            "scale": scale,
            "seed": seed,
            "data": data,
            "versions": versions(),
        }
        part = _read(path, key)
        if part is None:
            part = _measured(experiment, seed, scale, key, on_steps)
            write_atomically(path, json.dumps(part).encode())
        else:
            on_steps(experiment.steps(scale))
        finished.append(part)
    seconds = sum(part["seconds"] for part in finished)
    return Outcome(experiment, scale, data, [part["result"] for part in finished], seconds)


def _measured(
    experiment: Experiment, seed: int, scale: Scale, key: dict[str, Any], on_steps: Callable[[int], None]
) -> dict[str, Any]:
    start = time.perf_counter()
    result = experiment.run(seed, scale, on_steps)
    # Through JSON, so that a result is the same now and when it is read again.
    part: dict[str, Any] = json.loads(json.dumps({"key": key, "result": result}))
    part["seconds"] = time.perf_counter() - start
    return part


def _read(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The part in a file, or None where it is missing, broken, or of something else."""
    try:
        part = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(part, dict) and part.get("key") == key and {"result", "seconds"} <= part.keys()
    return part if whole else None


def _source_of(module: ModuleType | None) -> str:
    """A sum over the code of an experiment and of what it uses of this package, without the docstrings."""
    assert module is not None
    package = __name__.rpartition(".")[0]
    origins = {getattr(value, "__module__", None) or module.__name__ for value in vars(module).values()}
    used = {name for name in origins if name.startswith(f"{package}.")}
    names = sorted((used | {module.__name__}) - {theme.__name__, ground.__name__})
    trees = (ast.parse(inspect.getsource(importlib.import_module(name))) for name in names)
    return hashlib.sha256("".join(_code(tree) for tree in trees).encode()).hexdigest()[:16]


def _code(tree: ast.Module) -> str:
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    return "\n".join(map(ast.unparse, body))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """The networks are small: threads would wait for each other, and sums would depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
