"""adapt: a trained model's batch norms, fitted to unlabelled data of another kind than it was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.model.batch_norms import Filter, Model, check_model
from batchnorm.model.batches import Batches
from batchnorm.model.calling import call, evaluating, unwrapped
from batchnorm.model.gather import Seen
from batchnorm.model.hold import hold
from batchnorm.model.ranks import Ranks
from batchnorm.model.recalibrate import Blend, Statistics, estimate, layers_to_estimate


def adapt(
    model: Model,
    loader: Iterable[Any],
    *,
    filter: Filter | None = None,
    prior: float = 0.0,
    entropy_epochs: int = 0,
    lr: float = 1e-3,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    progress: bool = False,
) -> Model:
    """Fit the batch norms of a trained model to the data that it is used on, without labels.

    For data that look unlike those of training (another camera, noise, contrast): with the n samples of
    `loader`, each layer's running statistics become

        running_mean = prior / (prior + n) * running_mean + n / (prior + n) * target_mean

    and likewise `running_var` (Schneider et al. 2020, Improving robustness against common corruptions by
    covariate shift adaptation, section 3). The layers are done in order of execution, each on inputs that
    went through its adapted predecessors as they do in eval mode: one pass over the loader per layer.

    With `entropy_epochs`, before that, weight and bias of the layers, which normalise by the batch, are
    trained by Adam to make the model surer of itself, that is to lower the mean of the entropy
    `-sum(p * log(p))` of its softmax `p` (Wang et al. 2021, Tent: Fully Test-Time Adaptation by Entropy
    Minimization, section 3).

    Statistics do most of it. On strongly corrupted Fashion-MNIST (`batchnorm why corruption --quick`) they
    took 34.9 points off the error of a small network, even those of 8 images 31.8; a `prior` of 16 and a pass
    of entropy made that worse, by 19.1 points for 8 images and by 0.9 for all. Try them on labelled data
    first.

    All this assumes that the classes are about as frequent in the loader as they were in training.

    Args:
        model: written in place are `running_mean`, `running_var`, `num_batches_tracked` (the number of
            batches in the new statistics) and with `entropy_epochs` `weight` and `bias`, where they require a
            gradient. Frozen layers (`bn.freeze`) are left alone. DistributedDataParallel and DataParallel are
            called without their wrapper, compiled models uncompiled.
        loader: as for `bn.recalibrate`; it must give the same data each time it is iterated.
        filter: called as `filter(name, layer)` with each batch norm and its qualified name: which are meant.
        prior: how many samples the present statistics count for. 0 forgets them.
        entropy_epochs: passes over the loader, in batches of some hundred samples in random order.
        lr: Adam's learning rate.
        forward: called as `forward(model, batch)`, for anything that `bn.recalibrate` could not call; with
            `entropy_epochs` it returns logits (N, classes, ...), as the model does otherwise.
        max_batches: no more than so many in each pass. None is all of them.
        progress: draw a bar with tqdm.

    Returns:
        model

    Raises:
        TypeError: `model` is no nn.Module, `loader` can be iterated only once or does not yield batches or
            what the model takes, or the output is no tensor of logits.
        ValueError: an option out of its range, no batch norm to adapt or none that `filter` names, nothing to
            train, an empty loader, or statistics or an entropy that are not finite.
        ModuleNotFoundError: `progress=True` without tqdm.

    Whatever is raised, here or by the loader, the model is as it was.
    """
    check_model(model, "adapt")
    _check_options(prior, entropy_epochs, lr)
    network = unwrapped(model)
    names = layers_to_estimate(network, "adapt", filter)
    if hasattr(loader, "__next__"):
        raise TypeError(
            f"adapt: goes over the loader more than once, but {type(loader).__name__} can be iterated only "
            "once: give a DataLoader or a list"
        )
    batches = Batches(loader, max_batches, progress, again=True, verb="adapt")
    layers = [layer for layer in names if isinstance(layer, nn.Module)]
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad] if entropy_epochs else []
    if entropy_epochs and not trained:
        raise ValueError(
            "adapt: entropy_epochs trains weights and biases of batch norms, but none requires a gradient: "
            "call requires_grad_(True) on them first"
        )
    with _restored_on_failure(trained):
        if entropy_epochs:
            _lower_entropy(network, layers, trained, batches, forward, entropy_epochs, lr)
        mix = _mixed_with(prior)
        estimate(
            network, names, batches, forward, filter, ranks=Ranks(None, "adapt"), sequential=True, blend=mix
        )
    return model


def _check_options(prior: float, entropy_epochs: int, lr: float) -> None:
    for name, value in (("prior", prior), ("lr", lr)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"adapt: {name}={value!r} must be a number, 0 or more")
    if type(entropy_epochs) is not int or entropy_epochs < 0:
        raise ValueError(f"adapt: entropy_epochs={entropy_epochs!r} must be a whole number, 0 or more")


def _mixed_with(prior: float) -> Blend:
    """Mixes new statistics of a layer with its present ones, which count for `prior` samples."""

    def mixed(seen: Seen, before: Statistics, data: Statistics) -> Statistics:
        if prior == 0:
            return data  # whatever the present ones are: they may not be finite
        share = prior / (prior + seen.samples)
        mean, var = (share * old.double() + (1 - share) * new for old, new in zip(before, data, strict=True))
        return mean, var

    return mixed


@contextmanager
def _restored_on_failure(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Give parameters their values back on an exception, and their gradients in any case."""
    before = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value, _ in before:
                parameter.copy_(value)
        raise
    finally:
        for parameter, _, gradient in before:
            parameter.grad = gradient


def _lower_entropy(
    network: nn.Module,
    layers: Iterable[nn.Module],
    trained: list[nn.Parameter],
    batches: Batches,
    forward: Callable[[nn.Module, Any], Any] | None,
    epochs: int,
    lr: float,
) -> None:
    optimizer = torch.optim.Adam(trained, lr)
    with evaluating(network), hold(network), torch.enable_grad():
        for layer in layers:
            layer.training = True
        for _ in range(epochs):
            for number, batch in enumerate(batches, 1):
                where = f"batch {number}"
                loss = _entropy(call(network, batch, forward, "adapt", where), where)
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()


def _entropy(logits: Any, where: str) -> Tensor:
    """The mean entropy of the softmax over dimension 1."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(
            f"adapt: entropy_epochs needs logits (N, classes, ...), got {what} on {where}: pass "
            "forward=lambda model, batch: ... that returns them"
        )
    log_p = logits.log_softmax(1)
    loss = -(log_p.exp() * log_p).sum(1).mean()
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"adapt: the entropy of the output on {where} is not finite: look for inf or NaN in the data"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"adapt: the output on {where} does not depend on the weights of the batch norms: does the model "
            "or forward run without gradients?"
        )
    return loss
