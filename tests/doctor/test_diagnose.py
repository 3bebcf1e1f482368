"""diagnose as a whole: the model is left as it was found, bad input is named, and the time it takes."""

import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.lab.nets import LeNet
from tests.model.zoo import build


def state(model: nn.Module) -> list[Any]:
    """All that must be the same: classes, attributes, values, gradients."""
    found: list[Any] = []
    for module in model.modules():
        found.append((type(module), module.training, sorted(module.__dict__)))
        for name, value in sorted(module.__dict__.items()):
            if "hooks" in name:
                found.append((name, list(value.items()) if isinstance(value, dict) else value))
            elif isinstance(value, Tensor):
                found.append((name, id(value), value.grad_fn, value.detach().clone()))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
        found.append((name, id(tensor), tensor.dtype, tensor.requires_grad, tensor.detach().clone(), grad))
    return found


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def generators() -> list[Any]:
    return [random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()]  # noqa: NPY002


@pytest.fixture
def model() -> nn.Module:
    net, inputs = build("resnet basic")
    net(*inputs).sum().backward()
    net.layer1[0].bn1.eval()
    net.layer1[1].register_forward_hook(lambda module, args, output: None)
    return net


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(8, 3, 16, 16) for _ in range(count)]


@pytest.mark.parametrize("with_data", [False, True])
def test_the_model_is_left_as_it_was_found(model: nn.Module, with_data: bool) -> None:
    data = batches() if with_data else None
    before, drawn = state(model), generators()
    bn.diagnose(model, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert same(state(model), before)
    assert same(generators(), drawn)


def test_a_shuffled_loader_draws_no_random_numbers(model: nn.Module) -> None:
    loader = torch.utils.data.DataLoader(torch.randn(24, 3, 16, 16), 8, shuffle=True)
    drawn = generators()
    assert bn.diagnose(model, loader).batches == 3
    assert same(generators(), drawn)


def test_also_where_the_loader_or_the_evaluation_raises(model: nn.Module) -> None:
    def breaks() -> Iterator[Tensor]:
        yield batches(1)[0]
        random.random()
        raise OSError("the disk is gone")

    def spoils() -> None:
        model.eval()
        model.conv1.weight.data.zero_()
        torch.rand(3)
        raise RuntimeError("no test set")

    before, drawn = state(model), generators()
    with pytest.raises(OSError, match="the disk is gone"):
        bn.diagnose(model, breaks())
    with pytest.raises(RuntimeError, match="no test set"):
        bn.diagnose(model, evaluate=spoils)
    assert same(state(model), before)
    assert same(generators(), drawn)


def test_the_hand_written_layers_keep_their_graph() -> None:
    net = LeNet("handwritten")
    images = torch.randn(4, 1, 28, 28)
    net(images).sum().backward()
    before = state(net)
    bn.diagnose(net, [images, images], evaluate=lambda: net(images))
    assert same(state(net), before)


def test_a_model_without_batch_norm() -> None:
    report = bn.diagnose(nn.Linear(3, 3), [torch.randn(2, 3)])
    assert str(report) == "Linear has no batch norm: nothing to diagnose"
    assert report.worst is None
    assert report.findings == ()


def test_a_model_that_is_a_batch_norm() -> None:
    (finding,) = bn.diagnose(nn.BatchNorm1d(3, momentum=0.9)).findings[:1]
    assert (finding.code, finding.layer) == ("BN106", "")


def test_what_is_no_model_loader_or_optimizer() -> None:
    model = nn.BatchNorm1d(3)
    with pytest.raises(TypeError, match=r"diagnose: expected a model \(torch.nn.Module\), got int"):
        bn.diagnose(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="diagnose: expected an iterable of batches"):
        bn.diagnose(model, torch.randn(4, 3))
    with pytest.raises(TypeError, match="diagnose: expected a torch optimizer, got list"):
        bn.diagnose(model, optimizer=[0.1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="diagnose: the loader is empty"):
        bn.diagnose(model, [])
    with pytest.raises(ValueError, match="max_batches=0 must be a whole number"):
        bn.diagnose(model, [torch.randn(4, 3)], max_batches=0)
    with pytest.raises(ValueError, match="has not seen its first input yet"):
        bn.diagnose(nn.LazyBatchNorm1d())


def test_batches_that_the_model_cannot_take_are_a_finding() -> None:
    model, _ = build("lenet")
    before = state(model)
    findings = bn.diagnose(model, [torch.randn(4, 3)]).findings
    assert (findings[0].code, findings[0].severity, findings[0].layer) == ("BN200", "error", "0")
    assert "BN101" in {finding.code for finding in findings}
    assert same(state(model), before)


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise IndexError("out of range")


def test_a_layer_that_raises_is_named_and_the_rest_diagnosed() -> None:
    model, inputs = build("lenet")
    model[1].momentum = 0.9
    model[6] = Breaks()
    found = {finding.code: finding for finding in bn.diagnose(model, [inputs[0]]).findings}
    assert found["BN200"].layer == "6"
    assert "out of range" in found["BN200"].what
    assert found["BN106"].layer == "1"


def test_the_inside_of_data_parallel_is_diagnosed() -> None:
    model = nn.DataParallel(build("lenet")[0])
    assert {finding.layer for finding in bn.diagnose(model).findings if finding.code == "BN101"} == {
        "0",
        "4",
        "9",
    }


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or before != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def resnet50() -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(count):
            layers.append(Bottleneck(before, width, 2 if i == 0 and width > 64 else 1))
            before = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def test_a_resnet_50_without_data_takes_less_than_a_second() -> None:
    model = resnet50()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 53
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        report = bn.diagnose(model, optimizer=optimizer)
        times.append(time.perf_counter() - start)
    print(f"ResNet-50 without data: {min(times):.2f} s")
    assert min(times) < 1
    assert {finding.code for finding in report.findings} == {"BN102", "BN119"}
