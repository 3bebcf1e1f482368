"""The kernels that compute batch norm, and the choice between them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from batchnorm.context import under_transform
from batchnorm.kernels import native, reference


def choose(x: Tensor, *parameters: Tensor | None) -> ModuleType:
    """The fastest kernel that takes `x` and its per-channel tensors where this code is running.

    Every kernel module has `training` and `inference`, with the signatures and results of `reference`.
    """
    # torch's operator writes into its statistics, which vmap forbids; a compiler fuses plain torch itself.
    if torch.compiler.is_compiling() or under_transform():
        return reference
    return native if native.supports(x, *parameters) else reference
