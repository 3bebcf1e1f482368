"""Captured steps: with a stand-in for the CUDA graph that does the work again, the training is that of the
plain loop. The graph itself needs a GPU."""

from copy import deepcopy

import pytest
import torch

from batchnorm.lab import captured
from batchnorm.lab.captured import CapturedSteps
from batchnorm.lab.recipes import configure
from batchnorm.lab.train import Training, load_dataset


def training(**changes):
    config = configure(
        "digits", norm="batchnorm", train_samples=180, test_samples=50, batch_size=8, schedule="constant",
        device="cpu", **changes,
    )  # fmt: skip
    return Training(config, load_dataset(config))


@pytest.fixture
def captures(monkeypatch):
    """Work that was captured: recorded, not done."""
    works = []

    def capture(work):
        works.append(work)
        return work

    monkeypatch.setattr(captured, "capture_graph", capture)
    monkeypatch.setattr(captured, "STEPS_PER_GRAPH", 7)
    return works


def test_an_epoch_of_captured_steps_is_an_epoch(captures):
    plain, other = training(epochs=2), training(epochs=2)
    other._captured = other._make_captured()
    for _ in range(2):
        steps = []
        expected, actual = plain.run_epoch(), other.run_epoch(steps.append)
        assert sum(steps) == 23  # 22 whole batches and one of 4
        assert actual.loss == pytest.approx(expected.loss, rel=1e-6)
        assert actual.accuracy == expected.accuracy
    assert len(captures) == 1
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_resuming_captures_anew(captures):
    one = training(epochs=2)
    one._captured = one._make_captured()
    one.run_epoch()
    other = training(epochs=2)
    other._captured = other._make_captured()
    other.run_epoch()
    other.load_state_dict(deepcopy(one.state_dict()))
    assert one.run_epoch().loss == other.run_epoch().loss
    assert len(captures) == 3


def test_too_few_steps_are_not_captured(captures):
    images, labels = torch.arange(10.0), torch.arange(10)
    seen = []

    def step(images, labels):
        seen.append(labels.tolist())
        return images.sum()

    total, batches = CapturedSteps(step, images, labels, 3).run(labels.flip(0), lambda steps: None)
    assert seen == [[9, 8, 7], [6, 5, 4], [3, 2, 1]]
    assert (total.item(), batches) == (45.0, 3)
    assert captures == []


@pytest.mark.parametrize("changes", [{"schedule": "one-cycle"}, {"norm": "handwritten"}])
def test_what_changes_from_step_to_step_in_python_is_not_captured(changes):
    config = configure("digits", train_samples=50, test_samples=10, device="cpu", **changes)
    assert Training(config, load_dataset(config))._make_captured() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_cuda_graph_trains_as_the_plain_loop():
    def run(with_graph):
        config = configure("digits", batch_size=16, epochs=2, schedule="constant", device="cuda")
        one = Training(config, load_dataset(config))
        assert one._captured is not None
        if not with_graph:
            one._captured = None
        return [one.run_epoch() for _ in range(2)]

    for graphed, plain in zip(run(True), run(False), strict=True):
        assert graphed.loss == pytest.approx(plain.loss, rel=0.05)
        assert graphed.accuracy == pytest.approx(plain.accuracy, abs=0.03)
