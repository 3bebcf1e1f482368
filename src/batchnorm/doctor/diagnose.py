"""diagnose: what is wrong with batch norm in a model, with the evidence and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from batchnorm.doctor.contents import Contents, in_order
from batchnorm.doctor.finding import Finding, in_order_of_layers, merged_findings
from batchnorm.doctor.report import Report
from batchnorm.doctor.snapshot import Generators
from batchnorm.doctor.subject import Subject
from batchnorm.model.batch_norms import check_initialized, check_model
from batchnorm.model.batches import Batches, tqdm_bar
from batchnorm.model.calling import unwrapped
from batchnorm.model.gather import check_group
from batchnorm.model.ranks import Ranks


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
    group: Any = None,
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
        group: a torch.distributed process group, all of whose processes diagnose the same model, each on its
            own part of the data, in any number of batches, none included; all end with the same report, that
            of all the data: as of one process that has the first batch of each rank, then the second of each.
            `torch.distributed.group.WORLD` is all processes. None is this process alone, which compares
            itself with all processes where torch.distributed is initialised (BN301 to BN303).

    Returns:
        a `Report`: print it, `report.findings`, `report.to_html(path)`, `report.fix("BN101")`. A layer that
        raises is a finding, not an exception.

    Raises:
        TypeError: not an nn.Module, a loader that is no iterable of batches, or a group that is none.
        ValueError: an empty loader (of a group: in every process), a lazy layer before its first input, an
            `evaluate` that does not call the model, or a group that this process is not in.
        RuntimeError: it raised in another process of `group`, or one did not come.
        ModuleNotFoundError: `progress=True` without tqdm.
    """
    check_group(group, "diagnose")
    ranks = Ranks(group, "diagnose")
    batches: list[Any] = []

    def prepare() -> list[Contents] | None:
        check_model(model, "diagnose")
        check_initialized(unwrapped(model), "diagnose")
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"diagnose: expected a torch optimizer, got {type(optimizer).__name__}")
        if loader is None:
            return None
        batches.extend(_taken(loader, max_batches))
        return [Contents.of(batch) for batch in batches]

    everyone = ranks.together(prepare)
    of_ranks = [own or [] for own in everyone]
    order = in_order(of_ranks)
    if not order and any(own is not None for own in everyone):
        whose = "" if ranks.alone else " on every rank"
        raise ValueError(f"diagnose: the loader is empty{whose}: give one with batches, or none at all")
    subject = Subject.of(
        unwrapped(model),
        optimizer=optimizer,
        loss=loss,
        forward=forward,
        evaluate=evaluate,
        batches=batches,
        ranks=ranks,
        contents=[of_ranks[place][number] for place, number in order],
        order=order,
    )
    return examine(subject, progress)


def _taken(loader: Iterable[Any], max_batches: int) -> list[Any]:
    generators = Generators()
    try:
        return list(Batches(loader, max_batches, progress=False, again=False, verb="diagnose"))
    finally:
        generators.restore()  # of which a shuffled loader draws


def examine(subject: Subject, progress: bool = False) -> Report:
    """Run every check that the subject has what it needs for."""
    from batchnorm.doctor import data, static  # noqa: F401  registers the checks
    from batchnorm.doctor.check import CHECKS

    def find() -> list[Finding]:
        found: list[Finding] = []
        for check in checks:
            found += check.find(subject)
            on_steps(1)
        return in_order_of_layers(subject.model, found)

    with_data = any(subject.ranks.together(lambda: bool(subject.contents and data.layers_of(subject))))
    checks = [check for check in CHECKS.values() if with_data or not check.needs_data]
    with _bar(progress, len(checks) + (data.total_steps(subject) if with_data else 0)) as on_steps:
        if with_data:
            subject.observed = data.observe(subject, on_steps)
        findings = merged_findings(subject.ranks.together(find), subject.ranks.names)
    return Report.of(subject, findings)


@contextmanager
def _bar(progress: bool, steps: int) -> Iterator[Callable[[int], Any]]:
    if not progress:
        yield lambda done: None
        return
    with tqdm_bar("diagnose")(desc="diagnose", unit="step", total=steps) as bar:
        yield bar.update
