"""Whether hooks look at, or change, what goes through a module."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook sees the input or the output of `module`, or its gradient."""
    return bool(module._forward_pre_hooks) or has_hooks_after(module)


def has_hooks_after(module: nn.Module) -> bool:
    """Whether a hook sees the output of `module`, or its gradient."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)
