"""What the CPU kernels' tests share: inputs, a call forward and backward, and the definition beside it."""

import os
import subprocess
import sys

import pytest
import torch

from batchnorm.kernels import choose, cpu
from batchnorm.kernels.cpu import team
from tests.kernels.definition import EPS, by_definition

CPU = [
    pytest.mark.skipif(not team.available(), reason="torch's threads are not libgomp's here"),
    pytest.mark.usefixtures("small_inputs_too"),
]

# Largest error as a share of the largest value, by dtype: some roundings of 6e-8 and 1e-16.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Slabs, groups of channels, small samples, and rows.
LAYOUTS = [
    ((4, 5, 200), False),
    ((6, 9, 7, 7), False),
    ((6, 12, 3, 3), False),  # on 1, 2 and 3 threads
    ((70, 9, 2, 2), False),
    ((6, 9, 7, 7), True),
    ((40, 6), False),
]


def inputs(shape, dtype=torch.float32, last=False, channel_dim=1, affine=True, offset=0.0):
    """x, weight, bias, residual and upstream gradient."""
    x, residual, grad = (torch.randn(shape, dtype=dtype) for _ in range(3))
    x = x + offset
    if last:
        x, residual, grad = (t.contiguous(memory_format=LAST[len(shape)]) for t in (x, residual, grad))
    channels = shape[channel_dim]
    weight = torch.randn(channels, dtype=dtype) if affine else None
    bias = torch.randn(channels, dtype=dtype) if affine else None
    return x, weight, bias, residual, grad


def by_kernel(x, weight, bias, residual, grad, activation=None, channel_dim=1, running=None):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    assert choose(x, channel_dim % x.ndim, (weight, bias), residual) is cpu
    options = {
        "eps": EPS, "channel_dim": channel_dim % x.ndim, "activation": activation, "residual": residual,
    }  # fmt: skip
    if running is None:
        y, moments = cpu.training(x, weight, bias, **options)
        mean, var = moments.mean, moments.var()
    else:
        y, (mean, var) = cpu.inference(x, *running, weight, bias, **options), running
    y.backward(grad)
    return [y.detach(), mean, var, *[None if t is None else t.grad for t in leaves]]


KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3), "hardsigmoid": (-3, 3)}


NAMES = ("y", "mean", "var", "x", "weight", "bias", "residual")


def agree(actual, expected, dtype, factor=1.0, term=0.0):
    """`term` is the size of the terms that cancel in a gradient of x."""
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        if wanted is None:
            assert got is None, name
            continue
        scale = max(wanted.abs().max().item(), 0.1, term if name == "x" else 0.0)
        if name in ("weight", "bias"):
            scale = max(scale, 20.0)  # sums of many terms that cancel
        atol = TOLERANCE[dtype] * factor * scale
        torch.testing.assert_close(
            got.double(), wanted, rtol=0, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )


def size_of_terms(weight, grad, var):
    """Of `weight * grad / std`, which is about nothing in the end where a batch has two values."""
    scale = torch.rsqrt(var.min() + EPS).item() * grad.abs().max().item()
    return scale * (1.0 if weight is None else weight.abs().max().item())


def check(shape, dtype=torch.float32, activation=None, with_residual=False, running=False, **options):
    channel_dim = options.get("channel_dim", 1)
    x, weight, bias, residual, grad = inputs(shape, dtype, **options)
    residual = residual if with_residual else None
    statistics = None
    if running:
        channels = shape[channel_dim]
        statistics = (torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5)
    # At a kink, rounding decides on which side a value is: no gradient comes from there.
    for kink in KINKS.get(activation, ()):
        z = by_definition(x, weight, bias, residual, grad, None, channel_dim, statistics)[0]
        grad = grad.masked_fill((z - kink).abs() < 1e-5, 0)
    call = (x, weight, bias, residual, grad, activation, channel_dim, statistics)
    expected = by_definition(*call)
    agree(by_kernel(*call), expected, dtype, term=size_of_terms(weight, grad, expected[2]))


def in_process(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env={**os.environ, **environment}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
