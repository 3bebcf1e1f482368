"""Calls of the CPU kernels with tensors: their struct of fields, and memory for them to work in."""

from __future__ import annotations

import struct
import threading

import torch
from torch import Tensor

from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu import team
from batchnorm.kernels.cpu.plan import Plan

_pack = struct.Struct(f.FORMAT).pack


def run_forward(
    plan: Plan,
    table: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    statistics: int,
    count: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running: tuple[int, int, int, float] = (0, 0, 0, 0.0),
    eps: float = 1.0,
    activation: str | None = None,
    bits: Tensor | None = None,
) -> None:
    """The statistics into the table, and into y, where it is wanted, the output by them."""
    kernel, applied = plan.forward[
        None if y is None else (activation, residual is not None, bits is not None)
    ]
    work = _work_memory(plan.work)
    mean, var, counter, momentum = running
    fields = _pack(
        x.data_ptr(), _address(y), _address(residual), 0, 0, 0,
        _address(weight), _address(bias), mean, var, 0, 0,
        table.data_ptr(), work, work + 8 * plan.typed, applied, 0, 0, 0,
        *plan.geometry, statistics, 0, 0, counter, 0, 0, _address(bits), count, eps, momentum,
    )  # fmt: skip
    team.runner()(kernel, fields, plan.threads, 0)


def run_backward(
    plan: Plan,
    table: Tensor,
    x: Tensor,
    extra: Tensor | None,
    grad_y: Tensor,
    grad_x: Tensor | None,
    grad_z: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    sums: Tensor | None,
    coefficients: Tensor | None,
    by_batch: bool,
    reduces: bool,
    activation: str | None,
    slope_from: str,
) -> None:
    """Sums and what follows from them, then the gradient of x, each where it is wanted."""
    stored = grad_z is not None
    kernel, reduction, one_run, gradient = plan.backward[
        activation, slope_from, stored, by_batch, reduces, grad_x is not None
    ]
    work = _work_memory(plan.work)
    bits, extra = (extra, None) if slope_from == "bits" else (None, extra)
    fields = _pack(
        x.data_ptr(), 0, _address(extra), grad_y.data_ptr(), _address(grad_x), _address(grad_z),
        0, 0, 0, 0, _address(grad_weight), _address(grad_bias),
        table.data_ptr(), work, work + 8 * plan.typed, 0, reduction, one_run, gradient,
        *plan.geometry, 0, by_batch, stored, 0, _address(sums), _address(coefficients), _address(bits),
        plan.count, 0.0, 0.0,
    )  # fmt: skip
    team.runner()(kernel, fields, plan.threads, 0)


def _work_memory(numbers: int) -> int:
    """The address of scratch memory for a call of this thread: allocating it would cost a small layer as much
    as its sums."""
    if _scratch.numbers < numbers:
        _scratch.memory = torch.empty(numbers, dtype=torch.float64, device="cpu")
        _scratch.address, _scratch.numbers = _scratch.memory.data_ptr(), numbers
    return _scratch.address


class _Scratch(threading.local):
    memory: Tensor
    address = numbers = 0


_scratch = _Scratch()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
