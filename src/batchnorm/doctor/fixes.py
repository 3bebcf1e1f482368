"""Fixes by code: applied, measured again, and taken back where they do not help."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.doctor.finding import SEVERITIES, Finding
from batchnorm.doctor.snapshot import Snapshot
from batchnorm.doctor.static.precision import HALF
from batchnorm.doctor.subject import Subject
from batchnorm.model.absorb import absorb_bias
from batchnorm.model.convert import convert
from batchnorm.model.freeze import freeze
from batchnorm.model.ranks import said
from batchnorm.model.recalibrate import recalibrate

if TYPE_CHECKING:
    from batchnorm.doctor.report import Report

# Applied to the layers that are named, in place; a ValueError says why it is not safe here.
Apply = Callable[[Subject, Sequence[str]], None]

FIXES: dict[str, Apply] = {}

_NO_DATA = "needs data: diagnose the model with a loader"


def fixes(*codes: str) -> Callable[[Apply], Apply]:
    """Register a function `(subject, layers)` as the fix of checks."""

    def register(apply: Apply) -> Apply:
        FIXES.update(dict.fromkeys(codes, apply))
        return apply

    return register


@dataclass(frozen=True)
class Fixed:
    """What a fix has changed; `print` it.

    Attributes:
        code: the check.
        before: its findings before.
        left: what the check finds in the same layers now.
        after: the report of the model as it is now.
    """

    code: str
    before: tuple[Finding, ...]
    left: tuple[Finding, ...]
    after: Report

    def __str__(self) -> str:
        left = {finding.layer: finding for finding in self.left}
        lines = [f"{self.code} fixed in {len(self.before)} place{'s' * (len(self.before) != 1)}"]
        for finding in self.before:
            now = left.get(finding.layer)
            lines += [
                f"  {finding.layer or 'the model'}",
                f"    before: {finding.severity}: {finding.what}",
                f"    after:  {'not found any more' if now is None else f'{now.severity}: {now.what}'}",
            ]
        return "\n".join([*lines, f"now: {self.after.count}"])


def fix(report: Report, subject: Subject, code: str, layer: str | None) -> Fixed:
    """See `Report.fix`."""
    from batchnorm.doctor.diagnose import examine

    before = [f for f in report.findings if f.code == code and layer in (None, f.layer)]
    if not before:
        where = "" if layer is None else f" in layer {layer!r}"
        found = ", ".join(dict.fromkeys(f.code for f in report.findings)) or "nothing"
        raise ValueError(f"fix: there is no finding {code}{where}: the report has {found}")
    if code not in FIXES:
        raise ValueError(f"fix: {code} has no fix that is safe to apply by itself. By hand: {before[0].fix}")
    if not subject.ranks.alone:
        _check_alike(code, before, report.findings)
    snapshot = Snapshot(subject.model, subject.optimizer)
    try:
        layers = [finding.layer for finding in before if finding.layer is not None]
        subject.ranks.together(lambda: _apply(FIXES[code], code, subject, layers), "fix")
        after = examine(subject.again())
        places = {finding.layer for finding in before}
        left = [f for f in after.findings if f.code == code and f.layer in places]
        _check_helped(code, before, left)
        _check_nothing_new(code, report.findings, after.findings)
    except BaseException:
        snapshot.restore()
        raise
    return Fixed(code, tuple(before), tuple(left), after)


def _apply(apply: Apply, code: str, subject: Subject, layers: Sequence[str]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that stay as they are: the second diagnosis tells
            apply(subject, layers)
    except Exception as error:
        raise ValueError(f"fix: {code} was not applied, the model is as it was: {error}") from error


def _check_alike(code: str, before: Sequence[Finding], findings: Sequence[Finding]) -> None:
    """ValueError where the processes of a group would not all do the same."""
    differ = [f.what for f in findings if f.code == "BN301" and f.severity == "error"]
    why = [
        f"{code} is found on {f.evidence['ranks']} alone" for f in before if "ranks" in f.evidence
    ] + differ
    if why:
        raise ValueError(
            f"fix: {why[0]}: give all processes the state_dict and the settings of one, then diagnose again"
        )


def _check_helped(code: str, before: Sequence[Finding], left: Sequence[Finding]) -> None:
    """ValueError unless every finding is gone or milder."""
    was = {finding.layer: SEVERITIES.index(finding.severity) for finding in before}
    for finding in left:
        if SEVERITIES.index(finding.severity) >= was[finding.layer]:
            raise ValueError(
                f"fix: {code} did not help in {finding.layer or 'the model'}, and was taken back: afterwards "
                f"{finding.what}. By hand: {finding.fix}"
            )


def _check_nothing_new(code: str, before: Sequence[Finding], after: Sequence[Finding]) -> None:
    """ValueError where the fix made something else worse."""
    known = {(f.code, f.layer, f.severity) for f in before}
    for finding in after:
        if finding.severity != "note" and (finding.code, finding.layer, finding.severity) not in known:
            raise ValueError(
                f"fix: {code} was taken back: it brought {finding.code} in {finding.layer or 'the model'}, "
                f"{finding.what}"
            )


@fixes("BN101")
def absorb(subject: Subject, layers: Sequence[str]) -> None:
    """Move biases into running means; those of other layers are put back."""
    if not subject.contents:
        raise ValueError(_NO_DATA)
    found = subject.batch_of_all(0)  # before anything can fail here, for all take part
    if found is None:
        rank = said([subject.ranks.names[subject.ranks.place]])
        raise ValueError(
            f"{rank} has no batch, and cannot be sent another's, which is not made of tensors in tuples, "
            "lists and dictionaries alone: give each process a batch"
        )
    others = []
    for call in subject.calls:
        norm = subject.batch_norms.get(call.layer or "")
        if norm is None or not call.inputs or call.inputs[0].layer in layers:
            continue
        bias = getattr(call.inputs[0].module, "bias", None)
        others += [t for t in (bias, norm.running_mean) if isinstance(t, Tensor)]
    before = [tensor.detach().clone() for tensor in others]
    absorb_bias(subject.model, found[1], forward=subject.forward)
    with torch.no_grad():
        for tensor, values in zip(others, before, strict=True):
            tensor.copy_(values)


@fixes("BN102")
def without_decay(subject: Subject, layers: Sequence[str]) -> None:
    """Move gamma and beta into groups of the optimizer without weight decay; its state stays."""
    optimizer = subject.optimizer
    assert optimizer is not None
    moved = {p for name in layers for p in subject.batch_norms[name].parameters(recurse=False)}
    for group in list(optimizer.param_groups):
        of_norms = [p for p in group["params"] if p in moved]
        if not of_norms or not group.get("weight_decay", 0):
            continue
        if len(of_norms) == len(group["params"]):
            group["weight_decay"] = 0.0
            continue
        if "initial_lr" in group:
            raise ValueError(
                "a learning-rate schedule is on the optimizer, which would not know the new group: give the "
                "optimizer bn.parameter_groups(model, weight_decay) before the schedule"
            )
        group["params"] = [p for p in group["params"] if p not in moved]
        optimizer.add_param_group({**group, "params": of_norms, "weight_decay": 0.0})


@fixes("BN106")
def momentum(subject: Subject, layers: Sequence[str]) -> None:
    """The same number in torch's convention; 0.1 where that is none."""
    for name in layers:
        layer = _torch_layer(subject, name)
        assert layer.momentum is not None
        other = round(1 - layer.momentum, 6)
        layer.momentum = other if 0.001 < other < 0.5 else 0.1


@fixes("BN108", "BN109", "BN202")
def from_the_data(subject: Subject, layers: Sequence[str]) -> None:
    """Population statistics of the batches that were looked at, for the named layers alone."""
    if not subject.contents:
        raise ValueError(_NO_DATA)
    for name in layers:
        _torch_layer(subject, name)
    recalibrate(
        subject.model,
        subject.batches,
        filter=lambda name, layer: name in layers,
        forward=subject.forward,
        group=subject.ranks.group,
    )


@fixes("BN111")
def into_eval(subject: Subject, layers: Sequence[str]) -> None:
    """Put the named layers, hand-written ones too, into eval mode; other modules keep theirs."""
    for name in layers:
        subject.model.get_submodule(name).eval()


@fixes("BN112")
def freeze_statistics(subject: Subject, layers: Sequence[str]) -> None:
    """Freeze the statistics of layers whose weights are fixed already."""
    for name in layers:
        layer = _torch_layer(subject, name)
        if any(p.requires_grad for p in layer.parameters(recurse=False)):
            raise ValueError(
                f"{name} has weights that learn: whether to freeze or to train it is yours to say, with "
                "bn.freeze(layer) or layer.train()"
            )
        freeze(layer)


@fixes("BN113")
def single_precision(subject: Subject, layers: Sequence[str]) -> None:
    """Parameters, buffers and what the optimizer keeps of them, in float32."""
    for name in layers:
        layer = _torch_layer(subject, name).float()
        for parameter in layer.parameters(recurse=False):
            if parameter.grad is not None:
                parameter.grad = None  # of another dtype; the next backward pass gives it anew
            state = {} if subject.optimizer is None else subject.optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dtype in HALF:
                    state[key] = value.float()


@fixes("BN116")
def shifts_of_zero(subject: Subject, layers: Sequence[str]) -> None:
    """Set beta of the named layers to 0 in place; gamma, statistics and other layers stay.

    Raises:
        ValueError: a layer is trained, the optimizer has made a step, or the layer is hand-written.
    """
    for name in layers:
        layer = _torch_layer(subject, name)
        if subject.optimizer_has_stepped or subject.is_trained(layer):
            raise ValueError(f"{name} is trained, and other layers rely on its shifts")
        with torch.no_grad():
            layer.bias.zero_()


@fixes("BN119", "BN211")
def convert_layers(subject: Subject, layers: Sequence[str]) -> None:
    """`convert` the whole model, whichever layers are named: Parameters, buffers and modes stay."""
    convert(subject.model)


def _torch_layer(subject: Subject, name: str) -> nn.modules.batchnorm._BatchNorm:
    if name not in subject.batch_norms:
        raise ValueError(f"{name} is hand-written: replace it by bn.BatchNorm2d")
    return subject.batch_norms[name]
