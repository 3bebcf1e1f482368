"""What processes check together about recalibrate: all have the statistics of all the data, or none."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from batchnorm.model import ranks
from tests.distributed.cases import case


class Backwards(nn.Module):
    """Its layers are not called in the order in which they are listed."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.last, self.mix = nn.BatchNorm1d(features), nn.Linear(3, features)
        self.first = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)).tanh())


def model_and_data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Backwards().double(), torch.randn(50, 3).double() * 5 + 100


def dealt(x: Tensor) -> list[Tensor]:
    """Two batches of one rank, one of the next, none of a third."""
    return [list(x[:40].split([7, 33])), [x[40:]], []][dist.get_rank()]


def recalibrated(model: nn.Module, loader: Any, **options: Any) -> nn.Module:
    return bn.recalibrate(model, loader, group=dist.group.WORLD, **options)


def fails(model: Any, loader: Any, errors: dict[int, tuple[type[Exception], str]]) -> None:
    """With an error of each rank, by default that of -1; the model is as it was."""
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    error, message = errors.get(dist.get_rank(), errors[-1])
    with pytest.raises(error, match=message):
        recalibrated(model, loader)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


@case(2, 3)
def all_end_with_the_statistics_of_all_the_data() -> None:
    model, x = model_and_data()
    wanted = bn.recalibrate(copy.deepcopy(model), [x], sequential=True)
    recalibrated(model, dealt(x), sequential=True)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model.last, name), getattr(wanted.last, name))
        torch.testing.assert_close(getattr(model.first, name), getattr(wanted.first, name))
    assert model.first.num_batches_tracked == 3
    recalibrated(DistributedDataParallel(model), dealt(x))
    torch.testing.assert_close(model.first.running_var, wanted.first.running_var)
    recalibrated(model, [x] if dist.get_rank() == 1 else [])
    assert model.last.num_batches_tracked == 1
    alone = x[20 * dist.get_rank() :][:20]
    bn.recalibrate(model, [alone])  # without a group: this process alone
    torch.testing.assert_close(model.first.running_mean, alone.mean(0))
    dist.barrier()


@case(2, 3)
def what_fails_in_one_process_fails_in_all() -> None:
    def broken() -> Iterator[Tensor]:
        yield x
        raise OSError("disk")

    def elsewhere(said: str) -> tuple[type[Exception], str]:
        return RuntimeError, f"^recalibrate: failed on rank 1: {said}"

    model, x = model_and_data()
    one = dist.get_rank() == 1
    fails(model, [], {-1: (ValueError, "the loader is empty")})
    fails(model, broken() if one else dealt(x), {1: (OSError, "disk"), -1: elsewhere("OSError: disk")})
    fails(model, 3 if one else dealt(x), {1: (TypeError, "an iterable"), -1: elsewhere("TypeError: recal")})
    fails(3 if one else model, dealt(x), {1: (TypeError, "a model"), -1: elsewhere("TypeError: recal")})
    # Statistics of the others that its layer cannot hold
    layer = nn.BatchNorm1d(3).half() if one else nn.BatchNorm1d(3)
    fails(
        nn.Sequential(layer),
        [] if one else [x.float() * 1e4],
        {1: (ValueError, "not finite .in float16"), -1: elsewhere("ValueError: recalibrate: the mean of")},
    )
    recalibrated(model, dealt(x))
    assert model.first.num_batches_tracked == 3


@case(2, 3)
def what_one_rank_has_goes_to_all_in_pieces() -> None:
    def own() -> Any:
        assert dist.get_rank() == 1
        return [torch.arange(100), ("a", None)]

    before = ranks._PIECE
    ranks._PIECE = 7
    try:
        numbers, rest = ranks.Ranks(dist.group.WORLD, "test").from_one(1, own)
    finally:
        ranks._PIECE = before
    assert torch.equal(numbers, torch.arange(100))
    assert rest == ("a", None)


@case(2, 3)
def models_that_differ_are_told_apart() -> None:
    last = dist.get_world_size() - 1
    others = "rank 0" if last == 1 else "ranks 0 and 1"
    model, x = model_and_data()
    other = Backwards(4).double() if dist.get_rank() == last else model
    fails(
        other,
        dealt(x),
        {
            -1: (
                ValueError,
                rf"the models differ, rank {last} from {others}: rank 0 has last of shape \(3,\) where rank "
                rf"{last} has last of shape \(4,\)",
            )
        },
    )
    frozen = copy.deepcopy(model)
    if dist.get_rank() == last:
        bn.freeze(frozen.last)
    fails(frozen, dealt(x), {-1: (ValueError, f"the models differ, rank {last} from {others}: rank 0 has")})
