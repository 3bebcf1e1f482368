"""The classes that layers of torch.nn, and of subclasses of them, have once they are converted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm
from torch.nn.utils.parametrize import is_parametrized

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
from batchnorm.model.fusion.waiting import FUSING, LAYER_FILES
from batchnorm.model.registry import Following, following, is_registered, is_torchs
from batchnorm.other_tools import as_leaf

LAYER_FILES.add(__file__)


class _AnyRank(_BatchNorm):
    _ranks, _expected = (2, 3, 4, 5), "2D to 5D (N, C, ...)"


class SyncBatchNorm(_AnyRank):
    """What torch.nn.SyncBatchNorm becomes: a layer with `sync`, for inputs of any rank."""


_OURS: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
    _TorchBatchNorm: _AnyRank,
}
# What a layer of ours has and torch.nn's lacks.
_TAKEN = {"forward", "_choice", *_OPTIONS, *(f"_{option}" for option in _OPTIONS)}


class _Converted(_BatchNorm):
    """What the class made for a subclass adds: the subclass itself, and its own check of inputs."""

    class_before_convert: type[nn.Module]
    _class_of_ours: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = object.__reduce_ex__(self, protocol)[2:]
        follows = isinstance(self, _Following)
        return _new, (self._class_of_ours, self.class_before_convert, follows), *state


class _ChecksItself(_BatchNorm):
    """A layer whose class has a check of inputs of its own, such as one that takes any rank."""

    _ranks: tuple[int, ...] = ()

    def _check_rank(self, x: Tensor) -> None:
        if isinstance(x, Tensor):
            self._check_input_dim(x)


class _Following(_Converted):
    """A layer whose class applies more after normalising: what is registered for it."""

    @property
    def _activation(self) -> str | None:
        return self._what_follows().activation

    @_activation.setter
    def _activation(self, name: str | None) -> None:
        if name is not None:
            raise ValueError(
                f"{type(self).__name__}: activation={name!r} cannot be set, as its class applies one itself: "
                "replace that in the layer"
            )

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What its class computes; a residual is added, and a mask counts, as in this package's layers."""
        if type(x) is not Tensor and (leaf := as_leaf(self, x, residual, mask)) is not None:
            return leaf
        activation, steps = self._what_follows()
        if activation is None and not steps:
            return super().forward(x, residual, mask)
        y: Tensor = self._run(x, residual, mask, activation)
        for step in steps:
            y = step(y)
        return y

    def _options_lost(self, library: str) -> dict[str, Any]:
        """What the class applies is known to its own library, and to no other."""
        options = super()._options_lost(library)
        activation, steps = self._what_follows()
        if library.partition(".")[0] == self.class_before_convert.__module__.partition(".")[0]:
            options.pop("activation", None)
        elif steps:
            options["activation"] = " and ".join([*filter(None, [activation]), *map(str, steps)])
        return options

    def _what_follows(self) -> Following:
        if not is_registered(self.class_before_convert):  # it was pickled where it was
            name = self.class_before_convert.__name__
            raise TypeError(
                f"{type(self).__name__}: {name} is not registered in this process, so that what it applies "
                f"after batch norm is not known: bn.register({name}, activation=...) first"
            )
        return following(self)


def class_of_ours(cls: type[nn.Module], any_forward: bool = False) -> type[nn.Module] | None:
    """The class for layers of torch.nn's class `cls` or a subclass, or None where it does something else.

    Args:
        any_forward: for subclasses with an unknown forward too, which is then lost.
    """
    if cls in _OURS:
        return _OURS[cls]
    if not issubclass(cls, _TorchBatchNorm) or (_why_not(cls) and not any_forward):
        return None
    return _converted(_OURS[_torchs_class(cls)], cls)


def why_left(layer: nn.Module, any_forward: bool = False) -> str:
    """Why `convert` leaves a batch norm as it is; empty where it does not."""
    cls = class_of(layer)
    if "forward" in layer.__dict__:
        return "its forward was set on the layer itself"
    for name in sorted(_names_of(layer) & _TAKEN):
        return f"it has an attribute {name!r}, which this package's layers have for something else"
    return "" if class_of_ours(cls, any_forward) is not None else _why_not(cls)


def fusing_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that waits for what follows, for a class of ours that does or does not yet."""
    if cls in FUSING.values():
        return cls
    if not issubclass(cls, _Converted):
        return FUSING.get(cls)
    ours = cls._class_of_ours
    fusing = ours if ours in FUSING.values() else FUSING.get(ours)
    return None if fusing is None else _converted(fusing, cls.class_before_convert)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, below the one that torch.nn.utils.parametrize has made of it."""
    cls = type(module)
    return cls.__bases__[0] if is_parametrized(module) else cls


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Let `module` be of class `cls`, parametrized if it was."""
    if is_parametrized(module):
        # It has a class of its own, with a property for each parametrized Parameter.
        own = {
            k: v for k, v in type(module).__dict__.items() if k not in ("__dict__", "__weakref__", "__doc__")
        }
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


def lost_forward(cls: type[nn.Module]) -> str:
    """What of a class is lost where its layers are converted though nobody knows its forward."""
    unknown = cls not in _OURS and not is_torchs(cls) and not is_registered(cls)
    return f"what {cls.__name__}'s own forward adds" if unknown else ""


def _converted(ours: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` with the forward of `ours`, and what `cls` is registered to apply after it."""
    return _made_once(ours, cls, follows=is_registered(cls) and not is_torchs(cls))


def _made_once(ours: type[nn.Module], cls: type[nn.Module], follows: bool) -> type[nn.Module]:
    if (ours, cls, follows) not in _made:
        _made[ours, cls, follows] = _make(ours, cls, follows)
    return _made[ours, cls, follows]


_made: dict[tuple[type[nn.Module], type[nn.Module], bool], type[nn.Module]] = {}


def _make(ours: type[nn.Module], cls: Any, follows: bool) -> type[nn.Module]:
    bases: list[type] = [_Following if follows else _Converted]
    if cls._check_input_dim is not _torchs_class(cls)._check_input_dim:
        bases.append(_ChecksItself)
    attributes = {
        "__module__": __name__,
        "__doc__": cls.__doc__,
        "class_before_convert": cls,
        "_class_of_ours": ours,
    }
    return type(f"Converted{cls.__name__}", (*bases, ours, cls), attributes)


def _new(ours: type[nn.Module], cls: type[nn.Module], follows: bool) -> nn.Module:
    """An empty layer, to be filled by copy or pickle."""
    return object.__new__(_made_once(ours, cls, follows))


def _torchs_class(cls: type[nn.Module]) -> Any:
    return next(base for base in cls.__mro__ if base in _OURS)


def _why_not(cls: type[nn.Module]) -> str:
    """Why layers of a subclass cannot be ours without losing what the class does."""
    if not (is_torchs(cls) or is_registered(cls)):
        return (
            f"{cls.__name__} has a forward of its own: if that is batch norm and then an activation, say so "
            f"with bn.register({cls.__name__}, activation=lambda layer: ...)"
        )
    if cls.__call__ is not nn.Module.__call__:
        return f"{cls.__name__} has a __call__ of its own"
    for base in _own_bases(cls):
        for name in sorted(vars(base).keys() & (_TAKEN - {"forward"})):
            return f"{base.__name__} has {name!r}, which this package's layers have for something else"
    return ""


def _own_bases(cls: type[nn.Module]) -> Iterator[type]:
    """The classes that are neither torch's nor this package's."""
    for base in cls.__mro__:
        if not issubclass(_TorchBatchNorm, base) and base not in _OURS:
            yield base


def _names_of(module: nn.Module) -> set[str]:
    return (
        module.__dict__.keys() | module._modules.keys() | module._parameters.keys() | module._buffers.keys()
    )
