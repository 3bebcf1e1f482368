"""Tests of load_keras: weights and conventions of Keras's and TensorFlow's batch norm."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import load_keras

C = 3
KINDS = [nn.BatchNorm1d, bn.BatchNorm1d]


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "gamma": random.normal(size=C),
        "beta": random.normal(size=C),
        "moving_mean": random.normal(size=C) * 10,
        "moving_variance": random.uniform(1e-4, 2, size=C),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_eval_mode_is_kerass_formula(kind: type[nn.Module], epsilon: float) -> None:
    layer, k = kind(C).double().eval(), arrays()
    as_lists = {name: array.tolist() for name, array in k.items()}
    assert load_keras(layer, **as_lists, epsilon=epsilon) is layer
    x = np.random.default_rng(1).normal(size=(8, C))
    y = k["gamma"] * (x - k["moving_mean"]) / np.sqrt(k["moving_variance"] + epsilon) + k["beta"]
    assert_close(layer(torch.from_numpy(x)), torch.from_numpy(y), rtol=1e-12, atol=1e-12)


def test_training_moves_the_statistics_as_keras_does() -> None:
    layer, k = load_keras(bn.BatchNorm1d(C).double(), **arrays(), momentum=0.9), arrays()
    x = np.random.default_rng(1).normal(size=(5, C))
    layer(torch.from_numpy(x))
    assert_close(layer.running_mean.numpy(), 0.9 * k["moving_mean"] + 0.1 * x.mean(0))
    assert_close(layer.running_var.numpy(), 0.9 * k["moving_variance"] + 0.1 * x.var(0))


@pytest.mark.parametrize("kind", KINDS)
def test_conventions_and_objects(kind: type[nn.Module]) -> None:
    layer = kind(C)
    kept = [id(tensor) for tensor in (*layer.parameters(), *layer.buffers())]
    load_keras(layer, **arrays())
    assert [id(tensor) for tensor in (*layer.parameters(), *layer.buffers())] == kept
    assert (layer.eps, layer.momentum) == (1e-3, 0.01)
    assert getattr(layer, "correction", None) == (0 if kind is bn.BatchNorm1d else None)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_without_scale_and_center(kind: type[nn.Module]) -> None:
    statistics = {name: arrays()[name].tolist() for name in ("moving_mean", "moving_variance")}
    layer = kind(C)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    load_keras(layer, **statistics)
    assert (layer.weight == 1).all()
    assert (layer.bias == 0).all()
    plain = load_keras(kind(C, affine=False), **statistics)
    assert_close(plain.running_mean.tolist(), statistics["moving_mean"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": np.ones(4)}, ValueError, r"gamma has shape \(4,\), the layer needs \(3,\)"),
        ({"beta": np.ones((1, C))}, ValueError, r"beta has shape \(1, 3\)"),
        ({"moving_mean": 0.0}, ValueError, r"moving_mean has shape \(\)"),
        ({"moving_mean": None}, TypeError, "moving_mean to be an array"),
        ({"moving_mean": ["a", "b", "c"]}, TypeError, "moving_mean to be an array"),
        ({"moving_variance": [1, 1, -1e-3]}, ValueError, r"moving_variance has a negative value, -0\.001"),
        ({"moving_variance": [1, 1, np.nan]}, ValueError, "moving_variance has a value that is not finite"),
        ({"beta": [1, 1, 1e300]}, ValueError, "beta has a value that is not finite"),
        ({"epsilon": 0}, ValueError, "eps=0"),
        ({"momentum": 1.5}, ValueError, r"momentum=1\.5"),
    ],
    ids=range(10),
)
def test_errors_change_nothing(
    kind: type[nn.Module], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = kind(C)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(error, match=message):
        load_keras(layer, **(arrays() | change))
    assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)
    assert (layer.eps, layer.momentum, getattr(layer, "correction", 1)) == (1e-5, 0.1, 1)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.BatchNorm1d(C, affine=False), ValueError, "no weight for gamma"),
        (nn.BatchNorm1d(C, track_running_stats=False), ValueError, "no running statistics"),
        (nn.LazyBatchNorm1d(), ValueError, "has not seen its first input yet"),
        (nn.LayerNorm(C), TypeError, "expected a batch norm layer, got LayerNorm"),
    ],
    ids=range(4),
)
def test_layers_that_cannot_take_them(layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"load_keras: .*{message}"):
        load_keras(layer, **arrays())
