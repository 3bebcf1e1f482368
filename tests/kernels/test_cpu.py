"""The CPU kernels against the definition in float64: shapes, dtypes, activations, and layers."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm as bn
from batchnorm.kernels import cpu, reference
from batchnorm.kernels.autograd import FUSED
from tests.kernels.cpu_checks import CPU, LAST, TOLERANCE, check, inputs
from tests.kernels.definition import EPS, by_definition

pytestmark = CPU


BLOCK, SHORT, WIDE = 4096, 256, 64


POSITIONS = [1, 2, 3, 31, 127, SHORT - 1, SHORT, SHORT + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("samples", "channels"), [(1, 1), (2, 3), (3, 2), (7, 5)])
def test_contiguous_across_blocks(samples, channels, positions):
    if samples * positions > 1:
        check((samples, channels, positions))
        check((samples, channels, positions), activation="relu", running=True)


GROUP_CHANNELS, GROUP_POSITIONS = [1, 2, 3, 7, 8, 9, 16, 17, 33, 146, 147], [4, 49, 100, 1024, 1025]


GROUP_SAMPLES = (1, 2, 4, 5, 31, 32, 41)


# Every pair of channels, positions and samples: two of the samples for each pair of the others.
@pytest.mark.parametrize(("i", "channels"), enumerate(GROUP_CHANNELS))
@pytest.mark.parametrize(("j", "positions"), enumerate(GROUP_POSITIONS))
def test_groups_of_short_runs(i, channels, j, positions):
    for samples in (GROUP_SAMPLES[(i + 2 * j + k) % len(GROUP_SAMPLES)] for k in range(2)):
        check((samples, channels, positions), activation="relu", with_residual=samples % 2 == 0)


@pytest.mark.parametrize("channels", [1, 2, 3, 31, WIDE - 1, WIDE, WIDE + 1, 511, 512, 513, 1031])
def test_rows_across_tiles(channels):
    for rows in (2, 3, 4, 5, 31, 32, 33, 263):
        check((rows, channels), activation="relu")
    check((2, channels, 5, 7), last=True)
    check((2, channels, 3, 5, 1), last=True, running=True)
    check((3, 11, channels), channel_dim=-1, with_residual=True, activation="silu")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 150), (4, 9, 6, 6), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("last", [False, True])
def test_dtypes_ranks_and_affine(shape, dtype, last):
    last = last and len(shape) in LAST
    for affine in (True, False):
        for running in (True, False):
            check(shape, dtype, affine=affine, running=running, last=last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", [*sorted(filter(None, FUSED)), "softplus"])
def test_activations(activation, dtype):
    # Each combination is a loop of its own to compile: half of them in one dtype, the others in the other,
    # every pair of layout, residual and statistics in both.
    odd = dtype == torch.float64
    if activation == "hardsigmoid":
        dtype = torch.float32  # torch's own slope in float64 is 1/6 in float32
    shapes = [((5, 9, 7, 7), False), ((3, 5, 13, 13), False), ((3, 5, 13, 13), True)]
    for i, (shape, last) in enumerate(shapes):
        for with_residual in (False, True):
            running = (i + with_residual + odd) % 2 == 1
            check(shape, dtype, activation, with_residual, last=last, running=running)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", sorted(filter(None, FUSED)))
def test_activations_over_the_whole_line(activation, dtype):
    z = torch.cat(
        [torch.linspace(-120, 120, 100_001), torch.randn(1000) * 1e-4, torch.tensor([-0.0, 1e30, -1e30])]
    )
    z = z.to(dtype)[:, None].requires_grad_()
    mean, var = torch.zeros(1, dtype=dtype), torch.full((1,), 1 - 1e-12, dtype=dtype)
    y = cpu.inference(z, mean, var, None, None, eps=1e-12, channel_dim=1, activation=activation)
    y.sum().backward()
    wide = z.detach().double().requires_grad_()
    wanted = reference.ACTIVATIONS[activation](wide)
    wanted.sum().backward()
    digits = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=digits, atol=digits)
    if activation == "hardsigmoid":
        digits = 1e-7
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=2 * digits, atol=2 * digits)
    nan = torch.full((40, 1), torch.nan, dtype=dtype)
    y = cpu.inference(nan, mean, var, None, None, eps=EPS, channel_dim=1, activation=activation)
    assert y.isnan().all()


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (1,), (2,), (3,), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("running", [False, True])
def test_gradients_of_some_inputs(wanted, activation, running):
    for shape in [(4, 5, 200), (6, 9, 7, 7), (40, 6)]:
        x, weight, bias, residual, grad = inputs(shape, torch.float64)
        statistics = (torch.randn(shape[1]).double(), torch.rand(shape[1]).double() + 1) if running else None
        expected = by_definition(x, weight, bias, residual, grad, activation, running=statistics)[3:]
        leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate((x, weight, bias, residual))]
        options = {"eps": EPS, "channel_dim": 1, "activation": activation, "residual": leaves[3]}
        if running:
            y = cpu.inference(leaves[0], *statistics, leaves[1], leaves[2], **options)
        else:
            y, _ = cpu.training(leaves[0], leaves[1], leaves[2], **options)
        y.backward(grad)
        for k, leaf in enumerate(leaves):
            if k in wanted:
                torch.testing.assert_close(leaf.grad, expected[k], rtol=0, atol=1e-11)
            else:
                assert leaf.grad is None


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(data):
    rank = data.draw(st.integers(2, 5))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
    channel_dim = data.draw(st.sampled_from([1, rank - 1]))
    if torch.Size(shape).numel() <= shape[channel_dim]:
        return
    check(
        shape,
        data.draw(st.sampled_from(list(TOLERANCE))),
        data.draw(st.sampled_from([None, "relu", "tanh"])),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        channel_dim=channel_dim,
        last=channel_dim == 1 and rank in LAST and data.draw(st.booleans()),
        affine=data.draw(st.booleans()),
    )


@pytest.mark.parametrize(
    ("rank", "shape"), [(1, (40, 7)), (1, (6, 7, 30)), (2, (4, 7, 9, 9)), (3, (2, 7, 3, 4, 5))]
)
def test_a_layer_equals_torch_nn(rank, shape):
    theirs, ours = (getattr(module, f"BatchNorm{rank}d")(7).double() for module in (nn, bn))
    for step, train in enumerate([True, True, False, True]):
        x = torch.randn(shape, dtype=torch.float64) * (step + 1) + step
        theirs.train(train), ours.train(train)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)
