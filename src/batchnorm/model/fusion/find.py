"""Where a batch norm may wait for what follows it: by a trace of every module, or by its neighbours."""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
import random
import sys
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm

from batchnorm.model.fusion.calls import Activation, activation_of, activation_of_module
from batchnorm.model.fusion.waiting import caller_of, is_sequential, output_layer, qualified_caller_of
from batchnorm.model.hooks import has_hooks, has_hooks_after

# Layers that return a new tensor, which they keep for nothing.
_FRESH = (nn.modules.conv._ConvNd, nn.Linear)


class Place(NamedTuple):
    """Where a batch norm may wait.

    Attributes:
        caller: the function that gets its output.
        through: modules that return it, as it is, on the way there.
        followers: modules that take it: the activation, and what does nothing before it.
        what: what it runs together with, in words.
    """

    caller: tuple[str, str]
    through: tuple[nn.Module, ...]
    followers: tuple[nn.Module, ...]
    what: str


def find(model: nn.Module, candidates: Iterable[nn.Module]) -> dict[nn.Module, list[Place]]:
    """The batch norms among `candidates` that may wait, each with its places; the model stays as it is.

    One that is seen in a place where it may not wait is left out.
    """
    return _Finder(model, set(candidates)).find()


class _Finder:
    def __init__(self, model: nn.Module, candidates: set[nn.Module]) -> None:
        self.model, self.candidates = model, candidates
        self.twins, self.copied = twins_of(model)
        self.originals = {twin: original for original, twin in self.twins.items()}
        # Modules whose code returns the output of one they call, and that one; and those of them in which
        # nobody else has the input of the batch norm.
        self.ends: dict[nn.Module, nn.Module] = {}
        self.fresh: set[nn.Module] = set()
        self.seen: list[tuple[nn.Module, Place | None]] = []

    def find(self) -> dict[nn.Module, list[Place]]:
        # What a module returns is known before the modules that call it are looked at.
        for module in reversed(list(self.model.modules())):
            if is_sequential(module):
                self._look_at_sequential(module)
            elif module in self.copied and _can_be_traced(module):
                self._look_at(module)
        refused = {module for module, place in self.seen if place is None or _is_watched(module, place)}
        found: dict[nn.Module, list[Place]] = {}
        for batch_norm, place in self.seen:
            if place is not None and batch_norm not in refused:
                found.setdefault(batch_norm, []).append(place)
        return found

    def _output_layer(self, module: nn.Module) -> tuple[nn.Module, tuple[nn.Module, ...]]:
        """The module whose output is that of `module`, and those whose own code returns it on the way."""
        through: tuple[nn.Module, ...] = ()
        while True:
            module = output_layer(module)
            if module not in self.ends:
                return module, through
            through = (*through, module)
            module = self.ends[module]

    def _look_at_sequential(self, sequential: nn.Module) -> None:
        caller = nn.Sequential.forward.__module__, "forward"
        children = [child for child in sequential._modules.values() if child is not None]
        for number, child in enumerate(children[:-1]):
            last, through = self._output_layer(child)
            if last not in self.candidates:
                continue
            idle = tuple(itertools.takewhile(_does_nothing, children[number + 1 :]))
            rest = children[number + 1 + len(idle) :]
            if rest:  # else it is the output of the Sequential, which its caller knows more of
                activation = activation_of_module(rest[0])
                place = None
                if activation is not None:
                    place = Place(caller, through, (*idle, rest[0]), activation.name)
                self.seen.append((last, place))

    def _look_at(self, module: nn.Module) -> None:
        """Note every call of a candidate by the code of `module`, in training and eval mode."""
        seen: list[tuple[nn.Module, Place | None]] = []
        ends: list[nn.Module | None] = []
        fresh = True
        twin = self.twins[module]
        for training in (True, False):
            twin.train(training)
            traced = _traced(twin)
            if traced is None:
                return
            trace = _Trace(*traced, twin, self)
            seen += trace.places()
            ends.append(trace.end)
            fresh = fresh and trace.end_is_fresh()
        end = ends[0]
        if end is not None and end is ends[1]:
            last, _ = self._output_layer(end)
            if [entry for entry in seen if entry[0] is last] == [(last, None)] * 2:
                # It is called for this alone, and whoever calls `module` decides whether it may wait.
                self.ends[module] = end
                if fresh:
                    self.fresh.add(module)
                seen = [entry for entry in seen if entry[0] is not last]
        self.seen += seen


def _is_watched(module: nn.Module, place: Place) -> bool:
    """Whether a hook sees what there is to see of a promise."""
    return has_hooks_after(module) or any(map(has_hooks, place.followers))


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


def _traced(module: nn.Module) -> tuple[fx.Graph, _OneLevelTracer] | None:
    """The graph of a module's own code, and the tracer that has made it.

    For any arguments, else for its default ones, else for inputs of a size that is made up: where an answer
    depends on it a promise may be made in vain, which costs time alone.
    """
    defaults = default_arguments(module)
    for rank in (None, *_RANKS):
        for arguments in (None, defaults) if rank is None else (defaults,):
            tracer = _OneLevelTracer(rank)
            try:
                return quietly(tracer, module, arguments), tracer
            except Exception:  # whatever the user's code raises when it is given proxies
                continue
    return None


def default_arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments of a module's forward that have defaults, with these."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


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

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self.frames: dict[fx.Node, FrameType] = {}
        self._rank = rank

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return fx.Proxy(node, self) if self._rank is None else _SizedProxy(node, self, self._rank)

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


class _SizedProxy(fx.Proxy):
    """One that says a size when it is asked, so that code that computes with sizes can be followed."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, rank: int) -> None:
        super().__init__(node, tracer)
        self._rank = rank

    @property
    def shape(self) -> torch.Size:
        return torch.Size(_SIZE[: self._rank])

    @property
    def ndim(self) -> int:
        return self._rank

    def dim(self) -> int:
        return self._rank

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]


# The ranks of inputs to make up, and a size.
_RANKS, _SIZE = (4, 3, 2), (4, 8, 56, 56)
_OWN = (
    __file__,
    nn.modules.module.__file__,
    F.__file__,
    torch.overrides.__file__,
    fx.__file__.removesuffix("__init__.py"),
)


class _Trace:
    """The code of one module, as it was traced.

    Attributes:
        end: the module whose output it returns, as it is; or None.
    """

    def __init__(self, graph: fx.Graph, tracer: _OneLevelTracer, twin: nn.Module, finder: _Finder) -> None:
        self.frames, self.finder = tracer.frames, finder
        by_name = dict(twin.named_modules(remove_duplicate=False))
        self.nodes = [node for node in graph.nodes if node.op not in ("get_attr", "placeholder")]
        self.modules = {
            node: finder.originals[by_name[str(node.target)]]
            for node in self.nodes
            if node.op == "call_module"
        }
        (returned,) = self.nodes[-1].args
        self._returned = returned if isinstance(returned, fx.Node) and returned in self.modules else None
        self.end = None if self._returned is None else self.modules[self._returned]

    def end_is_fresh(self) -> bool:
        """Whether nobody else has the input of the batch norm whose output it returns."""
        return self._returned is not None and self._has_fresh_input(self._returned)

    def places(self) -> list[tuple[nn.Module, Place | None]]:
        """Of every call of a candidate: the place, or None where it may not wait."""
        seen = []
        for node in self.modules:
            last, through = self.finder._output_layer(self.modules[node])
            if last in self.finder.candidates:
                seen.append((last, self._place(node, through)))
        return seen

    def _place(self, node: fx.Node, through: tuple[nn.Module, ...]) -> Place | None:
        if len(node.args) != 1 or node.kwargs or node not in self.frames:
            return None
        idle, before, user = self._past_idle(node)
        add = None
        if user is not None and _is_add(user):
            add, user = user, self._activation_after(before, user)
        if user is None:
            return None
        activation, follower = self._activation(user)
        following = user if add is None else add
        if activation is None or self.frames.get(user) is not self.frames[node]:
            return None
        at_once = self.nodes.index(following) == self.nodes.index(node) + len(idle) + 1
        if not at_once and not self._has_fresh_input(node):
            return None
        what = activation.name if add is None else f"add, {activation.name}"
        followers = idle if follower is None else (*idle, follower)
        # Past code of the user's that may be called by itself, the caller must be the very one.
        caller = (qualified_caller_of if through else caller_of)(self.frames[node])
        return Place(caller, through, followers, what)

    def _past_idle(self, node: fx.Node) -> tuple[tuple[nn.Module, ...], fx.Node, fx.Node | None]:
        """The modules after `node` that do nothing, the last call of these, and the user of its output."""
        idle: tuple[nn.Module, ...] = ()
        user = _only_user(node)
        while user is not None and _does_nothing(self.modules.get(user)):
            idle = (*idle, self.modules[user])
            node, user = user, _only_user(user)
        return idle, node, user

    def _activation_after(self, node: fx.Node, add: fx.Node) -> fx.Node | None:
        """The call that takes the sum of `node` and something else, where `node` may wait for both."""
        on_the_right = add.args[1] is node
        other = add.args[0] if on_the_right else add.args[1]
        if not isinstance(other, fx.Node):
            return None
        if on_the_right and add.target in (operator.iadd, "add_"):
            return None  # what is added to is no promise
        if on_the_right and other in self.modules:
            last, _ = self.finder._output_layer(self.modules[other])
            if last in self.finder.candidates:
                return None  # of two the left waits: it may be added to in place, unseen by a trace
        user = _only_user(add)
        at_once = user is not None and self.nodes.index(user) == self.nodes.index(add) + 1
        return user if at_once and self.frames.get(add) is self.frames[node] else None

    def _activation(self, node: fx.Node) -> tuple[Activation | None, nn.Module | None]:
        if node in self.modules:
            return activation_of_module(self.modules[node]), self.modules[node]
        function = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
        return activation_of(function, tuple(node.args), dict(node.kwargs)), None

    def _has_fresh_input(self, node: fx.Node) -> bool:
        """Whether nothing but the batch norm that gives `node` its output can change its input in place."""
        module, before = self.modules[node], None
        while is_sequential(module):
            *others, module = module.children()
            before = others[-1] if others else before
        if module in self.finder.ends:
            return module in self.finder.fresh
        if before is not None:
            return isinstance(before, _FRESH)
        source = node.args[0]
        return (
            isinstance(source, fx.Node)
            and len(source.users) == 1
            and source in self.modules
            and isinstance(output_layer(self.modules[source]), _FRESH)
        )


def _only_user(node: fx.Node) -> fx.Node | None:
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if sum(argument is node for argument in user.args) == 1 else None


def _does_nothing(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity and not has_hooks(module)


def _is_add(node: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
