"""What sampling alone does to a batch's statistics: moments, and their noise by the differences of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.model.packing import sent
from batchnorm.moments import Moments


@sent
@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """Moments of a batch per channel, shape (C,), float64, and how far chance moves them.

    Positions of an image are correlated, so the noise is estimated from the differences between images.
    For the sums `s_i` and weights `w_i` of n images, the mean `sum(s_i) / sum(w_i)` has the variance
    `n / (n - 1) * sum((s_i - w_i * mean)**2) / sum(w_i)**2` (the ratio estimator; Cochran 1977, Sampling
    Techniques, section 2.11), and the variance likewise with squared deviations as values.

    Attributes:
        images: n.
        values: values per channel.
        mean, var: the biased variance.
        mean_noise, var_noise: the variances of `mean` and `var`; NaN for one image.
        pooled: the mean of each image, (N, C), float32.
    """

    images: int
    values: float
    mean: Tensor
    var: Tensor
    mean_noise: Tensor
    var_noise: Tensor
    pooled: Tensor

    def normalized(self, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """What an affine-free layer with these statistics gives: each image's mean (N, C), and the std."""
        gain = torch.rsqrt(var + eps)
        return ((self.pooled - mean) * gain).float(), self.var.sqrt() * gain


@torch.no_grad()
def take(x: Tensor, mask: Tensor | None) -> BatchStatistics:
    """The statistics of (N, C, positions), centred before anything is squared."""
    if mask is not None:
        return _take_masked(x, mask)
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    images, _, positions = values.shape
    pooled = values.mean(2).double()
    rounded = pooled.mean(0).to(values.dtype)
    centred = values - rounded[None, :, None]
    rest = centred.mean(2).double()
    mean, shift = rounded.double() + rest.mean(0), rest.mean(0)
    deviations = centred.square().mean(2).double()
    var = (deviations.mean(0) - shift**2).clamp_min(0)
    scale = images * max(images - 1, 0) or math.nan
    return _on_cpu(
        images,
        float(images * positions),
        mean,
        var,
        (rest - shift).square().sum(0) / scale,
        (deviations - deviations.mean(0)).square().sum(0) / scale,
        rounded.double() + rest,
    )


def _take_masked(x: Tensor, mask: Tensor) -> BatchStatistics:
    weights, values = mask.double(), x.double().where(mask != 0, 0)
    images = len(x)
    per_image = weights.sum(2)
    total = per_image.sum(0).clamp_min(1e-300)
    sums = (weights * values).sum(2)
    mean = sums.sum(0) / total
    deviations = (weights * (values - mean[None, :, None]).square()).sum(2)
    var = deviations.sum(0) / total
    factor = images / (images - 1) if images > 1 else math.nan
    return _on_cpu(
        images,
        float(total.min()),
        mean,
        var,
        factor * (sums - per_image * mean).square().sum(0) / total**2,
        factor * (deviations - per_image * var).square().sum(0) / total**2,
        sums / per_image.clamp_min(1e-300),
    )


def _on_cpu(images: int, values: float, *tensors: Tensor) -> BatchStatistics:
    mean, var, mean_noise, var_noise, pooled = (tensor.cpu() for tensor in tensors)
    return BatchStatistics(images, values, mean, var, mean_noise, var_noise, pooled.float())


@sent
@dataclass(frozen=True, eq=False)
class Population:
    """The statistics of all the batches together, and the noise of those of one batch.

    Attributes:
        mean, var: of all the values, merged exactly; biased.
        batch_var: the mean of the batches' unbiased variances, which is what a running average tends to. It
            is smaller where a batch has few independent values.
        mean_noise, var_noise: the variances that chance gives the mean and variance of one batch: between
            images or between batches, whichever is larger.
        batches: how many.
    """

    mean: Tensor
    var: Tensor
    batch_var: Tensor
    mean_noise: Tensor
    var_noise: Tensor
    batches: int


def population(batches: Sequence[BatchStatistics]) -> Population:
    """Merge the batches of a layer."""
    counts = torch.tensor([batch.values for batch in batches], dtype=torch.float64)
    means, variances = (torch.stack([getattr(b, name) for b in batches]) for name in ("mean", "var"))
    merged = Moments(counts[:, None].expand_as(means), means, variances * counts[:, None]).merge_dim(0)
    unbiased = variances * (counts / (counts - 1).clamp_min(1))[:, None]
    return Population(
        merged.mean,
        merged.var(),
        unbiased.mean(0),
        _larger(means, torch.stack([batch.mean_noise for batch in batches])),
        _larger(unbiased, torch.stack([batch.var_noise for batch in batches])),
        len(batches),
    )


def _larger(between: Tensor, within: Tensor) -> Tensor:
    of_images = within.nanmean(0).nan_to_num(0)
    if len(between) < 2:
        return of_images
    return torch.maximum(between.var(0), of_images)


def rms(values: Tensor) -> float:
    """The root mean square of the finite values; 0 without any."""
    finite = values[torch.isfinite(values)]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def largest_by_chance(comparisons: int, probability: float = 1e-4) -> float:
    """The |z| that none of so many comparisons passes but with this probability (Bonferroni)."""
    tail = probability / (2 * max(comparisons, 1))
    return float(torch.special.ndtri(torch.tensor(1 - tail, dtype=torch.float64)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; the error is NaN for one value."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if len(tensor) < 2:
        return float(tensor.mean()), math.nan
    return float(tensor.mean()), float(tensor.std() / math.sqrt(len(tensor)))
