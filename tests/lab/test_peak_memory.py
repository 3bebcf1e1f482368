"""Memory of ResNet-50's training; the GPU's own count needs one, what a forward keeps is told on the CPU."""

import pytest
import torch

import batchnorm as bn
from batchnorm.lab.bench_nets import MEMORY_EFFICIENT
from batchnorm.lab.bench_results import OURS, TORCH
from batchnorm.lab.peak_memory import NETS, Setup, Step, peak_of_device, saved_for_backward, step_memory
from batchnorm.lab.resnet50 import ResNet50

SMALL = {"device": "cpu", "batch": 4, "image_size": 64, "width": 8, "classes": 10}


def test_the_resnet_is_resnet_50() -> None:
    with torch.device("meta"):
        model = ResNet50()
        # torchvision's resnet50() has as many.
        assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules()) == 53


def test_all_three_compute_the_same_and_are_fused() -> None:
    logits = []
    for change in NETS.values():
        torch.manual_seed(0)
        model = change(ResNet50(10, 8))
        logits.append(model(torch.randn(4, 3, 64, 64)))
        ours = [layer for layer in model.modules() if isinstance(layer, bn.BatchNorm2d)]
        assert len(ours) in (0, 53)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-3, atol=1e-3)


def test_the_memory_efficient_one_keeps_less_than_the_target() -> None:
    setup = Setup(half=False, device="cpu", batch=8, image_size=64, width=16, classes=10)
    saved = step_memory(setup, saved_for_backward)
    assert list(saved) == [TORCH, OURS, MEMORY_EFFICIENT]
    assert saved[OURS] < 1.02 * saved[TORCH]
    assert saved[MEMORY_EFFICIENT] < 0.75 * saved[TORCH]


@pytest.mark.parametrize("half", [False, True])
def test_a_step_trains_in_the_dtype_and_layout_of_the_setup(half: bool) -> None:
    seen = []

    def measure(step: Step) -> int:
        parameter = step.model.conv1.weight
        before = parameter.detach().clone()
        hook = step.model.bn1.register_forward_hook(lambda layer, args, y: seen.append(args[0]))
        step()
        hook.remove()
        assert not torch.equal(parameter, before)
        return len(seen)

    assert list(step_memory(Setup(half, **SMALL), measure).values()) == [1, 2, 3]
    for x in seen:
        assert x.dtype == (torch.bfloat16 if half else torch.float32)
        assert x.is_contiguous(memory_format=torch.channels_last if half else torch.contiguous_format)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("half", [False, True])
def test_the_peak_on_a_gpu(half: bool) -> None:
    setup = Setup(half, batch=32, image_size=128)
    peaks = step_memory(setup, peak_of_device)
    assert peaks[MEMORY_EFFICIENT] < 0.85 * peaks[TORCH]
