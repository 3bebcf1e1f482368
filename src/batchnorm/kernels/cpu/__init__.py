"""Batch norm on the CPU at the speed of memory: the kernels behind the signatures of `reference`, and the
statistics and the application apart, for what goes on between them in several processes.
"""

from __future__ import annotations

import math
import warnings
from functools import cache

import torch
from torch import Tensor

from batchnorm import recipes
from batchnorm.kernels.autograd import are_plain, can_run_here, in_layout_of
from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu import launch, team
from batchnorm.kernels.cpu.call import Call, new_like
from batchnorm.kernels.cpu.plan import COSTLY, DTYPES, Plan, function, plan_of
from batchnorm.kernels.layout import planned
from batchnorm.moments import Moments

# What torch's function calls, where torch has it: a Python function less in each call.
is_deterministic = getattr(
    torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)

# From how many values on a kernel called from Python is faster than torch's operators: over rows, over runs,
# and over runs of up to 4 positions, by (in training, with a graph, without activation and residual). Some
# are faster from fewer than 4096 on, but nobody should wait for a compiler there.
SMALLEST = {
    (True, True, True): (65536, 32768, 8192),
    (True, True, False): (32768, 32768, 8192),
    (True, False, True): (4096, 4096, 4096),
    (True, False, False): (4096, 4096, 4096),
    (False, True, True): (524288, 2097152, 8192),
    (False, True, False): (131072, 131072, 8192),
    (False, False, True): (65536, math.inf, 32768),
    (False, False, False): (65536, 65536, 16384),
}
SMALLEST_OF_ALL = min(min(sizes) for sizes in SMALLEST.values())
# In eval mode without a graph torch's GELU in float32, which keeps fewer digits far below 0, is faster while
# the output fits a cache.
SMALLEST_GELU = 4 * 1024 * 1024


def supports(
    x: Tensor,
    channel_dim: int,
    parameters: tuple[Tensor | None, ...] = (),
    residual: Tensor | None = None,
    activation: str | None = None,
    training: bool = True,
) -> bool:
    """Whether the kernels take these tensors where this code is running, and are worth calling."""
    dtype, channels = x.dtype, x.shape[channel_dim]
    if not (
        pays(x, channel_dim, training, activation, residual is not None)
        or (recipes.is_recording() and torch.is_grad_enabled())
    ):
        return False
    if dtype not in DTYPES or not x.is_cpu or not are_plain(x, residual, *parameters):
        return False
    for parameter in parameters:
        if parameter is not None and not (
            parameter.dtype is dtype
            and parameter.is_cpu
            and parameter.numel() == channels
            and parameter.is_contiguous()
        ):
            return False
    if residual is not None and not (residual.dtype is dtype and residual.is_cpu):
        return False
    # Modes first: a plan is kept, and what it makes under a mode (a fake tensor) is of no use to later calls.
    return not is_deterministic() and can_run_here() and plan_of(x, channel_dim) is not None and _work()


def pays(x: Tensor, channel_dim: int, training: bool, activation: str | None, has_residual: bool) -> bool:
    """Whether a kernel makes up for being called from Python."""
    if (size := x.numel()) < SMALLEST_OF_ALL:
        return False
    stride, graph = x.stride(channel_dim), torch.is_grad_enabled()
    if activation == "gelu" and x.dtype is torch.float32 and not training and not graph:
        return size >= SMALLEST_GELU
    over_rows, over_runs, over_short_runs = SMALLEST[training, graph, activation is None and not has_residual]
    if stride == 1:
        return size >= over_rows
    return size >= over_runs or (stride <= 4 and size >= over_short_runs)


@cache
def _work() -> bool:
    """Whether kernels can be compiled and run at all; says once why not."""
    if not team.available():
        return False
    try:
        function("apply", "runs", torch.float32, None, False, False)
    except Exception as error:  # whatever is wrong with the compiler, torch's own kernels do the work
        warnings.warn(
            f"batchnorm's CPU kernels cannot be compiled, torch's own do: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """As `reference.training`."""
    call = Call(x, channel_dim, f.OF_BATCH, eps, activation, residual)
    y = call.run(x, weight, bias, residual)
    count = torch.full((), call.plan.count, dtype=torch.float64, device="cpu")
    return y, Moments(count, call.table[f.MEAN], call.table[f.M2])


def inference(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `reference.inference`."""
    call = Call(x, channel_dim, f.RUNNING, eps, activation, residual)
    call.running = running_mean.data_ptr(), running_var.data_ptr(), 0, 0.0
    return call.run(x, weight, bias, residual)


def training_and_moving(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `training`, and moves the running statistics in place."""
    call = Call(x, channel_dim, f.OF_BATCH, eps, activation, residual)
    call.move(running_mean, running_var, num_batches_tracked, momentum)
    return call.run(x, weight, bias, residual)


# The statistics and the application apart: what each process of several does before and after they add up
# `Moments` (by merging them) and sums, as those of `cuda`.


def statistics(x: Tensor, *, channel_dim: int) -> Moments:
    """Count, mean and m2 of each channel of x, all float64; not differentiable."""
    the_plan = _planned(x, channel_dim)
    table = torch.empty_like(the_plan.table)
    launch.run_forward(the_plan, table, x, None, None, f.OF_BATCH, the_plan.count)
    count = torch.full((), the_plan.count, dtype=torch.float64, device="cpu")
    return Moments(count, table[f.MEAN], table[f.M2])


def apply(
    x: Tensor,
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output by the moments of all processes, and a table of what it was normalised by, for the backward.

    Args:
        moments: with one count for all channels.
        activation: of `autograd.FUSED`.
        residual: in the memory layout of x.
    """
    the_plan = _planned(x, channel_dim)
    y = new_like(x, the_plan)
    table = torch.empty_like(the_plan.table)
    torch.stack([moments.mean, moments.m2], out=table[: f.M2 + 1])
    launch.run_forward(
        the_plan, table, x, y, residual, f.OF_MOMENTS, float(moments.count), weight, bias,
        eps=eps, activation=activation,
    )  # fmt: skip
    return y, table


def apply_again(
    x: Tensor,
    table: Tensor,
    *,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The output of `apply` once more, to the bit."""
    the_plan = _planned(x, channel_dim)
    y = new_like(x, the_plan)
    launch.run_forward(the_plan, table, x, y, residual, f.OF_TABLE, the_plan.count, activation=activation)
    return y


def backward_sums(
    grad_y: Tensor,
    x: Tensor,
    table: Tensor,
    *,
    channel_dim: int,
    activation: str | None = None,
    slope_from: str = "x",
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`sum(g)` and `sum(g * (x - mean))` by this process's values, for g the gradient before the activation.

    Args:
        table: from `apply`.
        slope_from: as that of `autograd.Call`, with the residual or the output as `extra`.

    Returns:
        The sums, (2, C) in float64, by the mean rounded to the dtype of x; and g, which is the gradient of a
        residual, where it was kept: then `backward_apply` takes it without the activation.
    """
    the_plan, grad_y = _planned(x, channel_dim), in_layout_of(x, grad_y)
    keeps = activation in COSTLY or (activation is not None and extra is not None)
    grad_z = new_like(x, the_plan) if keeps else None
    sums = torch.empty((2, the_plan.channels), dtype=torch.float64, device="cpu")
    launch.run_backward(
        the_plan, table, x, extra, grad_y, None, grad_z, None, None, sums, None, True, True, activation,
        slope_from,
    )  # fmt: skip
    return sums, grad_z


def backward_apply(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    coefficients: Tensor,
    *,
    channel_dim: int,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of x, `scale * g + by_x * (x - mean) + constant`, by the mean rounded to the dtype of x.

    Args:
        grad: of y; or that before the activation, as g, without an activation.
        coefficients: by_x and constant, (2, C) in float64.
        out: where to write it, in the memory layout of x; may be `grad` itself.
    """
    the_plan, grad = _planned(x, channel_dim), in_layout_of(x, grad)
    grad_x = new_like(x, the_plan) if out is None else out
    launch.run_backward(
        the_plan, table, x, None, grad, grad_x, None, None, None, None, coefficients, True, False, activation,
        "x",
    )  # fmt: skip
    return grad_x


def _planned(x: Tensor, channel_dim: int) -> Plan:
    return planned(plan_of(x, channel_dim), x)
