"""convert and revert: torch.nn's batch norms become this package's, and again what they were.

A layer changes its `__class__`, in place: it stays the same object for its hooks, its names and whoever
else holds it. All that has to be remembered is the class it had, or the `sync` of a layer that was this
package's already, in an attribute of the layer itself, so a copy or a pickle of a converted model can be
reverted too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm import distributed
from batchnorm.kernels.choice import Choice
from batchnorm.layers import _OPTIONS, _BatchNorm
from batchnorm.model.batch_norms import Filter, Model, batch_norms, check_model, is_initialized
from batchnorm.model.classes import (
    SyncBatchNorm,
    class_of,
    class_of_ours,
    fusing_class,
    lost_forward,
    set_class,
    why_left,
)
from batchnorm.model.frozen import frozen_batch_norms
from batchnorm.model.fusion.find import Place, find
from batchnorm.model.memory_efficient import memory_efficient as build_outputs_again
from batchnorm.model.registry import NOTHING, check_mapping, following, is_registered, is_torchs
from batchnorm.names import quoted

# Attributes in `__dict__`: they are copied and pickled with their module.
_CLASS = "_class_before_convert"
_SYNC = "_sync_before_convert"
_MEMORY_EFFICIENT = "_memory_efficient_by_convert"
_FUSED_WITH = "_fused_with"
_FUSION = {"_callers", "_followers", "_through", "_wait_choice", _FUSED_WITH}


def convert(
    model: Model,
    *,
    filter: Filter | None = None,
    fuse: bool = True,
    memory_efficient: bool = False,
    subclasses: bool = False,
    sync: Any = False,
) -> Model:
    """Turn every torch.nn batch norm of `model` into this package's, which computes the same.

    BatchNorm1d, 2d, 3d, SyncBatchNorm, the lazy ones, their subclasses that keep torch.nn's forward, and
    registered ones (timm's norm-act layers, and yours: `bn.register`), at any depth. Modules, Parameters and
    buffers stay the same objects, with their dtype, device, training flags, hooks, names and state_dict: a
    layer changes its class, nothing else does. What a subclass has beside its forward stays; what a
    registered one applies after batch norm is the layer's own activation where the layers know it, and else
    runs after it. With `fuse`, a batch norm followed by nothing but an activation that the
    layers know, or by an add and such an activation, is computed together with them; the model's code is not
    changed, and runs as before (see `batchnorm.model.fusion`). A second call adds what it asks for.
    `conversion_report(model)` says what was taken, fused with what, and left why.

    A SyncBatchNorm keeps its process group, and then works on CPUs too. With `sync`, all layers normalise by
    the batches of all processes together, those that were this package's before included. Left as they are,
    and named in a warning: subclasses with an unknown forward, and layers with a forward or an attribute of
    their own where this package's have one. Frozen batch norms, which are constants, are left too.

    Args:
        model: changed in place.
        filter: called as `filter(name, layer)` with each batch norm and its qualified name: which are meant.
        fuse: run batch norms together with the activations after them.
        memory_efficient: let the backward pass build outputs again, see `memory_efficient`.
        subclasses: convert subclasses with an unknown forward too, which they lose until they are reverted.
        sync: the layers' `sync`: True (the default process group) or a process group. False leaves every
            layer as it is: a SyncBatchNorm synchronised, others not.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module, `sync` is neither a boolean nor a process group, or `filter` is no
            function.
        ValueError: no batch norm in the model, or none that the filter names or that can be taken; a layer
            that does not compute what its class is registered for; or this process is not in the group. The
            model is as it was.
    """
    distributed.parse(sync)
    layers = batch_norms(model, "convert", filter)
    theirs = {name: m for name, m in layers.items() if not isinstance(m, _BatchNorm)}
    reasons = {name: why_left(m, subclasses) for name, m in theirs.items()}
    left = {name: reason for name, reason in reasons.items() if reason}
    taken = {name: m for name, m in theirs.items() if name not in left}
    if len(left) == len(layers):
        raise ValueError(f"convert: no batch norm can be taken: {_said(layers, left)}")
    _check_mappings(taken)
    # Those that are fused already too: which of two batch norms waits for their add depends on both.
    fusing: list[Any] = [
        m
        for m in taken.values()
        if fusing_class(_ours(m, subclasses)) is not None and following(m) == NOTHING
    ]
    fusing += [m for m in layers.values() if fusing_class(class_of(m)) is not None and m.activation is None]
    places = find(model, fusing) if fuse else {}
    if left:
        warnings.warn(f"convert: left as they are: {_said(layers, left)}", stacklevel=2)
    for layer in taken.values():
        _take(layer, _ours(layer, subclasses))
    if sync is not False:
        for layer in [m for name, m in layers.items() if name not in left]:
            layer.__dict__.setdefault(_SYNC, layer._sync)
            layer.sync = sync
    for fused, found in places.items():
        _fuse(fused, found)
    if memory_efficient:
        hooks = len(model._forward_pre_hooks)
        build_outputs_again(model)
        if len(model._forward_pre_hooks) > hooks:  # else the user had asked for it before
            model.__dict__[_MEMORY_EFFICIENT] = True
    return model


def revert(model: Model, *, filter: Filter | None = None) -> Model:
    """Give back what `convert` changed: every layer its class and `sync`, fusion and memory_efficient off.

    Works on a copy of a converted model and on a part of one; a model that was never converted stays as it
    is. A lazy layer that has started meanwhile becomes torch.nn's layer without "Lazy" in its name.
    Options set on a layer since then (`layer.ghost_batch_size = 16`) go, Parameters and buffers stay.

    Args:
        model: changed in place.
        filter: called as `filter(name, layer)`: which layers are meant; memory_efficient stays on then.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module, or `filter` is no function.
        ValueError: `filter` names no batch norm.
    """
    check_model(model, "revert")
    meant = None if filter is None else set(batch_norms(model, "revert", filter).values())
    for module in model.modules():
        if meant is not None and module not in meant:
            continue
        if _SYNC in module.__dict__:
            module.__dict__["_sync"] = module.__dict__.pop(_SYNC)
        if _CLASS in module.__dict__:
            _restore_class(module)
        if meant is None and module.__dict__.pop(_MEMORY_EFFICIENT, False):
            build_outputs_again(module, enabled=False)
    return model


@dataclass(frozen=True)
class Converted:
    """A layer of this package in a model, and what it runs together with.

    Args:
        layer: class and qualified name.
        fused_with: such as ("relu",) or ("add, relu",), one for each place; its own activation included.
        own: whether it was this package's before `convert`.
        lost: what its class does and the layer does not, by `convert(subclasses=True)`; mostly empty.
    """

    layer: str
    fused_with: tuple[str, ...]
    own: bool
    lost: str

    def __str__(self) -> str:
        lost = f", without {self.lost}" if self.lost else ""
        return self.layer + (f" with {' or '.join(self.fused_with)}" if self.fused_with else "") + lost


@dataclass(frozen=True)
class NotConverted:
    """A batch norm that is not this package's, and why."""

    layer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason}"


@dataclass(frozen=True)
class ConversionReport:
    """Which batch norms of a model are this package's, fused with what, and which are not and why."""

    taken: tuple[Converted, ...]
    left: tuple[NotConverted, ...]

    def __str__(self) -> str:
        fused = [layer for layer in self.taken if layer.fused_with]
        alone = [layer for layer in self.taken if not layer.fused_with]
        total = len(self.taken) + len(self.left)
        lines = [f"{len(self.taken)} of {total} batch norms are batchnorm's"]
        parts = {"with what follows": fused, "by themselves": alone, "left as they are": self.left}
        for title, entries in parts.items():
            if entries:
                lines.append(f"{title} ({len(entries)})")
                lines.extend(f"  {entry}" for entry in entries)
        return "\n".join(lines)


def conversion_report(model: nn.Module) -> ConversionReport:
    """What `convert` has made of the batch norms of a model, as it is now; `print` it.

    Args:
        model: looked at, not changed.

    Returns:
        the layers that are this package's, each with what it runs together with, and those that are not, each
        with the reason: frozen ones, and those that `convert` would leave, included.

    Raises:
        TypeError: not an nn.Module.
    """
    check_model(model, "conversion_report")
    taken, left = [], []
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            of_class = layer.activation
            fused_with = layer.__dict__.get(_FUSED_WITH, ()) or ((of_class,) if of_class else ())
            before = layer.__dict__.get(_CLASS)
            lost = "" if before is None else lost_forward(before)
            taken.append(Converted(quoted(layer, name), fused_with, before is None, lost))
        elif isinstance(layer, _TorchBatchNorm):
            left.append(NotConverted(quoted(layer, name), why_left(layer) or "convert has not taken it"))
    frozen = "it is frozen: it normalises by constants, and has nothing to convert"
    left += [NotConverted(quoted(m, name), frozen) for name, m in frozen_batch_norms(model).items()]
    return ConversionReport(tuple(taken), tuple(left))


def _ours(layer: nn.Module, any_forward: bool) -> type[nn.Module]:
    cls = class_of_ours(class_of(layer), any_forward)
    assert cls is not None  # by `why_left`
    return cls


def _check_mappings(taken: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError unless registered classes compute what they are registered for, each kind once."""
    seen = set()
    for name, layer in taken.items():
        cls = class_of(layer)
        if is_torchs(cls) or not is_registered(cls) or not is_initialized(layer) or _on_meta(layer):
            continue
        kind = cls, layer.extra_repr(), tuple(map(str, layer.children()))
        if kind not in seen:
            check_mapping(layer, name)
            seen.add(kind)


def _on_meta(layer: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


def _said(layers: Mapping[str, nn.Module], left: Mapping[str, str]) -> str:
    """Which layers are left, by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(quoted(layers[name], name))
    return "; ".join(f"{', '.join(of_reason)} ({reason})" for reason, of_reason in names.items())


def _take(layer: Any, cls: type[nn.Module]) -> None:
    _remember_class(layer)
    set_class(layer, cls)
    for option, default in _OPTIONS.items():
        setattr(layer, option, default)
    layer.__dict__["_choice"] = Choice()
    if issubclass(cls, SyncBatchNorm):
        layer.sync = True if layer.process_group is None else layer.process_group


def _fuse(layer: Any, places: list[Place]) -> None:
    _remember_class(layer)
    waiting = fusing_class(class_of(layer))
    assert waiting is not None  # it was among those that can
    set_class(layer, waiting)
    layer.__dict__["_wait_choice"] = Choice()
    layer.__dict__["_callers"] = tuple({place.caller: None for place in places})
    layer.__dict__["_through"] = tuple({module: None for place in places for module in place.through})
    layer.__dict__["_followers"] = tuple({module: None for place in places for module in place.followers})
    layer.__dict__[_FUSED_WITH] = tuple({place.what: None for place in places})


def _remember_class(module: nn.Module) -> None:
    module.__dict__.setdefault(_CLASS, class_of(module))


def _restore_class(module: nn.Module) -> None:
    cls = module.__dict__.pop(_CLASS)
    if issubclass(cls, LazyModuleMixin) and not isinstance(module, LazyModuleMixin):
        cls = cls.cls_to_become  # it has seen its first input since
    set_class(module, cls)
    added = set(_FUSION)
    if not issubclass(cls, _BatchNorm):
        added |= {*_OPTIONS, *(f"_{option}" for option in _OPTIONS), "_choice"}
    for name in added:
        module.__dict__.pop(name, None)
