"""The CPU kernels' statistics, application and backward apart, against the definition in float64."""

import itertools

import pytest
import torch

from batchnorm.kernels import cpu
from batchnorm.kernels.autograd import FUSED
from batchnorm.kernels.cpu import rows, slabs, team
from batchnorm.kernels.cpu.plan import _GROUP_COLUMNS, _SHORT_RUN, _TILE_BYTES_OF_CACHED, _WIDE_ROW
from tests.kernels.cpu_checks import KINKS, LAST, agree, inputs, size_of_terms
from tests.kernels.definition import EPS, by_definition
from tests.kernels.halves import by_halves

pytestmark = pytest.mark.skipif(not team.available(), reason="torch's threads are not libgomp's here")


@pytest.fixture(autouse=True)
def _every_size_may_have_a_team(monkeypatch):
    monkeypatch.setattr(team, "_WORTH_A_TEAM", 1)
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def check(
    shape, dtype=torch.float32, activation=None, with_residual=False, samples=(), factor=1.0, **options
):
    channel_dim = options.get("channel_dim", 1)
    x, weight, bias, residual, grad = inputs(shape, dtype, **options)
    residual = residual if with_residual else None
    # At a kink, rounding decides on which side a value is: no gradient comes from there.
    for kink in KINKS.get(activation, ()):
        z = by_definition(x, weight, bias, residual, grad, None, channel_dim)[0]
        grad = grad.masked_fill((z - kink).abs() < 1e-3, 0)
    tensors = x, weight, bias, residual, grad
    expected = by_definition(*tensors, activation, channel_dim)
    actual = by_halves(
        cpu, *tensors, eps=EPS, activation=activation, channel_dim=channel_dim, samples=samples
    )
    agree(actual, expected, dtype, factor, size_of_terms(weight, grad, expected[2]))


TILE = _TILE_BYTES_OF_CACHED // 4
# Positions on both sides of what makes short runs, blocks and tiles; with enough channels for the tiles.
POSITIONS = [
    1, 2, _SHORT_RUN - 1, _SHORT_RUN, _SHORT_RUN + 1, slabs.BLOCK - 1, slabs.BLOCK, slabs.BLOCK + 1,
    TILE // 2, TILE + 1,
]  # fmt: skip


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_contiguous_across_blocks_and_tiles(positions, threads):
    torch.set_num_threads(threads)
    check((3, 3, positions), activation="relu", with_residual=threads == 2, samples=(1,))


@pytest.mark.parametrize("channels", [1, 7, 8, 9, _GROUP_COLUMNS // 16 - 1, _GROUP_COLUMNS // 16 + 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_groups_of_short_runs(channels, threads):
    torch.set_num_threads(threads)
    check((5, channels, 4, 4), activation="silu", with_residual=threads == 2, samples=(1, 3))


@pytest.mark.parametrize(
    "channels", [1, 3, _WIDE_ROW - 1, _WIDE_ROW, _WIDE_ROW + 1, rows.TILE_COLUMNS, rows.TILE_COLUMNS + 1]
)
@pytest.mark.parametrize("count", [5, rows.MOST_ROWS, rows.MOST_ROWS + 1])
def test_rows_across_blocks_and_tiles(channels, count):
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        check((count, channels), activation="relu", with_residual=threads == 2, samples=(3,))


LAYOUTS = {
    "slabs": ((4, 3, 9, 9), False),
    "groups": ((4, 9, 3, 3), False),
    "rows": ((9, 5), False),
    "small samples": ((67, 5, 3), False),
    "channels_last": ((4, 5, 3, 3), True),
    "channels_last_3d": ((4, 5, 2, 3, 2), True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(layout, dtype):
    shape, last = LAYOUTS[layout]
    for affine, with_residual, activation in itertools.product(
        (True, False), (True, False), (None, "relu", "silu")
    ):
        check(shape, dtype, activation, with_residual, samples=(1, 2), last=last, affine=affine)


def test_channels_along_other_dimensions():
    check((3, 4, 6), channel_dim=2, activation="silu", with_residual=True, samples=(1,))


@pytest.mark.parametrize("activation", sorted(filter(None, FUSED)))
def test_activations(activation):
    # Loops that the ordinary layers have too: nothing here is compiled for the halves alone.
    for shape in ((4, 3, 9, 9), (9, 5)):
        for with_residual in (False, True):
            check(shape, torch.float32, activation, with_residual, samples=(2,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_far_from_zero(layout):
    shape, last = LAYOUTS[layout]
    many = (40 * shape[0], *shape[1:])
    for activation in (None, "silu"):
        check(many, activation=activation, offset=1e4, samples=(shape[0],), factor=3, last=last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_that_are_far_from_each_other(layout):
    shape, last = LAYOUTS[layout]
    x, weight, bias, residual, grad = inputs((2 * shape[0], *shape[1:]), torch.float64, last)
    x[: shape[0]] += 1e4
    tensors = x, weight, bias, residual, grad
    expected = by_definition(*tensors, "silu")
    agree(
        by_halves(cpu, *tensors, eps=EPS, activation="silu", samples=(shape[0],)),
        expected,
        torch.float64,
        100,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_go_where_they_go_on_one_process(layout, kind):
    shape, last = LAYOUTS[layout]
    x, weight, bias, _, grad = inputs(shape, last=last)
    x[1, 2] = kind
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y, moments = cpu.training(*leaves, eps=EPS, channel_dim=1, activation="relu")
    y.backward(grad)
    expected = [y, moments.mean, moments.var(), *[leaf.grad for leaf in leaves]]
    actual = by_halves(cpu, x, weight, bias, None, grad, eps=EPS, activation="relu", samples=(2,))
    for got, wanted in zip(actual, expected, strict=False):
        assert torch.equal(got.isfinite(), wanted.isfinite())
    assert y.isfinite().any()
    assert not y.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_to_the_bit(layout):
    """Statistics and the output are those of a layer that is alone; its output is built again from either."""
    shape, last = LAYOUTS[layout]
    x, weight, bias, residual, _ = inputs(shape, last=last)
    options = {"eps": EPS, "channel_dim": 1, "activation": "gelu", "residual": residual}
    y, moments = cpu.training(x, weight, bias, **options)
    found = cpu.statistics(x, channel_dim=1)
    for name in ("count", "mean", "m2"):
        assert torch.equal(getattr(found, name), getattr(moments, name)), name
    again, _ = cpu.apply(x, found, weight, bias, **options)
    assert torch.equal(again, y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_another_layout(layout):
    shape, last = LAYOUTS[layout]
    x, weight, bias, _, grad = inputs(shape, last=last)
    tensors = x, weight, bias, None
    expected = by_halves(cpu, *tensors, grad, eps=EPS, activation="silu")
    scattered = torch.stack([grad, grad], -1)[..., 0]
    if len(shape) in LAST and not last:
        scattered = grad.contiguous(memory_format=LAST[len(shape)])
    assert scattered.stride() != x.stride()
    for got, wanted in zip(
        by_halves(cpu, *tensors, scattered, eps=EPS, activation="silu"), expected, strict=True
    ):
        assert got is wanted or torch.equal(got, wanted)


def test_memory_with_gaps_is_refused():
    with pytest.raises(ValueError, match=r"x\.contiguous\(\)"):
        cpu.statistics(torch.randn(4, 3, 8)[:, :, ::2], channel_dim=1)
