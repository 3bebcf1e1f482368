"""What batch norm classes of others apply after normalising: `register`, and what is known of timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import layers
from batchnorm.kernels import reference
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.model.fusion.calls import torchs_activation
from batchnorm.model.fusion.waiting import _Fusing
from batchnorm.model.hooks import has_hooks
from batchnorm.model.probe import random_input, same_random_numbers, twin_of
from batchnorm.names import describe, quoted

Mapping = Callable[[Any], Any]
Step = Callable[[Tensor], Tensor]

_registered: dict[type[nn.Module], Mapping] = {}
# By the names of module and class, so that nothing is imported.
_KNOWN: dict[tuple[str, str], Mapping] = {
    ("timm.layers.norm_act", "BatchNormAct2d"): lambda layer: (layer.drop, layer.act),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): lambda layer: (layer.drop, layer.act),
    ("timm.layers.norm_act", "SyncBatchNormAct"): lambda layer: (
        getattr(layer, "drop", None),
        getattr(layer, "act", None),
    ),
}
_TORCHS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, layers._BatchNorm.forward, _Fusing.forward)
_TOLERANCE = 1e-9


class Following(NamedTuple):
    """What a layer applies after normalising: an activation of ours first, if there is one, then steps."""

    activation: str | None
    steps: tuple[Step, ...]


NOTHING = Following(None, ())


def register(cls: type[nn.Module], *, activation: Callable[[Any], Any] | None = None) -> type[nn.Module]:
    """Say what a batch norm class of your own applies to the normalised values, for `convert` and `fold`.

    Its forward must be `steps(batch_norm(x))`, where batch norm is as torch.nn's in its class and its
    parameters and buffers have torch.nn's names:

        class BatchNormAct(torch.nn.BatchNorm2d):
            def forward(self, x):
                return self.act(super().forward(x))

        bn.register(BatchNormAct, activation=lambda layer: layer.act)

    Subclasses that keep the forward need no line of their own. timm's norm-act layers are known already.
    What is registered is tried on an example when a layer is first used; registering again replaces it.

    Args:
        cls: a subclass of torch.nn's batch norms, or of nn.Module for frozen ones (see `fold`).
        activation: called with a layer, returns what it applies after normalising: a module, a function, the
            name of an activation, None for nothing, or a sequence of these in order. None: always nothing.

    Returns:
        cls

    Raises:
        TypeError: `cls` is not a class of modules, or `activation` cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register: expected a class of batch norm layers, got {cls!r}")
    if activation is not None and not callable(activation):
        raise TypeError(
            f"register: expected a function of a layer, such as lambda layer: layer.act, got {activation!r}"
        )
    _registered[cls] = activation or (lambda layer: None)
    _found.clear()
    return cls


def is_torchs(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class is that of torch.nn's batch norms or ours, inherited or its own."""
    return cls.forward in _TORCHS


def is_registered(cls: type[nn.Module]) -> bool:
    """Whether it is known what the forward of a class applies after normalising."""
    return _mapping(cls) is not None


def is_known(cls: type[nn.Module]) -> bool:
    """Whether a class computes batch norm, and then what it is registered to apply or nothing."""
    return is_torchs(cls) or is_registered(cls) or hasattr(cls, "class_before_convert")


def following(layer: nn.Module, name: str = "") -> Following:
    """What a layer of a registered class applies after normalising, as it is now; `NOTHING` for others.

    Raises:
        TypeError: what is registered does not give functions; the message names the layer.
    """
    steps = applied(layer, name)
    activation = _name_of(steps[0]) if steps else None
    rest = steps if activation is None else steps[1:]
    return Following(activation, tuple(ACTIVATIONS[step] if isinstance(step, str) else step for step in rest))


def applied(layer: nn.Module, name: str = "") -> list[Any]:
    """The modules, functions and names of activations that a layer applies after normalising, in order."""
    mapping = _mapping(_theirs(type(layer)))
    if mapping is None:
        return []
    try:
        found = mapping(layer)
    except Exception as error:  # the user's code may raise anything; a property must not raise AttributeError
        raise TypeError(f"{_function_of(layer, name)} failed: {type(error).__name__}: {error}") from error
    steps = found if isinstance(found, (tuple, list)) else (found,)
    for step in steps:
        if not (step is None or callable(step) or step in ACTIVATIONS):
            raise TypeError(
                f"{_function_of(layer, name)} gave {step!r}: expected modules, functions, None or one of "
                f"{', '.join(ACTIVATIONS)}"
            )
    return [step for step in steps if not _is_nothing(step)]


def _function_of(layer: nn.Module, name: str) -> str:
    called = quoted(layer, name) if name else describe(layer)
    return f"{called}: the function registered for {_owner(type(layer)).__name__}"


def check_mapping(layer: nn.Module, name: str) -> None:
    """Raise a ValueError unless the layer computes what its class is registered to compute, on an example.

    In float64, in training and in eval mode: the outputs, and what the running statistics become.
    """
    applied(layer, name)  # whose errors name the layer
    for training in (False, True):
        theirs = twin_of(layer).double().train(training)
        x = random_input(theirs, theirs.num_features)
        with torch.no_grad(), same_random_numbers():
            wanted, mean, var = _by_definition(twin_of(layer).double().train(training), x)
        try:
            with torch.no_grad(), same_random_numbers():
                got = theirs(x)
        except Exception as error:
            raise ValueError(
                f"{quoted(layer, name)}: the class {_owner(type(layer)).__name__} is registered, and a layer "
                f"of it does not run on an input of shape {tuple(x.shape)}: {type(error).__name__}: {error}"
            ) from error
        pairs = [("outputs", wanted, got), ("running_mean", mean, theirs.running_mean)]
        pairs.append(("running_var", var, theirs.running_var))
        for what, ours, other in pairs:
            if (difference := _difference(ours, other)) > _TOLERANCE:
                mode = "training" if training else "eval"
                raise ValueError(
                    f"{quoted(layer, name)}: what is registered for {_owner(type(layer)).__name__} computes "
                    f"something else than the layer: in {mode} mode the {what} differ by {difference:.3g}. "
                    "bn.register(cls, activation=...) must name all that the layer applies after batch norm"
                )


def _by_definition(layer: Any, x: Tensor) -> tuple[Any, Tensor | None, Tensor | None]:
    """Outputs and running statistics, by the reference and what is registered."""
    mean, var, options = layer.running_mean, layer.running_var, {"eps": layer.eps, "channel_dim": 1}
    moves = layer.training and layer.track_running_stats
    if layer.training or mean is None:
        y, moments = reference.training(x, layer.weight, layer.bias, **options)
        if moves and mean is not None:
            counter = layer.num_batches_tracked
            factor = layers.running.averaging_factor(layer.momentum, counter, x.dtype)
            mean, var, _ = layers.running.moved(mean, var, moments, factor=factor)
    else:
        y = reference.inference(x, mean, var, layer.weight, layer.bias, **options)
    activation, steps = following(layer)
    y = reference.finish(y, activation, None)
    for step in steps:
        y = step(y)
    return y, mean, var


def _difference(wanted: Any, got: Any) -> float:
    if wanted is None or got is None:
        return 0.0 if wanted is got else torch.inf
    if not isinstance(got, Tensor) or got.shape != wanted.shape:
        return torch.inf
    return float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-30)) if wanted.numel() else 0.0


def _theirs(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that was converted to `cls`, else `cls`."""
    found: type[nn.Module] = getattr(cls, "class_before_convert", cls)
    return found


def _owner(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that defines the forward of `cls`."""
    return next(base for base in _theirs(cls).__mro__ if "forward" in vars(base))


def _mapping(cls: type[nn.Module]) -> Mapping | None:
    if cls not in _found:
        _found[cls] = _find(cls)
    return _found[cls]


_found: dict[type[nn.Module], Mapping | None] = {}


def _find(cls: type[nn.Module]) -> Mapping | None:
    for base in cls.__mro__:
        known = _registered.get(base) or _KNOWN.get((base.__module__, base.__qualname__))
        if known is not None:
            return known
        if "forward" in vars(base):
            return None  # what is registered for a class behind it is not what this forward does
    return None


def _is_nothing(step: Any) -> bool:
    return step is None or (type(step) is nn.Identity and not has_hooks(step))


def _name_of(step: Any) -> str | None:
    if isinstance(step, str):
        return step
    if not isinstance(step, nn.Module) or has_hooks(step):
        return None
    known = torchs_activation(step)
    return None if known is None else known.name
