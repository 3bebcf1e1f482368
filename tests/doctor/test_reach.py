"""The doctor on what libraries build: no warning of a new model, frozen and functional batch norms."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.doctor.finding import Finding


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def found(model: nn.Module, code: str, data: object = None, **options: object) -> list[Finding]:
    return [f for f in bn.diagnose(model, data, **options).findings if f.code == code]  # type: ignore[arg-type]


def stack(*widths: int, **options: object) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after, **options), nn.ReLU()]  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def test_a_variance_below_eps_of_a_new_model_is_a_note() -> None:
    model = stack(8, 16)
    nn.init.normal_(model[0].weight, std=1e-4)
    batches = [torch.randn(64, 8) for _ in range(3)]
    assert found(model, "BN206", batches)[0].severity == "note"
    # Small data are the user's, and training does not make them larger.
    model = stack(8, 16)
    assert found(model, "BN206", [1e-3 * x for x in batches])[0].severity == "warning"
    # So is a variance that training has left.
    nn.init.normal_(model[0].weight, std=1e-4)
    for batch in batches:
        model(batch)
    assert found(model, "BN206", batches)[0].severity == "warning"


def test_a_low_momentum_that_all_layers_of_a_new_model_share_is_a_note() -> None:
    model = stack(8, 16, 16, 16, momentum=0.0003)
    assert {f.severity for f in found(model, "BN106")} == {"note"}
    model[1].momentum = 0.1
    assert {f.severity for f in found(model, "BN106")} == {"warning"}
    model[1].momentum = 0.0003
    model(torch.randn(9, 8))
    assert {f.severity for f in found(model, "BN106")} == {"warning"}


def test_a_momentum_is_shown_with_its_digits() -> None:
    (finding,) = found(stack(8, 16, momentum=0.9997), "BN106")
    assert "momentum 0.9997 weighs the new batch" in finding.what


def test_shifts_that_were_drawn_are_not_trained_ones() -> None:
    model = stack(8, *[100] * 10)
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.normal_(layer.weight, 0.1, 0.1)
            nn.init.normal_(layer.bias, 0, 0.1)
    assert not found(model, "BN108")
    # Training moves each layer's shifts in its own way.
    with torch.no_grad():
        for scale, layer in enumerate(model):
            if isinstance(layer, nn.BatchNorm1d):
                layer.bias.mul_(1 + 0.2 * scale).sub_(0.01 * scale)
    assert {f.severity for f in found(model, "BN108")} == {"error"}


class Contrastive(nn.Module):
    """A score of each sample with each other one of the batch, as CLIP's."""

    def __init__(self, by_batch: bool) -> None:
        super().__init__()
        self.encode = stack(8, 16)
        self.encode[1] = nn.BatchNorm1d(16, track_running_stats=not by_batch)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encode(x)
        return y @ y.mT


def test_scores_of_a_sample_with_its_mates_are_no_fault() -> None:
    batches = [torch.randn(12, 8) for _ in range(3)]
    assert not found(Contrastive(by_batch=False).eval(), "BN216", batches)
    assert found(Contrastive(by_batch=True).eval(), "BN216", batches)


class NeedsLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = stack(8, 16)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.training and labels is None:
            raise ValueError("labels must be given in training")
        return self.net(x)


def test_a_training_step_that_fails_is_a_note_for_a_model_in_eval_mode() -> None:
    batches = [torch.randn(12, 8) for _ in range(2)]
    assert [f.severity for f in found(NeedsLabels().train(), "BN200", batches)] == ["error"]
    (finding,) = found(NeedsLabels().eval(), "BN200", batches)
    assert finding.severity == "note"
    assert "labels must be given in training" in finding.what


class Functional(nn.Module):
    """Normalises what a layer of its own makes of the input, which has as many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.fc(x), self.running_mean, self.running_var, training=self.training)


@pytest.mark.parametrize("depth", [1, 2])
def test_batch_norm_that_is_a_function_is_judged_by_what_it_is_given(depth: int) -> None:
    model = nn.Sequential(*[Functional() for _ in range(depth)], nn.Linear(8, 3))
    batches = [10 * torch.randn(64, 8) + 30 for _ in range(6)]
    for batch in batches * 20:
        model(batch)
    healthy = bn.diagnose(model, batches)
    assert [f for f in healthy.findings if f.severity != "note"] == []
    model[depth - 1].running_mean += 5 * model[depth - 1].running_var.sqrt()
    sick = bn.diagnose(model, batches)
    assert ("BN202", str(depth - 1)) in {(f.code, f.layer) for f in sick.findings if f.severity != "note"}
