"""Batch norm on the CPU at the speed of memory: compiled kernels, and the autograd function around them."""

from __future__ import annotations

import struct
import threading
import warnings
from copy import copy
from functools import cache
from typing import Any

import numpy as np
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
    None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "sigmoid", "hardsigmoid",
    "tanh",
})  # fmt: skip
# Their slope can be told from the output, which the next layer keeps anyway, not only from the residual.
_SLOPE_FROM_OUTPUT = frozenset({"relu", "relu6", "leaky_relu"})
# Their gradient is kept between the two passes over it: computing it again would cost more.
_COSTLY = frozenset({"elu", "gelu", "silu", "mish", "sigmoid", "tanh"})
_PLAIN_TYPES = (Tensor, nn.Parameter)

# For fewer values torch's operator is done before an autograd function in Python has begun.
SMALLEST = 32768
# Channels of a row from which on torch's channels_last operator keeps up, for tensors of fewer bytes than
# glibc maps anew each time.
NARROW, MAPPED = 128, 32 * 1024 * 1024

_pack = struct.Struct(f.FORMAT).pack


def supports(
    x: Tensor,
    channel_dim: int,
    parameters: tuple[Tensor | None, ...] = (),
    residual: Tensor | None = None,
    activation: str | None = None,
) -> bool:
    """Whether the kernels take these tensors where this code is running, and are faster than torch's."""
    size, dtype, channels = x.numel(), x.dtype, x.shape[channel_dim]
    recording = recipes.is_recording() and torch.is_grad_enabled()
    if size < SMALLEST and not (size and recording):
        return False
    # Over rows torch is at the speed of memory too, but for narrow ones and where pages are new each time.
    rows_are_torchs = (
        activation is None
        and residual is None
        and channels >= NARROW
        and size * x.element_size() < MAPPED
        and not recording
    )
    if rows_are_torchs and x.ndim == 2:
        return False
    if dtype not in DTYPES or not _is_plain(x, dtype):
        return False
    for parameter in parameters:
        if parameter is not None and not (
            _is_plain(parameter, dtype) and parameter.is_contiguous() and parameter.numel() == channels
        ):
            return False
    if residual is not None and not _is_plain(residual, dtype):
        return False
    the_plan = _plan(x, channel_dim)
    if the_plan is None or (rows_are_torchs and the_plan.kind == "rows"):
        return False
    return _can_run_here() and _work()


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the memory of a tensor holds its numbers: kernels see addresses, not tensors."""
    return (
        tensor.dtype is dtype
        and tensor.is_cpu
        and type(tensor) in _PLAIN_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_neg()
    )


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
    count = torch.full((), x.numel() // call.plan.channels, dtype=torch.float64)
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
        if num_batches_tracked is not None:
            if _is_plain(num_batches_tracked, torch.int64) and num_batches_tracked.numel() == 1:
                counter = num_batches_tracked.data_ptr()
            else:
                num_batches_tracked.add_(1)
        call.running = running_mean.data_ptr(), running_var.data_ptr(), counter, momentum
    return call.run(x, weight, bias, residual)


class _Call:
    """One normalisation: what its forward leaves for its backward, besides tensors that autograd watches."""

    __slots__ = (
        "activation", "bias", "channel_dim", "eps", "plan", "running", "slope_from", "statistics", "table",
        "unfused", "versions", "weight",
    )  # fmt: skip

    def __init__(
        self,
        x: Tensor,
        channel_dim: int,
        statistics: np.int64,
        eps: float,
        activation: str | None,
        residual: Tensor | None,
    ) -> None:
        the_plan = _plan(x, channel_dim)
        assert the_plan is not None  # by `supports`
        self.plan = the_plan
        self.channel_dim = channel_dim
        self.statistics = statistics
        self.eps = eps
        self.activation = activation if activation in FUSED else None
        # What is left for torch to apply.
        self.unfused = None if activation in FUSED else activation
        self.table = torch.empty((f.TABLE_ROWS, the_plan.channels), dtype=torch.float64)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.versions: list[int] = []
        # Addresses of the running mean, variance and counter, and the momentum.
        self.running = (0, 0, 0, 0.0)
        if residual is None or self.activation is None:
            self.slope_from = "x"
        else:
            self.slope_from = "output" if activation in _SLOPE_FROM_OUTPUT else "residual"

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if residual is not None and residual.stride() != x.stride():
            residual = _in_layout_of(x, residual)
        if torch.is_grad_enabled():
            y = _Normalise.apply(x, weight, bias, residual, self)
        else:
            y = self.forward(x, weight, bias, residual)
        return y if self.unfused is None else reference.ACTIVATIONS[self.unfused](y)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        the_plan = self.plan
        y = empty_like(x)
        work = _work_memory(the_plan.work)
        kernel, applied = the_plan.forward(self.activation, residual is not None)
        mean, var, counter, momentum = self.running
        fields = _pack(
            x.data_ptr(), y.data_ptr(), _address(residual), 0, 0, 0,
            _address(weight), _address(bias), mean, var, 0, 0,
            self.table.data_ptr(), work, work + 8 * the_plan.typed, applied, 0, 0, 0,
            *the_plan.geometry, self.statistics, 0, 0, counter, self.eps, momentum,
        )  # fmt: skip
        team.runner()(kernel, fields, the_plan.threads, 0)
        return y

    def again(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The output once more, to the bit."""
        call = copy(self)
        call.statistics, call.running = f.OF_TABLE, (0, 0, 0, 0.0)
        return call.forward(x, None, None, residual)

    def backward(
        self, grad_y: Tensor, x: Tensor, extra: Tensor | None, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual."""
        the_plan, activation = self.plan, self.activation
        wants_x, wants_weight, wants_bias, wants_residual = wanted
        if grad_y.stride() != x.stride() or grad_y.is_neg():
            grad_y = _in_layout_of(x, grad_y)
        by_batch = bool(self.statistics == f.OF_BATCH)
        grad_x = empty_like(x) if wants_x else None
        grad_weight = torch.empty(the_plan.channels, dtype=x.dtype) if wants_weight else None
        grad_bias = torch.empty(the_plan.channels, dtype=x.dtype) if wants_bias else None
        grad_z = grad_residual = None
        if wants_residual:
            grad_residual = grad_y if activation is None else empty_like(x)
            grad_z = None if activation is None else grad_residual
        elif wants_x and activation in _COSTLY:
            grad_z = grad_x
        stored = grad_z is not None
        reduces = by_batch or wants_weight or wants_bias or stored
        if reduces or wants_x:
            kernel, sums, one_run, gradient = the_plan.backward(
                activation, self.slope_from, stored, by_batch, reduces, wants_x
            )
            work = _work_memory(the_plan.work)
            fields = _pack(
                x.data_ptr(), 0, _address(extra), grad_y.data_ptr(), _address(grad_x), _address(grad_z),
                0, 0, 0, 0, _address(grad_weight), _address(grad_bias),
                self.table.data_ptr(), work, work + 8 * the_plan.typed, 0, sums, one_run, gradient,
                *the_plan.geometry, 0, by_batch, stored, 0, 0.0, 0.0,
            )  # fmt: skip
            team.runner()(kernel, fields, the_plan.threads, 0)
        return grad_x, grad_weight, grad_bias, grad_residual

    def backward_by_torch(
        self, grad_y: Tensor, x: Tensor, extra: Tensor | None, wanted: tuple[bool, ...], create_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """As `backward`, in torch's operations: for `create_graph=True`, and for gradients under vmap."""
        weight, bias = self.weight, self.bias
        if self.versions != _versions(weight, bias):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                "operation: the weight or bias of a batch norm"
            )
        residual = extra if self.slope_from == "residual" else None
        # Views, so that a gradient does not go on from one of them into another that it was computed from.
        x = x.view_as(x)
        weight, bias, residual = (
            tensor if tensor is None else tensor.view_as(tensor) for tensor in (weight, bias, residual)
        )
        if self.statistics == f.OF_BATCH:
            z, _ = reference.training(x, weight, bias, eps=self.eps, channel_dim=self.channel_dim)
        else:
            invstd = self.table[f.INVSTD].to(x.dtype)
            scale = invstd if weight is None else invstd * weight
            z = reference.apply(x, self.table[f.MEAN], scale, bias, (self.channel_dim,))
        if self.slope_from == "output":
            # Piecewise linear: its slope at the output is that at z, and has no derivative of its own.
            at_output = extra.detach().requires_grad_()  # type: ignore[union-attr]
            y = reference.finish(at_output, self.activation, None)
            (grad_y,) = torch.autograd.grad(y, at_output, grad_y, create_graph=create_graph)
            y = z
        else:
            y = reference.finish(z, self.activation, residual)
        inputs = (x, weight, bias, residual)
        asked = [tensor for tensor, wants in zip(inputs, wanted, strict=True) if wants and tensor is not None]
        found = iter(torch.autograd.grad(y, asked, grad_y, create_graph=create_graph) if asked else ())
        gradients = [
            next(found) if wants and tensor is not None else None
            for tensor, wants in zip(inputs, wanted, strict=True)
        ]
        if wanted[3] and residual is None:
            gradients[3] = grad_y
        return tuple(gradients)


class _Normalise(torch.autograd.Function):
    """`activation((x - mean) * invstd * weight + bias + residual)`, by a `_Call`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: _Call,
    ) -> Tensor:
        y = call.forward(x, weight, bias, residual)
        if any(ctx.needs_input_grad) and recipes.is_recording():
            _offer(y, x, residual, call)
        ctx.call = call
        # Only a second derivative asks for them, so autograd is spared the watch over them.
        call.weight, call.bias, call.versions = weight, bias, _versions(weight, bias)
        if call.slope_from == "x":
            ctx.save_for_backward(x)
        else:
            ctx.save_for_backward(x, y if call.slope_from == "output" else residual)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        call, (x, *rest) = ctx.call, ctx.saved_tensors
        extra = rest[0] if rest else None
        wanted, create_graph = ctx.needs_input_grad[:4], torch.is_grad_enabled()
        if not create_graph and _has_memory(grad_y):
            return (*call.backward(grad_y, x, extra, wanted), None)
        with torch.enable_grad():
            return (*call.backward_by_torch(grad_y, x, extra, wanted, create_graph), None)


def _offer(y: Tensor, x: Tensor, residual: Tensor | None, call: _Call) -> None:
    if residual is None:
        recipes.offer(y, (x,), lambda x: call.again(x, None))
    else:
        recipes.offer(y, (x, residual), call.again)


def _has_memory(tensor: Tensor) -> bool:
    """Whether there are numbers to point at: gradients under vmap have none, nor have some zeros."""
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def _versions(*tensors: Tensor | None) -> list[int]:
    # A tensor made in inference mode has no version, and no gradient either.
    return [0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]


def _work_memory(numbers: int) -> int:
    """The address of scratch memory for a call of this thread: allocating it would cost a small layer as much
    as its sums."""
    memory = getattr(_scratch, "memory", None)
    if memory is None or memory.numel() < numbers:
        memory = _scratch.memory = torch.empty(numbers, dtype=torch.float64)
    return int(memory.data_ptr())


_scratch = threading.local()


def _in_layout_of(x: Tensor, tensor: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(tensor)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
