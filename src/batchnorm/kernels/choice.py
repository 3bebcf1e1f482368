"""A layer's last choice of a kernel, which holds for every call like the one that it was made for."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm import recipes
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import team
from batchnorm.kernels.cpu.call import Ready

# torch.compile's comparison of tensors with those that it has compiled for. Where torch has none, every call
# chooses.
_TensorGuards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)

# With fewer, a layer that is called some times with each shape, or in training and eval mode by turns, would
# lose more by comparing than it gains.
CALLS = 16

_Optional = Tensor | None
_Options = tuple[Any, ...]
_Kernel = ModuleType | Ready


class Choice:
    """The kernel that `choose` has named, for calls in the same circumstances with tensors that are alike.

    `choose` asks torch some forty questions, a quarter of a small layer's forward. Torch itself compares all
    tensors at once: by Python type, dispatch keys, dtype, device, sizes, strides and `requires_grad`. What it
    compares with takes a call's time to make, so that it is made for the last of CALLS in a row of one shape.

    Deep copies and pickles of a layer begin anew.
    """

    __slots__ = ("_calls", "_kept", "_shape")

    def __init__(self) -> None:
        self._kept: tuple[_Options, Callable[..., bool], tuple[_Kernel, int]] | None = None
        self._shape: torch.Size | None = None
        self._calls = 0

    def __reduce__(self) -> tuple[type[Choice], tuple[()]]:
        return Choice, ()

    def recall(
        self, x: Tensor, per_channel: tuple[_Optional, ...], residual: _Optional, options: _Options
    ) -> tuple[_Kernel, int] | None:
        """Kernel and `channel_dim`, if `keep` was given them for tensors like these; or None.

        Args:
            options: of the layer: whether it is in training, its activation, and all else that counts.
        """
        if (kept := self._kept) is None:
            return None
        circumstances, are_alike, choice = kept
        asked, tensors = _asked(x, per_channel, residual, options)
        if circumstances == asked and are_alike(*tensors):
            return choice
        self._kept, self._calls = None, 0
        return None

    def keep(
        self,
        x: Tensor,
        per_channel: tuple[_Optional, ...],
        residual: _Optional,
        options: _Options,
        kernel: ModuleType,
        channel_dim: int,
    ) -> None:
        """For `recall`, if it is the last of CALLS in a row."""
        if _TensorGuards is None:
            return
        if x.shape != self._shape:
            self._shape, self._calls = x.shape, 0
        self._calls += 1
        if self._calls < CALLS:
            return
        circumstances, tensors = _asked(x, per_channel, residual, options)
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        guards = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        training, activation, *_ = options
        ready = Ready(x, channel_dim, activation, residual, training) if kernel is cpu else kernel
        self._kept = circumstances, guards.check, (ready, channel_dim)


def _asked(
    x: Tensor, per_channel: tuple[_Optional, ...], residual: _Optional, options: _Options
) -> tuple[_Options, tuple[Tensor, ...]]:
    """What `choose` and `Ready` go by, besides what torch compares tensors by; and these tensors."""
    weight, bias, mean, var = per_channel
    # Which ones are missing makes no difference to the choice, but for the residual, whose shape tells.
    if weight is None or bias is None or mean is None or var is None:
        tensors = tuple(tensor for tensor in (x, *per_channel, residual) if tensor is not None)
    else:
        tensors = (x, weight, bias, mean, var) if residual is None else (x, weight, bias, mean, var, residual)
    return (
        len(tensors), options, torch.is_grad_enabled(), cpu.is_deterministic(), forward_ad._current_level,
        recipes.is_recording(), team.threads(),
    ), tensors  # fmt: skip
