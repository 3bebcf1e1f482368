"""Moments against float64 numpy: from a tensor, merged, and as far off centre as float32 has to go."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.autograd import gradcheck, gradgradcheck

from batchnorm import Moments
from batchnorm.moments import take

# Relative error of the variance. float64 is what the oracle computes in. float32 is the promise.
# Half precision inputs have float32 statistics, and the oracle is given the same rounded values.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}
# Error of the mean as a share of the largest |value|: a few roundings of the statistics' dtype.
MEAN_TOLERANCE = {
    torch.float64: 1e-15,
    torch.float32: 5e-7,
    torch.bfloat16: 5e-7,
    torch.float16: 5e-7,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rows(x, channel_dim=1):
    """The values of each channel, one float64 row per channel."""
    return np.moveaxis(x.detach().double().numpy(), channel_dim, 0).reshape(x.shape[channel_dim], -1)


def oracle(x, channel_dim=1, weights=None):
    """Moments in float64, channel by channel in numpy; only what has a weight is read."""
    weights = torch.ones(()) if weights is None else weights
    counts, means, m2s = [], [], []
    for values, w in zip(rows(x, channel_dim), rows(weights.expand_as(x), channel_dim), strict=True):
        values, w = values[w != 0], w[w != 0]
        counts.append(w.sum())
        means.append((w * values).sum() / w.sum() if len(w) else 0.0)
        m2s.append((w * (values - means[-1]) ** 2).sum())
    return Moments(*(torch.tensor(column, dtype=torch.float64) for column in (counts, means, m2s)))


def assert_moments(moments, expected, dtype, largest):
    """Within the tolerances of `dtype`, for values no larger than `largest`."""
    assert moments.count.dtype == torch.float64
    assert moments.mean.shape == moments.m2.shape == expected.mean.shape
    count = moments.count.expand_as(expected.count)
    torch.testing.assert_close(count, expected.count, rtol=1e-12, atol=0)
    atol = MEAN_TOLERANCE[dtype] * largest
    torch.testing.assert_close(moments.mean.double(), expected.mean, rtol=0, atol=atol)
    torch.testing.assert_close(moments.m2.double(), expected.m2, rtol=TOLERANCE[dtype], atol=0)


def relative_error(moments, x, channel_dim=1):
    expected = torch.tensor(rows(x, channel_dim).var(axis=1))
    return ((moments.var().double() - expected).abs() / expected).max().item()


# From a tensor.


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(9, 3), (5, 3, 7), (4, 3, 5, 6), (2, 3, 4, 5, 6)])
def test_every_rank_and_channel_dimension(shape, dtype):
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype)
    for channel_dim in range(-x.ndim, x.ndim):
        moments = Moments.from_tensor(x, channel_dim=channel_dim)
        assert_moments(moments, oracle(x, channel_dim), dtype, largest=10)
        assert moments.mean.dtype == torch.float64
        assert moments.m2.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_count_is_a_scalar_where_all_channels_have_as_many():
    moments = Moments.from_tensor(torch.randn(4, 3, 5))
    assert moments.count.shape == ()
    assert moments.count == 20


def test_half_precision_is_summed_in_float32():
    # 4,096 ones: the sum stops at 256 in bfloat16 and at 2,048 in float16.
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(4096, 1, dtype=dtype)
        x[::2] = 3
        moments = Moments.from_tensor(x)
        assert moments.mean.item() == 2
        assert moments.m2.item() == 4096


def test_strided_and_expanded_inputs():
    base = torch.randn(6, 8, 10)
    for x in (base.transpose(0, 2), base[::2, 1:7:3], torch.randn(1, 3, 4).expand(5, 3, 4)):
        assert_moments(Moments.from_tensor(x), oracle(x), torch.float32, largest=5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_does_not_matter(memory_format):
    x = torch.randn(4, 3, 5, 6).to(memory_format=memory_format)
    assert_moments(Moments.from_tensor(x), oracle(x), torch.float32, largest=5)


def test_no_values_at_all():
    for shape in [(0, 3), (0, 3, 4), (4, 3, 0)]:
        moments = Moments.from_tensor(torch.empty(shape))
        assert moments.count == 0
        assert moments.mean.tolist() == moments.m2.tolist() == [0, 0, 0]
        assert moments.var().isnan().all()


def test_nan_and_inf_reach_their_own_channel_only():
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(5, 3, 2)
        x[2, 1, 0] = bad
        moments = Moments.from_tensor(x)
        for tensor in (moments.mean, moments.m2):
            assert tensor.isfinite().tolist() == [True, False, True]


def test_the_input_is_not_written_into():
    x, mask = torch.randn(5, 3), torch.tensor([0.0, 1, 2, 1, 0])[:, None]
    before = x.clone(), mask.clone()
    Moments.from_tensor(x, mask=mask)
    assert (x._version, mask._version) == (0, 0)
    assert torch.equal(x, before[0])
    assert torch.equal(mask, before[1])


# Masks and weights.

BROADCASTABLE = [(4, 1, 5), (4, 3, 5), (1, 1, 5), (4, 1, 1), (1, 3, 1), (5,), (3, 5), (1, 5)]


@pytest.mark.parametrize("shape", BROADCASTABLE)
@pytest.mark.parametrize("channel_dim", [0, 1, -1])
def test_boolean_masks(shape, channel_dim):
    x = torch.randn(4, 3, 5)
    for seed in range(3):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
        moments = Moments.from_tensor(x, channel_dim=channel_dim, mask=mask)
        assert_moments(moments, oracle(x, channel_dim, mask), torch.float32, largest=5)


@pytest.mark.parametrize("shape", BROADCASTABLE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weights(shape, dtype):
    x = torch.randn(4, 3, 5).to(dtype)
    weights = torch.rand(shape) * (torch.rand(shape) > 0.2) * 3
    moments = Moments.from_tensor(x, mask=weights)
    assert_moments(moments, oracle(x, weights=weights), dtype, largest=5)


@pytest.mark.parametrize("weight_dtype", [torch.int64, torch.uint8, torch.float32, torch.float16])
def test_whole_weights_repeat_values(weight_dtype):
    x, repeats = torch.randn(6, 3, 4), torch.tensor([2, 0, 1, 5, 1, 3])
    repeated = Moments.from_tensor(x.repeat_interleave(repeats, 0))
    weighted = Moments.from_tensor(x, mask=repeats.to(weight_dtype)[:, None, None])
    assert weighted.count.tolist() == [48, 48, 48]
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(weighted.var(1), repeated.var(1))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_lies_under_the_mask_is_never_read(garbage):
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    mask = torch.rand(6, 1, 4) > 0.3
    clean = Moments.from_tensor(x, mask=mask)
    dirty = x.where(mask, garbage).requires_grad_()
    moments = Moments.from_tensor(dirty, mask=mask)
    assert torch.equal(moments.mean, clean.mean)
    assert torch.equal(moments.m2, clean.m2)
    (moments.mean.sum() + moments.m2.sum()).backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~mask.expand_as(x)] == 0).all()


def test_a_channel_without_values():
    mask = torch.tensor([[True, False, True]]).expand(5, 3)
    moments = Moments.from_tensor(torch.randn(5, 3), mask=mask)
    assert moments.count.tolist() == [5, 0, 5]
    assert moments.mean[1] == moments.m2[1] == 0


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(5, 1), ValueError, r"mask of shape \(5, 1\) does not broadcast to the input's \(4, 3\)"),
        (torch.ones(1, 4, 3), ValueError, r"\(1, 4, 3\) does not broadcast"),
        (torch.tensor([1.0, -1, 1]), ValueError, "negative, infinite or NaN weight"),
        (torch.tensor([1.0, math.nan, 1]), ValueError, "negative, infinite or NaN weight"),
        (
            torch.ones(3, dtype=torch.complex64),
            TypeError,
            "booleans or non-negative weights, got",
        ),
        ([True, False, True], TypeError, "mask to be a torch.Tensor, got list"),
    ],
)
def test_bad_masks(mask, error, words):
    with pytest.raises(error, match=words):
        Moments.from_tensor(torch.randn(4, 3), mask=mask)


@pytest.mark.parametrize(
    ("x", "channel_dim", "error", "words"),
    [
        (torch.ones(4, 3, dtype=torch.int64), 1, TypeError, r"got torch.int64: .*x\.float\(\)"),
        (torch.ones(4, 3, dtype=torch.complex64), 1, TypeError, "got torch.complex64"),
        (torch.ones(4), 0, ValueError, r"rank 2 or more.*\(4,\)"),
        (torch.ones(4, 3), 2, ValueError, r"channel_dim=2 is no dimension.*\(4, 3\)"),
        (torch.ones(4, 3), -3, ValueError, "channel_dim=-3"),
        (np.ones((4, 3)), 1, TypeError, "got ndarray.*as_tensor"),
    ],
)
def test_bad_inputs(x, channel_dim, error, words):
    with pytest.raises(error, match=words):
        Moments.from_tensor(x, channel_dim=channel_dim)


# float32 accuracy: relative variance error <= 1e-5 over the whole range of |mean| / std.

RATIOS = [0, 1, 10, 100, 1_000, 10_000]
SHAPES = [(64, 3), (100_000, 3), (8, 4, 13, 17), (1_000_000, 1), (16, 2, 250, 250), (3, 2, 50, 40, 50)]


def off_centre(shape, ratio, std=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * std
    signs = torch.tensor([(-1.0) ** channel for channel in range(shape[1])])
    return (x + (signs * ratio * std).view(-1, *[1] * (len(shape) - 2))).float()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy_over_the_whole_range(shape, ratio):
    x = off_centre(shape, ratio)
    assert relative_error(Moments.from_tensor(x), x) <= 1e-5


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("std", [1e-12, 1e-3, 1e3, 1e10])
def test_accuracy_at_any_scale(std, ratio):
    x = off_centre((32, 3, 25, 25), ratio, std)
    assert relative_error(Moments.from_tensor(x), x) <= 1e-5


@pytest.mark.parametrize("ratio", RATIOS)
def test_accuracy_with_channels_last_or_elsewhere(ratio):
    x = off_centre((16, 4, 60, 60), ratio)
    layouts = [(x.to(memory_format=torch.channels_last), 1)]
    layouts += [(x.movedim(1, channel_dim).contiguous(), channel_dim) for channel_dim in (0, -1)]
    for x, channel_dim in layouts:
        moments = Moments.from_tensor(x, channel_dim=channel_dim)
        assert relative_error(moments, x, channel_dim) <= 1e-5


@pytest.mark.parametrize("ratio", RATIOS)
def test_accuracy_with_masks_and_weights(ratio):
    x = off_centre((8, 2, 40, 40), ratio)
    for weights in (torch.rand(8, 1, 40, 40) > 0.5, torch.rand(8, 1, 1, 1) * 3, torch.rand(8, 2, 40, 40)):
        expected = oracle(x, weights=weights).var()
        var = Moments.from_tensor(x, mask=weights).var().double()
        assert ((var - expected).abs() / expected).max() <= 1e-5


def uneven(x):
    return x.split([1, 2, 0, 7, 100, x.shape[0] - 110])


def one_by_one(pieces):
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged.merge(piece)
    return merged


def as_a_tree(pieces):
    while len(pieces) > 1:
        pieces = [pieces[i].merge(*pieces[i + 1 : i + 2]) for i in range(0, len(pieces), 2)]
    return pieces[0]


def all_at_once(pieces):
    return pieces[0].merge(*pieces[1:])


def after_an_empty_one(pieces):
    # Empty moments have mean 0, from which everything is far away.
    return Moments.from_tensor(torch.empty(0, pieces[0].mean.shape[0])).merge(*pieces)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("merge", [one_by_one, as_a_tree, all_at_once, after_an_empty_one])
@pytest.mark.parametrize("cut", [uneven, lambda x: x.split(4)], ids=["uneven", "in fours"])
def test_accuracy_of_merged_moments(cut, merge, ratio):
    x = off_centre((512, 2, 100), ratio)
    merged = merge([Moments.from_tensor(piece) for piece in cut(x)])
    assert merged.count.unique().tolist() == [51_200]
    assert relative_error(merged, x) <= 1e-5


def test_accuracy_of_a_long_series_of_merges():
    # A float32 mean would stop moving once a batch moves it by less than half its last digit.
    x = off_centre((12_000, 2), 10_000)
    merged = one_by_one([Moments.from_tensor(piece) for piece in x.split(2)])
    assert relative_error(merged, x) <= 1e-5
    torch.testing.assert_close(merged.mean, torch.tensor(rows(x).mean(1)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("pieces", [2, 5, 200])
def test_accuracy_of_merged_moments_that_differ(pieces, ratio):
    # Nearly all the variance is between the pieces: means rounded to float32 would be off by 1e-3 of it.
    x = torch.randn(pieces, 2, 50, dtype=torch.float64) / 100 + torch.randn(pieces, 2, 1, dtype=torch.float64)
    x = (x / x.std((0, 2), keepdim=True) + ratio).float()
    merged = all_at_once([Moments.from_tensor(piece) for piece in x.split(1)])
    assert relative_error(merged, x) <= 1e-5


# Merging.

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=5)
VALUES = st.floats(-1e4, 1e4, width=32)


@st.composite
def pieces_of_values(draw):
    """Lists of (n, 2) float64 arrays, some empty, on a scale from 1e-3 to 1e3 and with a common offset."""
    lengths = draw(LENGTHS)
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    offset = draw(st.sampled_from([0.0, 1e6]))
    x = draw(hnp.arrays(np.float64, (sum(lengths), 2), elements=st.floats(-10, 10, width=32)))
    return torch.from_numpy(x * scale + offset).split(lengths)


def assert_same(a, b, largest, values):
    """Equal up to a few roundings of numbers as large as `largest`."""
    rounding = 1e-14 * (1 + largest)
    torch.testing.assert_close(a.count.expand_as(a.mean), b.count.expand_as(b.mean), rtol=0, atol=0)
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=rounding)
    # d(m2) = 2 * sum(|x - mean|) * d(x), and d(mean) enters by its square alone.
    spread = (values * (a.m2 + b.m2)).sqrt().max().item() if values else 0.0
    torch.testing.assert_close(a.m2, b.m2, rtol=1e-13, atol=4 * rounding * spread + values * rounding**2)


@settings(max_examples=100, deadline=None)
@given(pieces_of_values())
def test_merged_pieces_are_the_whole(pieces):
    whole = torch.cat(pieces)
    largest = whole.abs().max().item() if len(whole) else 0.0
    merged = all_at_once([Moments.from_tensor(piece) for piece in pieces])
    assert_same(merged, Moments.from_tensor(whole), largest, len(whole))
    assert_same(merged, oracle(whole), largest, len(whole))


@settings(max_examples=100, deadline=None)
@given(pieces_of_values(), st.randoms(use_true_random=False))
def test_merge_is_associative_and_order_free(pieces, random):
    moments = [Moments.from_tensor(piece) for piece in pieces]
    values = sum(map(len, pieces))
    largest = max((piece.abs().max().item() for piece in pieces if len(piece)), default=0.0)
    expected = all_at_once(moments)
    shuffled = random.sample(moments, len(moments))
    for merge in (all_at_once, one_by_one, as_a_tree):
        assert_same(merge(shuffled), expected, largest, values)


@settings(max_examples=50, deadline=None)
@given(pieces_of_values(), st.integers(0, 5))
def test_empty_moments_change_nothing(pieces, at):
    moments = [Moments.from_tensor(piece) for piece in pieces if len(piece)]
    if not moments:
        return
    values = sum(map(len, pieces))
    largest = max(piece.abs().max().item() for piece in pieces if len(piece))
    empty = Moments.from_tensor(torch.empty(0, 2, dtype=torch.float64))
    with_empty = all_at_once([*moments[:at], empty, *moments[at:]])
    assert_same(with_empty, all_at_once(moments), largest, values)


def test_an_empty_one_leaves_the_other_bit_for_bit():
    other = Moments.from_tensor(torch.randn(7, 3) + 1000)
    empty = Moments.from_tensor(torch.empty(0, 3))
    for merged in (other.merge(empty), empty.merge(other), empty.merge(other, empty)):
        assert torch.equal(merged.mean, other.mean)
        assert torch.equal(merged.m2, other.m2)
        assert merged.count.tolist() == [7, 7, 7]
    nothing = empty.merge(empty)
    assert nothing.count.tolist() == nothing.mean.tolist() == nothing.m2.tolist() == [0, 0, 0]


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 8), st.just(2)), elements=VALUES),
    st.data(),
)
def test_a_mask_is_a_slice(x, data):
    x = torch.from_numpy(x)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    masked = Moments.from_tensor(x, mask=keep[:, None])
    sliced = Moments.from_tensor(x[keep])
    assert_same(masked, sliced, x.abs().max().item(), len(x))


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float64, (6, 2), elements=VALUES),
    hnp.arrays(np.float64, (6, 1), elements=st.floats(0, 8, width=16)),
)
def test_split_weights_merge_to_the_whole(x, weights):
    x, weights = torch.from_numpy(x), torch.from_numpy(weights)
    whole = Moments.from_tensor(x, mask=weights)
    parts = [Moments.from_tensor(x[i : i + 2], mask=weights[i : i + 2]) for i in (0, 2, 4)]
    assert_same(all_at_once(parts), whole, x.abs().max().item(), 48)


def test_merge_alone_and_of_channels_with_counts_of_their_own():
    x, mask = torch.randn(8, 3, 2), torch.rand(8, 3, 2) > 0.4
    first, second = (Moments.from_tensor(x[i], mask=mask[i]) for i in (slice(0, 3), slice(3, 8)))
    assert_moments(first.merge(second), oracle(x, weights=mask), torch.float32, largest=5)
    alone = first.merge()
    assert torch.equal(alone.mean, first.mean)
    assert torch.equal(alone.m2, first.m2)


def test_a_common_mean_stays_as_it_is():
    # And adds nothing between the moments: 7 * (1/7 * mean) would be off by a digit.
    mean = torch.tensor([1e8 + 0.1, math.pi], dtype=torch.float64)
    one = Moments(torch.tensor(3.0).double(), mean, torch.ones(2).double())
    for others in range(1, 12):
        merged = one.merge(*[one] * others)
        assert torch.equal(merged.mean, mean)
        assert merged.m2.tolist() == [others + 1] * 2


def test_merge_by_hand():
    # {0, 4} and {10}: mean 14/3, m2 = 8 + 0 + (10 - 2)**2 * 2 * 1 / 3.
    a = Moments(torch.tensor(2.0).double(), torch.tensor([2.0]), torch.tensor([8.0]))
    b = Moments(torch.tensor(1.0).double(), torch.tensor([10.0]), torch.tensor([0.0]))
    merged = a.merge(b)
    assert merged.count.tolist() == [3]
    torch.testing.assert_close(merged.mean, torch.tensor([14 / 3]).double())
    torch.testing.assert_close(merged.m2, torch.tensor([8 + 64 * 2 / 3]).double())


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_merge_dim(dim):
    # Virtual batches stacked along a dimension of the mean, before or after the channels.
    x = torch.randn(4, 6, 3, 5) + torch.arange(4.0).view(4, 1, 1, 1)
    stacked = take(x, (1, 3))
    assert stacked.mean.shape == (4, 3)
    if dim != 0:
        stacked = Moments(stacked.count, stacked.mean.T, stacked.m2.T)
    merged = stacked.merge_dim(dim)
    assert merged.count.tolist() == [120, 120, 120]
    assert_moments(merged, oracle(x.flatten(0, 1)), torch.float32, largest=9)


def test_counts_are_exact_above_what_float32_counts():
    # 2**24 + 1 is not a float32; a float32 count would stay at 2**24 for ever.
    one = Moments(torch.tensor(1.0).double(), torch.zeros(1), torch.zeros(1))
    merged = Moments(torch.tensor(2.0**24).double(), torch.zeros(1), torch.ones(1))
    for _ in range(3):
        merged = merged.merge(one)
    assert merged.count.item() == 2**24 + 3
    assert Moments.from_tensor(torch.zeros(1, 1).expand(2**24 + 1, 1)[:, :1]).count == 2**24 + 1


def test_weights_are_summed_in_float64():
    # 2**24 and 1 in float32 sum to 2**24.
    weights = torch.tensor([[2.0**24], [1.0], [1.0]])
    assert Moments.from_tensor(torch.randn(3, 1), mask=weights).count.item() == 2**24 + 2


# The variance.


@pytest.mark.parametrize("correction", [0, 1, 0.5, 3])
def test_var_is_torch_var(correction):
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    expected = x.var((0, 2), correction=correction)
    torch.testing.assert_close(Moments.from_tensor(x).var(correction), expected, rtol=1e-13, atol=0)


def test_var_is_biased_by_default():
    x = torch.tensor([[1.0], [3.0]])
    assert Moments.from_tensor(x).var().item() == 1
    assert Moments.from_tensor(x).var(1).item() == 2


@pytest.mark.parametrize(("n", "correction"), [(1, 1), (1, 2), (2, 2), (2, 3), (0, 0), (0, 1)])
@pytest.mark.filterwarnings("ignore:var.*degrees of freedom:UserWarning")
def test_var_without_degrees_of_freedom_is_that_of_torch(n, correction):
    x = torch.randn(n, 2)
    expected = x.var(0, correction=correction)
    torch.testing.assert_close(Moments.from_tensor(x).var(correction), expected, equal_nan=True)


def test_var_of_weighted_channels():
    x, weights = torch.randn(9, 3, dtype=torch.float64), torch.rand(9, 3, dtype=torch.float64) + 0.5
    expected_moments = oracle(x, weights=weights)
    for correction in (0, 1):
        expected = expected_moments.m2 / (expected_moments.count - correction)
        var = Moments.from_tensor(x, mask=weights).var(correction)
        torch.testing.assert_close(var, expected, rtol=1e-12, atol=0)


# Derivatives.


def check_derivatives(function, *inputs):
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    "mask",
    [None, torch.tensor([1.0, 0, 1, 1, 0]).bool()[:, None, None], torch.tensor([1.0, 0, 2.5])],
    ids=["all", "mask", "weights"],
)
def test_moments_are_differentiable(mask):
    def function(x):
        moments = Moments.from_tensor(x, mask=mask)
        return moments.mean, moments.m2, moments.var(1)

    check_derivatives(function, torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True))


def test_merged_moments_are_differentiable():
    def function(x):
        merged = all_at_once([Moments.from_tensor(piece) for piece in x.split([1, 3, 2])])
        return merged.mean, merged.m2

    check_derivatives(function, torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True))


def test_the_gradient_of_merged_moments_is_that_of_the_whole():
    x = torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True)
    merged = all_at_once([Moments.from_tensor(piece) for piece in x.split([1, 3, 2])])
    actual = torch.autograd.grad(merged.var().square().sum(), x)
    expected = torch.autograd.grad(x.var((0, 2), correction=0).square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_vmap_takes_the_moments_of_each_example():
    x = torch.randn(3, 5, 2, 4)
    mean, m2 = torch.vmap(lambda x: (Moments.from_tensor(x).mean, Moments.from_tensor(x).m2))(x)
    for i in range(3):
        assert_moments(Moments(torch.tensor(20.0).double(), mean[i], m2[i]), oracle(x[i]), x.dtype, largest=5)


def test_moments_cannot_be_changed():
    moments = Moments.from_tensor(torch.randn(4, 3))
    with pytest.raises(AttributeError):
        moments.mean = torch.zeros(3)
