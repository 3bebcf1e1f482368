"""diagnose: what is wrong with batch norm in a model, with the evidence and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from batchnorm.doctor.finding import Finding
from batchnorm.doctor.report import Report
from batchnorm.doctor.snapshot import Generators
from batchnorm.doctor.subject import Subject
from batchnorm.model.batch_norms import check_initialized, check_model
from batchnorm.model.batches import Batches, tqdm_bar
from batchnorm.model.calling import unwrapped


def diagnose(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    evaluate: Callable[[], Any] | None = None,
    max_batches: int = 8,
    progress: bool = False,
) -> Report:
    """Find what is wrong with the batch norms of a model, prove it by numbers, and say what to do.

    Without data, what can be seen in the model itself: its layers, buffers, structure (by a torch.fx trace,
    where that is possible) and hand-written batch norms (by what a copy of them does on random inputs). With
    a loader, a few batches are run through it in training and eval mode as well. Every check, what it means
    and its fix are in docs/doctor.md.

    Args:
        model: in the mode in which it is to be judged; it is left exactly as it was found: parameters,
            buffers, gradients, flags, hooks and random numbers, whatever is raised.
        loader: batches as `recalibrate` takes them: tensors, mappings, or `(inputs, ...)`.
        optimizer: the one that trains the model, for weight decay and to tell whether it is trained.
        loss: `loss(output, batch)`, a scalar, for checks of backward passes.
        forward: called as `forward(model, batch)` instead of `model(inputs)`.
        evaluate: a function without arguments that evaluates the model, as a test loop does: in which mode
            does it run the model? It is stopped after the model's first forward.
        max_batches: of the loader, so many.
        progress: draw a bar with tqdm.

    Returns:
        a `Report`: print it, `report.findings`, `report.to_html(path)`, `report.fix("BN101")`. A layer that
        raises is a finding, not an exception.

    Raises:
        TypeError: not an nn.Module, or a loader that is no iterable of batches.
        ValueError: an empty loader, a lazy layer before its first input, or an `evaluate` that does not call
            the model.
        ModuleNotFoundError: `progress=True` without tqdm.
    """
    check_model(model, "diagnose")
    network = unwrapped(model)
    check_initialized(network, "diagnose")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"diagnose: expected a torch optimizer, got {type(optimizer).__name__}")
    if loader is None:
        batches: list[Any] = []
    else:
        taken = Batches(loader, max_batches, progress=False, again=False, verb="diagnose")
        generators = Generators()
        try:
            batches = list(taken)
        finally:
            generators.restore()  # of which a shuffled loader draws
        if not batches:
            raise ValueError("diagnose: the loader is empty: give one with batches, or none at all")
    return examine(Subject.of(network, batches, optimizer, loss, forward, evaluate), progress)


def examine(subject: Subject, progress: bool = False) -> Report:
    """Run every check that the subject has what it needs for."""
    from batchnorm.doctor import data, static  # noqa: F401  registers the checks
    from batchnorm.doctor.check import CHECKS

    with_data = bool(subject.batches and data.layers_of(subject))
    checks = [check for check in CHECKS.values() if with_data or not check.needs_data]
    findings: list[Finding] = []
    with _bar(progress, len(checks) + (data.total_steps(subject) if with_data else 0)) as on_steps:
        if with_data:
            subject.observed = data.observe(subject, on_steps)
        for check in checks:
            findings += check.find(subject)
            on_steps(1)
    return Report.of(subject, findings)


@contextmanager
def _bar(progress: bool, steps: int) -> Iterator[Callable[[int], Any]]:
    if not progress:
        yield lambda done: None
        return
    with tqdm_bar("diagnose")(desc="diagnose", unit="step", total=steps) as bar:
        yield bar.update
