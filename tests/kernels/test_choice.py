"""A layer keeps the choice of its kernel for calls that are alike, and for no others."""

import copy
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import layers
from batchnorm.kernels import choice, choose, cpu, native
from batchnorm.kernels.choice import CALLS

SHAPE = (32, 64, 8, 8)
CHANNELS = SHAPE[1]
# A size for a kernel of ours, and one for torch's operator.
SHAPES = {cpu: SHAPE, native: (32, 16, 2, 2)}
OF_BOTH = pytest.mark.parametrize("kernel", SHAPES, ids=["ours", "torch's"])

pytestmark = pytest.mark.skipif(not cpu._work(), reason="no CPU kernels here")


class Choices:
    """How often layers choose, and what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []

        def counted(*args: Any) -> Any:
            self.made.append(choose(*args))
            return self.made[-1]

        monkeypatch.setattr(layers, "choose", counted)

    def during(self, call: Callable[[], Any]) -> int:
        before = len(self.made)
        call()
        return len(self.made) - before


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Choices:
    return Choices(monkeypatch)


def values(shape: tuple[int, ...] = SHAPE, **options: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), **options)


def kept_layer(kernel: Any = cpu, **options: Any) -> tuple[nn.Module, Tensor]:
    """A layer that has kept its choice, and the input that it has kept it for."""
    shape = SHAPES[kernel]
    layer, x = bn.BatchNorm2d(shape[1], **options), values(shape, requires_grad=True)
    for _ in range(CALLS):
        layer(x)
    return layer, x


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("training", "options"),
    [
        (True, {}),
        (True, {"affine": False}),
        (True, {"bias": False}),
        (True, {"track_running_stats": False}),
        (False, {}),
        (False, {"affine": False}),
    ],
)
@pytest.mark.parametrize(("kernel", "shape"), [(cpu, (256, *SHAPE[1:])), (native, (8, CHANNELS, 1, 1))])
def test_chooses_some_times_and_then_no_more(
    choices: Choices,
    kernel: Any,
    shape: tuple[int, ...],
    training: bool,
    residual: bool,
    options: dict[str, bool],
) -> None:
    layer = bn.BatchNorm2d(CHANNELS, activation="relu", **options).train(training)
    inputs = [values(shape, requires_grad=True) for _ in range(1 + residual)]
    assert [choices.during(lambda: layer(*inputs)) for _ in range(CALLS + 2)] == [1] * CALLS + [0, 0]
    assert set(choices.made) == {kernel}


@OF_BOTH
def test_other_tensors_that_are_alike_are_no_reason_to_choose(choices: Choices, kernel: Any) -> None:
    layer, first = kept_layer(kernel)
    for seed in range(3):
        x = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        fresh = bn.BatchNorm2d(layer.num_features)
        layer.load_state_dict(fresh.state_dict())
        layer.weight = nn.Parameter(torch.full((layer.num_features,), 2.0))
        fresh.weight = layer.weight
        assert choices.during(lambda x=x: layer(x)) == 0
        layer.load_state_dict(fresh.state_dict())
        assert torch.equal(layer(x), fresh(x))
        assert torch.equal(layer.running_var, fresh.running_var)


def test_shapes_that_change_with_every_call_are_not_compared(choices: Choices) -> None:
    layer = bn.BatchNorm2d(CHANNELS)
    for batch in [32, 33] * CALLS:
        assert choices.during(lambda batch=batch: layer(values((batch, *SHAPE[1:])))) == 1
    assert layer._choice._kept is None


def test_after_another_call_nothing_is_kept_for_some_time(choices: Choices) -> None:
    layer, x = kept_layer()
    assert choices.during(lambda: layer.eval()(x)) == 1
    assert [choices.during(lambda: layer.train()(x)) for _ in range(CALLS)] == [1] * (CALLS - 1) + [0]


# What a layer may meet after it has kept a choice: changes of the layer, of the tensors, and of what runs it.

CHANGES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "eval mode": lambda layer, x: layer.eval()(x),
    "batch": lambda layer, x: layer(x[:16]),
    "dtype": lambda layer, x: layer.double()(x.double()),
    "channels last": lambda layer, x: layer(x.contiguous(memory_format=torch.channels_last)),
    "strides": lambda layer, x: layer(x.transpose(2, 3)),
    "requires_grad": lambda layer, x: layer(x.detach()),
    "a residual": lambda layer, x: layer(x, x * 2),
    "itself as the residual": lambda layer, x: layer(x, x),
    "negative view": lambda layer, x: layer(torch._neg_view(x)),
    "subclass": lambda layer, x: layer(x.as_subclass(_Subclass)).as_subclass(Tensor),
    "half precision": lambda layer, x: layer(x.bfloat16()),
    "weight of another dtype": lambda layer, x: _other_weight(layer, torch.ones(x.shape[1]).double())(x),
    "weight with strides": lambda layer, x: _other_weight(layer, torch.arange(2.0 * x.shape[1])[::2])(x),
    "frozen weight": lambda layer, x: _frozen(layer)(x),
    "no weight": lambda layer, x: _set(layer, weight=None, bias=None)(x),
    "no running statistics": lambda layer, x: _set(layer, running_mean=None, running_var=None)(x),
    "activation": lambda layer, x: _set(layer, activation="silu")(x),
    "an activation that is not fused": lambda layer, x: _set(layer, activation="softplus")(x),
    "channel_dim": lambda layer, x: _set(layer, channel_dim=-1)(x.detach().movedim(1, -1).contiguous()),
    "ghost batches": lambda layer, x: _set(layer, ghost_batch_size=8)(x),
    "cumulative average": lambda layer, x: _set(layer, momentum=None)(x),
    "momentum": lambda layer, x: _set(layer, momentum=0.7)(x),
    "eps": lambda layer, x: _set(layer, eps=0.5)(x),
    "correction": lambda layer, x: _set(layer, correction=0)(x),
    "renorm": lambda layer, x: _set(layer, renorm=(1.5, 0.5))(x),
    "skip_nonfinite": lambda layer, x: _set(layer, skip_nonfinite=True)(x / 0),
    "untracked": lambda layer, x: _set(layer, track_running_stats=False)(x),
    "mask": lambda layer, x: layer(x, mask=torch.arange(x.shape[-1]) < x.shape[-1] - 1),
    "no gradients": lambda layer, x: _in(torch.no_grad(), layer, x),
    "inference mode": lambda layer, x: _in(torch.inference_mode(), layer, x).clone(),
    "autocast": lambda layer, x: _in(torch.autocast("cpu"), layer, x),
    "deterministic": lambda layer, x: _in(_deterministic(), layer, x),
    "dispatch mode": lambda layer, x: _in(_Watched(), layer, x),
    "forward-mode AD": lambda layer, x: _forward_mode(layer, x),
    "vmap": lambda layer, x: torch.func.vmap(_set(layer, track_running_stats=False))(x[None].detach())[0],
    "transform of something else": lambda layer, x: _under_transform(layer, x),
    "tracing": lambda layer, x: _traced(layer, x)(x),
    "checkpointed": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "memory-efficient": lambda layer, x: bn.memory_efficient(layer)(x),
    "three threads": lambda layer, x: _in(_threads(3), layer, x),
    "wrong channels": lambda layer, x: layer(x[:, :8]),
    "wrong rank": lambda layer, x: layer(x[0]),
    "num_features": lambda layer, x: _set(layer, num_features=8)(x),
    "integers": lambda layer, x: layer(x.detach().int()),
    "no tensor": lambda layer, x: layer([1.0]),
    "residual of another shape": lambda layer, x: layer(x, x[:1]),
    "empty": lambda layer, x: layer(x[:0]),
}
# Changes that no choice depends on.
HARMLESS = {"momentum", "eps", "untracked", "checkpointed"}


@OF_BOTH
@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_a_layer_does_what_a_new_one_does(choices: Choices, change: str, kernel: Any) -> None:
    layer, x = kept_layer(kernel, activation="relu")
    fresh = bn.BatchNorm2d(layer.num_features, activation="relu")
    fresh.load_state_dict(layer.state_dict())
    assert choices.during(lambda: layer(x)) == 0
    layer.load_state_dict(fresh.state_dict())
    found, expected = (_outcome(CHANGES[change], each, x) for each in (layer, fresh))
    assert found == expected
    again, expected = (_outcome(lambda layer, x: layer(x), each, x) for each in (layer, fresh))
    assert again == expected


@OF_BOTH
@pytest.mark.parametrize("change", sorted(CHANGES.keys() - HARMLESS))
def test_a_change_is_not_answered_by_the_choice_that_is_kept(
    change: str, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = kept_layer(kernel, activation="relu")
    monkeypatch.setattr(layer._choice, "_kept", (*layer._choice._kept[:2], (_NoKernel(), 1)))
    with pytest.raises(_Answered):
        layer(x)
    _outcome(CHANGES[change], layer, x)


class _Answered(Exception):
    pass


class _NoKernel:
    """In the place of a kernel that must not be called."""

    def __getattr__(self, name: str) -> Any:
        raise _Answered(name)


def _outcome(change: Callable[[nn.Module, Tensor], Any], layer: nn.Module, x: Tensor) -> Any:
    """What comes of it, to the bit: the output, gradients and statistics, or the error."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    try:
        y = change(layer, x)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    if y.requires_grad:
        y.backward(torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape))
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    return [_bits(tensor) for tensor in (y, *gradients, *layer.buffers())]


def _bits(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    bits = tensor.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, bits.numpy().tobytes()


def _set(layer: nn.Module, **options: Any) -> nn.Module:
    for name, value in options.items():
        setattr(layer, name, value)
    return layer


def _other_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.weight.data = weight
    return layer


def _frozen(layer: nn.Module) -> nn.Module:
    layer.weight.requires_grad_(False)
    return layer


def _in(context: Any, layer: nn.Module, x: Tensor) -> Tensor:
    with context:
        return layer(x)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _traced(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants
        return torch.jit.trace(layer, (x,), check_trace=False)


def _forward_mode(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(y).tangent
        assert tangent is not None
        return tangent


def _under_transform(layer: nn.Module, x: Tensor) -> Tensor:
    """The transform is of a number that the layer never sees."""
    outputs = []

    def loss(number: Tensor) -> Tensor:
        with torch.no_grad():
            outputs.append(_set(layer, track_running_stats=False)(x.detach()))
        return number * 2

    torch.func.grad(loss)(torch.tensor(1.0))
    return outputs[0]


class _Subclass(Tensor):
    pass


class _Watched(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_deep_copies_and_pickles_begin_anew(choices: Choices) -> None:
    layer, x = kept_layer()
    # Not from elsewhere: the pickle is this test's own.
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert choices.during(lambda other=other: other(x)) == 1
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.eval()(x), copy.deepcopy(layer).eval()(x))


def test_without_torchs_comparison_every_call_chooses(
    choices: Choices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_TensorGuards", None)
    layer = bn.BatchNorm2d(CHANNELS)
    assert [choices.during(lambda: layer(values())) for _ in range(CALLS + 2)] == [1] * (CALLS + 2)


def test_nothing_is_kept_alive() -> None:
    layer, x = kept_layer()
    assert layer._choice._kept is not None
    alive = weakref.ref(x)
    del x
    assert alive() is None


def test_fused_layers_keep_theirs_and_that_of_waiting(choices: Choices) -> None:
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    x = values(requires_grad=True)
    assert [choices.during(lambda: model(x)) for _ in range(CALLS + 2)] == [2] * CALLS + [0, 0]
    assert choices.during(lambda: model(x[:16])) == 2


def test_revert_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU())
    before = set(model[0].__dict__)
    bn.convert(model)
    for _ in range(CALLS):
        model(values(requires_grad=True))
    assert None not in (model[0]._choice._kept, model[0]._wait_choice._kept)
    assert set(bn.revert(model)[0].__dict__) == before
