"""Calls of the Triton kernels with tensors; importing this imports Triton."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from batchnorm.kernels.cuda import backward, channel, forward
from batchnorm.kernels.cuda.plan import Cut, Plan, merging

MEAN, M2, INVSTD, SCALE = (row.value for row in (channel.MEAN, channel.M2, channel.INVSTD, channel.SCALE))
COUNT = channel.COUNT.value
TABLE_ROWS = 6

Running = tuple[Tensor | None, Tensor | None, Tensor | None, float]
"""Running mean, variance and number of batches to move, and the momentum."""

NOTHING_MOVES: Running = (None, None, None, 0.0)
_no_guard = nullcontext()


def new_table(plan: Plan, x: Tensor) -> Tensor:
    """Memory for the statistics of every channel: float64, a row for each of the names in `channel.py`."""
    return torch.empty((TABLE_ROWS, plan.layout.channels), dtype=torch.float64, device=x.device)


def train(
    plan: Plan,
    x: Tensor,
    residual: Tensor | None,
    table: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    eps: float,
    activation: str | None,
) -> Tensor:
    """The output by the moments of the batch, which go into the table."""
    cut = plan.whole_forward
    if cut is None:
        merge(take_moments(plan, x), table, weight, bias, running, eps)
        return apply(plan, x, residual, table, activation)
    y = torch.empty_like(x)
    mean, var, number, momentum = running
    with _guard(x):
        forward.normalise[(cut.blocks,)](
            x, residual, y, table, weight, bias, mean, var, number, *_in_two(momentum), *_in_two(eps),
            *_sizes(plan), *_constants(plan, cut, x), activation or "none", **_options(cut.warps),
        )  # fmt: skip
    return y


def take_moments(plan: Plan, x: Tensor) -> Tensor:
    """Count, mean and m2 of the parts of each channel: (3, parts, C)."""
    cut = plan.passes
    partials = torch.empty((3, cut.parts, plan.layout.channels), dtype=torch.float64, device=x.device)
    with _guard(x):
        forward.take_moments[(cut.blocks, cut.parts)](
            x, partials, *_sizes(plan), cut.tiles, cut.across, cut.parts, *_constants(plan, cut, x),
            **_options(cut.warps),
        )  # fmt: skip
    return partials


def merge(
    partials: Tensor, table: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float
) -> None:
    """The table by the moments of the parts; moves the running statistics."""
    _, parts, channels = partials.shape
    rows, width = merging(parts)
    mean, var, number, momentum = running
    with _guard(partials):
        forward.merge_moments[(-(-channels // width),)](
            partials, table, weight, bias, mean, var, number, *_in_two(momentum), *_in_two(eps),
            channels, parts, rows, width, **_options(),
        )  # fmt: skip


def apply(
    plan: Plan,
    x: Tensor,
    residual: Tensor | None,
    table: Tensor,
    activation: str | None,
    given: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The output by the table, or by a given mean and variance, which go into the table."""
    cut, y = plan.passes, torch.empty_like(x)
    mean, var = (None, None) if given is None else given
    with _guard(x):
        forward.apply[(cut.blocks * cut.tiles,)](
            x, residual, y, table, weight, bias, mean, var, *_in_two(eps), *_sizes(plan), cut.blocks,
            cut.across, *_constants(plan, cut, x), activation or "none", **_options(cut.warps),
        )  # fmt: skip
    return y


def differentiate_whole(
    plan: Plan,
    x: Tensor,
    extra: Tensor | None,
    grad_y: Tensor,
    grad_x: Tensor | None,
    grad_z: Tensor | None,
    table: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    activation: str | None,
    slope_from: str,
    by_batch: bool,
) -> None:
    """All of a backward at once, where the plan has a cut for it."""
    cut = plan.whole_backward
    assert cut is not None
    with _guard(x):
        backward.differentiate_whole[(cut.blocks,)](
            x, extra, grad_y, grad_x, grad_z, table, grad_weight, grad_bias, *_sizes(plan),
            *_constants(plan, cut, x), activation or "none", slope_from, by_batch, **_options(cut.warps),
        )  # fmt: skip


def take_sums(
    plan: Plan,
    x: Tensor,
    extra: Tensor | None,
    grad_y: Tensor,
    grad_z: Tensor | None,
    table: Tensor,
    activation: str | None,
    slope_from: str,
) -> Tensor:
    """`sum(g)` and `sum(g * (x - rounded mean))` of each channel's parts, (2, parts, C); g into grad_z."""
    cut = plan.passes
    partials = torch.empty((2, cut.parts, plan.layout.channels), dtype=torch.float64, device=x.device)
    with _guard(x):
        backward.take_sums[(cut.blocks, cut.parts)](
            x, extra, grad_y, grad_z, partials, table, *_sizes(plan), cut.tiles, cut.across, cut.parts,
            *_constants(plan, cut, x), activation or "none", slope_from, **_options(cut.warps),
        )  # fmt: skip
    return partials


def merge_sums(
    partials: Tensor,
    x: Tensor,
    table: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    coefficients: Tensor | None,
) -> None:
    """Gradients of weight and bias, and the coefficients of the gradient of x, (2, C)."""
    _, parts, channels = partials.shape
    rows, width = merging(parts)
    with _guard(x):
        backward.merge_sums[(-(-channels // width),)](
            partials, table, grad_weight, grad_bias, coefficients, channels, parts, rows, width, _wide(x),
            **_options(),
        )  # fmt: skip


def grad(
    plan: Plan,
    x: Tensor,
    extra: Tensor | None,
    grad_y: Tensor,
    grad_x: Tensor | None,
    grad_z: Tensor | None,
    table: Tensor,
    coefficients: Tensor | None,
    activation: str | None,
    slope_from: str,
) -> None:
    """The gradients of the size of x."""
    cut = plan.passes
    with _guard(x):
        backward.grad[(cut.blocks * cut.tiles,)](
            x, extra, grad_y, grad_x, grad_z, table, coefficients, *_sizes(plan), cut.blocks, cut.across,
            *_constants(plan, cut, x), activation or "none", slope_from, **_options(cut.warps),
        )  # fmt: skip


def _guard(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which may be another than that of the tensors."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _no_guard


def _options(warps: int = 4) -> dict[str, int]:
    # Products are fused with sums; said aloud, because Triton is about to change what it does by default.
    return {"num_warps": warps, "enable_fp_fusion": True}


def _sizes(plan: Plan) -> tuple[int, int, int]:
    return plan.layout[1:]


def _constants(plan: Plan, cut: Cut, x: Tensor) -> tuple[bool, int, int, tl.dtype]:
    return plan.layout.rows, cut.height, cut.width, _wide(x)


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@lru_cache(maxsize=1024)
def _in_two(number: float) -> tuple[float, float]:
    """Its float32 and what that leaves: numbers reach a kernel as float32."""
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded, number - rounded
