"""recalibrate: population statistics over a loader, in place of the running average of training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import checks
from batchnorm.model.batch_norms import batch_norms, check_initialized, check_model, has_statistics, quoted
from batchnorm.model.batches import Batches
from batchnorm.model.calling import call, evaluating, unwrapped
from batchnorm.model.freeze import is_frozen
from batchnorm.model.gather import Seen, check_group, gathered
from batchnorm.moments import Moments

# Taken to float64 at a time: on a CPU what stays in its cache, which is 5 times as fast; on a device, whose
# memory float64 copies should not fill, enough to keep it busy.
_ELEMENTS_ON_CPU, _ELEMENTS_ON_DEVICE = 2**18, 2**24


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    progress: bool = False,
    group: Any = None,
    sequential: bool = False,
) -> nn.Module:
    """Set the running statistics of every batch norm to those of the whole data: precise batch norm.

    `running_mean = sum(x) / n` and `running_var = sum((x - running_mean)**2) / (n - correction)` over all
    the n values per channel that a layer is given, each batch weighted by its values, in float64 (Wu &
    Johnson 2021, Rethinking "Batch" in BatchNorm, section 3; merged by Chan, Golub & LeVeque 1979).
    `correction` is the layer's own, 1 (unbiased) for torch.nn's.

    For weights that the running average does not belong to: after training with small batches or a high
    learning rate, after averaging weights (EMA, SWA) or pruning. Meanwhile everything but the batch norms,
    dropout too, is in eval mode, and there are no gradients. Whole batches normalise, without ghost batches
    or renorm; a `mask` counts as in training.

    In one pass, a layer's input is what the layers before it made of it when they normalised by the batch. So
    the first layers are exact, and what the deeper ones get depends somewhat on how the data are cut into
    batches: little from some hundred values per channel on, much for batches of a few samples or of sorted
    classes. With `sequential=True` the layers are done one after the other in order of execution, each on
    inputs that went through its recalibrated predecessors as they do in eval mode. That is exact at any
    depth for any cut, batches of one sample included, and takes one pass over the loader per layer. Only a
    layer that is used again behind itself still sees its own output normalised by the batch.

    Args:
        model: `running_mean`, `running_var` and `num_batches_tracked` are written in place; the latter
            becomes the number of batches in the new statistics. Left alone: frozen layers (`bn.freeze`) and
            those without running statistics, which normalise as they do in eval mode; and with a warning
            those that the data never reached. DistributedDataParallel and DataParallel are called without
            their wrapper, compiled models uncompiled.
        loader: batches, moved to the device of the model's first parameter. A tensor is `model(batch)`, a
            mapping `model(**batch)`; a tuple or list `(inputs, ...)`, as a DataLoader gives it, is called on
            its first element, which may itself be a mapping or a tuple of positional arguments.
        forward: called as `forward(model, batch)` instead, for anything else. The batch is moved already.
        max_batches: stop after so many; 10,000 samples are usually plenty. None is all of them.
        progress: draw a bar with tqdm.
        group: a torch.distributed process group, all of whose processes recalibrate the same model, each on
            its own part of the data, in any number of batches; all end with the statistics of all the data.
            `torch.distributed.group.WORLD` is all processes. None is this process alone.
        sequential: layer by layer, see above. `loader` must give the same data each time it is iterated: with
            `max_batches`, no shuffled ones.

    Returns:
        model

    Raises:
        TypeError: `model` is no nn.Module, or `loader` does not yield batches or what the model takes.
        ValueError: no batch norm to recalibrate, a lazy module without its first input, an empty loader,
            statistics that are not finite, or one value per channel in a batch (with `sequential`: in all
            of them together); the message names the layer.
        ModuleNotFoundError: `progress=True` without tqdm.

    Whatever is raised, here, by the loader or in another process of `group`, the model is as it was.
    """
    check_model(model, "recalibrate")
    network = unwrapped(model)
    names = {layer: name for name, layer in _layers_to_estimate(network).items()}
    batches = Batches(loader, max_batches, progress, again=sequential, verb="recalibrate")
    check_group(group)

    def run(open_layers: dict[_BatchNorm, str]) -> dict[_BatchNorm, Seen]:
        watch = _Watch(open_layers, one_value_is_enough=sequential)
        return _merged(watch, lambda: _run(network, batches, forward, watch), group)

    with _unless_done_restored(names) as done, evaluating(network):
        while True:
            seen = run({layer: name for layer, name in names.items() if layer not in done})
            for layer in list(seen)[:1] if sequential else seen:
                _write(layer, names[layer], seen[layer])
                done.add(layer)
            if done.issuperset(seen):
                break
        if not done:
            raise ValueError(
                "recalibrate: no data reached any batch norm of the model: do the batches have samples, and "
                "does the model call its batch norms?"
            )
    missed = [quoted(layer, name) for layer, name in names.items() if layer not in done]
    if missed:
        warnings.warn(
            f"recalibrate: no data reached {', '.join(missed)}, whose running statistics stay as they were",
            stacklevel=2,
        )
    return model


def _layers_to_estimate(model: nn.Module) -> dict[str, _BatchNorm]:
    layers = batch_norms(model, "recalibrate")
    check_initialized(model, "recalibrate")
    tracked = {name: layer for name, layer in layers.items() if has_statistics(layer)}
    if not tracked:
        raise ValueError(
            "recalibrate: no batch norm of the model has running statistics (track_running_stats=False): "
            "there is nothing to recalibrate"
        )
    unfrozen = {name: layer for name, layer in tracked.items() if not is_frozen(layer)}
    if not unfrozen:
        raise ValueError("recalibrate: every batch norm of the model is frozen: bn.unfreeze(model) first")
    return unfrozen


@contextmanager
def _unless_done_restored(layers: Iterable[_BatchNorm]) -> Iterator[set[_BatchNorm]]:
    """Give layers that are not in the set at the end their buffers back; on an exception, all of them."""
    before = {layer: [(buffer, buffer.clone()) for buffer in layer.buffers()] for layer in layers}
    done: set[_BatchNorm] = set()
    try:
        yield done
    except BaseException:
        done.clear()
        raise
    finally:
        with torch.no_grad():
            for layer in before.keys() - done:
                for buffer, value in before[layer]:
                    buffer.copy_(value)


class _FewValues(ValueError):
    """Told apart from what a model raises by itself."""


class _Watch:
    """Hooks before layers: take the moments of the input, and let the layer normalise by them.

    By writing them into the running statistics: in eval mode a layer needs no more than that, whatever its
    options are.
    """

    def __init__(self, layers: dict[_BatchNorm, str], one_value_is_enough: bool) -> None:
        self.layers = layers
        self.one_value_is_enough = one_value_is_enough
        self.seen: dict[_BatchNorm, Seen] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the hooks are there, after all other ones."""
        handles = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, _BatchNorm)
        x, mask = _input(layer, args, kwargs)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            return  # the layer itself says what is wrong
        channel_dim = checks.resolve_channel_dim(x, getattr(layer, "channel_dim", 1))
        if x.shape[channel_dim] != layer.num_features or x.numel() == 0:
            return
        if mask is not None:
            checks.check_mask(mask, x)
        self._check_values(layer, x, mask, channel_dim)
        moments = _moments(x.detach(), channel_dim, mask)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.m2 / moments.count.clamp_min(torch.finfo(moments.count.dtype).tiny))
        before = self.seen.get(layer)
        if before is None:
            self.seen[layer] = Seen(1, moments, len(self.seen))
        else:
            self.seen[layer] = before._replace(times=before.times + 1, moments=before.moments.merge(moments))

    def _check_values(self, layer: _BatchNorm, x: Tensor, mask: Tensor | None, channel_dim: int) -> None:
        if self.one_value_is_enough:
            return
        one = x.numel() == x.shape[channel_dim]
        if not one and mask is not None and checks.values_can_be_read(mask):
            counted = mask.expand_as(x).count_nonzero([dim for dim in range(x.ndim) if dim != channel_dim])
            one = bool((counted <= 1).any())
        if one:
            raise _FewValues(
                f"recalibrate: {quoted(layer, self.layers[layer])} was given an input of shape "
                f"{tuple(x.shape)} with one value per channel, and normalising by the batch needs more. Use "
                "larger batches, drop the last incomplete one with DataLoader(..., drop_last=True), or "
                "recalibrate with sequential=True, which does not need them"
            )


def _input(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
    """The input and the mask in the arguments of a layer's call: `(x, residual, mask)` for ours."""
    x = args[0] if args else kwargs.get("x", kwargs.get("input"))
    if not hasattr(layer, "channel_dim"):
        return x, None
    return x, args[2] if len(args) > 2 else kwargs.get("mask")


def _moments(x: Tensor, channel_dim: int, mask: Tensor | None) -> Moments:
    """Moments summed in float64; float32 sums of millions of values are wrong by some 1e-6."""
    dim = 1 if channel_dim == 0 else 0
    elements = _ELEMENTS_ON_CPU if x.device.type == "cpu" else _ELEMENTS_ON_DEVICE
    size = max(1, elements * x.shape[dim] // x.numel())
    xs = x.split(size, dim)
    masks = [None] * len(xs) if mask is None else mask.expand_as(x).split(size, dim)
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    parts = [
        Moments.from_tensor(part.to(dtype), channel_dim=channel_dim, mask=of_part)
        for part, of_part in zip(xs, masks, strict=True)
    ]
    return parts[0].merge(*parts[1:]) if len(parts) > 1 else parts[0]


def _run(
    model: nn.Module, batches: Batches, forward: Callable[[nn.Module, Any], Any] | None, watch: _Watch
) -> int:
    """One pass over the loader; how many batches it had."""
    number = 0
    with watch.on():
        for number, batch in enumerate(batches, 1):
            call(model, batch, forward, "recalibrate", f"batch {number}")
    return number


def _merged(watch: _Watch, run: Callable[[], int], group: Any) -> dict[_BatchNorm, Seen]:
    """What the layers were given in a pass, in all processes of the group, in order of execution."""
    if group is None:
        batches = run()
        seen = watch.seen
    else:
        batches, seen = gathered(watch.layers, watch.seen, run, group)
    if batches == 0:
        raise ValueError("recalibrate: the loader is empty: without a batch there are no statistics")
    return dict(sorted(seen.items(), key=lambda item: item[1].position))


def _write(layer: _BatchNorm, name: str, seen: Seen) -> None:
    """Write what a layer has seen into its buffers, once it is seen to be finite in their dtype."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    correction = getattr(layer, "correction", 1)
    if bool((seen.moments.count <= correction).any()):
        raise ValueError(
            f"recalibrate: {quoted(layer, name)} was given too few values per channel "
            f"({seen.moments.count.min().item():g} in all the data) for a variance with correction "
            f"{correction:g}: give more data"
        )
    new_mean, new_var = seen.moments.mean.to(mean.dtype), seen.moments.var(correction).to(var.dtype)
    for what, value in (("mean", new_mean), ("variance", new_var)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"recalibrate: the {what} of the inputs of {quoted(layer, name)} is not finite (in "
                f"{str(value.dtype).removeprefix('torch.')}), for {int((~torch.isfinite(value)).sum())} of "
                f"{layer.num_features} channels: look for inf or NaN in the data, or diverged weights"
            )
    mean.copy_(new_mean)
    var.copy_(new_var)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(seen.times)
