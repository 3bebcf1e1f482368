"""BN207 to BN209: means far from zero, padding in the statistics, inf and NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.data.channels import constant
from batchnorm.doctor.data.noise import rms
from batchnorm.doctor.data.observed import Observed
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject

_EPSILON = torch.finfo(torch.float32).eps
# E[x²] - E[x]² has no digit left where eps * (mean/std)² reaches 1; 1% is lost at a tenth of that ratio.
_NO_DIGITS, _SOME_DIGITS = 1 / math.sqrt(_EPSILON), 0.1 / math.sqrt(_EPSILON)
_PADDED_MEAN, _PADDED_LOG_RATIO = 0.1, math.log(1.25)


@check(
    "BN207",
    "means far above the standard deviation",
    severity="warning",
    why="The variance is a small difference of large numbers: kernels that compute E[x²] - E[x]² lose its "
    "digits, and float16 or bfloat16 inputs have lost them already.",
    fix="Centre the inputs before the layer (standardise the data, no large bias before it); keep it in "
    "float32.",
    needs_data=True,
)
def cancellation(check: Check, subject: Subject) -> Iterator[Finding]:
    """|mean|/std of `_SOME_DIGITS` or more in the worst channel: a note; above `_NO_DIGITS` a warning.

    Over all batches, `constant` channels aside. `E[x²] - E[x]²` in float32 has a relative error of about
    `eps * (mean / std)**2`, for eps that of float32.
    """
    observed: Observed = subject.observed
    for name, seen in observed.populations.items():
        varies = ~constant(seen)
        if not bool(varies.any()):
            continue
        ratios = (seen.mean.abs() / seen.var.sqrt())[varies]
        ratio, channel = float(ratios.max()), int(torch.nonzero(varies).flatten()[ratios.argmax()])
        if ratio < _SOME_DIGITS:
            continue
        error = ratio * float((seen.var_noise / seen.batches).sqrt()[channel] / seen.var[channel]) / 2
        share = float((ratios > _NO_DIGITS).double().mean())
        yield check.finding(
            name,
            f"|mean|/std is {float(f'{ratio:.2g}'):,.0f} in channel {channel}: a one-pass variance in "
            f"float32 {_lost(ratio)}, bfloat16 inputs are rounded to {2**-8 * ratio:.2g} std",
            severity="warning" if ratio > _NO_DIGITS else "note",
            effect=ratio,
            standard_error=error,
            noise_alone=0.0,
            channel=channel,
            share_of_channels=share,
        )


def _lost(ratio: float) -> str:
    error = _EPSILON * ratio**2
    return f"is wrong by {error:.0%}" if error < 1 else "has no correct digit"


@check(
    "BN208",
    "padding is in the statistics",
    severity="warning",
    why="Positions that hold no data pull mean and variance towards themselves, more so in shorter samples.",
    fix="layer(x, mask=valid) with this package's layers; or normalise packed values; or sort by length.",
    needs_data=True,
)
def padding(check: Check, subject: Subject) -> Iterator[Finding]:
    """A warning for the first layer whose statistics move by padding, frozen layers aside.

    By `_PADDED_MEAN` or more in the mean (RMS over channels, in `sqrt(var + eps)` of the other positions), or
    by `_PADDED_LOG_RATIO` or more in the logarithm of the variance. What counts as padding: `find_padding`.
    """
    observed: Observed = subject.observed
    for name in observed.by_batch.statistics:
        if name not in observed.padding or observed.layers[name].frozen:
            continue
        found = observed.padding[name]
        eps = observed.layers[name].eps
        scale = found.without.var + eps
        shift = rms((found.everything.mean - found.without.mean) / scale.sqrt())
        ratio = rms(torch.log((found.everything.var + eps) / scale))
        if shift < _PADDED_MEAN and ratio < _PADDED_LOG_RATIO:
            continue
        chance = rms((found.without.mean_noise / scale).sqrt())
        yield check.finding(
            name,
            f"{found.share:.0%} of the positions are equal ones at the ends of samples (up to "
            f"{found.longest} of {found.length}); they move the mean by {shift:.2g} std and the variance "
            f"by a factor {math.exp(ratio):.2g}",
            effect=shift,
            standard_error=chance,
            noise_alone=chance,
            variance_ratio=math.exp(ratio),
            share=found.share,
            **subject.named(found.batch)[1],
        )
        return  # the layers after it are given what it made of the padding


@check(
    "BN209",
    "inf or NaN",
    severity="error",
    why="One of them in a batch makes the statistics NaN, and running statistics stay NaN for good.",
    fix="Look at this layer's inputs and weights; skip_nonfinite=True keeps such batches out of running "
    "statistics.",
    needs_data=True,
)
def not_finite(check: Check, subject: Subject) -> Iterator[Finding]:
    """An error for the first tensor with inf or NaN: a module's output, or the data.

    In the pass by running statistics, else in that by batch statistics.
    """
    observed: Observed = subject.observed
    if observed.not_finite is None:
        return
    found = observed.not_finite
    where = "the data have" if found.layer is None else "the first output with"
    end = " before any layer" if found.layer is None else " is this layer's"
    batch, whose = subject.named(found.batch)
    yield check.finding(
        found.layer or None,
        f"{where} {found.kind}{end} ({found.share:.1%} of the values), in {batch}",
        effect=found.share,
        standard_error=0.0,
        noise_alone=0.0,
        **whose,
    )
