"""What processes check together about batches that are empty, masked or not finite on some of them."""

import copy
import itertools
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.lab.nets import LeNet
from tests.distributed.cases import C, case
from tests.distributed.model_cases import synchronised


@case(2, 3)
def all_empty() -> None:
    layer = bn.BatchNorm1d(C, sync=True)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0, C, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, C)
    assert_close([p.grad for p in layer.parameters()], [torch.zeros(C)] * 2, rtol=0, atol=0)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


@case(2)
def an_empty_batch_in_a_network() -> None:
    torch.manual_seed(0)
    one = LeNet()
    two = DistributedDataParallel(synchronised(copy.deepcopy(one)))
    images, labels = torch.randn(6, 1, 28, 28), torch.randint(10, (6,))
    nn.functional.cross_entropy(one(images), labels, reduction="sum").backward()
    mine = slice(6) if dist.get_rank() == 0 else slice(0)
    nn.functional.cross_entropy(two(images[mine]), labels[mine], reduction="sum").backward()
    for (name, ours), wanted in zip(two.module.named_parameters(), one.parameters(), strict=True):
        # Before a batch norm a bias has no gradient but rounding.
        assert_close(
            2 * ours.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@case(2)
def a_mask_on_some_processes() -> None:
    layer = bn.BatchNorm1d(C, sync=True, momentum=None, correction=0)
    x = torch.arange(6.0)[:, None].expand(6, C)
    if dist.get_rank() == 0:
        layer(x, mask=torch.tensor([1, 1, 0, 0, 0, 0])[:, None])
    else:
        layer(x[4:])
    assert_close(layer.running_mean, torch.full((C,), 2.5))


@case(2)
def values_that_are_not_finite_on_one_process_are_skipped_by_all() -> None:
    rank = dist.get_rank()
    for bad in (torch.nan, torch.inf):
        torch.manual_seed(rank)
        layer = bn.BatchNorm1d(C, sync=True, skip_nonfinite=True)
        layer(torch.randn(4, C) + rank)
        before = copy.deepcopy(layer.state_dict())
        x = torch.randn(4, C)
        x[0, 0] = bad if rank == 1 else 1.0
        y = layer(x)
        assert y[:, 0].isnan().all()
        assert y[:, 1:].isfinite().all()
        assert_close(layer.state_dict(), before, rtol=0, atol=0)
        layer(torch.randn(4, C))
        assert layer.num_batches_tracked == 2


@case(2)
def what_lies_under_a_mask_spoils_no_gradient() -> None:
    torch.manual_seed(dist.get_rank())
    x, residual, mask = torch.randn(4, C, 6), torch.randn(4, C, 6), torch.rand(4, 1, 6) > 0.4
    for padding, activation in itertools.product((math.nan, -math.inf), (None, "silu")):
        layer = bn.BatchNorm1d(C, sync=True, activation=activation)
        found = []
        for filling in (0.0, padding) if dist.get_rank() == 0 else (0.0, 0.0):  # on one process
            leaves = [x.where(mask, filling).requires_grad_(), residual.clone().requires_grad_()]
            y = layer(*leaves, mask=mask)
            assert torch.equal(y.isfinite(), mask.expand_as(y) | (filling == 0))
            leaves += layer.parameters()
            loss = y.where(mask, 0).pow(3).sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(first[0].where(mask, 0).pow(2).sum(), [*leaves[:1], layer.weight])
            found.append([*first, *second])
        assert_close(found[1], found[0])
