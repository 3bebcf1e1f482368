"""Batch mates: the same samples in eval mode, in another batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.doctor.data.outputs import first_tensor, kept
from batchnorm.model.nested import samples_in
from batchnorm.model.packing import sent


@sent
@dataclass(frozen=True)
class Mates:
    """How far predictions change with the batch, in their own standard deviation.

    Attributes:
        effect: root mean square of the change when half the batch is exchanged.
        error: its standard error over the samples.
        again: the same when the batch is only run again: dropout that is on, noise.
        layer: the first module whose output for the same samples changes.
        samples: how many.
    """

    effect: float
    error: float
    again: float
    layer: str | None
    samples: int


def compare(network: nn.Module, batch: Any, exchanged: Any | None, run: Callable[[Any], Any]) -> Mates | None:
    """Run a batch, again, and with its second half exchanged; None where that cannot be done.

    Args:
        exchanged: what `with_mates_of` gave, or None: then the first half is run alone.
    """
    count = samples_in(batch)
    if count < 2:
        return None
    half = count // 2
    first, first_inside = _run(network, batch, run, half, count)
    again, again_inside = _run(network, batch, run, half, count)
    mixed = _rows(batch, half, count) if exchanged is None else exchanged
    other, other_inside = _run(network, mixed, run, half, samples_in(mixed))
    if first is None or again is None or other is None or not (first.shape == other.shape == again.shape):
        return None
    if first.shape[1] == count:
        # Perhaps a score of each sample with each of the batch: those with the ones that stay are compared.
        first, again, other = first[:, :half], again[:, :half], other[:, :half]
    scale = float(first.std()) or float(first.abs().max()) or 1.0
    change = (other - first).square().mean(1).sqrt() / scale
    effect = float(change.square().mean().sqrt())
    error = float(change.std() / half**0.5) if half > 1 else float("nan")
    noise = float((again - first).square().mean().sqrt() / scale)
    return Mates(effect, error, noise, _starts(first_inside, again_inside, other_inside), half)


def _run(
    network: nn.Module, batch: Any, run: Callable[[Any], Any], half: int, count: int
) -> tuple[Tensor | None, list[tuple[str, Tensor]]]:
    with _norms(network, half, count) as inside:
        output = kept(run(batch))
    return (output[:half] if output is not None and len(output) == count else None), inside


@contextmanager
def _norms(network: nn.Module, half: int, count: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Inside, the norm of each output of the first samples is kept, in order of execution."""
    found: list[tuple[str, Tensor]] = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and len(tensor) == count:
                found.append((name, tensor.detach()[:half].flatten(1).double().norm(dim=1).cpu()))

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in network.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _starts(*runs: list[tuple[str, Tensor]]) -> str | None:
    for (name, first), (_, again), (other_name, other) in zip(*runs, strict=False):
        if name != other_name or first.shape != other.shape:
            return None
        noise = (again - first).abs().mean()
        if float((other - first).abs().mean()) > 1e-4 * float(first.abs().mean()) + 3 * float(noise):
            return name
    return None


def with_mates_of(batch: Any, other: Any) -> Any | None:
    """A batch with its second half taken from another; None where they do not fit."""
    count = samples_in(batch)
    try:
        return _joined(batch, other, count // 2, count)
    except Exception:  # a batch may be made of anything
        return None


def _joined(a: Any, b: Any, half: int, count: int) -> Any:
    if isinstance(a, Tensor):
        return torch.cat([a[:half], b[half:count]]) if _is_per_sample(a, count) else a
    if isinstance(a, Mapping):
        return {key: _joined(a[key], b[key], half, count) for key in a}
    if isinstance(a, tuple | list):
        parts = [_joined(x, y, half, count) for x, y in zip(a, b, strict=True)]
        return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)
    return a


def _rows(a: Any, half: int, count: int) -> Any:
    if isinstance(a, Tensor):
        return a[:half] if _is_per_sample(a, count) else a
    if isinstance(a, Mapping):
        return {key: _rows(value, half, count) for key, value in a.items()}
    if isinstance(a, tuple | list):
        parts = [_rows(value, half, count) for value in a]
        return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)
    return a


def _is_per_sample(tensor: Tensor, count: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == count
