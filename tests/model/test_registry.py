"""Tests of register, and of what convert makes of batch norm classes that are not torch.nn's own."""

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import registry

C = 4


class NormAct(nn.BatchNorm2d):
    """As timm's: it carries its dropout and its activation."""

    def __init__(self, channels: int = C, act: Any = None, drop: Any = None, **options: Any) -> None:
        super().__init__(channels, **options)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Inherits(NormAct):
    """Keeps the forward."""


class Overrides(NormAct):
    """Does not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Plain(nn.BatchNorm2d):
    """Adds a method and an attribute, and no forward."""

    def __init__(self, channels: int = C) -> None:
        super().__init__(channels)
        self.note = "kept"

    def double_eps(self) -> float:
        return 2 * self.eps


class AnyShape(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim > 4:
            raise ValueError("too many dimensions for this class")


class HasGhost(nn.BatchNorm2d):
    ghost_batch_size = 3


class PowerAct(nn.Module):
    """An activation with a parameter, which the layers do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0.1) ** self.power


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_found", {})
    bn.register(NormAct, activation=lambda layer: (layer.drop, layer.act))


def net(*layers: nn.Module) -> nn.Module:
    parts = [part for layer in layers for part in (nn.Conv2d(C, C, 3, padding=1), layer)]
    model = nn.Sequential(*parts).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return model


def steps(model: nn.Module, x: Tensor) -> list[Any]:
    """Outputs, gradients and state of a training step and of eval mode."""
    found: list[Any] = []
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        torch.manual_seed(1)
        y = model(x)
        y.sin().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found += [y.detach(), grads, {name: t.clone() for name, t in model.state_dict().items()}]
    return found


LAYERS = {
    "relu in place": lambda: NormAct(),
    "silu": lambda: NormAct(act=nn.SiLU()),
    "leaky slope of another kind": lambda: NormAct(act=nn.LeakyReLU(0.3)),
    "an activation with parameters": lambda: NormAct(act=PowerAct()),
    "no activation": lambda: NormAct(act=nn.Identity()),
    "dropout before": lambda: NormAct(drop=nn.Dropout2d(0.4)),
    "cumulative": lambda: NormAct(momentum=None),
    "no statistics": lambda: NormAct(track_running_stats=False),
    "no affine": lambda: NormAct(affine=False),
    "a subclass that inherits": lambda: Inherits(act=nn.Hardswish()),
    "a plain subclass": lambda: Plain(),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_computes_and_learns_the_same_and_goes_back(make: Any) -> None:
    model = net(make(), make())
    twin, x = copy.deepcopy(model), torch.randn(5, C, 6, 6).double()
    classes, keys = [type(m) for m in model.modules()], [sorted(vars(m)) for m in model.modules()]
    parameters, state = list(map(id, model.parameters())), list(model.state_dict())
    assert bn.convert(model) is model
    assert all(isinstance(model[i], (bn.BatchNorm2d, type(twin[i]))) for i in (1, 3))
    assert isinstance(model[1], bn.BatchNorm2d)
    assert isinstance(model[1], type(twin[1]))
    assert list(map(id, model.parameters())) == parameters
    assert list(model.state_dict()) == state
    again = pickle.loads(pickle.dumps(model))
    wanted = steps(copy.deepcopy(twin), x)
    for one in (copy.deepcopy(model), again, model):
        assert_close(steps(one, x), wanted, rtol=1e-9, atol=1e-10)
    bn.revert(again)
    bn.revert(model)
    for one in (model, again):
        assert [type(m) for m in one.modules()] == classes
        assert [sorted(vars(m)) for m in one.modules()] == keys


@pytest.mark.parametrize(
    ("make", "activation"),
    [
        (lambda: NormAct(), "relu"),
        (lambda: NormAct(act=nn.SiLU()), "silu"),
        (lambda: NormAct(drop=nn.Dropout(0.1)), None),
        (lambda: NormAct(act=PowerAct()), None),
        (lambda: Plain(), None),
    ],
)
def test_a_known_activation_becomes_the_layers_own(make: Any, activation: str | None) -> None:
    model = bn.convert(net(make()))
    assert model[1].activation == activation
    assert (f"activation={activation!r}" in repr(model)) == (activation is not None)


def test_what_a_subclass_has_stays() -> None:
    layer = bn.convert(net(Plain()))[1]
    assert (layer.note, layer.double_eps()) == ("kept", 2e-5)


def test_an_activation_that_is_replaced_or_hooked_later_takes_effect() -> None:
    model = bn.convert(net(NormAct()))
    x, seen = torch.randn(5, C, 6, 6).double(), []
    assert (model(x) >= 0).all()
    model[1].act = nn.Tanh()
    assert (model(x) < 0).any()
    model[1].act.register_forward_hook(lambda module, args, y: seen.append(y) or y * 0)
    assert (model(x) == 0).all()
    assert len(seen) == 1


def test_the_activation_of_its_class_cannot_be_overruled() -> None:
    model = bn.convert(net(NormAct()))
    with pytest.raises(ValueError, match="replace that in the layer"):
        model[1].activation = "tanh"


def test_residual_and_mask_come_before_what_the_class_applies() -> None:
    model = bn.convert(net(NormAct(drop=nn.Identity(), act=PowerAct())))
    layer, plain = model[1].eval(), bn.BatchNorm2d(C).double().eval()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "act" not in k})
    x, residual = torch.randn(2, 5, C, 6, 6).double()
    assert_close(layer(x, residual), layer.act(plain(x) + residual))


def test_a_forward_nobody_knows_stays_and_is_named_with_the_line_that_registers_it() -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), Overrides(), nn.BatchNorm2d(C))
    line = r"bn\.register\(Overrides, activation=lambda layer: \.\.\.\)"
    with pytest.warns(UserWarning, match=rf"left as they are: Overrides '1' .*{line}"):
        bn.convert(model)
    assert type(model[1]) is Overrides
    assert isinstance(model[2], bn.BatchNorm2d)
    report = bn.conversion_report(model)
    assert [entry.layer for entry in report.taken] == ["BatchNorm2d '2'"]
    assert [entry.layer for entry in report.left] == ["Overrides '1'"]
    assert "bn.register(Overrides" in str(report)


def test_its_own_check_of_inputs_stays() -> None:
    model = bn.convert(nn.Sequential(AnyShape(C)))
    assert isinstance(model[0], bn.layers._BatchNorm)
    assert model(torch.randn(5, C)).shape == (5, C)
    assert model(torch.randn(5, C, 3, 3)).shape == (5, C, 3, 3)
    with pytest.raises(ValueError, match=r"AnyShape.*too many dimensions for this class"):
        model(torch.randn(5, C, 3, 3, 3))


def test_a_class_with_an_attribute_of_ours_is_left() -> None:
    with pytest.warns(UserWarning, match="HasGhost '0' .*ghost_batch_size"):
        bn.convert(nn.Sequential(HasGhost(C), nn.BatchNorm2d(C)))


@pytest.mark.parametrize(
    ("activation", "says"),
    [
        (lambda layer: None, "differ by"),
        (lambda layer: layer.drop, "differ by"),
        (lambda layer: "sigmoid", "differ by"),
        (lambda layer: layer.missing, "failed: AttributeError"),
        (lambda layer: 3, "gave 3: expected"),
        (lambda layer: ("relu", "no such"), "gave 'no such'"),
    ],
)
def test_a_mapping_that_is_wrong_is_an_error_and_changes_nothing(activation: Any, says: str) -> None:
    bn.register(NormAct, activation=activation)
    model = nn.Sequential(nn.BatchNorm2d(C), NormAct())
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    with pytest.raises((TypeError, ValueError), match=f"NormAct '1'.*{says}"):
        bn.convert(model)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before


@pytest.mark.parametrize(
    ("cls", "activation"), [(NormAct(), None), (3, None), (Tensor, None), (NormAct, "relu")]
)
def test_what_cannot_be_registered(cls: Any, activation: Any) -> None:
    with pytest.raises(TypeError, match="register: expected"):
        bn.register(cls, activation=activation)


def test_a_function_or_a_name_can_be_registered() -> None:
    class Functional(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.silu(super().forward(x)))

    assert bn.register(Functional, activation=lambda layer: ("silu", F.relu)) is Functional
    model = net(Functional(C))
    twin = copy.deepcopy(model)
    bn.convert(model)
    x = torch.randn(5, C, 6, 6).double()
    assert model[1].activation == "silu"
    assert_close(steps(model, x), steps(twin, x))


def test_a_model_of_which_nothing_can_be_taken_says_which_and_why() -> None:
    model = nn.Sequential(Overrides(), HasGhost(C))
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(ValueError, match=r"no batch norm can be taken: Overrides '0' .*; HasGhost '1' \("):
        bn.convert(model)
    assert [dict(vars(m)) for m in model.modules()] == before


def test_a_pickle_says_what_to_register_where_its_class_is_not(tmp_path: Any) -> None:
    """The classes stand in a file of their own: another process has to import them."""
    (tmp_path / "own_layers.py").write_text(
        "from torch import nn\n"
        "class Act(nn.BatchNorm2d):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).relu()\n"
    )
    write = (
        "import pickle, torch, batchnorm as bn, own_layers\n"
        "bn.register(own_layers.Act, activation=lambda layer: 'relu')\n"
        "model = bn.convert(torch.nn.Sequential(own_layers.Act(4)))\n"
        "open('model.pkl', 'wb').write(pickle.dumps(model))\n"
    )
    read = (
        "import pickle, torch, batchnorm as bn\n"
        "model = pickle.loads(open('model.pkl', 'rb').read())\n"
        "try:\n"
        "    model(torch.randn(3, 4, 2, 2))\n"
        "except TypeError as error:\n"
        "    print(error)\n"
        "import own_layers\n"
        "bn.register(own_layers.Act, activation=lambda layer: 'relu')\n"
        "print(bool((model(torch.randn(3, 4, 2, 2)) >= 0).all()))\n"
    )
    for code in (write, read):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "bn.register(Act, activation=...) first" in done.stdout
    assert done.stdout.endswith("True\n")
