"""Training in several processes: who takes part, by torchrun's environment, and what they do together."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.checks import first_line
from batchnorm.layers import _BatchNorm
from batchnorm.model import merge_running_statistics
from batchnorm.model.ranks import Ranks, first_difference

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A process that is stopped but not dead: the others give up after so long.
_TIMEOUT = timedelta(minutes=10)
_FEWEST_SAMPLES = 2  # one has no variance


class ProcessError(Exception):
    """What went wrong in one process of several, that only this one can tell."""


class FailedElsewhere(Exception):
    """Another process has failed, and says why itself."""


@dataclass(frozen=True)
class World:
    """The processes of a run: how many, and which of them this one is, on all machines and on this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun says; one process where it says nothing. ValueError for what is no number."""
        if not all(name in os.environ for name in _ENVIRONMENT):
            return cls()
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        return cls(rank, size, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size))

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def device(self, device: str) -> torch.device:
        """The device of this process: of "cuda" a GPU each. ValueError where there are too few."""
        if self.alone or device == "cpu":
            return torch.device(device)
        if device != "cuda":
            raise ValueError(
                f"device {device!r} is one for all {self.size} processes: give cuda, a GPU for each, or cpu"
            )
        if self.local_size > torch.cuda.device_count():
            raise ValueError(
                f"{self.local_size} processes on a machine with {torch.cuda.device_count()} GPUs: each needs "
                "one of its own. Start fewer, or give --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def shard(self, batch: Tensor) -> Tensor:
        """This process's part of a batch: evenly, two samples or more, or none where there are too few."""
        parts = min(self.size, len(batch) // _FEWEST_SAMPLES)
        return batch.tensor_split(parts)[self.rank] if self.rank < parts else batch[:0]

    def add(self, numbers: Tensor) -> Tensor:
        """Replace `numbers` by their sum over the processes."""
        if not self.alone:
            dist.all_reduce(numbers)
        return numbers

    def finish_in_peace(self) -> None:
        """Let torchrun's SIGTERM not cut short what this process, which ends, has to write and say."""
        if not self.alone:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside in one process fails in all, so that none waits for it.

        Raises:
            FailedElsewhere: in all but the first of the processes that failed.
            ProcessError: in that one, when it is not rank 0 and the error is one of input.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.alone:
                raise
            error = caught
        if self.alone:
            return
        own = error is not None and not is_of_another_process(error)
        first = torch.tensor(self.rank if own else self.size)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        if first == self.size and error is None:
            return
        if error is None or first < self.rank or not own:
            raise FailedElsewhere from error
        if self.rank > 0 and isinstance(error, ValueError | OSError):
            raise ProcessError(f"rank {self.rank}: {error}") from error
        raise error


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun has started, with their group, gloo's on CPUs and NCCL's on GPUs.

    Each gets its share of the cores as torch's threads. SIGTERM, by which torchrun ends those that are left,
    becomes a KeyboardInterrupt. In a process that is alone nothing happens.

    Raises:
        ProcessError: the others cannot be reached.
    """
    world = World.from_environment()
    if world.alone:
        yield world
        return
    # Its functions take the default group as a default argument. Imported later, by the compiler or by
    # DistributedDataParallel, they would keep the group past the end of Python, where a thread of gloo's
    # that still holds a tensor aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    torch.set_num_threads(max(1, _cores() // world.local_size))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"rank {world.rank} cannot join the {world.size} processes at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {first_line(error)}"
        ) from error
    try:
        yield world
        # DistributedDataParallel holds the group, in a cycle. As the last to hold it, it would end gloo's
        # threads without letting go of the GIL, for which one of them may be waiting (pytorch/pytorch#56297).
        gc.collect()
        # Not after an error: it would wait for processes that are gone.
        dist.destroy_process_group()
    except BaseException:
        world.finish_in_peace()
        raise
    signal.signal(signal.SIGTERM, before)


def is_rank_0() -> bool:
    """Whether this process speaks for all: it is rank 0, or alone, or its rank cannot be read."""
    rank = os.environ.get("RANK", "0")
    return not all(name in os.environ for name in _ENVIRONMENT) or not rank.isdecimal() or int(rank) == 0


def is_of_another_process(error: Exception) -> bool:
    """Whether an error says no more than that another process has failed, or did not come."""
    signs = "gloo", "all-reduce over the processes", "the exchange between", ": failed on rank"
    return isinstance(error, dist.DistError | FailedElsewhere) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def parallel(model: nn.Module) -> DistributedDataParallel:
    """The model with gradients averaged over the processes, and buffers that stay each process's own."""
    accepted = inspect.signature(DistributedDataParallel).parameters
    # Renamed in torch 2.13.
    option = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    return DistributedDataParallel(model, **options)


def as_on_rank_0(model: nn.Module) -> None:
    """Give every process the weights of rank 0, where a model may begin with random ones.

    Raises:
        ValueError: in every process: their models are not the same.
    """
    ranks = Ranks(dist.group.WORLD, "broadcast")
    shapes = ranks.together(
        lambda: {
            f"{name} ({str(tensor.dtype).removeprefix('torch.')})": tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
        }
    )
    if any(own != shapes[0] for own in shapes):
        raise ValueError(
            f"the processes have made different models, {first_difference(ranks.names, shapes)}: the factory "
            "must make the same in each"
        )
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)


def merge_statistics(model: nn.Module) -> None:
    """Give all processes the running statistics of all, and the count of batches of rank 0, which saw each.

    So a run that is resumed from rank 0's checkpoint is the one that goes on.
    """
    merge_running_statistics(model)
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Inside, every layer normalises by the batch of this process alone."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    before = [layer.sync for layer in layers]
    for layer in layers:
        layer.sync = False
    try:
        yield
    finally:
        for layer, sync in zip(layers, before, strict=True):
            layer.sync = sync


def _number(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ValueError(f"the environment variable {name} is {value!r}: expected a number, as torchrun sets")
    return int(value)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
