"""BN201: the gap between the outputs by batch statistics and by running statistics, and where it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.data.noise import mean_and_error
from batchnorm.doctor.data.observe import Observed
from batchnorm.doctor.data.watch import Pass
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.subject import Subject

# In standard deviations of what is compared: a third changes some predictions, one makes them others.
OF_OUTPUTS, OF_LAYER = 0.3, 0.3


def output_gap(one: Pass, by_batch: Pass) -> tuple[float, float] | None:
    """Root mean square of the difference of the outputs by their std over the samples; its standard error."""
    pairs = [
        (a, b)
        for a, b in zip(one.outputs, by_batch.outputs, strict=False)
        if a is not None and b is not None and a.shape == b.shape
    ]
    if not pairs:
        return None
    width = min(b.shape[1] for _, b in pairs)
    samples = torch.cat([b[:, :width] for _, b in pairs])
    scale = float((samples - samples.mean(0)).square().mean().sqrt())
    if not math.isfinite(scale) or scale == 0:
        return None
    squares = [float((a - b).square().mean()) / scale**2 for a, b in pairs]
    return _root(*mean_and_error(squares))


def layer_gap(one: Pass, by_batch: Pass, name: str) -> tuple[float, float] | None:
    """As `output_gap`, of what a layer gives before its weight and bias: its images' means and its std."""
    pairs = list(zip(one.normalized.get(name, []), by_batch.normalized.get(name, []), strict=False))
    squares = [
        float((a - b).square().mean() + (c - d).square().mean())
        for (a, c), (b, d) in pairs
        if a.shape == b.shape
    ]
    return _root(*mean_and_error(squares)) if squares else None


def _root(mean: float, error: float) -> tuple[float, float]:
    """Of a mean of squares and its error, the root and its error, by the first derivative."""
    root = math.sqrt(max(mean, 0.0))
    return root, error / (2 * root) if root > 0 else 0.0


def scores_of(one: Pass) -> dict[str, float]:
    """Accuracy, loss and entropy, averaged over the batches that have them."""
    found = {}
    for name in ("accuracy", "loss", "entropy"):
        values = [value for score in one.scores if (value := getattr(score, name)) is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found


@check(
    "BN201",
    "outputs differ between batch and running statistics",
    severity="warning",
    why="What was trained normalises by the batch; what is evaluated and deployed normalises by running "
    "statistics.",
    fix="Look at the layer where it starts; bn.recalibrate(model, training_loader) where the evidence "
    "says that it closes the gap.",
    needs_data=True,
)
def train_eval_gap(check: Check, subject: Subject) -> Iterator[Finding]:
    observed: Observed = subject.observed
    # A gap of statistics that were never moved is a static check's finding.
    if observed.never_moved:
        return
    before = output_gap(observed.by_running, observed.by_batch)
    if before is None or observed.recalibrated is None:
        return
    after = output_gap(observed.recalibrated, observed.by_batch) or (0.0, 0.0)
    effect, error = before
    noise = after[0]
    if not _beyond(effect, error, noise, OF_OUTPUTS):
        return
    start, own = _start(observed)
    old, new = scores_of(observed.by_running), scores_of(observed.by_batch)
    scores = {f"{name}_running": value for name, value in old.items()}
    scores |= {f"{name}_batch": value for name, value in new.items()}
    what = (
        f"outputs change by {effect:.2g} of their std (± {error:.1g}) when running statistics take the "
        f"place of the batch's; {noise:.2g} once they are recalibrated"
    )
    if start is not None:
        what += f"; it starts at this layer, whose own output changes by {own:.2g} std"
    severity: Severity = "error" if effect > 1 and effect > 3 * noise else "warning"
    yield check.finding(
        start,
        what,
        severity=severity,
        effect=effect,
        standard_error=error,
        noise_alone=noise,
        layer_gap=own,
        **scores,
    )


def _start(observed: Observed) -> tuple[str | None, float | None]:
    """The first layer whose gap is beyond what the noise of batches gives it; else the largest one."""
    assert observed.recalibrated is not None
    excess = {}
    for name in observed.by_batch.normalized:
        gap = layer_gap(observed.by_running, observed.by_batch, name)
        chance = layer_gap(observed.recalibrated, observed.by_batch, name)
        if gap is None or chance is None:
            continue
        if _beyond(*gap, chance[0], OF_LAYER):
            return name, gap[0]
        excess[name] = gap[0] - chance[0]
    largest = max(excess, key=lambda name: excess[name], default=None)
    return largest, None if largest is None else excess[largest]


def _beyond(effect: float, error: float, noise: float, threshold: float) -> bool:
    if not (effect > threshold and effect > 2 * noise):
        return False
    return math.isnan(error) or effect - noise > 3 * error
