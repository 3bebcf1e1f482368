"""Batch norm called as a function (F.batch_norm) with buffers of a module: seen while the model runs."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

# The functions, and their parameters in order.
PARAMETERS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: (
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"
    ),
}  # fmt: skip
DEFAULTS: dict[str, Any] = {"training": False, "eps": 1e-5}
_BETWEEN = " and "


def argument(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """What a call of batch norm as a function is given as `name`."""
    position = PARAMETERS[function].index(name)
    return args[position] if position < len(args) else kwargs.get(name, DEFAULTS.get(name))


class FunctionNorm:
    """A batch norm that is called as a function: the running statistics that it is given.

    Has what verbs ask of a layer: `running_mean`, `running_var`, `num_features`, and the like.

    Args:
        owner: the module whose buffers these are.
        name: their qualified names, as in "block.mean and block.var".
    """

    num_batches_tracked = None
    correction = 1
    channel_dim = 1

    def __init__(self, owner: nn.Module, name: str, running_mean: Tensor, running_var: Tensor) -> None:
        self.owner, self.name = owner, name
        self.running_mean, self.running_var = running_mean, running_var
        self.num_features = running_mean.numel()

    @classmethod
    def named(cls, model: nn.Module, name: str) -> FunctionNorm:
        """The one with these buffers of `model`."""
        mean, var = name.split(_BETWEEN)
        owner = model.get_submodule(mean.rpartition(".")[0])
        return cls(owner, name, model.get_buffer(mean), model.get_buffer(var))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionNorm) and all(map(operator.is_, self.buffers(), other.buffers()))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.buffers())))

    def buffers(self) -> list[Tensor]:
        """The running statistics."""
        return [self.running_mean, self.running_var]


class FunctionCalls(TorchFunctionMode):
    """Inside, `on_call(norm, x)` is called before each batch norm that is called as a function.

    Those with buffers of `model` as running statistics, which no batch norm layer has.
    """

    def __init__(self, model: nn.Module, on_call: Callable[[FunctionNorm, Tensor], None]) -> None:
        super().__init__()
        self._on_call = on_call
        self._names = {id(buffer): (name, owner) for name, owner, buffer in statistics_of_functions(model)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PARAMETERS:
            given = {
                name: argument(func, args, kwargs or {}, name)
                for name in ("input", "running_mean", "running_var")
            }
            norm = self._norm(given["running_mean"], given["running_var"])
            if norm is not None and isinstance(given["input"], Tensor):
                self._on_call(norm, given["input"])
        return func(*args, **(kwargs or {}))

    def _norm(self, mean: Any, var: Any) -> FunctionNorm | None:
        if id(mean) not in self._names or id(var) not in self._names:
            return None
        (mean_name, owner), (var_name, _) = self._names[id(mean)], self._names[id(var)]
        return FunctionNorm(owner, f"{mean_name}{_BETWEEN}{var_name}", mean, var)


def statistics_of_functions(model: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """The buffers that may be running statistics of functions: two or more of one size in a module.

    With their qualified names and their modules; those of batch norm layers are none.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm | torch.jit.ScriptModule):
            continue
        own = {
            key: buffer
            for key, buffer in module._buffers.items()
            if buffer is not None and buffer.ndim == 1 and buffer.is_floating_point()
        }
        sizes = Counter(map(len, own.values()))
        found += [
            (f"{name}.{key}" if name else key, module, buffer)
            for key, buffer in own.items()
            if sizes[len(buffer)] > 1
        ]
    return found
