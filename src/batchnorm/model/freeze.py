"""freeze and unfreeze: batch norms that stay as they are while the rest of the model trains."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.model.batch_norms import (
    Filter,
    Model,
    batch_norms,
    check_initialized,
    check_model,
    has_statistics,
)

_WHEN_FROZEN = "_requires_grad_when_frozen"


def freeze(
    model: Model, *, filter: Filter | None = None, statistics: bool = True, affine: bool = False
) -> Model:
    """Let the batch norms of `model` stay as they are while the rest of it trains.

    For fine-tuning with few samples, or with batches too small for statistics. Statistics that are frozen are
    not reset either, as torch.optim.swa_utils.update_bn would. Freezing again adds to what
    is frozen; one `unfreeze` undoes it all. Copies and pickles of the model stay frozen; its state_dict is
    that of the unfrozen model, with no sign of it: freeze a model again after loading one.

    Args:
        model: changed in place; torch.nn's layers and ours, of any rank.
        filter: called as `filter(name, layer)` with each batch norm and its qualified name: which are meant.
        statistics: normalise by the running statistics and do not move them, also after `model.train()`:
            the layers stay in eval mode. Layers without running statistics are left alone.
        affine: set requires_grad=False on `weight` and `bias`. `model.requires_grad_(True)` makes them
            trainable again. Do it before wrapping in DistributedDataParallel, which expects a gradient of
            whatever had requires_grad then. As ever in torch, an optimizer goes on to apply a gradient
            that is there already: `zero_grad()` first.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module, or `filter` is no function.
        ValueError: nothing to freeze: both are False, or the model has no batch norm, or only ones without
            running statistics or without weight and bias, or that are frozen for good, or `filter` names
            none; or a lazy layer has not seen its first input yet.
    """
    if not (statistics or affine):
        raise ValueError("freeze: statistics=False and affine=False freeze nothing; set one of them to True")
    layers = batch_norms(model, "freeze", filter).values()
    check_initialized(model, "freeze")
    with_statistics = [layer for layer in layers if statistics and has_statistics(layer)]
    with_affine = [layer for layer in layers if affine and _own_parameters(layer)]
    if not (with_statistics or with_affine):
        lacking = " or ".join(["running statistics"] * statistics + ["weight and bias"] * affine)
        raise ValueError(f"freeze: the batch norms of {type(model).__name__} have no {lacking} to freeze")
    for layer in with_statistics:
        if not is_frozen(layer):
            layer.__dict__["train"] = _StaysInEval(layer)
            layer.__dict__["reset_running_stats"] = _keep_running_stats
            layer.training = False
    for layer in with_affine:
        if _WHEN_FROZEN not in layer.__dict__:
            layer.__dict__[_WHEN_FROZEN] = {
                name: parameter.requires_grad for name, parameter in _own_parameters(layer).items()
            }
        for parameter in _own_parameters(layer).values():
            parameter.requires_grad_(False)
    return model


def unfreeze(model: Model, *, filter: Filter | None = None) -> Model:
    """Undo `freeze`: layers move their statistics and learn as they would had they never been frozen.

    The layers are in the mode that `train()` and `eval()` last asked for, `weight` and `bias` have the
    requires_grad that they had when they were frozen; momentum, counter, hooks and Parameter objects were
    never touched. A model with nothing frozen is left as it is.

    Args:
        model: changed in place; may be a part of what was frozen.
        filter: called as `filter(name, layer)` with each batch norm and its qualified name: which are meant.

    Returns:
        model

    Raises:
        TypeError: not an nn.Module, or `filter` is no function.
        ValueError: `filter` names no batch norm.
    """
    check_model(model, "unfreeze")
    meant = model.modules() if filter is None else batch_norms(model, "unfreeze", filter).values()
    for layer in meant:
        stays = layer.__dict__.get("train")
        if isinstance(stays, _StaysInEval):
            del layer.__dict__["train"]
            layer.__dict__.pop("reset_running_stats", None)
            layer.training = stays.asked_for
        requires_grad = layer.__dict__.pop(_WHEN_FROZEN, {})
        for name, parameter in _own_parameters(layer).items():
            if name in requires_grad:
                parameter.requires_grad_(requires_grad[name])
    return model


def _own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Of the layer itself, not of layers inside it; a parametrized one's are in its parametrizations."""
    own = dict(layer.named_parameters(recurse=False))
    if is_parametrized(layer):
        own |= dict(layer.parametrizations.named_parameters("parametrizations"))  # type: ignore[union-attr]
    return own


def is_frozen(layer: nn.Module) -> bool:
    """Whether the layer's running statistics are frozen."""
    return isinstance(layer.__dict__.get("train"), _StaysInEval)


def affine_is_frozen(layer: nn.Module) -> bool:
    """Whether the layer's weight and bias are frozen."""
    return _WHEN_FROZEN in layer.__dict__


def _keep_running_stats() -> None:
    """Stands in for the `reset_running_stats` of a frozen layer, which swa_utils.update_bn calls on all."""


class _StaysInEval:
    """Stands in for the `train` method of one layer, so that the flag stays False whoever calls it.

    An attribute of the instance, since the layer must keep its class: to torch.fx, to torch's fusers and to
    `convert` a subclass is another layer. Not a function or a method, since those cannot be pickled here.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.asked_for = layer.training

    def __call__(self, mode: bool = True) -> _BatchNorm:
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        self.asked_for = mode
        return self.layer
