"""How batch norms are used: one in several places, torch's where ours would do more."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.structure import Call
from batchnorm.doctor.subject import Subject

_CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@check(
    "BN118",
    "one batch norm in several places",
    severity="warning",
    why="Its running statistics are an average over places: where these have different distributions, it "
    "fits none of them in eval mode.",
    fix="Where the places differ, give each a batch norm of its own; share the convolutions alone.",
    needs_data=False,
)
def shared(check: Check, subject: Subject) -> Iterator[Finding]:
    """A batch norm called in several places: a warning where it follows different layers, else a note.

    A function counts as another layer at each call. A note too for one that is called once at most, and
    registered under several names.
    """
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in subject.model.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(name)
    for name, layer in subject.batch_norms.items():
        calls = [call for call in subject.calls if call.module is layer]
        sources = {_source(call) for call in calls}
        if len(calls) > 1:
            differ = len(sources) > 1
            yield check.finding(
                name,
                f"it is called in {len(calls)} places, "
                + (
                    "after different layers" if differ else "after the same layer each time (a shared branch)"
                ),
                severity="warning" if differ else "note",
                calls=len(calls),
                sources=len(sources),
            )
        elif len(aliases[layer]) > 1:
            yield check.finding(
                name,
                f"the same module is registered as {' and '.join(aliases[layer])}",
                severity="note",
                calls=len(calls),
                names=len(aliases[layer]),
            )


def _source(call: Call) -> object:
    """The module or function whose output a call takes; the model's input is None."""
    if not call.inputs:
        return None
    before = call.inputs[0]
    return before.module if before.module is not None else id(before)


@check(
    "BN119",
    "layers that could be converted",
    severity="note",
    why="bn.convert computes the same faster on a CPU, and with memory_efficient=True saves less for the "
    "backward pass.",
    fix="bn.convert(model), undone by bn.revert; report.fix('BN119') does.",
    needs_data=False,
)
def convertible(check: Check, subject: Subject) -> Iterator[Finding]:
    """One note for all layers of exactly torch.nn's classes, lazy ones aside."""
    layers = [name for name, layer in subject.batch_norms.items() if type(layer) in _CONVERTIBLE]
    if layers:
        yield check.finding(
            None,
            f"{len(layers)} of {len(subject.batch_norms)} batch norms are torch.nn's, as they come",
            convertible=len(layers),
            batch_norms=len(subject.batch_norms),
        )
