"""The tensors inside a batch or an output, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, sequences, dataclasses and plain objects, in their order; dense."""
    pending, seen = [value], set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value.to_dense() if value.layout != torch.strided else value
        elif id(value) not in seen:
            seen.add(id(value))
            pending.extend(reversed(_inside(value)))


def samples_in(batch: Any) -> int:
    """The size of the first dimension of the first tensor of a batch; 0 without one."""
    tensor = next(tensors_in(batch), None)
    return 0 if tensor is None or tensor.ndim == 0 else tensor.shape[0]


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, entry.name) for entry in fields(value)]
    if isinstance(value, (type, nn.Module)) or callable(value):
        return []
    return list(getattr(value, "__dict__", {}).values())
