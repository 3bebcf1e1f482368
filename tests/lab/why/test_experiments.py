"""Each experiment runs, tiny and on digits: deterministic, with the steps it says, measures and figures."""

import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.lab.why.experiment import Experiment, SeedResult
from batchnorm.lab.why.images import load_images
from batchnorm.lab.why.statistics import Interval
from batchnorm.lab.why.theme import DARK, LIGHT, to_svg

TINY: dict[str, dict[str, Any]] = {
    "sigmoids": {"steps": 12, "looks": 5, "test_images": 50, "probe_images": 50},
    "learning_rates": {"steps": 4, "look_every": 2, "test_images": 50},
    "covariate_shift": {"steps": 6, "look_every": 3, "probe_images": 60, "test_images": 50},
    "scale_invariance": {"steps": 5, "test_images": 100},
    "batch_size": {"train_images": 128, "epochs": 1, "test_images": 50},
    "dropout": {"train_images": 128, "epochs": 1, "test_images": 50},
    "gamma_and_beta": {"train_images": 128, "epochs": 1, "test_images": 50},
    "corruption": {"train_images": 128, "epochs": 1, "test_images": 100},
    "accuracy": {"shape": (2, 3, 8, 16)},
    "moving_average": {"steps": 12, "looks": 5, "population": 1000, "test_images": 50},
}
EACH = pytest.mark.parametrize("name", TINY)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[SeedResult]]]:
    """Two seeds of each, and how many steps they said they did."""
    with pytest.MonkeyPatch.context() as patch:
        no_data = tmp_path_factory.mktemp("no-data")
        patch.setenv("BATCHNORM_DATA", str(no_data))
        load_images.cache_clear()
        found = {}
        for name, tiny in TINY.items():
            module = importlib.import_module(f"batchnorm.lab.why.{name}")
            patch.setitem(module.SETTINGS, "quick", replace(module.SETTINGS["quick"], **tiny))
            steps: list[int] = []
            found[name] = [
                json.loads(json.dumps(module.EXPERIMENT.run(seed, "quick", steps.append))) for seed in (0, 1)
            ]
            assert sum(steps) == 2 * module.EXPERIMENT.steps("quick")
        assert load_images("mnist").name == "digits"
        yield found
    load_images.cache_clear()


def of(name: str) -> Experiment:
    return importlib.import_module(f"batchnorm.lab.why.{name}").EXPERIMENT


@EACH
def test_seeds_differ_and_equal_ones_are_equal(name: str, results: dict[str, list[SeedResult]]) -> None:
    torch.manual_seed(12345)  # whatever the state is
    again = of(name).run(0, "quick", lambda steps: None)
    assert json.loads(json.dumps(again)) == results[name][0]
    assert results[name][0] != results[name][1]


@EACH
def test_measures_have_a_value_per_seed_and_some_decide(
    name: str, results: dict[str, list[SeedResult]]
) -> None:
    measures = of(name).measures(results[name])
    assert any(measure.above is not None for measure in measures)
    assert len({measure.name for measure in measures}) == len(measures)
    for measure in measures:
        assert len(measure.values) == 2, measure.name
        assert all(isinstance(value, float | int) for value in measure.values)


@EACH
def test_figures_can_be_drawn(name: str, results: dict[str, list[SeedResult]]) -> None:
    for theme in (LIGHT, DARK.narrowed()):
        svg = to_svg(of(name).figure(results[name], theme), name)
        assert theme.blue in svg
        assert any(word in svg for word in ("training", "rate", "ratio", "error", "accuracy"))


def test_the_sliders_shares_are_distributions(results: dict[str, list[SeedResult]]) -> None:
    shown = of("sigmoids").layers(results["sigmoids"])
    assert [net["name"] for net in shown["nets"]] == ["without batch norm", "with batch norm"]
    for net in shown["nets"]:
        assert len(net["accuracy"]) == len(shown["steps"])
        for layer in net["layers"]:
            assert len(layer["shares"]) == len(shown["steps"])
            for shares in layer["shares"]:
                assert len(shares) == len(shown["edges"]) - 1
                assert sum(shares) == pytest.approx(1, abs=0.01)


def test_scale_invariance_is_exact_with_batch_norm_alone(results: dict[str, list[SeedResult]]) -> None:
    for result in results["scale_invariance"]:
        assert result["with"]["off_90"] < 1e-6 < result["without"]["off_90"]
        assert result["with"]["same_if_longer"] == result["with"]["same_if_held"] == 100
        assert result["without"]["same_if_longer"] < 90


def test_batch_norms_inputs_hardly_shift_and_noise_shifts_them(results: dict[str, list[SeedResult]]) -> None:
    for result in results["covariate_shift"]:
        assert max(result["with"]["shift"]) < 0.1 < min(result["noisy"]["shift"])


def test_estimates_of_a_moving_average() -> None:
    module = importlib.import_module("batchnorm.lab.why.moving_average")
    batches = torch.tensor([[[1.0], [2.0]], [[2.0], [4.0]], [[6.0], [6.0]]])
    plain, usual = module.Estimate(None, corrected=False), module.Estimate(0.5, corrected=False)
    corrected = module.Estimate(0.5, corrected=True)
    for batch in batches:
        for estimate in (plain, usual, corrected):
            estimate.update(batch)
    assert plain.value().flatten().tolist() == pytest.approx([3, 4])
    assert usual.value().flatten().tolist() == pytest.approx([3.625, 4.375])  # from 0 and 1
    assert corrected.value().flatten().tolist() == pytest.approx([3.625 / 0.875, 4.25 / 0.875])


def test_experiments_are_finite_where_nothing_diverges(results: dict[str, list[SeedResult]]) -> None:
    for name in ("sigmoids", "moving_average"):
        deciding = [m for m in of(name).measures(results[name]) if m.above is not None]
        assert all(math.isfinite(Interval.of(measure.values).mean) for measure in deciding)


def test_the_real_data_are_used_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    for split in ("train", "t10k"):
        images = torch.arange(2 * 28 * 28, dtype=torch.int64).remainder(256).to(torch.uint8)
        header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (2, 28, 28))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + bytes(images.tolist()))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 4]))
    monkeypatch.setenv("BATCHNORM_DATA", str(tmp_path))
    load_images.cache_clear()
    loaded = load_images("mnist")
    load_images.cache_clear()
    assert loaded.name == "mnist"
    assert loaded.train_images.mean().item() == pytest.approx(0, abs=1e-5)
