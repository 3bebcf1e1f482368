"""Tests of fold on what libraries write: norm-act layers, frozen and functional ones, untraceable code."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import registry
from batchnorm.model.folding.arithmetic import MultiplyAdd
from batchnorm.model.nested import tensors_in

C = 4


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_found", {})
    bn.register(NormAct, activation=lambda layer: (layer.drop, layer.act))
    bn.register(FrozenAct, activation=lambda layer: layer.act)


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Frozen(nn.Module):
    """As in detection models: buffers alone, and no eps of its own."""

    def __init__(self, channels: int = C) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-4).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class FrozenAct(Frozen):
    def __init__(self, channels: int = C) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class FrozenByFunction(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Learns(Frozen):
    """Has the buffers of a frozen one, and moves one in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean += 0.1
        return super().forward(x)


class Of(nn.Module):
    """A model whose forward is a function of its layers and the input."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class WithOptions(Of):
    def forward(self, x: Tensor, **options: Any) -> Any:  # type: ignore[override]
        return self.function(self, x, **options)


@torch.no_grad()
def seasoned(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                if tensor is not None:
                    tensor.uniform_(0.5, 1.5)
    return model


def checked(model: nn.Module, example: Any, **options: Any) -> nn.Module:
    """The folded copy, once its output is seen to be that of the model, which is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = bn.fold(model, example, **options)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    with torch.no_grad():
        got, wanted = (list(tensors_in(m(*args, **kwargs))) for m in (folded, copy.deepcopy(model).eval()))
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert folded.fold_report.error_float64 <= 1e-12
    return folded


def pairs(folded: nn.Module) -> list[str]:
    return [str(entry) for entry in folded.fold_report.folded]


def images(size: int = 6) -> Tensor:
    return torch.randn(3, C, size, size)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(C, C, 3, **options)


# Norm-act layers.


@pytest.mark.parametrize(
    "act", [nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(), nn.LeakyReLU(0.3), nn.Identity()]
)
@pytest.mark.parametrize("convert", [False, True])
def test_norm_act_layers_keep_what_they_apply(act: nn.Module, convert: bool) -> None:
    model = seasoned(nn.Sequential(conv(), NormAct(C, act), nn.MaxPool2d(2), NormAct(C, copy.deepcopy(act))))
    names = [name for name, _ in model[1].named_parameters() if name.startswith("act")]
    if convert:
        bn.convert(model)
    folded = checked(model, images())
    assert pairs(folded) == ["NormAct '1' -> Conv2d '0'"]
    assert len(folded.fold_report.multiply_adds) == 1
    assert not any(isinstance(layer, _BatchNorm) for layer in folded.modules())
    assert [name for name, _ in folded[1].named_parameters()] == names
    if not isinstance(act, nn.Identity):
        assert type(folded[1].act) is type(act)
        assert type(folded[3].act) is type(act)
    assert_close(pickle.loads(pickle.dumps(folded))(x := images()), folded(x))
    assert [
        node for node in torch.export.export(folded, (x,)).graph.nodes if "norm" in str(node.target)
    ] == []


def test_a_norm_act_layer_that_applies_nothing_passes_on() -> None:
    model = seasoned(nn.Sequential(nn.ReLU(), NormAct(C, nn.Identity()), conv()))
    assert pairs(checked(model, images())) == ["NormAct '1' -> Conv2d '2'"]


# Frozen ones.


@pytest.mark.parametrize("kind", [Frozen, FrozenAct, FrozenByFunction])
def test_frozen_batch_norms_are_folded(kind: type[Frozen]) -> None:
    model = nn.Sequential(conv(), kind(), nn.ReLU(), kind(), conv())
    folded = checked(model, images())
    assert not any(isinstance(layer, Frozen) for layer in folded.modules())
    assert pairs(folded)[0] == f"{kind.__name__} '1' -> Conv2d '0'"
    assert len(pairs(folded)) == (1 if kind is FrozenAct else 2)
    report = bn.conversion_report(model)
    assert [entry.reason[:12] for entry in report.left] == ["it is frozen"] * 2


@pytest.mark.parametrize("verb", [bn.convert, bn.freeze, bn.reset])
def test_verbs_that_have_nothing_to_do_there_say_so(verb: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match=r"2 batch norms of Sequential are frozen for good, as Frozen '1'"):
        verb(nn.Sequential(conv(), Frozen(), nn.ReLU(), Frozen()))
    with pytest.raises(ValueError, match="are frozen for good"):
        bn.recalibrate(nn.Sequential(Frozen()), [images()])
    mixed = nn.Sequential(conv(), Frozen(), nn.BatchNorm2d(C))
    verb(mixed)
    assert type(mixed[1]) is Frozen


def test_what_moves_in_training_is_not_frozen() -> None:
    with pytest.raises(ValueError, match="no batch norm in Sequential"):
        bn.fold(nn.Sequential(conv(), Learns()), images())


def test_the_doctor_takes_frozen_ones_as_constants() -> None:
    model = nn.Sequential(conv(), Frozen(), nn.ReLU(), nn.Conv2d(C, C, 3), nn.BatchNorm2d(C))
    for _ in range(20):
        model(images())
    for mode in (True, False):
        report = bn.diagnose(model.train(mode), [5 * images() + 20 for _ in range(3)])
        assert [f for f in report.findings if f.layer == "1" and f.severity != "note"] == []


# Functional ones.


class Functional(nn.Module):
    """Two calls in one forward, an expression as a scale, and what others read."""

    def __init__(self, flag: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2, self.unused = conv(), conv(), nn.Linear(2, 2)
        for i in (1, 2):
            self.register_buffer(f"mean{i}", torch.randn(C))
            self.register_buffer(f"var{i}", torch.rand(C) + 0.5)
        self.gain, self.shift, self.note = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C)), "kept"

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv1(x), self.mean1, self.var1, self.gain + 1, self.shift, self.training)
        y = torch.batch_norm(
            F.relu(y), None, self.shift, self.mean2, self.var2, self.training, 0.1, 1e-3, False
        )
        return self.conv2(y)


def test_functional_batch_norms_are_folded() -> None:
    model = Functional()
    folded = checked(model, images())
    assert pairs(folded) == [
        "batch_norm() in Functional -> Conv2d 'conv1'", "batch_norm() in Functional -> Conv2d 'conv2'"
    ]  # fmt: skip
    assert (folded.note, type(folded.unused)) == ("kept", nn.Linear)
    assert set(folded.state_dict()) == {
        f"{name}.{tensor}" for name in ("conv1", "conv2", "unused") for tensor in ("weight", "bias")
    }
    assert_close(pickle.loads(pickle.dumps(folded))(x := images()), folded(x))


def test_a_functional_one_in_a_part_and_one_that_is_left() -> None:
    class Part(Functional):
        def forward(self, x: Tensor) -> Tensor:
            y = F.batch_norm(F.relu(x), self.mean1, self.var1, training=self.training)
            return F.batch_norm(F.relu(y), None, None, training=True) + y

    model = seasoned(nn.Sequential(conv(), nn.BatchNorm2d(C), Part()))
    folded = checked(model, images())
    assert pairs(folded) == ["BatchNorm2d '1' -> Conv2d '0'"]
    report = folded.fold_report
    assert [entry.layer for entry in report.multiply_adds] == ["batch_norm() in Part '2'"]
    assert isinstance(folded[2].batch_norm_0, MultiplyAdd)


def test_statistics_that_are_computed_are_no_constants() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.batch_norm(m.conv(x), x.mean((0, 2, 3)), m.var)

    model = Of(forward, conv=conv())
    model.register_buffer("var", torch.rand(C) + 0.5)
    folded = checked(model, images())
    assert "its running_mean is no constant" in str(folded.fold_report)


# Weights of subclasses.


class SamePadding(nn.Conv2d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1), value=0.3))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std(
            (1, 2, 3), keepdim=True
        )
        return F.conv2d(x, weight, self.bias)


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.2, 0.2)


def test_a_subclass_is_folded_where_its_weights_scale_its_output() -> None:
    model = seasoned(nn.Sequential(SamePadding(C, C, 3), nn.BatchNorm2d(C)))
    assert pairs(checked(model, images())) == ["BatchNorm2d '1' -> SamePadding '0'"]
    for other, norm in ((Standardised(C, C, 3), nn.BatchNorm2d(C)), (Clipped(6, 6), nn.BatchNorm2d(C))):
        folded = checked(seasoned(nn.Sequential(other, norm)), images())
        assert pairs(folded) == []
        assert len(folded.fold_report.multiply_adds) == 1


# Shapes.

RESHAPED: dict[str, tuple[Callable[[Any, Tensor], Tensor], nn.Module, nn.Module, tuple[int, ...]]] = {
    "as LeViT": (
        lambda m, x: m.norm((y := m.fc(x)).flatten(0, 1)).reshape_as(y),
        nn.Linear(5, C), nn.BatchNorm1d(C), (2, 7, 5),
    ),
    "a generator": (
        lambda m, x: m.norm(m.fc(x).view(-1, C, 2, 3)), nn.Linear(5, 6 * C), nn.BatchNorm2d(C), (3, 5)
    ),
    "channels first and back": (
        lambda m, x: m.norm(m.fc(x).movedim(-1, 1)).movedim(1, -1),
        nn.Linear(5, C), nn.BatchNorm1d(C), (2, 7, 5)
    ),
    "squeezed": (
        lambda m, x: m.norm(m.fc(x[..., None, None]).squeeze(3).squeeze(2)),
        nn.Conv2d(5, C, 1), nn.BatchNorm1d(C), (3, 5),
    ),
    "shape is asked for": (
        lambda m, x: m.norm(y := m.fc(x)) * (y.shape[1] + y.size(0)),
        nn.Linear(5, C), nn.BatchNorm1d(C), (3, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESHAPED)
def test_through_changes_of_shape(name: str) -> None:
    function, fc, norm, shape = copy.deepcopy(RESHAPED[name])
    folded = checked(seasoned(Of(function, fc=fc, norm=norm)), torch.randn(shape))
    assert pairs(folded) == [f"{type(norm).__name__} 'norm' -> {type(fc).__name__} 'fc'"]
    assert folded.fold_report.by_example == ()


@pytest.mark.parametrize(
    "mixes",
    [
        lambda y: y.transpose(1, 2).reshape(2, C, 7),
        lambda y: y.flatten().view(2, C, 7),
        lambda y: y.flip(-1).mT,
    ],
)
def test_not_through_what_mixes_channels(mixes: Callable[[Tensor], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.norm(mixes(m.fc(x)))

    model = seasoned(Of(forward, fc=nn.Linear(5, C), norm=nn.BatchNorm1d(C)))
    x = torch.randn(2, 7, 5)
    folded = checked(model, x)
    linear = bool((mixes(torch.arange(56.0).view(2, 7, C)) == torch.arange(56.0).view(2, 7, C).mT).all())
    assert len(pairs(folded)) == int(linear)


# Code that torch.fx cannot trace.


def block() -> dict[str, nn.Module]:
    return {"conv": conv(padding=1), "norm": nn.BatchNorm2d(C), "other": conv(padding=1)}


def test_pairs_of_untraceable_code_are_followed_on_the_example() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max() > 0)):
            x = m.norm(m.conv(x))
        return m.other(x)

    folded = checked(seasoned(Of(forward, **block())), images())
    assert pairs(folded) == ["BatchNorm2d 'norm' -> Conv2d 'conv'"]
    assert folded.fold_report.by_example == ("BatchNorm2d 'norm'",)
    assert "as the example shows (1)\n  BatchNorm2d 'norm'" in str(folded.fold_report)


def test_what_holds_for_the_example_alone_is_not_folded() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.norm(y) if x.sum() > 0 else m.other(y)

    model, x = seasoned(Of(forward, **block())), images().abs()
    folded = checked(model, x)
    assert pairs(folded) == []
    assert folded.fold_report.by_example == ()
    assert_close(folded(-x), copy.deepcopy(model).eval()(-x))


def test_a_batch_norm_whose_output_goes_elsewhere_on_another_path() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(F.relu(x))
        return m.other(y) if x.sum() > 0 else y

    model, x = seasoned(Of(forward, **block())), images().abs()
    model.other = nn.Conv2d(C, C, 3)
    folded = checked(model, x)
    assert len(folded.fold_report.multiply_adds) == 1
    assert_close(folded(-x), copy.deepcopy(model).eval()(-x))


def test_a_sequential_that_is_iterated_and_never_called() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        saved = []
        for layer in m.layers:
            x = layer(x)
            saved.append(x)
        return x + saved[1].mean()

    parts = [nn.Sequential(conv(padding=1), nn.BatchNorm2d(C), nn.SiLU()) for _ in range(3)]
    folded = checked(seasoned(Of(forward, layers=nn.Sequential(*parts))), images())
    assert len(pairs(folded)) == 3
    assert folded.fold_report.by_example == ()


@torch.jit.ignore
def _double(x: Tensor) -> Tensor:
    return 2 * x


class Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x.sigmoid()


READERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "an autograd function": lambda m, y: Reads.apply(y),
    "a property of values": lambda m, y: y.abs().amax(),
    "an item": lambda m, y: float(y.sum()),
    "a list": lambda m, y: y.sum().tolist(),
    "a view of it": lambda m, y: y.flatten()[:3].sum(),
    "in place": lambda m, y: y[:, :1].mul_(0.5),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("untraceable", [False, True])
def test_whoever_else_reads_what_is_between_is_seen(name: str, untraceable: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if untraceable and x.sum() == 0:
            return x
        y = m.conv(x)
        other = READERS[name](m, y)
        z = m.norm(y)
        return z + (other.sum() if isinstance(other, Tensor) else other)

    folded = checked(seasoned(Of(forward, **block())), images())
    assert pairs(folded) == []


def test_outputs_and_hooks_read_too() -> None:
    returned = seasoned(Of(lambda m, x: {"y": (y := m.conv(x)), "z": [m.norm(y)]}, **block()))
    assert pairs(checked(returned, images())) == []
    inner = nn.Sequential(conv(padding=1))
    hooked = Of(lambda m, x: m.norm(m.inner(x)) * int(x.sum() != 0), inner=inner, norm=nn.BatchNorm2d(C))
    inner.register_forward_hook(lambda module, args, y: y * 2)
    assert pairs(checked(seasoned(hooked), images())) == []


# Inputs and outputs.


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


@pytest.mark.parametrize("wrap", [lambda y: Output(y, (y, y)), lambda y: {"y": y}, lambda y: (y, [y])])
def test_any_output_and_keyword_inputs(wrap: Callable[[Tensor], Any]) -> None:
    def forward(m: Any, x: Tensor, scale: float = 1.0, names: Any = None) -> Any:
        return wrap(m.norm(m.conv(x)) * scale)

    model = seasoned(WithOptions(forward, **block()))
    folded = checked(model, {"x": images(), "scale": 2.0, "names": ["a"]})
    assert pairs(folded) == ["BatchNorm2d 'norm' -> Conv2d 'conv'"]


def test_a_sensitive_model_is_compared_by_how_far_it_moves_itself() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        return torch.sin(1e7 * y)

    folded = bn.fold(seasoned(Of(forward, **block())), images())
    report = folded.fold_report
    assert 1e-9 < report.error_float64 < report.tolerance


def test_the_filter_of_functions_and_of_nothing() -> None:
    model = Functional()
    assert pairs(
        bn.fold(nn.Sequential(model, nn.BatchNorm2d(C)), images(), filter=lambda n, m: n != "0")
    ) == ["BatchNorm2d '1' -> Conv2d '0.conv2'"]
    with pytest.raises(ValueError, match="filter is true for none of the 2 batch norms"):
        bn.fold(model, images(), filter=lambda name, layer: False)
