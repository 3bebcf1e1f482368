"""Where a batch norm stands: after a bias, after dropout, before the logits, after pooling to one value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from batchnorm.doctor.check import Check, check
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.structure import Call
from batchnorm.doctor.subject import Subject
from batchnorm.model.freeze import is_frozen
from batchnorm.model.fusion.calls import activation_of_module

_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPOUT_FUNCTIONS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}
_RESHAPING_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity)
_SWAPPING_FUNCTIONS = {torch.transpose, torch.permute, torch.movedim}
_SWAPPING_METHODS = {"transpose", "permute", "movedim", "contiguous"}
_RESHAPING_FUNCTIONS = {torch.flatten, torch.squeeze, torch.unsqueeze} | _SWAPPING_FUNCTIONS
_RESHAPING_METHODS = {"view", "reshape", "flatten", "squeeze", "unsqueeze"} | _SWAPPING_METHODS
_SOFTMAX_MODULES = (nn.Softmax, nn.LogSoftmax)
_SOFTMAX_FUNCTIONS = {F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, "softmax", "log_softmax"}


@check(
    "BN101",
    "bias before batch norm",
    severity="note",
    why="Batch norm subtracts the batch's mean, and with it the bias: it costs memory and a reduction in "
    "the backward pass, gets a gradient of rounding errors, and learns nothing.",
    fix="Build the layer with bias=False; in a trained model, report.fix('BN101') (absorb_bias) moves the"
    " bias into the running mean.",
    needs_data=False,
)
def bias(check: Check, subject: Subject) -> Iterator[Finding]:
    """A note for a linear or convolution layer with a bias whose output goes into a batch norm alone.

    Perhaps through transposes and permutations. The bias has a value per channel of the batch norm, and one
    that is not 0. Not before a layer that `bn.freeze` has frozen, which does not subtract it again.
    """
    for call in _batch_norm_calls(subject):
        before = _only_input(call)
        while before is not None and len(before.users) == 1 and _swaps_dimensions(before):
            before = _only_input(before)
        if before is None or before.layer is None or len(before.users) != 1:
            continue
        if call.module is None or is_frozen(call.module):
            continue  # a frozen layer does not subtract it again
        bias = getattr(before.module, "bias", None)
        if not _is_linear(before) or not isinstance(bias, Tensor):
            continue
        # Over a sequence the channels of a batch norm may be time steps, each with all of the bias.
        if bias.numel() == _channels(subject, call) and bool((bias != 0).any()):
            yield check.finding(
                before.layer,
                f"its bias of {bias.numel()} values does nothing: {call.layer} subtracts it again",
                batch_norm=call.layer,
                values=bias.numel(),
                largest=float(bias.detach().abs().max()),
            )


@check(
    "BN103",
    "dropout before batch norm",
    severity="warning",
    why="Dropout scales up what it keeps in training and not in eval mode, so the variance that batch "
    "norm learned is larger than the one it meets: variance shift (Li et al. 2019, section 3).",
    fix="Put the dropout after the last batch norm, or after this batch norm and its activation.",
    needs_data=False,
)
def dropout(check: Check, subject: Subject) -> Iterator[Finding]:
    """A warning for a batch norm whose input comes from dropout, perhaps through reshapes and activations.

    Modules, and functional calls that a trace in training mode does not see switched off; with p > 0. It
    makes a variance v of values with mean m `(v + p * m**2) / (1 - p)` in training. Not alpha dropout, which
    keeps mean 0 and variance 1 (Klambauer et al. 2017, "New Dropout Technique").
    """
    for call in _batch_norm_calls(subject):
        before = _only_input(call)
        while before is not None and _keeps_dropout(before):
            before = _only_input(before)
        p = None if before is None else _dropped(before)
        if p:
            yield check.finding(
                call.layer,
                f"its inputs come from dropout with p={p:g}, whose output has in training at least "
                f"{1 / (1 - p):.2f} times the variance of eval mode"
                if p < 1
                else "its inputs come from dropout with p=1",
                p=p,
                dropout=before.layer if before is not None else None,
            )


@check(
    "BN104",
    "batch norm on the logits",
    severity="note",
    why="Normalised logits have the same spread for every class and batch, so the model cannot be "
    "confident where it should be, and a prediction depends on the batch in training.",
    fix="Remove the batch norm after the last layer of a classifier. Outputs that are embeddings may keep"
    " it.",
    needs_data=False,
)
def logits(check: Check, subject: Subject) -> Iterator[Finding]:
    """A batch norm right after an `nn.Linear`, with the model's output, perhaps through reshapes and softmax.

    A warning where softmax or log_softmax is among them, else a note.
    """
    for call in _batch_norm_calls(subject):
        before, last = _only_input(call), call
        probabilities = False
        while (
            not last.is_output
            and len(last.users) == 1
            and (_is_softmax(last.users[0]) or _reshapes(last.users[0]))
        ):
            last = last.users[0]
            probabilities = probabilities or _is_softmax(last)
        if last.is_output and before is not None and isinstance(before.module, nn.Linear):
            what = (
                "it normalises the logits, the model's last values before softmax"
                if probabilities
                else ("it normalises the model's output, after its last linear layer")
            )
            yield check.finding(
                call.layer,
                what,
                severity="warning" if probabilities else "note",
                after=before.layer,
                softmax_follows=probabilities,
            )


@check(
    "BN105",
    "batch norm after pooling to one value",
    severity="note",
    why="After pooling to 1x1 there is one value per sample and channel: with a batch of one there is "
    "nothing to normalise by, and with a few samples the statistics are mostly noise.",
    fix="Train with larger batches (drop_last=True for the last one), synchronise the layer, or take the "
    "batch norm away after the pooling.",
    needs_data=False,
)
def pooling(check: Check, subject: Subject) -> Iterator[Finding]:
    """A batch norm behind pooling to 1x1, perhaps through reshapes, activations and 1x1 convolutions.

    A note; an error where the smallest batch of training data has one sample. Not of a layer that normalises
    by its running statistics in training too.
    """
    smallest = min((batch.samples for batch in subject.contents if batch.samples), default=None)
    for call in _batch_norm_calls(subject):
        if _stays_in_eval(subject, call):
            continue
        before = _only_input(call)
        while before is not None and (_reshapes(before) or _is_activation(before) or _is_pointwise(before)):
            before = _only_input(before)
        if before is not None and _pools_to_one(before):
            alone = smallest == 1 and subject.trains
            yield check.finding(
                call.layer,
                "a batch of one sample gives it one value per channel, and there is one in the data"
                if alone
                else "it has one value per sample and channel, after pooling to 1x1",
                severity="error" if alone else "note",
                pooling=before.layer,
                smallest_batch=smallest,
            )


def _batch_norm_calls(subject: Subject) -> Iterator[Call]:
    """The first call of every batch norm, the hand-written ones too."""
    seen = set()
    for call in subject.calls:
        if call.layer in seen or (
            call.layer not in subject.batch_norms and call.layer not in subject.handwritten
        ):
            continue
        seen.add(call.layer)
        yield call


def _stays_in_eval(subject: Subject, call: Call) -> bool:
    module = subject.model.get_submodule(call.layer or "")
    return is_frozen(module) or (subject.model.training and not module.training)


def _only_input(call: Call) -> Call | None:
    return call.inputs[0] if len(call.inputs) == 1 else None


def _channels(subject: Subject, call: Call) -> int:
    name = call.layer or ""
    layer = subject.batch_norms.get(name)
    return subject.handwritten[name].channels if layer is None else layer.num_features


def _swaps_dimensions(call: Call) -> bool:
    return call.function in _SWAPPING_FUNCTIONS or call.function in _SWAPPING_METHODS


def _is_linear(call: Call) -> bool:
    return isinstance(call.module, (nn.Linear, _ConvNd))


def _is_pointwise(call: Call) -> bool:
    module = call.module
    return isinstance(module, _ConvNd) and all(size == 1 for size in module.kernel_size)


def _reshapes(call: Call) -> bool:
    if call.module is not None:
        return isinstance(call.module, _RESHAPING_MODULES)
    return call.function in _RESHAPING_FUNCTIONS or call.function in _RESHAPING_METHODS


def _is_activation(call: Call) -> bool:
    if call.module is not None:
        return activation_of_module(call.module) is not None
    return call.function in (F.relu, torch.relu, "relu", F.silu, F.gelu, F.leaky_relu)


def _keeps_dropout(call: Call) -> bool:
    """Whether what dropout did to the variance comes through: not through layers that mix channels."""
    return _reshapes(call) or _is_activation(call)


def _dropped(call: Call) -> float | None:
    """The p of a dropout that is on in training, else None."""
    if isinstance(call.module, _DROPOUT_MODULES):
        return float(call.module.p)
    if call.function not in _DROPOUT_FUNCTIONS:
        return None
    p = _argument(call, 1, "p", 0.5)
    on = _argument(call, 2, "train" if call.function is torch.dropout else "training", True)
    return float(p) if isinstance(p, (int, float)) and on is not False else None


def _argument(call: Call, position: int, name: str, default: Any) -> Any:
    return call.args[position] if len(call.args) > position else call.kwargs.get(name, default)


def _is_softmax(call: Call) -> bool:
    return isinstance(call.module, _SOFTMAX_MODULES) or call.function in _SOFTMAX_FUNCTIONS


def _pools_to_one(call: Call) -> bool:
    size = getattr(call.module, "output_size", None)
    if call.function in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
        size = _argument(call, 1, "output_size", None)
    elif call.function in ("mean", "amax", torch.mean, torch.amax):
        dims = _argument(call, 1, "dim", None)
        return isinstance(dims, (tuple, list)) and sorted(dim % 4 for dim in dims) == [2, 3]
    if size is None or not (call.function is not None or "Adaptive" in type(call.module).__name__):
        return False
    return all(side == 1 for side in (size if isinstance(size, (tuple, list)) else (size,)))
