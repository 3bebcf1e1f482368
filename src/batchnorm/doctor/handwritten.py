"""Hand-written batch norms, recognised by what they do: a copy of a module is run on small random inputs.

A batch norm gives the same output for inputs that are scaled and shifted per channel, a sample's output
depends on the rest of its batch, and tensors of one value per channel follow the batch's mean and variance.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.doctor.held import graph_nodes
from batchnorm.moments import Moments

_SAMPLES = 16
_STEPS = 5
# What a running average of float32 numbers may differ from the one it is taken for.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Kept:
    """A tensor of the module that follows the batch's statistics.

    Attributes:
        name: the attribute.
        statistic: `"mean"` or `"variance"`.
        momentum: the weight of the new batch.
        correction: 0 where the variance is the biased one, 1 for the unbiased one; None for a mean.
        keeps_graph: whether it is part of the autograd graph after a forward.
        is_buffer: whether it is a registered buffer, and so moves with the model.
        is_saved: whether it is in the module's state_dict.
    """

    name: str
    statistic: str
    momentum: float
    correction: int | None
    keeps_graph: bool
    is_buffer: bool
    is_saved: bool


@dataclass(frozen=True)
class Handwritten:
    """What a hand-written batch norm was seen to do.

    Attributes:
        channels: how many.
        kept: its running tensors.
        graph_nodes: autograd nodes that it holds on to after 1 and after 5 forwards.
        shift: what it adds to the normalised values (beta), per channel.
    """

    channels: int
    kept: tuple[Kept, ...]
    graph_nodes: tuple[int, int]
    shift: Tensor


def handwritten(model: nn.Module) -> dict[str, Handwritten]:
    """The hand-written batch norms of `model` by qualified name; the model is not run and not changed."""
    found = {}
    for name, module in model.named_modules():
        if _may_be(module):
            seen = _examine(module)
            if seen is not None:
                found[name] = seen
    return found


def _may_be(module: nn.Module) -> bool:
    """Whether it is no module of torch's, has no children, and has tensors with a value per channel."""
    return (
        not isinstance(module, (_BatchNorm, torch.jit.ScriptModule))
        and not type(module).__module__.startswith(("torch.nn.", "batchnorm.layers"))
        and not module._modules
        and _channels(module) is not None
    )


def _channels(module: nn.Module) -> int | None:
    """The number of values that most of its tensors have, if at least two do that are no Parameters."""
    sizes = Counter(t.numel() for t in _state(module).values() if t.is_floating_point() and t.numel() > 1)
    if not sizes or sizes.most_common(1)[0][1] < 2:
        return None
    return sizes.most_common(1)[0][0]


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Its tensors by name that are no Parameters: buffers and plain attributes."""
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    return attributes | {name: value for name, value in module._buffers.items() if value is not None}


def _examine(module: nn.Module) -> Handwritten | None:
    channels = _channels(module)
    assert channels is not None
    # A copy can be run in any way: what its class prints or counts elsewhere is all that is left of it.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for shape, channel_dim in _shapes(module, channels):
            try:
                if _normalises_over_the_batch(module, shape, channel_dim):
                    return _seen(module, channels, shape, channel_dim)
            except Exception:  # whatever a module does with an input that it was not made for
                continue
    return None


def _shapes(module: nn.Module, channels: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes of inputs to try, each with its channel dimension; first what its own tensors look like."""
    ranks = [tensor.ndim for tensor in _state(module).values() if tensor.numel() == channels]
    ranks += [p.ndim for p in module._parameters.values() if p is not None and p.numel() == channels]
    for rank in dict.fromkeys([*sorted(ranks, reverse=True), 2, 4, 3, 5]):
        if rank >= 2:
            yield (_SAMPLES, channels, *[3] * (rank - 2)), 1
    yield (_SAMPLES, 3, 3, channels), 3


def _twin(module: nn.Module) -> nn.Module:
    """A copy in training mode, without hooks and without the graph that its tensors may be part of."""
    memo: dict[int, Any] = {}
    for tensor in (*_state(module).values(), *module._parameters.values()):
        if tensor is not None:
            value = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    twin = copy.deepcopy(module, memo)
    for name, value in twin.__dict__.items():
        if "hooks" in name and isinstance(value, dict):
            value.clear()
    twin.training = True
    return twin


def _input(module: nn.Module, shape: tuple[int, ...], channel_dim: int) -> Tensor:
    """Normal numbers with a mean and a standard deviation of their own in every channel."""
    like = next(iter(_state(module).values()))
    x = torch.randn(shape) * _per_channel(torch.rand, shape, channel_dim).add(0.5)
    return (x + 3 * _per_channel(torch.randn, shape, channel_dim)).to(like)


def _per_channel(draw: Callable[..., Tensor], shape: tuple[int, ...], channel_dim: int) -> Tensor:
    return draw([size if dim == channel_dim else 1 for dim, size in enumerate(shape)])


def _normalises_over_the_batch(module: nn.Module, shape: tuple[int, ...], channel_dim: int) -> bool:
    x = _input(module, shape, channel_dim)
    y = _twin(module)(x)
    if not isinstance(y, Tensor) or y.shape != x.shape or not bool(torch.isfinite(y).all()):
        return False
    scale = _per_channel(torch.rand, shape, channel_dim).add(1).to(x)
    shift = _per_channel(torch.randn, shape, channel_dim).to(x)
    same = torch.allclose(_twin(module)(x * scale + shift), y, atol=1e-2, rtol=1e-2)
    mates = torch.cat([x[:1], 3 * x[1:]])
    depends_on_mates = not torch.allclose(_twin(module)(mates)[:1], y[:1], atol=1e-2, rtol=1e-2)
    varies = bool(y.detach().std() > 1e-2)
    return same and depends_on_mates and varies


def _seen(module: nn.Module, channels: int, shape: tuple[int, ...], channel_dim: int) -> Handwritten | None:
    twin = _twin(module)
    before = {name: tensor.detach().clone() for name, tensor in _state(twin).items()}
    x = _input(module, shape, channel_dim).requires_grad_()
    y = twin(x)
    moments = Moments.from_tensor(x.detach(), channel_dim=channel_dim)
    targets = [
        ("mean", None, moments.mean),
        ("variance", 0, moments.var(0)),
        ("variance", 1, moments.var(1)),
    ]
    kept = []
    for name, tensor in _state(twin).items():
        if tensor.numel() != channels or name not in before:
            continue
        for statistic, correction, target in targets:
            momentum = _momentum(before[name].flatten(), tensor.detach().flatten(), target)
            if momentum is not None:
                is_buffer = name in module._buffers
                saved = name in module.state_dict()
                kept.append(
                    Kept(name, statistic, momentum, correction, tensor.requires_grad, is_buffer, saved)
                )
                break
    if not kept:
        return None
    first = graph_nodes(_state(twin).values())
    for _ in range(_STEPS - 1):
        twin(_input(module, shape, channel_dim).requires_grad_())
    shift = y.detach().mean([dim for dim in range(y.ndim) if dim != channel_dim])
    return Handwritten(channels, tuple(kept), (first, graph_nodes(_state(twin).values())), shift)


def _momentum(before: Tensor, after: Tensor, target: Tensor) -> float | None:
    """The a for which `after = (1 - a) * before + a * target` in every channel, if there is one."""
    towards = (target - before).double()
    moved = (after - before).double()
    if not bool((towards.abs() > 0).any()) or not bool((moved.abs() > 0).any()):
        return None
    momentum = float((towards * moved).sum() / (towards * towards).sum())
    fits = torch.allclose(
        moved, momentum * towards, rtol=_TOLERANCE, atol=_TOLERANCE * float(moved.abs().max())
    )
    return momentum if fits and 0 < momentum <= 1 + _TOLERANCE else None
