"""Batch norm run together with the add and the activation after it, in models whose code stays as it is.

Which layers: the forward of every module is traced by itself (torch.fx, its submodules as leaves), and a
batch norm may wait where all that is done with its output is an activation, or an add and then an activation,
in the same function. `nn.Sequential`s are read off their neighbours, so they need no trace.

How: such a layer returns a `Waiting` tensor, the promise of its output. The activation, or the add, that is
called with it reaches `__torch_function__`, which runs the layer together with it. Anything else gets the
plain output. So the model's own code runs, every time: nothing the trace saw is baked in (training mode,
shapes, flags, submodules that are replaced later), there is nothing to pickle, copy or compile but a class,
hooks of submodules run, an `nn.ReLU` shared by several places needs no care, and a wrong guess costs time,
not correctness. Forwards generated from the traced graph would save some microseconds and lose all of this.

A promise is made only to the function it was found in, for inputs that go by a kernel that fuses, and not
under torch.compile, torch.export or torch.func (compilers fuse by themselves), nor where a hook would see it.

Limits: a function that, by a flag changed after the trace, returns the output of a batch norm as it is,
returns a `Waiting`; it is a tensor to all of torch's functions, and its statistics move when it is first
used. A batch norm and an activation in two functions (a `Sequential` that ends in a batch norm, a ReLU in its
parent) are not fused: either may be called by itself.
"""

from __future__ import annotations

import copy
import inspect
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

from batchnorm.context import under_transform
from batchnorm.kernels import choose, native, reference
from batchnorm.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    _BatchNorm,
)
from batchnorm.names import describe

# How activations are called: the name of ours, and the arguments after the input with what they must be.
_ANY = object()
_CALLS: dict[Any, tuple[str, dict[str, Any]]] = {
    F.relu: ("relu", {"inplace": _ANY}),
    F.relu6: ("relu6", {"inplace": _ANY}),
    F.hardtanh: ("relu6", {"min_val": 0.0, "max_val": 6.0, "inplace": _ANY}),
    F.leaky_relu: ("leaky_relu", {"negative_slope": 0.01, "inplace": _ANY}),
    F.elu: ("elu", {"alpha": 1.0, "inplace": _ANY}),
    F.gelu: ("gelu", {"approximate": "none"}),
    F.silu: ("silu", {"inplace": _ANY}),
    F.mish: ("mish", {"inplace": _ANY}),
    F.hardswish: ("hardswish", {"inplace": _ANY}),
    F.hardsigmoid: ("hardsigmoid", {"inplace": _ANY}),
    F.softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
    F.sigmoid: ("sigmoid", {}),
    F.tanh: ("tanh", {}),
    **{
        getattr(owner, name + suffix): (name, {})
        for owner in (torch, Tensor)
        for name in ("relu", "sigmoid", "tanh")
        for suffix in ("", "_")
    },
}
# What an argument is when it is left out; all others default to the value they must have.
_DEFAULTS = {"min_val": -1.0, "max_val": 1.0}
_MODULES = {
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Softplus, nn.Sigmoid, nn.Tanh,
}  # fmt: skip
_ADDS = {Tensor.add, Tensor.add_, torch.add}
_IN_PLACE = {function for function in _CALLS if function.__name__.endswith("_")}

_any_global_hook = getattr(nn.modules.module, "_has_any_global_hook", lambda: False)


class _Activation(NamedTuple):
    name: str
    in_place: bool


def _activation(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Activation | None:
    """The activation that a call of `function` is, if it is one that the layers know."""
    if function not in _CALLS:
        return None
    name, parameters = _CALLS[function]
    if len(args) > len(parameters) + 1:
        return None
    given = dict(zip(parameters, args[1:], strict=False)) | kwargs
    in_place = function in _IN_PLACE or bool(given.pop("inplace", False))
    for parameter, wanted in parameters.items():
        if parameter != "inplace":
            value = given.pop(parameter, _DEFAULTS.get(parameter, wanted))
            if not isinstance(value, (int, float, str)) or value != wanted:
                return None
    return None if given else _Activation(name, in_place)


class _Asking(Tensor):
    """An input that answers with the activation that is called with it."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _activation(function, args, kwargs or {})


_NOTHING = torch.empty(0, device="cpu", dtype=torch.float32)
_asking = Tensor._make_subclass(_Asking, _NOTHING)


def _activation_of_module(module: nn.Module) -> _Activation | None:
    if type(module) not in _MODULES or "forward" in module.__dict__:
        return None
    return module.forward(_asking)


class _Pass:
    """A forward of a layer that has been asked for, and has not run yet."""

    def __init__(self, layer: _Fusing, x: Tensor) -> None:
        self.layer = layer
        self.x = x
        self.version = _version(x)
        self.grad = torch.is_grad_enabled()
        self.ran = False

    def run(self, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        if _version(self.x) != self.version:
            raise RuntimeError(
                f"{describe(self.layer)}: its input was changed in place before the activation that it is "
                "fused with. Change it later, or convert the model with fuse=False"
            )
        # The layer with another activation; not by setting it, which another thread would see.
        layer = object.__new__(type(self.layer))
        layer.__dict__.update(self.layer.__dict__)
        layer.__dict__["_activation"] = activation
        if self.ran:
            layer.__dict__["track_running_stats"] = False
        self.ran = True
        return _BatchNorm.forward(layer, self.x, residual)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


class Waiting(Tensor):
    """The output of a layer, or its sum with a residual, that is computed when it is known what for.

    Its own memory is empty: code that takes it past `__torch_function__` fails, as it does in backward.
    """

    _pass: _Pass
    _residual: tuple[Tensor, int | None] | None
    _value: Tensor | None

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Waiting) and first._value is None:
            activation = _activation(function, args, kwargs)
            if activation is not None:
                y = first._finish(activation.name)
                if y is not None:
                    if activation.in_place:
                        first._settle(y)
                    return y
        if function in _ADDS and len(args) == 2 and not kwargs:
            added = _add(function, *args)
            if added is not None:
                return added
        return function(*_plain(args), **_plain(kwargs))

    def _finish(self, activation: str) -> Tensor | None:
        if torch.is_grad_enabled() != self._pass.grad:
            return None
        if activation == "softplus" and torch.is_autocast_enabled(self._pass.x.device.type):
            return None  # autocast computes it in float32
        return self._pass.run(self._checked_residual(), activation)

    def _checked_residual(self) -> Tensor | None:
        if self._residual is None:
            return None
        residual, version = self._residual
        if _version(residual) != version:
            raise RuntimeError(
                f"{describe(self._pass.layer)}: what is added to its output was changed in place before the "
                "activation that both are fused with. Change it later, or convert the model with fuse=False"
            )
        return residual

    def _tensor(self) -> Tensor:
        if self._value is None:
            with torch.set_grad_enabled(self._pass.grad):
                value = self._pass.run(self._checked_residual())
            self._settle(value)
            return value
        return self._value

    def _settle(self, value: Tensor) -> None:
        """Be `value` from now on, and keep the layer's input alive no longer."""
        self._value, self._residual = value, None
        del self._pass


def _waiting(forward: _Pass, residual: Tensor | None = None) -> Waiting:
    # It asks for a gradient only so that autograd, where it is not meant to see it, fails on its shape.
    waiting = Tensor._make_subclass(Waiting, _NOTHING, forward.grad)
    waiting._pass = forward
    waiting._residual = None if residual is None else (residual, _version(residual))
    waiting._value = None
    return waiting


def _add(function: Any, left: Any, right: Any) -> Waiting | None:
    """The sum of a waiting output and a residual, waiting too; None where the layer cannot add them."""
    in_place = function is Tensor.add_
    for waiting, other in ((left, right),) if in_place else ((left, right), (right, left)):
        if not isinstance(waiting, Waiting) or waiting._value is not None or waiting._residual is not None:
            continue
        x = waiting._pass.x
        if (
            waiting._pass.ran
            or other is waiting
            or torch.is_grad_enabled() != waiting._pass.grad
            or not isinstance(other, Tensor)
        ):
            continue
        other = _plain(other)
        if (
            type(other) not in (Tensor, nn.Parameter)
            or other.shape != x.shape
            or other.dtype != x.dtype
            or other.device != x.device
        ):
            continue
        if not in_place:
            return _waiting(waiting._pass, other)
        waiting._residual = other, _version(other)
        return waiting
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Waiting):
        return value._tensor()
    if type(value) in (tuple, list):
        return type(value)(_plain(item) for item in value)
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return value


class _Fusing(_BatchNorm):
    """A layer that waits for what follows it when it is called by one of `_callers`."""

    _callers: tuple[tuple[str, str], ...]
    _followers: tuple[nn.Module, ...]

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """See the layer without fusion."""
        if (
            torch.compiler.is_compiling()
            or type(x) is not Tensor
            or residual is not None
            or mask is not None
            or not _fuses(self, x)
            or not self._may_wait(sys._getframe(1))
        ):
            return super().forward(x, residual, mask)
        self._check_input(x, None, None, None)
        return _waiting(_Pass(self, x))

    def _may_wait(self, frame: FrameType | None) -> bool:
        if (
            self._activation is not None
            or self._sync is not False  # processes must communicate in the same order, whatever their shapes
            or _hooked_after(self)
            or any(_hooked(follower) for follower in self._followers)
            or _any_global_hook()
            or torch.jit.is_tracing()
            or under_transform()
        ):
            return False
        while frame is not None and frame.f_code.co_filename == nn.modules.module.__file__:
            frame = frame.f_back
        if frame is None or _caller(frame) not in self._callers:
            return False
        return frame.f_code is not nn.Sequential.forward.__code__ or not _is_last(
            self, frame.f_locals["self"]
        )


def _fuses(layer: _Fusing, x: Tensor) -> bool:
    """Whether `x` goes by a kernel that fuses; for the others, waiting would be time lost."""
    if x.ndim not in layer._ranks:
        return False  # an error, and the layer's to raise
    parameters = layer._parameters.get("weight"), layer._parameters.get("bias")
    return choose(x, layer.channel_dim, parameters, None, "relu") not in (native, reference)


def _is_last(layer: nn.Module, sequential: nn.Sequential) -> bool:
    return next(reversed(sequential._modules.values())) is layer


def _hooked_after(module: nn.Module) -> bool:
    """Whether a hook sees the output of `module`, or its gradient."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _hooked(module: nn.Module | None) -> bool:
    return module is not None and (bool(module._forward_pre_hooks) or _hooked_after(module))


def _caller(frame: FrameType) -> tuple[str, str]:
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name


class FusingBatchNorm1d(_Fusing, BatchNorm1d):
    __doc__ = f"{inspect.getdoc(BatchNorm1d)}"


class FusingBatchNorm2d(_Fusing, BatchNorm2d):
    __doc__ = f"{inspect.getdoc(BatchNorm2d)}"


class FusingBatchNorm3d(_Fusing, BatchNorm3d):
    __doc__ = f"{inspect.getdoc(BatchNorm3d)}"


class FusingLazyBatchNorm1d(_Fusing, LazyBatchNorm1d):
    __doc__ = f"{inspect.getdoc(LazyBatchNorm1d)}"
    cls_to_become = FusingBatchNorm1d


class FusingLazyBatchNorm2d(_Fusing, LazyBatchNorm2d):
    __doc__ = f"{inspect.getdoc(LazyBatchNorm2d)}"
    cls_to_become = FusingBatchNorm2d


class FusingLazyBatchNorm3d(_Fusing, LazyBatchNorm3d):
    __doc__ = f"{inspect.getdoc(LazyBatchNorm3d)}"
    cls_to_become = FusingBatchNorm3d


FUSING: dict[type[nn.Module], type[nn.Module]] = {
    BatchNorm1d: FusingBatchNorm1d,
    BatchNorm2d: FusingBatchNorm2d,
    BatchNorm3d: FusingBatchNorm3d,
    LazyBatchNorm1d: FusingLazyBatchNorm1d,
    LazyBatchNorm2d: FusingLazyBatchNorm2d,
    LazyBatchNorm3d: FusingLazyBatchNorm3d,
}
for _layer, _fusing in FUSING.items():
    _fusing.__name__ = _layer.__name__  # for printed models, errors, and code that goes by it


class Place(NamedTuple):
    """Where a batch norm may wait: the function that calls it, and the module of the activation after it."""

    caller: tuple[str, str]
    follower: nn.Module | None


def find(model: nn.Module, candidates: Iterable[nn.Module]) -> dict[nn.Module, list[Place]]:
    """The batch norms among `candidates` that may wait, each with its places; the model stays as it is.

    One that is seen in a place where it may not wait is left out.
    """
    candidates = set(candidates)
    seen: list[tuple[nn.Module, Place | None]] = []
    twins, copied = _twins(model)
    originals = {twin: original for original, twin in twins.items()}
    for module in model.modules():
        if type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__:
            seen += _in_sequential(module, candidates)
        elif module in copied and _can_be_traced(module):
            for twin, place in _in_module(twins[module], {twins[m] for m in candidates}):
                if place is not None and place.follower is not None:
                    place = place._replace(follower=originals[place.follower])
                seen.append((originals[twin], place))
    refused = {m for m, place in seen if place is None or _hooked_after(m) or _hooked(place.follower)}
    found: dict[nn.Module, list[Place]] = {}
    for batch_norm, place in seen:
        if place is not None and batch_norm not in refused:
            found.setdefault(batch_norm, []).append(place)
    return found


def _twins(model: nn.Module) -> tuple[dict[nn.Module, nn.Module], set[nn.Module]]:
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
    children = list(sequential._modules.values())
    caller = nn.Sequential.forward.__module__, "forward"
    for child, after in zip(children, [*children[1:], None], strict=True):
        if child is not None and child in candidates:
            fits = after is not None and _activation_of_module(after) is not None
            yield child, Place(caller, after) if fits else None


def _in_module(module: nn.Module, candidates: set[nn.Module]) -> list[tuple[nn.Module, Place | None]]:
    """Every call of a candidate by the code of `module`, in training and eval mode, if it can be traced."""
    seen: list[tuple[nn.Module, Place | None]] = []
    for training in (True, False):
        tracer = _OneLevelTracer()
        try:
            module.train(training)
            graph = _quietly(tracer, module)
        except Exception:
            return []
        modules = dict(module.named_modules(remove_duplicate=False))
        nodes = [node for node in graph.nodes if node.op not in ("get_attr", "placeholder")]
        for node in nodes:
            if node.op == "call_module" and modules[node.target] in candidates:
                seen.append((modules[node.target], _place(node, nodes, modules, tracer.frames, candidates)))
    return seen


def _quietly(tracer: fx.Tracer, module: nn.Module) -> fx.Graph:
    """The graph of `module`, from a run of its code that leaves no warnings and draws no random numbers."""
    state = random.getstate()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            return tracer.trace(module)
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
        if not isinstance(other, fx.Node) or (
            # Of two that could wait, the first need not.
            _is_candidate(other, modules, candidates) and nodes.index(other) > nodes.index(node)
        ):
            return None
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
    if nodes.index(following) != nodes.index(node) + 1 and not _is_fresh(node.args[0], modules):
        return None
    return Place(_caller(frames[node]), follower)


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
    return node.op == "call_module" and modules[str(node.target)] in candidates


def _activation_of_node(
    node: fx.Node, modules: dict[str, nn.Module]
) -> tuple[_Activation | None, nn.Module | None]:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return _activation_of_module(module), module
    function = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    return _activation(function, tuple(node.args), dict(node.kwargs)), None


def _is_fresh(node: Any, modules: dict[str, nn.Module]) -> bool:
    """Whether nothing but its one user can change the output of `node` in place."""
    return (
        isinstance(node, fx.Node)
        and len(node.users) == 1
        and node.op == "call_module"
        and isinstance(modules[str(node.target)], (nn.modules.conv._ConvNd, nn.Linear))
    )
