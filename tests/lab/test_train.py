"""Training: learns, resumes to the bit, and reports what it says it reports."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from batchnorm.lab.data import Dataset, load
from batchnorm.lab.evaluate import test_accuracy, test_accuracy_by_batch
from batchnorm.lab.nets import NORMS
from batchnorm.lab.recipes import Config, configure
from batchnorm.lab.train import Training, load_dataset

test_accuracy.__test__ = test_accuracy_by_batch.__test__ = False  # measurements, not tests


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits").head(160, 64)


@pytest.fixture(autouse=True)
def _keep_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def numbers(training: Training) -> list[dict[str, Any]]:
    return [{**result.as_dict(), "seconds": None} for result in training.history]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_learns_digits() -> None:
    training = Training(configure("digits", epochs=5), load("digits"))
    while not training.finished:
        training.run_epoch()
    assert training.history[-1].accuracy >= 0.96
    assert training.history[-1].loss < 0.2 < training.history[0].loss


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("recipe", ["tutorial", "fast"])
def test_resumes_to_the_bit(norm: str, recipe: str, digits: Dataset) -> None:
    config = configure("digits", recipe, norm=norm, epochs=4, batch_size=16)
    whole = Training(config, digits)
    for _ in range(4):
        whole.run_epoch()
    first = Training(config, digits)
    for _ in range(2):
        first.run_epoch()
    second = Training(config, digits)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert len(second.history) == 2
    for _ in range(2):
        second.run_epoch()
    assert second.finished
    assert numbers(second) == numbers(whole)
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_seeds_decide_the_numbers(digits: Dataset) -> None:
    config = configure("digits", epochs=1)
    results = []
    for seed in (0, 0, 1):
        training = Training(replace(config, seed=seed), digits)
        training.run_epoch()
        results.append(numbers(training))
    assert results[0] == results[1] != results[2]


def test_torch_and_batchnorm_give_the_same_numbers(digits: Dataset) -> None:
    losses = []
    for norm in ("torch", "batchnorm"):
        training = Training(configure("digits", norm=norm, epochs=2), digits)
        losses.append([training.run_epoch().loss for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_loss_is_the_mean_over_samples_and_the_tutorials_divides_twice(digits: Dataset) -> None:
    # No batch norm and a rate that changes nothing: the loss of every batch is known beforehand.
    config = configure("digits", norm="none", epochs=1, batch_size=48, lr=1e-30, tutorial_protocol=True)
    training = Training(config, digits)
    with torch.no_grad():
        wanted = F.cross_entropy(training.model(digits.train_images), digits.train_labels).item()
    result = training.run_epoch()
    assert training.steps_per_epoch == 4  # 48 + 48 + 48 + 16
    assert result.mean_loss == pytest.approx(wanted, rel=1e-5)
    assert result.loss == pytest.approx(wanted / 48, rel=0.05)
    assert result.accuracy == result.accuracy_eval  # without batch norm both ways of testing are one


def test_the_tutorials_protocol_leaves_the_statistics_alone(digits: Dataset) -> None:
    config = configure("digits", epochs=2)
    plain, protocol = Training(config, digits), Training(replace(config, tutorial_protocol=True), digits)
    for _ in range(2):
        usual, tutorials = plain.run_epoch(), protocol.run_epoch()
        assert tutorials.accuracy_eval == usual.accuracy
        assert tutorials.mean_loss == usual.loss


@pytest.mark.parametrize("batch_size", [16, 21])  # 64 = 3 * 21 + 1: a leftover of one
def test_accuracy_by_batch_normalises_each_batch_by_itself(batch_size: int, digits: Dataset) -> None:
    training = Training(configure("digits", epochs=1), digits)
    training.run_epoch()
    right = 0
    parts = zip(digits.test_images.split(batch_size), digits.test_labels.split(batch_size), strict=True)
    for images, labels in parts:
        training.model.train(len(labels) > 1)
        saved = {name: value.clone() for name, value in training.model.state_dict().items()}
        right += (training.model(images).argmax(1) == labels).sum().item()
        training.model.load_state_dict(saved)
    assert test_accuracy_by_batch(training.model, digits, batch_size) == right / 64


def test_a_single_leftover_sample_is_no_batch() -> None:
    data = load("digits").head(33, 10)
    training = Training(configure("digits", epochs=1, batch_size=16), data)
    assert training.steps_per_epoch == 2
    training.run_epoch()


def test_reports_every_step(digits: Dataset) -> None:
    training = Training(configure("digits", epochs=1, batch_size=4), digits)
    reports: list[int] = []
    training.run_epoch(reports.append)
    assert sum(reports) == training.steps_per_epoch == 40
    assert len(reports) > 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes(dtype: str, digits: Dataset) -> None:
    training = Training(configure("digits", epochs=2, dtype=dtype), digits)
    seen = set()
    training.model.conv[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    first, second = training.run_epoch().loss, training.run_epoch().loss
    assert second < first
    assert getattr(torch, dtype) in seen
    wanted = torch.float64 if dtype == "float64" else torch.float32
    assert {parameter.dtype for parameter in training.model.parameters()} == {wanted}


def test_one_cycle_ends_low_and_peaks_at_lr(digits: Dataset) -> None:
    training = Training(configure("digits", "fast", epochs=2, lr=0.03, batch_size=16), digits)
    rates: list[float] = []
    training.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    while not training.finished:
        training.run_epoch()
    assert len(rates) == 20
    assert rates[-1] < 1e-5
    assert max(rates) == pytest.approx(0.03, rel=0.1)


def test_load_dataset_cuts_and_standardizes() -> None:
    config: Config = configure("digits", "fast", train_samples=100, test_samples=20)
    data = load_dataset(config)
    assert (len(data.train_labels), len(data.test_labels)) == (100, 20)
    assert data.train_images.mean().abs() < 1e-5
    assert load_dataset(replace(config, standardize=False)).train_images.min() >= 0


def test_the_handwritten_layers_statistics_resume_from_the_first_step() -> None:
    data = load("digits").head(18, 300)
    config = configure("digits", norm="handwritten", epochs=3, batch_size=16)
    whole, first, second = (Training(config, data) for _ in range(3))
    for _ in range(3):
        whole.run_epoch()
    for _ in range(2):
        first.run_epoch()
    second.load_state_dict(through_a_file(first.state_dict()))
    second.run_epoch()
    assert numbers(second) == numbers(whole)
