"""Batch norm that is a call of a function: F.batch_norm with constants of the module that calls it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from batchnorm.checks import first_line
from batchnorm.model.function_calls import PARAMETERS, argument
from batchnorm.model.probe import twin_of


@dataclass(frozen=True)
class FunctionalNorm:
    """The `index`th call of batch norm as a function in the forward of `owner`."""

    owner: nn.Module
    index: int


class Constants(NamedTuple):
    """What a functional batch norm normalises by in eval mode."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class FunctionalNorms:
    """The functional batch norms in the forwards of some modules, by a trace of each by itself."""

    def __init__(self, owners: dict[nn.Module, dict[str, Any]]) -> None:
        """`owners`: modules, each with the constant arguments of its calls."""
        self.errors: dict[nn.Module, str] = {}
        self.constants: dict[FunctionalNorm, Constants | str] = {}
        for owner, arguments in owners.items():
            try:
                twin = twin_of(owner).eval()  # in float64, in which constants may be computed
                graph = trace_alone(twin, arguments)
            except Exception as error:  # whatever the user's code raises when it is given proxies
                self.errors[owner] = f"{type(error).__name__}: {first_line(error)}"
                continue
            for index, node in enumerate(functional_nodes(graph)):
                self.constants[FunctionalNorm(owner, index)] = _constants(twin, node)

    def number_of(self, owner: nn.Module) -> int:
        """How many there are in the forward of `owner`."""
        return sum(norm.owner is owner for norm in self.constants)


def rewrite(owner: nn.Module, arguments: dict[str, Any], new: dict[int, nn.Module | None]) -> fx.GraphModule:
    """`owner` with modules, or nothing, in the place of its functional batch norms of these indices.

    As a module of its graph.

    Other submodules, tensors and attributes are there as before, but for what only these calls read.
    """
    graph = trace_alone(owner, arguments)
    read = _names_read(graph)
    replaced = {index: node for index, node in enumerate(functional_nodes(graph)) if index in new}
    for index, node in replaced.items():
        instead = _argument(node, "input")
        if (module := new[index]) is not None:
            owner.add_module(f"batch_norm_{index}", module)
            with graph.inserting_after(node):
                instead = graph.call_module(f"batch_norm_{index}", (instead,))
        node.replace_all_uses_with(instead)
        graph.erase_node(node)
    rewritten = fx.GraphModule(owner, graph, type(owner).__name__)
    rewritten.graph.eliminate_dead_code()
    rewritten.recompile()
    gone = {name for name in read - _names_read(rewritten.graph) if "." not in name}
    for name in gone:
        delattr(rewritten, name)
    _keep_the_rest(owner, rewritten, gone)
    return rewritten.eval()


def trace_alone(owner: nn.Module, arguments: dict[str, Any]) -> fx.Graph:
    """The graph of the forward of `owner` itself, for any arguments if it has one, else for these."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return _OneLevel().trace(owner)
        except Exception:  # whatever the user's code raises when it is given proxies
            if not arguments:
                raise
            return _OneLevel().trace(owner, arguments)


class _OneLevel(fx.Tracer):
    """Takes every submodule as a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def functional_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The calls of batch norm as a function."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PARAMETERS:
            yield node


def _argument(node: fx.Node, name: str) -> Any:
    return argument(node.target, node.args, dict(node.kwargs), name)


def _constants(owner: nn.Module, node: fx.Node) -> Constants | str:
    found: dict[str, Any] = {}
    for name in ("running_mean", "running_var", "weight", "bias"):
        given = _argument(node, name)
        try:
            found[name] = _value(owner, given)
        except ValueError:
            return f"its {name} is no constant"
    if _argument(node, "training") is not False:
        return "it normalises by the batch in eval mode too"
    if found["running_mean"] is None or found["running_var"] is None:
        return "it has no running statistics"
    eps = _argument(node, "eps")
    return Constants(**found, eps=float(eps)) if isinstance(eps, (int, float)) else "its eps is no constant"


def _value(owner: nn.Module, given: Any) -> Any:
    """The tensor that an argument is, computed where that takes nothing but tensors of `owner`."""
    if not isinstance(given, fx.Node):
        return given
    if given.op == "get_attr":
        return _attribute(owner, str(given.target)).detach()
    if given.op not in ("call_function", "call_method"):
        raise ValueError("it depends on the input")
    args, kwargs = fx.node.map_arg((given.args, given.kwargs), lambda node: _value(owner, node))
    if given.op == "call_function":
        return given.target(*args, **kwargs)  # type: ignore[operator]
    return getattr(args[0], str(given.target))(*args[1:], **kwargs)


def _attribute(owner: nn.Module, path: str) -> Any:
    name, _, attribute = path.rpartition(".")
    return getattr(owner.get_submodule(name), attribute)


def _names_read(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "get_attr"}


def _keep_the_rest(owner: nn.Module, module: fx.GraphModule, gone: set[str]) -> None:
    for register in ("_modules", "_parameters", "_buffers"):
        for name, value in getattr(owner, register).items():
            if name not in gone and not name.startswith("_tensor_constant"):
                getattr(module, register).setdefault(name, value)
    for name, value in owner.__dict__.items():
        if name not in gone and not name.startswith("_"):
            module.__dict__.setdefault(name, value)
