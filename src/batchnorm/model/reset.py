"""reset: running statistics as those of a new model."""

from __future__ import annotations

from batchnorm.model.batch_norms import Filter, Model, batch_norms, check_initialized, has_statistics
from batchnorm.model.freeze import is_frozen


def reset(model: Model, *, filter: Filter | None = None) -> Model:
    """Set the running statistics of every batch norm to mean 0, variance 1 and counter 0, as when new.

    `weight` and `bias` stay. Left alone: layers without running statistics, and frozen ones (`bn.freeze`).

    Args:
        model: its buffers are written in place.
        filter: called as `filter(name, layer)` with each batch norm and its qualified name: which are meant.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module, or `filter` is no function.
        ValueError: no batch norm with running statistics that are not frozen, or none that `filter` names; or
            a lazy layer without its first input.
    """
    found = batch_norms(model, "reset", filter)
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
