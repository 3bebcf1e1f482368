"""What the processes of the default group have: checksums of parameters, buffers, moments of data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.doctor.data.noise import Population

_SECONDS = 20


@dataclass(frozen=True, eq=False)
class Processes:
    """A row per process; None in place of what could not be gathered.

    Attributes:
        count: of the processes.
        failure: why nothing was gathered, or None.
        different_models: whether that is because what they have cannot be compared.
        parameters: names, and checksums (processes, parameters, 2).
        buffers: names, and per buffer its values (processes, elements), float64.
        data: per layer the population's mean, var, and the noise of a batch's mean (processes, 3, C), and the
            number of batches of each process.
    """

    count: int
    failure: str | None
    parameters: tuple[list[str], Tensor] | None = None
    buffers: dict[str, Tensor] | None = None
    data: dict[str, tuple[Tensor, list[int]]] | None = None
    different_models: bool = False


def gather(network: nn.Module, populations: dict[str, Population]) -> Processes | None:
    """All processes of the default group call this; None where there is one.

    Raises nothing: a process that does not come within some seconds is a `failure`.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    names = [name for name, _ in network.named_parameters()]
    checksums = torch.stack([_checksum(p) for p in network.parameters()] or [torch.zeros(2).double()])
    buffers = {name: _double(b).flatten() for name, b in network.named_buffers() if b.numel() < 2**20}
    layers = list(populations)
    parts = [checksums.flatten(), *buffers.values()]
    for name in layers:
        seen = populations[name]
        parts += [seen.mean, seen.var, seen.mean_noise, torch.tensor([float(seen.batches)]).double()]
    mine = torch.cat(parts)
    missing = _missing()
    if missing is not None:
        return Processes(dist.get_world_size(), missing)
    try:
        sizes = _all_gather(torch.tensor([float(len(mine)), float(len(layers))]).double())
        if len({tuple(size.tolist()) for size in sizes}) > 1:
            why = "they have different models, or data reached different layers"
            return Processes(len(sizes), why, different_models=True)
        everyone = torch.stack(_all_gather(mine))
    except (RuntimeError, ValueError) as error:
        return Processes(dist.get_world_size(), " ".join(str(error).split())[:200])
    rest = everyone.split([len(part) for part in parts], 1)
    data, start = {}, 1 + len(buffers)
    for name in layers:
        *moments, batches = rest[start : start + 4]
        data[name] = torch.stack(moments, 1), [int(number) for number in batches.flatten()]
        start += 4
    return Processes(
        len(everyone),
        None,
        (names, rest[0].view(len(everyone), -1, 2)),
        dict(zip(buffers, rest[1:], strict=False)),
        data,
    )


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


def _all_gather(mine: Tensor) -> list[Tensor]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = mine.to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    work = dist.all_gather(everyone, mine, async_op=True)
    work.wait(timedelta(seconds=_SECONDS))
    return [theirs.cpu() for theirs in everyone]
