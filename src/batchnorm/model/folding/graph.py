"""The graph that fold follows: traced parts of a model, and the layers before and after a batch norm."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.checks import first_line
from batchnorm.model.hooks import has_hooks
from batchnorm.names import quoted

# A node, and the reorderings of dimensions and flattens on the way to it.
Path = tuple[fx.Node, tuple[fx.Node, ...]]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass
class Calls:
    """What a forward pass of the example did with a module.

    `shapes` are those of its first input. `constants` are the arguments that are no tensors, by name, if they
    were the same in all calls, else None.
    """

    count: int = 0
    shapes: list[torch.Size] = field(default_factory=list)
    constants: dict[str, Any] | None = field(default_factory=dict)
    with_residual: bool = False

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of one call."""
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
        except (TypeError, ValueError):
            given = dict(enumerate(args))  # type: ignore[arg-type]
        first = next(iter(given.values()), None)
        if isinstance(first, Tensor):
            self.shapes.append(first.shape)
        constants = {
            name: value
            for name, value in given.items()
            if value is None or isinstance(value, (bool, int, float, str))
        }
        self.constants = constants if self.count == 0 or self.constants == constants else None
        self.with_residual |= given.get("residual") is not None or given.get("mask") is not None
        self.count += 1


def record_calls(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, Calls]:
    """What `run()` does with each module of `model`."""
    calls = {module: Calls() for module in model.modules()}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module].add(module, args, kwargs)

    scripted = torch.jit.ScriptModule
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in calls
        if not isinstance(module, scripted)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


class Graphs:
    """The traced parts of a model: the whole of it, or the largest parts that torch.fx can trace.

    Args:
        model: a copy that may be spoiled: tracing calls its forward with proxies.
        calls: what the example did with its modules.
    """

    def __init__(self, model: nn.Module, calls: dict[nn.Module, Calls]) -> None:
        self.calls = calls
        self.names = {module: name for name, module in model.named_modules()}
        self.errors: dict[nn.Module, str] = {}
        self.assumed: dict[nn.Module, dict[str, Any]] = {}
        self.nodes: dict[nn.Module, list[fx.Node]] = {module: [] for module in self.names}
        self.functional: list[fx.Node] = []
        self._hooked = {module for module in self.names if module is not model and has_hooks(module)}
        self._module: dict[fx.Node, nn.Module] = {}
        self._places: dict[nn.Module, int] = {}
        self._expected = dict.fromkeys(self.names, 0)
        self._tensors_read: set[int] = set()
        self._passing: set[nn.Module] = set()
        self._graphs: list[fx.Graph] = []  # a graph holds its nodes only weakly
        self._mark_untraceable(model)
        self._visited: set[nn.Module] = set()
        self._trace_below(model)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer that `node` calls."""
        return self._module.get(node)

    def place(self, module: nn.Module) -> int | None:
        """Where the first call of `module` is in the order of the graphs."""
        return self._places.get(module)

    def pass_on(self, module: nn.Module) -> None:
        """From now on `module` passes its input on unchanged."""
        self._passing.add(module)

    def reads_tensors_of(self, module: nn.Module) -> bool:
        """Whether a forward uses Parameters or buffers of `module` other than by calling it."""
        return any(id(tensor) in self._tensors_read for tensor in _tensors(module))

    def called_elsewhere(self, module: nn.Module) -> bool:
        """Whether the example called `module` more or less often than the traced parts say."""
        return self.calls[module].count != self._expected[module]

    def source(self, node: fx.Node) -> tuple[Path | None, str]:
        """What `node` reads, past what passes its values on unchanged, or None and why not."""
        moves: tuple[fx.Node, ...] = ()
        value = _input(node)
        if isinstance(value, fx.Node) and _times_read(node, value) > 1:
            return None, "its input is its residual too"
        while True:
            if not isinstance(value, fx.Node):
                return None, "its input is not in the graph"
            if len(value.users) > 1:
                return None, f"the output of {self.describe(value)} is used elsewhere too"
            if _reorders(value):
                moves = (*moves, value)
            elif not self._passes_on(value):
                return (value, moves), ""
            value = _input(value)

    def readers(self, node: fx.Node) -> tuple[list[Path], str]:
        """All calls that read `node`, past what passes its values on unchanged, or none and why not."""
        found: list[Path] = []
        pending: list[Path] = [(node, ())]
        while pending:
            value, moves = pending.pop()
            if not value.users:
                return [], "nothing reads its output"
            for user in value.users:
                if user.op == "output":
                    return [], "its output is that of the traced module"
                layer = self._module.get(user)
                if layer is not None and (_input(user) is not value or _times_read(user, value) > 1):
                    return [], f"{self.describe(user)} reads its output as more than its input"
                if self._passes_on(user):
                    pending.append((user, moves))
                elif _reorders(user) or self.flattens(user):
                    pending.append((user, (*moves, user)))
                else:
                    found.append((user, moves))
        return found, ""

    def describe(self, node: fx.Node) -> str:
        """`node` in a reason."""
        module = self._module.get(node)
        if module is not None:
            return quoted(module, self.names[module])
        if node.op == "placeholder":
            return f"the input {node.target!r}"
        if node.op == "call_function":
            return f"{getattr(node.target, '__name__', node.target)}()"
        return f"{node.target}()" if node.op == "call_method" else str(node.target)

    def _passes_on(self, node: fx.Node) -> bool:
        module = self._module.get(node)
        if module is not None:
            if module in self._passing:
                return True
            return type(module) in (nn.Identity, *_DROPOUTS) and not has_hooks(module)
        if node.op == "call_function" and node.target is nn.functional.dropout:
            return node.kwargs.get("training") is False
        return node.op == "call_method" and node.target == "contiguous"

    def flattens(self, node: fx.Node) -> bool:
        """Whether `node` makes all dimensions but the first one."""
        module = self._module.get(node)
        if module is not None:
            whole = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
            return whole and not has_hooks(module)
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
        graph = None if module in self.errors else self._trace(module)[0]
        if graph is None:
            for child in module.children():
                self._trace_below(child)
            return
        self._graphs.append(graph)
        for node in graph.nodes:
            if node.op == "call_module":
                called = module.get_submodule(node.target)
                self._module[node] = called
                self.nodes[called].append(node)
                self._places.setdefault(called, len(self._module))
                self._expected[called] += self.calls[module].count
                self._trace_below(called)
            elif node.op == "get_attr":
                owner, _, attribute = node.target.rpartition(".")
                self._tensors_read.add(id(getattr(module.get_submodule(owner), attribute)))
            elif node.op == "call_function" and "batch_norm" in getattr(node.target, "__name__", ""):
                self.functional.append(node)

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

    def _is_layer(self, module: nn.Module) -> bool:
        if isinstance(module, _BatchNorm) or inherits_forward(module):
            return True
        torchs_own = type(module).__module__.startswith("torch.nn") and not isinstance(
            module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        )
        return torchs_own and not any(isinstance(inner, _BatchNorm) for inner in module.modules())


class _Tracer(fx.Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__(param_shapes_constant=True)
        self._leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


def inherits_forward(module: nn.Module) -> bool:
    """Whether `module` is a convolution or linear layer that computes what torch's computes."""
    for kind in WEIGHTED:
        if isinstance(module, kind):
            same = [
                getattr(type(module), method, None) is getattr(kind, method, None)
                for method in ("forward", "_conv_forward", "__call__")
            ]
            return all(same) and "forward" not in vars(module)
    return False


def _operations(graph: fx.Graph) -> list[tuple[str, Any]]:
    """What `graph` does, but for the checks of constant arguments that tracing for them adds."""
    return [
        (node.op, node.target)
        for node in graph.nodes
        if node.op != "placeholder" and not getattr(node.target, "__name__", "").startswith("_assert")
    ]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _input(node: fx.Node) -> Any:
    if node.args:
        return node.args[0]
    return next((node.kwargs[name] for name in ("input", "x") if name in node.kwargs), None)


def _reorders(node: fx.Node) -> bool:
    """Whether `node` is a transpose or permute by constants."""
    kind = _REORDERINGS.get((node.op, node.target))
    dims = node.args[1:]
    return (
        kind is not None and not node.kwargs and all(isinstance(dim, int) for dim in dims) and len(dims) > 1
    )


def moved(dim: int, rank: int, node: fx.Node, *, backwards: bool) -> int:
    """Where reordering `node` puts dimension `dim` of its input; `backwards`, of its output in its input."""
    dims = [int(arg) % rank for arg in node.args[1:]]  # type: ignore[arg-type]
    order = list(range(rank))
    if _REORDERINGS[node.op, node.target] == "permute":
        order = dims
    else:
        order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    return order[dim] if backwards else order.index(dim)


_REORDERINGS: dict[tuple[str, Any], str] = {
    ("call_method", "permute"): "permute",
    ("call_method", "transpose"): "transpose",
    ("call_function", torch.transpose): "transpose",
}


def _times_read(node: fx.Node, value: fx.Node) -> int:
    seen: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda arg: seen.append(arg))
    return sum(arg is value for arg in seen)
