"""Batch norm on the CPU at the speed of memory: compiled kernels, and the autograd function around them."""

from __future__ import annotations

import struct
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from batchnorm import recipes
from batchnorm.kernels import reference
from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu import team
from batchnorm.kernels.cpu.pages import empty_like
from batchnorm.kernels.cpu.plan import DTYPES, Plan, function, plan
from batchnorm.moments import Moments

FUSED = frozenset({
    None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "sigmoid", "hardsigmoid", "tanh",
})  # fmt: skip
# Their slope can be told from the output, which the next layer keeps anyway, instead of from the residual.
_SLOPE_FROM_OUTPUT = frozenset({"relu", "relu6", "leaky_relu"})
# Their gradient is kept between the two passes over it: computing it again would cost more.
_COSTLY = frozenset({"elu", "gelu", "silu", "mish", "sigmoid", "tanh"})
_PLAIN_TYPES = (Tensor, nn.Parameter)

_pack = struct.Struct(f.FORMAT).pack


class _Options(NamedTuple):
    plan: Plan
    channel_dim: int
    eps: float
    momentum: float
    statistics: int
    activation: str | None


def supports(
    x: Tensor, channel_dim: int, parameters: tuple[Tensor | None, ...], residual: Tensor | None
) -> bool:
    """Whether the kernels take these tensors where this code is running."""
    dtype = x.dtype
    if (
        dtype not in DTYPES
        or not x.is_cpu
        or type(x) not in _PLAIN_TYPES
        or x.layout is not torch.strided
        or x.numel() == 0
        or x.is_neg()
    ):
        return False
    for parameter in parameters:
        if parameter is not None and not (
            parameter.dtype is dtype and parameter.is_contiguous() and type(parameter) in _PLAIN_TYPES
        ):
            return False
    if residual is not None and not (
        residual.dtype is dtype and type(residual) in _PLAIN_TYPES and residual.layout is torch.strided
    ):
        return False
    return _can_run_here() and _plan(x, channel_dim) is not None and _work()


def _can_run_here() -> bool:
    return not (
        torch.are_deterministic_algorithms_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


@cache
def _work() -> bool:
    """Whether kernels can be compiled and run at all; says once why not."""
    if not team.available():
        return False
    try:
        function("apply", "run", torch.float32, None, False)
    except Exception as error:  # whatever is wrong with the compiler, torch's own kernels do the work
        warnings.warn(
            f"batchnorm's CPU kernels cannot be compiled, so torch's own are used: {type(error).__name__}: {error}",
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
    y, table = _normalise(
        x, weight, bias, residual, None, None, f.OF_BATCH, eps, 0.0, channel_dim, activation
    )
    count = torch.full((), x.numel() // x.shape[channel_dim], dtype=torch.float64)
    return y, Moments(count, table[f.MEAN], table[f.M2])


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
    y, _ = _normalise(
        x, weight, bias, residual, running_mean, running_var, f.RUNNING, eps, 0.0, channel_dim, activation
    )
    return y


def training_and_moving(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float,
    eps: float,
    channel_dim: int,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `training`, and moves the running statistics in place."""
    y, _ = _normalise(
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        f.OF_BATCH,
        eps,
        momentum,
        channel_dim,
        activation,
    )
    return y


def _normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    statistics: int,
    eps: float,
    momentum: float,
    channel_dim: int,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the table of statistics."""
    the_plan = _plan(x, channel_dim)
    assert the_plan is not None  # by `supports`
    fused = activation if activation in FUSED else None
    if residual is not None and residual.stride() != x.stride():
        residual = _in_layout_of(x, residual)
    options = _Options(the_plan, channel_dim, eps, momentum, statistics, fused)
    table = torch.empty((f.TABLE_ROWS, the_plan.shape[1]), dtype=torch.float64)
    y = _Normalise.apply(x, weight, bias, residual, running_mean, running_var, table, options)
    return (y if fused == activation else reference.ACTIVATIONS[activation](y)), table  # type: ignore[index]


class _Normalise(torch.autograd.Function):
    """`activation((x - mean) * invstd * weight + bias + residual)`; fills the table, moves running statistics."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        table: Tensor,
        options: _Options,
    ) -> Tensor:
        y = _run_forward(x, weight, bias, residual, running_mean, running_var, table, options)
        if recipes.is_recording():
            again = options._replace(statistics=f.OF_TABLE)
            ingredients = (x,) if residual is None else (x, residual)
            kept = tuple(tensor.detach() for tensor in ingredients)
            recipes.offer(y, ingredients, lambda: _rebuild(kept, table, again))
        ctx.options = options
        if residual is None or options.activation is None:
            extra = None
        else:
            extra = y if options.activation in _SLOPE_FROM_OUTPUT else residual
        ctx.slope_from = "x" if extra is None else ("output" if extra is y else "residual")
        ctx.save_for_backward(x, weight, bias, extra, table)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, extra, table = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(
                grad_y, x, weight, bias, extra, table, ctx.options, ctx.slope_from, wanted
            )
        else:
            gradients = _run_backward(grad_y, x, extra, table, ctx.options, ctx.slope_from, wanted)
        return (*gradients, None, None, None, None)


def _rebuild(ingredients: tuple[Tensor, ...], table: Tensor, options: _Options) -> Tensor:
    x, residual = ingredients[0], (ingredients[1] if len(ingredients) > 1 else None)
    return _run_forward(x, None, None, residual, None, None, table, options)


def _run_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    table: Tensor,
    options: _Options,
) -> Tensor:
    the_plan = options.plan
    y = empty_like(x)
    work = torch.empty(the_plan.work, dtype=torch.float64)
    fields = _pack(
        x.data_ptr(), y.data_ptr(), _address(residual), 0, 0, 0,
        _address(weight), _address(bias), _address(running_mean), _address(running_var), 0, 0,
        table.data_ptr(), work.data_ptr(), work.data_ptr() + 8 * the_plan.scratch,
        the_plan.function("apply", options.activation, residual is not None), 0, 0, 0,
        *the_plan.shape, *the_plan.cut, options.statistics, 0, 0, options.eps, options.momentum,
    )  # fmt: skip
    team.run(the_plan.kernel("forward"), fields, the_plan.threads)
    return y


def _run_backward(
    grad_y: Tensor,
    x: Tensor,
    extra: Tensor | None,
    table: Tensor,
    options: _Options,
    slope_from: str,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual."""
    the_plan, activation = options.plan, options.activation
    wants_x, wants_weight, wants_bias, wants_residual = wanted
    if grad_y.stride() != x.stride():
        grad_y = _in_layout_of(x, grad_y)
    by_batch = options.statistics == f.OF_BATCH
    channels = the_plan.shape[1]
    grad_x = empty_like(x) if wants_x else None
    grad_weight = torch.empty(channels, dtype=x.dtype) if wants_weight else None
    grad_bias = torch.empty(channels, dtype=x.dtype) if wants_bias else None
    grad_z = grad_residual = None
    if wants_residual:
        grad_residual = grad_y if activation is None else empty_like(x)
        grad_z = None if activation is None else grad_residual
    elif wants_x and activation in _COSTLY:
        grad_z = grad_x
    stored = grad_z is not None
    reduce = reduce_run = gradient = 0
    if by_batch or wants_weight or wants_bias or stored:
        reduce = the_plan.function("reduce", activation, slope_from, stored)
        reduce_run = the_plan.run_function("reduce", activation, slope_from, stored)
    if wants_x:
        gradient = the_plan.function(
            "gradient", None if stored else activation, "x" if stored else slope_from, by_batch
        )
    if reduce or gradient:
        work = torch.empty(the_plan.work, dtype=torch.float64)
        fields = _pack(
            x.data_ptr(), 0, _address(extra), grad_y.data_ptr(), _address(grad_x), _address(grad_z),
            0, 0, 0, 0, _address(grad_weight), _address(grad_bias),
            table.data_ptr(), work.data_ptr(), work.data_ptr() + 8 * the_plan.scratch,
            0, reduce, reduce_run, gradient,
            *the_plan.shape, *the_plan.cut, options.statistics, by_batch, stored, options.eps, options.momentum,
        )  # fmt: skip
        team.run(the_plan.kernel("backward"), fields, the_plan.threads)
    return grad_x, grad_weight, grad_bias, grad_residual


def _differentiable_gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    extra: Tensor | None,
    table: Tensor,
    options: _Options,
    slope_from: str,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """As `_run_backward`, in torch's operations: what `create_graph=True` asks for."""
    residual = extra if slope_from == "residual" else None
    if options.statistics == f.OF_BATCH:
        z, _ = reference.training(x, weight, bias, eps=options.eps, channel_dim=options.channel_dim)
    else:
        invstd = table[f.INVSTD].to(x.dtype)
        scale = invstd if weight is None else invstd * weight
        z = reference.apply(x, table[f.MEAN].to(x.dtype), scale, bias, (options.channel_dim,))
    inputs = [x, weight, bias, residual]
    if slope_from == "output":
        # Piecewise linear: its slope at the output is that at z, and has no derivative of its own.
        at_output = extra.detach().requires_grad_()  # type: ignore[union-attr]
        (grad_y,) = torch.autograd.grad(
            reference.finish(at_output, options.activation, None), at_output, grad_y, create_graph=True
        )
        y = z
    else:
        y = reference.finish(z, options.activation, residual)
    asked = [tensor for tensor, wants in zip(inputs, wanted, strict=True) if wants and tensor is not None]
    found = iter(torch.autograd.grad(y, asked, grad_y, create_graph=True))
    gradients = [
        next(found) if wants and tensor is not None else None
        for tensor, wants in zip(inputs, wanted, strict=True)
    ]
    if wanted[3] and residual is None:
        gradients[3] = grad_y
    return tuple(gradients)


def _in_layout_of(x: Tensor, tensor: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(tensor)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
