"""What each process has, to be compared: its parameters, its buffers, and the moments of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.doctor.data.layers import Layer
from batchnorm.doctor.data.noise import Population
from batchnorm.model.packing import sent
from batchnorm.model.ranks import Ranks

_SECONDS = 20


@sent
@dataclass(frozen=True, eq=False)
class Process:
    """What one process has.

    Attributes:
        shapes: of its parameters, and the channels of its batch norms, by name.
        checksums: of its parameters, (parameters, 2), float64.
        buffers: their values, by name, float64.
        populations: of each layer's inputs.
    """

    shapes: dict[str, tuple[int, ...]]
    checksums: Tensor
    buffers: dict[str, Tensor]
    populations: dict[str, Population]

    @classmethod
    def of(
        cls, network: nn.Module, layers: Mapping[str, Layer], populations: dict[str, Population]
    ) -> Process:
        """What this process has: shapes, checksums, and the values of buffers of less than 2**20 elements."""
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        for name, layer in layers.items():
            if layer.statistics is not None:
                shapes[f"{name}'s statistics"] = tuple(layer.statistics[0].shape)
        checksums = [_checksum(p) for p in network.parameters()]
        return cls(
            shapes,
            torch.stack(checksums) if checksums else torch.empty(0, 2).double(),
            {name: _double(b).flatten() for name, b in network.named_buffers() if b.numel() < 2**20},
            populations,
        )


@dataclass(frozen=True, eq=False)
class Processes:
    """What the processes have, in the order of their ranks.

    Attributes:
        ranks: their ranks.
        each: what they have; nothing where it could not be gathered.
        failure: why not, or None.
    """

    ranks: list[int]
    each: list[Process] = field(default_factory=list)
    failure: str | None = None

    @property
    def alike(self) -> bool:
        """Whether all have a model of the same structure."""
        return all(process.shapes == self.each[0].shapes for process in self.each)


def gather(mine: Process) -> Processes | None:
    """All processes of the default group call this; None where there is one.

    Raises nothing: a process that does not come within some seconds is a `failure`.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    ranks = Ranks(dist.group.WORLD, "diagnose", timedelta(seconds=_SECONDS))
    missing = _missing()
    if missing is not None:
        return Processes(ranks.names, failure=missing)
    try:
        return Processes(ranks.names, ranks.together(lambda: mine))
    except (RuntimeError, ValueError) as error:
        return Processes(ranks.names, failure=" ".join(str(error).split())[:200])


_meetings = 0


def _missing() -> str | None:
    """Why the processes did not all come here within some seconds, or None.

    They meet in the store, for a collective that others do not join would disturb what they do instead.
    """
    global _meetings
    store = dist.PrefixStore(f"batchnorm.doctor.{_meetings}", dist.distributed_c10d._get_default_store())
    mine = str(dist.get_rank())
    store.set(mine, "here")
    try:
        store.wait([str(rank) for rank in range(dist.get_world_size())], timedelta(seconds=_SECONDS))
    except (RuntimeError, ValueError):
        store.delete_key(mine)
        return (
            f"not all of them called diagnose within {_SECONDS} s; call it in every process to compare them"
        )
    _meetings += 1
    return None


def _checksum(parameter: Tensor) -> Tensor:
    """The sum, and a weighted one that sees an exchange of values; equal bits give equal numbers."""
    values = _double(parameter).flatten()
    weights = torch.arange(1, len(values) + 1, dtype=torch.float64).sqrt()
    return torch.stack([values.sum(), (values * weights).sum()])


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
