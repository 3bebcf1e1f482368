"""merge_running_statistics: one set of running statistics from those that every process kept for itself."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.distributed import Processes, group_of, parse
from batchnorm.model.batch_norms import Model, check_model, has_statistics, is_initialized
from batchnorm.names import quoted


def merge_running_statistics(model: Model, group: Any = None) -> Model:
    """Replace the running statistics of every process by those of all the data they saw together.

    For layers that are not synchronised, before evaluating or saving: DistributedDataParallel keeps those of
    rank 0 alone. With `n` batches seen by a process (its `num_batches_tracked`; 1 each where a layer does not
    count), and sums over the processes,

        mean = sum(n * mean) / sum(n)
        var = sum(n * (var + (mean of the process - mean)**2)) / sum(n)

    which is exact, the spread of the means included (Chan, Golub & LeVeque 1979). Each process's count of
    batches stays, so that a cumulative average (`momentum=None`) goes on exactly, and merging twice is
    merging once. Layers that no process has trained stay as they are. Three all-reduces for the whole
    model, whatever its size; call it in every process of the group. One process alone changes nothing.

    Args:
        model: changed in place; torch.nn's batch norms in it are merged too.
        group: a process group, or None, the default one.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module, or not a process group.
        ValueError: in every process: a lazy layer that has not seen its first input yet, or models that are
            not the same.
        RuntimeError: a process did not come.
    """
    check_model(model, "merge_running_statistics")
    try:
        process_group = group_of(parse(True if group is None else group))
    except TypeError:
        raise TypeError(
            "merge_running_statistics: expected None (the default process group) or a process group, "
            f"got {group!r}"
        ) from None
    if process_group is None:
        return model
    processes = Processes(process_group, "merge_running_statistics")
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and has_statistics(layer)
    }
    device = next((tensor.device for tensor in [*model.buffers(), *model.parameters()]), torch.device("cpu"))
    _check_together(layers, processes, device)
    if layers:
        _write(_merged(list(layers.values()), processes, device))
    return model


def _check_together(layers: dict[str, _BatchNorm], processes: Processes, device: torch.device) -> None:
    """Raise in every process when one cannot take part, rather than let the others wait for it."""
    lazy = [name for name, layer in layers.items() if not is_initialized(layer)]
    shapes = [(name, layer.num_features) for name, layer in layers.items()]
    signature = int(hashlib.sha256(repr(shapes).encode()).hexdigest()[:15], 16)
    several, largest, smallest = processes.largest(
        torch.tensor([len(lazy), signature, -signature], device=device)
    ).tolist()
    if lazy:
        raise ValueError(
            f"merge_running_statistics: {quoted(layers[lazy[0]], lazy[0])} has no running "
            "statistics yet: run one batch through the model first"
        )
    if several:
        raise ValueError(
            "merge_running_statistics: a lazy layer has no running statistics yet in another process: run "
            "one batch through the model first, in every process"
        )
    if largest != -smallest:
        raise ValueError(
            "merge_running_statistics: expected the same batch norms in every process, but the models "
            f"differ. This one, on rank {processes.rank()}, has {len(shapes)}, as (name, channels): {shapes}"
        )


@torch.no_grad()
def _merged(
    layers: list[_BatchNorm], processes: Processes, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Each buffer, and what is to be in it."""
    sizes = [layer.running_mean.numel() for layer in layers]  # type: ignore[union-attr]
    spread_out = torch.repeat_interleave(torch.arange(len(layers)), torch.tensor(sizes)).to(device)
    counts = torch.stack([_batches(layer, device) for layer in layers])
    mean, var = (
        torch.cat([layer.get_buffer(name).to(device, torch.float64) for layer in layers])
        for name in ("running_mean", "running_var")
    )
    weights = counts[spread_out]
    totals, sums = processes.add(torch.cat([counts, _weighted(mean, weights)])).split(
        [len(layers), len(mean)]
    )
    totals = totals[spread_out]
    merged_mean = sums / totals
    between = (mean - merged_mean).square()
    merged_var = processes.add(_weighted(var + between, weights)) / totals
    writes = []
    for name, own, merged in (("running_mean", mean, merged_mean), ("running_var", var, merged_var)):
        # Where no process has seen a batch the statistics stay.
        for layer, values in zip(layers, torch.where(totals > 0, merged, own).split(sizes), strict=True):
            buffer = layer.get_buffer(name)
            writes.append((buffer, values.to(buffer)))
    return writes


def _batches(layer: _BatchNorm, device: torch.device) -> Tensor:
    counter = layer.num_batches_tracked
    return (
        torch.ones((), dtype=torch.float64, device=device) if counter is None else counter.to(device).double()
    )


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    # What a process that has seen no batch may hold, inf included, does not count.
    return torch.where(weights > 0, values * weights, 0)


@torch.no_grad()
def _write(writes: list[tuple[Tensor, Tensor]]) -> None:
    """All the values into their buffers, or none."""
    before = [buffer.clone() for buffer, _ in writes]
    done = 0
    try:
        for buffer, values in writes:
            buffer.copy_(values)
            done += 1
    except BaseException:
        for (buffer, _), values in zip(writes[:done], before, strict=False):
            buffer.copy_(values)
        raise
