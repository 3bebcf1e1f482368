"""What processes check together about errors: the same on all of them, or in time where one is not there."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm as bn
from tests.distributed.cases import C, case


@case(1)
def one_value_per_channel_on_one_process_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"more than 1 value per channel"):
        bn.BatchNorm1d(C, sync=True)(torch.randn(1, C))


@case(2)
def processes_with_few_values() -> None:
    layer = bn.BatchNorm1d(C, sync=True)
    layer(torch.randn(1, C))
    assert layer.num_batches_tracked == 1
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=r"BatchNorm1d '0': .*more than 1 value .*all processes"):
        model(torch.randn(dist.get_rank(), C))
    with pytest.raises(ValueError, match=r"BatchNorm1d '0': .*mask .*is empty"):
        Masked(layer)(torch.randn(3, C), torch.zeros(3, 1))


class Masked(nn.Sequential):
    """A model that hands its layer a mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self[0](x, mask=mask)


@case(2)
def transforms_and_masks_with_gradients_are_errors() -> None:
    layer = bn.BatchNorm1d(C, sync=True)
    with pytest.raises(RuntimeError, match=r"BatchNorm1d: a torch.func transform"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(4, C))
    with pytest.raises(ValueError, match=r"no gradient for its mask"):
        layer(torch.randn(4, C), mask=torch.ones(4, 1, requires_grad=True))


@case(2)
def a_process_that_does_not_come() -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    if dist.get_rank() == 0:
        model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C, sync=group))
        with pytest.raises(
            RuntimeError, match=r"BatchNorm1d '1': the all-reduce .*ranks \[0, 1\] .*on rank 0"
        ):
            model(torch.randn(4, C))
    dist.barrier()


@case(2)
def a_process_that_does_not_come_back() -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C, sync=group))
    y = model(torch.randn(4, C))
    if dist.get_rank() == 0:
        with pytest.raises(
            RuntimeError, match=r"BatchNorm1d '1': the all-reduce .*ranks \[0, 1\] .*on rank 0"
        ):
            y.sum().backward()
    dist.barrier()
