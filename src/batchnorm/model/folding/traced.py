"""The graph that torch.fx traces: the whole of a model, or the largest parts of it that can be traced."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from batchnorm.checks import first_line
from batchnorm.model.folding.calls import Calls
from batchnorm.model.folding.functional import FunctionalNorm, FunctionalNorms, functional_nodes
from batchnorm.model.folding.paths import Channel, Graph, Layer, describe_function
from batchnorm.model.hooks import has_hooks
from batchnorm.names import quoted

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# What is asked of a tensor beside its values.
_METADATA = {"shape", "dtype", "device", "ndim", "size", "dim", "stride", "numel", "is_floating_point"}


class TracedGraph(Graph[fx.Node]):
    """The traced parts of a model: what it says holds for every input.

    Args:
        model: a copy that may be spoiled: tracing calls its forward with proxies.
        calls: what the example did with its modules.
        is_layer: which modules are taken as they are.
        functional: batch norms that are calls of functions.

    Attributes:
        errors: what cannot be traced, and why.
        assumed: modules that are traced for the constant arguments of the example, and these.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: dict[nn.Module, Calls],
        is_layer: Callable[[nn.Module], bool],
        functional: FunctionalNorms,
    ) -> None:
        super().__init__(calls)
        self.names = {module: name for name, module in model.named_modules()}
        self.errors: dict[nn.Module, str] = {}
        self.assumed: dict[nn.Module, dict[str, Any]] = {}
        self._functional = functional
        self._is_layer = is_layer
        self._hooked = {module for module in self.names if module is not model and has_hooks(module)}
        self._expected: Counter[Layer] = Counter()
        self._graphs: list[fx.Graph] = []  # a graph holds its nodes only weakly
        self._mark_untraceable(model)
        self._visited: set[nn.Module] = set()
        self._trace_below(model)

    def why_incomplete(self, layer: Layer) -> str:  # noqa: D102
        if not self.nodes.get(layer):
            return "its calls are not all in a traced graph"
        called = self.calls[layer.owner if isinstance(layer, FunctionalNorm) else layer].count
        return "" if called == self._expected[layer] else "it is called outside of the traced graph too"

    def describe(self, node: fx.Node) -> str:  # noqa: D102
        layer = self._layers.get(node)
        if isinstance(layer, nn.Module):
            return quoted(layer, self.names[layer])
        if node.op == "placeholder":
            return f"the input {node.target!r}"
        if node.op == "call_function":
            return describe_function(node.target)
        return f"{node.target}()" if node.op == "call_method" else str(node.target)

    def _input(self, node: fx.Node) -> fx.Node | None:
        given = node.args[0] if node.args else None
        if not node.args:
            given = next((node.kwargs[name] for name in ("input", "x") if name in node.kwargs), None)
        return given if isinstance(given, fx.Node) else None

    def _users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user.op != "output" and not _asks_metadata(user)]

    def _is_output(self, node: fx.Node) -> bool:
        return any(user.op == "output" for user in node.users)

    def _times_read(self, node: fx.Node, value: fx.Node) -> int:
        seen: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), lambda arg: seen.append(arg))
        return sum(arg is value for arg in seen)

    def _passes_on(self, node: fx.Node) -> bool:
        layer = self._layers.get(node)
        if layer in self._passing:
            return True
        if isinstance(layer, nn.Module):
            return type(layer) in (nn.Identity, *_DROPOUTS) and not has_hooks(layer)
        if node.op == "call_function" and node.target is nn.functional.dropout:
            return node.kwargs.get("training") is False
        return node.op == "call_method" and node.target == "contiguous"

    def _moves(self, node: fx.Node, *, backwards: bool) -> bool:
        return _reorders(node) or (not backwards and self._flattens(node))

    def _moved(self, node: fx.Node, channel: Channel, backwards: bool) -> Channel | None:
        if self._flattens(node):
            # A channel is so many features in a row then.
            return Channel(1, 2, None) if channel.dim == 1 else None
        dims = [int(arg) % channel.rank for arg in node.args[1:]]  # type: ignore[arg-type]
        order = list(range(channel.rank))
        if _REORDERINGS[node.op, node.target] == "permute":
            order = dims
        else:
            order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
        return channel._replace(dim=order[channel.dim] if backwards else order.index(channel.dim))

    def _flattens(self, node: fx.Node) -> bool:
        """Whether `node` makes all dimensions but the first one."""
        layer = self._layers.get(node)
        if isinstance(layer, nn.Module):
            whole = isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)
            return whole and not has_hooks(layer)
        calls_flatten = (node.op, node.target) in (
            ("call_method", "flatten"), ("call_function", torch.flatten)
        )  # fmt: skip
        return calls_flatten and node.args[1:] == (1,) and not node.kwargs

    def _mark_untraceable(self, module: nn.Module) -> None:
        """Note the errors of modules that cannot be traced, though those inside them are not entered."""
        if self._is_layer(module):
            return
        graph, error = self._trace(module)
        if graph is not None:
            return
        known = len(self.errors)
        for child in module.children():
            if child not in self.errors:
                self._mark_untraceable(child)
        if len(self.errors) > known:
            graph, error = self._trace(module)
        if graph is None:
            self.errors[module] = error

    def _trace_below(self, module: nn.Module) -> None:
        if module in self._visited or self._is_layer(module):
            return
        self._visited.add(module)
        # What is never called is a container whose parts are: its own graph is none of the model's.
        is_traced = module not in self.errors and self.calls[module].count > 0
        graph = self._trace(module)[0] if is_traced else None
        if graph is None:
            for child in module.children():
                self._trace_below(child)
            return
        self._graphs.append(graph)
        self._take(graph, module)

    def _take(self, graph: fx.Graph, module: nn.Module) -> None:
        """Take in the nodes of the graph of `module`."""
        count, indices = self.calls[module].count, Counter[nn.Module]()
        functional = set(functional_nodes(graph))
        for node in graph.nodes:
            if node.op == "call_module":
                called = module.get_submodule(str(node.target))
                self._add(node, called, count)
                self._trace_below(called)
            elif node.op == "get_attr":
                owner, _, attribute = str(node.target).rpartition(".")
                self._tensors_read.add(id(getattr(module.get_submodule(owner), attribute)))
            elif node in functional:
                owner_of_call = _owner(node, module)
                index = indices[owner_of_call] % max(self._functional.number_of(owner_of_call), 1)
                indices[owner_of_call] += 1
                self._add(node, FunctionalNorm(owner_of_call, index), count)

    def _add(self, node: fx.Node, layer: Layer, count: int) -> None:
        self._layers[node] = layer
        self.nodes.setdefault(layer, []).append(node)
        self.places.setdefault(layer, len(self._layers))
        self._expected[layer] += count

    def _trace(self, module: nn.Module) -> tuple[fx.Graph | None, str]:
        """The graph of `module`, for any arguments if it has one, else for the constants of the example."""
        if isinstance(module, torch.jit.ScriptModule):
            return None, "it is compiled by torch.jit"
        graph, error = self._trace_for(module, None)
        constants = self.calls[module].constants or {}
        if graph is not None:
            # A proxy is never None, so the path of an argument that is None has to be asked for.
            constants = {name: value for name, value in constants.items() if value is None}
        special = self._trace_for(module, constants)[0] if constants else None
        if special is None or (graph is not None and _operations(special) == _operations(graph)):
            return graph, error
        self.assumed[module] = constants
        return special, ""

    def _trace_for(self, module: nn.Module, constants: dict[str, Any] | None) -> tuple[fx.Graph | None, str]:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                return _Tracer(self._is_leaf).trace(module, constants), ""
        except Exception as failure:  # whatever the user's code raises when it is given proxies
            return None, f"{type(failure).__name__}: {first_line(failure)}"

    def _is_leaf(self, module: nn.Module) -> bool:
        return module in self.errors or module in self._hooked or self._is_layer(module)


class _Tracer(fx.Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__(param_shapes_constant=True)
        self._leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m)


def _operations(graph: fx.Graph) -> list[tuple[str, Any]]:
    """What `graph` does, but for the checks of constant arguments that tracing for them adds."""
    return [
        (node.op, node.target)
        for node in graph.nodes
        if node.op != "placeholder" and not getattr(node.target, "__name__", "").startswith("_assert")
    ]


def _owner(node: fx.Node, module: nn.Module) -> nn.Module:
    """The module whose forward has made `node`, in a trace of `module`."""
    stack = node.meta.get("nn_module_stack")
    return module.get_submodule(next(reversed(stack.values()))[0]) if stack else module


def _asks_metadata(node: fx.Node) -> bool:
    """Whether `node` reads the shape or dtype of its input, and not its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA
    return node.op == "call_method" and node.target in _METADATA


def _reorders(node: fx.Node) -> bool:
    """Whether `node` is a transpose or permute by constants."""
    kind = _REORDERINGS.get((node.op, node.target))
    dims = node.args[1:]
    return (
        kind is not None and not node.kwargs and all(isinstance(dim, int) for dim in dims) and len(dims) > 1
    )


_REORDERINGS: dict[tuple[str, Any], str] = {
    ("call_method", "permute"): "permute",
    ("call_method", "transpose"): "transpose",
    ("call_function", torch.transpose): "transpose",
}
