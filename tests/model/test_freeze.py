"""Tests of freeze and unfreeze: batch norms that stay as they are while the rest of the model trains."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import freeze, unfreeze

C = 3

LAYERS: dict[str, Any] = {
    "torch 1d": lambda: nn.BatchNorm1d(C),
    "torch 2d": lambda: nn.BatchNorm2d(C),
    "torch 3d": lambda: nn.BatchNorm3d(C),
    "torch sync": lambda: nn.SyncBatchNorm(C),
    "torch cumulative": lambda: nn.BatchNorm2d(C, momentum=None),
    "ours 1d": lambda: bn.BatchNorm1d(C),
    "ours 2d": lambda: bn.BatchNorm2d(C),
    "ours 3d": lambda: bn.BatchNorm3d(C),
    "ours ghost": lambda: bn.BatchNorm2d(C, ghost_batch_size=4),
    "ours renorm": lambda: bn.BatchNorm2d(C, renorm=True),
    "ours activation": lambda: bn.BatchNorm2d(C, activation="relu", momentum=None),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


def batch_for(layer: nn.Module) -> Tensor:
    name = type(layer).__name__
    shape = {"1d": (8, C), "3d": (8, C, 2, 2, 2)}.get(name[-2:], (8, C, 2, 2))
    return torch.randn(shape) * 2 + 1


def net(layer: Any) -> nn.Sequential:
    """Its layer has seen two batches already; SyncBatchNorm trains as BatchNorm2d does in one process."""
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(layer))
    for _ in range(2):
        model(batch_for(layer))
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_frozen(model: nn.Module) -> None:
    layer, before = model[1][0], state(model)
    x = batch_for(layer)
    model.train()
    assert model[0].training
    assert not layer.training
    y = model[1](x)
    assert_close(state(model), before, rtol=0, atol=0)
    shape = [1, C] + [1] * (x.ndim - 2)
    mean, var = layer.running_mean.view(shape), layer.running_var.view(shape)
    wanted = (x - mean) / (var + layer.eps).sqrt()
    wanted = wanted * layer.weight.view(shape) + layer.bias.view(shape)
    assert_close(y, wanted.relu() if getattr(layer, "activation", None) else wanted)


def assert_moves(model: nn.Module) -> None:
    layer, before = model[1][0], state(model)
    model(batch_for(layer))
    assert layer.num_batches_tracked == before["1.0.num_batches_tracked"] + 1
    assert (layer.running_mean != before["1.0.running_mean"]).all()


def test_survives_train_and_unfreezes(layer: nn.Module) -> None:
    model = net(layer)
    kind, keys = type(layer), list(model.state_dict())
    parameters = [id(parameter) for parameter in model.parameters()]
    before, attributes = state(model), {**layer.__dict__}
    assert freeze(model) is model
    assert_frozen(model)
    model.eval()
    assert_frozen(model.train())
    assert type(layer) is kind
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert unfreeze(model) is model
    assert {**layer.__dict__} == attributes
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert_close(state(model), before, rtol=0, atol=0)
    assert_moves(model)


def test_weight_and_bias_go_on_learning_unless_frozen_too(layer: nn.Module) -> None:
    model = net(layer)
    freeze(model)
    model(batch_for(layer)).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    model.zero_grad()
    freeze(model, affine=True)
    x = batch_for(layer).requires_grad_()
    model(x).square().sum().backward()
    assert layer.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_affine_alone(layer: nn.Module) -> None:
    model = net(layer)
    freeze(model, statistics=False, affine=True)
    assert layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert_moves(model)
    unfreeze(model)
    assert all(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bn.BatchNorm2d])
class TestBothKinds:
    def test_the_way_back_is_to_the_mode_last_asked_for(self, kind: type[nn.Module]) -> None:
        for asked in (True, False):
            layer = kind(C)
            freeze(layer)
            layer.train(asked)
            assert not layer.training
            assert unfreeze(layer).training is asked
        layer = kind(C).eval()
        assert unfreeze(freeze(layer)).training is False
        assert unfreeze(freeze(freeze(kind(C)))).training is True

    def test_train_returns_the_layer_and_wants_a_boolean(self, kind: type[nn.Module]) -> None:
        layer = freeze(kind(C))
        assert layer.train() is layer
        assert layer.eval() is layer
        with pytest.raises(ValueError, match="boolean"):
            layer.train("yes")

    def test_requires_grad_comes_back_as_it_was(self, kind: type[nn.Module]) -> None:
        layer = kind(C)
        layer.bias.requires_grad_(False)
        freeze(layer, affine=True)
        layer.requires_grad_(True)  # the user's word counts
        assert layer.weight.requires_grad
        freeze(layer, affine=True)
        assert not layer.weight.requires_grad
        unfreeze(layer)
        assert layer.weight.requires_grad
        assert not layer.bias.requires_grad

    def test_twice_is_once(self, kind: type[nn.Module]) -> None:
        model = net(kind(C))
        freeze(freeze(model, affine=True)[1], affine=True)
        freeze(model)
        assert_frozen(model)
        unfreeze(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert_moves(model)
        unfreeze(model)
        assert_moves(model)

    def test_a_part_only(self, kind: type[nn.Module]) -> None:
        model = nn.Sequential(nn.Sequential(kind(C)), nn.Sequential(kind(C)))
        freeze(model)
        unfreeze(model[1])
        model.train()
        assert [model[0][0].training, model[1][0].training] == [False, True]

    def test_a_copy_is_frozen_and_apart(self, kind: type[nn.Module]) -> None:
        model = freeze(net(kind(C)), affine=True)
        twin = copy.deepcopy(model)
        assert twin[1][0].train() is twin[1][0]
        unfreeze(model)
        assert_frozen(twin)
        assert not twin[1][0].weight.requires_grad
        unfreeze(twin)
        assert twin[1][0].weight.requires_grad
        assert_moves(twin)

    def test_pickles(self, kind: type[nn.Module], tmp_path: Path) -> None:
        model = freeze(net(kind(C)), affine=True)
        torch.save(model, tmp_path / "model.pt")
        for twin in (
            pickle.loads(pickle.dumps(model)),
            torch.load(tmp_path / "model.pt", weights_only=False),
        ):
            assert twin[1][0].train() is twin[1][0]
            assert_frozen(twin)
            assert_moves(unfreeze(twin))

    def test_state_dicts_go_both_ways(self, kind: type[nn.Module]) -> None:
        model, other = net(kind(C)), net(kind(C))
        freeze(model)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert_close(state(other), state(model), rtol=0, atol=0)
        model.load_state_dict(net(kind(C)).state_dict())
        assert_frozen(model)

    def test_the_optimizer_stays_valid(self, kind: type[nn.Module]) -> None:
        model = net(kind(C))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

        def step() -> None:
            optimizer.zero_grad()
            model(batch_for(model[1][0])).square().sum().backward()
            optimizer.step()

        step()
        freeze(model, affine=True)
        optimizer.zero_grad()
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
        unfreeze(model)
        weight = model[1][0].weight.clone()
        step()
        assert optimizer.state[model[1][0].weight]["step"] == 2
        assert not torch.equal(model[1][0].weight, weight)

    def test_survives_hold(self, kind: type[nn.Module]) -> None:
        model = freeze(net(kind(C)))
        with bn.hold(model):
            assert_frozen(model)
        assert_frozen(model)
        unfreeze(model)
        assert_moves(model)

    def test_hooks_and_moves_of_device_and_dtype_stay(self, kind: type[nn.Module]) -> None:
        model = net(kind(C))
        calls: list[int] = []
        model[1][0].register_forward_hook(lambda *_: calls.append(1))
        freeze(model).double()
        assert model[1][0].running_mean.dtype == torch.float64
        model(batch_for(model[1][0]).double())
        assert calls == [1]
        model.float()
        assert_frozen(model)

    def test_compiled(self, kind: type[nn.Module]) -> None:
        model = nn.Sequential(net(kind(C))[1])
        x = batch_for(model[0][0])
        compiled = torch.compile(model, backend="eager")
        compiled(x)
        freeze(compiled)
        compiled.train()
        before = state(model)
        assert_close(compiled(x), copy.deepcopy(model).eval()(x))
        assert_close(state(model), before, rtol=0, atol=0)
        unfreeze(compiled)
        compiled(x)
        assert model[0][0].num_batches_tracked == before["0.0.num_batches_tracked"] + 1

    def test_a_module_in_a_subclass_that_overrides_train(self, kind: type[nn.Module]) -> None:
        class Loud(kind):  # type: ignore[misc, valid-type]
            asked = 0

            def train(self, mode: bool = True) -> nn.Module:
                self.asked += 1
                return super().train(mode)

        layer = Loud(C)
        freeze(layer).train()
        assert not layer.training
        assert layer.asked == 0
        unfreeze(layer).eval()
        assert layer.asked == 1


def test_fx_and_export_take_a_frozen_model() -> None:
    model = freeze(net(nn.BatchNorm2d(C)))
    traced = torch.fx.symbolic_trace(model)
    traced.train()
    assert not traced.get_submodule("1.0").training
    exported = torch.export.export(model.eval(), (batch_for(model[1][0]),))
    assert_close(exported.module()(torch.ones(8, C, 2, 2)), model(torch.ones(8, C, 2, 2)))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_distributed_data_parallel(kind: type[nn.Module]) -> None:
    model = net(kind(C))
    model.append(nn.Conv2d(C, C, 1))
    freeze(model, affine=True)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel.train()
    before = state(model)
    for _ in range(2):
        parallel(batch_for(model[1][0])).sum().backward()
    assert_close(state(model), before, rtol=0, atol=0)
    unfreeze(parallel)
    parallel(batch_for(model[1][0]))
    assert model[1][0].num_batches_tracked == before["1.0.num_batches_tracked"] + 1


def test_other_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C), nn.InstanceNorm1d(C, affine=True), nn.Linear(C, C))
    freeze(model, affine=True)
    model.train()
    assert model[1].training
    assert all(parameter.requires_grad for parameter in model[1:].parameters())


def test_layers_without_statistics_or_affine_are_left_alone() -> None:
    bare = nn.BatchNorm1d(C, track_running_stats=False)
    plain = bn.BatchNorm1d(C, affine=False)
    freeze(nn.Sequential(bare, plain), affine=True)
    assert bare.training
    assert not plain.training
    assert not bare.weight.requires_grad


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.BatchNorm1d(C), {"statistics": False}, "freeze nothing"),
        (nn.Linear(C, C), {}, "no batch norm in Linear"),
        (nn.BatchNorm1d(C, track_running_stats=False), {}, "no running statistics to freeze"),
        (nn.BatchNorm1d(C, affine=False), {"statistics": False, "affine": True}, "no weight and bias"),
        (
            nn.Sequential(nn.BatchNorm1d(C), nn.LazyBatchNorm1d()),
            {},
            r"LazyBatchNorm1d '1' has not seen its first input yet",
        ),
        (nn.Sequential(bn.BatchNorm1d(C), bn.LazyBatchNorm1d()), {"affine": True}, "LazyBatchNorm1d '1'"),
    ],
    ids=range(6),
)
def test_errors_change_nothing(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"freeze: .*{message}"):
        freeze(model, **options)
    assert all(module.training and "train" not in module.__dict__ for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("verb", [freeze, unfreeze])
def test_no_model(verb: Any) -> None:
    with pytest.raises(TypeError, match=f"{verb.__name__}: expected a model .* got str"):
        verb("model")
