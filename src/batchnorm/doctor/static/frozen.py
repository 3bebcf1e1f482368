"""Layers that are frozen in part: by their mode, by requires_grad, one without the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import nn

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.subject import Subject
from batchnorm.model.freeze import affine_is_frozen, is_frozen


@check(
    "BN111",
    "training mode in an eval model",
    severity="error",
    why="Predictions depend on what else is in the batch, and every one of them moves the running "
    "statistics.",
    fix="model.eval(), after whatever calls train() on the layer; report.fix('BN111') puts the layer into"
    " eval mode.",
    needs_data=False,
)
def training_in_eval(check: Check, subject: Subject) -> Iterator[Finding]:
    """An error for each layer in training mode in a model that is in eval mode, hand-written layers too."""
    if subject.model.training:
        return
    for name, layer in _layers(subject):
        if layer.training and layer is not subject.model:
            yield check.finding(
                name,
                "it is in training mode, in a model that is in eval mode",
                training=True,
                model_training=False,
            )


@check(
    "BN112",
    "frozen in part",
    severity="warning",
    why="A layer with fixed weights whose statistics move still drifts away; one in eval mode whose "
    "weights learn starts to move its statistics with the next model.train().",
    fix="bn.freeze(model) or bn.freeze(layer, affine=True) after the layers are chosen: it survives "
    "train(). report.fix('BN112') freezes the statistics of layers whose weights are fixed.",
    needs_data=False,
)
def in_part(check: Check, subject: Subject) -> Iterator[Finding]:
    """In a model in training mode: layers in eval mode, with fixed weights, or with some fixed weights.

    Not layers that `bn.freeze` has frozen. Weights are fixed where none of the layer's requires a gradient.

    - In eval mode: a warning; a note where its weights are fixed, it has none, or all are in eval mode.
    - Weights fixed (but not by `bn.freeze(affine=True)`) and statistics moving (tracked, momentum not 0): a
      warning; a note where no parameter of the model requires a gradient.
    - In training mode, with some of its weights fixed: a note.
    """
    if not subject.model.training:
        return
    layers = [(name, layer) for name, layer in _layers(subject) if not is_frozen(layer)]
    in_eval = [name for name, layer in layers if not layer.training]
    learning = any(p.requires_grad for p in subject.model.parameters())
    for name, layer in layers:
        own = list(layer.parameters(recurse=False))
        learns = any(p.requires_grad for p in own)
        fixed = bool(own) and not learns
        half = learns and not all(p.requires_grad for p in own)
        if not layer.training:
            what = "it is in eval mode, in a model that trains"
            if not fixed:
                what += ": its weights still learn, and" if learns else ":"
                what += " the next model.train() lets its statistics move"
            yield check.finding(
                name,
                what,
                severity="warning" if learns and len(in_eval) < len(layers) else "note",
                training=False,
                requires_grad=learns,
                layers_in_eval=len(in_eval),
            )
        elif fixed and _moves(layer) and not affine_is_frozen(layer):
            yield check.finding(
                name,
                "its weights are fixed (requires_grad=False), and its running statistics move",
                severity="warning" if learning else "note",
                training=True,
                requires_grad=False,
            )
        elif half:
            fixed_names = [n for n, p in layer.named_parameters(recurse=False) if not p.requires_grad]
            yield check.finding(
                name,
                f"only its {fixed_names[0]} is fixed",
                severity="note",
                training=True,
                requires_grad=True,
            )


def _layers(subject: Subject) -> Iterator[tuple[str, nn.Module]]:
    by_hand = ((name, subject.model.get_submodule(name)) for name in subject.handwritten)
    return chain(subject.batch_norms.items(), by_hand)


def _moves(layer: nn.Module) -> bool:
    return bool(getattr(layer, "track_running_stats", True)) and getattr(layer, "momentum", None) != 0
