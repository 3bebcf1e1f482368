"""Triton kernels of the backward pass: channels in one go, or sums, their merge, and the gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.cuda.activations import differentiate
from batchnorm.kernels.cuda.channel import finish_gradient, load_statistics, rounded
from batchnorm.kernels.cuda.tile import channels_of, from_the_end, place, total


@triton.jit(do_not_specialize=["samples", "tiles", "tiles_of_positions", "parts"])
def take_sums(
    x, extra, grad_y, grad_z, partials, table,
    samples, channels, positions, tiles, tiles_of_positions, parts,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE_FROM: tl.constexpr,
):  # fmt: skip
    """`sum(g)` and `sum(g * (x - rounded mean))` of each block's channels in each part of its tiles, as
    (2, parts, channels), for g the gradient before the activation; it goes into grad_z, if that is there."""
    block, part = tl.program_id(0), tl.program_id(1)
    c, there = channels_of(block, channels, ROWS, WIDTH)
    mean, scale, shift = load_statistics(table, c, there, channels)
    mean, scale, shift = rounded(mean, scale, shift, WIDE)
    first = tl.zeros_like(mean).to(tl.float64)
    second = tl.zeros_like(mean).to(tl.float64)
    for tile in range(part, tiles, parts):
        offsets, inside, _ = place(
            c, tile, samples, channels, positions, tiles_of_positions, ROWS, HEIGHT, WIDTH
        )  # fmt: skip
        centred, g = _centred_and_grad(
            x, extra, grad_y, offsets, inside, mean, scale, shift, WIDE, ACTIVATION, SLOPE_FROM
        )  # fmt: skip
        if grad_z is not None:
            tl.store(grad_z + offsets, g, mask=inside)
        first += total(g, ROWS).to(tl.float64)
        second += total(g * centred, ROWS).to(tl.float64)
    at = partials + part * channels + c
    tl.store(at, first, mask=there)
    tl.store(at + parts * channels, second, mask=there)


@triton.jit(do_not_specialize=["parts"])
def merge_sums(
    partials, table, grad_weight, grad_bias, coefficients, channels, parts,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias by the sums of the parts, and the coefficients `by_x, constant`."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = c < channels
    part = tl.arange(0, PARTS)
    at = part[:, None] * channels + c[None, :]
    inside = (part < parts)[:, None] & there[None, :]
    first = tl.sum(tl.load(partials + at, mask=inside, other=0.0), 0)
    second = tl.sum(tl.load(partials + parts * channels + at, mask=inside, other=0.0), 0)
    by_x, constant = finish_gradient(
        c, there, first, second, table, channels, grad_weight, grad_bias, WIDE
    )  # fmt: skip
    if coefficients is not None:
        tl.store(coefficients + c, by_x, mask=there)
        tl.store(coefficients + channels + c, constant, mask=there)


@triton.jit(do_not_specialize=["samples", "blocks", "tiles_of_positions"])
def grad(
    x, extra, grad_y, grad_x, grad_z, table, coefficients,
    samples, channels, positions, blocks, tiles_of_positions,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE_FROM: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and that before the activation, which is the residual's; either may be None."""
    block, tile = from_the_end(blocks)
    c, there = channels_of(block, channels, ROWS, WIDTH)
    mean, scale, shift = load_statistics(table, c, there, channels)
    mean, scale, shift = rounded(mean, scale, shift, WIDE)
    offsets, inside, _ = place(
        c, tile, samples, channels, positions, tiles_of_positions, ROWS, HEIGHT, WIDTH
    )  # fmt: skip
    centred, g = _centred_and_grad(
        x, extra, grad_y, offsets, inside, mean, scale, shift, WIDE, ACTIVATION, SLOPE_FROM
    )  # fmt: skip
    if grad_z is not None:
        tl.store(grad_z + offsets, g, mask=inside)
    if grad_x is not None:
        found = scale * g
        if coefficients is not None:
            by_x = tl.load(coefficients + c, mask=there, other=0.0).to(WIDE)
            constant = tl.load(coefficients + channels + c, mask=there, other=0.0).to(WIDE)
            found += by_x * centred + constant
        tl.store(grad_x + offsets, found, mask=inside)


@triton.jit(do_not_specialize=["samples"])
def differentiate_whole(
    x, extra, grad_y, grad_x, grad_z, table, grad_weight, grad_bias, samples, channels, positions,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE_FROM: tl.constexpr, BY_BATCH: tl.constexpr,
):  # fmt: skip
    """All of a backward, for blocks of channels that are one tile: x and the gradient are read once."""
    c, there = channels_of(tl.program_id(0), channels, ROWS, WIDTH)
    mean, scale, shift = load_statistics(table, c, there, channels)
    mean, scale, shift = rounded(mean, scale, shift, WIDE)
    offsets, inside, _ = place(c, 0, samples, channels, positions, 1, ROWS, HEIGHT, WIDTH)
    centred, g = _centred_and_grad(
        x, extra, grad_y, offsets, inside, mean, scale, shift, WIDE, ACTIVATION, SLOPE_FROM
    )  # fmt: skip
    first, second = total(g, ROWS).to(tl.float64), total(g * centred, ROWS).to(tl.float64)
    by_x, constant = finish_gradient(
        c, there, first, second, table, channels, grad_weight, grad_bias, WIDE
    )  # fmt: skip
    if grad_z is not None:
        tl.store(grad_z + offsets, g, mask=inside)
    if grad_x is not None:
        found = scale * g
        if BY_BATCH:
            found += by_x.to(WIDE) * centred + constant.to(WIDE)
        tl.store(grad_x + offsets, found, mask=inside)


@triton.jit
def _centred_and_grad(
    x, extra, grad_y, offsets, inside, mean, scale, shift,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE_FROM: tl.constexpr,
):  # fmt: skip
    """`x - rounded mean`, and the gradient before the activation, 0 outside the tensor."""
    centred = tl.load(x + offsets, mask=inside, other=0.0).to(WIDE) - mean
    g = tl.load(grad_y + offsets, mask=inside, other=0.0).to(WIDE)
    if ACTIVATION != "none":
        if SLOPE_FROM == "output":
            z = tl.load(extra + offsets, mask=inside, other=0.0).to(WIDE)
        else:
            z = tl.fma(centred, scale + tl.zeros_like(centred), shift + tl.zeros_like(centred))
            if SLOPE_FROM == "residual":
                z += tl.load(extra + offsets, mask=inside, other=0.0).to(WIDE)
        g = tl.where(inside, differentiate(g, z, ACTIVATION), 0.0)
    return centred, g
