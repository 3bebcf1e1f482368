"""The noise of a batch's statistics, against many batches of the same kind."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from batchnorm.doctor.data.noise import largest_by_chance, population, take

C, POSITIONS = 6, 25


def correlated(images: int, generator: torch.Generator) -> Tensor:
    """Images whose positions share most of their variance: worth little more than one value each."""
    shared = torch.randn(images, C, 1, generator=generator)
    own = torch.randn(images, C, POSITIONS, generator=generator)
    return 3 + 2 * shared + own


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("images", [2, 8, 64])
def test_noise_is_that_of_many_batches(images: int, with_mask: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    taken = []
    for _ in range(600):
        x = correlated(images, generator)
        mask = None
        if with_mask:
            valid = torch.rand(images, 1, POSITIONS, generator=generator) > 0.4
            mask = valid.expand_as(x)
        taken.append(take(x, mask))
    means = torch.stack([one.mean for one in taken]).var(0).mean()
    variances = torch.stack([one.var for one in taken]).var(0).mean()
    predicted = torch.stack([one.mean_noise for one in taken]).mean()
    predicted_var = torch.stack([one.var_noise for one in taken]).mean()
    assert_close(predicted, means, rtol=0.1, atol=0)
    if images > 2:  # the deviations of two images are equal by construction
        assert_close(predicted_var, variances, rtol=0.25, atol=0)


def test_positions_of_an_image_are_not_independent_values() -> None:
    x = correlated(32, torch.Generator().manual_seed(0))
    one = take(x, None)
    independent = float((one.var / one.mean_noise).mean())
    assert 32 * 0.8 < independent < 32 * 2  # of the 800 values per channel


def test_the_mask_and_the_offset_change_no_digit() -> None:
    x = correlated(8, torch.Generator().manual_seed(0)).double()
    plain, masked = take(x, None), take(x, torch.ones_like(x))
    far = take((x + 1e4).float(), None)
    for name in ("mean", "var", "mean_noise", "var_noise", "pooled"):
        assert_close(getattr(masked, name), getattr(plain, name), rtol=1e-6, atol=1e-6)
    assert_close(far.var, plain.var, rtol=1e-3, atol=0)
    assert_close(far.mean_noise, plain.mean_noise, rtol=1e-3, atol=0)


def test_population_is_that_of_all_values() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [correlated(size, generator).double() for size in (5, 8, 3)]
    seen = population([take(part, None) for part in parts])
    everything = torch.cat(parts).movedim(1, 0).flatten(1)
    assert_close(seen.mean, everything.mean(1))
    assert_close(seen.var, everything.var(1, correction=0))


def test_the_largest_by_chance_grows_with_the_comparisons() -> None:
    z = torch.randn(2000, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float((z.abs().amax(1) > largest_by_chance(500, 0.05)).double().mean()) == pytest.approx(
        0.05, abs=0.02
    )
    assert largest_by_chance(1, 0.05) == pytest.approx(1.96, abs=0.01)
