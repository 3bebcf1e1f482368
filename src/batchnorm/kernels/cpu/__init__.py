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
from batchnorm.kernels.autograd import Call, are_plain, can_run_here, in_layout_of
from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu import launch, team
from batchnorm.kernels.cpu.pages import in_huge_pages
from batchnorm.kernels.cpu.plan import COSTLY, DTYPES, Plan, function, plan
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
    if _plan(x, channel_dim) is None or is_deterministic():
        return False
    return can_run_here() and _work()


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


def _plan(x: Tensor, channel_dim: int) -> Plan | None:
    return plan(x.shape, x.stride(), x.dtype, channel_dim, team.size(x.numel()))


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
    call = _Call(x, channel_dim, f.OF_BATCH, eps, activation, residual)
    y = call.run(x, weight, bias, residual)
    count = torch.full((), call.plan.count, dtype=torch.float64)
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
    call = _Call(x, channel_dim, f.RUNNING, eps, activation, residual)
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
    call = _Call(x, channel_dim, f.OF_BATCH, eps, activation, residual)
    if running_mean is not None and running_var is not None:
        counter = 0
        seen = num_batches_tracked
        if type(seen) is Tensor and seen.is_cpu and seen.dtype is torch.int64 and seen.numel() == 1:
            counter = seen.data_ptr()
        elif seen is not None:
            seen.add_(1)
        call.running = running_mean.data_ptr(), running_var.data_ptr(), counter, momentum
    return call.run(x, weight, bias, residual)


def _empty_like(x: Tensor, the_plan: Plan) -> Tensor:
    y = torch.empty_like(x)
    return in_huge_pages(y) if the_plan.is_large else y


class _Call(Call):
    """A normalisation by the CPU kernels."""

    __slots__ = ("plan", "running", "statistics", "table")

    def __init__(
        self,
        x: Tensor,
        channel_dim: int,
        statistics: int,
        eps: float,
        activation: str | None,
        residual: Tensor | None,
    ) -> None:
        super().__init__(channel_dim, statistics == f.OF_BATCH, eps, activation, residual)
        the_plan = _plan(x, channel_dim)
        assert the_plan is not None  # by `supports`
        self.plan = the_plan
        self.overwrites = the_plan.is_large
        self.statistics = statistics
        self.table = torch.empty_like(the_plan.table)
        # Addresses of the running mean, variance and counter, and the momentum.
        self.running = (0, 0, 0, 0.0)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        y = _empty_like(x, self.plan)
        launch.run_forward(
            self.plan, self.table, x, y, residual, self.statistics, self.plan.count, weight, bias,
            self.running, self.eps, self.activation, self.bits,
        )  # fmt: skip
        return y

    def prepare_again(self) -> None:
        """Let `forward` normalise by the table that it has left, and move nothing."""
        self.statistics, self.running = f.OF_TABLE, (0, 0, 0, 0.0)

    def leave_bits(self) -> None:
        """Let `forward` leave bits instead of the output, where the plan has them."""
        if self.plan.words > 0:
            self.slope_from = "bits"
            self.bits = torch.empty(self.plan.words, dtype=torch.int32)

    def with_slope_of_output(self, x: Tensor, extra: Tensor) -> Tensor:
        """The output, or 1 where its bit is set, else -1."""
        if self.slope_from != "bits":
            return super().with_slope_of_output(x, extra)
        samples, channels, positions, *_ = self.plan.geometry
        places = torch.arange(f.WORD, dtype=torch.int32)
        bits = (extra.view(samples, channels, -1, 1) >> places & 1).flatten(2)[..., :positions]
        return (bits * 2 - 1).to(x.dtype).reshape(x.shape)

    def mean_and_invstd(self) -> tuple[Tensor, Tensor]:
        """What `forward` has normalised by, per channel."""
        return self.table[f.MEAN], self.table[f.INVSTD]

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        extra: Tensor | None,
        wanted: tuple[bool, ...],
        may_overwrite: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual, one of which is written over grad_y if it may be."""
        the_plan, activation, by_batch = self.plan, self.activation, self.by_batch
        wants_x, wants_weight, wants_bias, wants_residual = wanted
        given, grad_y = grad_y, in_layout_of(x, grad_y)
        overwrites = may_overwrite or grad_y is not given
        grad_x = None
        if wants_x:
            # Where the residual's gradient is wanted, it has the memory of grad_y.
            grad_x = grad_y if overwrites and not wants_residual else _empty_like(x, the_plan)
        grad_weight = torch.empty_like(the_plan.parameter) if wants_weight else None
        grad_bias = torch.empty_like(the_plan.parameter) if wants_bias else None
        grad_z = grad_residual = None
        if wants_residual:
            grad_residual = grad_y if overwrites or activation is None else _empty_like(x, the_plan)
            grad_z = None if activation is None else grad_residual
        elif wants_x and activation in COSTLY:
            grad_z = grad_x
        reduces = by_batch or wants_weight or wants_bias or grad_z is not None
        if reduces or wants_x:
            launch.run_backward(
                the_plan, self.table, x, extra, grad_y, grad_x, grad_z, grad_weight, grad_bias,
                None, None, by_batch, reduces, activation, self.slope_from,
            )  # fmt: skip
        return grad_x, grad_weight, grad_bias, grad_residual


# The statistics and the application apart: what each process of several does before and after they add up
# `Moments` (by merging them) and sums, as those of `cuda`.


def statistics(x: Tensor, *, channel_dim: int) -> Moments:
    """Count, mean and m2 of each channel of x, all float64; not differentiable."""
    the_plan = _plan_of(x, channel_dim)
    table = torch.empty_like(the_plan.table)
    launch.run_forward(the_plan, table, x, None, None, f.OF_BATCH, the_plan.count)
    count = torch.full((), the_plan.count, dtype=torch.float64)
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
    the_plan = _plan_of(x, channel_dim)
    y = _empty_like(x, the_plan)
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
    the_plan = _plan_of(x, channel_dim)
    y = _empty_like(x, the_plan)
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
    the_plan, grad_y = _plan_of(x, channel_dim), in_layout_of(x, grad_y)
    keeps = activation in COSTLY or (activation is not None and extra is not None)
    grad_z = _empty_like(x, the_plan) if keeps else None
    sums = torch.empty((2, the_plan.channels), dtype=torch.float64)
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
    the_plan, grad = _plan_of(x, channel_dim), in_layout_of(x, grad)
    grad_x = _empty_like(x, the_plan) if out is None else out
    launch.run_backward(
        the_plan, table, x, None, grad, grad_x, None, None, None, None, coefficients, True, False, activation,
        "x",
    )  # fmt: skip
    return grad_x


def _plan_of(x: Tensor, channel_dim: int) -> Plan:
    return planned(_plan(x, channel_dim), x)
