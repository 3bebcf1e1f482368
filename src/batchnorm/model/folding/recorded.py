"""The graph of one run: every operation of the model on the example, whatever its code is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.model.folding.calls import Calls
from batchnorm.model.folding.functional import FunctionalNorm, FunctionalNorms
from batchnorm.model.folding.paths import Channel, Graph, Layer
from batchnorm.model.nested import tensors_in
from batchnorm.names import quoted

# The values of their input in the same order and shape.
_SAME = {"detach", "alias", "clone", "lift_fresh", "contiguous"}
# The same in another shape or order.
_VIEWS = {"view", "_unsafe_view", "_reshape_alias", "reshape", "unsqueeze", "squeeze"}
_TRANSPOSES = {"transpose", "t", "permute"}
# Batch norm by running statistics, on any device; the running mean is their fourth argument.
_BATCH_NORMS = {
    "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit", "batch_norm_with_update", "_batch_norm_no_update",
}  # fmt: skip


@dataclass(eq=False)
class Step:
    """An operation, or a call of a layer: what it reads, who reads it, and in which forwards it stands."""

    what: str
    args: tuple[Any, ...] = ()
    shape: torch.Size = field(default_factory=torch.Size)
    inputs: list[Step] = field(default_factory=list)
    users: dict[Step, None] = field(default_factory=dict)
    owners: tuple[nn.Module, ...] = ()
    is_output: bool = False


class RecordedGraph(Graph[Step]):
    """What a run did, operation by operation: what it says holds for the example.

    Args:
        model: what runs.
        calls: what the example did with its modules.
        is_layer: which modules are taken as they are.
    """

    def __init__(
        self, model: nn.Module, calls: dict[nn.Module, Calls], is_layer: Callable[[nn.Module], bool]
    ) -> None:
        super().__init__(calls)
        self.names = {module: name for name, module in model.named_modules()}
        self.functional: list[Step] = []
        self._model, self._is_layer = model, is_layer

    def record(self, run: Callable[[], Any]) -> None:
        """Take in what `run` does with the model; it returns the output."""
        recorder = _Recorder(self, self._model, self._is_layer)
        with recorder.on():
            output = run()
        for tensor in tensors_in(output):
            if tensor in recorder.steps:
                recorder.steps[tensor].is_output = True

    def add(self, step: Step, layer: Layer) -> None:
        """Let `step` be a call of `layer`."""
        self._layers[step] = layer
        self.nodes.setdefault(layer, []).append(step)
        self.places.setdefault(layer, len(self._layers))

    def owners_of_functional(self) -> dict[nn.Module, dict[str, Any]]:
        """The modules that call batch norm as a function, with the constant arguments of their calls."""
        owners = dict.fromkeys(step.owners[-1] for step in self.functional)
        return {owner: self.calls[owner].constants or {} for owner in owners}

    def name_functional(self, functional: FunctionalNorms) -> None:
        """Let calls of batch norm as a function be layers: those of each module's forward, in their order."""
        seen = dict.fromkeys((step.owners[-1] for step in self.functional), 0)
        for step in self.functional:
            owner = step.owners[-1]
            self.add(step, FunctionalNorm(owner, seen[owner] % max(functional.number_of(owner), 1)))
            seen[owner] += 1

    def read(self, tensor: Tensor) -> None:
        """Note that an operation reads a Parameter or buffer."""
        self._tensors_read.add(id(tensor))

    def why_incomplete(self, layer: Layer) -> str:  # noqa: D102
        return "" if self.nodes.get(layer) else "the example does not run it"

    def describe(self, node: Step) -> str:  # noqa: D102
        layer = self._layers.get(node)
        if isinstance(layer, nn.Module):
            return quoted(layer, self.names[layer])
        owner = node.owners[-1] if node.owners else None
        of_torch = owner is not None and type(owner).__module__.startswith("torch.nn.modules")
        return quoted(owner, self.names[owner]) if owner is not None and of_torch else node.what

    def owners(self, layer: Layer) -> set[nn.Module]:
        """The modules in whose forwards `layer` is called."""
        return {owner for step in self.nodes.get(layer, []) for owner in step.owners}

    def _input(self, node: Step) -> Step | None:
        return node.inputs[0] if node.inputs else None

    def _users(self, node: Step) -> list[Step]:
        return list(node.users)

    def _is_output(self, node: Step) -> bool:
        return node.is_output

    def _times_read(self, node: Step, value: Step) -> int:
        return sum(read is value for read in node.inputs)

    def _passes_on(self, node: Step) -> bool:
        layer = self._layers.get(node)
        return layer in self._passing if layer is not None else node.what.removesuffix("()") in _SAME

    def _moves(self, node: Step, *, backwards: bool) -> bool:
        return node not in self._layers and node.what.removesuffix("()") in _VIEWS | _TRANSPOSES

    def _moved(self, node: Step, channel: Channel, backwards: bool) -> Channel | None:
        before, after = node.inputs[0].shape, node.shape
        name = node.what.removesuffix("()")
        if name in _TRANSPOSES:
            order = _order(name, node.args, len(before))
            return channel._replace(dim=order[channel.dim] if backwards else order.index(channel.dim))
        source, target = (after, before) if backwards else (before, after)
        return _reshaped(source, target, channel.dim)


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd: of functions, of compiled parts, of autograd functions."""

    def __init__(self, graph: RecordedGraph, model: nn.Module, is_layer: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.graph, self.model, self.is_layer = graph, model, is_layer
        self.steps = WeakTensorKeyDictionary()
        self.owners: list[nn.Module] = []
        self.inside = 0  # of how many layers
        self.held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, what the model does is recorded."""
        handles = []
        for module in self.graph.names:
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.inside:
            self._note(func, args, kwargs or {}, output)
        return output

    def _note(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        name = func._schema.name.partition("::")[2]
        read = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        step = self._step(f"{name.removesuffix('_')}()", read, args)
        results = [tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
        self._give(step, results)
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._give(step, [t for t in tree_leaves(given) if isinstance(t, Tensor)])
        if name in _BATCH_NORMS and self.owners and isinstance(args[3], Tensor):
            self.graph.functional.append(step)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.inside or self.is_layer(module):
            self.inside += 1
        else:
            if module is not self.model and has_hooks_of_others(module):
                self._look_at((args, kwargs))
            self.owners.append(module)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.inside:
            self.owners.pop()
            if module is not self.model and has_hooks_of_others(module):
                self._look_at(output)
            return
        self.inside -= 1
        if not self.inside:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            step = self._step(type(module).__name__, read, ())
            self.graph.add(step, module)
            results = list(tensors_in(output))
            if not any(result is given for result in results for given in read):
                self._give(step, results)
            else:
                self._give(step, [t for t in results if t not in self.steps] or results)

    def _look_at(self, value: Any) -> None:
        """A hook of the user's sees these tensors, and may change them."""
        for tensor in tensors_in(value):
            self._give(self._step("a hook", [tensor], ()), [tensor])

    def _step(self, what: str, read: list[Tensor], args: Any) -> Step:
        step = Step(what, args=_without_tensors(args), owners=tuple(self.owners))
        for tensor in read:
            if id(tensor) in self.held:
                self.graph.read(tensor)
                continue
            if tensor not in self.steps:
                self.steps[tensor] = Step("the input", shape=tensor.shape)
            step.inputs.append(self.steps[tensor])
            self.steps[tensor].users[step] = None
        return step

    def _give(self, step: Step, results: list[Tensor]) -> None:
        if results:
            step.shape = results[0].shape
        for result in results:
            self.steps[result] = step


def has_hooks_of_others(module: nn.Module) -> bool:
    """Whether a module has more hooks than the recorder's."""
    mine = len(module._forward_pre_hooks) == 1 and len(module._forward_hooks) == 1
    return not mine or bool(module._backward_hooks or module._backward_pre_hooks)


def _without_tensors(args: Any) -> tuple[Any, ...]:
    return tuple(None if isinstance(arg, Tensor) else arg for arg in args)


def _order(name: str, args: tuple[Any, ...], rank: int) -> list[int]:
    """Which dimension of the input each dimension of a transposed output is."""
    order = list(range(rank))
    if name == "permute":
        return [int(dim) % rank for dim in args[1]]
    first, second = (0, 1) if name == "t" else (int(dim) % rank for dim in args[1:3])
    if rank > 1:
        order[first], order[second] = order[second], order[first]
    return order


def _reshaped(source: torch.Size, target: torch.Size, dim: int) -> Channel | None:
    """Where a change of shape puts dimension `dim`, alone or with those behind it as features in a row."""
    before, channels, behind = math.prod(source[:dim]), source[dim], math.prod(source[dim + 1 :])
    for place, size in enumerate(target):
        if math.prod(target[:place]) != before or size % channels or size == 0:
            continue
        repeats = size // channels
        if repeats * math.prod(target[place + 1 :]) == behind and (size > 1 or channels == 1):
            return Channel(place, len(target), repeats)
    return None
