"""What the batch norms were given in a pass over the data, merged over the processes of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.moments import Moments

_NEVER = math.inf


class Seen(NamedTuple):
    """What a layer was given in a pass: how often, how many samples, what, and as which layer to run."""

    times: int
    samples: int
    moments: Moments
    position: float


def check_group(group: Any, verb: str) -> None:
    """Raise unless `group` is None or a process group that this process is in."""
    if group is None:
        return
    if torch.distributed.is_available():
        if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{verb}: this process is not in the group: call it in the group's processes only"
            )
        if isinstance(group, torch.distributed.ProcessGroup):
            return
    raise TypeError(f"{verb}: expected None (this process alone) or a process group, got {group!r}")


def gathered(
    layers: Iterable[_BatchNorm],
    seen: Mapping[_BatchNorm, Seen],
    run: Callable[[], int],
    group: Any,
    verb: str,
) -> tuple[int, dict[_BatchNorm, Seen]]:
    """Call `run`, which fills `seen` and returns its batches; give back those of all processes.

    Raises:
        RuntimeError: `run` failed in another process; where it failed its own error is raised.
    """
    # A process that failed takes part too: the others would wait for it for ever.
    error: Exception | None = None
    batches = 0
    try:
        batches = run()
    except Exception as caught:
        error = caught
    layers = list(layers)
    device = next(layers[0].buffers()).device
    mine = _packed(layers, seen, batches, error is not None).to(device)
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(everyone, mine, group=group)
    if error is not None:
        raise error
    failed = [str(rank) for rank, theirs in enumerate(everyone) if theirs[1] != 0]
    if failed:
        raise RuntimeError(f"{verb}: failed in process {', '.join(failed)} of the group, see the error there")
    return int(sum(theirs[0].item() for theirs in everyone)), _unpacked(layers, everyone)


def _packed(layers: list[_BatchNorm], seen: Mapping[_BatchNorm, Seen], batches: int, failed: bool) -> Tensor:
    """One float64 vector: batches, failed, and per layer times, samples, position, count, mean and m2."""
    numbers = [torch.tensor([batches, failed], dtype=torch.float64)]
    for layer in layers:
        if failed or layer not in seen:
            numbers.append(torch.tensor([0, 0, _NEVER, *[0] * 3 * layer.num_features], dtype=torch.float64))
            continue
        times, samples, moments, position = seen[layer]
        numbers.append(torch.tensor([times, samples, position], dtype=torch.float64))
        per_channel = moments.count.expand_as(moments.mean), moments.mean, moments.m2
        numbers += [tensor.to("cpu", torch.float64) for tensor in per_channel]
    return torch.cat(numbers)


def _unpacked(layers: list[_BatchNorm], everyone: list[Tensor]) -> dict[_BatchNorm, Seen]:
    merged, start = {}, 2
    for layer in layers:
        width = 3 + 3 * layer.num_features
        parts = torch.stack([numbers[start : start + width] for numbers in everyone])
        start += width
        times = int(parts[:, 0].sum())
        if times:
            moments = Moments(*parts[:, 3:].unflatten(1, (3, -1)).unbind(1)).merge_dim(0)
            merged[layer] = Seen(times, int(parts[:, 1].sum()), moments, float(parts[:, 2].min()))
    return merged
