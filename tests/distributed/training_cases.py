"""What a set of processes checks together about the lab's training: it is that of one process."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.lab.data import Dataset, load
from batchnorm.lab.processes import ALONE, FailedElsewhere, ProcessError, World, as_on_rank_0, parallel
from batchnorm.lab.recipes import Config, configure
from batchnorm.lab.train import Training, test_accuracy
from tests.distributed.cases import assert_near, case


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())


def digits(train: int = 67, test: int = 41) -> Dataset:
    return load("digits").head(train, test)


def settings(**changes: object) -> Config:
    """Of 67 images the last batch has 3: uneven over two processes, and too few for three."""
    return configure("digits", epochs=4, batch_size=16, dtype="float64", **changes)  # type: ignore[arg-type]


def run(training: Training, epochs: int) -> Training:
    for _ in range(epochs):
        training.run_epoch()
    return training


def assert_same(ours: Training, wanted: Training) -> None:
    # Losses are summed in float32. Before a batch norm a bias has a gradient of rounding, of which Adam makes
    # steps as large as any, and the running mean follows it: neither changes what training computes.
    assert [result.loss for result in ours.history] == pytest.approx(
        [result.loss for result in wanted.history], rel=1e-6
    )
    for name, tensor in wanted.model.state_dict().items():
        if name.endswith(("weight", "running_var", "tracked")):
            assert_near(ours.model.state_dict()[name], tensor, 1e-9, name)


@case(2, 3)
def synchronised_training_is_that_of_one_process() -> None:
    for changes in ({}, {"tutorial_protocol": True, "activation": "relu"}):
        whole = run(Training(settings(**changes), digits()), 2)
        assert_same(run(Training(settings(sync=True, **changes), digits(), world()), 2), whole)


@case(2, 3)
def training_resumes_on_another_number_of_processes() -> None:
    data, config = digits(), settings(sync=True)
    whole = run(Training(settings(), data), 4)
    training = run(Training(replace(config, sync=False), data), 1)
    for its_world, epochs in ((world(), 2), (ALONE, 1)):
        state = copy.deepcopy(training.state_dict())
        training = Training(replace(config, sync=not its_world.alone), data, its_world)
        training.load_state_dict(state)
        run(training, epochs)
    assert_same(training, whole)


@case(2, 3)
def training_with_statistics_of_their_own_resumes() -> None:
    """The last batch leaves a process without samples; all end each epoch with the same statistics.

    To the bit in two processes. For more, DDP adds up in another order in the first step than later.
    """
    data, config = digits(train=66), settings()
    whole = run(Training(config, data, world()), 4)
    first = run(Training(config, data, world()), 2)
    second = Training(config, data, world())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, 2)
    assert_same(second, whole)
    for name, tensor in whole.model.state_dict().items():
        assert dist.get_world_size() > 2 or torch.equal(second.model.state_dict()[name], tensor), name
        of_rank_0 = tensor.clone()
        dist.broadcast(of_rank_0, 0)
        assert torch.equal(tensor, of_rank_0), name


@case(2, 3)
def gradients_are_those_of_the_mean_loss_of_the_whole_batch() -> None:
    """Without a norm the processes share nothing else: any size of batch, parts without samples included."""
    for samples in (2, 3, 5, 16):
        config = settings(norm="none")
        one = Training(config, digits())
        ours = Training(config, digits(), world())
        ours._parallel = parallel(ours.model)
        chosen = torch.arange(samples)
        part = world().shard(chosen)
        assert len(part) != 1
        data = one.dataset
        wanted = one._step(data.train_images[chosen], data.train_labels[chosen])
        loss = world().add(ours._step(data.train_images[part], data.train_labels[part], samples))
        assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
        for parameter, theirs in zip(ours.model.parameters(), one.model.parameters(), strict=True):
            assert_near(parameter.grad, theirs.grad, 1e-11, f"{samples} samples")


@case(2, 3)
def accuracy_is_exact_for_any_test_set() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), bn.BatchNorm1d(10, sync=True))
    for samples in (1, 2, 7, 360):
        data = digits(test=samples)
        assert test_accuracy(model, data, world()) == test_accuracy(model, data)


@case(2)
def what_fails_in_one_process_fails_in_all_and_is_said_once() -> None:
    rank = dist.get_rank()
    with world().together():
        pass
    for failing in ((0,), (1,), (0, 1)):
        expected = {0: ValueError, 1: ProcessError}[rank] if rank == failing[0] else FailedElsewhere
        error = ValueError("no data") if rank in failing else None
        with pytest.raises(expected):
            fail_together(error)


def fail_together(error: Exception | None) -> None:
    """As the commands do: the input is looked at in a block of its own."""
    with world().together(), world().together():
        if error is not None:
            raise error


@case(2)
def a_model_is_given_to_all_where_they_are_alike() -> None:
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(2, 2)
    as_on_rank_0(model)
    torch.manual_seed(0)
    torch.testing.assert_close(model.state_dict(), nn.Linear(2, 2).state_dict(), rtol=0, atol=0)
    for other in (
        nn.Linear(2, 3),
        nn.Linear(2, 2).double(),
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    ):
        with pytest.raises(ValueError, match=r"different models, rank 1 from rank 0: rank 0 has .*weight"):
            as_on_rank_0(other if dist.get_rank() == 1 else model)


@case(2)
def handwritten_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="handwritten trains in one process"):
        Training(settings(norm="handwritten"), digits(), world())
    with pytest.raises(ValueError, match="one for all 2 processes"):
        world().device("mps")
