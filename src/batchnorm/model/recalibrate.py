"""recalibrate: population statistics over a loader, in place of the running average of training."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.model.batch_norms import batch_norms, check_initialized, check_model, has_statistics
from batchnorm.model.batches import Batches
from batchnorm.model.calling import call, evaluating, unwrapped
from batchnorm.model.freeze import is_frozen
from batchnorm.model.gather import Seen, check_alike, check_group, gathered
from batchnorm.model.input_moments import InputMoments
from batchnorm.model.ranks import Ranks
from batchnorm.names import quoted

# (layer, what it has seen, mean, variance) -> the mean and the variance to write.
Blend = Callable[[_BatchNorm, Seen, Tensor, Tensor], tuple[Tensor, Tensor]]


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
        ValueError: no batch norm to recalibrate, a lazy module without its first input, an empty loader (of a
            group: in every process), statistics that are not finite, one value per channel in a batch (with
            `sequential`: in all of them together), or processes with other batch norms than each other; the
            message names the layer.
        RuntimeError: it raised in another process of `group`, which the message names, or one did not come.
        ModuleNotFoundError: `progress=True` without tqdm.

    Whatever is raised, here, by the loader or in another process of `group`, the model is as it was.
    """
    check_group(group, "recalibrate")
    ranks = Ranks(group, "recalibrate")
    work: list[tuple[nn.Module, dict[_BatchNorm, str], Batches]] = []

    def prepare() -> dict[str, tuple[int, ...]]:
        check_model(model, "recalibrate")
        network = unwrapped(model)
        names = layers_to_estimate(network, "recalibrate")
        batches = Batches(loader, max_batches, progress, again=sequential, verb="recalibrate")
        work.append((network, names, batches))
        return {name: (layer.num_features,) for layer, name in names.items()}

    check_alike(ranks, ranks.together(prepare))
    estimate(*work[0], forward, ranks=ranks, sequential=sequential)
    return model


def layers_to_estimate(model: nn.Module, verb: str) -> dict[_BatchNorm, str]:
    """The batch norms with running statistics that are not frozen, and their names; ValueError if none."""
    layers = batch_norms(model, verb)
    check_initialized(model, verb)
    tracked = {layer: name for name, layer in layers.items() if has_statistics(layer)}
    if not tracked:
        raise ValueError(
            f"{verb}: no batch norm of the model has running statistics (track_running_stats=False): "
            f"there is nothing to {verb}"
        )
    unfrozen = {layer: name for layer, name in tracked.items() if not is_frozen(layer)}
    if not unfrozen:
        raise ValueError(f"{verb}: every batch norm of the model is frozen: bn.unfreeze(model) first")
    return unfrozen


def estimate(
    network: nn.Module,
    names: Mapping[_BatchNorm, str],
    batches: Batches,
    forward: Callable[[nn.Module, Any], Any] | None,
    *,
    ranks: Ranks,
    sequential: bool = False,
    blend: Blend = lambda layer, seen, mean, var: (mean, var),
) -> None:
    """Write the statistics of all the data into the layers in `names`; on an exception into none.

    What `blend(layer, seen, mean, var)` makes of a layer's statistics is what is written. A verb calls this
    itself, for a warning that points to the verb's caller.
    """
    verb = ranks.verb

    def run(open_layers: dict[_BatchNorm, str]) -> dict[_BatchNorm, Seen]:
        inputs = InputMoments(open_layers, one_value_is_enough=sequential, verb=verb)
        return _merged(inputs, lambda: _run(network, batches, forward, inputs), ranks)

    def write(seen: dict[_BatchNorm, Seen]) -> None:
        for layer, of_layer in seen.items():
            _write(layer, quoted(layer, names[layer]), of_layer, blend, verb)

    with _unless_done_restored(names) as done, evaluating(network):
        while True:
            seen = run({layer: name for layer, name in names.items() if layer not in done})
            new = dict(itertools.islice(seen.items(), 1)) if sequential else seen
            ranks.together(partial(write, new))
            done.update(new)
            if done.issuperset(seen):
                break
        if not done:
            raise ValueError(
                f"{verb}: no data reached any batch norm of the model: do the batches have samples, and "
                "does the model call its batch norms?"
            )
    missed = [quoted(layer, name) for layer, name in names.items() if layer not in done]
    if missed:
        warnings.warn(
            f"{verb}: no data reached {', '.join(missed)}, whose running statistics stay as they were",
            stacklevel=3,
        )


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


def _run(
    model: nn.Module, batches: Batches, forward: Callable[[nn.Module, Any], Any] | None, inputs: InputMoments
) -> int:
    """One pass over the loader; how many batches it had."""
    number = 0
    with inputs.on():
        for number, batch in enumerate(batches, 1):
            call(model, batch, forward, inputs.verb, f"batch {number}")
    return number


def _merged(inputs: InputMoments, run: Callable[[], int], ranks: Ranks) -> dict[_BatchNorm, Seen]:
    """What the layers were given in a pass, in all processes, in order of execution."""
    batches, seen = gathered(inputs.layers, inputs.seen, run, ranks)
    if batches == 0:
        raise ValueError(f"{inputs.verb}: the loader is empty: without a batch there are no statistics")
    return dict(sorted(seen.items(), key=lambda item: item[1].position))


def _write(layer: _BatchNorm, called: str, seen: Seen, blend: Blend, verb: str) -> None:
    """Write what a layer has seen into its buffers, once it is seen to be finite in their dtype."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    correction = getattr(layer, "correction", 1)
    if bool((seen.moments.count <= correction).any()):
        raise ValueError(
            f"{verb}: {called} was given too few values per channel "
            f"({seen.moments.count.min().item():g} in all the data) for a variance with correction "
            f"{correction:g}: give more data"
        )
    blended = blend(layer, seen, seen.moments.mean, seen.moments.var(correction))
    new_mean, new_var = blended[0].to(mean.dtype), blended[1].to(var.dtype)
    for what, value in (("mean", new_mean), ("variance", new_var)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{verb}: the {what} of the inputs of {called} is not finite (in "
                f"{str(value.dtype).removeprefix('torch.')}), for {int((~torch.isfinite(value)).sum())} of "
                f"{layer.num_features} channels: look for inf or NaN in the data, or diverged weights"
            )
    mean.copy_(new_mean)
    var.copy_(new_var)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(seen.times)
