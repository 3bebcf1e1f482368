"""Triton kernels of the forward pass: channels in one go, or moments, their merge, and the output."""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.cuda.activations import activate
from batchnorm.kernels.cuda.channel import (
    finish_statistics,
    load_statistics,
    merge,
    rounded,
    write_table,
)
from batchnorm.kernels.cuda.tile import channels_of, from_the_end, moments_of, place


@triton.jit(do_not_specialize=["samples", "tiles", "tiles_of_positions", "parts"])
def take_moments(
    x, partials, samples, channels, positions, tiles, tiles_of_positions, parts,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Count, mean and m2 of each block's channels in each part of its tiles, as (3, parts, channels)."""
    block, part = tl.program_id(0), tl.program_id(1)
    c, there = channels_of(block, channels, ROWS, WIDTH)
    offsets, inside, more = place(
        c, part, samples, channels, positions, tiles_of_positions, ROWS, HEIGHT, WIDTH
    )  # fmt: skip
    values = tl.load(x + offsets, mask=inside, other=0.0).to(WIDE)
    mean, m2 = moments_of(values, inside, more, ROWS)
    count = more.to(tl.float64)
    for tile in range(part + parts, tiles, parts):
        offsets, inside, more = place(
            c, tile, samples, channels, positions, tiles_of_positions, ROWS, HEIGHT, WIDTH
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(WIDE)
        more_mean, more_m2 = moments_of(values, inside, more, ROWS)
        count, mean, m2 = merge(count, mean, m2, more.to(tl.float64), more_mean, more_m2)
    at = partials + part * channels + c
    tl.store(at, count, mask=there)
    tl.store(at + parts * channels, mean, mask=there)
    tl.store(at + 2 * parts * channels, m2, mask=there)


@triton.jit(do_not_specialize=["parts"])
def merge_moments(
    partials, table, weight, bias, running_mean, running_var, num_batches_tracked,
    momentum, momentum_rest, eps, eps_rest, channels, parts,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The table of all channels by the moments of their parts; moves the running statistics."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = c < channels
    part = tl.arange(0, PARTS)
    at = part[:, None] * channels + c[None, :]
    inside = (part < parts)[:, None] & there[None, :]
    counts = tl.load(partials + at, mask=inside, other=0.0)
    means = tl.load(partials + parts * channels + at, mask=inside, other=0.0)
    m2s = tl.load(partials + 2 * parts * channels + at, mask=inside, other=0.0)
    count = tl.where(there, tl.sum(counts, 0), 2.0)
    mean = tl.sum(counts * means, 0) / count
    d = tl.where(inside, means - mean[None, :], 0.0)
    m2 = tl.sum(m2s, 0) + tl.sum(counts * d * d, 0)
    finish_statistics(
        c, there, count, mean, m2, table, channels, weight, bias,
        running_mean, running_var, num_batches_tracked, momentum, momentum_rest, eps, eps_rest,
    )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "blocks", "tiles_of_positions"])
def apply(
    x, residual, y, table, weight, bias, mean_given, var_given, eps, eps_rest,
    samples, channels, positions, blocks, tiles_of_positions,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`activation((x - mean) * scale + shift + residual)` by the table, or by mean and variance where
    they are given, which then go into the table."""
    block, tile = from_the_end(blocks)
    c, there = channels_of(block, channels, ROWS, WIDTH)
    if mean_given is not None:
        mean = tl.load(mean_given + c, mask=there, other=0.0).to(tl.float64)
        var = tl.load(var_given + c, mask=there, other=1.0).to(tl.float64)
        first = c < tl.where(tile == 0, channels, 0)
        mean, scale, shift = write_table(
            c, there, first, 1.0, mean, var, var, table, channels, weight, bias, eps, eps_rest
        )  # fmt: skip
    else:
        mean, scale, shift = load_statistics(table, c, there, channels)
    offsets, inside, _ = place(
        c, tile, samples, channels, positions, tiles_of_positions, ROWS, HEIGHT, WIDTH
    )  # fmt: skip
    values = tl.load(x + offsets, mask=inside, other=0.0).to(WIDE)
    _finish(values, offsets, inside, mean, scale, shift, residual, y, WIDE, ACTIVATION)


@triton.jit(do_not_specialize=["samples"])
def normalise(
    x, residual, y, table, weight, bias, running_mean, running_var, num_batches_tracked,
    momentum, momentum_rest, eps, eps_rest, samples, channels, positions,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """All of a training forward, for blocks of channels that are one tile: x is read once."""
    c, there = channels_of(tl.program_id(0), channels, ROWS, WIDTH)
    offsets, inside, count = place(c, 0, samples, channels, positions, 1, ROWS, HEIGHT, WIDTH)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(WIDE)
    mean, m2 = moments_of(values, inside, count, ROWS)
    mean, scale, shift = finish_statistics(
        c, there, count.to(tl.float64), mean, m2, table, channels, weight, bias,
        running_mean, running_var, num_batches_tracked, momentum, momentum_rest, eps, eps_rest,
    )  # fmt: skip
    _finish(values, offsets, inside, mean, scale, shift, residual, y, WIDE, ACTIVATION)


@triton.jit
def _finish(
    values, offsets, inside, mean, scale, shift, residual, y, WIDE: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    mean, scale, shift = rounded(mean, scale, shift, WIDE)
    # An explicit fma, so that an output that is computed again by another kernel is the same to the bit.
    z = tl.fma(values - mean, scale + tl.zeros_like(values), shift + tl.zeros_like(values))
    if residual is not None:
        z += tl.load(residual + offsets, mask=inside, other=0.0).to(WIDE)
    tl.store(y + offsets, activate(z, ACTIVATION), mask=inside)
