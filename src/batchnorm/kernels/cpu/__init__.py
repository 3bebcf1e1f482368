"""Batch norm on the CPU at the speed of memory: compiled kernels, and the autograd function around them."""

from __future__ import annotations

import struct
import threading
import warnings
from functools import cache

import numpy as np
import torch
from torch import Tensor

from batchnorm import recipes
from batchnorm.kernels.autograd import Call, can_run_here, in_layout_of, is_plain
from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu import team
from batchnorm.kernels.cpu.pages import empty_like
from batchnorm.kernels.cpu.plan import DTYPES, Plan, function, plan
from batchnorm.moments import Moments

# Their gradient is kept between the two passes over it: computing it again would cost more.
_COSTLY = frozenset({"elu", "gelu", "silu", "mish", "sigmoid", "tanh"})

# For fewer values torch's operator is done before a kernel called from Python has begun: without gradients,
# with them (alone, or with an activation or a residual), and in eval mode, where torch's needs one pass.
SMALLEST, SMALLEST_WITH_GRADIENT, SMALLEST_FUSED, SMALLEST_IN_EVAL = 4096, 65536, 32768, 131072

_pack = struct.Struct(f.FORMAT).pack


def supports(
    x: Tensor,
    channel_dim: int,
    parameters: tuple[Tensor | None, ...] = (),
    residual: Tensor | None = None,
    activation: str | None = None,
    training: bool = True,
) -> bool:
    """Whether the kernels take these tensors where this code is running, and are worth calling."""
    size, dtype, channels = x.numel(), x.dtype, x.shape[channel_dim]
    alone = activation is None and residual is None
    recording = recipes.is_recording() and torch.is_grad_enabled()
    if not size or not (recording or pays(size, training, alone, "rows")):
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
    if the_plan is None or not (recording or pays(size, training, alone, the_plan.kind)):
        return False
    return not torch.are_deterministic_algorithms_enabled() and can_run_here() and _work()


def pays(size: int, training: bool, alone: bool, kind: str) -> bool:
    """Whether a kernel of this kind makes up for being called from Python."""
    if not training:
        # Alone and in runs, one pass, torch is at the speed of memory too.
        return size >= SMALLEST_IN_EVAL and (kind == "rows" or not alone)
    if not torch.is_grad_enabled():
        return size >= SMALLEST
    return size >= (SMALLEST_WITH_GRADIENT if alone else SMALLEST_FUSED)


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the memory of a tensor holds its numbers: kernels see addresses, not tensors."""
    return tensor.dtype is dtype and tensor.is_cpu and is_plain(tensor)


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


class _Call(Call):
    """A normalisation by the CPU kernels."""

    __slots__ = ("plan", "running", "statistics", "table")

    def __init__(
        self,
        x: Tensor,
        channel_dim: int,
        statistics: np.int64,
        eps: float,
        activation: str | None,
        residual: Tensor | None,
    ) -> None:
        super().__init__(channel_dim, bool(statistics == f.OF_BATCH), eps, activation, residual)
        the_plan = _plan(x, channel_dim)
        assert the_plan is not None  # by `supports`
        self.plan = the_plan
        self.statistics = statistics
        self.table = torch.empty((f.TABLE_ROWS, the_plan.channels), dtype=torch.float64)
        # Addresses of the running mean, variance and counter, and the momentum.
        self.running = (0, 0, 0, 0.0)

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

    def prepare_again(self) -> None:
        """Let `forward` normalise by the table that it has left, and move nothing."""
        self.statistics, self.running = f.OF_TABLE, (0, 0, 0, 0.0)

    def mean_and_invstd(self) -> tuple[Tensor, Tensor]:
        """What `forward` has normalised by, per channel."""
        return self.table[f.MEAN], self.table[f.INVSTD]

    def backward(
        self, grad_y: Tensor, x: Tensor, extra: Tensor | None, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual."""
        the_plan, activation = self.plan, self.activation
        wants_x, wants_weight, wants_bias, wants_residual = wanted
        grad_y = in_layout_of(x, grad_y)
        by_batch = self.by_batch
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


def _work_memory(numbers: int) -> int:
    """The address of scratch memory for a call of this thread: allocating it would cost a small layer as much
    as its sums."""
    memory = getattr(_scratch, "memory", None)
    if memory is None or memory.numel() < numbers:
        memory = _scratch.memory = torch.empty(numbers, dtype=torch.float64)
    return int(memory.data_ptr())


_scratch = threading.local()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
