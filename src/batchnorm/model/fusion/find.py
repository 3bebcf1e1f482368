"""Where a batch norm may wait for what follows it: by a trace of every module, or by its neighbours."""

from __future__ import annotations

import copy
import itertools
import operator
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm

from batchnorm.model.fusion.calls import Activation, activation_of, activation_of_module
from batchnorm.model.fusion.waiting import caller_of, is_sequential, output_layer
from batchnorm.model.hooks import has_hooks, has_hooks_after

# Layers that return a new tensor, which they keep for nothing.
_FRESH = (nn.modules.conv._ConvNd, nn.Linear)


class Place(NamedTuple):
    """Where a batch norm may wait: the function that calls it, the module of the activation after it, if it
    is one, and what it runs together with, in words."""

    caller: tuple[str, str]
    follower: nn.Module | None
    what: str


def find(model: nn.Module, candidates: Iterable[nn.Module]) -> dict[nn.Module, list[Place]]:
    """The batch norms among `candidates` that may wait, each with its places; the model stays as it is.

    One that is seen in a place where it may not wait is left out.
    """
    candidates = set(candidates)
    seen: list[tuple[nn.Module, Place | None]] = []
    twins, copied = twins_of(model)
    originals = {twin: original for original, twin in twins.items()}
    for module in model.modules():
        if is_sequential(module):
            seen += _in_sequential(module, candidates)
        elif module in copied and _can_be_traced(module):
            for twin, place in _in_module(twins[module], {twins[m] for m in candidates}):
                if place is not None and place.follower is not None:
                    place = place._replace(follower=originals[place.follower])
                seen.append((originals[twin], place))
    refused = {
        module
        for module, place in seen
        if place is None or has_hooks_after(module) or (place.follower and has_hooks(place.follower))
    }
    found: dict[nn.Module, list[Place]] = {}
    for batch_norm, place in seen:
        if place is not None and batch_norm not in refused:
            found.setdefault(batch_norm, []).append(place)
    return found


def twins_of(model: nn.Module) -> tuple[dict[nn.Module, nn.Module], set[nn.Module]]:
    """A twin of every module, to be traced: tracing runs code that may write into its module.

    Twins have the Parameters of the model, copies of all else, and no hooks.

    Returns:
        the twins, and the modules of which everything could be copied.
    """
    twins: dict[nn.Module, nn.Module] = {m: object.__new__(type(m)) for m in model.modules()}
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} | {id(m): twins[m] for m in twins}
    copied = set(twins)
    for module, twin in twins.items():
        for name, value in module.__dict__.items():
            if "hooks" in name and isinstance(value, dict):
                twin.__dict__[name] = type(value)()
                continue
            try:
                twin.__dict__[name] = copy.deepcopy(value, memo)
            except Exception:  # whatever a __deepcopy__ raises
                twin.__dict__[name] = value
                copied.discard(module)
    return twins, copied


def _can_be_traced(module: nn.Module) -> bool:
    return (
        not isinstance(module, (_TorchBatchNorm, torch.jit.ScriptModule))
        and "forward" not in module.__dict__
        and type(module).forward is not nn.Module.forward
        and any(isinstance(child, _TorchBatchNorm) for child in module.modules())
    )


def _in_sequential(
    sequential: nn.Module, candidates: set[nn.Module]
) -> Iterator[tuple[nn.Module, Place | None]]:
    caller = nn.Sequential.forward.__module__, "forward"
    for child, after in itertools.pairwise(sequential._modules.values()):
        if child is not None and (last := output_layer(child)) in candidates and after is not None:
            activation = activation_of_module(after)
            yield last, None if activation is None else Place(caller, after, activation.name)


def _in_module(module: nn.Module, candidates: set[nn.Module]) -> list[tuple[nn.Module, Place | None]]:
    """Every call of a candidate by the code of `module`, in training and eval mode, if it can be traced."""
    seen: list[tuple[nn.Module, Place | None]] = []
    for training in (True, False):
        tracer = _OneLevelTracer()
        try:
            module.train(training)
            graph = quietly(tracer, module)
        except Exception:
            return []
        modules = dict(module.named_modules(remove_duplicate=False))
        nodes = [node for node in graph.nodes if node.op not in ("get_attr", "placeholder")]
        for node in nodes:
            if _is_candidate(node, modules, candidates):
                place = _place(node, nodes, modules, tracer.frames, candidates)
                seen.append((output_layer(modules[node.target]), place))
    return seen


def quietly(tracer: fx.Tracer, module: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
    """The graph of `module`, from a run of its code that leaves no warnings and draws no random numbers."""
    state = random.getstate()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            return tracer.trace(module, concrete_args)
    finally:
        random.setstate(state)


class _OneLevelTracer(fx.Tracer):
    """Takes every submodule as a leaf, and remembers the function call that each node was made in."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.frames: dict[fx.Node, FrameType] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_OWN):
            frame = frame.f_back
        if frame is not None:
            self.frames[node] = frame
        return node


_OWN = (
    __file__,
    nn.modules.module.__file__,
    F.__file__,
    torch.overrides.__file__,
    fx.__file__.removesuffix("__init__.py"),
)


def _place(
    node: fx.Node,
    nodes: list[fx.Node],
    modules: dict[str, nn.Module],
    frames: dict[fx.Node, FrameType],
    candidates: set[nn.Module],
) -> Place | None:
    user = _only_user(node)
    if user is None or len(node.args) != 1 or node.kwargs:
        return None
    if _is_add(user):
        add = user
        other = add.args[1] if add.args[0] is node else add.args[0]
        if not isinstance(other, fx.Node):
            return None
        if add.args[1] is node and _is_candidate(other, modules, candidates):
            return None  # of two that could wait, the left: it may be added to in place, which a trace hides
        user = _only_user(add)
        if (
            user is None
            or nodes.index(user) != nodes.index(add) + 1
            or frames.get(add) is not frames.get(node)
        ):
            return None
        following = add
    else:
        following = user
    activation, follower = _activation_of_node(user, modules)
    if activation is None or frames.get(user) is not frames.get(node) or node not in frames:
        return None
    if nodes.index(following) != nodes.index(node) + 1 and not _has_fresh_input(node, modules):
        return None
    what = activation.name if following is user else f"add, {activation.name}"
    return Place(caller_of(frames[node]), follower, what)


def _only_user(node: fx.Node) -> fx.Node | None:
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if sum(argument is node for argument in user.args) == 1 else None


def _is_add(node: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)


def _is_candidate(node: fx.Node, modules: dict[str, nn.Module], candidates: set[nn.Module]) -> bool:
    return node.op == "call_module" and output_layer(modules[str(node.target)]) in candidates


def _activation_of_node(
    node: fx.Node, modules: dict[str, nn.Module]
) -> tuple[Activation | None, nn.Module | None]:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return activation_of_module(module), module
    function = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    return activation_of(function, tuple(node.args), dict(node.kwargs)), None


def _has_fresh_input(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether nothing but the batch norm that gives `node` its output can change its input in place."""
    ends: list[nn.Module] = [modules[str(node.target)]]
    before = None
    while is_sequential(ends[-1]):
        ends = list(ends[-1].children())
        before = ends[-2] if len(ends) > 1 else before
    if before is not None:
        return isinstance(before, _FRESH)
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and len(source.users) == 1
        and source.op == "call_module"
        and isinstance(modules[str(source.target)], _FRESH)
    )
