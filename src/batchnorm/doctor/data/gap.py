"""BN201: the gap between the outputs by batch statistics and by running statistics, and where it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.data.differences import Differences
from batchnorm.doctor.data.noise import mean_and_error
from batchnorm.doctor.data.observed import Observed
from batchnorm.doctor.data.recorder import Pass
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.subject import Subject

# In standard deviations of what is compared: a third changes some predictions, one makes them others.
OF_OUTPUTS, OF_LAYER = 0.3, 0.3


def output_gap(found: Differences) -> tuple[float, float] | None:
    """Root mean square of the difference of the outputs by their std over the samples; its standard error."""
    if found.by_batch is None:
        return None
    variances = found.by_batch.m2.double() / found.by_batch.count
    square = float(variances.mean())
    if not math.isfinite(square) or square == 0:
        return None
    return _root(*mean_and_error([value / square for value in found.outputs]))


def layer_gap(found: Differences, name: str) -> tuple[float, float] | None:
    """As `output_gap`, of what a layer gives before its weight and bias: its images' means and its std."""
    squares = found.layers.get(name)
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
    """An `output_gap` above `OF_OUTPUTS`, twice the recalibrated one, and that one plus 3 standard errors.

    A warning; an error where it is above 1 and 3 times the recalibrated one. In the first layer whose
    `layer_gap` is above `OF_LAYER` by the same rule, else the one that is furthest beyond its recalibrated
    gap. Not where the running statistics of any layer were never moved, or nothing could be recalibrated.
    """
    observed: Observed = subject.observed
    # A gap of statistics that were never moved is a static check's finding.
    if observed.never_moved:
        return
    before = output_gap(observed.of_running)
    if before is None or observed.of_recalibrated is None:
        return
    after = output_gap(observed.of_recalibrated) or (0.0, 0.0)
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
    assert observed.of_recalibrated is not None
    excess = {}
    for name in observed.by_batch.statistics:
        gap = layer_gap(observed.of_running, name)
        chance = layer_gap(observed.of_recalibrated, name)
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
