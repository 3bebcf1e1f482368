"""Tests of the layers: the numbers and state of torch.nn's, what torch.nn's lack, and errors."""

import copy
import gc
import inspect
import io
import itertools
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.lab.memory import allocated_kib
from tests.activations import ACTIVATIONS

# Tolerance of a comparison with torch.nn, as (rtol, atol), by the dtype that is compared.
SAME = (0.0, 0.0)  # torch's own operator on the same input: not a bit may differ
TOLERANCE = {
    torch.float64: (1e-10, 1e-10),  # another order of summation: some hundred roundings of 1e-16
    torch.float32: (1e-4, 1e-5),  # the same, with roundings of 6e-8 and cancelling sums in the gradients
    # Two roundings may fall the other way (2**-8 and 2**-11 each): of the result, and in a layer that is
    # half itself of the running statistics or the gradient of a Parameter, which torch sums in float32 too.
    torch.bfloat16: (2**-6, 2**-6),
    torch.float16: (2**-9, 2**-9),
}

CLASSES = {
    "1d": (nn.BatchNorm1d, bn.BatchNorm1d),
    "2d": (nn.BatchNorm2d, bn.BatchNorm2d),
    "3d": (nn.BatchNorm3d, bn.BatchNorm3d),
}
C = 3
SHAPES = {
    "NC": ("1d", (6, C)),
    "NCL": ("1d", (6, C, 5)),
    "NCHW": ("2d", (4, C, 5, 2)),
    "NCDHW": ("3d", (2, C, 4, 3, 2)),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}
LAYOUTS_OF = {
    "NC": ("contiguous", "transposed", "every other"),
    "NCL": ("contiguous", "transposed", "every other"),
    "NCHW": ("contiguous", "channels_last", "transposed"),
    "NCDHW": ("contiguous", "channels_last_3d", "transposed"),
}
INPUTS = [(shape, layout) for shape, layouts in LAYOUTS_OF.items() for layout in layouts]
TAKES_BIAS = "bias" in inspect.signature(nn.BatchNorm1d).parameters

# One value of every option that changes what training does.
OPTIONS: dict[str, dict[str, Any]] = {
    "momentum=None": {"momentum": None},
    "activation": {"activation": "silu"},
    "ghost_batch_size": {"ghost_batch_size": 4},
    "renorm": {"renorm": (1.5, 0.5)},
    "correction": {"correction": 0},
    "skip_nonfinite": {"skip_nonfinite": True},
    "everything": {
        "momentum": None,
        "activation": "tanh",
        "ghost_batch_size": 4,
        "renorm": True,
        "correction": 0,
        "skip_nonfinite": True,
    },
}


def batch(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers around another mean, and with another spread, in each channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2))
    return (x * (1 + channel) + 2 - channel).to(dtype)


def randomize(layer: nn.Module, seed: int = 0) -> None:
    """Other Parameters and running statistics than a new layer's ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
            if name.endswith("var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.ndim:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def twins(rank: str, theirs: dict[str, Any] | None = None, **ours: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer and ours, with the same random weights and statistics."""
    torch_class, our_class = CLASSES[rank]
    pair = (
        torch_class(C, **(ours if theirs is None else theirs)),
        our_class(C, **ours),
    )
    for layer in pair:
        randomize(layer)
    return pair


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def run(layer: nn.Module, x: Tensor, **inputs: Tensor) -> dict[str, Tensor | None]:
    """A forward and a backward: the output, the gradients, and the state after them."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x, **inputs)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    if y.requires_grad:
        y.backward(cotangent)
    gradients = {f"{name}.grad": parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, **gradients, **state(layer)}


def assert_same(
    ours: dict[str, Tensor | None],
    theirs: dict[str, Tensor | None],
    tolerance: tuple[float, float] | None = None,
    check_stride: bool = False,
) -> None:
    """Equal keys, shapes, dtypes and values; `tolerance` None is that of each tensor's dtype."""
    assert list(ours) == list(theirs)
    for name, got in ours.items():
        wanted = theirs[name]
        if wanted is None or got is None:
            assert got is None, name
            assert wanted is None, name
            continue
        if wanted.is_floating_point():
            rtol, atol = TOLERANCE[wanted.dtype] if tolerance is None else tolerance
        else:
            rtol, atol = SAME
        strides = check_stride and name == "y"
        assert_close(
            got,
            wanted,
            rtol=rtol,
            atol=atol,
            check_stride=strides,
            msg=lambda message, name=name: f"{name}: {message}",
        )


# ---------------------------------------------------------------------------- the numbers of torch.nn


@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "layout"), INPUTS)
def test_a_sequence_of_calls_equals_torch_nn(
    shape: str,
    layout: str,
    dtype: torch.dtype,
    momentum: float | None,
    affine: bool,
    track_running_stats: bool,
) -> None:
    rank, size = SHAPES[shape]
    theirs, ours = twins(
        rank, momentum=momentum, affine=affine, track_running_stats=track_running_stats, dtype=dtype
    )
    # The cumulative average is made of moments, where torch has a kernel of its own.
    tolerance = SAME if momentum is not None else None
    for step, mode in enumerate([True, True, False, True, False, False]):
        theirs.train(mode)
        ours.train(mode)
        x = LAYOUTS[layout](batch(size, seed=step, dtype=dtype))
        assert_same(run(ours, x), run(theirs, x), tolerance, check_stride=True)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layer_half", [False, True], ids=["float32 layer", "half layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_equals_torch_nn(
    shape: str, dtype: torch.dtype, layer_half: bool, momentum: float | None
) -> None:
    rank, size = SHAPES[shape]
    theirs, ours = twins(rank, momentum=momentum)
    if layer_half:
        theirs, ours = theirs.to(dtype), ours.to(dtype)
    for step, mode in enumerate([True, True, False]):
        theirs.train(mode)
        ours.train(mode)
        x = batch(size, seed=step, dtype=dtype)
        got, wanted = run(ours, x), run(theirs, x)
        assert got["y"].dtype == dtype
        assert_same(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_float32_statistics(dtype: torch.dtype) -> None:
    # 300 values around 100: in half precision alone their sum would be off by whole units.
    x = (100 + batch((300, C))).to(dtype)
    for options in ({}, {"momentum": None}, {"ghost_batch_size": 50}):
        layer = bn.BatchNorm1d(C, **{"momentum": 1.0, **options})
        layer(x)
        assert layer.running_mean.dtype == torch.float32
        assert_close(layer.running_mean, x.double().mean(0).float(), rtol=1e-6, atol=0)
        assert_close(layer.running_var, x.double().var(0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["half", "bfloat16", "double"])
def test_a_layer_converted_by_method_equals_torch_nn(method: str) -> None:
    theirs, ours = (getattr(layer, method)() for layer in twins("2d"))
    assert ours.running_var.dtype == theirs.running_var.dtype != torch.float32
    x = batch((4, C, 5, 2), dtype=ours.weight.dtype)
    assert_same(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("training", [True, False])
def test_a_float32_input_of_a_half_layer_keeps_its_dtype(training: bool) -> None:
    # torch.nn raises "mixed dtype"; here it is what the float32 layer makes of the rounded Parameters.
    layer = twins("1d")[1].bfloat16()
    wide = copy.deepcopy(layer).float().train(training)
    x = batch((6, C))
    y = layer.train(training)(x)
    assert y.dtype == torch.float32
    assert_close(y, wide(x))
    assert_close(layer.running_mean, wide.running_mean.bfloat16())


@pytest.mark.skipif(not TAKES_BIAS, reason="this torch has no bias argument")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_without_bias_equals_torch_nn(momentum: float | None, training: bool) -> None:
    theirs, ours = twins("2d", bias=False, momentum=momentum)
    assert ours.bias is None
    theirs.train(training)
    ours.train(training)
    x = batch((4, C, 5, 2))
    assert_same(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]], ids="+".join)
@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("x_needs_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_frozen_parameters_equal_torch_nn(
    frozen: list[str], options: dict[str, Any], x_needs_grad: bool, training: bool
) -> None:
    results = []
    for layer in twins("1d", **options):
        layer.train(training)
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
        x = batch((6, C)).requires_grad_(x_needs_grad)
        y = layer(x)
        assert y.requires_grad == (x_needs_grad or len(frozen) < 2)
        if y.requires_grad:
            y.backward(batch((6, C), seed=1))
        results.append({"y": y.detach(), "x": x.grad, "w": layer.weight.grad, "b": layer.bias.grad})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("mutate", ["track_running_stats", "buffers"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"ghost_batch_size": 6}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_statistics_switched_off_later_equal_torch_nn(
    mutate: str, options: dict[str, Any], training: bool
) -> None:
    # Both ways that users of torch.nn know to switch the running statistics off after the fact.
    momentum = {name: value for name, value in options.items() if name == "momentum"}
    theirs, ours = twins("1d", theirs=momentum, **options)
    for layer in (theirs, ours):
        layer.train(training)
        if mutate == "buffers":
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        else:
            layer.track_running_stats = False
    if mutate == "buffers" and training and options.get("momentum", 0) is None:
        # torch's own cumulative average counts; without the counter it is the plain layer's output.
        theirs.momentum = 0.1
    x = batch((6, C))
    assert_same(run(ours, x), run(theirs, x))


def test_a_batch_of_none_leaves_the_statistics_alone() -> None:
    theirs, ours = twins("1d")
    before = state(ours)
    y = ours(torch.empty(0, C, requires_grad=True))
    assert y.shape == theirs(torch.empty(0, C)).shape == (0, C)
    y.sum().backward()
    assert_same(state(ours), before, SAME)


def test_momentum_may_be_changed_between_calls() -> None:
    theirs, ours = twins("1d")
    for step, momentum in enumerate([0.1, None, 0.5, None]):
        theirs.momentum = ours.momentum = momentum
        x = batch((6, C), seed=step)
        assert_same(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_eps_equals_torch_nn(eps: float, options: dict[str, Any]) -> None:
    theirs, ours = twins("1d", eps=eps, **options)
    for mode in (True, False):
        theirs.train(mode)
        ours.train(mode)
        assert_same(run(ours, batch((6, C))), run(theirs, batch((6, C))))


def test_momentum_one_leaves_the_statistics_of_the_batch() -> None:
    layer = bn.BatchNorm1d(C, momentum=1.0)
    x = batch((6, C))
    layer(x)
    assert_close(layer.running_mean, x.mean(0))
    assert_close(layer.running_var, x.var(0))


def test_cumulative_average_is_the_mean_over_the_batches() -> None:
    layer = bn.BatchNorm1d(C, momentum=None)
    batches = [batch((6, C), seed=step) for step in range(5)]
    for x in batches:
        layer(x)
    assert_close(layer.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    assert_close(layer.running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=str)
def test_the_identity_is_recovered(options: dict[str, Any]) -> None:
    # Ioffe & Szegedy 2015, section 3: gamma = sqrt(var + eps), beta = mean makes the layer a no-op.
    options = {name: value for name, value in options.items() if name != "activation"}
    # In one virtual batch, with room for any correction: (std/running_std, ...) undoes itself at the start.
    options |= {"ghost_batch_size": 8} if "ghost_batch_size" in options else {}
    options |= {"renorm": (1, 0)} if "renorm" in options else {}
    layer = bn.BatchNorm1d(C, dtype=torch.float64, **options)
    x = batch((8, C), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_((x.var(0, correction=0) + layer.eps).sqrt())
        layer.bias.copy_(x.mean(0))
    assert_close(layer(x), x)


# ---------------------------------------------------------------------------- a torch.nn layer in every way


@pytest.mark.parametrize("rank", CLASSES)
def test_is_an_instance_of_torch_nn(rank: str) -> None:
    torch_class, our_class = CLASSES[rank]
    layer = our_class(C)
    assert isinstance(layer, torch_class)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not any(isinstance(layer, other) for other, _ in CLASSES.values() if other is not torch_class)


def test_positional_arguments_are_torch_nns() -> None:
    arguments = (C, 1e-3, 0.3, True, True, "cpu", torch.float64)
    theirs, ours = nn.BatchNorm2d(*arguments), bn.BatchNorm2d(*arguments)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.weight.dtype == ours.running_var.dtype == torch.float64


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        pytest.param({"bias": False}, marks=pytest.mark.skipif(not TAKES_BIAS, reason="no bias argument")),
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", CLASSES)
def test_state_dict_is_torch_nns_and_loads_both_ways(rank: str, options: dict[str, Any]) -> None:
    torch_class, our_class = CLASSES[rank]
    theirs, ours = torch_class(C, **options), our_class(C, activation="relu", ghost_batch_size=2, **options)
    assert_same(state(ours), state(theirs), SAME)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(state(ours), state(theirs), SAME)
    randomize(ours, seed=1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(state(theirs), state(ours), SAME)


@pytest.mark.parametrize("version", ["metadata version 1", "plain dict"])
def test_loads_a_checkpoint_from_before_the_counter(version: str) -> None:
    saved = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)).state_dict()
    saved["1.running_mean"].fill_(7)
    del saved["1.num_batches_tracked"]
    if version == "plain dict":
        saved = dict(saved)
    else:
        saved._metadata["1"]["version"] = 1
    ours = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C))
    ours.load_state_dict(saved, strict=True)
    assert_close(ours[1].running_mean, torch.full((C,), 7.0))
    assert ours[1].num_batches_tracked == 0


def test_a_missing_counter_in_a_new_checkpoint_is_an_error() -> None:
    saved = nn.BatchNorm1d(C).state_dict()
    del saved["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        bn.BatchNorm1d(C).load_state_dict(saved, strict=True)


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=str)
@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_independent_and_goes_on_alike(copier: str, options: dict[str, Any]) -> None:
    layer = bn.BatchNorm1d(C, **options)
    randomize(layer)
    layer(batch((6, C)))
    if copier == "deepcopy":
        twin = copy.deepcopy(layer)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert repr(twin) == repr(layer)
    before = state(layer)
    x = batch((6, C), seed=1)
    result = run(twin, x)
    assert_same(state(layer), before, SAME)
    assert_same(result, run(layer, x), SAME)


def test_the_state_goes_through_a_file_with_weights_only() -> None:
    layer = bn.BatchNorm2d(C, activation="relu", momentum=None)
    randomize(layer)
    layer(batch((4, C, 5, 2)))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = bn.BatchNorm2d(C, activation="relu", momentum=None)
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same(state(twin), state(layer), SAME)


def test_to_moves_parameters_and_statistics_and_not_the_counter() -> None:
    layer = bn.BatchNorm1d(C).to(torch.float64)
    assert {tensor.dtype for tensor in (*layer.parameters(), layer.running_mean, layer.running_var)} == {
        torch.float64
    }
    assert layer.num_batches_tracked.dtype == torch.int64
    layer.to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=str)
def test_runs_on_the_meta_device(options: dict[str, Any], training: bool) -> None:
    layer = bn.BatchNorm2d(C, device="meta", **options).train(training)
    x = torch.empty(8, C, 5, 2, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    mask = torch.empty(8, 1, 5, 2, device="meta", dtype=torch.bool)
    for inputs in ({}, {"residual": x, "mask": mask}):
        y = layer(x, **inputs)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_made_on_meta_and_materialised_equals_torch_nn() -> None:
    theirs, ours = nn.BatchNorm1d(C, device="meta"), bn.BatchNorm1d(C, device="meta")
    for layer in (theirs, ours):
        layer.to_empty(device="cpu").reset_parameters()
    assert_same(run(ours, batch((6, C))), run(theirs, batch((6, C))), SAME)


@pytest.mark.parametrize("method", ["reset_running_stats", "reset_parameters"])
def test_resets_equal_torch_nn(method: str) -> None:
    theirs, ours = twins("1d")
    for layer in (theirs, ours):
        layer(batch((6, C)))
        getattr(layer, method)()
    assert_same(state(ours), state(theirs), SAME)
    assert ours.num_batches_tracked == 0
    assert_close(ours.running_var, torch.ones(C))


@pytest.mark.parametrize("rank", CLASSES)
def test_repr_is_torch_nns_and_adds_what_was_changed(rank: str) -> None:
    torch_class, our_class = CLASSES[rank]
    assert repr(our_class(C, momentum=None)) == repr(torch_class(C, momentum=None))
    text = repr(our_class(C, activation="relu", ghost_batch_size=8, renorm=(2, 1), channel_dim=-1))
    assert text.startswith(repr(torch_class(C))[:-1])
    assert text.endswith(
        "activation='relu', ghost_batch_size=8, renorm=Renorm(r_max=2, d_max=1), channel_dim=-1)"
    )
    assert repr(our_class(C, correction=0, skip_nonfinite=True)).endswith(
        "correction=0, skip_nonfinite=True)"
    )


# ---------------------------------------------------------------------------- options


class Composed(nn.Module):
    """torch.nn's layer, then the residual, then the activation."""

    def __init__(self, norm: nn.Module, activation: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return self.activation(y if residual is None else y + residual)


def unprefixed(results: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name.removeprefix("norm."): tensor for name, tensor in results.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activation_and_residual_equal_modules(
    activation: str | None, with_residual: bool, training: bool
) -> None:
    theirs, ours = twins("2d", theirs={}, activation=activation)
    composed = Composed(theirs, ACTIVATIONS.get(activation)).train(training)
    ours.train(training)
    x = batch((4, C, 5, 2)).to(memory_format=torch.channels_last)
    residuals = [batch((4, C, 5, 2), seed=5).requires_grad_() for _ in range(2)]
    inputs = [{"residual": residual} if with_residual else {} for residual in residuals]
    got, wanted = run(ours, x, **inputs[0]), run(composed, x, **inputs[1])
    assert_same(got, unprefixed(wanted), SAME, check_stride=True)
    if with_residual:
        assert_close(residuals[0].grad, residuals[1].grad, rtol=0, atol=0)


def test_the_activation_does_not_overwrite_the_residual_or_the_input() -> None:
    x, residual = batch((6, C)), batch((6, C), seed=1)
    kept = x.clone(), residual.clone()
    bn.BatchNorm1d(C, activation="relu")(x, residual)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("rank", ["NCL", "NCHW"])
def test_a_mask_leaves_the_rest_out_of_the_statistics(rank: str) -> None:
    kind, size = SHAPES[rank]
    ours = twins(kind, dtype=torch.float64)[1]
    theirs = nn.BatchNorm1d(C, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    mask = torch.rand(size[0], 1, *size[2:], generator=torch.Generator().manual_seed(1)) < 0.6
    x = batch(size, dtype=torch.float64).requires_grad_()
    y = ours(x, mask=mask)

    # torch.nn's layer on the valid positions alone, as (positions, C).
    valid = x.detach().movedim(1, -1)[mask.squeeze(1)].requires_grad_()
    wanted = theirs(valid)
    assert_close(y.movedim(1, -1)[mask.squeeze(1)], wanted)
    assert_same(state(ours), state(theirs), TOLERANCE[torch.float64])
    # Elsewhere: normalised by the same statistics.
    mean, var = valid.mean(0), valid.var(0, correction=0)
    everywhere = (x.movedim(1, -1) - mean) / (var + ours.eps).sqrt() * ours.weight + ours.bias
    assert_close(y.movedim(1, -1), everywhere)

    cotangent = batch(size, seed=3, dtype=torch.float64) * mask
    y.backward(cotangent)
    wanted.backward(cotangent.movedim(1, -1)[mask.squeeze(1)])
    assert_close(x.grad.movedim(1, -1)[mask.squeeze(1)], valid.grad)
    assert_close(ours.weight.grad, theirs.weight.grad)
    assert_close(ours.bias.grad, theirs.bias.grad)


def test_what_is_masked_out_may_be_anything() -> None:
    layer, twin = bn.BatchNorm1d(C), bn.BatchNorm1d(C)
    mask = torch.ones(6, 1, 5, dtype=torch.bool)
    mask[2, :, 3:] = False
    x = batch((6, C, 5)).requires_grad_()
    poisoned = x.detach().masked_fill(~mask, float("nan")).requires_grad_()
    y, wanted = layer(poisoned, mask=mask), twin(x, mask=mask)
    assert_close(y[mask.expand_as(y)], wanted[mask.expand_as(y)])
    assert_same(state(layer), state(twin), SAME)
    for output in (y, wanted):
        output.where(mask, 0).square().sum().backward()
    assert_close(poisoned.grad, x.grad.where(mask, 0), rtol=0, atol=0)
    assert_close([p.grad for p in layer.parameters()], [p.grad for p in twin.parameters()], rtol=0, atol=0)


def test_a_full_mask_changes_nothing() -> None:
    theirs, ours = twins("1d")
    x = batch((6, C, 5))
    assert_same(run(ours, x, mask=torch.ones(6, 1, 5, dtype=torch.bool)), run(theirs, x))


def test_whole_weights_are_repetitions() -> None:
    theirs, ours = twins("1d", dtype=torch.float64)
    weights = torch.tensor([2, 1, 3, 1, 0, 2])
    x = batch((6, C), dtype=torch.float64)
    y = ours(x, mask=weights[:, None])
    assert_close(
        y[weights > 0].repeat_interleave(weights[weights > 0], 0), theirs(x.repeat_interleave(weights, 0))
    )
    assert_same(state(ours), state(theirs))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("shape", [(8, C, 5), (7, C, 2)], ids=str)
def test_ghost_batches_are_normalised_by_themselves(size: int, shape: tuple[int, ...]) -> None:
    theirs, ours = twins("1d", theirs={"dtype": torch.float64}, ghost_batch_size=size, dtype=torch.float64)
    x = batch(shape, dtype=torch.float64)
    got = run(ours, x)

    whole = nn.BatchNorm1d(C, dtype=torch.float64)
    whole.load_state_dict(theirs.state_dict())
    whole(x)

    def each(layer: nn.Module, x: Tensor) -> Tensor:
        return torch.cat(
            [F.batch_norm(part, None, None, layer.weight, layer.bias, True) for part in x.split(size)]
        )

    wanted = run_function(theirs, each, x)
    assert_same({name: got[name] for name in wanted}, wanted)
    # The running statistics move once, by the whole batch.
    assert_same(state(ours), state(whole))


def run_function(
    layer: nn.Module, function: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> dict[str, Tensor | None]:
    """As `run`, less the state, for a function of a layer's Parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = function(layer, x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y))
    gradients = {f"{name}.grad": parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, **gradients}


def test_a_leftover_of_one_value_joins_the_ghost_batch_before_it() -> None:
    layer = bn.BatchNorm1d(C, ghost_batch_size=3)
    x = batch((7, C))
    parts = [F.batch_norm(part, None, None, training=True) for part in (x[:3], x[3:])]
    assert_close(layer(x), torch.cat(parts))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_ghost_batches_keep_the_layout(memory_format: torch.memory_format, size: int) -> None:
    x = batch((6, C, 5, 4)).to(memory_format=memory_format)
    assert bn.BatchNorm2d(C, ghost_batch_size=size)(x).is_contiguous(memory_format=memory_format)


def renormed(layer: nn.Module, x: Tensor, r_max: float, d_max: float) -> Tensor:
    """Ioffe 2017, algorithm 1, over (N, C)."""
    mean, std = x.mean(0), (x.var(0, correction=0) + layer.eps).sqrt()
    running_std = (layer.running_var + layer.eps).sqrt()
    r = (std / running_std).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean) / running_std).clamp(-d_max, d_max).detach()
    return ((x - mean) / std * r + d) * layer.weight + layer.bias


@pytest.mark.parametrize("affine", [True, False])
def test_renorm_is_the_papers_algorithm_and_may_be_set_as_training_goes_on(affine: bool) -> None:
    schedule = [(1, 0), (1.2, 0.3), (3, 5)]
    plain, ours = twins("1d", theirs={"dtype": torch.float64}, renorm=True, dtype=torch.float64)
    if not affine:
        for layer in (plain, ours):
            layer.weight.data.fill_(1)
            layer.bias.data.zero_()
            layer.requires_grad_(False)
    for step, (r_max, d_max) in enumerate(schedule):
        ours.renorm = (r_max, d_max)
        assert ours.renorm == bn.Renorm(r_max, d_max)
        x = batch((6, C), seed=step, dtype=torch.float64)
        wanted = run_function(plain, partial(renormed, r_max=r_max, d_max=d_max), x)
        got = run(ours, x)
        assert_same({name: got[name] for name in wanted}, wanted)
        plain(x)  # moves torch.nn's running statistics, as plain batch norm would
        assert_same(state(ours), state(plain))
    ours.renorm = None
    assert_same(run(ours, x), run(plain, x))


def test_renorm_without_affine_equals_unit_weights() -> None:
    bare = bn.BatchNorm1d(C, renorm=True, affine=False)
    unit = bn.BatchNorm1d(C, renorm=True)
    for step in range(3):
        x = batch((6, C), seed=step)
        assert_close(bare(x), unit(x))


def test_renorm_that_may_correct_everything_is_eval_mode() -> None:
    # With r and d unclipped, ((x - mean) / std * r + d) is (x - running_mean) / running_std.
    layer = twins("1d", theirs={}, renorm=(1e6, 1e6), dtype=torch.float64)[1]
    x = batch((6, C), dtype=torch.float64)
    wanted = copy.deepcopy(layer).eval()(x)
    assert_close(layer(x), wanted)


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_by_dimension_equal_channels_second(
    shape: str, options: dict[str, Any], training: bool
) -> None:
    rank, size = SHAPES[shape]
    second = CLASSES[rank][1](C, **options)
    last = CLASSES[rank][1](C, channel_dim=-1, **options)
    for layer in (second, last):
        randomize(layer)
        layer.train(training)
    x, cotangent = batch(size), batch(size, seed=8)
    results = []
    for layer, dim in ((second, 1), (last, -1)):
        moved = x.movedim(1, dim).contiguous().requires_grad_()
        y = layer(moved)
        assert y.is_contiguous()
        y.backward(cotangent.movedim(1, dim))
        results.append(
            {
                "y": y.detach().movedim(dim, 1),
                "x.grad": moved.grad.movedim(dim, 1),
                "weight.grad": layer.weight.grad,
                "bias.grad": layer.bias.grad,
                **state(layer),
            }
        )
    assert_same(results[1], results[0])


def test_the_channel_dimension_may_be_in_the_middle_or_first() -> None:
    x = batch((4, C, 5, 2))
    wanted = bn.BatchNorm2d(C)(x)
    for dim in (0, 2, -2):
        layer = bn.BatchNorm2d(C, channel_dim=dim)
        assert_close(layer(x.movedim(1, dim)).movedim(dim, 1), wanted)


@pytest.mark.parametrize("correction", [0, 0.5, 1, 2])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_correction_is_of_the_running_variance_alone(correction: float, momentum: float | None) -> None:
    layer, plain = bn.BatchNorm1d(C, correction=correction, momentum=momentum), nn.BatchNorm1d(C)
    x = batch((6, C))
    assert_close(layer(x), plain(x))
    share = 1.0 if momentum is None else momentum
    deviations = (x - x.mean(0)).square().sum(0)
    assert_close(layer.running_var, (1 - share) + share * deviations / (6 - correction))
    assert_close(layer.running_mean, share * x.mean(0))


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"ghost_batch_size": 2}, {"renorm": True}], ids=str
)
def test_skip_nonfinite_leaves_everything_alone_for_that_batch(bad: float, options: dict[str, Any]) -> None:
    layer = bn.BatchNorm1d(C, skip_nonfinite=True, **options)
    twin = bn.BatchNorm1d(C, **options)
    good, better = batch((6, C)), batch((6, C), seed=1)
    poison = batch((6, C), seed=2)
    poison[4, 1] = bad
    layer(good)
    before = state(layer)
    y = layer(poison)
    assert not y[:, 1].isfinite().all()
    assert_same(state(layer), before, SAME)
    layer(better)
    twin(good)
    twin(better)
    assert layer.num_batches_tracked == 2
    assert_same(state(layer), state(twin))


def test_without_skip_nonfinite_one_batch_poisons_for_ever_as_in_torch() -> None:
    poison = batch((6, C))
    poison[4, 1] = float("inf")
    theirs, ours = twins("1d")
    for layer in (theirs, ours):
        layer(poison)
        layer(batch((6, C), seed=1))
        assert not layer.running_mean[1].isfinite()
        assert layer.running_mean[0].isfinite()
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=str)
@pytest.mark.parametrize("size", [(8, C), (1, C)], ids=str)
def test_eval_mode_with_an_option_is_plain_eval_mode(options: dict[str, Any], size: tuple[int, ...]) -> None:
    theirs, ours = twins("1d", theirs={}, **options)
    activation = ACTIVATIONS.get(options.get("activation"), nn.Identity())
    x = batch(size)
    assert_close(ours.eval()(x), activation(theirs.eval()(x)), rtol=0, atol=0)
    # A mask is of the statistics only, which are not taken here.
    mask = torch.zeros(size[0], 1, dtype=torch.bool)
    assert_close(ours(x, mask=mask), activation(theirs(x)), rtol=0, atol=0)
    assert_same(state(ours), state(theirs), SAME)


@pytest.mark.parametrize(
    "options", [{}, {"ghost_batch_size": 1}, {"ghost_batch_size": 4}, {"activation": "silu"}], ids=str
)
def test_eval_mode_without_statistics_is_by_the_whole_batch(options: dict[str, Any]) -> None:
    theirs, ours = twins("1d", theirs={"track_running_stats": False}, track_running_stats=False, **options)
    activation = ACTIVATIONS.get(options.get("activation"), nn.Identity())
    x = batch((8, C))
    assert_close(ours.eval()(x), activation(theirs.eval()(x)))


# What each option does in the pure function, it does in the layer.
CALLS = {
    "mask": ("mask",),
    "residual": ("residual",),
    "mask+residual": ("mask", "residual"),
}


@pytest.mark.parametrize("call", [(), *CALLS.values()], ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=str)
def test_a_layer_is_the_pure_function_with_memory(options: dict[str, Any], call: tuple[str, ...]) -> None:
    layer = bn.BatchNorm1d(C, **options)
    randomize(layer)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    for step in range(3):
        x = batch((8, C, 5), seed=step)
        mask = torch.rand(8, 1, 5, generator=torch.Generator().manual_seed(step)) < 0.8
        given = {"mask": mask, "residual": batch((8, C, 5), seed=step + 9)}
        inputs = {name: given[name] for name in call}
        wanted, mean, var = bn.batch_norm(
            x,
            layer.weight,
            layer.bias,
            mean,
            var,
            num_batches_tracked=step,
            **{"momentum": 0.1, **options},
            **inputs,
        )
        assert_close(layer(x, **inputs), wanted)
        assert_close(layer.running_mean, mean)
        assert_close(layer.running_var, var)
        assert layer.num_batches_tracked == step + 1


@pytest.mark.parametrize("momentum", [0.25, None])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_everything_together_equals_a_loop(channel_dim: int, momentum: float | None) -> None:
    size, ghost, r_max, d_max = (7, C, 4), 3, 1.5, 0.5
    layer = bn.BatchNorm1d(
        C,
        momentum=momentum,
        activation="silu",
        ghost_batch_size=ghost,
        renorm=(r_max, d_max),
        channel_dim=channel_dim,
        correction=0,
        skip_nonfinite=True,
        dtype=torch.float64,
    )
    randomize(layer)
    before = state(layer)
    x, residual = batch(size, dtype=torch.float64), batch(size, seed=1, dtype=torch.float64)
    mask = torch.rand(7, 1, 4, generator=torch.Generator().manual_seed(2)) < 0.7
    got = layer(*(tensor.movedim(1, channel_dim) for tensor in (x, residual, mask))).movedim(channel_dim, 1)

    for channel in range(C):
        kept, std0 = mask[:, 0], (before["running_var"][channel] + layer.eps).sqrt()
        for start in range(0, 7, ghost):
            part = slice(start, start + ghost)
            values = x[part, channel][kept[part]]
            std = (values.var(correction=0) + layer.eps).sqrt()
            r = (std / std0).clamp(1 / r_max, r_max)
            d = ((values.mean() - before["running_mean"][channel]) / std0).clamp(-d_max, d_max)
            normal = (x[part, channel] - values.mean()) / std * r + d
            z = normal * layer.weight[channel] + layer.bias[channel] + residual[part, channel]
            assert_close(got[part, channel], z * torch.sigmoid(z))
        share = 1.0 if momentum is None else momentum
        everything = x[:, channel][kept]
        mean = (1 - share) * before["running_mean"][channel] + share * everything.mean()
        var = (1 - share) * before["running_var"][channel] + share * everything.var(correction=0)
        assert_close(layer.running_mean[channel], mean)
        assert_close(layer.running_var[channel], var)
    assert layer.num_batches_tracked == 1


# ---------------------------------------------------------------------------- lazy layers

LAZY = {
    "1d": (nn.LazyBatchNorm1d, bn.LazyBatchNorm1d),
    "2d": (nn.LazyBatchNorm2d, bn.LazyBatchNorm2d),
    "3d": (nn.LazyBatchNorm3d, bn.LazyBatchNorm3d),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None, "eps": 1e-3},
        {"dtype": torch.float64},
        pytest.param({"bias": False}, marks=pytest.mark.skipif(not TAKES_BIAS, reason="no bias argument")),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_lazy_layer_becomes_the_real_one(shape: str, options: dict[str, Any]) -> None:
    rank, size = SHAPES[shape]
    theirs, ours = (lazy(**options) for lazy in LAZY[rank])
    assert isinstance(ours, LAZY[rank][0])
    x = batch(size, dtype=options.get("dtype", torch.float32))
    assert_same(run(ours, x), run(theirs, x))
    assert type(ours) is CLASSES[rank][1]
    assert ours.num_features == C
    assert repr(ours) == repr(CLASSES[rank][1](C, **options))
    assert_same(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=str)
def test_a_lazy_layer_keeps_its_options(options: dict[str, Any]) -> None:
    lazy, plain = bn.LazyBatchNorm1d(**options), bn.BatchNorm1d(C, **options)
    x, residual = batch((8, C, 5)), batch((8, C, 5), seed=1)
    mask = torch.ones(8, 1, 5, dtype=torch.bool)
    mask[3, :, 2:] = False
    assert_close(lazy(x, residual, mask=mask), plain(x, residual, mask=mask), rtol=0, atol=0)
    assert repr(lazy) == repr(plain)
    assert_same(state(lazy), state(plain), SAME)


def test_a_lazy_layer_finds_its_channels_along_channel_dim() -> None:
    layer = bn.LazyBatchNorm2d(channel_dim=-1)
    layer(torch.randn(2, 5, 4, C))
    assert layer.num_features == C
    assert layer.weight.shape == layer.running_mean.shape == (C,)


def test_a_lazy_layer_starts_in_eval_mode_too() -> None:
    layer = bn.LazyBatchNorm1d().eval()
    x = batch((6, C))
    assert_close(layer(x), x / (1 + layer.eps) ** 0.5)


@pytest.mark.parametrize("affine", [True, False])
def test_a_lazy_layer_loads_a_checkpoint_before_its_first_input(affine: bool) -> None:
    saved = nn.BatchNorm1d(C, affine=affine)
    randomize(saved)
    lazy = bn.LazyBatchNorm1d(affine=affine)
    lazy.load_state_dict(saved.state_dict(), strict=True)
    x = batch((6, C))
    assert_same(run(lazy, x), run(saved, x), SAME)
    assert type(lazy) is bn.BatchNorm1d
    assert lazy.num_features == C


def test_a_lazy_layer_of_a_checkpoint_rejects_other_channels() -> None:
    model = nn.Sequential(bn.LazyBatchNorm1d())
    model.load_state_dict(nn.Sequential(nn.BatchNorm1d(5)).state_dict())
    with pytest.raises(ValueError, match=r"BatchNorm1d '0': expected 5 channels .* got 3"):
        model(batch((6, C)))


def test_an_untouched_lazy_layer_may_be_saved() -> None:
    lazy = bn.LazyBatchNorm1d(activation="relu")
    twin = bn.LazyBatchNorm1d(activation="relu")
    twin.load_state_dict(lazy.state_dict())
    assert twin.has_uninitialized_params()
    x = batch((6, C))
    assert_close(twin(x), F.relu(nn.BatchNorm1d(C)(x)))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4, C, 2), ValueError, r"LazyBatchNorm2d 'body.0': expected 4D .*got 3D.*\(4, 3, 2\)"),
        (None, TypeError, "LazyBatchNorm2d 'body.0': expected a torch.Tensor, got NoneType"),
    ],
    ids=["rank", "None"],
)
def test_a_lazy_layer_names_what_is_wrong_and_still_works_after(
    x: Any, error: type[Exception], message: str
) -> None:
    model = nn.Sequential()
    model.body = nn.Sequential(bn.LazyBatchNorm2d())
    with pytest.raises(error, match=message):
        model(x)
    good = batch((4, C, 5, 2))
    assert_close(model(good), nn.BatchNorm2d(C)(good))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps=0.0 must be above 0"),
        ({"momentum": 2.0}, "momentum=2.0 is outside"),
        ({"activation": "relo"}, "unknown activation 'relo'"),
        ({"ghost_batch_size": 0}, "ghost_batch_size=0"),
        ({"correction": -1}, "correction=-1"),
        ({"renorm": True, "track_running_stats": False}, "needs track_running_stats=True"),
    ],
    ids=str,
)
def test_a_lazy_layer_checks_its_options_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bn.LazyBatchNorm1d(**options)


def test_a_lazy_layer_rejects_an_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="colour"):
        bn.LazyBatchNorm1d(colour="red")


# ---------------------------------------------------------------------------- the running statistics' memory


def graph_nodes(*tensors: Tensor) -> int:
    """Nodes of the autograd graph that `tensors` keep alive."""
    seen, todo = set(), [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return len(seen)


class Leaky(nn.BatchNorm1d):
    """The tutorial's mistake: a running average that is part of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0)
        return F.batch_norm(x, None, None, self.weight, self.bias, True)


def train(layer: nn.Module, steps: int) -> None:
    """Steps of a Linear, the layer, and a Linear, so that the batch's statistics depend on Parameters."""
    model = nn.Sequential(nn.Linear(C, C), layer, nn.Linear(C, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, C)).square().mean().backward()
        optimizer.step()


def test_the_count_of_graph_nodes_sees_a_leak() -> None:
    layer = Leaky(C)
    counts = []
    for _ in range(3):
        train(layer, 1)
        counts.append(graph_nodes(layer.running_mean))
    assert 0 < counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=str)
def test_running_statistics_keep_no_graph(options: dict[str, Any]) -> None:
    layer = bn.BatchNorm1d(C, **options)
    buffers = dict(layer.named_buffers())
    for steps in (1, 9, 40):  # 1, 10, 50 in all
        train(layer, steps)
        assert graph_nodes(*layer.buffers()) == 0
        for name, buffer in layer.named_buffers():
            assert buffer.grad_fn is None
            assert not buffer.requires_grad
            assert buffer is buffers[name]  # written in place: the state_dict of the optimizer, DDP, ... hold
    assert layer.num_batches_tracked == 50


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=str)
def test_a_step_is_forgotten_when_it_is_over(options: dict[str, Any]) -> None:
    layer = bn.BatchNorm1d(C, **options)
    x = batch((8, C)).requires_grad_()
    hidden = x * 2
    y = layer(hidden)
    gone = [weakref.ref(tensor) for tensor in (x, hidden, y)]
    y.sum().backward()
    del x, hidden, y
    assert [ref() for ref in gone] == [None, None, None]


class Scaled(nn.Module):
    """Cheap steps that put Parameters before and after the layer."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale) * self.scale


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]], ids=["plain", "everything"])
def test_memory_is_flat_over_a_thousand_steps(options: dict[str, Any]) -> None:
    # A step makes some 100 KB: one kept tensor per step would be 100 MB over a thousand of them.
    size = (200, 128)
    options = {**options, **({"ghost_batch_size": 50} if "ghost_batch_size" in options else {})}
    model = Scaled(bn.BatchNorm1d(size[1], **options), size[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def steps(number: int) -> None:
        for _ in range(number):
            optimizer.zero_grad()
            model(torch.randn(size)).square().mean().backward()
            optimizer.step()

    steps(200)
    tensors, before = tensors_alive(), allocated_kib()
    steps(1000)
    assert tensors_alive() <= tensors  # fewer, when what an earlier test left is collected meanwhile
    assert allocated_kib() - before < 4000


# ---------------------------------------------------------------------------- buffers overwritten by others


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=str)
def test_buffers_overwritten_between_forward_and_backward(options: dict[str, Any]) -> None:
    # DDP broadcasts buffers in place before every forward; two forwards, then a backward (pytorch#65907).
    layer = bn.BatchNorm1d(C, **options)
    randomize(layer)
    quiet = copy.deepcopy(layer)
    xs = [batch((8, C), seed=step) for step in range(2)]
    losses = []
    for x in xs:
        losses.append(layer(x).pow(3).sum())
        with torch.no_grad():
            for buffer in layer.buffers():
                buffer.copy_(buffer.clone())
    sum(losses).backward()
    sum(quiet(x).pow(3).sum() for x in xs).backward()
    assert_close(layer.weight.grad, quiet.weight.grad, rtol=0, atol=0)
    assert_close(layer.bias.grad, quiet.bias.grad, rtol=0, atol=0)


def test_torchs_layer_cannot_have_its_buffers_overwritten() -> None:
    layer = nn.BatchNorm1d(C)
    loss = layer(batch((8, C))).pow(3).sum()
    with torch.no_grad():
        layer.running_mean.copy_(layer.running_mean.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_eval_mode_overwriting_the_buffers_is_caught_as_in_torch() -> None:
    # There the backward reads them: another value would give another gradient, so autograd must object.
    for layer in twins("1d"):
        x = batch((8, C)).requires_grad_()
        loss = layer.eval()(x).pow(3).sum()
        with torch.no_grad():
            layer.running_var.mul_(4)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---------------------------------------------------------------------------- errors


class Net(nn.Module):
    """A layer two levels down: 'features.block.1'."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.block = nn.Sequential(nn.Identity(), layer)

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        return self.features.block[1](*args, **inputs)


ZEROS = torch.zeros(4, C)
DTYPES = "expected a float64, float32, bfloat16 or float16 tensor, got "
ONE_VALUE = "Expected more than 1 value per channel when training, got an input of shape "
WEIGHTS = torch.tensor([[1.0], [-1.0], [1.0], [1.0]])

# What it is -> (class, options, inputs, error, part of the message).
BAD_INPUTS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple, type[Exception], str]] = {
    "rank of 1d": (
        *(bn.BatchNorm1d, {}, (torch.zeros(4, C, 2, 2),), ValueError),
        "expected 2D (N, C) or 3D (N, C, L) input, got 4D input of shape (4, 3, 2, 2)",
    ),
    "rank of 2d": (
        *(bn.BatchNorm2d, {}, (ZEROS,), ValueError),
        "expected 4D (N, C, H, W) input, got 2D input of shape (4, 3)",
    ),
    "rank of 3d": (
        *(bn.BatchNorm3d, {}, (torch.zeros(4, C, 2, 2),), ValueError),
        "expected 5D (N, C, D, H, W) input, got 4D input of shape (4, 3, 2, 2)",
    ),
    "no batch": (
        *(bn.BatchNorm1d, {}, (torch.zeros(C),), ValueError),
        "got 1D input of shape (3,)",
    ),
    "channels": (
        *(bn.BatchNorm2d, {}, (torch.zeros(4, 5, 2, 2),), ValueError),
        "expected 3 channels (num_features) along dimension 1, got 5 in an input of shape (4, 5, 2, 2). "
        "Channels elsewhere? Say so with channel_dim",
    ),
    "channels, channels last": (
        *(bn.BatchNorm1d, {"channel_dim": -1}, (torch.zeros(4, C, 5),), ValueError),
        "expected 3 channels (num_features) along dimension 2, got 5",
    ),
    "no channel dim": (
        *(bn.BatchNorm1d, {"channel_dim": 2}, (ZEROS,), ValueError),
        "channel_dim=2 is no dimension of an input of shape (4, 3)",
    ),
    "one value": (
        *(bn.BatchNorm1d, {}, (torch.zeros(1, C),), ValueError),
        f"{ONE_VALUE}(1, 3): its variance would be 0. Use a larger batch, drop the last incomplete one with "
        "DataLoader(..., drop_last=True), or call eval()",
    ),
    "one value, channels last": (
        *(bn.BatchNorm2d, {"channel_dim": -1}, (torch.zeros(1, 1, 1, C),), ValueError),
        f"{ONE_VALUE}(1, 1, 1, 3)",
    ),
    "one value in a ghost batch": (
        *(bn.BatchNorm1d, {"ghost_batch_size": 1}, (ZEROS,), ValueError),
        f"{ONE_VALUE}(4, 3) with ghost_batch_size=1",
    ),
    "integers": (
        *(bn.BatchNorm1d, {}, (ZEROS.long(),), TypeError),
        f"{DTYPES}torch.int64: convert it first, for example x.float()",
    ),
    "complex": (*(bn.BatchNorm1d, {}, (ZEROS.cfloat(),), TypeError), f"{DTYPES}torch.complex64"),
    "float8": (
        *(bn.BatchNorm1d, {}, (ZEROS.to(torch.float8_e5m2),), TypeError),
        f"{DTYPES}torch.float8_e5m2",
    ),
    "None": (*(bn.BatchNorm1d, {}, (None,), TypeError), "expected a torch.Tensor, got NoneType"),
    "a list": (
        *(bn.BatchNorm1d, {}, ([[1.0, 2.0, 3.0]] * 4,), TypeError),
        "expected a torch.Tensor, got list: wrap it in torch.as_tensor",
    ),
    "residual": (
        *(bn.BatchNorm1d, {}, (ZEROS, torch.zeros(4, 1)), ValueError),
        "residual has shape (4, 1), expected the input's own, (4, 3): project the shortcut",
    ),
    "residual type": (
        *(bn.BatchNorm1d, {}, (ZEROS, 1.0), TypeError),
        "expected residual to be a torch.Tensor, got float",
    ),
    "mask": (
        *(bn.BatchNorm1d, {}, (torch.zeros(4, C, 2), None, torch.ones(4, 2)), ValueError),
        "mask of shape (4, 2) does not broadcast to the input's (4, 3, 2): give it the input's rank",
    ),
    "mask type": (
        *(bn.BatchNorm1d, {}, (ZEROS, None, [1]), TypeError),
        "expected mask to be a torch.Tensor, got list",
    ),
    "negative mask": (
        *(bn.BatchNorm1d, {}, (ZEROS, None, WEIGHTS), ValueError),
        "got a negative, infinite or NaN weight",
    ),
    "empty mask": (
        *(bn.BatchNorm1d, {}, (ZEROS, None, torch.zeros(4, 1)), ValueError),
        "the mask of shape (4, 1) is empty",
    ),
    "mask of one": (
        *(bn.BatchNorm1d, {}, (ZEROS, None, torch.eye(4)[:, :1].bool()), ValueError),
        "the mask of shape (4, 1) leaves a channel one",
    ),
}


@pytest.mark.parametrize(
    ("cls", "options", "inputs", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS
)
def test_a_bad_input_is_named_with_the_layer_and_the_remedy(
    cls: type[nn.Module], options: dict[str, Any], inputs: tuple, error: type[Exception], message: str
) -> None:
    layer = cls(C, **options)
    before = state(layer)
    with pytest.raises(error) as caught:
        Net(layer)(*inputs)
    assert str(caught.value).startswith(f"{cls.__name__} 'features.block.1': ")
    assert message in str(caught.value)
    assert_same(state(layer), before, SAME)
    with pytest.raises(error) as caught:
        layer(*inputs)
    assert str(caught.value).startswith(f"{cls.__name__}: ")


def test_one_value_per_channel_is_fine_in_eval_mode() -> None:
    theirs, ours = twins("1d")
    assert_close(ours.eval()(batch((1, C))), theirs.eval()(batch((1, C))))


def test_renorm_without_its_buffers_names_the_layer() -> None:
    layer = bn.BatchNorm1d(C, renorm=True)
    layer.running_mean = layer.running_var = None
    with pytest.raises(ValueError, match=r"BatchNorm1d 'features\.block\.1': renorm corrects towards"):
        Net(layer)(batch((6, C)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, r"eps=0 must be above 0.*1e-5"),
        ({"eps": -1e-5}, "eps=-1e-05 must be above 0"),
        ({"eps": float("nan")}, "eps=nan must be above 0"),
        ({"momentum": -0.1}, r"momentum=-0.1 is outside \[0, 1\].*Keras"),
        ({"momentum": 1.1}, r"momentum=1.1 is outside \[0, 1\]"),
        ({"momentum": float("nan")}, "momentum=nan is outside"),
        ({"activation": "rellu"}, "unknown activation 'rellu': expected None or one of relu, .*silu"),
        ({"ghost_batch_size": 0}, "ghost_batch_size=0 must be a whole number of samples, 1 or more"),
        ({"ghost_batch_size": -4}, "ghost_batch_size=-4"),
        ({"ghost_batch_size": 2.5}, "ghost_batch_size=2.5"),
        ({"ghost_batch_size": 4, "channel_dim": 0}, "splits the batch along dimension 0.*move the channels"),
        ({"renorm": True, "track_running_stats": False}, "renorm .*needs track_running_stats=True"),
        ({"renorm": (0.5, 1)}, r"renorm=\(0.5, 1\) is not understood: .*r_max >= 1"),
        ({"renorm": "yes"}, "renorm='yes' is not understood"),
        ({"correction": -1}, "correction=-1 must be 0 or more"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d])
def test_a_bad_option_is_named_with_the_remedy(
    cls: type[nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(C, **options)


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        bn.BatchNorm1d(C, colour="red")
    with pytest.raises(TypeError):
        bn.BatchNorm1d(C, 1e-5, 0.1, True, True, None, None, "relu")  # options are keywords


def test_setting_a_bad_renorm_later_leaves_the_old_one() -> None:
    layer = bn.BatchNorm1d(C, renorm=(2, 1))
    with pytest.raises(ValueError, match="is not understood"):
        layer.renorm = (0, 0)
    assert layer.renorm == bn.Renorm(2, 1)


def test_an_activation_set_later_is_checked_too() -> None:
    layer = bn.BatchNorm1d(C, activation="relu")
    with pytest.raises(ValueError, match="unknown activation 'swish': expected None or one of relu"):
        layer.activation = "swish"
    layer.activation = "tanh"
    assert layer(batch((8, C))).abs().max() < 1
