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

from batchnorm.model.batch_norms import (
    Filter,
    Model,
    batch_norms,
    check_initialized,
    check_model,
    has_statistics,
)
from batchnorm.model.batches import Batches
from batchnorm.model.calling import call, evaluating, unwrapped
from batchnorm.model.freeze import is_frozen
from batchnorm.model.frozen import frozen_batch_norms
from batchnorm.model.function_calls import FunctionNorm, statistics_of_functions
from batchnorm.model.gather import Normalises, Seen, check_alike, check_group, described, gathered
from batchnorm.model.input_moments import InputMoments
from batchnorm.model.ranks import Ranks
from batchnorm.model.recalibration_report import Change, keep_report, statistics_of
from batchnorm.names import quoted

Statistics = tuple[Tensor, Tensor]
# (what a layer has seen, the mean and variance that it had, those of the data) -> those to write.
Blend = Callable[[Seen, Statistics, Statistics], Statistics]


def recalibrate(
    model: Model,
    loader: Iterable[Any],
    *,
    filter: Filter | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    progress: bool = False,
    group: Any = None,
    sequential: bool = False,
) -> Model:
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
    classes. A batch that gives a layer one value per channel is normalised there by all that the layer was
    given so far; its own values count all the same. With `sequential=True` the layers are done one after the
    other in order of execution, each on inputs that went through its recalibrated predecessors as they do in
    eval mode. That is exact at any depth for any cut, batches of one sample included, and takes one pass over
    the loader per layer. Only a layer that is used again behind itself still sees its own output normalised
    by the batch.

    `recalibration_report(model)` says what changed in which layer. Batch norm that is called as a function
    (F.batch_norm) with buffers of its module is recalibrated, too.

    Args:
        model: `running_mean`, `running_var` and `num_batches_tracked` are written in place; the latter
            becomes the number of batches in the new statistics. Left alone: frozen layers (`bn.freeze`) and
            those without running statistics, which normalise as they do in eval mode; and with a warning
            those that the data never reached. DistributedDataParallel and DataParallel are called without
            their wrapper, compiled models uncompiled.
        loader: batches, moved to the device of the model's first parameter. A tensor is `model(batch)`, a
            mapping `model(**batch)`; a tuple or list `(inputs, ...)`, as a DataLoader gives it, is called on
            its first element, which may itself be a mapping or a tuple of positional arguments.
        filter: called as `filter(name, layer)` with each batch norm and its qualified name: which are meant.
            The others normalise as they do in eval mode.
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
        TypeError: `model` is no nn.Module, `filter` no function, or `loader` does not yield batches or what
            the model takes.
        ValueError: no batch norm to recalibrate, or none that `filter` names; a lazy module without its first
            input, an empty loader (of a group: in every process), statistics that are not finite, one value
            per channel in all the data, or processes with other batch norms than each other; the message
            names the layer.
        RuntimeError: it raised in another process of `group`, which the message names, or one did not come.
        ModuleNotFoundError: `progress=True` without tqdm.

    Whatever is raised, here, by the loader or in another process of `group`, the model is as it was.
    """
    check_group(group, "recalibrate")
    ranks = Ranks(group, "recalibrate")
    work: list[tuple[nn.Module, dict[Normalises, str], Batches]] = []

    def prepare() -> dict[str, tuple[int, ...]]:
        check_model(model, "recalibrate")
        network = unwrapped(model)
        names = layers_to_estimate(network, "recalibrate", filter)
        batches = Batches(loader, max_batches, progress, again=sequential, verb="recalibrate")
        work.append((network, names, batches))
        return {name: (layer.num_features,) for layer, name in names.items()}

    check_alike(ranks, ranks.together(prepare))
    changes = estimate(*work[0], forward, filter, ranks=ranks, sequential=sequential)
    keep_report(model, changes, filter)
    return model


def layers_to_estimate(model: nn.Module, verb: str, filter: Filter | None = None) -> dict[Normalises, str]:
    """The batch norms with running statistics that are not frozen, and their names; ValueError if none.

    A model that may have none but functions has none of these.
    """
    has_layers = any(isinstance(module, _BatchNorm) for module in model.modules())
    if not has_layers and statistics_of_functions(model) and not frozen_batch_norms(model):
        return {}
    layers = batch_norms(model, verb, filter)
    check_initialized(model, verb)
    tracked = {layer: name for name, layer in layers.items() if has_statistics(layer)}
    if not tracked:
        raise ValueError(
            f"{verb}: no batch norm of the model has running statistics (track_running_stats=False): "
            f"there is nothing to {verb}"
        )
    unfrozen: dict[Normalises, str] = {layer: name for layer, name in tracked.items() if not is_frozen(layer)}
    if not unfrozen:
        raise ValueError(f"{verb}: every batch norm of the model is frozen: bn.unfreeze(model) first")
    return unfrozen


def estimate(
    network: nn.Module,
    names: Mapping[Normalises, str],
    batches: Batches,
    forward: Callable[[nn.Module, Any], Any] | None,
    filter: Filter | None = None,
    *,
    ranks: Ranks,
    sequential: bool = False,
    blend: Blend = lambda seen, before, data: data,
) -> list[Change]:
    """Write the statistics of all the data into the layers in `names`, and into those of functions.

    On an exception into none. What `blend` makes of a layer's statistics is what is written. A verb calls
    this itself, for a warning that points to the verb's caller.

    Returns:
        what became of each layer, in order of execution.
    """
    verb = ranks.verb
    owners = {module: name for name, module in network.named_modules()}

    def run(done: dict[Normalises, Seen]) -> dict[Normalises, Seen]:
        def meant(norm: FunctionNorm) -> bool:
            return norm not in done and (filter is None or filter(owners[norm.owner], norm.owner))

        open_layers = {layer: name for layer, name in names.items() if layer not in done}
        inputs = InputMoments(open_layers, network, meant)
        return _merged(inputs, names, lambda: _run(network, batches, forward, inputs, verb), ranks)

    def write(seen: dict[Normalises, Seen]) -> None:
        for layer, of_layer in seen.items():
            mean, var = (before[id(buffer)][1] for buffer in statistics_of(layer))
            _write(layer, described(layer, names), of_layer, partial(blend, of_layer, (mean, var)), verb)

    with _unless_done_restored(network, names) as (done, before), evaluating(network):
        while True:
            seen = run(done)
            new = dict(itertools.islice(seen.items(), 1)) if sequential else seen
            ranks.together(partial(write, new))
            done.update(new)
            if set(seen) <= set(done):
                break
        # One that trains whatever the mode is has moved them since.
        functions: dict[Normalises, Seen] = {
            layer: seen for layer, seen in done.items() if isinstance(layer, FunctionNorm)
        }
        ranks.together(partial(write, functions))
        if not done:
            if not names:
                batch_norms(network, verb)  # says that there is none
            raise ValueError(
                f"{verb}: no data reached any batch norm of the model: do the batches have samples, and "
                "does the model call its batch norms?"
            )
    missed = [quoted(layer, name) for layer, name in names.items() if layer not in done]  # type: ignore[arg-type]
    if missed:
        warnings.warn(
            f"{verb}: no data reached {', '.join(missed)}, whose running statistics stay as they were",
            stacklevel=3,
        )
    return [
        Change.of(described(layer, names), layer, of_layer, *(before[id(b)][1] for b in statistics_of(layer)))
        for layer, of_layer in done.items()
    ]


@contextmanager
def _unless_done_restored(
    network: nn.Module, layers: Iterable[Normalises]
) -> Iterator[tuple[dict[Normalises, Seen], dict[int, tuple[Tensor, Tensor]]]]:
    """Give layers that are not done at the end their buffers back; on an exception, all of them.

    Yields what is done, and each buffer with its value before, by its id.
    """
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    buffers += [buffer for _, _, buffer in statistics_of_functions(network)]
    before = {id(buffer): (buffer, buffer.clone()) for buffer in buffers}
    done: dict[Normalises, Seen] = {}
    try:
        yield done, before
    except BaseException:
        done.clear()
        raise
    finally:
        kept = {id(buffer) for layer in done for buffer in layer.buffers()}
        with torch.no_grad():
            for key in before.keys() - kept:
                buffer, value = before[key]
                buffer.copy_(value)


def _run(
    model: nn.Module,
    batches: Batches,
    forward: Callable[[nn.Module, Any], Any] | None,
    inputs: InputMoments,
    verb: str,
) -> int:
    """One pass over the loader; how many batches it had."""
    number = 0
    with inputs.on():
        for number, batch in enumerate(batches, 1):
            call(model, batch, forward, verb, f"batch {number}")
    return number


def _merged(
    inputs: InputMoments, names: Mapping[Normalises, str], run: Callable[[], int], ranks: Ranks
) -> dict[Normalises, Seen]:
    """What the layers were given in a pass, in all processes, in order of execution."""
    batches, seen = gathered(names, inputs.seen, run, ranks, inputs.model)
    if batches == 0:
        raise ValueError(f"{ranks.verb}: the loader is empty: without a batch there are no statistics")
    return dict(sorted(seen.items(), key=lambda item: item[1].position))


def _write(
    layer: Normalises, called: str, seen: Seen, blend: Callable[[Statistics], Statistics], verb: str
) -> None:
    """Write what a layer has seen into its buffers, once it is seen to be finite in their dtype."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    correction = getattr(layer, "correction", 1)
    fewest = float(seen.moments.count.min())
    if fewest <= correction:
        given = "one value per channel" if fewest == 1 else f"{fewest:g} values per channel"
        raise ValueError(
            f"{verb}: {called} was given too few values, {given} in all the data, for a variance with "
            f"correction {correction:g}: give more data"
        )
    blended = blend((seen.moments.mean, seen.moments.var(correction)))
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
