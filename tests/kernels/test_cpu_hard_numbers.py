"""The CPU kernels on numbers that are hard to sum: far from zero, huge, subnormal, constant, NaN and inf."""

import itertools

import pytest
import torch

from batchnorm.kernels import cpu, native
from batchnorm.kernels.autograd import FUSED
from tests.kernels.cpu_checks import CPU, NAMES, TOLERANCE, agree, by_kernel, inputs
from tests.kernels.definition import EPS, assert_not_finite_where_torch_is, by_definition

pytestmark = CPU


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
@pytest.mark.parametrize(
    ("shape", "last"), [((8, 3, 50, 50), False), ((64, 9, 7, 7), False), ((8, 12, 20, 20), True)]
)
def test_far_from_zero(shape, last, offset):
    x, weight, bias, _, grad = inputs(shape, last=last, offset=offset)
    _, moments = cpu.training(x, weight, bias, eps=EPS, channel_dim=1)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.var(), var, rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-7, atol=0)
    agree(
        by_kernel(x, weight, bias, None, grad), by_definition(x, weight, bias, None, grad), torch.float32, 3
    )


HARD = [
    ((4, 3, 40, 40), False), ((16, 9, 7, 7), False), ((70, 9, 2, 2), False), ((4, 5, 20, 20), True),
    ((50, 70), False),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("kind", ["huge", "tiny", "zero", "gradient"])
def test_values_whose_sums_overflow_or_underflow(shape, last, kind):
    x, weight, bias, _, grad = inputs(shape, last=last)
    if kind == "gradient":
        x, grad = x * 1e10, grad * 1e29
    else:
        x *= {"huge": 1e30, "tiny": 1e-41, "zero": 0.0}[kind]
    got = by_kernel(x, weight, bias, None, grad)
    wanted = by_definition(x, weight, bias, None, grad)
    for name, a, b in zip(NAMES[:-1], got[:-1], wanted[:-1], strict=True):
        if name == "x" and kind == "huge":
            continue  # docs/design.md, known limits: its coefficients are below float32
        a, b = a.float().double(), b.float().double()
        atol = 2e-5 * b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=atol + 1e-38, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize(("shape", "last"), HARD)
def test_subnormals_are_not_flushed(shape, last):
    x, _, _, _, grad = inputs(shape, last=last)
    x *= 1e-41
    got = by_kernel(x, None, None, None, grad)
    wanted = by_definition(x, None, None, None, grad)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=0, atol=1e-42)
    assert wanted[0].abs().max() > 1e-39
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=1e-45)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "last"), HARD)
def test_running_statistics_far_from_zero(shape, last, dtype):
    x, weight, bias, residual, grad = inputs(shape, dtype, last, offset=1e4)
    running = torch.randn(shape[1]).to(dtype) + 1e4, torch.rand(shape[1]).to(dtype) + 0.5
    call = (x, weight, bias, residual, grad, "silu", 1, running)
    agree(by_kernel(*call), by_definition(*call), dtype)


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("constant", [1e-41, 0.1, -1e4, 1e18, 3e38])
def test_a_constant_has_no_variance(shape, last, constant):
    x = torch.full(shape, constant)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y, moments = cpu.training(x, None, None, eps=EPS, channel_dim=1)
    assert (moments.mean == x.double().flatten()[0]).all()
    assert (moments.m2 == 0).all()
    assert (y == 0).all()


@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("kind", ["nan", "inf", "both infs", "one nan", "one inf"])
def test_nan_and_inf_go_where_torch_lets_them(shape, last, kind):
    x, weight, bias, _, grad = inputs(shape, last=last)
    assert_not_finite_where_torch_is(cpu, kind, x, weight, bias, grad)


@pytest.mark.parametrize("activation", [None, *sorted(filter(None, FUSED))])
@pytest.mark.parametrize(("shape", "last"), HARD)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_gradient_that_is_nan_or_inf_goes_where_torch_lets_it(shape, last, activation, training):
    """Not where the slope of a piecewise activation is 0; inf may become NaN on the way."""
    x, weight, bias, residual, grad = inputs(shape, last=last)
    mean, var = torch.randn(shape[1]), torch.rand(shape[1]) + 0.5
    for value, with_residual in itertools.product((torch.nan, torch.inf), (False, True)):
        grad[1] = value
        found = []
        for kernel in (cpu, native):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)[: 3 + with_residual]]
            options = {
                "eps": EPS, "channel_dim": 1, "activation": activation,
                "residual": leaves[3] if with_residual else None,
            }  # fmt: skip
            if training:
                y, _ = kernel.training(*leaves[:3], **options)
            else:
                y = kernel.inference(leaves[0], mean, var, *leaves[1:3], **options)
            y.backward(grad)
            found.append([leaf.grad for leaf in leaves])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert not found[0][0].isfinite().all()
