"""batch_norm against torch's own in float64, and against the formula written out."""

import math
import shutil

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

from batchnorm import batch_norm, functional
from batchnorm.kernels import cpu, native, reference
from tests.activations import ACTIVATIONS

# Largest error as a share of the largest value of the oracle, which is given the same rounded inputs in
# float64. float64: the order of sums. float32: some roundings of 6e-8, which the division by a small std
# may raise. Half precision: statistics and arithmetic are float32, so what counts is the rounding of the
# result, 2**-9 and 2**-12, and for a gradient that of the two or three terms it is the sum of.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(9, 3), (5, 3, 7), (4, 3, 5, 6), (2, 3, 4, 5, 6)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[reference, native, cpu], ids=["reference", "native", "cpu"])
def kernel(request, monkeypatch):
    """Each of the kernels in turn, whatever the choice would be."""
    if request.param is cpu:
        monkeypatch.setattr(cpu, "pays", lambda *call: True)  # whatever the size
    else:
        monkeypatch.setattr(functional, "choose", lambda *tensors, **options: request.param)
    return request.param


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(actual, expected, dtype=None):
    dtype = actual.dtype if dtype is None else dtype
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    atol = TOLERANCE[dtype] * max(scale, 1e-3)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol, equal_nan=True)


def by_formula(x, weight=None, bias=None, mean=None, var=None, eps=1e-5, channel_dim=1):
    """The definition in differentiable float64, by torch.var_mean."""
    x = x.double()
    shape = [1] * x.ndim
    shape[channel_dim] = -1
    if mean is None:
        dims = [dim for dim in range(x.ndim) if dim != channel_dim % x.ndim]
        var, mean = torch.var_mean(x, dims, correction=0)
    y = (x - mean.double().view(shape)) / (var.double().view(shape) + eps).sqrt()
    y = y if weight is None else y * weight.double().view(shape)
    return y if bias is None else y + bias.double().view(shape)


def parameters(dtype=torch.float32, channels=3, **kwargs):
    """weight, bias, running_mean, running_var."""
    like = {"dtype": dtype, **kwargs}
    weight, bias, mean = (torch.randn(channels, **like) for _ in range(3))
    return weight, bias, mean, torch.rand(channels, **like) + 0.5


def case(name, x):
    """Keyword arguments for batch_norm by the name of what they turn on."""
    mask = torch.rand(x.shape[0], 1, *x.shape[2:], generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:2] = True
    mask[-2:] = True
    mask[2:3, ..., 0] = False
    return {
        "plain": {},
        "eval": {"training": False},
        "mask": {"mask": mask},
        "weights": {"mask": mask * 1.5},
        "ghost": {"ghost_batch_size": 2},
        "uneven ghost": {"ghost_batch_size": 3},
        "renorm": {"renorm": (1.5, 0.5)},
        "all": {"mask": mask, "ghost_batch_size": 3, "renorm": (1.5, 0.5)},
        "relu": {"residual": torch.randn(x.shape, dtype=x.dtype), "activation": "relu"},
        "cumulative": {"momentum": None, "num_batches_tracked": torch.tensor(3)},
        "skip": {"skip_nonfinite": True},
    }[name]


CASES = ["plain", "eval", "mask", "weights", "ghost", "uneven ghost", "renorm", "all", "relu"]
EVERY_CASE = [*CASES, "cumulative", "skip"]


# Against torch.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_torch(shape, dtype, training, kernel):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    for affine in (True, False):
        for tracked in (True, False) if training else (True,):
            for momentum in (0.1, 0.0, 1.0):
                weight, bias, mean, var = parameters(kept)
                x = (torch.randn(shape) * 2 + 1).to(dtype).requires_grad_()
                leaves = [x, weight.requires_grad_(), bias.requires_grad_()] if affine else [x]
                exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
                expected_mean, expected_var = None, None
                if tracked:
                    expected_mean, expected_var = mean.double().clone(), var.double().clone()
                expected = F.batch_norm(
                    exact[0],
                    expected_mean,
                    expected_var,
                    *exact[1:],
                    training=training,
                    momentum=momentum,
                    eps=1e-4,
                )
                y, new_mean, new_var = batch_norm(
                    *(leaves if affine else [x, None, None]),
                    *((mean, var) if tracked else (None, None)),
                    training=training,
                    momentum=momentum,
                    eps=1e-4,
                )
                assert y.dtype == dtype
                close(y, expected)
                if tracked:
                    close(new_mean, expected_mean)
                    close(new_var, expected_var)
                else:
                    assert new_mean is new_var is None
                grad = torch.randn(shape).to(dtype)
                y.backward(grad)
                expected.backward(grad.double())
                for leaf, exact_leaf in zip(leaves, exact, strict=True):
                    close(leaf.grad, exact_leaf.grad)


def test_the_defaults_are_those_of_a_layer_in_training():
    x = torch.randn(8, 3, 4)
    layer = nn.BatchNorm1d(3)
    y, mean, var = batch_norm(x, layer.weight, layer.bias, torch.zeros(3), torch.ones(3))
    close(y, layer(x))
    close(mean, layer.running_mean)
    close(var, layer.running_var)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_weight_alone_and_bias_alone(which, kernel):
    x, parameter = torch.randn(8, 3, 4), torch.randn(3)
    y, _, _ = batch_norm(x, **{which: parameter})
    close(y, by_formula(x, **{which: parameter}))
    y, _, _ = batch_norm(
        x, running_mean=torch.ones(3), running_var=torch.ones(3), training=False, **{which: parameter}
    )
    close(y, by_formula(x, mean=torch.ones(3), var=torch.ones(3), **{which: parameter}))


@pytest.mark.parametrize("channel_dim", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("training", [True, False])
def test_any_channel_dim_is_a_movedim(channel_dim, training, kernel):
    weight, bias, mean, var = parameters(torch.float64)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    moved = x.movedim(1, channel_dim).contiguous().requires_grad_()
    y, new_mean, new_var = batch_norm(
        moved, weight, bias, mean, var, training=training, channel_dim=channel_dim
    )
    assert y.is_contiguous()
    x.requires_grad_()
    expected = F.batch_norm(x, mean, var, weight, bias, training=training)
    close(y, expected.movedim(1, channel_dim))
    close(new_mean, mean)
    close(new_var, var)
    grad = torch.randn_like(x)
    y.backward(grad.movedim(1, channel_dim))
    expected.backward(grad)
    close(moved.grad, x.grad.movedim(1, channel_dim))


@pytest.mark.parametrize(
    ("name", "channel_dim"),
    [("ghost", -1), *((name, dim) for name in ("mask", "renorm", "relu") for dim in (0, 1, -1))],
)
def test_any_channel_dim_with_options(name, channel_dim):
    x, tensors = torch.randn(6, 3, 5, dtype=torch.float64), parameters(torch.float64)
    options = case(name, x)
    expected = batch_norm(x, *tensors, **options)
    for moved in ("mask", "residual"):
        if moved in options:
            options[moved] = options[moved].movedim(1, channel_dim)
    y, mean, var = batch_norm(x.movedim(1, channel_dim), *tensors, channel_dim=channel_dim, **options)
    close(y, expected[0].movedim(1, channel_dim))
    close(mean, expected[1])
    close(var, expected[2])


@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_correction(correction, kernel):
    x, (_, _, mean, var) = torch.randn(4, 3, 5, dtype=torch.float64), parameters(torch.float64)
    y, new_mean, new_var = batch_norm(x, None, None, mean, var, momentum=0.3, correction=correction)
    # The output is normalised by the biased variance whatever the running one is.
    close(y, by_formula(x))
    close(new_mean, 0.7 * mean + 0.3 * x.mean((0, 2)))
    close(new_var, 0.7 * var + 0.3 * x.var((0, 2), correction=correction))


@pytest.mark.parametrize("as_tensor", [True, False])
def test_cumulative_average(as_tensor, kernel):
    layer = nn.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for seen in range(4):
        x = torch.randn(6, 3, dtype=torch.float64) * seen + seen
        layer(x)
        count = torch.tensor(seen) if as_tensor else seen
        _, mean, var = batch_norm(x, None, None, mean, var, momentum=None, num_batches_tracked=count)
        close(mean, layer.running_mean)
        close(var, layer.running_var)


def test_eval_returns_the_statistics_as_they_are():
    _, _, mean, var = parameters()
    _, new_mean, new_var = batch_norm(torch.randn(4, 3), None, None, mean, var, training=False)
    assert torch.equal(new_mean, mean)
    assert torch.equal(new_var, var)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_value_is_enough_in_eval(shape):
    x, (weight, bias, mean, var) = torch.randn(shape), parameters()
    y, _, _ = batch_norm(x, weight, bias, mean, var, training=False, ghost_batch_size=1)
    close(y, by_formula(x, weight, bias, mean, var))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_nan_and_inf_go_where_they_go_in_torch(bad, training, kernel):
    x, (weight, bias, mean, var) = torch.randn(5, 3, 2), parameters()
    x[2, 1, 0] = bad
    y, new_mean, new_var = batch_norm(x, weight, bias, mean, var, training=training)
    expected = F.batch_norm(x, mean, var, weight, bias, training=training)
    torch.testing.assert_close(y, expected, equal_nan=True)
    # After an inf torch's mean is inf; the reference's may be NaN.
    assert torch.equal(new_mean.isfinite(), mean.isfinite())
    torch.testing.assert_close(new_var, var, equal_nan=True)


def test_a_constant_channel(kernel):
    x = torch.full((8, 3, 4), 7.0)
    y, _, var = batch_norm(x, None, torch.ones(3), torch.zeros(3), torch.ones(3), momentum=1.0)
    # torch's kernel folds the mean into the offset: 7 / sqrt(eps) is rounded twice.
    assert (y - 1).abs().max() <= (0 if kernel is reference else 7 / math.sqrt(1e-5) * 2**-23)
    assert (var == 0).all()


# Pure.


@pytest.mark.parametrize("name", EVERY_CASE)
def test_nothing_is_written_into(name, kernel):
    x = torch.randn(6, 3, 4)
    options = case(name, x)
    inputs = [x, *parameters(), *(value for value in options.values() if isinstance(value, torch.Tensor))]
    before = [(tensor.clone(), tensor._version) for tensor in inputs]
    outputs = batch_norm(*inputs[:5], **options)
    for tensor, (values, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version
    assert outputs[0].data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", EVERY_CASE)
def test_the_statistics_are_outside_the_graph(name, kernel):
    x = torch.randn(6, 3, 4, requires_grad=True)
    weight, bias, mean, var = parameters()
    y, new_mean, new_var = batch_norm(
        x, weight.requires_grad_(), bias.requires_grad_(), mean, var, **case(name, x.detach())
    )
    assert y.requires_grad
    assert not new_mean.requires_grad
    assert not new_var.requires_grad


def test_a_series_keeps_no_graph_alive():
    # The tutorial's layer keeps the graph of every step that its running mean has been through.
    weight, bias, mean, var = parameters()
    weight.requires_grad_()
    for _ in range(3):
        y, mean, var = batch_norm(torch.randn(6, 3), weight, bias, mean, var, renorm=True)
    nodes, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [parent for parent, _ in node.next_functions]
    y, _, _ = batch_norm(torch.randn(6, 3), weight, bias, *parameters()[2:], renorm=True)
    first, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in first:
            first.add(node)
            todo += [parent for parent, _ in node.next_functions]
    assert len(nodes) == len(first)


# Activation and residual.


@pytest.mark.parametrize("name", ["plain", "eval", "all"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, name, kernel):
    x, tensors = torch.randn(6, 3, 4, dtype=torch.float64) * 3, parameters(torch.float64)
    options = case(name, x)
    residual = torch.randn_like(x)
    plain, _, _ = batch_norm(x, *tensors, **options)
    y, _, _ = batch_norm(x, *tensors, activation=activation, **options)
    close(y, ACTIVATIONS[activation](plain))
    y, _, _ = batch_norm(x, *tensors, activation=activation, residual=residual, **options)
    close(y, ACTIVATIONS[activation](plain + residual))
    y, _, _ = batch_norm(x, *tensors, residual=residual, **options)
    close(y, plain + residual)


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(reference.ACTIVATIONS)


def test_the_residual_gets_the_gradient_of_the_sum(kernel):
    x, residual = torch.randn(6, 3), torch.randn(6, 3, requires_grad=True)
    y, _, _ = batch_norm(x, activation="tanh", residual=residual)
    y.sum().backward()
    close(residual.grad, 1 - y.detach() ** 2)


# Masks.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_mask_is_compacted_data(shape, dtype):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var = parameters(kept)
    x = torch.randn(shape).to(dtype).requires_grad_()
    mask = torch.rand(shape[0], 1, *shape[2:]) > 0.4
    keep = mask.movedim(1, -1).squeeze(-1)
    exact = x.detach().double().requires_grad_()
    expected_mean, expected_var = mean.double().clone(), var.double().clone()
    expected = F.batch_norm(
        exact.movedim(1, -1)[keep], expected_mean, expected_var, weight.double(), bias.double(), training=True
    )
    y, new_mean, new_var = batch_norm(x, weight, bias, mean, var, mask=mask)
    actual = y.movedim(1, -1)[keep]
    close(actual, expected)
    close(new_mean, expected_mean)
    close(new_var, expected_var)
    grad = torch.randn(actual.shape).to(dtype)
    actual.backward(grad)
    expected.backward(grad.double())
    close(x.grad, exact.grad)


@pytest.mark.parametrize("mask_shape", [(6, 1, 4), (6, 3, 4), (1, 1, 4), (6, 1, 1), (4,), (3, 1)])
def test_all_positions_are_normalised_by_the_weighted_moments(mask_shape):
    x, tensors = torch.randn(6, 3, 4, dtype=torch.float64), parameters(torch.float64)
    weights = torch.rand(mask_shape, dtype=torch.float64) + 0.1
    w = weights.expand_as(x)
    count = w.sum((0, 2))
    mean = (w * x).sum((0, 2)) / count
    m2 = (w * (x - mean[:, None]) ** 2).sum((0, 2))
    y, new_mean, new_var = batch_norm(x, *tensors, mask=weights)
    close(y, by_formula(x, *tensors[:2], mean, m2 / count))
    close(new_mean, 0.9 * tensors[2] + 0.1 * mean)
    close(new_var, 0.9 * tensors[3] + 0.1 * m2 / (count - 1))


def test_whole_weights_repeat_samples():
    x, tensors = torch.randn(5, 3, 4, dtype=torch.float64), parameters(torch.float64)
    repeats = torch.tensor([2, 1, 0, 3, 1])
    expected = batch_norm(x.repeat_interleave(repeats, 0), *tensors)
    y, mean, var = batch_norm(x, *tensors, mask=repeats[:, None, None])
    close(y[repeats > 0].repeat_interleave(repeats[repeats > 0], 0), expected[0])
    close(mean, expected[1])
    close(var, expected[2])


def test_a_mask_of_ones_changes_nothing():
    x, tensors = torch.randn(6, 3, 4, dtype=torch.float64), parameters(torch.float64)
    for mask in (torch.ones(6, 1, 4, dtype=torch.bool), torch.ones(()), torch.ones(1, 3, 1)):
        for actual, expected in zip(batch_norm(x, *tensors, mask=mask), batch_norm(x, *tensors), strict=True):
            close(actual, expected)


def test_nan_under_the_mask_stays_there():
    x, tensors = torch.randn(6, 3, 4), parameters()
    mask = case("mask", x)["mask"]
    expected = batch_norm(x, *tensors, mask=mask)
    y, mean, var = batch_norm(x.where(mask, math.nan), *tensors, mask=mask)
    torch.testing.assert_close(y, expected[0].where(mask, math.nan), equal_nan=True)
    close(mean, expected[1])
    close(var, expected[2])


def gradients_under_a_mask(x, weight, bias, mask, **options):
    """First and second derivatives of a loss that leaves out what the mask does."""

    def loss(x, weight, bias):
        y, _, _ = batch_norm(x, weight, bias, *parameters(torch.float64)[2:], mask=mask, **options)
        return y.where(mask != 0, 0).pow(3).sum()

    first = torch.func.grad(loss, (0, 1, 2))(x, weight, bias)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    once = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    penalty = once[0].where(mask != 0, 0).square().sum() + once[1].square().sum()
    return [*first, *once, *torch.autograd.grad(penalty, leaves)]


@pytest.mark.parametrize("padding", [math.nan, -math.inf, 1e30])
@pytest.mark.parametrize("name", ["mask", "weights", "all"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_what_lies_under_the_mask_spoils_no_gradient(padding, name, activation):
    x, tensors = torch.randn(6, 3, 4, dtype=torch.float64), parameters(torch.float64)
    options = {**case(name, x), "activation": activation}
    keep = options["mask"] != 0
    results = []
    for filling in (0.0, padding):
        torch.manual_seed(1)  # of the running statistics, for renorm
        results.append(gradients_under_a_mask(x.where(keep, filling), *tensors[:2], **options))
    for got, wanted in zip(*reversed(results), strict=True):
        close(got, wanted)
        assert got.isfinite().all()


def test_eval_mode_does_not_look_at_the_mask():
    x, tensors = torch.randn(6, 3, 4), parameters()
    expected, _, _ = batch_norm(x, *tensors, training=False)
    for mask in (torch.zeros(6, 1, 4, dtype=torch.bool), torch.rand(6, 1, 1)):
        assert torch.equal(batch_norm(x, *tensors, training=False, mask=mask)[0], expected)


# Batches that are left out.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["plain", "mask", "ghost", "renorm", "all"])
def test_skip_nonfinite(name, bad, kernel):
    x, tensors = torch.randn(6, 3, 4), parameters()
    options = case(name, x)
    for actual, expected in zip(
        batch_norm(x, *tensors, skip_nonfinite=True, **options),
        batch_norm(x, *tensors, **options),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    x[0, 1, 2] = bad
    _, mean, var = batch_norm(x, *tensors, skip_nonfinite=True, **options)
    assert torch.equal(mean, tensors[2])
    assert torch.equal(var, tensors[3])
    _, mean, var = batch_norm(x, *tensors, **options)
    assert mean.isfinite().tolist() == var.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0), (0, 3, 2, 2)])
@pytest.mark.parametrize("name", ["plain", "eval", "ghost", "renorm", "cumulative", "skip"])
def test_an_empty_batch_leaves_the_statistics(name, shape):
    x = torch.empty(shape, requires_grad=True)
    tensors = parameters()
    options = {} if name == "plain" else case(name, torch.randn(6, 3))
    y, mean, var = batch_norm(x, *tensors, activation="relu", **options)
    assert y.shape == shape
    assert torch.equal(mean, tensors[2])
    assert torch.equal(var, tensors[3])
    y.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("name", ["plain", "ghost", "renorm"])
def test_no_channels(name):
    none = torch.empty(0)
    y, mean, var = batch_norm(torch.empty(6, 0, 4), none, none, none, none, **case(name, torch.randn(6, 3)))
    assert y.shape == (6, 0, 4)
    assert mean.shape == var.shape == (0,)


# Layouts.


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((6, 3, 4, 5), torch.channels_last),
        ((6, 3, 4, 5, 2), torch.channels_last_3d),
        ((6, 3, 4, 5), torch.contiguous_format),
    ],
    ids=["channels_last", "channels_last_3d", "contiguous"],
)
def test_the_layout_is_kept(shape, memory_format, name, kernel):
    x = torch.randn(shape, dtype=torch.float64)
    tensors, options = parameters(torch.float64), case(name, x)
    if "residual" in options:
        options["residual"] = options["residual"].to(memory_format=memory_format)
    laid = x.to(memory_format=memory_format).requires_grad_()
    y, mean, var = batch_norm(laid, *tensors, **options)
    assert y.is_contiguous(memory_format=memory_format)
    grad = torch.randn_like(y)
    (first,) = torch.autograd.grad(y, laid, grad, retain_graph=True)
    assert first.is_contiguous(memory_format=memory_format)
    # The layout makes no difference to the numbers.
    x.requires_grad_()
    expected = batch_norm(x, *tensors, **options)
    close(y, expected[0])
    close(mean, expected[1])
    close(var, expected[2])
    close(first, *torch.autograd.grad(expected[0], x, grad))


@pytest.mark.parametrize("name", CASES)
def test_strided_and_expanded_inputs(name, kernel):
    base = torch.randn(8, 6, 10, dtype=torch.float64)
    for x in (
        base.transpose(1, 2)[:, :3],
        base[::2, 1:6:2, ::3],
        base.permute(2, 1, 0)[:, :3],
        base[:6, :3, :1].expand(6, 3, 4),
        base[:1, :3].expand(6, 3, 10),
    ):
        tensors = parameters(torch.float64)
        options = case(name, x)
        strided = batch_norm(x, *tensors, **options)
        contiguous = batch_norm(x.clone(memory_format=torch.contiguous_format), *tensors, **options)
        for actual, expected in zip(strided, contiguous, strict=True):
            close(actual, expected)


def test_strided_parameters(kernel):
    x = torch.randn(6, 3, 4)
    strided = [tensor.repeat_interleave(2)[::2] for tensor in parameters()]
    for actual, expected in zip(
        batch_norm(x, *strided), batch_norm(x, *(tensor.clone() for tensor in strided)), strict=True
    ):
        close(actual, expected)


# Dtypes, devices, autocast.


@pytest.mark.parametrize("name", EVERY_CASE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes_through_every_path(dtype, name):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    x, tensors = torch.randn(6, 3, 4).to(dtype), parameters(kept)
    options = case(name, x)
    y, mean, var = batch_norm(x, *tensors, **options)
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == kept
    if "residual" in options:
        options["residual"] = options["residual"].double()
    exact = batch_norm(x.double(), *(tensor.double() for tensor in tensors), **options)
    close(y, exact[0])
    close(mean, exact[1])
    close(var, exact[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_all_in_half_precision(dtype, training):
    x, tensors = torch.randn(16, 3, 8).to(dtype), [tensor.to(dtype) for tensor in parameters()]
    y, mean, var = batch_norm(x, *tensors, training=training)
    assert y.dtype == mean.dtype == var.dtype == dtype
    exact = batch_norm(x.double(), *(tensor.double() for tensor in tensors), training=training)
    close(y, exact[0])
    close(mean, exact[1])
    close(var, exact[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY_CASE)
def test_autocast(name, dtype):
    x, tensors = torch.randn(6, 3, 4).to(dtype).requires_grad_(), parameters()
    options = case(name, x.detach())
    expected = batch_norm(x, *tensors, **options)
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, var = batch_norm(x, *tensors, **options)
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == torch.float32
    for actual, wanted in zip((y, mean, var), expected, strict=True):
        assert torch.equal(actual, wanted)
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_autocast_after_a_convolution():
    conv, tensors = nn.Conv1d(2, 3, 3), parameters()
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(torch.randn(6, 2, 8))
        assert x.dtype == torch.bfloat16
        y, mean, _ = batch_norm(x, *tensors)
    assert y.dtype == torch.bfloat16
    assert mean.dtype == torch.float32
    close(y, by_formula(x, *tensors[:2]))
    y.float().sum().backward()
    assert conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", EVERY_CASE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_meta(name, dtype, kernel):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.empty(6, 3, 4, 5, device="meta", dtype=dtype).to(memory_format=torch.channels_last)
    options = case(name, torch.randn(6, 3, 4, 5).to(dtype))
    options = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in options.items()
    }
    y, mean, var = batch_norm(x, *parameters(kept, device="meta"), **options)
    assert (y.device.type, y.dtype, y.shape) == ("meta", dtype, x.shape)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for tensor in (mean, var):
        assert (tensor.device.type, tensor.dtype, tensor.shape) == ("meta", kept, (3,))


# Derivatives. Renorm's r and d are constants for the gradient, but not for finite differences: there they
# are held at their limits by running statistics that are far away.

LOOSE = 1e-3


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, kernel):
    x = torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.full((2,), 50.0).double(), torch.full((2,), 100.0).double()
    options = case(name, x.detach())
    inputs = [x, weight, bias]
    if "residual" in options:
        # Away from the kink of relu.
        inputs.append((options.pop("residual") * 5).requires_grad_())
        options["activation"] = "silu"

    def function(x, weight, bias, *residual):
        residual = residual[0] if residual else None
        return batch_norm(x, weight, bias, mean, var, eps=LOOSE, residual=residual, **options)[0]

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_activations(activation):
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, residual):
        return batch_norm(x, eps=LOOSE, activation=activation, residual=residual)[0]

    assert gradcheck(function, (x, residual), check_forward_ad=True)
    if activation != "hardsigmoid":  # torch has no second derivative of it
        assert gradgradcheck(function, (x, residual))


def test_gradcheck_by_running_statistics():
    # Trained through in eval mode, as some style transfer and test-time adaptation does.
    tensors = [tensor.requires_grad_() for tensor in parameters(torch.float64)]
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def function(x, *tensors):
        return batch_norm(x, *tensors, training=False)[0]

    assert gradcheck(function, (x, *tensors))
    assert gradgradcheck(function, (x, *tensors))


@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name, kernel):
    x, tangent = torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    tensors, options = parameters(torch.float64), case(name, x)
    options.pop("activation", None)
    with forward_ad.dual_level():
        outputs = batch_norm(forward_ad.make_dual(x, tangent), *tensors, **options)
        y_tangent, *rest = [forward_ad.unpack_dual(output).tangent for output in outputs]
    assert rest == [None, None]
    # <v, J t> = <J^T v, t>, with the J^T of reverse mode.
    v = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(batch_norm(leaf, *tensors, **options)[0], leaf, v)
    torch.testing.assert_close((v * y_tangent).sum(), (grad * tangent).sum())


def test_the_gradient_is_orthogonal_to_the_scale_and_offset_of_the_input(kernel):
    # y does not change when x is shifted, nor (eps aside) when it is scaled.
    x = torch.randn(8, 3, 5, dtype=torch.float64, requires_grad=True)
    y, _, _ = batch_norm(x, eps=1e-30)
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    zeros = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(grad.sum((0, 2)), zeros, rtol=0, atol=1e-12)
    torch.testing.assert_close((grad * x).sum((0, 2)), zeros, rtol=0, atol=1e-12)


# torch.func.


def loss_of(x, tensors, options):
    return (batch_norm(x, *tensors, **options)[0].pow(3)).sum()


@pytest.mark.parametrize("name", EVERY_CASE)
def test_func_grad(name):
    x, tensors = torch.randn(6, 3, 4, dtype=torch.float64), parameters(torch.float64)
    options = case(name, x)

    def loss(x, weight, bias):
        return loss_of(x, (weight, bias, *tensors[2:]), options)

    leaves = [tensor.clone().requires_grad_() for tensor in (x, *tensors[:2])]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.func.grad(loss, (0, 1, 2))(x, *tensors[:2])
    for a, b in zip(actual, expected, strict=True):
        close(a, b)


def test_func_grad_of_the_formula():
    x, (weight, bias, _, _) = torch.randn(6, 3, 4, dtype=torch.float64), parameters(torch.float64)
    actual = torch.func.grad(lambda x: batch_norm(x, weight, bias)[0].pow(3).sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_formula(leaf, weight, bias).pow(3).sum(), leaf)
    close(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_func_jvp(name):
    x, tangent = torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    tensors, options = parameters(torch.float64), case(name, x)
    outputs, tangents = torch.func.jvp(lambda x: batch_norm(x, *tensors, **options), (x,), (tangent,))
    for actual, expected in zip(outputs, batch_norm(x, *tensors, **options), strict=True):
        close(actual, expected)
    v = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(batch_norm(leaf, *tensors, **options)[0], leaf, v)
    torch.testing.assert_close((v * tangents[0]).sum(), (grad * tangent).sum())
    assert not tangents[1].any()
    assert not tangents[2].any()


@pytest.mark.parametrize("name", EVERY_CASE)
def test_vmap_in_training_mode_is_a_loop(name):
    xs, tensors = torch.randn(4, 6, 3, 2, dtype=torch.float64), parameters(torch.float64)
    options = case(name, xs[0])
    stacked = torch.vmap(lambda x: batch_norm(x, *tensors, **options))(xs)
    for i in range(4):
        for actual, expected in zip(stacked, batch_norm(xs[i], *tensors, **options), strict=True):
            close(actual[i], expected)


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_an_ensemble(name):
    # Parameters and statistics of their own for each model, and one input for all.
    x = torch.randn(6, 3, 2, dtype=torch.float64)
    models = [parameters(torch.float64) for _ in range(2)]
    tensors = [torch.stack(tensor) for tensor in zip(*models, strict=True)]
    options = case(name, x)
    stacked = torch.vmap(lambda *tensors: batch_norm(x, *tensors, **options))(*tensors)
    for i in range(2):
        for actual, expected in zip(stacked, batch_norm(x, *models[i], **options), strict=True):
            close(actual[i], expected)


def test_vmap_over_counts_of_batches():
    xs, (_, _, mean, var) = torch.randn(3, 6, 3), parameters()
    counts = torch.tensor([0, 1, 9])

    def cumulative(x, count):
        return batch_norm(x, None, None, mean, var, momentum=None, num_batches_tracked=count)[1:]

    stacked = torch.vmap(cumulative)(xs, counts)
    for i, count in enumerate(counts.tolist()):
        for actual, expected in zip(stacked, cumulative(xs[i], count), strict=True):
            close(actual[i], expected)


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_grad(name):
    xs, tensors = torch.randn(4, 6, 3, 2, dtype=torch.float64), parameters(torch.float64)
    options = case(name, xs[0])
    stacked = torch.vmap(torch.func.grad(lambda x: loss_of(x, tensors, options)))(xs)
    for x, actual in zip(xs, stacked, strict=True):
        leaf = x.clone().requires_grad_()
        close(actual, *torch.autograd.grad(loss_of(leaf, tensors, options), leaf))


def test_jacobians_and_the_hessian():
    x, tensors = torch.randn(4, 2, dtype=torch.float64), parameters(torch.float64, channels=2)
    expected = torch.autograd.functional.jacobian(lambda x: by_formula(x, *tensors[:2]), x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        close(transform(lambda x: batch_norm(x, *tensors)[0])(x), expected)
    expected = torch.autograd.functional.hessian(lambda x: by_formula(x, *tensors[:2]).pow(3).sum(), x)
    close(torch.func.hessian(lambda x: loss_of(x, tensors, {}))(x), expected)


# torch.compile.


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", EVERY_CASE)
def test_compile_is_eager(name):
    x, tensors = torch.randn(6, 3, 4, dtype=torch.float64), parameters(torch.float64)
    options = case(name, x)

    def function(x, *tensors):
        return batch_norm(x, *tensors, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, function):
        leaf = x.clone().requires_grad_()
        y, mean, var = call(leaf, *tensors)
        y.pow(3).sum().backward()
        assert not mean.requires_grad
        results.append((y.detach(), mean, var, leaf.grad))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["plain", "mask", "uneven ghost", "renorm"])
def test_compile_with_dynamic_shapes(name):
    tensors = parameters(torch.float64)

    def function(x, options):
        return batch_norm(x, *tensors, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for samples, length in ((7, 4), (10, 5), (13, 6)):
        x = torch.randn(samples, 3, length, dtype=torch.float64)
        options = case(name, x)
        for actual, expected in zip(compiled(x, options), function(x, options), strict=True):
            close(actual, expected)


@pytest.mark.usefixtures("compiler")
def test_one_graph_serves_every_step_of_a_cumulative_average():
    from torch._dynamo.testing import CompileCounter  # no attribute of torch._dynamo until it is imported

    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(x, mean, var, seen):
        return batch_norm(x, None, None, mean, var, momentum=None, num_batches_tracked=seen)[1:]

    layer = nn.BatchNorm1d(3, momentum=None)
    mean, var, seen = torch.zeros(3), torch.ones(3), torch.tensor(0)
    for _ in range(4):
        x = torch.randn(6, 3)
        layer(x)
        mean, var = step(x, mean, var, seen)
        seen = seen + 1
        close(mean, layer.running_mean)
        close(var, layer.running_var)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("compiler")
def test_compile_keeps_channels_last():
    x, tensors = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last), parameters()
    compiled = torch.compile(batch_norm, fullgraph=True, backend="aot_eager")
    assert compiled(x, *tensors)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_to_machine_code():
    x, tensors = torch.randn(6, 3, 4, 5), parameters()
    options = case("relu", x)

    def function(x, *tensors):
        return batch_norm(x, *tensors, **options)

    results = []
    for call in (torch.compile(function, fullgraph=True), function):
        leaf = x.clone().requires_grad_()
        y, mean, var = call(leaf, *tensors)
        y.pow(2).sum().backward()
        results.append((y.detach(), mean, var, leaf.grad))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


# Bad input.


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((3,), {}, r"rank 2 or more.*\(3,\)"),
        ((), {}, "rank 2 or more"),
        ((4, 5), {}, r"weight has shape \(3,\).*\(4, 5\) has 5 channels along dimension 1.*channel_dim"),
        ((4, 5, 3), {}, r"has 5 channels along dimension 1: expected shape \(5,\)"),
        ((4, 3, 5), {"channel_dim": -1}, r"has 5 channels along dimension 2"),
        ((4, 3), {"channel_dim": 2}, r"channel_dim=2 is no dimension of an input of shape \(4, 3\)"),
        ((4, 3), {"channel_dim": -3}, r"channel_dim=-3 is no dimension"),
        ((1, 3), {}, r"more than 1 value per channel when training.*\(1, 3\).*drop_last=True"),
        ((1, 3, 1, 1), {}, r"more than 1 value per channel.*\(1, 3, 1, 1\)"),
        ((4, 3), {"ghost_batch_size": 1}, r"more than 1 value per channel.*\(4, 3\) with ghost_batch_size=1"),
        ((4, 3), {"ghost_batch_size": 0}, r"ghost_batch_size=0 must be a whole number of samples, 1 or more"),
        ((4, 3), {"ghost_batch_size": -2}, "ghost_batch_size=-2"),
        ((4, 3), {"ghost_batch_size": 2.0}, r"ghost_batch_size=2\.0 must be a whole number"),
        ((3, 4), {"ghost_batch_size": 2, "channel_dim": 0}, "channel_dim=0 puts the channels"),
        ((4, 3), {"eps": 0}, r"eps=0 must be above 0"),
        ((4, 3), {"eps": -1e-5}, r"eps=-1e-05 must be above 0"),
        ((4, 3), {"eps": math.nan}, r"eps=nan must be above 0"),
        ((4, 3), {"momentum": 1.5}, r"momentum=1\.5 is outside \[0, 1\]"),
        ((4, 3), {"momentum": -0.1}, r"momentum=-0\.1 is outside"),
        ((4, 3), {"momentum": math.nan}, "momentum=nan is outside"),
        ((4, 3), {"momentum": None}, r"momentum=None .* needs num_batches_tracked"),
        ((4, 3), {"correction": -1}, "correction=-1 must be 0 or more"),
        ((4, 3), {"correction": math.nan}, "correction=nan"),
        ((4, 3), {"activation": "swish"}, r"unknown activation 'swish'.*relu, .*silu, .*softplus"),
        ((4, 3), {"activation": "ReLU"}, "unknown activation 'ReLU'"),
        ((4, 3), {"residual": torch.ones(4, 1)}, r"residual has shape \(4, 1\).*\(4, 3\)"),
        ((4, 3), {"mask": torch.ones(4, 2)}, r"mask of shape \(4, 2\) does not broadcast .*\(4, 3\)"),
        ((4, 3), {"mask": torch.ones(1, 4, 3)}, r"mask of shape \(1, 4, 3\) does not broadcast"),
        ((4, 3), {"mask": torch.zeros(4, 1)}, r"mask of shape \(4, 1\) is empty"),
        ((4, 3), {"mask": torch.tensor([True, False, True])}, r"mask of shape \(3,\) is empty"),
        ((4, 3), {"mask": torch.eye(4, 3) > 0}, r"mask of shape \(4, 3\) leaves a channel one"),
        ((4, 3), {"mask": torch.tensor([1.0, -1.0, 1.0])}, "negative, infinite or NaN weight"),
        ((4, 3), {"mask": torch.tensor([1.0, math.nan, 1.0])}, "negative, infinite or NaN weight"),
        ((4, 3), {"renorm": (0.5, 1)}, r"renorm=\(0\.5, 1\) is not understood"),
    ],
)
def test_bad_values(shape, options, words):
    with pytest.raises(ValueError, match=words):
        batch_norm(torch.randn(shape), *parameters(), **options)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (torch.ones(4, 3, dtype=torch.int64), {}, r"got torch.int64: convert it first.*x\.float\(\)"),
        (torch.ones(4, 3, dtype=torch.bool), {}, "got torch.bool"),
        (torch.ones(4, 3, dtype=torch.complex64), {}, "got torch.complex64"),
        ([[1.0, 2.0, 3.0]] * 4, {}, r"got list: wrap it in torch.as_tensor"),
        (torch.ones(4, 3), {"mask": torch.ones(4, 3, dtype=torch.complex64)}, "weights, got torch.complex64"),
        (torch.ones(4, 3), {"mask": [[True]] * 4}, r"mask to be a torch.Tensor, got list"),
        (torch.ones(4, 3), {"residual": 1}, r"residual to be a torch.Tensor, got int"),
    ],
)
def test_bad_types(x, options, words):
    for training in (True, False):
        with pytest.raises(TypeError, match=words):
            batch_norm(x, *parameters(), training=training, **options)


@pytest.mark.parametrize("which", ["weight", "bias", "running_mean", "running_var"])
def test_a_tensor_with_the_wrong_number_of_channels_is_named(which):
    tensors = dict(zip(("weight", "bias", "running_mean", "running_var"), parameters(), strict=True))
    for bad in (torch.ones(4), torch.ones(1), torch.ones(3, 1), torch.ones(())):
        for training in (True, False):
            with pytest.raises(ValueError, match=rf"^{which} has shape .*expected shape \(3,\)"):
                batch_norm(torch.randn(4, 3), **{**tensors, which: bad}, training=training)


def test_running_statistics_go_together():
    x = torch.randn(4, 3)
    for options in ({"running_mean": torch.zeros(3)}, {"running_var": torch.ones(3)}):
        for training in (True, False):
            with pytest.raises(ValueError, match="running_mean and running_var go together"):
                batch_norm(x, **options, training=training)
    with pytest.raises(ValueError, match="training=False normalises by running_mean and running_var"):
        batch_norm(x, training=False)
    with pytest.raises(ValueError, match="renorm corrects towards running_mean and running_var"):
        batch_norm(x, renorm=True)


def test_a_bad_option_is_refused_in_eval_too():
    x, tensors = torch.randn(4, 3), parameters()
    bad = {
        "eps": 0,
        "momentum": 2,
        "correction": -1,
        "activation": "no",
        "ghost_batch_size": 0,
        "renorm": "no",
    }
    for option, value in bad.items():
        with pytest.raises(ValueError, match=option):
            batch_norm(x, *tensors, training=False, **{option: value})


def test_what_only_training_needs_is_not_asked_for_in_eval():
    x, tensors = torch.randn(1, 3), parameters()
    y, _, _ = batch_norm(
        x, *tensors, training=False, momentum=None, ghost_batch_size=1, mask=torch.zeros(1, 3), renorm=True
    )
    close(y, by_formula(x, *tensors))


def test_a_failed_call_leaves_the_statistics():
    tensors = parameters()
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match="drop_last"):
        batch_norm(torch.randn(1, 3), *tensors)
    assert all(map(torch.equal, tensors, before))
