"""The innermost loops of the CPU kernels, one per activation: runs of a channel, and rows of all channels.

Each becomes a C function that the kernels in `slabs.py`, `groups.py` and `rows.py` call by its address, so
that a new activation costs a fraction of a second to compile. In all of them the activation is applied to
`z = (x - mean) * scale + shift + residual`, and `grad_z = grad_y * slope(z)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from batchnorm.kernels.cpu.activations import Real, slope_of, value_of
from batchnorm.kernels.cpu.memory import add_to_first, add_to_second, get, put

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
loop = njit(fastmath={"contract", "nsz"}, **_OPTIONS)
# Sums may be reordered: that is what makes them vector sums. Nothing else may.
reduction = njit(fastmath={"contract", "nsz", "reassoc"}, **_OPTIONS)

# What tells the slope: z computed from x, or with the residual added, or the output y.
FROM_X, FROM_RESIDUAL, FROM_OUTPUT = "x", "residual", "output"


def apply_run(real: Real, name: str | None, has_residual: bool) -> tuple[Any, Callable[..., None]]:
    """`y = activation((x - mean) * scale + shift + residual)` for `size` neighbours of one channel."""
    value = value_of(name, real)

    def plain(x, residual, y, size, mean, scale, shift):
        for i in range(size):
            put(y, i, value((get(x, i) - mean) * scale + shift))

    def with_residual(x, residual, y, size, mean, scale, shift):
        for i in range(size):
            put(y, i, value((get(x, i) - mean) * scale + shift + get(residual, i)))

    values, number = _types(real)
    signature = types.void(values, values, values, types.int64, number, number, number)
    return signature, loop(with_residual if has_residual else plain)


def reduce_run(real: Real, name: str | None, slope_from: str, store: bool) -> tuple[Any, Callable[..., None]]:
    """Adds `sum(grad_z)` and `sum(grad_z * (x - mean))` to `sums`; with `store`, writes grad_z."""
    slope = _slope(real, name, slope_from)

    @reduction
    def sums_of(grad_y, x, extra, grad_z, size, mean, scale, shift, zero):
        first = zero
        second = zero
        for i in range(size):
            centred = get(x, i) - mean
            grad = get(grad_y, i) * slope(centred * scale + shift, extra, i)
            if store:
                put(grad_z, i, grad)
            first += grad
            second += grad * (centred + zero)
        return first, second

    def reduce(grad_y, x, extra, grad_z, size, mean, scale, shift, sums):
        first, second = sums_of(grad_y, x, extra, grad_z, size, mean, scale, shift, real(0))
        if not math.isfinite(first + second):
            first, second = sums_of(grad_y, x, extra, grad_z, size, mean, scale, shift, 0.0)
        sums[0] += first
        sums[1] += second

    values, number = _types(real)
    sums_type = types.CPointer(types.float64)
    signature = types.void(values, values, values, values, types.int64, number, number, number, sums_type)
    return signature, loop(reduce)


def gradient_run(
    real: Real, name: str | None, slope_from: str, by_batch: bool
) -> tuple[Any, Callable[..., None]]:
    """`grad_x = grad_z * by_grad + (x - mean) * by_x + constant`; only the first term if not `by_batch`."""
    slope = _slope(real, name, slope_from)

    def gradient(grad_y, x, extra, grad_x, size, mean, scale, shift, by_grad, by_x, constant):
        for i in range(size):
            centred = get(x, i) - mean
            grad = get(grad_y, i) * slope(centred * scale + shift, extra, i)
            if by_batch:
                put(grad_x, i, grad * by_grad + (centred * by_x + constant))
            else:
                put(grad_x, i, grad * by_grad)

    values, number = _types(real)
    signature = types.void(values, values, values, values, types.int64, *[number] * 6)
    return signature, loop(gradient)


def apply_rows(real: Real, name: str | None, has_residual: bool) -> tuple[Any, Callable[..., None]]:
    """As `apply_run` for `rows` rows of `width` columns, `stride` apart; statistics per column."""
    value = value_of(name, real)

    @loop
    def of(x, residual, k, mean, scale, shift):
        z = (get(x, k) - mean) * scale + shift
        return value(z + get(residual, k) if has_residual else z)

    def apply(x, residual, y, rows, width, stride, mean, scale, shift):
        for row in range(rows):
            a = row * stride
            for i in range(width):
                put(y, a + i, of(x, residual, a + i, get(mean, i), get(scale, i), get(shift, i)))

    values, _ = _types(real)
    signature = types.void(values, values, values, *[types.int64] * 3, *[values] * 3)
    return signature, loop(apply)


def reduce_rows(
    real: Real, name: str | None, slope_from: str, store: bool
) -> tuple[Any, Callable[..., None]]:
    """As `reduce_run` for rows: adds the sums of each column to `first` and `second`."""
    slope = _slope(real, name, slope_from)

    @loop
    def grad_at(grad_y, extra, grad_z, at, z):
        grad = get(grad_y, at) * slope(z, extra, at)
        if store:
            put(grad_z, at, grad)
        return grad

    def reduce(grad_y, x, extra, grad_z, rows, width, stride, mean, scale, shift, first, second):
        for row in range(rows):
            a = row * stride
            for i in range(width):
                xa = get(x, a + i) - get(mean, i)
                ga = grad_at(grad_y, extra, grad_z, a + i, xa * get(scale, i) + get(shift, i))
                add_to_first(first, i, ga)
                add_to_second(second, i, ga * xa)

    values, _ = _types(real)
    signature = types.void(*[values] * 4, *[types.int64] * 3, *[values] * 5)
    return signature, loop(reduce)


def gradient_rows(
    real: Real, name: str | None, slope_from: str, by_batch: bool
) -> tuple[Any, Callable[..., None]]:
    """As `gradient_run` for rows."""
    slope = _slope(real, name, slope_from)

    def gradient(grad_y, x, extra, grad_x, rows, width, stride, mean, scale, shift, by_grad, by_x, constant):
        for row in range(rows):
            a = row * stride
            for i in range(width):
                k, centred = a + i, get(x, a + i) - get(mean, i)
                grad = get(grad_y, k) * slope(centred * get(scale, i) + get(shift, i), extra, k)
                if by_batch:
                    put(grad_x, k, grad * get(by_grad, i) + (centred * get(by_x, i) + get(constant, i)))
                else:
                    put(grad_x, k, grad * get(by_grad, i))

    values, _ = _types(real)
    signature = types.void(*[values] * 4, *[types.int64] * 3, *[values] * 6)
    return signature, loop(gradient)


def _slope(real: Real, name: str | None, slope_from: str) -> Callable[..., Any]:
    slope = slope_of(name, real)

    def from_x(z, extra, i):
        return slope(z)

    def from_residual(z, extra, i):
        return slope(z + get(extra, i))

    def from_output(z, extra, i):
        # Where these activations bend, y and z are on the same side.
        return slope(get(extra, i))

    return loop({FROM_X: from_x, FROM_RESIDUAL: from_residual, FROM_OUTPUT: from_output}[slope_from])


def _types(real: Real) -> tuple[Any, Any]:
    number = types.float32 if real is np.float32 else types.float64
    return types.CPointer(number), number
