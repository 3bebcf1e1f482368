"""parameter_groups: what weight decay shrinks and what it leaves alone, told by the type of the module."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.model.batch_norms import check_model

_NORMS = tuple(getattr(nn, name) for name in ("LayerNorm", "GroupNorm", "RMSNorm") if hasattr(nn, name))


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_bias: bool = False
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what weight decay shrinks, and what it leaves alone.

    Left alone are `weight` and `bias` of batch norms and of torch.nn's other normalisation layers, told by
    the type of the module, and the biases of all layers (He et al. 2019, Bag of Tricks, section 3.1). A scale
    that is decayed is no regularizer: the layer after it makes up for it.

        optimizer = torch.optim.SGD(bn.parameter_groups(model, 1e-4), lr=0.1, momentum=0.9)

    Args:
        model: its parameters, each once, in the order of `model.parameters()`; one that a normalisation layer
            shares with another layer is left alone. Those with requires_grad=False are there too, as in
            `model.parameters()`: an optimizer passes over them until they are unfrozen.
        weight_decay: of the first group, 0 or more; the second has 0.
        decay_bias: let the biases of all but normalisation layers decay: the parameters whose own name has
            "bias" in it, as torch.nn's have.

    Returns:
        `[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]`

    Raises:
        TypeError: not an nn.Module, or a weight_decay that is no number.
        ValueError: a negative or infinite weight_decay, or a model without parameters.
    """
    check_model(model, "parameter_groups")
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, int | float):
        raise TypeError(f"parameter_groups: expected a number as weight_decay, got {weight_decay!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"parameter_groups: weight_decay={weight_decay} must be 0 or more, and finite")
    # Recursive: the weight of a parametrized layer belongs to a child of it.
    of_norms = {
        parameter
        for module in model.modules()
        if isinstance(module, (_NormBase, *_NORMS))
        for parameter in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    left_alone: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        bias = "bias" in name.rpartition(".")[2]
        (left_alone if parameter in of_norms or (bias and not decay_bias) else decayed).append(parameter)
    if not (decayed or left_alone):
        raise ValueError(f"parameter_groups: {type(model).__name__} has no parameters")
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": left_alone, "weight_decay": 0.0},
    ]
