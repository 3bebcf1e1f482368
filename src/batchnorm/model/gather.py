"""What the batch norms were given in a pass over the data, merged over the processes of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.packing import sent
from batchnorm.model.ranks import Ranks, first_difference
from batchnorm.moments import Moments

sent(Moments)


class Seen(NamedTuple):
    """What a layer was given in a pass: how often, how many samples, what, and as which layer to run."""

    times: int
    samples: int
    moments: Moments
    position: int


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


def check_alike(ranks: Ranks, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """Raise a ValueError, in every process, unless all have batch norms of the same names and channels."""
    if any(own != shapes[0] for own in shapes):
        raise ValueError(
            f"{ranks.verb}: expected the same batch norms in every process, but the models differ, "
            f"{first_difference(ranks.names, shapes)}"
        )


def gathered(
    layers: Mapping[_BatchNorm, str], seen: Mapping[_BatchNorm, Seen], run: Callable[[], int], ranks: Ranks
) -> tuple[int, dict[_BatchNorm, Seen]]:
    """Call `run`, which fills `seen` and returns its batches; give back those of all processes.

    Raises:
        RuntimeError: `run` failed in another process; where it failed its own error is raised.
    """
    if ranks.alone:
        return run(), dict(seen)

    def work() -> tuple[int, dict[str, Any]]:
        batches = run()
        return batches, {layers[layer]: tuple(of_layer) for layer, of_layer in seen.items()}

    parts = ranks.together(work)
    merged = {}
    for layer, name in layers.items():
        of_layer = [Seen(*own[name]) for _, own in parts if name in own]
        if of_layer:
            merged[layer] = _merged(of_layer)
    return sum(batches for batches, _ in parts), merged


def _merged(parts: list[Seen]) -> Seen:
    first, *others = [part.moments for part in parts]
    return Seen(
        sum(part.times for part in parts),
        sum(part.samples for part in parts),
        first.merge(*others),
        min(part.position for part in parts),
    )
