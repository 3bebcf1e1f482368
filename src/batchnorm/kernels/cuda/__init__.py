"""Batch norm on the GPU in Triton: the kernels behind the signatures of `reference`, and the statistics and
the application apart, for what goes on between them on several GPUs.

Triton is imported by the first call that uses it.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from batchnorm import recipes
from batchnorm.kernels.autograd import Call, are_plain, can_run_here, in_layout_of
from batchnorm.kernels.cuda import plan as planning
from batchnorm.kernels.cuda.plan import Plan
from batchnorm.kernels.cuda.thresholds import Kind, worthwhile
from batchnorm.kernels.layout import planned
from batchnorm.moments import Moments


def supports(
    x: Tensor,
    channel_dim: int,
    parameters: tuple[Tensor | None, ...] = (),
    residual: Tensor | None = None,
    activation: str | None = None,
    training: bool = True,
) -> bool:
    """Whether the kernels take these tensors where this code is running, and ought to be faster."""
    size, dtype, channels = x.numel(), x.dtype, x.shape[channel_dim]
    recording = recipes.is_recording() and torch.is_grad_enabled()
    fused, rows = activation is not None or residual is not None, x.stride(channel_dim) == 1
    kind = Kind(training, fused, rows, dtype.itemsize == 2)
    if size == 0 or not (recording or worthwhile(kind, size)):
        return False
    if dtype not in planning.DTYPES or not are_plain(x, residual, *parameters):
        return False
    for parameter in parameters:
        if parameter is not None and not (
            parameter.dtype in (dtype, torch.float32)
            and parameter.device == x.device
            and parameter.is_contiguous()
            and parameter.numel() == channels
        ):
            return False
    if residual is not None and not (residual.dtype is dtype and residual.device == x.device):
        return False
    return _plan(x, channel_dim) is not None and can_run_here() and _work()


def _work() -> bool:
    """Whether Triton is there and compiles, as far as can be told here."""
    if _tried.cache_info().currsize == 0 and torch.cuda.is_current_stream_capturing():
        return False  # to try it would spoil the capture, and what fails in one may work outside
    return _tried()


@cache
def _tried() -> bool:
    """Whether Triton is there and compiles; says once why not."""
    if find_spec("triton") is None:
        return False
    try:
        x = torch.ones((1, 1, 2), device="cuda")
        table = torch.empty((_launch().TABLE_ROWS, 1), dtype=torch.float64, device="cuda")
        the_plan = _plan(x, 1)
        assert the_plan is not None
        _launch().apply(the_plan, x, None, table, None, (x[0, :, 0], x[0, :, 1]))
    except Exception as error:  # whatever is wrong with the compiler, torch's own kernels do the work
        warnings.warn(
            f"batchnorm's GPU kernels cannot be compiled, torch's own do: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@cache
def _launch() -> ModuleType:
    from batchnorm.kernels.cuda import launch

    return launch


def _plan(x: Tensor, channel_dim: int) -> Plan | None:
    return planning.plan(x.shape, x.stride(), x.dtype, channel_dim, _multiprocessors(x.get_device()))


@cache
def _multiprocessors(device: int) -> int:
    """How many programs run side by side: 1 on the CPU, where Triton's interpreter runs them in turn."""
    if device < 0:
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


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
    call = _Call(x, channel_dim, True, eps, activation, residual)
    y = call.run(x, weight, bias, residual)
    count = torch.full((), x.numel() // call.plan.layout.channels, dtype=torch.float64, device=x.device)
    return y, Moments(count, call.table[_launch().MEAN], call.table[_launch().M2])


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
    call = _Call(x, channel_dim, False, eps, activation, residual)
    call.given = running_mean.detach(), running_var.detach()
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
    call = _Call(x, channel_dim, True, eps, activation, residual)
    if running_mean is not None and running_var is not None:
        if num_batches_tracked is not None and num_batches_tracked.device != x.device:
            num_batches_tracked.add_(1)
            num_batches_tracked = None
        call.running = running_mean, running_var, num_batches_tracked, float(momentum)
    return call.run(x, weight, bias, residual)


class _Call(Call):
    """A normalisation by the Triton kernels."""

    __slots__ = ("from_table", "given", "plan", "running", "table")

    def __init__(
        self,
        x: Tensor,
        channel_dim: int,
        by_batch: bool,
        eps: float,
        activation: str | None,
        residual: Tensor | None,
    ) -> None:
        super().__init__(channel_dim, by_batch, eps, activation, residual)
        the_plan = _plan(x, channel_dim)
        assert the_plan is not None  # by `supports`
        self.plan = the_plan
        self.table = _launch().new_table(the_plan, x)
        # The statistics to normalise by, if not the batch's, and those to move.
        self.given: tuple[Tensor, Tensor] | None = None
        self.running = _launch().NOTHING_MOVES
        self.from_table = False

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """The output; the table has what it was normalised by."""
        launch, activation = _launch(), self.activation
        if self.from_table:
            y = launch.apply(self.plan, x, residual, self.table, activation)
        elif self.given is not None:
            y = launch.apply(
                self.plan, x, residual, self.table, activation, self.given, weight, bias, self.eps
            )
        else:
            y = launch.train(
                self.plan, x, residual, self.table, weight, bias, self.running, self.eps, activation
            )
        # Nothing of the layer's is kept alive or read again: all that a backward needs is in the table.
        self.given, self.running = None, launch.NOTHING_MOVES
        return y

    def prepare_again(self) -> None:
        """Let `forward` normalise by the table that it has left, and move nothing."""
        self.from_table = True

    def mean_and_invstd(self) -> tuple[Tensor, Tensor]:
        """What `forward` has normalised by, per channel."""
        return self.table[_launch().MEAN], self.table[_launch().INVSTD]

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        extra: Tensor | None,
        wanted: tuple[bool, ...],
        may_overwrite: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual, in new memory: torch keeps a GPU's for the next step."""
        launch, activation, slope_from = _launch(), self.activation, self.slope_from
        wants_x, wants_weight, wants_bias, wants_residual = wanted
        grad_y = in_layout_of(x, grad_y)
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = torch.empty_like(self.weight) if wants_weight and self.weight is not None else None
        grad_bias = torch.empty_like(self.bias) if wants_bias and self.bias is not None else None
        grad_z = torch.empty_like(x) if wants_residual and activation is not None else None
        grad_residual = grad_y if wants_residual and activation is None else grad_z
        of_parameters = grad_weight is not None or grad_bias is not None
        sums_needed = of_parameters or (wants_x and self.by_batch)
        writes = wants_x or grad_z is not None
        if sums_needed and writes and self.plan.whole_backward is not None:
            launch.differentiate_whole(
                self.plan, x, extra, grad_y, grad_x, grad_z, self.table, grad_weight, grad_bias,
                activation, slope_from, self.by_batch,
            )  # fmt: skip
            return grad_x, grad_weight, grad_bias, grad_residual
        coefficients = None
        if sums_needed:
            if wants_x and self.by_batch:
                coefficients = torch.empty_like(self.table[:2])
            partials = launch.take_sums(self.plan, x, extra, grad_y, None, self.table, activation, slope_from)
            launch.merge_sums(partials, x, self.table, grad_weight, grad_bias, coefficients)
        if writes:
            launch.grad(
                self.plan, x, extra, grad_y, grad_x, grad_z, self.table, coefficients, activation, slope_from
            )
        return grad_x, grad_weight, grad_bias, grad_residual


# The statistics and the application apart: what each process of several does before and after they add up
# `Moments` (by merging them) and sums, as those of `cpu`.


def statistics(x: Tensor, *, channel_dim: int) -> Moments:
    """Count, mean and m2 of each channel of x, all float64; not differentiable."""
    the_plan, launch = _plan_of(x, channel_dim), _launch()
    table = launch.new_table(the_plan, x)
    launch.merge(launch.take_moments(the_plan, x), table, None, None, launch.NOTHING_MOVES, 1.0)
    return Moments(table[launch.COUNT], table[launch.MEAN], table[launch.M2])


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
        activation: of `autograd.FUSED`.
        residual: in the memory layout of x.
    """
    the_plan, launch = _plan_of(x, channel_dim), _launch()
    partials = torch.stack([moments.count.expand_as(moments.mean), moments.mean, moments.m2]).double()
    table = launch.new_table(the_plan, x)
    launch.merge(partials[:, None], table, weight, bias, launch.NOTHING_MOVES, eps)
    return launch.apply(the_plan, x, residual, table, activation), table


def apply_again(
    x: Tensor,
    table: Tensor,
    *,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The output of `apply` once more, to the bit."""
    return _launch().apply(_plan_of(x, channel_dim), x, residual, table, activation)


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
        The sums, (2, C) in float64, by the mean rounded to the dtype of the statistics of x; and g, which is
        the gradient of a residual, where it was kept: then `backward_apply` takes it without the activation.
    """
    the_plan, grad_y = _plan_of(x, channel_dim), in_layout_of(x, grad_y)
    grad_z = None if activation is None or extra is None else torch.empty_like(x)
    partials = _launch().take_sums(the_plan, x, extra, grad_y, grad_z, table, activation, slope_from)
    return partials.sum(1), grad_z


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
    """The gradient of x, `scale * g + by_x * (x - mean) + constant`, by the mean rounded as for the sums.

    Args:
        grad: of y; or that before the activation, as g, without an activation.
        coefficients: by_x and constant, (2, C) in float64.
        out: where to write it, in the memory layout of x; may be `grad` itself.
    """
    the_plan, grad = _plan_of(x, channel_dim), in_layout_of(x, grad)
    grad_x = torch.empty_like(x) if out is None else out
    _launch().grad(the_plan, x, None, grad, grad_x, None, table, coefficients, activation, "x")
    return grad_x


def _plan_of(x: Tensor, channel_dim: int) -> Plan:
    the_plan = _plan(x, channel_dim)
    if the_plan is None and not planning.can_count(x.shape, channel_dim):
        raise ValueError(
            f"expected an input of at most {planning.MOST_VALUES:,} values of a channel and "
            f"{planning.MOST_CHANNELS:,} channels, got shape {tuple(x.shape)}: take smaller batches"
        )
    return planned(the_plan, x)
