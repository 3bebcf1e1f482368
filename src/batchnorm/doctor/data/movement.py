"""BN210 to BN214: statistics that move while they should not, and memory that grows with every step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.data.noise import BatchStatistics, mean_and_error, rms
from batchnorm.doctor.data.observed import Observed
from batchnorm.doctor.data.steps import grows
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject

# Squared difference of two calls' means by that of two independent batches, which is 1 on average; and of an
# image's means in both by that of two images. Two views of an image (SimCLR, SimSiam) are further apart.
_SAME_BATCH, _SAME_IMAGE, _OTHER_DATA = 0.3, 0.01, 4.0
_OTHER_DATA_SHIFT = 0.3


@check(
    "BN210",
    "statistics move in evaluation",
    severity="error",
    why="The model changes while it is evaluated: results depend on the order of the test data, which leak "
    "into it.",
    fix="Call model.eval() before evaluating and do not switch it back inside; a hand-written layer must "
    "look at self.training.",
    needs_data=True,
)
def moved_in_eval(check: Check, subject: Subject) -> Iterator[Finding]:
    """An error for each layer whose running statistics moved in eval mode, by whatever amount.

    Or that a forward has put in training mode meanwhile, frozen layers aside.
    """
    observed: Observed = subject.observed
    for name in observed.layers:
        if name in observed.in_training_mode or name in observed.moved_in_eval:
            switched = name in observed.in_training_mode
            moved = observed.moved_in_eval.get(name, 0.0)
            cause = "the forward puts it in training mode" if switched else "it does so in eval mode"
            yield check.finding(
                name,
                f"running statistics move in evaluation, by {moved:.2g} std in a batch: {cause}",
                effect=moved,
                standard_error=0.0,
                noise_alone=0.0,
                put_in_training_mode=switched,
            )


@check(
    "BN211",
    "statistics move in the backward pass",
    severity="warning",
    why="A checkpointed forward runs again in the backward pass, and torch's layers count the batch "
    "twice: the effective momentum is not the one that was set.",
    fix="bn.convert(model): this package's layers move once. With torch's layers, momentum = 1 - sqrt(1 - "
    "momentum).",
    needs_data=True,
)
def moved_in_backward(check: Check, subject: Subject) -> Iterator[Finding]:
    """A warning for each layer whose running statistics a backward pass has moved, by whatever amount."""
    observed: Observed = subject.observed
    for name in observed.layers:
        moved = observed.steps.moved_in_backward.get(name, 0.0)
        if moved > 0:
            yield check.finding(
                name,
                f"running statistics move by {moved:.2g} std in the backward pass (activation checkpointing)",
                effect=moved,
                standard_error=0.0,
                noise_alone=0.0,
            )


@check(
    "BN212",
    "statistics move several times per step",
    severity="warning",
    why="A second forward counts a batch twice, or mixes the statistics of two kinds of data (real and "
    "generated, clean and perturbed) that are each normalised by their own in training.",
    fix="Run the second forward under bn.hold(model); give each kind of data its own batch norms.",
    needs_data=True,
)
def moved_again(check: Check, subject: Subject) -> Iterator[Finding]:
    """One warning for layers that count two batches or more in a step, of the same batch or of other data.

    In every step, that is. By the first two calls of each batch: for L the squared difference of their means
    by that of independent batches, and I that of an image's means by that of two images, the same batch is
    `L < _SAME_BATCH` and `I < _SAME_IMAGE`; other data are `L > _OTHER_DATA` and a difference of the means
    above `_OTHER_DATA_SHIFT` std. Between them are two batches of one kind of data, which is no fault.
    """
    observed: Observed = subject.observed
    grave = []
    for name, calls in observed.by_batch.statistics.items():
        moves = min(observed.steps.moves.get(name, []), default=0)
        pairs = _first_two_calls(calls, observed.by_batch.batch_of[name])
        comparison = _compare_calls(pairs)
        if moves < 2 or comparison is None:
            continue
        shift, chance, likeness = comparison
        if likeness < _SAME_BATCH and _images_differ(pairs) < _SAME_IMAGE:
            grave.append((name, moves, comparison, "for the same batch"))
        elif likeness > _OTHER_DATA and shift > _OTHER_DATA_SHIFT:
            grave.append((name, moves, comparison, "for data that differ"))
    if grave:
        name, moves, (shift, chance, _), kind = grave[0]
        yield check.finding(
            name,
            f"statistics move {moves} times per step {kind}{_and_after(len(grave) - 1)}: the means of two "
            f"forwards differ by {shift:.2g} std (chance {chance:.2g})",
            effect=shift,
            standard_error=chance,
            noise_alone=chance,
            moves=moves,
            layers=len(grave),
        )


def _and_after(layers: int) -> str:
    return "" if layers == 0 else f", here and in {layers} layer{'s' * (layers > 1)} after it"


Pair = tuple[BatchStatistics, BatchStatistics]


def _first_two_calls(calls: list[BatchStatistics], batch_of: list[int]) -> list[Pair]:
    """What each batch gave in its first two calls, where it had two whose noise is known."""
    pairs = []
    for number in sorted(set(batch_of)):
        of_batch = [call for call, of in zip(calls, batch_of, strict=True) if of == number]
        if len(of_batch) > 1 and not math.isnan(float(sum(call.mean_noise.sum() for call in of_batch[:2]))):
            pairs.append((of_batch[0], of_batch[1]))
    return pairs


def _compare_calls(pairs: list[Pair]) -> tuple[float, float, float] | None:
    """How the means of a batch's first two calls differ: in std, by chance, and the squared ratio of both."""
    if not pairs:
        return None
    shifts, chances = [], []
    for first, second in pairs:
        scale = ((first.var + second.var) / 2).clamp_min(1e-12)
        shifts.append(rms((first.mean - second.mean) / scale.sqrt()))
        chances.append(rms(((first.mean_noise + second.mean_noise) / scale).sqrt()))
    shift, chance = mean_and_error(shifts)[0], mean_and_error(chances)[0]
    return shift, chance, (shift / max(chance, 1e-12)) ** 2


def _images_differ(pairs: list[Pair]) -> float:
    """The squared difference of an image's means in both calls by that of two images; 1 for other images."""
    same = [(a.pooled, b.pooled) for a, b in pairs if a.pooled.shape == b.pooled.shape]
    if not same:
        return math.inf
    differ = torch.stack([(a - b).square().mean(0) for a, b in same]).sum(0)
    spread = torch.stack([a.var(0) + b.var(0) for a, b in same]).sum(0)
    varies = spread > 1e-12
    return float((differ[varies] / spread[varies]).mean()) if bool(varies.any()) else 0.0


@check(
    "BN213",
    "autograd's graph grows with every step",
    severity="error",
    why="A tensor kept by the module is linked to all the earlier steps: memory grows until there is none.",
    fix="Assign statistics with .detach(), or move them in place under torch.no_grad(); bn.BatchNorm does.",
    needs_data=True,
)
def graph_grows(check: Check, subject: Subject) -> Iterator[Finding]:
    """An error for each module whose tensors keep more of autograd's nodes alive after each of 3 steps."""
    observed: Observed = subject.observed
    for name, nodes in observed.steps.nodes.items():
        if grows(nodes):
            yield check.finding(
                name or None,
                f"its tensors keep {', '.join(map(str, nodes))} graph nodes alive after 1, 2, ... steps",
                effect=(nodes[-1] - nodes[0]) / (len(nodes) - 1),
                standard_error=0.0,
                noise_alone=0.0,
                nodes=nodes[-1],
            )


@check(
    "BN214",
    "memory held by a module grows with every step",
    severity="warning",
    why="What a module collects from every batch is never given back.",
    fix="Keep a sum or the last value instead of a list; clear it after each step; store .detach().",
    needs_data=True,
)
def memory_grows(check: Check, subject: Subject) -> Iterator[Finding]:
    """A warning for each module whose tensors hold more bytes after each of 3 steps."""
    observed: Observed = subject.observed
    for name, held in observed.steps.bytes.items():
        if grows(held):
            per_step = (held[-1] - held[0]) / (len(held) - 1)
            yield check.finding(
                name or None,
                f"its tensors hold {per_step / 1024:.3g} KiB more after every step",
                effect=per_step,
                standard_error=0.0,
                noise_alone=0.0,
                bytes=held[-1],
            )
