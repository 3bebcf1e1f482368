"""How a tensor lies in memory, as far as kernels care: contiguous, or with the channels last."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")


class Layout(NamedTuple):
    """Memory without gaps: (samples, channels, positions), or rows of all channels (positions is 1)."""

    rows: bool
    samples: int
    channels: int
    positions: int


def layout_of(shape: torch.Size, strides: tuple[int, ...], channel_dim: int) -> Layout | None:
    """The layout of a tensor, or None when its memory is neither contiguous nor channels last."""
    channels, values = shape[channel_dim], math.prod(shape)
    order = [dim for dim in range(len(shape)) if dim != channel_dim]
    if _is_dense(shape, strides, [*order, channel_dim]):
        return Layout(True, values // channels, channels, 1)
    if not _is_dense(shape, strides, range(len(shape))):
        return None
    positions = math.prod(shape[channel_dim + 1 :])
    return Layout(False, values // (channels * positions), channels, positions)


def planned(plan: Plan | None, x: Tensor) -> Plan:
    """`plan`, or ValueError where the memory of x has none."""
    if plan is None:
        raise ValueError(
            f"expected an input that is contiguous or has its channels last, got strides {x.stride()} for "
            f"shape {tuple(x.shape)}: make it so with x.contiguous()"
        )
    return plan


def _is_dense(shape: torch.Size, strides: tuple[int, ...], order: Iterable[int]) -> bool:
    """Whether the memory is filled without gaps when its dimensions are walked in this order."""
    expected = 1
    for dim in reversed(list(order)):
        if shape[dim] != 1 and strides[dim] != expected:
            return False
        expected *= shape[dim]
    return True
