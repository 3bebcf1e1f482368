"""Which calls of functions and modules are activations that the layers know, and which are adds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

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
# torch.nn's modules: the name of those that are always the same function, None where arguments decide.
_MODULES: dict[type[nn.Module], str | None] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardtanh: None, nn.LeakyReLU: None, nn.ELU: None, nn.GELU: None,
    nn.SiLU: "silu", nn.Mish: "mish", nn.Hardswish: "hardswish", nn.Hardsigmoid: "hardsigmoid",
    nn.Softplus: None, nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
}  # fmt: skip
ADDS = {Tensor.add, Tensor.add_, torch.add}
_IN_PLACE = {function for function in _CALLS if function.__name__.endswith("_")}


class Activation(NamedTuple):
    """An activation by its name in the layers' vocabulary, and whether the call overwrites its input."""

    name: str
    in_place: bool


def activation_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
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
    return None if given else Activation(name, in_place)


class _Asking(Tensor):
    """An input that answers with the activation that is called with it."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return activation_of(function, args, kwargs or {})


NOTHING = torch.empty(0, device="cpu", dtype=torch.float32)
_asking = Tensor._make_subclass(_Asking, NOTHING)


def activation_of_module(module: nn.Module) -> Activation | None:
    """The activation that a module is, if it is one that the layers know: torch.nn's or anybody's."""
    if type(module) in _MODULES:
        return torchs_activation(module)
    if is_compiling() or "forward" in module.__dict__ or not _may_be_activation(module):
        return None
    return _ask_a_copy(module)


def torchs_activation(module: nn.Module) -> Activation | None:
    """The activation that a module is, if it is one of torch.nn's own that the layers know."""
    if type(module) not in _MODULES or "forward" in module.__dict__:
        return None
    name = _MODULES[type(module)]
    if name is not None:
        return Activation(name, bool(getattr(module, "inplace", False)))
    return None if is_compiling() else module.forward(_asking)  # a compiler sees what is called


def _may_be_activation(module: nn.Module) -> bool:
    holds = module._parameters or module._buffers or module._modules
    return not holds and not isinstance(module, (*_MODULES, torch.jit.ScriptModule))


def _ask_a_copy(module: nn.Module) -> Activation | None:
    """What the forward of somebody's module calls, if that is all it does; it may write into its module."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    try:
        answer = twin.forward(_asking)
    except Exception:  # it does more than to call a function
        return None
    return answer if isinstance(answer, Activation) else None
