"""The processes of a group, and their sums: what layers that are synchronised communicate by."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.names import describe


class Group:
    """A process group in a layer: copies of the layer share it, a pickle cannot hold it."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __repr__(self) -> str:
        return f"<ranks {dist.get_process_group_ranks(self.group)}>"

    def __deepcopy__(self, memo: Any) -> Group:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a layer with a process group as its sync cannot be pickled, because a group lives in one "
            "process: save model.state_dict(), or set layer.sync = True (the default group) first"
        )


def parse(value: Any) -> bool | Group:
    """What a layer keeps of `value`, its `sync`: False, True (the default group) or a process group."""
    if isinstance(value, bool):
        return value
    if dist.is_available():
        if value is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "this process is not a member of the process group given as sync: give each process a group "
                "that it is in (torch.distributed.new_subgroups), or False"
            )
        if isinstance(value, dist.ProcessGroup):
            return Group(value)
    raise TypeError(
        f"sync={value!r} is not understood: expected True (the default process group), False, or a "
        "torch.distributed process group"
    )


def group_of(sync: bool | Group) -> Any:
    """The process group to communicate with, or None where there is no other process."""
    if sync is False or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if sync is True else sync.group
    return group if dist.get_world_size(group) > 1 else None


class Processes(NamedTuple):
    """The processes of a group, and who adds numbers over them."""

    group: Any
    caller: str

    @classmethod
    def of(cls, group: Any, layer: nn.Module) -> Processes:
        """For a layer. Its name is looked up once: in a backward pass no model is on the stack."""
        name = _names.get(layer)
        if name is None:
            name = _names[layer] = describe(layer)
        return cls(group, name)

    def add(self, numbers: Tensor) -> Tensor:
        """Replace `numbers` by their sum over the processes; RuntimeError where one does not take part."""
        return self._all_reduce(numbers, dist.ReduceOp.SUM)

    def largest(self, numbers: Tensor) -> Tensor:
        """Replace each of `numbers` by the largest that a process has."""
        return self._all_reduce(numbers, dist.ReduceOp.MAX)

    def rank(self) -> int:
        """This process, as all others know it."""
        return dist.get_rank()

    def _all_reduce(self, numbers: Tensor, operation: Any) -> Tensor:
        try:
            dist.all_reduce(numbers, operation, self.group)
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self.group)
            raise RuntimeError(
                f"{self.caller}: the all-reduce over the processes of ranks {ranks} failed on rank "
                f"{self.rank()}. Has one left the loop early, or failed? All must run the same layers "
                "equally often; one that is out of data takes part with an empty batch, x[:0]. The "
                f"backend says: {error}"
            ) from error
        return numbers


_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class Sum(torch.autograd.Function):
    """The sum over processes; the gradient of the sum of every process's loss is summed in turn."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, processes: Processes) -> Tensor:
        """A new tensor, `numbers` added up over the processes; all of them call this."""
        ctx.processes = processes
        return processes.add(numbers.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient added up over the processes, by `Sum`, which can be differentiated in turn."""
        return Sum.apply(grad, ctx.processes), None


def add_moments(moments: Moments, processes: Processes, shared_count: bool) -> Moments:
    """The moments of every process's values together, by one all-reduce.

    What is added is `(n, n*mean, m2 + n*mean**2)`, 2C+1 numbers in float64 (3C where channels have counts of
    their own). The subtraction that follows costs the variance a relative error of about
    `1e-16 * (mean/std)**2`, which is less than what the rounding of float32 inputs has done to it already.
    """
    mean, dtype = moments.mean, moments.count.dtype
    count = moments.count.reshape(-1)[:1] if shared_count else moments.count.expand_as(mean)
    first = moments.count * mean
    sums = processes.add(torch.cat([count, first, moments.m2.to(dtype) + first * mean]))
    channels = mean.numel()
    count, first, second = sums.split([sums.numel() - 2 * channels, channels, channels])
    mean = first / count.where(count > 0, 1)
    m2 = (second - first * mean).clamp_min(0)
    return Moments(count.reshape(()).clone() if shared_count and channels else count.clone(), mean, m2)
