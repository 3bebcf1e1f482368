"""What a set of processes checks about communication: what is sent, by whom, and where nothing is."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from tests.distributed import cases
from tests.distributed.cases import C, case, recorded


@case(2, 3, 4)
def one_all_reduce_each_way() -> None:
    layer = bn.BatchNorm2d(C, sync=True, activation="relu")
    x = torch.randn(3, C, 2, 2, requires_grad=True)
    with recorded() as calls:
        y = layer(x)
        assert calls == [(torch.float64, (2 * C + 1) * 8)]
        y.sum().backward()
    assert calls == [(torch.float64, (2 * C + 1) * 8), (torch.float64, 2 * C * 8)]


@case(2)
def counts_per_channel_take_c_more_numbers() -> None:
    layer = bn.BatchNorm1d(C, sync=True)
    with recorded() as calls:
        layer(torch.randn(4, C), mask=torch.ones(4, C))
        layer(torch.randn(4, C), mask=torch.ones(4, 1))
    assert [size for _, size in calls] == [3 * C * 8, (2 * C + 1) * 8]


@case(1, 2)
def no_communication() -> None:
    torch.manual_seed(dist.get_rank())
    x = torch.randn(8, C)
    quiet = {
        "eval": bn.BatchNorm1d(C, sync=True).eval(),
        "eval without statistics": bn.BatchNorm1d(C, sync=True, track_running_stats=False).eval(),
        "ghost": bn.BatchNorm1d(C, sync=True, ghost_batch_size=4),
        "ghost of the whole batch": bn.BatchNorm1d(C, sync=True, ghost_batch_size=8),
        "off": bn.BatchNorm1d(C),
        "a group of one": bn.BatchNorm1d(C, sync=cases.ALONE),
    }
    if dist.get_world_size() == 1:
        quiet |= {"one process": bn.BatchNorm1d(C, sync=True)}
    for what, layer in quiet.items():
        twin = copy.deepcopy(layer)
        twin.sync = False
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        with recorded() as calls:
            y = layer(ours)
            y.square().sum().backward()
        assert calls == [], what
        wanted = twin(theirs)
        wanted.square().sum().backward()
        assert_close((y, ours.grad), (wanted, theirs.grad), rtol=0, atol=0, msg=what)
        assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0, msg=what)


@case(3)
def sub_groups() -> None:
    rank = dist.get_rank()
    layer = bn.BatchNorm1d(C, momentum=1.0, sync=cases.PAIR if rank < 2 else cases.ALONE)
    assert layer.sync is (cases.PAIR if rank < 2 else cases.ALONE)
    x = torch.arange(12.0)[:, None].expand(12, C)[4 * rank : 4 * rank + 4]
    layer(x)
    assert_close(layer.running_mean, torch.full((C,), 3.5 if rank < 2 else 9.5))
    assert "sync=<ranks [0, 1]>" in repr(layer) or rank == 2
    if rank < 2:
        assert copy.deepcopy(nn.Sequential(layer))[0].sync is cases.PAIR
        with pytest.raises(TypeError, match=r"cannot be pickled.*sync = True"):
            pickle.dumps(layer)
    else:
        with pytest.raises(ValueError, match=r"not a member"):
            bn.BatchNorm1d(C, sync=cases.PAIR)


@case(2)
def nothing_is_read_from_a_device() -> None:
    """Where values are not to be looked at, as on a GPU, no operation waits for them."""

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(op.overloadpacket.__name__)
            return op(*args, **(kwargs or {}))

    operations: list[str] = []
    layer = bn.BatchNorm1d(C, sync=True, momentum=None, renorm=True, skip_nonfinite=True, activation="silu")
    x = torch.randn(4, C, requires_grad=True)
    waiting = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
    with Waits():
        layer(x).sum().backward()
    assert waiting & set(operations)
    operations.clear()
    with pytest.MonkeyPatch.context() as patch, Waits():
        patch.setattr("batchnorm.synchronised.values_can_be_read", lambda _: False)
        layer(x).sum().backward()
    assert "rsqrt" in operations
    assert not waiting & set(operations)
