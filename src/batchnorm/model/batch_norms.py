"""Which modules of a model are batch norms, and what they are called in it."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy


def batch_norms(model: nn.Module, verb: str) -> dict[str, _BatchNorm]:
    """The batch norms of `model`, torch.nn's, ours and subclasses, by qualified name, shared ones once.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: there is none; the message starts with `verb`.
    """
    check_model(model, verb)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    if not layers:
        raise ValueError(
            f"{verb}: no batch norm in {type(model).__name__}: expected a model with torch.nn's or this "
            "package's batch norm layers"
        )
    return layers


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


def quoted(module: nn.Module, name: str) -> str:
    """Class and qualified name, as in `BatchNorm2d 'features.1'`."""
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__
