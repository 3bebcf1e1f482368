"""The innermost loops of the CPU kernels, one per activation: runs of a channel, and rows of all channels.

Each becomes a C function that the kernels in `slabs.py`, `groups.py` and `rows.py` call by its address, so
that a new activation costs a fraction of a second to compile. In all of them the activation is applied to
`z = (x - mean) * scale + shift + residual`, and `grad_z` is `grad_y` times its slope at z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from batchnorm.kernels.cpu.activations import Real, gradient_of, value_of
from batchnorm.kernels.cpu.memory import add_to_first, add_to_second, at, get, put

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
loop = njit(fastmath={"contract", "nsz"}, **_OPTIONS)
# Sums may be reordered: that is what makes them vector sums. Nothing else may.
reduction = njit(fastmath={"contract", "nsz", "reassoc"}, **_OPTIONS)

# Values per block of a run: 16 KiB of float32, half of a first-level cache.
BLOCK = 4096

# What tells the slope: z computed from x, or with the residual added, or the output y.
FROM_X, FROM_RESIDUAL, FROM_OUTPUT = "x", "residual", "output"


def apply_runs(real: Real, name: str | None, has_residual: bool) -> tuple[Any, Callable[..., None]]:
    """`y = activation((x - mean) * scale + shift + residual)` for runs of `size`, one per channel.

    They are `stride` apart; statistics are float64, per channel. A call for each run would take as long as a
    short run itself.
    """
    value = value_of(name, real)

    def apply(x, residual, y, channels, stride, size, means, scales, shifts):
        for c in range(channels):
            mean, scale, shift = real(means[c]), real(scales[c]), real(shifts[c])
            a = c * stride
            for i in range(size):
                z = (get(x, a + i) - mean) * scale + shift
                put(y, a + i, value(z + get(residual, a + i) if has_residual else z))

    values, doubles = _types(real)
    signature = types.void(values, values, values, *[types.int64] * 3, *[doubles] * 3)
    return signature, loop(apply)


def reduce_runs(
    real: Real, name: str | None, slope_from: str, store: bool
) -> tuple[Any, Callable[..., None]]:
    """Adds each run's `sum(grad_z)` and `sum(grad_z * (x - mean))` to `sums`; with `store`, writes grad_z."""
    differentiate = _differentiate(real, name, slope_from)

    @reduction
    def sums_of(grad_y, x, extra, grad_z, size, mean, scale, shift, zero):
        first = zero
        second = zero
        for i in range(size):
            centred = get(x, i) - mean
            grad = differentiate(get(grad_y, i), centred * scale + shift, extra, i)
            if store:
                put(grad_z, i, grad)
            first += grad
            second += grad * (centred + zero)
        return first, second

    def reduce(grad_y, x, extra, grad_z, channels, stride, size, means, scales, shifts, sums):
        for c in range(channels):
            mean, scale, shift = real(means[c]), real(scales[c]), real(shifts[c])
            p = 0
            while p < size:
                # No longer than what float32 holds the sums of.
                a, block = c * stride + p, min(BLOCK, size - p)
                run = at(grad_y, a), at(x, a), at(extra, a), at(grad_z, a), block, mean, scale, shift
                first, second = sums_of(*run, real(0))
                if not math.isfinite(first + second):
                    first, second = sums_of(*run, 0.0)
                sums[2 * c] += first
                sums[2 * c + 1] += second
                p += block

    values, doubles = _types(real)
    signature = types.void(*[values] * 4, *[types.int64] * 3, *[doubles] * 4)
    return signature, loop(reduce)


def gradient_runs(
    real: Real, name: str | None, slope_from: str, by_batch: bool
) -> tuple[Any, Callable[..., None]]:
    """`grad_x = grad_z * by_grad + (x - mean) * by_x + constant`; only the first term if not `by_batch`.

    The three coefficients of a channel are side by side.
    """
    differentiate = _differentiate(real, name, slope_from)

    def gradient(grad_y, x, extra, grad_x, channels, stride, size, means, scales, shifts, coefficients):
        for c in range(channels):
            mean, scale, shift = real(means[c]), real(scales[c]), real(shifts[c])
            by_grad, by_x = real(coefficients[3 * c]), real(coefficients[3 * c + 1])
            constant = real(coefficients[3 * c + 2])
            a = c * stride
            for i in range(size):
                k, centred = a + i, get(x, a + i) - mean
                grad = differentiate(get(grad_y, k), centred * scale + shift, extra, k)
                if by_batch:
                    put(grad_x, k, grad * by_grad + (centred * by_x + constant))
                else:
                    put(grad_x, k, grad * by_grad)

    values, doubles = _types(real)
    signature = types.void(*[values] * 4, *[types.int64] * 3, *[doubles] * 4)
    return signature, loop(gradient)


def apply_rows(real: Real, name: str | None, has_residual: bool) -> tuple[Any, Callable[..., None]]:
    """As `apply_runs` for `rows` rows of `width` columns, `stride` apart; statistics per column.

    Two rows at a time, half of the rows apart: see `rows.four_rows`.
    """
    value = value_of(name, real)

    @loop
    def put_value(x, residual, y, k, mean, scale, shift):
        z = (get(x, k) - mean) * scale + shift
        put(y, k, value(z + get(residual, k) if has_residual else z))

    def apply(x, residual, y, rows, width, stride, mean, scale, shift):
        half = rows // 2
        for row in range(half):
            a, b = row * stride, (row + half) * stride
            for i in range(width):
                of_column = get(mean, i), get(scale, i), get(shift, i)
                put_value(x, residual, y, a + i, *of_column)
                put_value(x, residual, y, b + i, *of_column)
        for row in range(2 * half, rows):
            for i in range(width):
                put_value(x, residual, y, row * stride + i, get(mean, i), get(scale, i), get(shift, i))

    values, _ = _types(real)
    signature = types.void(values, values, values, *[types.int64] * 3, *[values] * 3)
    return signature, loop(apply)


def reduce_rows(
    real: Real, name: str | None, slope_from: str, store: bool
) -> tuple[Any, Callable[..., None]]:
    """As `reduce_runs` for rows: adds the sums of each column to `first` and `second`."""
    differentiate = _differentiate(real, name, slope_from)

    @loop
    def grad_and_centred(grad_y, x, extra, grad_z, k, mean, scale, shift):
        centred = get(x, k) - mean
        grad = differentiate(get(grad_y, k), centred * scale + shift, extra, k)
        if store:
            put(grad_z, k, grad)
        return grad, centred

    def reduce(grad_y, x, extra, grad_z, rows, width, stride, mean, scale, shift, first, second):
        half = rows // 2
        for row in range(half):
            a, b = row * stride, (row + half) * stride
            for i in range(width):
                of_column = get(mean, i), get(scale, i), get(shift, i)
                ga, xa = grad_and_centred(grad_y, x, extra, grad_z, a + i, *of_column)
                gb, xb = grad_and_centred(grad_y, x, extra, grad_z, b + i, *of_column)
                add_to_first(first, i, ga + gb)
                add_to_second(second, i, ga * xa + gb * xb)
        for row in range(2 * half, rows):
            for i in range(width):
                of_column = get(mean, i), get(scale, i), get(shift, i)
                ga, xa = grad_and_centred(grad_y, x, extra, grad_z, row * stride + i, *of_column)
                add_to_first(first, i, ga)
                add_to_second(second, i, ga * xa)

    values, _ = _types(real)
    signature = types.void(*[values] * 4, *[types.int64] * 3, *[values] * 5)
    return signature, loop(reduce)


def gradient_rows(
    real: Real, name: str | None, slope_from: str, by_batch: bool
) -> tuple[Any, Callable[..., None]]:
    """As `gradient_runs` for rows."""
    differentiate = _differentiate(real, name, slope_from)

    @loop
    def put_gradient(grad_y, x, extra, grad_x, k, mean, scale, shift, by_grad, by_x, constant):
        centred = get(x, k) - mean
        grad = differentiate(get(grad_y, k), centred * scale + shift, extra, k)
        if by_batch:
            put(grad_x, k, grad * by_grad + (centred * by_x + constant))
        else:
            put(grad_x, k, grad * by_grad)

    def gradient(grad_y, x, extra, grad_x, rows, width, stride, mean, scale, shift, by_grad, by_x, constant):
        half = rows // 2
        for row in range(half):
            a, b = row * stride, (row + half) * stride
            for i in range(width):
                of_column = get(mean, i), get(scale, i), get(shift, i)
                coefficients = get(by_grad, i), get(by_x, i), get(constant, i)
                put_gradient(grad_y, x, extra, grad_x, a + i, *of_column, *coefficients)
                put_gradient(grad_y, x, extra, grad_x, b + i, *of_column, *coefficients)
        for row in range(2 * half, rows):
            for i in range(width):
                of_column = get(mean, i), get(scale, i), get(shift, i)
                coefficients = get(by_grad, i), get(by_x, i), get(constant, i)
                put_gradient(grad_y, x, extra, grad_x, row * stride + i, *of_column, *coefficients)

    values, _ = _types(real)
    signature = types.void(*[values] * 4, *[types.int64] * 3, *[values] * 6)
    return signature, loop(gradient)


def _differentiate(real: Real, name: str | None, slope_from: str) -> Callable[..., Any]:
    """The gradient of z by that of y."""
    gradient = gradient_of(name, real)

    def from_x(grad_y, z, extra, i):
        return gradient(grad_y, z)

    def from_residual(grad_y, z, extra, i):
        return gradient(grad_y, z + get(extra, i))

    def from_output(grad_y, z, extra, i):
        # Where these activations bend, y and z are on the same side.
        return gradient(grad_y, get(extra, i))

    return loop({FROM_X: from_x, FROM_RESIDUAL: from_residual, FROM_OUTPUT: from_output}[slope_from])


def _types(real: Real) -> tuple[Any, Any]:
    number = types.float32 if real is np.float32 else types.float64
    return types.CPointer(number), types.CPointer(types.float64)
