"""fold: a deployment copy of a model without batch norm, checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm import layers
from batchnorm.model import fold_check as check
from batchnorm.model.fold_arithmetic import (
    Affine,
    MultiplyAdd,
    ResidualActivation,
    Weights,
    shift_meets_zeros,
)
from batchnorm.model.fold_graph import (
    Calls,
    Graphs,
    describe,
    has_hooks,
    inherits_forward,
    record_calls,
)
from batchnorm.model.fold_report import Folded, FoldReport, NotFolded

_FORWARDS = (
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    check.EvalSyncBatchNorm.forward,
    layers._BatchNorm.forward,
)
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


def fold(model: nn.Module, example: Any, *, tolerance: float = 1e-9) -> nn.Module:
    """A deployment copy of `model`, in eval mode, whose batch norms are in their neighbours' weights.

    In eval mode batch norm is `x * scale + shift` per channel, with
    `scale = weight / sqrt(running_var + eps)` and `shift = bias - running_mean * scale`. Where the traced
    graph (torch.fx) shows that nothing else sees what is between, that goes into

    - the convolution, transposed convolution or linear layer before it: `W * scale` over its outputs and
      `b * scale + shift` (Jacob et al. 2018, Quantization and Training of Neural Networks, section 3.2);
    - all the convolutions and linear layers after it: `W * scale` over their inputs, `b + sum(W * shift)`.
      A shift does not go through zero padding;
    - the batch norm after it.

    What is left becomes one multiply-add per channel. The activation and residual of this package's layers
    stay. Layers with hooks, and batch norms without running statistics, are left alone; weights
    with parametrizations (torch.nn.utils.parametrize) that are folded into lose them, with their value. A
    model that torch.fx cannot trace is folded in the parts that it can; the neighbours in an `nn.Sequential`
    are always seen. Where flags or missing arguments choose a path through a forward, that of the example is
    taken, and the report says so.

    The copy is of the model's own class, with the same submodules under the same names: folded layers have
    new weights and a bias, batch norms are `nn.Identity`, an activation or a multiply-add. It can be saved,
    exported and compiled like any other. Its forward does what the model's forward does in eval mode;
    other methods that stop between a convolution and its batch norm see the folded convolution.

    All arithmetic is in float64 and each weight is rounded once, to its own dtype. The model and the copy
    then run on `example` in float64 and must agree.

    Args:
        model: left as it is; may be in training mode. Of a compiled model the module inside is folded.
        example: an input of the model: a tensor, a tuple of positional arguments or a dict of keyword
            arguments (a model whose only argument is a tuple or dict takes `(argument,)`).
        tolerance: largest difference allowed between model and copy, both in float64, relative to the
            largest value of each output tensor. They differ by rounding, some 1e-14.

    Returns:
        the copy; what was done and the errors are in its `fold_report`, a FoldReport.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: no batch norm in the model, a layer without its first input yet, a layer whose scale or
            shift is not finite, an example that the model does not take, or outputs that differ; the message
            names the layers.
    """
    # What torch.compile returns would compile each copy; it is a wrapper of the model's own module.
    model = getattr(model, "_orig_mod", model)
    _check_model(model)
    if not tolerance > 0:
        raise ValueError(f"fold: tolerance must be above 0, got {tolerance}")
    arguments = check.as_arguments(example)
    source = check.copy_of(model).eval()

    with check.keep_random_state(model):
        scratch = check.runnable_copy(source)
        unfolded, calls = _run_recording(scratch, arguments)
        graphs = Graphs(scratch, calls)
        plan = _Planner(graphs).plan()

        folded = _apply(plan, check.copy_of(source))
        errors = _Errors.of(source, folded, plan, arguments, unfolded, tolerance)
    folded.fold_report = _report(plan, graphs, source, folded, errors, tolerance)  # type: ignore[assignment]
    return folded


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold: expected a model (torch.nn.Module), got {type(model).__name__}")
    for name, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(
                f"fold: {describe(module, name)} has not seen its first input yet: run one batch through the "
                "model first"
            )
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError(
            f"fold: {type(model).__name__} has no batch norm layer (torch.nn's or this package's) to fold; "
            "calls of functional batch norm are not layers"
        )


def _run_recording(model: nn.Module, arguments: check.Example) -> tuple[Any, dict[nn.Module, Calls]]:
    output: list[Any] = []
    try:
        calls = record_calls(model, lambda: output.append(check.run(model, arguments)))
    except ValueError as error:
        raise ValueError(
            f"fold: the model does not take the example, {_shapes(arguments)}; it failed {error}. Give an "
            "input as in deployment: a tensor, a tuple of positional or a dict of keyword arguments"
        ) from error
    if not any(tensor.isfinite().any() for tensor in check.tensors(output)):
        raise ValueError(
            f"fold: {type(model).__name__} returned no tensor with a finite value that could be compared: "
            "give an example like the inputs in deployment"
        )
    return output[0], calls


def _shapes(arguments: check.Example) -> str:
    args, kwargs = arguments
    shown = [_shape(value) for value in args] + [f"{name}={_shape(value)}" for name, value in kwargs.items()]
    return f"({', '.join(shown)})"


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return type(value).__name__


@dataclass(frozen=True)
class _Step:
    """`affine` of a batch norm goes into another layer: `comes_after` it, or before."""

    layer: str
    into: str
    affine: Affine
    comes_after: bool


@dataclass(frozen=True)
class _Replacement:
    """What takes the place of a batch norm; with `affine` it does the arithmetic itself."""

    affine: Affine | None
    activation: str | None
    channel_dim: int
    with_residual: bool

    def of(self, layer: _BatchNorm) -> nn.Module:
        if self.affine is not None:
            like = layer.running_mean if layer.weight is None else layer.weight
            assert like is not None
            trains = any(parameter.requires_grad for parameter in layer.parameters())
            return MultiplyAdd(self.affine, like.dtype, self.channel_dim, self.activation, trains).eval()
        if self.activation is None and not self.with_residual:
            return nn.Identity().eval()
        return ResidualActivation(self.activation).eval()


@dataclass
class _Plan:
    """By qualified names, so that it can be carried out on any copy."""

    steps: list[_Step] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    multiply_adds: list[NotFolded] = field(default_factory=list)
    left_alone: list[NotFolded] = field(default_factory=list)
    replacements: dict[str, _Replacement] = field(default_factory=dict)
    operations_saved: int = 0

    def watched(self) -> list[str]:
        """Layers whose outputs are the same before and after."""
        last = {step.into: step.layer for step in self.steps if step.comes_after}
        behind = {step.into for step in self.steps if not step.comes_after} - set(last)
        kept = {name for name, replacement in self.replacements.items() if replacement.affine is not None}
        return sorted({*last.values()} | behind | kept)


class _Planner:
    """Decides where each batch norm goes, in the order of the graph."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._affines: dict[nn.Module, Affine] = {}
        self._done: set[nn.Module] = set()
        self._plan = _Plan()

    def plan(self) -> _Plan:
        names = self._graphs.names
        norms = [module for module in names if isinstance(module, _BatchNorm)]
        for norm in norms:
            if _has_statistics(norm):
                self._affines[norm] = self._finite_affine(norm)
        for norm in sorted(norms, key=self._place):
            self._decide(norm)
            self._done.add(norm)
        return self._plan

    def _place(self, norm: nn.Module) -> tuple[bool, int]:
        place = self._graphs.place(norm)
        return place is None, place or 0

    def _finite_affine(self, norm: _BatchNorm) -> Affine:
        affine = Affine.of(norm)
        values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        finite = [value is None or bool(value.isfinite().all()) for value in values]
        if not (affine.is_finite() and all(finite)):
            names = ("running_mean", "running_var", "weight", "bias")
            wrong = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
            raise ValueError(
                f"fold: the scale or shift of {self._describe(norm)} is not finite: look at its "
                f"{', '.join(wrong) or 'running_var'}. Batch norm needs finite values and a variance "
                "of at least 0: recalibrate the model or load other weights"
            )
        return affine

    def _decide(self, norm: _BatchNorm) -> None:
        name = self._graphs.names[norm]
        reason = self._why_fixed(norm)
        if reason:
            self._plan.left_alone.append(NotFolded(self._describe(norm), reason))
            return
        targets, not_before = self._layers_before(norm)
        comes_after, not_after = bool(targets), ""
        if not targets:
            targets, not_after = self._layers_after(norm)
        if not targets:
            self._plan.multiply_adds.append(NotFolded(self._describe(norm), f"{not_before}; {not_after}"))
        self._plan.replacements[name] = _Replacement(
            affine=None if targets else self._affines[norm],
            activation=getattr(norm, "activation", None),
            channel_dim=_channels_from_the_end(norm),
            with_residual=self._graphs.calls[norm].with_residual,
        )
        for target in targets:
            self._fold(norm, target, comes_after)
        if targets:
            self._note_folded(norm)

    def _fold(self, norm: _BatchNorm, target: Any, comes_after: bool) -> None:
        names, affine = self._graphs.names, self._affines[norm]
        self._plan.folded.append(Folded(self._describe(norm), self._describe(target)))
        if isinstance(target, _BatchNorm):
            self._affines[target] = self._affines[target].after(affine)
            return
        if not comes_after and isinstance(target, nn.Linear):
            affine = affine.repeated(target.in_features // norm.num_features)  # more than 1 behind a flatten
        self._plan.steps.append(_Step(names[norm], names[target], affine, comes_after))

    def _note_folded(self, norm: _BatchNorm) -> None:
        calls = self._graphs.calls[norm]
        self._plan.operations_saved += 2 * sum(shape.numel() for shape in calls.shapes)
        if getattr(norm, "activation", None) is None and not calls.with_residual:
            self._graphs.pass_on(norm)

    def _why_fixed(self, norm: _BatchNorm) -> str:
        if type(norm).forward not in _FORWARDS or "forward" in vars(norm):
            return f"{type(norm).__name__} has a forward of its own"
        if norm.training:
            return "it stays in training mode after model.eval()"
        if not _has_statistics(norm):
            return "without running statistics it normalises by the batch in eval mode too"
        if has_hooks(norm):
            return "it has hooks"
        if self._graphs.reads_tensors_of(norm):
            return "its parameters or statistics are used elsewhere in the forward too"
        if self._graphs.calls[norm].count == 0:
            return "the example does not run it"
        return ""

    def _layers_before(self, norm: _BatchNorm) -> tuple[list[nn.Module], str]:
        """The layers that are all that `norm` reads, and that nothing else does, or none and the reason."""
        graphs = self._graphs
        if not graphs.nodes[norm] or graphs.called_elsewhere(norm):
            return [], "its calls are not all in a traced graph"
        found: dict[nn.Module, set[Any]] = {}
        for node in graphs.nodes[norm]:
            source, reason = graphs.source(node)
            if source is None:
                return [], reason
            target = graphs.module(source)
            if target is None or not inherits_forward(target):
                return [], f"it follows {graphs.describe(source)}"
            found.setdefault(target, set()).add(source)
        for target, calls in found.items():
            reason = self._why_not(norm, target, calls)
            if reason:
                return [], reason
        return list(found), ""

    def _layers_after(self, norm: _BatchNorm) -> tuple[list[nn.Module], str]:
        """The layers that are all that reads `norm`, and read nothing else, or none and the reason."""
        graphs = self._graphs
        if getattr(norm, "activation", None) is not None or graphs.calls[norm].with_residual:
            return [], "an activation or a residual follows"
        if not graphs.nodes[norm] or graphs.called_elsewhere(norm):
            return [], "what follows is not in a traced graph"
        found: dict[nn.Module, dict[Any, bool]] = {}
        for node in graphs.nodes[norm]:
            readers, reason = graphs.readers(node)
            if reason:
                return [], reason
            for reader, flattened in readers:
                target = graphs.module(reader)
                if target is None or not (inherits_forward(target) or isinstance(target, _BatchNorm)):
                    return [], f"{graphs.describe(reader)} follows"
                found.setdefault(target, {})[reader] = flattened
        for target, calls in found.items():
            reason = self._why_not(norm, target, set(calls), set(calls.values()))
            if not reason and shift_meets_zeros(target) and self._affines[norm].shift.any():
                reason = f"its shift does not go through the zero padding of {self._describe(target)}"
            if reason:
                return [], reason
        return list(found), ""

    def _why_not(
        self, norm: _BatchNorm, target: nn.Module, calls: set[Any], flattened: Iterable[bool] = (False,)
    ) -> str:
        """Why `norm` cannot go into `target`, or nothing; `calls` are those that it is next to."""
        graphs, what = self._graphs, self._describe(target)
        if isinstance(target, _BatchNorm) and (target in self._done or self._why_fixed(target)):
            return f"{what} is left alone"
        if calls != set(graphs.nodes[target]):
            return f"{what} is used elsewhere too"
        if graphs.called_elsewhere(target):
            return f"{what} is called outside of the traced graph too"
        if has_hooks(target):
            return f"{what} has hooks"
        if graphs.reads_tensors_of(target):
            return f"the weights of {what} are used elsewhere in the forward too"
        ranks = {len(shape) for shape in graphs.calls[norm].shapes}
        if any(flattened):
            fits = all(flattened) and isinstance(target, nn.Linear) and _channels(norm, max(ranks)) == 1
        else:
            fits = all(_channels(norm, rank) == _channels(target, rank) for rank in ranks)
        return "" if fits else f"{what} has its channels in another dimension"

    def _describe(self, module: nn.Module) -> str:
        return describe(module, self._graphs.names[module])


def _channels_from_the_end(norm: _BatchNorm) -> int:
    """`channel_dim`, counted from the end where the rank is known: then no forward has to look at it."""
    channel_dim = getattr(norm, "channel_dim", 1)
    rank = next((rank for kind, rank in _RANKS.items() if isinstance(norm, kind)), None)
    return channel_dim if rank is None else channel_dim % rank - rank


def _has_statistics(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


def _channels(layer: Any, rank: int) -> int:
    """Where `layer` has its channels in an input or output of so many dimensions."""
    if isinstance(layer, _BatchNorm):
        return getattr(layer, "channel_dim", 1) % rank
    if isinstance(layer, nn.Linear):
        return rank - 1
    return rank - 1 - len(layer.kernel_size)


def _apply(plan: _Plan, model: nn.Module) -> nn.Module:
    """Carry `plan` out on `model`, in place; returns what takes its place where it is itself a batch norm."""
    weights: dict[str, Weights] = {}
    for step in plan.steps:
        if step.into not in weights:
            weights[step.into] = Weights(model.get_submodule(step.into))
        put = weights[step.into].put_after if step.comes_after else weights[step.into].put_before
        put(step.affine)
    for name, folded in weights.items():
        if not folded.write():
            raise ValueError(
                f"fold: the folded weights of {describe(model.get_submodule(name), name)} are too large for "
                "their dtype: fold the model in float32 and convert the copy"
            )
    for name, replacement in plan.replacements.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, _BatchNorm)
        new = replacement.of(layer)
        if layer is model:
            return new
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is layer:
                    parent._modules[key] = new
    return model


@dataclass(frozen=True)
class _Errors:
    copy: float
    model: float
    float64: float

    @classmethod
    def of(
        cls,
        source: nn.Module,
        folded: nn.Module,
        plan: _Plan,
        arguments: check.Example,
        unfolded: Any,
        tolerance: float,
    ) -> _Errors:
        """Run model and copy in float64, and the copy as it is.

        Raises:
            ValueError: they differ; the message has the error and the first layers to differ.
        """
        model = check.to_float64(check.runnable_copy(source))
        copied = _apply(plan, check.to_float64(check.runnable_copy(source)))
        wanted = _run_or_say(partial(check.run_float64, model, arguments), "the model", "in float64")
        got = _run_or_say(partial(check.run_float64, copied, arguments), "the folded copy", "in float64")
        error = check.relative_error(wanted, got)
        if not error <= tolerance:
            culprits = _culprits(model, copied, plan, arguments, tolerance)
            raise ValueError(
                f"fold: model and folded copy differ by {error:.3g} of the largest output in float64, where "
                f"{tolerance:.3g} is allowed (tolerance). {culprits}"
            )
        as_is = _run_or_say(
            partial(check.run, check.runnable_copy(folded), arguments), "the folded copy", "on the example"
        )
        return cls(
            copy=check.relative_error(wanted, as_is, exactly=False),
            model=check.relative_error(wanted, unfolded, exactly=False),
            float64=error,
        )


def _run_or_say(run: Callable[[], Any], what: str, how: str) -> Any:
    try:
        return run()
    except ValueError as error:
        raise ValueError(f"fold: {what} does not run {how}; it failed {error}") from error


def _culprits(
    model: nn.Module, copied: nn.Module, plan: _Plan, arguments: check.Example, tolerance: float
) -> str:
    watched = plan.watched()
    wanted, got = (
        check.outputs_of(one, watched, partial(check.run_float64, one, arguments)) for one in (model, copied)
    )
    differing = [
        describe(model.get_submodule(name), name)
        for name in _in_order(model, watched)
        if not check.relative_error(wanted[name], got[name]) <= tolerance
    ]
    if not differing:
        return (
            "Every folded layer gives the same, so the forward uses their weights, or what is between them, "
            "in a way that tracing did not see"
        )
    return f"The folded layers whose outputs differ: {', '.join(differing)}"


def _in_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    order = [name for name, _ in model.named_modules()]
    return sorted(names, key=order.index)


def _report(
    plan: _Plan, graphs: Graphs, source: nn.Module, folded: nn.Module, errors: _Errors, tolerance: float
) -> FoldReport:
    functional = [
        NotFolded(f"{graphs.describe(node)}", "a function, not a layer; make it one to fold it")
        for node in graphs.functional
    ]
    return FoldReport(
        folded=tuple(plan.folded),
        multiply_adds=tuple(plan.multiply_adds),
        left_alone=(*plan.left_alone, *functional),
        untraced=tuple(
            NotFolded(describe(module, graphs.names[module]), error)
            for module, error in graphs.errors.items()
            if any(isinstance(inner, _BatchNorm) for inner in module.modules())
            and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        ),
        assumed=tuple(
            f"{describe(module, graphs.names[module])}: {_listed(constants)}"
            for module, constants in graphs.assumed.items()
        ),
        error=errors.copy,
        error_unfolded=errors.model,
        error_float64=errors.float64,
        tolerance=tolerance,
        parameters_before=_size(source),
        parameters_after=_size(folded),
        operations_saved=plan.operations_saved,
    )


def _listed(constants: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in constants.items())


def _size(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
