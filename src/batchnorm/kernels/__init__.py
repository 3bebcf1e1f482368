"""The kernels that compute batch norm, and the choice between them."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor
from torch.compiler import is_compiling

from batchnorm.context import current_transform
from batchnorm.kernels import cpu, cuda, native, reference


def choose(
    x: Tensor,
    channel_dim: int,
    parameters: tuple[Tensor | None, ...] = (),
    residual: Tensor | None = None,
    activation: str | None = None,
    training: bool = True,
    moving: bool = False,
) -> ModuleType:
    """The fastest kernel that takes `x` and its per-channel tensors where this code is running.

    Every kernel module has `training` and `inference`, with the signatures and results of `reference`; all
    but `reference` have `training_and_moving`, for callers that ask for a `moving` one.
    """
    if is_compiling():
        # A compiler fuses plain torch itself; of torch's operator it knows how to move the statistics.
        return native if moving and native.supports(x, parameters) else reference
    if current_transform() is not None:
        return reference  # the only one that vmap, jvp and their like can look into
    kernel = cuda if x.is_cuda else cpu
    if kernel.supports(x, channel_dim, parameters, residual, activation, training):
        return kernel
    return native if native.supports(x, parameters) else reference
