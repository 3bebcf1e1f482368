"""Hand-written layers: the tutorial's script as written has all its faults named, and others are observed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.lab.nets import LeNet

ALL = {"conv.1", "conv.5", "fc.1", "fc.4"}
AFTER_CONVOLUTIONS = {"conv.1", "conv.5"}


def layers(report: bn.Report, code: str, severity: str) -> set[str | None]:
    return {f.layer for f in report.findings if (f.code, f.severity) == (code, severity)}


@pytest.mark.parametrize("with_loader", [False, True])
@pytest.mark.parametrize("epochs", [0, 1])
def test_all_the_faults_of_the_tutorials_script_are_named(with_loader: bool, epochs: int) -> None:
    torch.manual_seed(0)
    net = LeNet("handwritten")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    batches = [(torch.rand(16, 1, 28, 28), torch.randint(0, 10, (16,))) for _ in range(4)]

    def test() -> None:
        for images, _ in batches:
            net(images)

    for images, labels in batches * epochs:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    report = bn.diagnose(
        net,
        batches if with_loader else None,
        optimizer=optimizer,
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        evaluate=test,
    )
    assert layers(report, "BN120", "error") == ALL, "statistics not in the state_dict"
    assert layers(report, "BN121", "error") == ALL, "graph growth, in a copy of the layer"
    assert layers(report, "BN213", "error") == (ALL if with_loader else set()), "graph growth, in training"
    assert layers(report, "BN117", "error") == ALL, "test in training mode"
    # After some steps beta is near one: it may have started there.
    assert layers(report, "BN116", "note" if epochs else "warning") == AFTER_CONVOLUTIONS, "beta of one"
    assert report.batch_norms == 4


class Standardise(nn.Module):
    """A batch norm whose tensors have names of their own; it moves them in eval mode too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(0), x.var(0, correction=0)
        with torch.no_grad():
            self.centre.lerp_(mean, 0.1)
            self.spread.lerp_(var, 0.1)
        if not self.training:
            mean, var = self.centre, self.spread
        return (x - mean) / (var + 1e-5).sqrt()


class Parts(nn.Module):
    """One with a child, so that no copy of it is tried: known by the names of its tensors."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(0), x.var(0)
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean
        self.running_var = 0.9 * self.running_var + 0.1 * var
        return (x - mean) / (var + 1e-5).sqrt() * self.scale.weight


@pytest.mark.parametrize("norm", [Standardise, Parts])
def test_a_hand_written_layer_of_any_name_is_observed_without_torchs(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))
    batches = [torch.randn(32, 5) for _ in range(3)]
    for batch in batches:
        net(batch)
    before = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    report = bn.diagnose(net, batches)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert report.batch_norms == 1
    assert layers(report, "BN210", "error") == {"1"}
    assert layers(report, "BN213", "error") == ({"1"} if norm is Parts else set())
