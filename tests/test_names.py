"""Tests of describe: how a layer is called in an error message."""

import gc
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm.names import describe


class Probe(nn.Module):
    """Returns its own description, as a layer that raises would make it."""

    def forward(self, *_: Any) -> str:
        return describe(self)


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs)


def test_a_module_by_itself_has_only_its_class() -> None:
    assert Probe()() == "Probe"
    assert describe(nn.Linear(1, 1)) == "Linear"


def test_a_child_is_named_by_its_attribute() -> None:
    assert Block(Probe())() == "Probe 'inner'"


def test_the_name_is_that_in_the_outermost_model() -> None:
    model = nn.Sequential(nn.Sequential(nn.Sequential(Probe())))
    assert model(None) == "Probe '0.0.0'"
    assert model[0](None) == "Probe '0.0'"
    assert Block(Block(model))(None) == "Probe 'inner.inner.0.0.0'"


def test_the_name_is_a_key_of_the_models_named_modules() -> None:
    model = Block(nn.Sequential(Block(Probe())))
    name = model(None).split("'")[1]
    assert isinstance(dict(model.named_modules())[name], Probe)


def test_one_of_many_alike_is_told_from_the_others() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Probe() for _ in range(3))
            self.by_name = nn.ModuleDict({"left": Probe(), "right": Probe()})

        def forward(self) -> list[str]:
            return [layer() for layer in (*self.layers, *self.by_name.values())]

    names = ["layers.0", "layers.1", "layers.2", "by_name.left", "by_name.right"]
    assert Parallel()() == [f"Probe {name!r}" for name in names]


def test_a_layer_used_in_two_places_has_the_first_name() -> None:
    probe = Probe()
    model = nn.ModuleDict({"first": probe, "second": Block(probe)})
    assert Block(model["second"])() == "Probe 'inner.inner'"

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self) -> str:
            return self.parts["second"]()

    assert Both()() == "Probe 'parts.first'"


def test_a_module_that_does_not_contain_it_is_no_help() -> None:
    class Stranger(nn.Module):
        def forward(self, other: nn.Module) -> str:
            return other()

    assert Stranger()(Probe()) == "Probe"
    assert Block(Stranger())(Probe()) == "Probe"
    assert Stranger()(Block(Probe())) == "Probe 'inner'"


def test_a_caller_that_is_no_module_is_no_help() -> None:
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def step(self) -> str:
            return self.model()

    assert Trainer(Probe()).step() == "Probe"
    assert Trainer(Block(Probe())).step() == "Probe 'inner'"


def test_a_forward_that_calls_its_module_otherwise_is_still_found() -> None:
    class Odd(nn.Module):
        def __init__(this) -> None:
            super().__init__()
            this.deep = Probe()

        def forward(this) -> str:
            return this.deep()

    # Module.__call__'s own frame has a self.
    assert Odd()() == "Probe 'deep'"


def test_the_class_is_the_subclass() -> None:
    class Special(Probe):
        pass

    assert Block(Special())() == "Special 'inner'"


def test_hooks_and_wrappers_in_between() -> None:
    names = []
    probe = Probe()
    probe.register_forward_hook(lambda module, *_: names.append(describe(module)))
    Block(probe)()
    assert names == ["Probe 'inner'"]
    assert Block(nn.DataParallel(Probe(), device_ids=[]))() == "Probe 'inner.module'"


def test_through_a_checkpoint() -> None:
    class Saved(Block):
        def forward(self, x: torch.Tensor) -> Any:
            names.append(checkpoint(self.inner, x, use_reentrant=False))
            return x

    names: list[str] = []
    Saved(Probe())(torch.ones(1, requires_grad=True))
    assert names == ["Probe 'inner'"]


def test_the_model_is_not_kept_alive() -> None:
    def use() -> weakref.ref:
        model = Block(Probe())
        assert model() == "Probe 'inner'"
        return weakref.ref(model)

    gone = use()
    gc.collect()
    assert gone() is None
