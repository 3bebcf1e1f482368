"""What a set of processes checks together about torch's Join: processes with batches of another number."""

import copy
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from batchnorm.lab.nets import LeNet
from batchnorm.model.joinable import Joinable
from tests.distributed.cases import assert_near, case


@case(2, 3)
def processes_that_leave_the_loop_early_join() -> None:
    """The model is that of one process, which is given the batches of those that are still there."""
    k, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(4)
    one = LeNet().double()
    model = Joinable(DistributedDataParallel(bn.convert(copy.deepcopy(one), sync=True)))
    batches = [4 - 2 * r if r < 2 else 0 for r in range(k)]  # the last of three has none
    images = torch.randn(4, k, 3, 1, 28, 28, dtype=torch.float64)
    labels = torch.randint(10, (4, k, 3))
    if batches[rank] == 0:
        with pytest.raises(RuntimeError, match=r"rank 2 has had no batch.*example"):
            model.join_hook().main_hook()
        model = Joinable(model.model, example=(images[0, 0],))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (one, model)]
    with Join([model]):
        for step in range(batches[rank]):
            there = sum(step < n for n in batches) * 3
            loss = nn.functional.cross_entropy(model(images[step, rank]), labels[step, rank], reduction="sum")
            optimizers[1].zero_grad()
            (loss * k / there).backward()
            optimizers[1].step()
    for step in range(max(batches)):
        there = [r for r in range(k) if step < batches[r]]
        loss = nn.functional.cross_entropy(
            one(images[step, there].flatten(0, 1)), labels[step, there].flatten()
        )
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
    for name, wanted in one.state_dict().items():
        assert_near(model.model.module.state_dict()[name], wanted, 1e-9, name)


@case(2)
def join_can_end_the_loop_for_all() -> None:
    model = Joinable(
        DistributedDataParallel(bn.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), sync=True))
    )
    steps: list[int] = []

    def train() -> None:
        with Join([model], throw_on_early_termination=True):
            for step in range(1 + 2 * dist.get_rank()):
                model(torch.randn(4, 3)).sum().backward()
                steps.append(step)

    with pytest.raises(RuntimeError, match="exhausted"):
        train()
    assert steps == [0]


@case(2)
def what_is_not_synchronised_cannot_join() -> None:
    with pytest.raises(ValueError, match=r"BatchNorm1d '0' is not synchronised.*sync=True"):
        Joinable(nn.Sequential(bn.BatchNorm1d(3)))
    with pytest.raises(TypeError, match="expected a model"):
        Joinable(3)  # type: ignore[arg-type]


@case(2)
def a_process_that_leaves_without_joining_is_told_of_in_time() -> None:
    """Both directions of a training loop, in a group that gives up after 2 seconds."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    model = bn.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), sync=group)
    start = time.perf_counter()

    def train(steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(4, 3)).sum().backward()

    if dist.get_rank() == 1:
        train(2)
    else:
        with pytest.raises(
            RuntimeError, match=r"BatchNorm1d '1': .*ranks \[0, 1\] failed on rank 0.*left the loop"
        ):
            train(3)
        assert 1 < time.perf_counter() - start < 10
    dist.barrier()
