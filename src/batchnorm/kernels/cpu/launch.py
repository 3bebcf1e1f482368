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
    if _scratch.numbers < plan.work:
        _scratch.grow(plan.work)
    work = _scratch.address
    mean, var, counter, momentum = running
    fields = _pack(
        x.data_ptr(),
        0 if y is None else y.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0, 0, 0,
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        mean, var, 0, 0,
        table.data_ptr(), work, work + 8 * plan.typed, applied, 0, 0, 0,
        *plan.geometry, statistics, 0, 0, counter, 0, 0,
        0 if bits is None else bits.data_ptr(),
        count, eps, momentum,
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
    if _scratch.numbers < plan.work:
        _scratch.grow(plan.work)
    work = _scratch.address
    bits, extra = (extra, None) if slope_from == "bits" else (None, extra)
    fields = _pack(
        x.data_ptr(), 0,
        0 if extra is None else extra.data_ptr(),
        grad_y.data_ptr(),
        0 if grad_x is None else grad_x.data_ptr(),
        0 if grad_z is None else grad_z.data_ptr(),
        0, 0, 0, 0,
        0 if grad_weight is None else grad_weight.data_ptr(),
        0 if grad_bias is None else grad_bias.data_ptr(),
        table.data_ptr(), work, work + 8 * plan.typed, 0, reduction, one_run, gradient,
        *plan.geometry, 0, by_batch, stored, 0,
        0 if sums is None else sums.data_ptr(),
        0 if coefficients is None else coefficients.data_ptr(),
        0 if bits is None else bits.data_ptr(),
        plan.count, 0.0, 0.0,
    )  # fmt: skip
    team.runner()(kernel, fields, plan.threads, 0)


class _Scratch(threading.local):
    """Memory for the calls of a thread: allocating it would cost a small layer as much as its sums."""

    memory: Tensor
    address = numbers = 0

    def grow(self, numbers: int) -> None:
        self.memory = torch.empty(numbers, dtype=torch.float64)
        self.address, self.numbers = self.memory.data_ptr(), numbers


_scratch = _Scratch()
