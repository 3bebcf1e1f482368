"""What a model gives for a batch: its first floating point tensor, labels, accuracy, loss, entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.doctor.contents import labels
from batchnorm.model.nested import tensors_in
from batchnorm.model.packing import sent

# Of an output, enough to compare by: a segmentation of large images would not fit many times.
_ELEMENTS = 2**20


@sent
@dataclass(frozen=True)
class Score:
    """How good the outputs of a batch are; None where it cannot be told."""

    accuracy: float | None
    loss: float | None
    entropy: float | None


def first_tensor(output: Any) -> Tensor | None:
    """The first floating point tensor with a dimension in an output of any structure."""
    return next((t for t in tensors_in(output) if t.is_floating_point() and t.ndim > 0), None)


def kept(output: Any) -> Tensor | None:
    """What is kept of an output to compare by: (N, elements), float32, on the CPU."""
    tensor = first_tensor(output)
    if tensor is None or tensor.shape[0] == 0:
        return None
    rows = tensor.detach().flatten(1) if tensor.ndim > 1 else tensor.detach()[:, None]
    return rows[:, : max(1, _ELEMENTS // rows.shape[0])].float().cpu().clone()


def score(output: Any, batch: Any, loss: Any) -> Score:
    """Accuracy against the labels, the loss, and the entropy of the softmax over (N, classes)."""
    logits, y = first_tensor(output), labels(batch)
    of_classes = logits is not None and logits.ndim == 2 and logits.shape[1] > 1
    accuracy = entropy = value = None
    if of_classes:
        assert logits is not None
        logs = torch.log_softmax(logits.detach().float(), 1).cpu()
        entropy = float(-(logs.exp() * logs).sum(1).mean())
        if y is not None and len(y) == len(logs) and int(y.max()) < logs.shape[1]:
            accuracy = float((logs.argmax(1) == y).double().mean())
    if loss is not None:
        result = loss(output, batch)
        value = float(result.detach().mean()) if isinstance(result, Tensor) else float(result)
    return Score(accuracy, value, entropy)
