"""load_keras: a batch norm's weights and conventions as Keras and TensorFlow have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import checks
from batchnorm.layers import _BatchNorm as _OurBatchNorm
from batchnorm.model.batch_norms import check_initialized, has_statistics


def load_keras(
    layer: _BatchNorm,
    *,
    gamma: Any = None,
    beta: Any = None,
    moving_mean: Any,
    moving_variance: Any,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
) -> _BatchNorm:
    """Make `layer` the batch norm that Keras or TensorFlow had: `gamma, beta, mean, variance`, their meaning.

    In eval mode `y = gamma * (x - moving_mean) / sqrt(moving_variance + epsilon) + beta`. Training goes on as
    there: Keras's momentum weighs the past, torch's the new batch, so `layer.momentum = 1 - momentum`; and
    its running variance is the biased one, so one of our layers gets `correction=0`. torch.nn's can keep
    only the unbiased one. (`keras.layers.BatchNormalization`; `tf.nn.batch_normalization`)

        gamma, beta, mean, variance = keras_layer.get_weights()

    Args:
        layer: a torch.nn BatchNorm or one of ours; its Parameters and buffers are written in place.
        gamma, beta, moving_mean, moving_variance: shape (C,), anything that torch.as_tensor takes; gamma
            None is 1 (`scale=False`), beta None is 0 (`center=False`).
        epsilon: Keras's default, and not torch's; above 0.
        momentum: Keras's, TensorFlow's `decay`; in [0, 1].

    Returns:
        layer

    Raises:
        TypeError: not a batch norm, or an array that is not one of numbers.
        ValueError: a wrong shape, a negative variance, a value that is not finite, an option out of its
            range, a layer without running statistics, or without the Parameter that gamma or beta would
            need. The layer is then as it was.
    """
    if not isinstance(layer, _BatchNorm):
        raise TypeError(f"load_keras: expected a batch norm layer, got {type(layer).__name__}")
    check_initialized(layer, "load_keras")
    if not has_statistics(layer):
        raise ValueError("load_keras: the layer has no running statistics (track_running_stats=False)")
    checks.check_eps(epsilon)
    if not 0 <= momentum <= 1:
        raise ValueError(f"load_keras: momentum={momentum} is outside [0, 1]: Keras's 0.99 is torch's 0.01")
    values = {
        "gamma": (gamma, layer.weight, 1.0),
        "beta": (beta, layer.bias, 0.0),
        "moving_mean": (moving_mean, layer.running_mean, 0.0),
        "moving_variance": (moving_variance, layer.running_var, 0.0),
    }
    writes = [_checked(layer, name, *value) for name, value in values.items()]
    with torch.no_grad():
        for target, value in writes:
            if target is not None:
                target.copy_(value)
    layer.eps = epsilon
    layer.momentum = round(1 - momentum, 12)  # 0.01, and not 0.010000000000000009
    if isinstance(layer, _OurBatchNorm):
        layer.correction = 0
    return layer


def _checked(
    layer: _BatchNorm, name: str, given: Any, target: Tensor | None, default: float
) -> tuple[Tensor | None, Tensor]:
    """Where to write an array, and the array."""
    shape = (layer.num_features,)
    if given is None and name in ("gamma", "beta"):
        return target, torch.full(shape, default)
    try:
        value = torch.as_tensor(given, dtype=None if isinstance(given, Tensor) else torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"load_keras: expected {name} to be an array of numbers: {error}") from error
    if tuple(value.shape) != shape:
        raise ValueError(f"load_keras: {name} has shape {tuple(value.shape)}, the layer needs {shape}")
    if target is None:
        raise ValueError(
            f"load_keras: the layer has no {'weight' if name == 'gamma' else 'bias'} for {name}: make it "
            "with affine=True"
        )
    if not bool(torch.isfinite(value.to(target.dtype)).all()):
        raise ValueError(f"load_keras: {name} has a value that is not finite (in {target.dtype})")
    if name == "moving_variance" and bool((value < 0).any()):
        raise ValueError(f"load_keras: moving_variance has a negative value, {value.min().item():g}")
    return target, value.to(target.dtype)
