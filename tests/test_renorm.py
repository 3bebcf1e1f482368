"""Batch renormalization against algorithm 1 of Ioffe 2017, written out in float64."""

import math

import pytest
import torch

from batchnorm import Renorm, batch_norm

# Largest error as a share of the largest value of the oracle in float64: the order of sums, some
# roundings, and the rounding of a half precision result or of the terms that a gradient is the sum of.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
EPS = 1e-3
LIMITS = [(3.0, 5.0), (1.2, 5.0), (3.0, 0.1), (1.2, 0.1), (1.0, 5.0), (3.0, 0.0), (math.inf, math.inf)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(actual, expected):
    assert actual.shape == expected.shape
    atol = TOLERANCE[actual.dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def parameters(dtype=torch.float64):
    """weight, bias, running_mean, running_var; some channels near the batch's, some far away."""
    weight, bias = torch.randn(4, dtype=dtype), torch.randn(4, dtype=dtype)
    mean, var = torch.tensor([[0.1, 1, -4, 30], [1.1, 0.2, 8, 400]], dtype=dtype)
    return weight, bias, mean, var


def algorithm_1(x, weight, bias, mean, var, limits, momentum=0.1, weights=None):
    """Output and new statistics; the training half of algorithm 1, with r and d cut out of the graph."""
    r_max, d_max = limits
    x, weight, bias, mean, var = (tensor.double() for tensor in (x, weight, bias, mean, var))
    w = torch.ones_like(x) if weights is None else weights.double().expand_as(x)
    count = w.sum((0, 2))
    mu_b = (w * x).sum((0, 2)) / count
    m2 = (w * (x - mu_b[:, None]) ** 2).sum((0, 2))
    sigma_b, sigma = (m2 / count + EPS).sqrt(), (var + EPS).sqrt()
    r = (sigma_b / sigma).clamp(1 / r_max, r_max).detach()
    d = ((mu_b - mean) / sigma).clamp(-d_max, d_max).detach()
    x_hat = (x - mu_b[:, None]) / sigma_b[:, None] * r[:, None] + d[:, None]
    y = x_hat * weight[:, None] + bias[:, None]
    new_mean = mean + momentum * (mu_b - mean)
    new_var = var + momentum * (m2 / (count - 1) - var)
    return y, new_mean.detach(), new_var.detach()


# The formulas.


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_algorithm_1(dtype, limits):
    tensors = parameters(torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = [torch.randn(8, 4, 5).to(dtype), *tensors[:2]]
    exact = [leaf.double().clone().requires_grad_() for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    y, mean, var = batch_norm(*leaves, *tensors[2:], renorm=limits, eps=EPS)
    expected = algorithm_1(*exact, *tensors[2:], limits)
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == tensors[2].dtype
    for actual, wanted in zip((y, mean, var), expected, strict=True):
        close(actual, wanted)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    expected[0].backward(grad.double())
    for leaf, exact_leaf in zip(leaves, exact, strict=True):
        close(leaf.grad, exact_leaf.grad)


def test_the_limits_matter():
    # Or the cases above would prove nothing.
    x, tensors = torch.randn(8, 4, 5, dtype=torch.float64), parameters()
    results = [algorithm_1(x, *tensors, limits)[0] for limits in LIMITS]
    results.append(batch_norm(x, *tensors, eps=EPS)[0])
    for i in range(len(results)):
        for j in range(i):
            assert not torch.allclose(results[i], results[j], rtol=1e-3, atol=1e-3), (i, j)


@pytest.mark.parametrize("without", ["weight", "bias", "both"])
def test_without_weight_or_bias(without):
    x, (weight, bias, mean, var) = torch.randn(8, 4, 5, dtype=torch.float64), parameters()
    weight_or_1 = weight if without == "bias" else torch.ones_like(weight)
    bias_or_0 = bias if without == "weight" else torch.zeros_like(bias)
    y, _, _ = batch_norm(
        x,
        weight if without == "bias" else None,
        bias if without == "weight" else None,
        mean,
        var,
        renorm=(1.2, 0.5),
        eps=EPS,
    )
    close(y, algorithm_1(x, weight_or_1, bias_or_0, mean, var, (1.2, 0.5))[0])


def test_no_correction_is_plain_batch_norm():
    tensors = parameters()
    x = torch.randn(8, 4, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for renorm in ((1, 0), None):
        y, mean, var = batch_norm(x, *tensors, renorm=renorm, eps=EPS)
        results.append((y, mean, var, *torch.autograd.grad(y.pow(3).sum(), x)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_free_correction_is_inference():
    # Not clipped, r and d undo the batch's statistics: the same output in training and in eval mode.
    x, tensors = torch.randn(8, 4, 5, dtype=torch.float64), parameters()
    y, _, _ = batch_norm(x, *tensors, renorm=(1e6, 1e6), eps=EPS)
    close(y, batch_norm(x, *tensors, training=False, eps=EPS)[0])


def test_r_and_d_carry_no_gradient():
    # If they did, an unclipped renorm would have the gradient of inference, 1 / running_std.
    x, tensors = torch.randn(8, 4, 5, dtype=torch.float64, requires_grad=True), parameters()
    tensors[2].requires_grad_()
    tensors[3].requires_grad_()
    y, _, _ = batch_norm(x, *tensors, renorm=(1e6, 1e6), eps=EPS)
    grad, *rest = torch.autograd.grad(y.sum(), [x, *tensors[2:]], allow_unused=True)
    assert rest == [None, None]
    # A shift of x changes nothing through (x - mean) / std, so the sum of y has no gradient.
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


def test_r_and_d_carry_no_tangent():
    x, tensors = torch.randn(8, 4, 5, dtype=torch.float64), parameters()
    tangents = (torch.ones_like(x), torch.ones(4).double(), torch.ones(4).double())

    def function(x, mean, var):
        return batch_norm(x, *tensors[:2], mean, var, renorm=(1e6, 1e6), eps=EPS)

    _, (y, mean, var) = torch.func.jvp(function, (x, *tensors[2:]), tangents)
    torch.testing.assert_close(y, torch.zeros_like(x), rtol=0, atol=1e-12)
    assert not mean.any()
    assert not var.any()


# With the other options.


def test_masks():
    x, tensors = torch.randn(8, 4, 5, dtype=torch.float64), parameters()
    for mask in (torch.rand(8, 1, 5) > 0.3, torch.rand(8, 1, 1) + 0.1):
        outputs = batch_norm(x, *tensors, renorm=(1.2, 0.5), mask=mask, eps=EPS)
        for actual, expected in zip(outputs, algorithm_1(x, *tensors, (1.2, 0.5), weights=mask), strict=True):
            close(actual, expected)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ghost_batches_are_corrected_each_by_itself(size):
    x, tensors = torch.randn(8, 4, 5, dtype=torch.float64), parameters()
    y, mean, var = batch_norm(x, *tensors, renorm=(1.2, 0.5), ghost_batch_size=size, eps=EPS)
    close(y, torch.cat([algorithm_1(part, *tensors, (1.2, 0.5))[0] for part in x.split(size)]))
    _, expected_mean, expected_var = algorithm_1(x, *tensors, (1.2, 0.5))
    close(mean, expected_mean)
    close(var, expected_var)


def test_eval_mode_is_not_corrected():
    x, tensors = torch.randn(8, 4, 5), parameters(torch.float32)
    expected = batch_norm(x, *tensors, training=False)[0]
    assert torch.equal(batch_norm(x, *tensors, training=False, renorm=True)[0], expected)


def test_true_is_the_paper_s_final_limits():
    x, tensors = torch.randn(8, 4, 5), parameters(torch.float32)
    for renorm in (Renorm(), (3, 5), {"r_max": 3.0, "d_max": 5.0}):
        assert torch.equal(batch_norm(x, *tensors, renorm=renorm)[0], batch_norm(x, *tensors, renorm=True)[0])


def test_statistics_in_half_precision():
    # As in model.half(): an eps of 1e-9 is nothing beside a float16 variance of 0.
    x = torch.randn(8, 4, 5).half()
    mean, var = torch.zeros(4).half(), torch.zeros(4).half()
    y, _, _ = batch_norm(x, None, None, mean, var, renorm=True, eps=1e-9)
    assert y.isfinite().all()


# parse.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (False, None),
        (True, Renorm(3.0, 5.0)),
        (Renorm(2, 1), Renorm(2, 1)),
        ((2, 1), Renorm(2, 1)),
        ([2.5, 0], Renorm(2.5, 0)),
        ({"r_max": 2, "d_max": 1}, Renorm(2, 1)),
        ({"d_max": 1}, Renorm(3.0, 1)),
        ((1, 0), Renorm(1, 0)),
    ],
)
def test_parse(value, expected):
    parsed = Renorm.parse(value)
    assert parsed == expected
    assert parsed is None or isinstance(parsed, Renorm)


@pytest.mark.parametrize(
    "value",
    [
        (0.9, 5),
        (3, -0.1),
        (math.nan, 5),
        (3, math.nan),
        Renorm(0.5, 1),
        (3, 5, 7),
        ("3", "5"),
        "35",
        3,
        2.5,
        {"rmax": 3},
        {"r_max": 3, "d_max": None},
        object(),
    ],
)
def test_parse_refuses(value):
    with pytest.raises(ValueError, match=r"renorm=.* is not understood: .*r_max >= 1 and d_max >= 0"):
        Renorm.parse(value)
