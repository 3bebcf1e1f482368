"""The verbs on one model: what they take, how exactly, what they leave, and what the doctor says."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

import batchnorm as bn
from batchnorm.layers import _BatchNorm as _OurBatchNorm
from batchnorm.model.folding.check import in_float64
from batchnorm.model.frozen import frozen_batch_norms
from batchnorm.model.nested import tensors_in
from benchmarks.zoo.libraries import Entry, Example

BATCH = 4
# How far an input is moved to see how far torch.nn's own results move.
MOVED = 2e-15
# Where converted layers differ by more, that is looked at.
_SENSITIVE = 1e-9


@dataclass
class Result:
    """What was seen of a model.

    Attributes:
        norms, frozen: its batch norm layers, and those that are frozen for good.
        taken, fused: layers that are ours after convert, and those that run with what follows them.
        folded, multiply_adds, by_example: batch norms that fold has put into weights, has made multiply-adds,
            and of the former those that it followed on the example alone.
        left: what convert or fold left as it was, and why.
        missed: multiply-adds that follow a convolution or a linear layer, and why.
        errors: of each verb, the largest relative difference in float64.
        sensitivity: how far torch.nn's results move with an input that is moved by `MOVED`.
        findings: of the doctor, above a note, on the model as it was built.
        failures: of each step, the exception.
    """

    name: str
    family: str
    parameters: int = 0
    norms: int = 0
    frozen: int = 0
    taken: int = 0
    fused: int = 0
    folded: int = 0
    multiply_adds: int = 0
    by_example: int = 0
    left: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    sensitivity: float = 0.0
    fold_error: float = 0.0
    findings: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def examine(entry: Entry, quick: bool = False) -> Result:
    """Build a model and try every verb on it; `quick` diagnoses with data in training mode alone."""
    result, start = Result(entry.name, entry.family), time.perf_counter()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _step(result, "build"):
            model = entry.build()
            result.parameters = sum(p.numel() for p in model.parameters())
            result.norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
            result.frozen = len(frozen_batch_norms(model))
            example = entry.example(model, BATCH)
        if not result.failures:
            _Examination(result, entry, model, example).run(quick)
    result.seconds = time.perf_counter() - start
    return result


@contextmanager
def _step(result: Result, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, it is what the table is for
        result.failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class _Examination:
    def __init__(self, result: Result, entry: Entry, model: nn.Module, example: Example) -> None:
        self.result, self.entry, self.fresh, self.example = result, entry, model, example
        self.seasoned = season(copy.deepcopy(model), example, entry.trains)
        self.model = copy.deepcopy(self.seasoned).double()
        self.example64 = tree_map(_double, example)

    def run(self, quick: bool) -> None:
        """Every step, whatever becomes of the others."""
        result = self.result
        if result.norms:
            for step in (self.convert, self.freeze, self.recalibrate):
                with _step(result, step.__name__):
                    step()
        with _step(result, "fold"):
            self.fold()
        for mode in ("train", "eval"):
            for with_data in (False, True):
                if not quick or with_data == (mode == "train"):
                    with _step(result, f"diagnose in {mode} mode"):
                        self.diagnose(mode, with_data)

    def convert(self) -> None:
        """Outputs, gradients and statistics of converted layers beside those of torch.nn's; then back."""
        ours = bn.convert(copy.deepcopy(self.model))
        report = bn.conversion_report(ours)
        self.result.taken = len(report.taken)
        self.result.fused = sum(bool(layer.fused_with) for layer in report.taken)
        self.result.left += [str(left) for left in report.left]
        wanted = self._results(self.model, self.example64)
        self.result.errors["convert"] = difference(wanted, self._results(ours, self.example64))
        if self.result.errors["convert"] > _SENSITIVE:
            moved = self._results(self.model, tree_map(_moved, self.example64))
            self.result.sensitivity = difference(wanted, moved)
        bn.revert(ours)
        same = [type(a) is type(b) for a, b in zip(self.model.modules(), ours.modules(), strict=True)]
        if not all(same):
            raise AssertionError("revert has not given every layer its class back")

    def _results(self, model: nn.Module, example: Example) -> dict[str, Tensor]:
        """Outputs in eval mode, and outputs, gradients and buffers of a training step."""
        model = copy.deepcopy(model)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            _add(found, "eval", call(model.eval(), example))
        if self.entry.trains:
            outputs = call(model.train(), example)
            _add(found, "train", outputs)
            reals = [y for y in tensors_in(outputs) if y.requires_grad]
            sum((y.sin() * y).mean() for y in reals).backward()  # type: ignore[union-attr]
            _add(found, "buffer", dict(model.named_buffers()))
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            largest = max((g.abs().max() for g in grads.values()), default=torch.ones(()))
            # What batch norm cancels has a gradient of rounding errors alone.
            found |= {f"gradient {n}": g / largest for n, g in grads.items()}
        return found

    def freeze(self) -> None:
        """Statistics stay in training mode; unfrozen, the model is as before."""
        model = copy.deepcopy(self.model)
        before = {n: b.clone() for n, b in model.named_buffers()}
        flags = [p.requires_grad for p in model.parameters()]
        bn.freeze(model, affine=any(list(m.parameters()) for m in model.modules() if _is_norm(m)))
        if self.entry.trains:
            call(model.train(), self.example64)
        names = [n for n, m in model.named_modules() if _is_norm(m)]
        moved = [n for n, b in model.named_buffers() if n.rpartition(".")[0] in names]
        pairs = [(before[n], b) for n, b in model.named_buffers() if n in moved]
        self.result.errors["freeze"] = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
        bn.unfreeze(model)
        if flags != [p.requires_grad for p in model.parameters()]:
            raise AssertionError("unfreeze has not given every parameter its requires_grad back")

    def recalibrate(self) -> None:
        """Statistics of ours beside those of torch.nn's, from two batches and a smaller one."""
        batches = [
            tree_map(lambda value, rows=rows: _rows(value, rows), self.example64) for rows in (4, 4, 1)
        ]
        found = []
        for model in (copy.deepcopy(self.model), bn.convert(copy.deepcopy(self.model))):
            bn.recalibrate(model, batches, forward=call)
            found.append({n: b for n, b in model.named_buffers() if b.is_floating_point()})
            if not all(bool(b.isfinite().all()) for b in found[-1].values()):
                raise AssertionError("statistics that are not finite")
        self.result.errors["recalibrate"] = difference(*found)

    def fold(self) -> None:
        """What goes where, and how exactly."""
        folded = bn.fold(self.seasoned, self.example)
        report = folded.fold_report
        self.result.folded = len({entry.layer for entry in report.folded})
        self.result.multiply_adds = len(report.multiply_adds)
        self.result.by_example = len(report.by_example)
        self.result.left += [f"fold: {entry}" for entry in report.left_alone]
        followed = [entry for entry in report.multiply_adds if _follows_weights(entry.reason)]
        self.result.missed = [str(entry) for entry in followed]
        self.result.errors["fold"] = report.error_float64
        self.result.fold_error = report.error

    def diagnose(self, mode: str, with_data: bool) -> None:
        """Findings above a note on the model as it was built, without data or with three batches."""
        model = copy.deepcopy(self.fresh).train(mode == "train")
        batches = [self.entry.example(model, BATCH) for _ in range(3)] if with_data else None
        for finding in bn.diagnose(model, batches, forward=call).findings:
            if finding.severity != "note":
                how = f"{mode}, {'with data' if with_data else 'without'}"
                self.result.findings.append(f"{how}: {finding.code} {finding.layer}: {finding.what}")


def call(model: nn.Module, example: Any) -> Any:
    """The model's output for positional or keyword arguments, always with the same random numbers.

    Of a model in float64 all that its forward makes is in float64, too.
    """
    torch.manual_seed(0)
    example = tree_map(_clone, example)
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    with in_float64() if is_double else nullcontext():
        return model(**example) if isinstance(example, dict) else model(*example)


@torch.no_grad()
def season(model: nn.Module, example: Example, trains: bool) -> nn.Module:
    """Let batch norms be as training leaves them: with weights of their own and statistics of the data."""
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if _is_norm(module)]
    for module in norms:
        for name, start in (("weight", 0.75), ("bias", -0.25)):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                tensor.copy_(start + 0.5 * torch.rand(tensor.shape, generator=generator))
        for name, start in (("running_mean", -0.25), ("running_var", 0.75)):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                tensor.copy_(start + 0.5 * torch.rand(tensor.shape, generator=generator))
    if trains:
        batch_norms = [module for module in norms if isinstance(module, _BatchNorm)]
        momenta = [module.momentum for module in batch_norms]
        for module in batch_norms:
            module.momentum = 0.9
        call(model.train(), example)
        for module, momentum in zip(batch_norms, momenta, strict=True):
            module.momentum = momentum
    return model


def difference(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its largest value."""
    if wanted.keys() != got.keys():
        return torch.inf
    worst = 0.0
    for name, tensor in wanted.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        scale = 1.0 if name.startswith("gradient") else float(tensor.abs().max()) or 1.0
        worst = max(worst, float((tensor - got[name]).abs().max()) / scale)
    return worst


def _is_norm(module: Any) -> bool:
    return isinstance(module, (_BatchNorm, _OurBatchNorm)) or (
        "running_mean" in getattr(module, "_buffers", {})
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
    )


def _follows_weights(reason: str) -> bool:
    kinds: tuple[str, ...] = ("Conv", "Linear")
    first = reason.partition(";")[0]
    return any(f"follows {kind}" in first or first.startswith(kind) for kind in kinds)


def _add(found: dict[str, Tensor], name: str, value: Any) -> None:
    tensors = value.values() if isinstance(value, dict) and name == "buffer" else tensors_in(value)
    for number, tensor in enumerate(tensors):
        found[f"{name} {number}"] = tensor.detach().clone()


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _moved(value: Any) -> Any:
    return value * (1 + MOVED) if isinstance(value, Tensor) and value.is_floating_point() else value


def _rows(value: Any, rows: int) -> Any:
    return value[:rows] if isinstance(value, Tensor) and value.ndim and len(value) == BATCH else value
