"""What a layer computes, seen from what a copy of it makes of small inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_SAMPLES = 4
_POSITIONS = (2, 3, 2)
_RANKS = {nn.BatchNorm1d: 2, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_ANY_RANK = (4, 2, 3, 5)
_TOLERANCE = 1e-9


def twin_of(module: nn.Module) -> Any:
    """A copy in float64 on the CPU, without hooks and gradients; what cannot be copied is shared."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
    for part in module.modules():
        for name, value in part.__dict__.items():
            if "hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
            elif not _can_be_copied(value):
                memo[id(value)] = value  # a process group, a lock
    twin = copy.deepcopy(module, memo).double()
    for part in twin.modules():
        without_processes(part)
    return twin


def _can_be_copied(value: Any) -> bool:
    if isinstance(value, (dict, nn.Module, Tensor)):
        return True  # the tensors and modules of the module itself, for which the copy has its own rules
    try:
        copy.deepcopy(value)
    except Exception:  # whatever a __deepcopy__ raises
        return False
    return True


def random_input(layer: nn.Module, channels: int, rank: int | None = None) -> Tensor:
    """Normal numbers in float64, of a rank that the layer takes, whose channels differ in mean and std."""
    rank = rank or next((rank for kind, rank in _RANKS.items() if isinstance(layer, kind)), _ANY_RANK[0])
    generator = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    per_channel = (channels, *[1] * (rank - 2))
    x = torch.randn(_SAMPLES, channels, *_POSITIONS[: rank - 2], **options)
    return x * (torch.rand(per_channel, **options) + 0.5) + torch.randn(per_channel, **options)


class PlainSyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm that normalises by its own batch, on any device."""

    forward = _BatchNorm.forward


def without_processes(module: nn.Module) -> None:
    """Let a SyncBatchNorm of torch.nn's, or of a subclass, normalise by its own batch, on any device."""
    if type(module) is nn.SyncBatchNorm:
        module.__class__ = PlainSyncBatchNorm
    elif isinstance(module, nn.SyncBatchNorm) and not isinstance(module, PlainSyncBatchNorm):
        cls = type(module)
        module.__class__ = type(cls.__name__, (cls, PlainSyncBatchNorm), {})


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Inside, random numbers are always the same ones; afterwards they go on as if none had been drawn."""
    state = torch.random.default_generator.get_state()
    torch.random.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.random.default_generator.set_state(state)


def multiply_add_of(module: nn.Module, channels: int) -> tuple[Tensor, Tensor] | None:
    """Scale and shift per channel, float64, of a module that computes `x * scale + shift` in eval mode.

    None where it computes something else. Channels are along dimension 1.
    """
    twin = twin_of(module).eval()
    for rank in _ranks(module):
        try:
            found = _multiply_add(twin, channels, rank)
        except Exception:  # whatever a module does with an input that it was not made for
            continue
        if found is not None:
            return found
    return None


def is_constant(module: nn.Module, channels: int) -> bool:
    """Whether a module computes the same `x * scale + shift` in training mode too, and moves no buffer."""
    twin = twin_of(module).train()
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    evaluated = multiply_add_of(module, channels)
    for rank in _ranks(module) if evaluated is not None else ():
        try:
            found = _multiply_add(twin, channels, rank)
        except Exception:
            continue
        same = found is not None and all(map(torch.equal, found, evaluated or ()))
        return same and all(torch.equal(buffer, before[name]) for name, buffer in twin.named_buffers())
    return False


def _ranks(module: nn.Module) -> tuple[int, ...]:
    return next(((rank,) for kind, rank in _RANKS.items() if isinstance(module, kind)), _ANY_RANK)


@torch.no_grad()
def _multiply_add(twin: nn.Module, channels: int, rank: int) -> tuple[Tensor, Tensor] | None:
    x = random_input(twin, channels, rank)
    at_zero, at_one, y = (twin(value.clone()) for value in (torch.zeros_like(x), torch.ones_like(x), x))
    if not (isinstance(y, Tensor) and y.shape == at_zero.shape == at_one.shape == x.shape):
        return None
    along = (channels, *[1] * (rank - 2))
    shift = at_zero.movedim(1, 0).flatten(1)[:, 0]
    scale = at_one.movedim(1, 0).flatten(1)[:, 0] - shift
    wanted = x * scale.view(along) + shift.view(along)
    size = x.abs() * scale.abs().view(along) + shift.abs().view(along)
    return (scale, shift) if bool(((y - wanted).abs() <= _TOLERANCE * size).all()) else None
