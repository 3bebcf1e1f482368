"""A few steps of training: what moves in the forward and the backward pass, and what grows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.doctor.data.layers import Layer
from batchnorm.doctor.data.outputs import first_tensor
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.held import graph_nodes, held_tensors
from batchnorm.model.batch_norms import batches_counted
from batchnorm.model.packing import sent


@sent
@dataclass
class Steps:
    """What was seen in training steps; the lists have an entry per step.

    Attributes:
        moved_in_backward: tensors of layers that the backward pass changed, by layer: the largest change of a
            running mean, in standard deviations.
        moves: by layer, how often its counter went up in a step's forward.
        nodes: by module, autograd nodes that its tensors keep alive after the step.
        bytes: by module, what its tensors hold after the step.
        tried, steps: how many were begun, and came to their end.
        failure: of a step.
    """

    moved_in_backward: dict[str, float] = field(default_factory=dict)
    moves: dict[str, list[int]] = field(default_factory=dict)
    nodes: dict[str, list[int]] = field(default_factory=dict)
    bytes: dict[str, list[int]] = field(default_factory=dict)
    tried: int = 0
    steps: int = 0
    failure: Finding | None = None


def step(
    seen: Steps,
    network: nn.Module,
    layers: dict[str, Layer],
    forward: Callable[[], Any],
    loss: Callable[[Any], Tensor | None],
) -> None:
    """One step of training without the optimizer's; adds to `seen`."""
    counted = {name: _batches(layer) for name, layer in layers.items()}
    with torch.enable_grad():
        output = forward()
        for name, layer in layers.items():
            seen.moves.setdefault(name, []).append(_batches(layer) - counted[name])
        before = {name: layer.statistics for name, layer in layers.items()}
        value = loss(output)
        if value is not None and value.requires_grad:
            value.backward()
        for name, layer in layers.items():
            change = moved(before[name], layer.statistics)
            if change > 0:
                seen.moved_in_backward[name] = max(change, seen.moved_in_backward.get(name, 0.0))
    for name, module in network.named_modules():
        tensors = [tensor for _, tensor in held_tensors(module)]
        seen.nodes.setdefault(name, []).append(graph_nodes(tensors))
        seen.bytes.setdefault(name, []).append(_bytes(tensors))
    for parameter in network.parameters():
        parameter.grad = None
    seen.steps += 1


def default_loss(output: Any) -> Tensor | None:
    """A scalar whose backward pass runs through the whole model."""
    tensor = first_tensor(output)
    return None if tensor is None else tensor.float().square().mean()


def stand_in(network: nn.Module) -> None:
    """Put new Parameters with the same memory in the place of the model's, until it is put back.

    A backward pass then runs none of the hooks on its own: DDP's reduction, for which other processes would
    have to wait, or an optimizer's step.
    """
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter not in stand_ins:
                stand_ins[parameter] = nn.Parameter(parameter.detach(), parameter.requires_grad)
                stand_ins[parameter].__dict__.update(parameter.__dict__)
            module._parameters[name] = stand_ins[parameter]
            if isinstance(module, nn.RNNBase):
                setattr(module, name, stand_ins[parameter])  # it keeps a list of them too


def _bytes(tensors: Iterable[Tensor]) -> int:
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _batches(layer: Layer) -> int:
    return batches_counted(layer.module) or 0


def moved(before: tuple[Tensor, Tensor] | None, after: tuple[Tensor, Tensor] | None) -> float:
    """The largest change of a mean, in standard deviations, or of a variance, in variances."""
    if before is None or after is None:
        return 0.0
    means = ((after[0] - before[0]) / before[1].clamp_min(1e-12).sqrt()).abs().max()
    variances = ((after[1] - before[1]) / before[1].clamp_min(1e-12)).abs().max()
    return float(torch.maximum(means, variances).nan_to_num(0))


def grows(values: list[int]) -> bool:
    """Whether a number that is taken after each step rises with every one."""
    return len(values) > 2 and all(after > before for before, after in itertools.pairwise(values))
