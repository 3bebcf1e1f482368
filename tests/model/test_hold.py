"""Tests of hold: training forwards that leave the running statistics where they are."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

C = 3

LAYERS: dict[str, Any] = {
    "torch 1d": lambda: nn.BatchNorm1d(C),
    "torch cumulative": lambda: nn.BatchNorm1d(C, momentum=None),
    "ours": lambda: bn.BatchNorm1d(C),
    "ours cumulative": lambda: bn.BatchNorm1d(C, momentum=None),
    "ours ghost": lambda: bn.BatchNorm1d(C, ghost_batch_size=4),
    "ours renorm": lambda: bn.BatchNorm1d(C, renorm=True),
    "ours skip_nonfinite": lambda: bn.BatchNorm1d(C, skip_nonfinite=True),
    "ours activation": lambda: bn.BatchNorm1d(C, activation="relu"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    """A network whose layer has seen two batches already."""
    network = nn.Sequential(nn.Linear(C, C), nn.Sequential(request.param()), nn.Linear(C, C))
    for _ in range(2):
        network(batch())
    return network


def batch() -> Tensor:
    return torch.randn(8, C) * 2 + 1


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unmoved(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert_close(state(model), before, rtol=0, atol=0)


def assert_moves(model: nn.Module) -> None:
    """The next training forward moves the mean, the variance and the counter, by one."""
    layer, before = model[1][0], state(model)
    model(batch())
    assert layer.num_batches_tracked == before["1.0.num_batches_tracked"] + 1
    assert (layer.running_mean != before["1.0.running_mean"]).all()
    assert (layer.running_var != before["1.0.running_var"]).all()


def test_inside_nothing_moves_and_after_it_does(model: nn.Sequential) -> None:
    before = state(model)
    with bn.hold(model):
        for _ in range(3):
            model(batch()).sum().backward()
        assert_unmoved(model, before)
    assert_unmoved(model, before)
    assert_moves(model)


def test_yields_the_model(model: nn.Sequential) -> None:
    with bn.hold(model) as held:
        assert held is model


def test_outputs_and_gradients_are_those_of_training(model: nn.Sequential) -> None:
    twin = copy.deepcopy(model)
    x = batch()
    wanted = twin(x)
    wanted.square().sum().backward()
    with bn.hold(model):
        got = model(x)
        got.square().sum().backward()
    # A held layer may go by another kernel, so a last bit may differ.
    assert_close(got, wanted)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_the_batch_normalises_not_the_running_statistics(kind: type[nn.Module]) -> None:
    layer = kind(C)
    layer.running_mean.fill_(100)
    with bn.hold(layer):
        y = layer(batch())
    assert_close(y.mean(0), torch.zeros(C), rtol=0, atol=1e-5)
    assert_close(y.var(0, correction=0), torch.ones(C), rtol=1e-3, atol=0)


def test_nests(model: nn.Sequential) -> None:
    before = state(model)
    with bn.hold(model):
        with bn.hold(model):
            model(batch())
        model(batch())
        assert_unmoved(model, before)
        with bn.hold(model[1]):
            model(batch())
        model(batch())
        assert_unmoved(model, before)
    assert_moves(model)


def test_holds_a_part_only() -> None:
    model = nn.Sequential(bn.BatchNorm1d(C), nn.BatchNorm1d(C), bn.BatchNorm1d(C))
    with bn.hold(model[:2]):
        model(batch())
    assert [layer.num_batches_tracked.item() for layer in model] == [0, 0, 1]


def test_holds_a_layer_that_is_used_twice_and_restores_it() -> None:
    layer = bn.BatchNorm1d(C)
    model = nn.Sequential(layer, nn.Identity(), layer)
    with bn.hold(model):
        model(batch())
    assert layer.num_batches_tracked == 0
    model(batch())
    assert layer.num_batches_tracked == 2


def test_an_exception_ends_it(model: nn.Sequential) -> None:
    before = state(model)

    def interrupted() -> None:
        with bn.hold(model):
            model(batch())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_unmoved(model, before)
    assert_moves(model)


def test_an_error_of_the_model_ends_it(model: nn.Sequential) -> None:
    with pytest.raises(RuntimeError), bn.hold(model):
        model(torch.randn(8, C + 1))
    assert_moves(model)


def test_eval_mode_is_not_affected(model: nn.Sequential) -> None:
    x = batch()
    model.eval()
    wanted, before = model(x), state(model)
    with bn.hold(model):
        assert_close(model(x), wanted, rtol=0, atol=0)
        assert not model.training
    assert_unmoved(model, before)


def test_switching_to_eval_and_back_inside(model: nn.Sequential) -> None:
    x = batch()
    wanted, before = copy.deepcopy(model).eval()(x), state(model)
    with bn.hold(model):
        assert_close(model.eval()(x), wanted, rtol=0, atol=0)
        model.train()
        model(x)
        assert_unmoved(model, before)
    assert model.training
    assert_moves(model)


def test_switching_to_eval_inside_lasts(model: nn.Sequential) -> None:
    with bn.hold(model):
        model.eval()
    assert not model.training
    assert not model[1][0].training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_inside_and_its_backward(model: nn.Sequential, use_reentrant: bool) -> None:
    twin, before = copy.deepcopy(model), state(model)
    x = batch().requires_grad_()
    with bn.hold(model):
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert_unmoved(model, before)
    with bn.hold(twin):
        twin(x).square().sum().backward()
    if getattr(model[1][0], "renorm", None) is None:
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
    assert_moves(model)


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_whose_backward_comes_after(options: dict[str, Any], use_reentrant: bool) -> None:
    # torch's layer moves here, in the recomputation; and with use_reentrant=False ours must still save
    # as many tensors in it as before.
    model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C, **options))
    before = state(model)
    with bn.hold(model):
        y = checkpoint(model, batch().requires_grad_(), use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert_unmoved(model, before)


def test_keeps_hooks_parameters_and_the_state_dict(model: nn.Sequential) -> None:
    calls = []
    model[1][0].register_forward_hook(lambda *_: calls.append(1))
    parameters, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    with bn.hold(model):
        model(batch())
        assert [id(p) for p in model.parameters()] == parameters
        assert list(model.state_dict()) == keys
    assert calls == [1]
    assert list(model.state_dict()) == keys


def test_a_layer_without_tracking_stays_so() -> None:
    for layer in (nn.BatchNorm1d(C, track_running_stats=False), bn.BatchNorm1d(C, track_running_stats=False)):
        with bn.hold(layer):
            layer(batch())
        assert layer.track_running_stats is False
        assert layer.running_mean is None


def test_other_norms_and_a_model_without_any_are_left_alone() -> None:
    instance = nn.InstanceNorm1d(C, track_running_stats=True)
    before = instance.running_mean.clone()
    with bn.hold(nn.Sequential(instance, nn.LayerNorm(5))) as model:
        model(torch.randn(2, C, 5))
    assert not torch.equal(instance.running_mean, before)


def test_statistics_loaded_inside_stay(model: nn.Sequential) -> None:
    other = copy.deepcopy(model)
    other(batch())
    with bn.hold(model):
        model.load_state_dict(other.state_dict())
        model(batch())
    assert_unmoved(model, state(other))


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm1d, bn.LazyBatchNorm1d])
def test_a_lazy_layer_without_input_yet_is_an_error_that_leaves_all_as_it_was(lazy: type[nn.Module]) -> None:
    model = nn.Sequential(bn.BatchNorm1d(C), nn.Sequential(lazy()))
    with pytest.raises(ValueError, match=r"LazyBatchNorm1d '1\.0' .*run one batch"), bn.hold(model):
        pass
    model(batch())
    assert [model[0].num_batches_tracked.item(), model[1][0].num_batches_tracked.item()] == [1, 1]
    with bn.hold(model):
        model(batch())
    assert model[1][0].num_batches_tracked == 1


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm1d, bn.LazyBatchNorm1d])
def test_a_lazy_layer_without_statistics_may_start_inside(lazy: type[nn.Module]) -> None:
    layer = lazy(track_running_stats=False)
    with bn.hold(layer):
        layer(batch())
    assert layer.num_features == C
