"""fold: a deployment copy of a model without batch norm, checked against the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from batchnorm.model.batch_norms import (
    Filter,
    Model,
    batch_norms,
    check_filter,
    check_initialized,
    check_model,
)
from batchnorm.model.convert import revert
from batchnorm.model.folding import check
from batchnorm.model.folding.apply import carry_out
from batchnorm.model.folding.calls import Calls, record_calls
from batchnorm.model.folding.functional import FunctionalNorms
from batchnorm.model.folding.norms import LEFT_BY_FILTER, Norm, norm_of_layer, norms_of_functions
from batchnorm.model.folding.paths import Layer
from batchnorm.model.folding.plan import Plan, Planner
from batchnorm.model.folding.recorded import RecordedGraph
from batchnorm.model.folding.report import FoldReport, NotFolded
from batchnorm.model.folding.traced import TracedGraph
from batchnorm.model.folding.verify import Errors, Pair, errors_of
from batchnorm.model.folding.weights import takes_scale_after
from batchnorm.model.nested import tensors_in
from batchnorm.names import quoted


def fold(model: Model, example: Any, *, filter: Filter | None = None, tolerance: float = 1e-9) -> Model:
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
    check_model(model, "fold")
    check_initialized(model, "fold")
    check_filter(filter, "fold")
    if not tolerance > 0:
        raise ValueError(f"fold: tolerance must be above 0, got {tolerance}")
    arguments = check.as_arguments(example)
    source = revert(check.copy_of(model)).eval()  # the layers of `convert` wait for what follows them
    with check.keep_random_state(model):
        look = _Look(check.runnable_copy(source), arguments, filter)
        _check_comparable(source, look.output)
        plan = look.plan(by_example=True)
        pair = Pair(source, plan, look.arguments, tolerance)
        if plan.by_example and not pair.holds_elsewhere(arguments):
            plan = look.plan(by_example=False)
            pair = Pair(source, plan, look.arguments, tolerance)
        folded = carry_out(plan, check.copy_of(source), look.arguments)
        errors = errors_of(pair, folded, look.output, arguments)
    folded.fold_report = _report(plan, look, source, folded, errors)  # type: ignore[assignment]
    return folded  # type: ignore[return-value]


class _Look:
    """What fold knows of a model from a run of the example and a trace.

    Attributes:
        output: that of the run.
        traced: the graph of what torch.fx can trace.
        arguments: constant ones of the modules that call batch norm as a function, by name.
    """

    def __init__(self, model: nn.Module, example: check.Example, filter: Filter | None) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        norms = {m: norm_of_layer(m, name, filter) for m, name in self._names.items()}
        self._norms: dict[Layer, Norm] = {m: norm for m, norm in norms.items() if norm is not None}
        self.output, self._calls = _run_recording(model, example)
        self._weighted: set[nn.Module] = {
            module for module in self._names if takes_scale_after(module, self._calls[module])
        }
        self._recorded = RecordedGraph(model, self._calls, self._is_taken)
        self._recorded.record(lambda: check.run(model, example))
        owners = self._recorded.owners_of_functional()
        self.arguments = {self._names[owner]: constants for owner, constants in owners.items()}
        functional = FunctionalNorms(owners)
        self._recorded.name_functional(functional)
        self.traced = TracedGraph(model, self._calls, self._is_layer, functional)
        self._norms |= norms_of_functions(functional, self._names, filter)
        if not self._norms:
            batch_norms(model, "fold")  # says that there is none
        if all(norm.reason == LEFT_BY_FILTER for norm in self._norms.values()):
            raise ValueError(f"fold: the filter is true for none of the {len(self._norms)} batch norms")
        for layer, norm in self._norms.items():
            norm.ranks = frozenset(self._ranks(layer))

    def plan(self, *, by_example: bool) -> Plan:
        """Where each batch norm goes, also by what holds for the example alone or not."""
        norms = {layer: replace(norm) for layer, norm in self._norms.items()}
        recorded = self._recorded if by_example else None
        return Planner(self._names, self._calls, norms, self._weighted, self.traced, recorded).plan()

    def name(self, module: nn.Module) -> str:
        """Class and qualified name."""
        return quoted(module, self._names[module])

    def has_norms(self, module: nn.Module) -> bool:
        """Whether a batch norm that is a layer is in a module."""
        return any(inner in self._norms for inner in module.modules())

    def _is_taken(self, module: nn.Module) -> bool:
        return module in self._norms or module in self._weighted

    def _is_layer(self, module: nn.Module) -> bool:
        if self._is_taken(module):
            return True
        torchs_own = type(module).__module__.startswith("torch.nn") and not isinstance(
            module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        )
        return torchs_own and not self.has_norms(module)

    def _ranks(self, layer: Layer) -> set[int]:
        if isinstance(layer, nn.Module):
            return {len(shape) for shape in self._calls[layer].shapes}
        return {len(step.shape) for step in self._recorded.nodes.get(layer, [])}


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


def _report(plan: Plan, look: _Look, source: nn.Module, folded: nn.Module, errors: Errors) -> FoldReport:
    traced = look.traced
    return FoldReport(
        folded=tuple(plan.folded),
        multiply_adds=tuple(plan.multiply_adds),
        left_alone=tuple(plan.left_alone),
        untraced=tuple(
            NotFolded(look.name(module), error)
            for module, error in traced.errors.items()
            if look.has_norms(module) and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        ),
        assumed=tuple(
            f"{look.name(module)}: {_listed(constants)}" for module, constants in traced.assumed.items()
        ),
        by_example=tuple(plan.by_example),
        error=errors.copy,
        error_unfolded=errors.model,
        error_float64=errors.float64,
        tolerance=errors.allowed,
        parameters_before=_size(source),
        parameters_after=_size(folded),
        operations_saved=plan.operations_saved,
    )


def _listed(constants: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in constants.items())


def _size(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
