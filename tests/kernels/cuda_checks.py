"""What the tests of the interpreted Triton kernels share: inputs, a call there and back, comparisons."""

from importlib.util import find_spec

import pytest
import torch

from batchnorm.kernels import cuda
from batchnorm.kernels.autograd import FUSED
from tests.kernels.definition import EPS, by_definition

INTERPRETED = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="here test_cuda.py runs them on the GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's: NumPy about inf and NaN
    pytest.mark.usefixtures("cut"),
]

# Largest error as a share of the largest value: some roundings.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
ACTIVATIONS = sorted(filter(None, FUSED))
WHOLE = {"tile": 4096, "whole": 1 << 20}


def inputs(shape, dtype=torch.float32, last=False, channel_dim=1, affine=True, offset=0.0, parameters=None):
    """x, weight, bias, residual and upstream gradient."""
    x, residual, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    x = x + offset
    if last:
        x, residual, grad = (t.contiguous(memory_format=LAST[len(shape)]) for t in (x, residual, grad))
    channels = shape[channel_dim]
    wide = parameters or (torch.float64 if dtype == torch.float64 else torch.float32)
    weight, bias = (torch.randn(channels).to(wide) if affine else None for _ in range(2))
    return x, weight, bias, residual, grad


def by_kernel(x, weight, bias, residual, grad, activation=None, channel_dim=1, running=None):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    options = {"eps": EPS, "channel_dim": channel_dim, "activation": activation, "residual": residual}
    if running is None:
        y, moments = cuda.training(x, weight, bias, **options)
        mean, var = moments.mean, moments.var()
    else:
        y, (mean, var) = cuda.inference(x, *running, weight, bias, **options), running
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    y.backward(grad)
    for leaf in leaves:
        assert leaf is None or leaf.grad.dtype == leaf.dtype
    return [y.detach(), mean, var, *[None if t is None else t.grad for t in leaves]]


NAMES = ("y", "mean", "var", "x", "weight", "bias", "residual")


def agree(actual, expected, dtype, factor=1.0):
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        if wanted is None:
            assert got is None, name
            continue
        of_numbers = name in ("mean", "var", "weight", "bias")
        tolerance = TOLERANCE[torch.float32 if of_numbers and dtype.itemsize == 2 else dtype]
        if got.dtype.itemsize == 2:
            tolerance = TOLERANCE[got.dtype]
        scale = max(wanted.abs().max().item(), 20.0 if name in ("weight", "bias") else 1.0)
        torch.testing.assert_close(
            got.double(),
            wanted.double(),
            rtol=0,
            atol=tolerance * factor * scale,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def check(shape, dtype=torch.float32, activation=None, with_residual=False, running=False, **options):
    channel_dim = options.get("channel_dim", 1)
    x, weight, bias, residual, grad = inputs(shape, dtype, **options)
    statistics = None
    if running:
        statistics = (torch.randn(shape[channel_dim]), torch.rand(shape[channel_dim]) + 0.5)
    call = (x, weight, bias, residual if with_residual else None, grad, activation, channel_dim, statistics)
    agree(by_kernel(*call), by_definition(*call), dtype)


def assert_built_again(saved, y):
    """To the bit, in memory of its own."""
    assert torch.equal(saved, y)
    assert saved.data_ptr() != y.data_ptr()
