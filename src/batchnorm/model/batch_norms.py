"""Which modules of a model are batch norms, and what they are called in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.model.frozen import frozen_batch_norms
from batchnorm.names import quoted

_SHOWN = 5

# Which batch norms a verb is meant for, by qualified name and layer.
Filter = Callable[[str, nn.Module], bool]
Model = TypeVar("Model", bound=nn.Module)


def batch_norms(model: nn.Module, verb: str, filter: Filter | None = None) -> dict[str, _BatchNorm]:
    """The batch norms of `model`, torch.nn's, ours and subclasses, by qualified name, shared ones once.

    Args:
        filter: those only for which it is true.

    Raises:
        TypeError: `model` is no nn.Module, or `filter` is no function.
        ValueError: there is none; the message starts with `verb`.
    """
    check_model(model, verb)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    if not layers:
        frozen = frozen_batch_norms(model)
        if frozen:
            raise ValueError(
                f"{verb}: the {len(frozen)} batch norms of {type(model).__name__} are frozen for good, as "
                f"{quoted(*next((m, name) for name, m in frozen.items()))}: they normalise by constants, and "
                f"there is nothing to {verb}"
            )
        raise ValueError(
            f"{verb}: no batch norm in {type(model).__name__}: expected a model with torch.nn's or this "
            "package's batch norm layers"
        )
    return layers if filter is None else _meant(layers, filter, verb)


def _meant(layers: dict[str, _BatchNorm], filter: Filter, verb: str) -> dict[str, _BatchNorm]:
    check_filter(filter, verb)
    meant = {name: layer for name, layer in layers.items() if filter(name, layer)}
    if not meant:
        names = ", ".join(quoted(layer, name) for name, layer in itertools.islice(layers.items(), _SHOWN))
        more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
        raise ValueError(f"{verb}: filter is true for none of the {len(layers)} batch norms: {names}{more}")
    return meant


def check_filter(filter: Any, verb: str) -> None:
    """Raise TypeError unless `filter` is None or a function."""
    if not (filter is None or callable(filter)):
        raise TypeError(f"{verb}: expected filter to be a function of a name and a layer, got {filter!r}")


def check_model(model: Any, verb: str) -> None:
    """Raise TypeError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: expected a model (torch.nn.Module), got {type(model).__name__}")


def check_initialized(model: nn.Module, verb: str) -> None:
    """Raise ValueError when a lazy module of `model` has not seen its first input yet."""
    for name, module in model.named_modules():
        if not is_initialized(module):
            raise ValueError(
                f"{verb}: {quoted(module, name)} has not seen its first input yet: run one batch through the "
                "model first"
            )


def is_initialized(module: nn.Module) -> bool:
    """Whether all that the module itself has is there (it is no lazy one before its first input)."""
    tensors = *module._parameters.values(), *module._buffers.values()
    return not any(tensor is not None and is_lazy(tensor) for tensor in tensors)


def has_statistics(layer: _BatchNorm) -> bool:
    """Whether the layer has running statistics (it is not track_running_stats=False)."""
    return layer.running_mean is not None and layer.running_var is not None


def batches_counted(module: nn.Module) -> int | None:
    """How many batches are in the running statistics by the layer's counter; None where it is no number."""
    counter = getattr(module, "num_batches_tracked", None)
    return int(counter) if is_number(counter) else None


def is_number(value: Any) -> TypeGuard[float | Tensor]:
    """Whether it is one number, or a tensor of one."""
    return isinstance(value, float | int) or (isinstance(value, Tensor) and value.numel() == 1)
