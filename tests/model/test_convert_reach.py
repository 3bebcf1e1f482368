"""Tests of what convert fuses in the forms that libraries write, such as modules that end in a batch norm."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model.fusion import waiting
from batchnorm.model.fusion.waiting import Waiting

C = 4


@pytest.fixture(autouse=True)
def _seed_and_small_inputs_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        waiting._Fusing, "_fuses", lambda layer, x: bool(layer._check_input(x, None, None, None))
    )
    torch.manual_seed(0)


class ConvNorm(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), norm or nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Outer(nn.Module):
    """Returns what another module returns of its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(C, C, 1), ConvNorm())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Padded(nn.Module):
    """As transformers' MobileNets: computes with sizes, and has an argument with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU6()

    def forward(self, x: Tensor, use_activation: bool = True) -> Tensor:
        height, width = x.shape[-2:]
        pad = max(3 - int(height) % 3, 1)
        x = F.pad(x, (pad, pad, pad, pad if width > 2 else 0))
        x = self.norm(self.conv(x))
        return self.activation(x) if use_activation else x


class SiLUActivation(nn.Module):
    """As transformers': nobody's subclass, and one call."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input)


class CountsCalls(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(x)


class Block(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def block(function: Callable[[Any, Tensor], Any]) -> Block:
    return Block(function, a=ConvNorm(), b=ConvNorm(), outer=Outer(), relu=nn.ReLU(), idle=nn.Identity())


# The model, and how many layers run with what follows them.
FUSED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a module that returns its output": (lambda: block(lambda m, x: m.relu(m.a(x))), 1),
    "through two modules and a Sequential": (lambda: block(lambda m, x: m.relu(m.outer(x))), 1),
    "an add after that": (lambda: block(lambda m, x: m.relu(m.b(m.relu(m.a(x))) + x)), 2),
    "added in place": (lambda: block(lambda m, x: m.b(m.relu(m.a(x))).add_(x).relu_()), 2),
    "identity before the activation": (lambda: block(lambda m, x: m.relu(m.idle(m.a(x)))), 1),
    "identity before the add": (lambda: block(lambda m, x: m.relu(m.idle(m.a(x)) + x)), 1),
    "identity in a Sequential": (
        lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Identity(), nn.Identity(), nn.SiLU()),
        1,
    ),
    "in a Sequential": (lambda: nn.Sequential(ConvNorm(), nn.ReLU(), Outer(), nn.Hardswish()), 2),
    "sizes and default arguments": (Padded, 1),
    "somebody's activation": (lambda: nn.Sequential(ConvNorm(), SiLUActivation()), 1),
    "somebody's activation that counts": (lambda: nn.Sequential(ConvNorm(), CountsCalls()), 1),
    "an empty Sequential as shortcut": (
        lambda: Block(lambda m, x: F.relu(m.a(x) + m.shortcut(x)), a=ConvNorm(), shortcut=nn.Sequential()), 1
    ),
}  # fmt: skip
NOT_FUSED: dict[str, Callable[[], nn.Module]] = {
    "returned to the user": lambda: block(lambda m, x: m.a(x)),
    "used twice": lambda: block(lambda m, x: m.relu(y := m.a(x)) + y),
    "once with and once without": lambda: block(lambda m, x: m.a(m.relu(m.a(x)))),
    "identity and then used twice": lambda: block(lambda m, x: m.relu(y := m.idle(m.a(x))) + y),
    "added into something else": lambda: block(lambda m, x: m.relu(x.clone().add_(m.a(x)))),
    "another batch norm": lambda: block(lambda m, x: m.b(m.a(x))),
}


def steps(model: nn.Module, x: Tensor) -> list[Any]:
    found: list[Any] = []
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        y = model(x)
        assert type(y) is Tensor
        y.sin().sum().backward()
        found += [y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}]
        found.append({n: t.clone() for n, t in model.state_dict().items()})
    return found


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The activations that layers were run with."""
    seen: list[str | None] = []
    run = waiting._Pass.run

    def spied(self: Any, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        seen.append(activation)
        return run(self, residual, activation)

    monkeypatch.setattr(waiting._Pass, "run", spied)
    return seen


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_the_same(name: str, fused: list[str | None]) -> None:
    make, layers = FUSED[name]
    model = make().double()
    twin, x = copy.deepcopy(model), torch.randn(3, C, 6, 6).double()
    bn.convert(model)
    assert sum(bool(layer.fused_with) for layer in bn.conversion_report(model).taken) == layers
    assert_close(steps(copy.deepcopy(model), x), steps(copy.deepcopy(twin), x), rtol=1e-9, atol=1e-10)
    assert len(fused) == 2 * layers
    assert None not in fused
    classes = [type(module) for module in twin.modules()]
    assert [type(module) for module in bn.revert(model).modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in twin.modules()]


@pytest.mark.parametrize("name", NOT_FUSED)
def test_not_fused_and_the_same(name: str) -> None:
    model = NOT_FUSED[name]().double()
    twin, x = copy.deepcopy(model), torch.randn(3, C, 6, 6).double()
    bn.convert(model)
    assert not any("a.norm" in layer.layer for layer in bn.conversion_report(model).taken if layer.fused_with)
    assert_close(steps(model, x), steps(twin, x), rtol=1e-9, atol=1e-10)


def test_what_an_activation_counts_is_counted() -> None:
    model = bn.convert(nn.Sequential(ConvNorm(), CountsCalls()))
    before = model[1].calls
    model(torch.randn(3, C, 6, 6))
    assert (before, model[1].calls) == (0, 1)


def test_a_module_that_is_called_by_itself_gives_a_plain_tensor(fused: list[Any]) -> None:
    model = bn.convert(block(lambda m, x: m.relu(m.outer(m.relu(m.a(x))))))
    x = torch.randn(3, C, 6, 6)
    for part in (model.a, model.outer, model.outer.inner):
        assert type(part(x)) is Tensor
    # In a model of its own, too, whose forward is another function of this file.
    wrapped = Outer()
    for part in (model.a, model.outer):
        wrapped.inner = part
        assert type(wrapped(x)) is Tensor
    assert fused == []


@pytest.mark.parametrize("where", ["a", "a.norm", "relu", "idle"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_sees_what_it_would(where: str, when: str) -> None:
    model = block(lambda m, x: m.relu(m.idle(m.a(x)))).double()
    twin, x = copy.deepcopy(model), torch.randn(3, C, 6, 6).double()
    seen: list[Any] = []

    def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        seen.append([type(value) for value in (*args, y)] + [y.detach().clone()])

    if when == "after":
        bn.convert(model)
    for one in (model, twin):
        one.get_submodule(where).register_forward_hook(hook)
    if when == "before":
        bn.convert(model)
    assert_close(model(x), twin(x))
    assert Waiting not in [kind for kinds in seen for kind in kinds[:-1]]
    assert_close(seen[0][-1], seen[1][-1])


def test_a_copy_and_a_module_that_is_replaced() -> None:
    model = bn.convert(block(lambda m, x: m.relu(m.outer(x))))
    other = copy.deepcopy(model)
    layer = other.outer.inner[1].norm
    assert layer._through == (other.outer, other.outer.inner[1])
    other.outer.inner = nn.Sequential(other.outer.inner, nn.Identity())
    x = torch.randn(3, C, 6, 6)
    assert_close(other(x), model(x))
