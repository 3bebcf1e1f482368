"""Fixes: they help and say so, or they are refused and everything is as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.doctor import fixes
from batchnorm.lab.nets import LeNet
from tests.doctor.data.digits import trained
from tests.doctor.data.faults import Checkpointed
from tests.doctor.test_diagnose import same, state
from tests.model.zoo import build


def images(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 3, 16, 16, generator=generator) for _ in range(count)]


def codes(report: bn.Report) -> set[str]:
    return {finding.code for finding in report.findings}


def test_biases_are_absorbed_and_eval_mode_says_the_same() -> None:
    model, _ = build("vgg")
    bn.recalibrate(model, images())
    before = copy.deepcopy(model).eval()(images()[0])
    fixed = bn.diagnose(model, images()).fix("BN101")
    assert "BN101" not in codes(fixed.after)
    assert all(not bool(model.features[i].bias.any()) for i in (0, 4, 7))
    torch.testing.assert_close(model.eval()(images()[0]), before, rtol=1e-4, atol=1e-5)
    assert "not found any more" in str(fixed)


def test_one_bias_alone() -> None:
    model, _ = build("vgg")
    bn.recalibrate(model, images())
    others = [model.features[4].bias.clone(), model.features[5].running_mean.clone()]
    fixed = bn.diagnose(model, images()).fix("BN101", "features.0")
    assert not model.features[0].bias.any()
    assert same(others, [model.features[4].bias, model.features[5].running_mean])
    assert [f.layer for f in fixed.after.findings if f.code == "BN101"] == ["features.4", "features.7"]


def test_weight_decay_moves_to_a_group_of_its_own_and_the_state_stays() -> None:
    model, inputs = build("resnet basic")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.01)
    model(*inputs).sum().backward()
    optimizer.step()
    momenta = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    fixed = bn.diagnose(model, optimizer=optimizer).fix("BN102")
    assert "BN102" not in codes(fixed.after)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.01]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert all(torch.equal(optimizer.state[p]["exp_avg"], momentum) for p, momentum in momenta.items())
    optimizer.step()


def test_weight_decay_under_a_schedule_is_refused() -> None:
    model, _ = build("lenet")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    before = copy.deepcopy(optimizer.state_dict())
    report = bn.diagnose(model, optimizer=optimizer)
    with pytest.raises(ValueError, match="a learning-rate schedule is on the optimizer"):
        report.fix("BN102")
    assert optimizer.state_dict() == before


@pytest.mark.parametrize(
    ("momentum", "other"), [(0.9, 0.1), (0.99, 0.01), (0.999, 0.1), (1.0, 0.1), (0.0005, 0.1)]
)
def test_momentum_of_torchs_convention(momentum: float, other: float) -> None:
    model, _ = build("lenet")
    model[1].momentum = momentum
    bn.diagnose(model).fix("BN106")
    assert model[1].momentum == pytest.approx(other)


@pytest.mark.parametrize(
    "spoil", [lambda m: m.reset_running_stats(), lambda m: m.running_var.fill_(torch.nan)]
)
def test_statistics_come_back_from_the_data_for_the_layer_alone(spoil: Callable[[Any], Any]) -> None:
    model, _ = build("resnet basic")
    bn.recalibrate(model, images())
    layer, other = model.layer2[1].bn1, model.layer2[1].bn2
    right, others = layer.running_var.clone(), other.running_var.clone()
    spoil(layer)
    report = bn.diagnose(model, images())
    code = next(f.code for f in report.findings if f.code in ("BN108", "BN109"))
    report.fix(code)
    # The layers before it now normalise by the population, not by each batch.
    torch.testing.assert_close(layer.running_var, right, rtol=0.1, atol=0)
    assert torch.equal(other.running_var, others)


def test_statistics_that_are_not_the_populations() -> None:
    model, _ = build("resnet basic")
    bn.recalibrate(model, images())
    model.layer1[0].bn1.running_mean += 3
    fixed = bn.diagnose(model, images()).fix("BN202")
    assert [finding.layer for finding in fixed.before] == ["layer1.0.bn1"]
    assert fixed.left == ()


def test_a_checkpointed_model_is_converted() -> None:
    model, _, _ = trained("vgg")
    fixed = bn.diagnose(Checkpointed(model, use_reentrant=False), images()).fix("BN211")
    assert "BN211" not in codes(fixed.after)
    assert isinstance(model.features[1], bn.BatchNorm2d)


def test_statistics_without_data_are_refused() -> None:
    model, _ = build("resnet basic")
    model.bn1.reset_running_stats()
    before = state(model)
    with pytest.raises(ValueError, match="BN108 was not applied, the model is as it was: needs data"):
        bn.diagnose(model).fix("BN108")
    assert same(state(model), before)


def test_modes() -> None:
    model, _ = build("resnet basic")
    model.eval()
    model.bn1.train()
    bn.diagnose(model).fix("BN111")
    assert not model.bn1.training
    model.train()
    model.bn1.requires_grad_(False)
    bn.diagnose(model).fix("BN112")
    model.train()
    assert not model.bn1.training


def test_a_mode_that_is_the_users_choice_is_refused() -> None:
    model, _ = build("resnet basic")
    model.bn1.eval()
    before = state(model)
    with pytest.raises(ValueError, match="whether to freeze or to train it is yours to say"):
        bn.diagnose(model).fix("BN112")
    assert same(state(model), before)


def test_half_precision_with_the_optimizers_state() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 4).bfloat16()).square().sum().backward()
    optimizer.step()
    parameter = model[1].weight
    bn.diagnose(model, optimizer=optimizer).fix("BN113")
    assert model[1].weight is parameter
    assert parameter.dtype == model[1].running_var.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16
    optimizer.zero_grad()
    model(torch.randn(8, 4).bfloat16()).square().sum().backward()
    optimizer.step()


def test_shifts_of_one_are_set_to_zero_in_new_models_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    nn.init.ones_(model[1].bias)
    optimizer = torch.optim.Adam([model[0].weight])
    bn.diagnose(model).fix("BN116")
    assert not model[1].bias.any()
    nn.init.ones_(model[1].bias)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="1 is trained"):
        bn.diagnose(model, optimizer=optimizer).fix("BN116")
    assert bool((model[1].bias == 1).all())
    with pytest.raises(ValueError, match="hand-written: replace it"):
        bn.diagnose(LeNet("handwritten")).fix("BN116")


def test_convert_and_the_layers_stay_the_same_objects() -> None:
    model, _ = build("resnet basic")
    layer = model.bn1
    fixed = bn.diagnose(model, images()).fix("BN119")
    assert model.bn1 is layer
    assert isinstance(layer, bn.BatchNorm2d)
    assert "BN119" not in codes(fixed.after)


def test_what_was_not_found_or_has_no_safe_fix() -> None:
    model, _ = build("wide resnet")
    report = bn.diagnose(model)
    with pytest.raises(ValueError, match="there is no finding BN101: the report has BN103, BN119"):
        report.fix("BN101")
    with pytest.raises(ValueError, match="no finding BN103 in layer 'bn'"):
        report.fix("BN103", "bn")
    with pytest.raises(ValueError, match=r"BN103 has no fix that is safe to apply by itself\. By hand: Put"):
        report.fix("BN103")


@pytest.fixture
def sick() -> nn.Module:
    model, _ = build("resnet basic")
    model.bn1.momentum = 0.9
    return model


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (lambda model: None, "BN106 did not help in bn1, and was taken back"),
        (lambda model: setattr(model.bn1, "momentum", 0.8), "did not help"),
        (lambda model: bn.convert(model).bn1.half(), "did not help"),
    ],
)
def test_a_fix_that_does_not_help_is_taken_back(
    sick: nn.Module, monkeypatch: pytest.MonkeyPatch, apply: Callable[[Any], Any], words: str
) -> None:
    monkeypatch.setitem(fixes.FIXES, "BN106", lambda subject, layers: apply(subject.model))
    report, before = bn.diagnose(sick), state(sick)
    with pytest.raises(ValueError, match=words):
        report.fix("BN106")
    assert same(state(sick), before)


def test_a_fix_that_breaks_something_else_is_taken_back(
    sick: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(subject: Any, layers: Any) -> None:
        subject.model.bn1.momentum = 0.1
        subject.model.layer1[0].bn1.running_var.fill_(-1)

    monkeypatch.setitem(fixes.FIXES, "BN106", breaks)
    report, before = bn.diagnose(sick), state(sick)
    with pytest.raises(ValueError, match=r"taken back: it brought BN109 in layer1.0.bn1"):
        report.fix("BN106")
    assert same(state(sick), before)
    assert sick.bn1.momentum == 0.9
