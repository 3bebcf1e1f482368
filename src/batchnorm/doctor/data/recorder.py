"""Hooks on a model: what its layers are given and give in one pass, and where a forward stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchnorm.doctor.data.layers import Layer
from batchnorm.doctor.data.noise import BatchStatistics, take
from batchnorm.doctor.data.outputs import Score, first_tensor
from batchnorm.doctor.data.padding import Padding, find_padding
from batchnorm.model.function_calls import FunctionCalls, FunctionNorm
from batchnorm.model.packing import sent

_RECTIFIERS = {
    getattr(owner, name)
    for owner in (torch, torch.nn.functional, Tensor)
    for name in ("relu", "relu_", "relu6")
    if hasattr(owner, name)
}


@sent
@dataclass
class Pass:
    """What was seen while every batch went through the model once.

    Attributes:
        statistics: of each layer's inputs, one entry per call.
        normalized: what each call made of them: the mean of each image (N, C), and the std (C,).
        batch_of: the number of the batch of each call, among those of all ranks.
        outputs: per batch, (N, elements).
        scores: per batch.
    """

    statistics: dict[str, list[BatchStatistics]] = field(default_factory=dict)
    normalized: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    batch_of: dict[str, list[int]] = field(default_factory=dict)
    outputs: list[Tensor | None] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


@sent
@dataclass(frozen=True)
class NotFinite:
    """The first tensor with inf or NaN: in which pass and batch, whose it is, and of which kind."""

    by_batch: bool
    batch: int
    layer: str | None
    kind: str
    share: float


class PassRecorder:
    """Hooks that fill a `Pass`; with `by_batch` each layer is made to normalise by its batch.

    A layer in eval mode normalises by its running statistics, so those of the batch are written there;
    whoever records puts them back.
    """

    def __init__(self, network: nn.Module, layers: dict[str, Layer], *, by_batch: bool) -> None:
        self.network, self.layers, self.by_batch = network, layers, by_batch
        self.seen = Pass()
        self.batch = 0
        self.inside: list[str] = []
        self.not_finite: NotFinite | None = None
        self.in_training_mode: set[str] = set()
        self.largest: dict[str, Tensor] = {}
        self.rectified: set[str] = set()
        self.padding: dict[str, Padding] = {}
        self._outputs: dict[int, tuple[str, Any]] = {}
        # Layers that call batch norm as a function, and those of which the module's own input was taken.
        self._functions: set[str] = set()
        self._of_module: set[str] = set()
        self._by_statistics = {
            tuple(map(id, layer.running)): layer for layer in layers.values() if layer.running is not None
        }
        self._finite: Any = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the hooks are there."""
        handles = []
        for name, module in self.network.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            if name in self.layers:
                before, after = self._before(self.layers[name]), self._after(self.layers[name])
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
            handles.append(module.register_forward_hook(self._leaving(name)))
        try:
            with _Rectifiers(self), FunctionCalls(self.network, self._function):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def stack(self) -> Iterator[None]:
        """Inside, only `inside` is kept: the modules whose forward is running."""
        handles = []
        for name, module in self.network.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            handles.append(module.register_forward_hook(self._leaving(name)))
        self.not_finite = NotFinite(self.by_batch, 0, None, "", 0.0)  # nothing is looked at
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, batch: int) -> None:
        """The next forward is of this batch."""
        self.batch = batch
        self.inside.clear()
        self._outputs.clear()

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inside.append(name)
            if name == "" and self.not_finite is None:
                self._look(None, args)

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while self.inside and self.inside.pop() != name:
                pass
            if self.not_finite is None:
                self._look(name, output)

        return hook

    def _look(self, name: str | None, value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is None or tensor is self._finite:
            return
        self._finite = tensor
        if not bool(torch.isfinite(tensor.detach().sum())):
            bad = ~torch.isfinite(tensor.detach())
            if bool(bad.any()):  # the sum of finite values may overflow
                kind = "NaN" if bool(torch.isnan(tensor.detach()).any()) else "inf"
                share = float(bad.float().mean())
                self.not_finite = NotFinite(self.by_batch, self.batch, name, kind, share)

    def _before(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                self.in_training_mode.add(layer.name)
            with _whatever_it_holds(layer):
                if layer.name not in self._functions and self._take_input(layer, args, kwargs):
                    self._of_module.add(layer.name)

        return hook

    def _function(self, norm: FunctionNorm, x: Tensor) -> None:
        """Batch norm is called as a function: what it is given counts, not what its module is given."""
        layer = self._by_statistics.get(tuple(map(id, norm.buffers())))
        if layer is None or layer.name not in self.inside:
            return
        self._functions.add(layer.name)
        if layer.name in self._of_module:
            for of_calls in (self.seen.statistics, self.seen.normalized, self.seen.batch_of):
                of_calls[layer.name].pop()
            self._of_module.discard(layer.name)
        with _whatever_it_holds(layer):
            self._take_input(layer, (x,), {})

    def _take_input(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Add what a layer is given to all that is `seen` of it, or to nothing; whether it was added."""
        given = layer.input(args, kwargs)
        if given is None:
            return False
        x, mask = given
        statistics = take(x, mask)
        finite = bool(torch.isfinite(statistics.mean).all() and torch.isfinite(statistics.var).all())
        if not finite:
            return False
        if self.by_batch and not layer.frozen and layer.running is not None and statistics.values > 1:
            layer.write(statistics.mean, statistics.var)
        if self.by_batch and self.batch < 2 and mask is None and layer.name not in self.padding:
            shape = (args[0] if args else next(iter(kwargs.values()))).shape
            found = find_padding(x, shape, getattr(layer.module, "channel_dim", 1), self.batch)
            if found is not None:
                self.padding[layer.name] = found
        used = layer.statistics or (statistics.mean, statistics.var)
        normalized = statistics.normalized(*used, layer.eps)
        seen = self.seen
        seen.statistics.setdefault(layer.name, []).append(statistics)
        seen.normalized.setdefault(layer.name, []).append(normalized)
        seen.batch_of.setdefault(layer.name, []).append(self.batch)
        return True

    def _after(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if layer.name in self._functions:
                return
            if isinstance(output, Tensor) and output.ndim >= 2 and output.numel() and self.by_batch:
                with _whatever_it_holds(layer):
                    self._take_output(layer, output)

        return hook

    def _take_output(self, layer: Layer, output: Tensor) -> None:
        self._outputs[id(output)] = layer.name, output
        channel_dim = getattr(layer.module, "channel_dim", 1)
        channel_dim = channel_dim if isinstance(channel_dim, int) else 1
        largest = output.detach().movedim(channel_dim, 0).flatten(1).amax(1).float().cpu()
        before = self.largest.get(layer.name)
        self.largest[layer.name] = largest if before is None else torch.maximum(before, largest)
        if getattr(layer.module, "activation", None) in ("relu", "relu6"):
            self.rectified.add(layer.name)

    def activated(self, x: Any) -> None:
        """A rectifier is called on `x`."""
        name, output = self._outputs.get(id(x), ("", None))
        if output is x and output is not None:
            self.rectified.add(name)


def _whatever_it_holds(layer: Layer) -> AbstractContextManager[None]:
    """Inside, an error of looking at a hand-made layer is let go: the model itself has not failed."""
    return suppress(Exception) if layer.handmade else nullcontext()


class _Rectifiers(TorchFunctionMode):
    """Sees the ReLUs that are called, as modules or as functions."""

    def __init__(self, recorder: PassRecorder) -> None:
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RECTIFIERS and args:
            self.recorder.activated(args[0])
        return func(*args, **(kwargs or {}))
