"""Tests of absorb_bias: the bias before a batch norm moves into the running mean."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.model import absorb_bias, freeze

C = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Untraceable(nn.Module):
    """Around a model, so that it is left to its nn.Sequential neighbours."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() < torch.inf else x


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):
        model(x)
    return model.double()


def check(model: nn.Module, x: Tensor, absorbed: list[str]) -> None:
    """`absorbed` are zeroed and nothing else changes but running means; nor do outputs."""
    trained(model, x)
    x = x.double()
    flags = [module.training for module in model.modules()]
    identities = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = copy.deepcopy(model)
    assert absorb_bias(model, x) is model
    assert [module.training for module in model.modules()] == flags
    assert [id(tensor) for tensor in model.state_dict(keep_vars=True).values()] == identities
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    zeroed = [name for name in changed if not name.endswith("running_mean")]
    assert zeroed == absorbed
    assert len(changed) == 2 * len(absorbed)
    assert all((model.get_parameter(name) == 0).all() for name in zeroed)
    assert_close(model.eval()(x), twin.eval()(x), rtol=1e-9, atol=1e-9)
    assert_close(model.train()(x), twin.train()(x), rtol=1e-9, atol=1e-9)
    assert_close(model.eval()(x), twin.eval()(x), rtol=1e-9, atol=1e-9)


IMAGES, ROWS = torch.randn(4, C, 6, 6), torch.randn(8, C)


@pytest.mark.parametrize("wrap", [nn.Sequential, Untraceable], ids=["traced", "neighbours"])
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(
    ("layer", "rank"),
    [
        (lambda: nn.Linear(C, C), 2),
        (lambda: nn.Conv1d(C, C, 2), 3),
        (lambda: nn.Conv2d(C, C, 2, padding=1), 4),
        (lambda: nn.Conv3d(C, C, 2), 5),
        (lambda: nn.ConvTranspose1d(C, C, 2), 3),
        (lambda: nn.ConvTranspose2d(C, C, 2, groups=C), 4),
        (lambda: nn.ConvTranspose3d(C, C, 2), 5),
    ],
)
def test_every_layer(layer: Any, rank: int, ours: bool, wrap: Any) -> None:
    package = bn if ours else nn
    norm = getattr(package, f"BatchNorm{max(rank, 3) - 2}d")(C)
    inner = nn.Sequential(layer(), norm, nn.ReLU())
    name = {nn.Sequential: "0.0.bias", Untraceable: "inner.0.bias"}[wrap]
    check(wrap(inner), torch.randn(4, C, *[4] * (rank - 2)), [name])


class Net(nn.Module):
    """A residual block by hand: what feeds what is in forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = bn.BatchNorm2d(C, activation="relu"), nn.Conv2d(C, C, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        z = self.conv3(x)
        return y + self.bn3(z) + z  # conv3's output goes elsewhere too


def test_only_where_the_output_goes_nowhere_else() -> None:
    check(Net(), IMAGES, ["conv1.bias", "conv2.bias"])


def test_layers_that_are_left_alone() -> None:
    for wrap in (nn.Sequential, Untraceable):
        conv, norm = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        check(wrap(nn.Sequential(conv, norm, conv, nn.BatchNorm2d(C))), IMAGES, [])
        norm = nn.BatchNorm2d(C)
        check(wrap(nn.Sequential(nn.Conv2d(C, C, 1), norm, nn.Conv2d(C, C, 1), norm)), IMAGES, [])
    check(nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(), nn.BatchNorm2d(C)), IMAGES, [])
    check(nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)), IMAGES, [])
    check(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C, track_running_stats=False)), IMAGES, [])
    check(nn.Sequential(nn.Conv2d(C, C, 1), freeze(nn.BatchNorm2d(C))), IMAGES, [])
    tied = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, C))
    tied[2].bias = tied[0].bias
    check(tied, ROWS, [])


def test_a_bias_that_is_read_elsewhere() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(C, C), nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x)) + self.linear.bias

    check(Reads(), ROWS, [])


def test_a_hooked_layer() -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))
    trained(model, ROWS)
    model[0].register_forward_hook(lambda *_: None)
    absorb_bias(model, ROWS.double())
    assert (model[0].bias != 0).all()


def test_channels_must_be_the_features() -> None:
    x = torch.randn(4, C, C)
    check(nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)), x, [])
    check(nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C, channel_dim=-1)), x, ["0.bias"])
    check(nn.Sequential(nn.Conv1d(C, C, 1), bn.BatchNorm1d(C, channel_dim=-1)), x, [])
    # Not batched: (C, L) to the convolution, (N, C) to the batch norm.
    check(nn.Sequential(nn.Conv1d(C, C, 1), nn.BatchNorm1d(C)), torch.randn(C, C), [])


def test_the_optimizer_goes_on() -> None:
    model = trained(nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)), ROWS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    absorb_bias(model, ROWS.double())
    model(ROWS.double()).square().sum().backward()
    optimizer.step()
    assert_close(model[0].bias, torch.zeros(C).double(), rtol=0, atol=1e-9)


class TestFailures:
    def fails(self, model: nn.Module, x: Any, error: type[Exception], match: str) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(error, match=match):
            absorb_bias(model, x)
        assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_an_output_that_changes(self) -> None:
        class Hides(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))

            def forward(self, x: Tensor) -> Tensor:
                y = self.block(x) if x.sum() < torch.inf else x
                return y + self.block[0].bias

        model = trained(Hides(), ROWS)
        self.fails(model, ROWS.double(), ValueError, "output for the example changed by")

    def test_an_example_of_the_wrong_shape(self) -> None:
        model = trained(nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)), ROWS)
        message = r"Linear '0' failed on the example \(a float64 tensor of shape \(8, 2\)\)"
        self.fails(model, torch.randn(8, 2).double(), RuntimeError, message)

    def test_no_batch_norm(self) -> None:
        self.fails(nn.Linear(C, C), ROWS, ValueError, "no batch norm in Linear")

    def test_lazy(self) -> None:
        model = nn.Sequential(nn.LazyLinear(C), nn.BatchNorm1d(C))
        with pytest.raises(ValueError, match="LazyLinear '0' has not seen its first input yet"):
            absorb_bias(model, ROWS)
