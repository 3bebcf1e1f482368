"""What is running this code: torch.compile, a torch.func transform, a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

_current_graph_task_id = getattr(torch._C, "_current_graph_task_id", lambda: -1)
# Not None where a torch.func transform (grad, jvp, vmap, ...) is running this code.
current_transform = torch._C._functorch.peek_interpreter_stack


def in_backward() -> bool:
    """Whether autograd is running a backward pass, as it is when a checkpoint computes a forward again."""
    return not is_dynamo_compiling() and _current_graph_task_id() != -1


def under_transform() -> bool:
    """Whether a torch.func transform (grad, jvp, vmap, ...) is running this code."""
    return current_transform() is not None


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether a check may look at the values: not while tracing, nor where it would stall a device."""
    return tensor.device.type == "cpu" and not is_compiling() and not under_transform()
