"""reset: running statistics as those of a new model."""

from __future__ import annotations

from torch import nn

from batchnorm.model.batch_norms import batch_norms, check_initialized, has_statistics
from batchnorm.model.freeze import is_frozen


def reset(model: nn.Module) -> nn.Module:
    """Set the running statistics of every batch norm to mean 0, variance 1 and counter 0, as when new.

    `weight` and `bias` stay. Left alone: layers without running statistics, and frozen ones (`bn.freeze`).

    Args:
        model: its buffers are written in place.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module.
        ValueError: no batch norm with running statistics that are not frozen, or a lazy layer without its
            first input.
    """
    found = batch_norms(model, "reset")
    check_initialized(model, "reset")
    layers = [layer for layer in found.values() if has_statistics(layer) and not is_frozen(layer)]
    if not layers:
        raise ValueError(
            "reset: every batch norm of the model is frozen or has no running statistics: there is nothing "
            "to reset"
        )
    for layer in layers:
        layer.reset_running_stats()
    return model
