"""hold: forward passes that leave the running statistics where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.batch_norms import Filter, Model, batch_norms, is_initialized
from batchnorm.names import quoted


@contextmanager
def hold(model: Model, *, filter: Filter | None = None) -> Iterator[Model]:
    """Inside, training forwards of `model` normalise by the batch and move no running statistics.

    For the second forward of SAM, a discriminator's look at generated images, a probe. Holds torch.nn's
    layers and ours; nests; the layers are as before when it ends, also by an exception. Eval mode is not
    affected.

    Args:
        model: the layers are changed in place.
        filter: called as `filter(name, layer)` with each batch norm and its qualified name: which are meant.

    Yields:
        model

    Raises:
        TypeError: `filter` is no function.
        ValueError: a lazy layer has not seen its first input yet, or `filter` names no batch norm.
    """
    tracking = []
    for name, layer in _meant(model, filter):
        if layer.track_running_stats and not is_initialized(layer):
            raise ValueError(
                f"{quoted(layer, name)} has no running statistics to hold yet: run one batch through the "
                "model first"
            )
        tracking.append((layer, layer.track_running_stats))
    try:
        for layer, _ in tracking:
            # torch's own switch: in training it stops the average, in eval mode it is not looked at.
            layer.track_running_stats = False
        yield model
    finally:
        for layer, was_tracking in tracking:
            layer.track_running_stats = was_tracking


def _meant(model: nn.Module, filter: Filter | None) -> list[tuple[str, _BatchNorm]]:
    """The batch norms to hold; without a filter a model may have none."""
    if filter is not None:
        return list(batch_norms(model, "hold", filter).items())
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
