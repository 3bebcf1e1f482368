"""convert and revert: torch.nn's batch norms become this package's, and again what they were.

A layer changes its `__class__`, in place: it stays the same object for its hooks, its names and whoever
else holds it. All that has to be remembered is the class it had, or the `sync` of a layer that was this
package's already, in an attribute of the layer itself, so a copy or a pickle of a converted model can be
reverted too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from batchnorm import distributed
from batchnorm.kernels.choice import Choice
from batchnorm.layers import (
    _OPTIONS,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    _BatchNorm,
)
from batchnorm.model.batch_norms import batch_norms, check_model
from batchnorm.model.fusion.find import find
from batchnorm.model.fusion.waiting import FUSING
from batchnorm.model.memory_efficient import memory_efficient as build_outputs_again


class SyncBatchNorm(_BatchNorm):
    """What torch.nn.SyncBatchNorm becomes: a layer with `sync`, for inputs of any rank."""

    _ranks, _expected = (2, 3, 4, 5), "2D to 5D (N, C, ...)"


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
# Attributes in `__dict__`: they are copied and pickled with their module.
_CLASS = "_class_before_convert"
_SYNC = "_sync_before_convert"
_MEMORY_EFFICIENT = "_memory_efficient_by_convert"


def convert(
    model: nn.Module,
    *,
    fuse: bool = True,
    memory_efficient: bool = False,
    subclasses: bool = False,
    sync: Any = False,
) -> nn.Module:
    """Turn every torch.nn batch norm of `model` into this package's, which computes the same.

    BatchNorm1d, 2d, 3d, SyncBatchNorm and the lazy ones, at any depth. Modules, Parameters and buffers stay
    the same objects, with their dtype, device, training flags, hooks, names and state_dict: a layer changes
    its class, nothing else does. With `fuse`, a batch norm followed by nothing but an activation that the
    layers know, or by an add and such an activation, is computed together with them; the model's code is not
    changed, and runs as before (see `batchnorm.model.fusion`). A second call adds what it asks for.

    A SyncBatchNorm keeps its process group, and then works on CPUs too. With `sync`, all layers normalise by
    the batches of all processes together, those that were this package's before included. Left as they are,
    and named in a warning: subclasses, unless asked for, and layers with a forward or an attribute of their
    own where this package's have one.

    Args:
        model: changed in place.
        fuse: run batch norms together with the activations after them.
        memory_efficient: let the backward pass build outputs again, see `memory_efficient`.
        subclasses: convert subclasses of torch.nn's layers too, which lose what their methods add to them
            until they are reverted.
        sync: the layers' `sync`: True (the default process group) or a process group. False leaves every
            layer as it is: a SyncBatchNorm synchronised, others not.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module, or `sync` is neither a boolean nor a process group.
        ValueError: no batch norm in the model, or this process is not in the group.
    """
    distributed.parse(sync)
    layers = batch_norms(model, "convert")
    theirs = {name: m for name, m in layers.items() if not isinstance(m, _BatchNorm)}
    left = {name: m for name, m in theirs.items() if not _can_be_ours(m, subclasses)}
    to_ours = [m for name, m in theirs.items() if name not in left]
    # Those that are fused already too: which of two batch norms waits for their add depends on both.
    fusing = [m for m in to_ours if _ours(_class(m), subclasses) in FUSING]
    fusing += [m for m in layers.values() if _fusing(_class(m)) is not None and m.activation is None]
    places = find(model, fusing) if fuse else {}
    _warn_of(left)
    for layer in to_ours:
        _remember_class(layer)
        cls = _ours(_class(layer), subclasses)
        assert cls is not None  # by `_can_be_ours`
        _set_class(layer, cls)
        for option, default in _OPTIONS.items():
            setattr(layer, option, default)
        layer.__dict__["_choice"] = Choice()
        if isinstance(layer, SyncBatchNorm):
            layer.sync = True if layer.process_group is None else layer.process_group
    if sync is not False:
        for layer in [m for name, m in layers.items() if name not in left]:
            layer.__dict__.setdefault(_SYNC, layer._sync)
            layer.sync = sync
    for fused, found in places.items():
        _remember_class(fused)
        waiting = _fusing(_class(fused))
        assert waiting is not None  # it was among those that can
        _set_class(fused, waiting)
        fused.__dict__["_wait_choice"] = Choice()
        fused.__dict__["_callers"] = tuple({place.caller: None for place in found})
        fused.__dict__["_followers"] = tuple({p.follower: None for p in found if p.follower is not None})
    if memory_efficient:
        hooks = len(model._forward_pre_hooks)
        build_outputs_again(model)
        if len(model._forward_pre_hooks) > hooks:  # else the user had asked for it before
            model.__dict__[_MEMORY_EFFICIENT] = True
    return model


def revert(model: nn.Module) -> nn.Module:
    """Give back what `convert` changed: every layer its class and `sync`, fusion and memory_efficient off.

    Works on a copy of a converted model and on a part of one; a model that was never converted stays as it
    is. A lazy layer that has started meanwhile becomes torch.nn's layer without "Lazy" in its name.
    Options set on a layer since then (`layer.ghost_batch_size = 16`) go, Parameters and buffers stay.

    Args:
        model: changed in place.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module.
    """
    check_model(model, "revert")
    for module in model.modules():
        if _SYNC in module.__dict__:
            module.__dict__["_sync"] = module.__dict__.pop(_SYNC)
        if _CLASS in module.__dict__:
            _restore_class(module)
        if module.__dict__.pop(_MEMORY_EFFICIENT, False):
            build_outputs_again(module, enabled=False)
    return model


def _ours(cls: type[nn.Module], subclasses: bool) -> type[nn.Module] | None:
    """The class of this package for a class of torch.nn, or for the one that it is a subclass of."""
    candidates = cls.__mro__ if subclasses else (cls,)
    return next((_OURS[base] for base in candidates if base in _OURS), None)


def _fusing(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that waits for what follows, for a class of this package that does or does not yet."""
    return cls if cls in FUSING.values() else FUSING.get(cls)


def _can_be_ours(module: nn.Module, subclasses: bool) -> bool:
    attributes = (
        module.__dict__.keys() | module._modules.keys() | module._parameters.keys() | module._buffers.keys()
    )
    taken = {"forward", *_OPTIONS, *(f"_{option}" for option in _OPTIONS), "_choice"}
    return _ours(_class(module), subclasses) is not None and not attributes & taken


def _warn_of(left: Mapping[str, nn.Module]) -> None:
    if left:
        names = ", ".join(f"{type(module).__name__} {name!r}" for name, module in left.items())
        warnings.warn(
            f"convert: left as they are: {names}. They are not exactly torch.nn's, so "
            "they may do something else",
            stacklevel=3,
        )


def _class(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, below the one that torch.nn.utils.parametrize has made of it."""
    cls = type(module)
    return cls.__bases__[0] if is_parametrized(module) else cls


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if is_parametrized(module):
        # It has a class of its own, with a property for each parametrized Parameter.
        own = {
            k: v for k, v in type(module).__dict__.items() if k not in ("__dict__", "__weakref__", "__doc__")
        }
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


def _remember_class(module: nn.Module) -> None:
    module.__dict__.setdefault(_CLASS, _class(module))


def _restore_class(module: nn.Module) -> None:
    cls = module.__dict__.pop(_CLASS)
    if issubclass(cls, LazyModuleMixin) and not isinstance(module, LazyModuleMixin):
        cls = cls.cls_to_become  # it has seen its first input since
    _set_class(module, cls)
    added = {"_callers", "_followers", "_wait_choice"}
    if not issubclass(cls, _BatchNorm):
        added |= {*_OPTIONS, *(f"_{option}" for option in _OPTIONS), "_choice"}
    for name in added:
        module.__dict__.pop(name, None)
