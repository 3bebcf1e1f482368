"""The user's evaluation function: in which mode it runs the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.snapshot import unchanged
from batchnorm.doctor.subject import Subject


@check(
    "BN117",
    "test in training mode",
    severity="error",
    why="The accuracy is that of test batches normalised by themselves: it depends on how they are put "
    "together, a single image cannot be classified, and test images move the running statistics.",
    fix="model.eval() and torch.no_grad() before the test, model.train() after it.",
    needs_data=False,
)
def in_training_mode(check: Check, subject: Subject) -> Iterator[Finding]:
    """An error for each layer that is in training mode when `subject.evaluate` calls it for the first time.

    Hand-written layers too. The evaluation is stopped after the model's first forward; the model is put back.

    Raises:
        ValueError: there are layers, and it called none of them.
    """
    if subject.evaluate is None:
        return
    names = {subject.model.get_submodule(name): name for name in (*subject.batch_norms, *subject.handwritten)}
    seen: dict[str, bool] = {}

    def before(module: nn.Module, args: Any) -> None:
        seen.setdefault(names[module], module.training)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        raise _SeenEnough

    with unchanged(subject.model), suppress(_SeenEnough):
        for module in names:
            module.register_forward_pre_hook(before)
        subject.model.register_forward_hook(after)
        subject.evaluate()
    if names and not seen:
        raise ValueError("diagnose: evaluate() called none of the model's batch norms: is it this model's?")
    for name, training in seen.items():
        if training:
            yield check.finding(name, "the evaluation function runs it in training mode", training=True)


class _SeenEnough(BaseException):
    """Ends the evaluation after the first forward; no `except Exception` of the user's stops it."""
