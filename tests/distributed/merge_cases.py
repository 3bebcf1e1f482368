"""What a set of processes checks together about merge_running_statistics."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import merge_running_statistics
from tests.distributed.cases import C, assert_near, case, recorded


@case(2, 3)
def merged_running_statistics_are_those_of_all_batches() -> None:
    k, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(rank)
    # Means far apart, so that their spread is most of the variance; the last process sees fewer batches.
    seen = 3 if rank < k - 1 else 1
    batches = torch.randn(seen, 16, C) * 2 + 100 * rank + 1e4
    model = nn.Sequential(
        bn.BatchNorm1d(C, momentum=None, correction=0), nn.Identity(), nn.BatchNorm1d(C), bn.BatchNorm1d(C)
    )
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for batch in batches:
        model[0](batch)
        model[2](batch)
    counts: list[Any] = [None] * k
    dist.all_gather_object(counts, (seen, model[0].running_mean, model[0].running_var, model[2].running_var))
    untrained = copy.deepcopy(model[3].state_dict())
    assert merge_running_statistics(model) is model
    weights = torch.tensor([n for n, *_ in counts], dtype=torch.float64)[:, None] / sum(n for n, *_ in counts)
    means, variances = (torch.stack([c[i] for c in counts]).double() for i in (1, 2))
    mean = (weights * means).sum(0)
    assert_near(model[0].running_mean, mean, 1e-7, "mean")
    assert_near(model[0].running_var, (weights * (variances + (means - mean) ** 2)).sum(0), 1e-7, "var")
    assert (model[2].running_var > counts[0][3]).all()
    assert_close(model[3].state_dict(), untrained, rtol=0, atol=0)
    assert model[0].num_batches_tracked == seen
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    once = copy.deepcopy(model.state_dict())
    merge_running_statistics(model)
    assert_close(model.state_dict(), once)

    # A cumulative average goes on: after more batches and another merge it is still that of all.
    more = torch.randn(2, 16, C) + rank
    for batch in more:
        model[0](batch)
    merge_running_statistics(model)
    everything = [None] * k
    dist.all_gather_object(everything, torch.cat([batches, more]))
    assert_near(model[0].running_mean, torch.cat(everything).double().mean((0, 1)), 1e-6, "all batches")


@case(2)
def a_merge_that_fails_fails_everywhere_and_changes_nothing() -> None:
    rank = dist.get_rank()
    one_is_lazy = bn.LazyBatchNorm1d() if rank == 1 else bn.BatchNorm1d(C)
    models = {
        "differ": nn.Sequential(bn.BatchNorm1d(C), bn.BatchNorm1d(C + rank)),
        "lazy": nn.Sequential(bn.BatchNorm1d(C), one_is_lazy),
    }
    for reason, model in models.items():
        model[0](torch.randn(4, C) + rank)
        before = copy.deepcopy(model[0].state_dict())
        with pytest.raises(ValueError, match=f"merge_running_statistics.*(?i:{reason})"):
            merge_running_statistics(model)
        assert_close(model[0].state_dict(), before, rtol=0, atol=0)
    with torch.inference_mode():
        mean = torch.zeros(C)
    broken = nn.Sequential(bn.BatchNorm1d(C), bn.BatchNorm1d(C))
    for layer in broken:
        layer(torch.randn(4, C) + rank)
    broken[1].running_mean = mean  # nothing can be written into it outside of inference mode
    before = copy.deepcopy(broken.state_dict())
    with pytest.raises(RuntimeError, match="inference"):
        merge_running_statistics(broken)
    assert_close(broken.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(TypeError, match="expected a model"):
        merge_running_statistics(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="process group"):
        merge_running_statistics(broken, "gloo")


@case(1)
def a_merge_of_one_process_changes_nothing() -> None:
    model = nn.Sequential(bn.BatchNorm1d(C))
    model(torch.randn(4, C))
    before = copy.deepcopy(model.state_dict())
    with recorded() as calls:
        merge_running_statistics(model)
    assert calls == []
    assert_close(model.state_dict(), before, rtol=0, atol=0)
