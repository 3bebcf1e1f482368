"""Captured steps: with a stand-in for the CUDA graph that does the work again, the training is that of the
plain loop. The graph itself needs a GPU."""

from copy import deepcopy
from functools import partial

import pytest
import torch

from batchnorm.lab import captured
from batchnorm.lab.captured import CapturedSteps
from batchnorm.lab.recipes import configure
from batchnorm.lab.scheduled_adam import ScheduledAdam
from batchnorm.lab.train import Training, load_dataset


def training(**changes):
    settings = {"norm": "batchnorm", "batch_size": 8, "schedule": "constant"} | changes
    config = configure("digits", train_samples=180, test_samples=50, device="cpu", **settings)
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
    assert len(captures) == 2  # seven steps, and one
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
    assert len(captures) == 6


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


@pytest.mark.parametrize("recipe", ["tutorial", "fast"])
def test_a_schedule_is_captured_with_the_numbers_of_the_plain_loop(captures, recipe):
    settings = {"epochs": 3, "schedule": "one-cycle", "recipe": recipe, "dtype": "float64"}
    plain, other = training(**settings), training(**settings)
    other._captured = other._make_captured()
    for epoch in range(3):
        expected, actual = plain.run_epoch(), other.run_epoch()
        assert actual.loss == pytest.approx(expected.loss, rel=1e-9)
        assert actual.accuracy == expected.accuracy
        if epoch == 0:  # goes on from a checkpoint of the plain loop, too
            other.load_state_dict(deepcopy(plain.state_dict()))
    assert len(captures) == 4
    assert other.schedule.state_dict() == plain.schedule.state_dict()
    expected, actual = plain.optimizer.state_dict(), other.optimizer.state_dict()
    assert actual["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(actual["state"], expected["state"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(dict(other.model.state_dict()), dict(plain.model.state_dict()))


def test_scheduled_steps_are_those_of_adam():
    def parameters():
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]

    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30)

    theirs, ours = parameters(), parameters()
    plain, other = torch.optim.Adam(theirs, fused=True), torch.optim.Adam(ours, fused=True)
    schedule, scheduled = one_cycle(plain), ScheduledAdam(other, one_cycle, 30)
    for step in range(30):
        if step == 20:  # as after a checkpoint
            scheduled = ScheduledAdam(other, one_cycle, 30)
            scheduled.go_to(20)
        for one, same in zip(theirs, ours, strict=True):
            one.grad = torch.randn(one.shape)
            same.grad = one.grad.clone()
        plain.step()
        schedule.step()
        scheduled.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_scheduled_step_asks_the_device_for_nothing():
    """A tensor without numbers has none to give, as a device has none to give during a capture."""
    parameter = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.Adam([parameter])
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=3)
    scheduled = ScheduledAdam(optimizer, schedule, 3)
    parameter.grad = torch.ones(3, device="meta")
    scheduled.go_to(1)
    scheduled.step()


def test_what_changes_from_step_to_step_in_python_is_not_captured():
    config = configure("digits", train_samples=50, test_samples=10, device="cpu", norm="handwritten")
    assert Training(config, load_dataset(config))._make_captured() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
def test_a_cuda_graph_trains_as_the_plain_loop(schedule):
    def run(with_graph):
        config = configure("digits", batch_size=16, epochs=2, schedule=schedule, device="cuda")
        one = Training(config, load_dataset(config))
        assert one._captured is not None
        if not with_graph:
            one._captured = None
        return [one.run_epoch() for _ in range(2)]

    for graphed, plain in zip(run(True), run(False), strict=True):
        assert graphed.loss == pytest.approx(plain.loss, rel=0.05)
        assert graphed.accuracy == pytest.approx(plain.accuracy, abs=0.03)
