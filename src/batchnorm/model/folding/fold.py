"""fold: a deployment copy of a model without batch norm, checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.batch_norms import batch_norms, check_initialized
from batchnorm.model.convert import revert
from batchnorm.model.folding import check
from batchnorm.model.folding.arithmetic import Weights
from batchnorm.model.folding.graph import Calls, Graphs, record_calls
from batchnorm.model.folding.plan import Plan, Planner
from batchnorm.model.folding.report import FoldReport, NotFolded
from batchnorm.model.nested import tensors_in
from batchnorm.names import quoted


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
    batch_norms(model, "fold")
    check_initialized(model, "fold")
    if not tolerance > 0:
        raise ValueError(f"fold: tolerance must be above 0, got {tolerance}")
    arguments = check.as_arguments(example)
    source = revert(check.copy_of(model)).eval()  # the layers of `convert` wait for what follows them

    with check.keep_random_state(model):
        scratch = check.runnable_copy(source)
        unfolded, calls = _run_recording(scratch, arguments)
        graphs = Graphs(scratch, calls)
        plan = Planner(graphs).plan()
        _check_comparable(source, unfolded)

        folded = _apply(plan, check.copy_of(source))
        errors = _Errors.of(source, folded, plan, arguments, unfolded, tolerance)
    folded.fold_report = _report(plan, graphs, source, folded, errors, tolerance)  # type: ignore[assignment]
    return folded


def _run_recording(model: nn.Module, arguments: check.Example) -> tuple[Any, dict[nn.Module, Calls]]:
    output: list[Any] = []
    try:
        calls = record_calls(model, lambda: output.append(check.run(model, arguments)))
    except ValueError as error:
        raise ValueError(
            f"fold: the model does not take the example, {_shapes(arguments)}; it failed {error}. Give an "
            "input as in deployment: a tensor, a tuple of positional or a dict of keyword arguments"
        ) from error
    return output[0], calls


def _check_comparable(model: nn.Module, output: Any) -> None:
    if not any(tensor.isfinite().any() for tensor in tensors_in(output)):
        raise ValueError(
            f"fold: {type(model).__name__} returned no tensor with a finite value that could be compared: "
            "give an example like the inputs in deployment"
        )


def _shapes(arguments: check.Example) -> str:
    args, kwargs = arguments
    shown = [_shape(value) for value in args] + [f"{name}={_shape(value)}" for name, value in kwargs.items()]
    return f"({', '.join(shown)})"


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def _apply(plan: Plan, model: nn.Module) -> nn.Module:
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
                f"fold: the folded weights of {quoted(model.get_submodule(name), name)} are too large for "
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
        plan: Plan,
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
    model: nn.Module, copied: nn.Module, plan: Plan, arguments: check.Example, tolerance: float
) -> str:
    watched = plan.watched()
    wanted, got = (
        check.outputs_of(one, watched, partial(check.run_float64, one, arguments)) for one in (model, copied)
    )
    differing = [
        quoted(model.get_submodule(name), name)
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
    plan: Plan, graphs: Graphs, source: nn.Module, folded: nn.Module, errors: _Errors, tolerance: float
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
            NotFolded(quoted(module, graphs.names[module]), error)
            for module, error in graphs.errors.items()
            if any(isinstance(inner, _BatchNorm) for inner in module.modules())
            and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        ),
        assumed=tuple(
            f"{quoted(module, graphs.names[module])}: {_listed(constants)}"
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
