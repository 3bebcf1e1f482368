"""absorb_bias: the bias before a batch norm, which does nothing there, moves into the running mean."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from batchnorm.model.batch_norms import Filter, Model, batch_norms, check_initialized, has_statistics
from batchnorm.model.calling import call, evaluating, unwrapped
from batchnorm.model.freeze import is_frozen
from batchnorm.model.registry import is_known

# By their own class: a subclass may do something else with its bias.
_BIASED = {
    nn.Linear: None,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}

_Pair = tuple[nn.Module, _BatchNorm]


def absorb_bias(
    model: Model,
    example: Any,
    *,
    filter: Filter | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Model:
    """Move the bias of a convolution or linear layer before a batch norm into its running mean.

    `running_mean -= bias; bias = 0`: a batch norm subtracts the bias again, so in training it does
    nothing, and in eval mode the output stays as it was. The bias is zeroed, not removed: the optimizer and
    the state_dict keep it.

    Only where the layer's output goes nowhere but into that batch norm, and both are used once: by a trace of
    the model (torch.fx), or where that fails between neighbours in an nn.Sequential; and as they are called
    on the example. Left alone: layers that are shared, hooked, parametrized or subclassed, and frozen batch
    norms, before which a bias does learn something.

    Args:
        model: changed in place; DistributedDataParallel and DataParallel are looked into.
        example: a batch that the model can take, as one of `recalibrate`'s loader.
        filter: called as `filter(name, layer)` with each batch norm and its qualified name: which are meant.
        forward: called as `forward(model, example)` instead of `model(example)`.

    Returns:
        model

    Raises:
        TypeError, RuntimeError: not an nn.Module, or it does not take the example.
        ValueError: no batch norm or none that `filter` names, a lazy layer without its first input, or an
            output for the example that is not the same afterwards (beyond rounding). The model is then as it
            was.
    """
    network = unwrapped(model) if isinstance(model, nn.Module) else model
    meant = set(batch_norms(network, "absorb_bias", filter).values())
    check_initialized(network, "absorb_bias")

    def run() -> list[Tensor]:
        output = call(network, example, forward, "absorb_bias", "the example")
        return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    with evaluating(network):
        pairs = [pair for pair in _neighbours(network) if pair[1] in meant and _may_absorb(network, *pair)]
        called = _Called(pairs)
        with called:
            before = run()
        moves = [
            (cast(Tensor, layer.bias), cast(Tensor, norm.running_mean))
            for layer, norm in pairs
            if called.one_after_the_other(layer, norm)
        ]
        saved = [(bias.clone(), mean.clone()) for bias, mean in moves]
        try:
            for bias, mean in moves:
                mean.sub_(bias)
                bias.zero_()
            _check_same(before, run())
        except BaseException:
            for tensors, values in zip(moves, saved, strict=True):
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            raise
    return model


def _may_absorb(model: nn.Module, layer: nn.Module, norm: _BatchNorm) -> bool:
    hooks = (layer._forward_hooks, norm._forward_pre_hooks)
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return (
        isinstance(layer.bias, Tensor)
        and uses[id(layer.bias)] == 1
        and not any(hooks)
        and has_statistics(norm)
        and not is_frozen(norm)
    )


def _is_pair(layer: Any, norm: Any) -> bool:
    return type(layer) in _BIASED and isinstance(norm, _BatchNorm) and is_known(type(norm))


def _neighbours(model: nn.Module) -> Iterator[_Pair]:
    """Pairs of a layer with a bias and the one batch norm that takes its output, each in one pair."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a model does that a trace cannot follow
        yield from _in_sequentials(model)
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(id(modules[str(node.target)]) for node in calls)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for node in calls:
        norm, source = modules[str(node.target)], node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        layer = modules[str(source.target)]
        elsewhere = times[id(layer)] > 1 or times[id(norm)] > 1 or f"{source.target}.bias" in read
        if _is_pair(layer, norm) and not elsewhere:
            yield layer, norm


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, _BatchNorm) or super().is_leaf_module(module, qualified_name)


def _in_sequentials(model: nn.Module) -> Iterator[_Pair]:
    owners = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for module in model.modules():
        if type(module) is nn.Sequential and not module._forward_hooks:
            for layer, norm in itertools.pairwise(module):
                if _is_pair(layer, norm) and owners[id(layer)] == owners[id(norm)] == 1:
                    yield layer, norm  # type: ignore[misc]


class _Called:
    """Context that watches how layers are called, and what passes from one to the other."""

    def __init__(self, pairs: list[_Pair]) -> None:
        self.pairs = pairs
        self.outputs: dict[nn.Module, list[Any]] = {}
        self.inputs: dict[nn.Module, list[Any]] = {}

    def __enter__(self) -> None:
        self.handles = []
        for layer, norm in self.pairs:
            self.handles += [
                layer.register_forward_hook(self._after),
                norm.register_forward_pre_hook(self._before, with_kwargs=True),
            ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _after(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.outputs.setdefault(layer, []).append(output)

    def _before(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x", kwargs.get("input"))
        self.inputs.setdefault(norm, []).append(x)

    def one_after_the_other(self, layer: nn.Module, norm: _BatchNorm) -> bool:
        """Whether each was called once, the output of one was the other's input, channel for channel."""
        outputs, inputs = self.outputs.get(layer, []), self.inputs.get(norm, [])
        if len(outputs) != 1 or len(inputs) != 1 or outputs[0] is not inputs[0]:
            return False
        rank = outputs[0].ndim
        channels_of_layer = rank - 1 if type(layer) is nn.Linear else 1
        batched = _BIASED[type(layer)] in (None, rank)
        return batched and getattr(norm, "channel_dim", 1) % rank == channels_of_layer


def _check_same(before: list[Tensor], after: list[Tensor]) -> None:
    for was, now in zip(before, after, strict=True):
        if not was.is_floating_point() or was.numel() == 0:
            continue
        change, largest = (was - now).abs().max().item(), was.abs().max().item()
        if change > 4 * torch.finfo(was.dtype).eps ** 0.5 * largest:
            raise ValueError(
                f"absorb_bias: the output for the example changed by {change:g} (its largest value is "
                f"{largest:g}): does the model use a convolution's output or bias in a way that a trace does "
                "not show, or is its eval mode random?"
            )
