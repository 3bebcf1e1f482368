"""Layers that return the promise of their output, and run when it is known what follows."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.context import under_transform
from batchnorm.kernels import native, reference
from batchnorm.kernels.choice import Choice
from batchnorm.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    _BatchNorm,
)
from batchnorm.model.fusion.calls import ADDS, NOTHING, activation_of
from batchnorm.model.hooks import has_hooks, has_hooks_after
from batchnorm.names import describe

_any_global_hook = getattr(nn.modules.module, "_has_any_global_hook", lambda: False)


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
        layer = self.layer
        if self.ran:
            # Statistics move once. On a copy: another thread may be in the layer.
            layer = object.__new__(type(self.layer))
            layer.__dict__.update(self.layer.__dict__, track_running_stats=False)
        self.ran = True
        return layer._run(self.x, residual, None, activation)


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
            activation = activation_of(function, args, kwargs)
            if activation is not None:
                y = first._finish(activation.name)
                if y is not None:
                    if activation.in_place:
                        first._settle(y)
                    return y
        if function in ADDS and len(args) == 2 and not kwargs:
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
    waiting = Tensor._make_subclass(Waiting, NOTHING, forward.grad)
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
    _through: tuple[nn.Module, ...] = ()
    _followers: tuple[nn.Module, ...]
    _wait_choice: Choice

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """See the layer without fusion."""
        if (
            torch.compiler.is_compiling()
            or type(x) is not Tensor
            or residual is not None
            or mask is not None
            or self._sync is not False  # processes must communicate in the same order, whatever their shapes
            or not self._fuses(x)
            or not self._may_wait(sys._getframe(1))
        ):
            return super().forward(x, residual, mask)
        return _waiting(_Pass(self, x))

    def _fuses(self, x: Tensor) -> bool:
        """Whether `x`, once it is seen to fit, goes by a kernel that fuses: else waiting is time lost."""
        kernel, _ = self._choose(self._wait_choice, x, self._per_channel(), None, "relu", False)
        return kernel is not native and kernel is not reference

    def _may_wait(self, frame: FrameType | None) -> bool:
        if (
            self._activation is not None
            or has_hooks_after(self)
            or any(has_hooks(follower) for follower in self._followers)
            or _any_global_hook()
            or torch.jit.is_tracing()
            or under_transform()
        ):
            return False
        caller = _caller(self, frame, self._through)
        if caller is None:
            return False
        return caller_of(caller) in self._callers or qualified_caller_of(caller) in self._callers


# Where the frames between a layer and its caller stand.
LAYER_FILES = {nn.modules.module.__file__}


def _caller(module: nn.Module, frame: FrameType | None, through: tuple[nn.Module, ...]) -> FrameType | None:
    """The function that gets the output of `module`, past `Sequential`s that it is the last of.

    And past the forwards of the modules that return it.
    """
    while True:
        while frame is not None and frame.f_code.co_filename in LAYER_FILES:
            frame = frame.f_back
        if frame is None:
            return None
        if frame.f_code is nn.Sequential.forward.__code__:
            owner = frame.f_locals["self"]
            if _last(owner) is not module:
                return frame
        else:
            owner = frame.f_locals.get("self") if through else None
            if owner is None or not any(owner is one for one in through) or not _runs(owner, frame):
                return frame
        if has_hooks_after(owner):
            return None
        module, frame = owner, frame.f_back


def _runs(module: nn.Module, frame: FrameType) -> bool:
    """Whether a frame is that of the forward of a module."""
    return frame.f_code is getattr(type(module).forward, "__code__", None)


def is_sequential(module: nn.Module) -> bool:
    """Whether `module` calls its submodules one after the other and does nothing else."""
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def output_layer(module: nn.Module) -> nn.Module:
    """The module whose output is the output of `module`: the last of a `Sequential`, else itself."""
    while is_sequential(module) and (last := _last(module)) is not None:
        module = last
    return module


def _last(sequential: nn.Module) -> nn.Module | None:
    return next(reversed(sequential._modules.values()), None)


def caller_of(frame: FrameType) -> tuple[str, str]:
    """Where the code of a frame stands: the name of its module, and of the function in it."""
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name


def qualified_caller_of(frame: FrameType) -> tuple[str, str]:
    """The same with the name of the function's class, which Python 3.10 does not say."""
    code = frame.f_code
    return frame.f_globals.get("__name__", ""), getattr(code, "co_qualname", code.co_name)


class FusingBatchNorm1d(_Fusing, BatchNorm1d):  # noqa: D101
    __doc__ = f"{inspect.getdoc(BatchNorm1d)}"


class FusingBatchNorm2d(_Fusing, BatchNorm2d):  # noqa: D101
    __doc__ = f"{inspect.getdoc(BatchNorm2d)}"


class FusingBatchNorm3d(_Fusing, BatchNorm3d):  # noqa: D101
    __doc__ = f"{inspect.getdoc(BatchNorm3d)}"


class FusingLazyBatchNorm1d(_Fusing, LazyBatchNorm1d):  # noqa: D101
    __doc__ = f"{inspect.getdoc(LazyBatchNorm1d)}"
    cls_to_become = FusingBatchNorm1d


class FusingLazyBatchNorm2d(_Fusing, LazyBatchNorm2d):  # noqa: D101
    __doc__ = f"{inspect.getdoc(LazyBatchNorm2d)}"
    cls_to_become = FusingBatchNorm2d


class FusingLazyBatchNorm3d(_Fusing, LazyBatchNorm3d):  # noqa: D101
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
