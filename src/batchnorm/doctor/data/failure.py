"""BN200: a forward, a loss or a training step that raises, and in which module of which batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from batchnorm.doctor.check import CHECKS, Check, check
from batchnorm.doctor.data.observed import Observed
from batchnorm.doctor.data.recorder import PassRecorder
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject
from batchnorm.model.calling import unwrapped

_SHOWN = 300


@check(
    "BN200",
    "the forward raises",
    severity="error",
    why="What comes after it was not examined.",
    fix="Give the batches that the model takes, or forward=lambda model, batch: ...",
    needs_data=True,
)
def raises(check: Check, subject: Subject) -> Iterator[Finding]:
    """The error of the first batch on which a forward or the loss raised, else that of a training step.

    The latter is a note for a model in eval mode, which nobody has asked to train on these batches.
    """
    observed: Observed = subject.observed
    if observed.failure is not None:
        yield observed.failure
    elif observed.steps.failure is not None:
        found = observed.steps.failure
        yield found if subject.trains else replace(found, severity="note")


def failure(
    subject: Subject, error: Exception, recorder: PassRecorder | None, number: int, what: str
) -> Finding:
    """The finding for an error on a batch; in the module whose forward `recorder` saw running."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    message = " ".join(str(cause).split())[:_SHOWN]
    layer = recorder.inside[-1] if recorder is not None and recorder.inside else None
    module = None if not layer else type(unwrapped(subject.model).get_submodule(layer)).__name__
    where = f" in {module} {layer!r}" if layer else ""
    batch, whose = subject.named(number)
    return CHECKS["BN200"].finding(
        layer or None,
        f"{what} raises {type(cause).__name__}{where} on {batch}: {message}",
        error=type(cause).__name__,
        severity=None,
        **whose,
    )
