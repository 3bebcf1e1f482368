"""What the batch norms were given in a pass over the data, merged over the processes of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.function_calls import FunctionNorm
from batchnorm.model.packing import sent
from batchnorm.model.ranks import Ranks, first_difference
from batchnorm.moments import Moments
from batchnorm.names import quoted

sent(Moments)

# A batch norm, as a layer or as a function.
Normalises = _BatchNorm | FunctionNorm


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
    names: Mapping[Normalises, str],
    seen: Mapping[Normalises, Seen],
    run: Callable[[], int],
    ranks: Ranks,
    model: nn.Module,
) -> tuple[int, dict[Normalises, Seen]]:
    """Call `run`, which fills `seen` and returns its batches; give back those of all processes.

    Args:
        names: of layers; those that are called as functions have theirs.

    Raises:
        RuntimeError: `run` failed in another process; where it failed its own error is raised.
    """
    if ranks.alone:
        return run(), dict(seen)

    def work() -> tuple[int, dict[str, Any]]:
        batches = run()
        return batches, {name_of(layer, names): tuple(of_layer) for layer, of_layer in seen.items()}

    parts = ranks.together(work)
    layers = {name_of(layer, names): layer for layer in (*names, *seen)}
    merged = {}
    for name in dict.fromkeys([*layers, *(name for _, own in parts for name in own)]):
        of_layer = [Seen(*own[name]) for _, own in parts if name in own]
        if of_layer:
            # A process that has no data has not seen what the others call as functions.
            layer = layers[name] if name in layers else FunctionNorm.named(model, name)
            merged[layer] = _merged(of_layer)
    return sum(batches for batches, _ in parts), merged


def name_of(layer: Normalises, names: Mapping[Normalises, str]) -> str:
    """The qualified name of a layer, or those of the buffers of one that is called as a function."""
    return layer.name if isinstance(layer, FunctionNorm) else names[layer]


def described(layer: Normalises, names: Mapping[Normalises, str]) -> str:
    """The same with its class, for messages."""
    name = name_of(layer, names)
    return f"batch_norm() with {name}" if isinstance(layer, FunctionNorm) else quoted(layer, name)


def _merged(parts: list[Seen]) -> Seen:
    first, *others = [part.moments for part in parts]
    return Seen(
        sum(part.times for part in parts),
        sum(part.samples for part in parts),
        first.merge(*others),
        min(part.position for part in parts),
    )
