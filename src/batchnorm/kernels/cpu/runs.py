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

from batchnorm.kernels.cpu.activations import Real, gradient_of, select, value_of
from batchnorm.kernels.cpu.fields import WORD
from batchnorm.kernels.cpu.memory import add_to_first, add_to_second, at, get, has_bit, put, with_bit

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
loop = njit(fastmath={"contract", "nsz"}, **_OPTIONS)
# Sums may be reordered: that is what makes them vector sums. Nothing else may.
reduction = njit(fastmath={"contract", "nsz", "reassoc"}, **_OPTIONS)

# Values per block of a run: 16 KiB of float32, half of a first-level cache.
BLOCK = 4096

# What tells the slope: z computed from x, or with the residual added, or the output y, or, in runs, a bit for
# each value, set where the slope is 1. Each run begins with a word of its own.
FROM_X, FROM_RESIDUAL, FROM_OUTPUT, FROM_BITS = "x", "residual", "output", "bits"

# Loops over bits take whole words apart from the rest, so that the compiler sees how long they are: with one
# loop for both, a step takes a tenth longer.


def apply_runs(
    real: Real, name: str | None, has_residual: bool, leaves_bits: bool
) -> tuple[Any, Callable[..., None]]:
    """`y = activation((x - mean) * scale + shift + residual)` for runs of `size`, one per channel.

    They are `stride` apart, and their bits `words`; statistics are float64, per channel. A call for each run
    would take as long as a short run itself.
    """
    value, gradient = value_of(name, real), gradient_of(name, real)
    one = real(1)

    @loop
    def apply_some(x, residual, y, k, size, mean, scale, shift):
        word = np.int32(0)
        for i in range(size):
            z = (get(x, k + i) - mean) * scale + shift
            output = value(z + get(residual, k + i) if has_residual else z)
            put(y, k + i, output)
            if leaves_bits:
                # Where these activations bend, y and z are on the same side.
                word = with_bit(word, i, gradient(one, output) == one)
        return word

    def apply(x, residual, y, bits, channels, stride, words, size, means, scales, shifts):
        for c in range(channels):
            of_channel = real(means[c]), real(scales[c]), real(shifts[c])
            a, w = c * stride, c * words
            if not leaves_bits:
                apply_some(x, residual, y, a, size, *of_channel)
                continue
            whole, rest = size // WORD, size % WORD
            for i in range(whole):
                put(bits, w + i, apply_some(x, residual, y, a + i * WORD, WORD, *of_channel))
            if rest > 0:
                put(bits, w + whole, apply_some(x, residual, y, a + whole * WORD, rest, *of_channel))

    values, doubles, bits = _types(real)
    signature = types.void(values, values, values, bits, *[types.int64] * 4, *[doubles] * 3)
    return signature, loop(apply)


def reduce_runs(
    real: Real, name: str | None, slope_from: str, store: bool
) -> tuple[Any, Callable[..., None]]:
    """Adds each run's `sum(grad_z)` and `sum(grad_z * (x - mean))` to `sums`; with `store`, writes grad_z."""
    differentiate = _differentiate(real, name, slope_from)
    has_bits = slope_from == FROM_BITS

    @reduction
    def sums_of_some(grad_y, x, extra, grad_z, k, size, word, mean, scale, shift, zero):
        first = zero
        second = zero
        for i in range(size):
            centred = get(x, k + i) - mean
            grad = differentiate(get(grad_y, k + i), centred * scale + shift, extra, k + i, word, i)
            if store:
                put(grad_z, k + i, grad)
            first += grad
            second += grad * (centred + zero)
        return first, second

    @reduction
    def sums_of(grad_y, x, extra, grad_z, bits, size, mean, scale, shift, zero):
        if not has_bits:
            return sums_of_some(grad_y, x, extra, grad_z, 0, size, np.int32(0), mean, scale, shift, zero)
        first = zero
        second = zero
        whole, rest = size // WORD, size % WORD
        of_run = mean, scale, shift, zero
        for i in range(whole):
            more = sums_of_some(grad_y, x, extra, grad_z, i * WORD, WORD, get(bits, i), *of_run)
            first += more[0]
            second += more[1]
        if rest > 0:
            more = sums_of_some(grad_y, x, extra, grad_z, whole * WORD, rest, get(bits, whole), *of_run)
            first += more[0]
            second += more[1]
        return first, second

    @reduction
    def sums_of_stored(grad_z, x, size, mean):
        first = 0.0
        second = 0.0
        for i in range(size):
            first += get(grad_z, i)
            second += get(grad_z, i) * ((get(x, i) - mean) + 0.0)
        return first, second

    def reduce(
        grad_y, x, extra, grad_z, bits, channels, stride, words, size, means, scales, shifts, sums
    ):  # fmt: skip
        for c in range(channels):
            mean, scale, shift = real(means[c]), real(scales[c]), real(shifts[c])
            p = 0
            while p < size:
                # No longer than what float32 holds the sums of.
                a, block, of_bits = c * stride + p, min(BLOCK, size - p), at(bits, c * words + p // WORD)
                run = at(grad_y, a), at(x, a), at(extra, a), at(grad_z, a), of_bits, block, mean, scale, shift
                first, second = sums_of(*run, real(0))
                if not math.isfinite(first + second):
                    # What is stored may have been written over grad_y.
                    if store:
                        first, second = sums_of_stored(at(grad_z, a), at(x, a), block, mean)
                    else:
                        first, second = sums_of(*run, 0.0)
                sums[2 * c] += first
                sums[2 * c + 1] += second
                p += block

    values, doubles, bits = _types(real)
    signature = types.void(*[values] * 4, bits, *[types.int64] * 4, *[doubles] * 4)
    return signature, loop(reduce)


def gradient_runs(
    real: Real, name: str | None, slope_from: str, by_batch: bool
) -> tuple[Any, Callable[..., None]]:
    """`grad_x = grad_z * by_grad + (x - mean) * by_x + constant`; only the first term if not `by_batch`.

    The three coefficients of a channel are side by side.
    """
    differentiate = _differentiate(real, name, slope_from)
    has_bits = slope_from == FROM_BITS

    @loop
    def put_some(grad_y, x, extra, grad_x, k, size, word, mean, scale, shift, by_grad, by_x, constant):
        for i in range(size):
            centred = get(x, k + i) - mean
            grad = differentiate(get(grad_y, k + i), centred * scale + shift, extra, k + i, word, i)
            if by_batch:
                put(grad_x, k + i, grad * by_grad + (centred * by_x + constant))
            else:
                put(grad_x, k + i, grad * by_grad)

    def gradient(
        grad_y, x, extra, grad_x, bits, channels, stride, words, size, means, scales, shifts, coefficients
    ):  # fmt: skip
        for c in range(channels):
            mean, scale, shift = real(means[c]), real(scales[c]), real(shifts[c])
            by_grad, by_x = real(coefficients[3 * c]), real(coefficients[3 * c + 1])
            of_channel = mean, scale, shift, by_grad, by_x, real(coefficients[3 * c + 2])
            a, w = c * stride, c * words
            if not has_bits:
                put_some(grad_y, x, extra, grad_x, a, size, np.int32(0), *of_channel)
                continue
            whole, rest = size // WORD, size % WORD
            for i in range(whole):
                word = get(bits, w + i)
                put_some(grad_y, x, extra, grad_x, a + i * WORD, WORD, word, *of_channel)
            if rest > 0:
                word = get(bits, w + whole)
                put_some(grad_y, x, extra, grad_x, a + whole * WORD, rest, word, *of_channel)

    values, doubles, bits = _types(real)
    signature = types.void(*[values] * 4, bits, *[types.int64] * 4, *[doubles] * 4)
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

    values, _, _ = _types(real)
    signature = types.void(values, values, values, *[types.int64] * 3, *[values] * 3)
    return signature, loop(apply)


def reduce_rows(
    real: Real, name: str | None, slope_from: str, store: bool, at_once: int
) -> tuple[Any, Callable[..., None]]:
    """As `reduce_runs` for rows, 2 or 4 at once: adds the sums of each column to `first` and `second`."""
    differentiate = _differentiate(real, name, slope_from)

    @loop
    def grad_and_centred(grad_y, x, extra, grad_z, k, mean, scale, shift):
        centred = get(x, k) - mean
        grad = differentiate(get(grad_y, k), centred * scale + shift, extra, k, np.int32(0), 0)
        if store:
            put(grad_z, k, grad)
        return grad, centred

    @loop
    def sums_of_two(grad_y, x, extra, grad_z, a, b, mean, scale, shift):
        ga, xa = grad_and_centred(grad_y, x, extra, grad_z, a, mean, scale, shift)
        gb, xb = grad_and_centred(grad_y, x, extra, grad_z, b, mean, scale, shift)
        return ga + gb, ga * xa + gb * xb

    def reduce(grad_y, x, extra, grad_z, rows, width, stride, mean, scale, shift, first, second):
        share = rows // at_once
        for row in range(share):
            a, b = row * stride, (row + share) * stride
            c, d = (row + 2 * share) * stride, (row + 3 * share) * stride
            for i in range(width):
                of_column = get(mean, i), get(scale, i), get(shift, i)
                sums = sums_of_two(grad_y, x, extra, grad_z, a + i, b + i, *of_column)
                if at_once == 2:
                    add_to_first(first, i, sums[0])
                    add_to_second(second, i, sums[1])
                else:
                    more = sums_of_two(grad_y, x, extra, grad_z, c + i, d + i, *of_column)
                    add_to_first(first, i, sums[0] + more[0])
                    add_to_second(second, i, sums[1] + more[1])
        for row in range(at_once * share, rows):
            for i in range(width):
                of_column = get(mean, i), get(scale, i), get(shift, i)
                ga, xa = grad_and_centred(grad_y, x, extra, grad_z, row * stride + i, *of_column)
                add_to_first(first, i, ga)
                add_to_second(second, i, ga * xa)

    values, _, _ = _types(real)
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
        grad = differentiate(get(grad_y, k), centred * scale + shift, extra, k, np.int32(0), 0)
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

    values, _, _ = _types(real)
    signature = types.void(*[values] * 4, *[types.int64] * 3, *[values] * 6)
    return signature, loop(gradient)


def _differentiate(real: Real, name: str | None, slope_from: str) -> Callable[..., Any]:
    """The gradient of z by that of y, of value k of `extra`, whose bit is number j of a word."""
    gradient = gradient_of(name, real)
    one = real(1)

    def from_x(grad_y, z, extra, k, word, j):
        return gradient(grad_y, z)

    def from_residual(grad_y, z, extra, k, word, j):
        return gradient(grad_y, z + get(extra, k))

    def from_output(grad_y, z, extra, k, word, j):
        # Where these activations bend, y and z are on the same side.
        return gradient(grad_y, get(extra, k))

    def from_bits(grad_y, z, extra, k, word, j):
        # At 1 their slope is 1, at -1 it is what it is where it is not 1.
        return gradient(grad_y, select(has_bit(word, j), one, -one))

    by = {FROM_X: from_x, FROM_RESIDUAL: from_residual, FROM_OUTPUT: from_output, FROM_BITS: from_bits}
    return loop(by[slope_from])


def _types(real: Real) -> tuple[Any, Any, Any]:
    number = types.float32 if real is np.float32 else types.float64
    return types.CPointer(number), types.CPointer(types.float64), types.CPointer(types.int32)
