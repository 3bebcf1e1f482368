"""Comparison: what the rows hold, and that runs equal those of `train`."""

import json
from dataclasses import replace

import pytest

from batchnorm.lab import figures
from batchnorm.lab.compare import Spread, compare
from batchnorm.lab.data import load
from batchnorm.lab.recipes import configure
from batchnorm.lab.train import Training


def test_rows_equal_single_runs_and_torch_is_the_measure() -> None:
    config = configure("digits", epochs=2, seed=5)
    data = load("digits").head(96, 48)
    steps: list[int] = []
    result = compare(config, data, ["torch", "batchnorm", "handwritten"], 2, steps.append)
    assert [row.norm for row in result.rows] == ["torch", "batchnorm", "handwritten"]
    assert sum(steps) == 2 * 3 * 2 * 6
    assert result.rows[0].relative_speed == 1
    for row in result.rows:
        for k, accuracies in enumerate(row.accuracy_per_epoch):
            single = Training(replace(config, norm=row.norm, seed=5 + k), data)
            assert accuracies == [single.run_epoch().accuracy for _ in range(2)]
        assert row.accuracy == Spread.of([accuracies[-1] for accuracies in row.accuracy_per_epoch])
        assert 0 <= row.accuracy_by_batch.mean <= 1
        leaks = row.norm == "handwritten"
        assert (row.memory.graph_nodes > 0) == leaks
    assert json.loads(json.dumps(result.as_dict()))["rows"][1]["norm"] == "batchnorm"
    assert figures.comparison(result).startswith(b"\x89PNG")


def test_speed_is_relative_to_the_first_norm_without_torch() -> None:
    config = configure("digits", epochs=1)
    result = compare(config, load("digits").head(32, 16), ["batchnorm", "none"], 1)
    assert result.rows[0].relative_speed == 1


def test_spread() -> None:
    assert Spread.of([0.25]) == Spread(0.25, 0.0)
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.spread) == (2.0, 1.0)
    assert str(spread) == "2.000 ± 1.000"
    assert Spread.of([1.0, 1.0]).spread == pytest.approx(0)
