"""What comes before and after a layer: the calls of a model, by a trace (torch.fx) or by neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.fusion.find import default_arguments, quietly, twins_of


@dataclass(eq=False)
class Call:
    """One call in the forward of a model.

    Attributes:
        layer: the qualified name of the module that is called, or None.
        module: that module, or None.
        function: the function, or the name of the tensor's method, that is called instead of a module.
        args, kwargs: its arguments; a `torch.fx.Node` stands for what another call gives.
        inputs: the calls whose outputs it takes, in order; the model's own inputs are none.
        users: the calls that take its output.
        is_output: whether the whole model returns just that.
    """

    layer: str | None
    module: nn.Module | None
    function: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: list[Call] = field(default_factory=list)
    users: list[Call] = field(default_factory=list)
    is_output: bool = False


def calls_of(model: nn.Module) -> list[Call]:
    """The calls of a forward in training mode, as far as they can be followed without running it.

    What cannot be traced as a whole is followed part by part: each child by itself, and the children of a
    Sequential one after the other.
    """
    names = {module: name for name, module in model.named_modules()}
    twins, copied = twins_of(model)
    originals = {twin: module for module, twin in twins.items()}
    safe = {twins[module] for module in copied}
    calls: list[Call] = []

    def follow(module: nn.Module) -> None:
        if not module._modules:
            return
        graph = _trace(twins[module], safe) if module in copied else None
        if graph is not None:
            calls.extend(_calls_in(graph, twins[module], originals, names, is_whole=module is model))
            return
        if isinstance(module, nn.Sequential):
            calls.extend(_chain(module, names, is_whole=module is model))
        for child in dict.fromkeys(module.children()):
            follow(child)

    follow(model)
    return calls


class _Tracer(fx.Tracer):
    """Takes modules without children as leaves (what they compute is theirs), and those not safe to run.

    A twin that is no copy in all its parts shares state with the model's module: its code would write there.
    """

    proxy_buffer_attributes = True

    def __init__(self, safe: set[nn.Module]) -> None:
        super().__init__()
        self.safe = safe

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m not in self.safe:
            return True
        return not m._modules or isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _trace(twin: nn.Module, safe: set[nn.Module]) -> fx.Graph | None:
    try:
        twin.train()
        return quietly(_Tracer(safe), twin, default_arguments(twin))
    except Exception:  # whatever a model does that a trace cannot follow
        return None


def _calls_in(
    graph: fx.Graph,
    twin: nn.Module,
    originals: dict[nn.Module, nn.Module],
    names: dict[nn.Module, str],
    is_whole: bool,
) -> Iterator[Call]:
    modules = dict(twin.named_modules(remove_duplicate=False))
    calls: dict[fx.Node, Call] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = originals[modules[str(node.target)]]
            calls[node] = Call(names[module], module, None, node.args, node.kwargs)
        elif node.op in ("call_function", "call_method"):
            calls[node] = Call(None, None, node.target, node.args, node.kwargs)
        elif node.op == "output" and is_whole and node.args[0] in calls:
            calls[node.args[0]].is_output = True
    for node, call in calls.items():
        call.inputs = [calls[source] for source in node.all_input_nodes if source in calls]
        call.users = [calls[user] for user in node.users if user in calls]
        yield call


def _chain(sequential: nn.Sequential, names: dict[nn.Module, str], is_whole: bool) -> list[Call]:
    calls = [Call(names[child], child, None) for child in sequential._modules.values() if child is not None]
    for call, after in itertools.pairwise(calls):
        call.users, after.inputs = [after], [call]
    if is_whole and calls:
        calls[-1].is_output = True
    return calls
