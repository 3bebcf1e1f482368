"""Carrying out a plan on a copy of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from batchnorm.model.folding.arithmetic import MultiplyAdd
from batchnorm.model.folding.functional import rewrite
from batchnorm.model.folding.norms import replacement
from batchnorm.model.folding.plan import Plan, Replaced
from batchnorm.model.folding.weights import Weights
from batchnorm.names import quoted


def carry_out(plan: Plan, model: nn.Module, arguments: Mapping[str, dict[str, Any]]) -> nn.Module:
    """Carry `plan` out on `model`, in place; returns what takes its place where that is another module.

    Args:
        arguments: constant arguments of the modules that call batch norm as a function, by name.
    """
    weights: dict[str, Weights] = {}
    for step in plan.steps:
        if step.into not in weights:
            weights[step.into] = Weights(model.get_submodule(step.into))
        put = weights[step.into].put_after if step.comes_after else weights[step.into].put_before
        put(step.affine)
    for name, folded in weights.items():
        if not folded.write():
            raise ValueError(
                f"fold: the folded weights of {quoted(model.get_submodule(name), name)} are too large for "
                "their dtype: fold the model in float32 and convert the copy"
            )
    layers = [(replaced, model.get_submodule(replaced.layer)) for replaced in plan.replaced]
    for replaced, layer in layers:
        if replaced.index is None:
            new = replacement(layer, replaced.affine, replaced.channel_dim, replaced.with_residual)
            model = _put(model, layer, new)
    functions: dict[nn.Module, list[Replaced]] = {}
    for replaced, owner in layers:
        if replaced.index is not None:
            functions.setdefault(owner, []).append(replaced)
    # From the inside out: an outer module is rewritten with the inner ones that are in it by then.
    for owner, calls in sorted(functions.items(), key=lambda item: -item[1][0].layer.count(".")):
        modules = {call.index: _of_function(call, owner) for call in calls if call.index is not None}
        model = _put(model, owner, rewrite(owner, arguments[calls[0].layer], modules))
    return model


def _of_function(call: Replaced, owner: nn.Module) -> nn.Module | None:
    if call.affine is None:
        return None
    tensors = (*owner.parameters(), *owner.buffers())
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return MultiplyAdd(call.affine, dtype, call.channel_dim).eval()


def _put(model: nn.Module, layer: nn.Module, new: nn.Module) -> nn.Module:
    """Let `new` be everywhere in `model` where `layer` is; returns the model."""
    if layer is model:
        return new
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is layer:
                parent._modules[key] = new
    return model
