"""Single checks without data: severities, evidence, and where they keep quiet."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.handwritten import handwritten
from batchnorm.lab.handwritten import HandwrittenBatchNorm
from tests.model.zoo import ZOO, build


def found(model: nn.Module, code: str, **options: Any) -> list[Finding]:
    return [finding for finding in bn.diagnose(model, **options).findings if finding.code == code]


def block(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6, bias=False), *layers)


def test_a_bias_that_is_zero_or_used_elsewhere_is_no_finding() -> None:
    zero = nn.Linear(4, 6)
    nn.init.zeros_(zero.bias)
    assert not found(nn.Sequential(zero, nn.BatchNorm1d(6)), "BN101")

    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(4, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.bn(y) + y

    assert not found(Used(), "BN101")
    assert not found(bn.freeze(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))), "BN101")


class OverSequences(nn.Module):
    """A linear layer of 5 outputs over the steps of a sequence, and a batch norm of the steps or outputs."""

    def __init__(self, channels: int, swap: bool) -> None:
        super().__init__()
        self.fc, self.bn, self.swap = nn.Linear(6, 5), nn.BatchNorm1d(channels), swap

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.bn(y.transpose(1, 2)) if self.swap else self.bn(y)


def test_a_bias_does_nothing_where_its_values_are_those_of_the_channels() -> None:
    (finding,) = found(OverSequences(5, swap=True), "BN101")
    assert finding.layer == "fc"
    assert not found(OverSequences(7, swap=False), "BN101")


def test_a_bias_is_found_where_the_whole_model_cannot_be_traced() -> None:
    layers = [finding.layer for finding in found(build("untraceable")[0], "BN101")]
    assert layers == ["stem.0", "small.fc", "large.fc"]


def test_weight_decay_says_how_strong_it_is() -> None:
    model = block(nn.BatchNorm1d(6))
    (mild,) = found(model, "BN102", optimizer=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4))
    assert mild.severity == "note"
    assert mild.evidence["half_life_steps"] == pytest.approx(69314.7, rel=1e-4)
    assert not found(model, "BN102", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    groups = bn.parameter_groups(model, 0.1)
    assert not found(model, "BN102", optimizer=torch.optim.AdamW(groups, lr=0.1))


class OwnOptimizer(torch.optim.Optimizer):
    """One that keeps in its groups what it likes."""

    def __init__(self, model: nn.Module, **defaults: Any) -> None:
        super().__init__(model.parameters(), defaults)


def test_an_optimizer_without_a_learning_rate() -> None:
    model = block(nn.BatchNorm1d(6))
    for rate in ({"lr": None}, {}, {"lr": torch.tensor([0.1, 0.2])}, {"lr": "auto"}):
        (finding,) = found(model, "BN102", optimizer=OwnOptimizer(model, weight_decay=0.1, **rate))
        assert (finding.severity, finding.evidence["lr"]) == ("note", None)
        assert finding.what == "weight decay 0.1 shrinks its weight and bias"
    for decay in (None, "cosine", torch.zeros(2)):
        assert not found(model, "BN102", optimizer=OwnOptimizer(model, weight_decay=decay, lr=0.1))


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda value: torch.tensor([value])])
def test_a_learning_rate_may_be_a_tensor(kind: Callable[[float], Any]) -> None:
    model = block(nn.BatchNorm1d(6))
    optimizer = OwnOptimizer(model, lr=kind(0.1), weight_decay=kind(0.01))
    (finding,) = found(model, "BN102", optimizer=optimizer)
    assert (finding.severity, finding.evidence["lr"]) == ("warning", pytest.approx(0.1))


class FunctionalDropout(nn.Module):
    def __init__(self, training: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.bn, self.is_on = nn.BatchNorm1d(4), training

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(nn.functional.dropout(x * 2, 0.25, self.is_on(self)).relu())


def test_functional_dropout_counts_where_it_is_on_in_training() -> None:
    (finding,) = found(FunctionalDropout(lambda module: module.training), "BN103")
    assert finding.evidence["p"] == 0.25
    assert not found(FunctionalDropout(lambda module: False), "BN103")
    assert not found(nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(4)), "BN103")


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_what_dropout_does_to_the_variance_is_no_less_than_is_said(mean: float) -> None:
    dropout = nn.Dropout(0.6)
    (finding,) = found(nn.Sequential(dropout, nn.BatchNorm1d(4)), "BN103")
    assert "at least 2.50 times the variance" in finding.what
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) + mean
    torch.manual_seed(0)
    assert dropout(x).var() / x.var() > 2.5 * 0.99


@pytest.mark.parametrize("dropout", [nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)])
def test_alpha_dropout_keeps_the_variance_it_is_made_for(dropout: nn.Module) -> None:
    x = torch.randn(200_000, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert float(dropout(x).var()) == pytest.approx(float(x.var()), rel=0.02)
    assert not found(nn.Sequential(nn.Linear(3, 4), nn.SELU(), dropout, nn.BatchNorm1d(4)), "BN103")


class FunctionalAlphaDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(nn.functional.alpha_dropout(x.selu(), 0.5, self.training))


def test_functional_alpha_dropout_is_no_finding() -> None:
    assert not found(FunctionalAlphaDropout(), "BN103")


def test_dropout_before_a_convolution_is_not_directly_before() -> None:
    assert not found(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4)), "BN103")


def test_embeddings_may_be_normalised() -> None:
    (finding,) = found(block(nn.BatchNorm1d(6)), "BN104")
    assert finding.severity == "note"
    assert not found(block(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), "BN104")


def test_pooling_without_data_is_a_note() -> None:
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    (finding,) = found(pooled, "BN105")
    assert (finding.layer, finding.severity) == ("2", "note")
    assert not found(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.BatchNorm2d(3)), "BN105")


def test_pooling_with_a_batch_of_one_is_an_error_where_it_is_trained_on() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten())
    batch = [torch.randn(1, 3, 8, 8)]
    assert found(pooled, "BN105", loader=batch)[0].severity == "error"
    (in_eval,) = found(pooled.eval(), "BN105", loader=batch)
    assert in_eval.severity == "note"
    assert "one value per sample" in in_eval.what
    optimizer = torch.optim.SGD(pooled.parameters(), lr=0.1)
    assert found(pooled, "BN105", loader=batch, optimizer=optimizer)[0].severity == "error"


def test_pooling_before_a_frozen_layer_is_no_finding() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten())
    pooled[2].eval()
    assert not found(pooled, "BN105", loader=[torch.randn(1, 3, 8, 8)])
    assert not found(bn.freeze(pooled.train()), "BN105", loader=[torch.randn(1, 3, 8, 8)])


def test_momentum() -> None:
    low = block(nn.BatchNorm1d(6, momentum=1e-3))
    assert found(low, "BN106")[0].severity == "warning"
    low[1].num_batches_tracked.fill_(10_000)
    assert found(low, "BN106")[0].severity == "note"  # its statistics have arrived
    assert found(block(nn.BatchNorm1d(6, momentum=-0.1)), "BN106")[0].severity == "error"
    for fine in (0.1, 0.01, 0.003, 0.4, None):
        assert not found(block(nn.BatchNorm1d(6, momentum=fine)), "BN106")


def test_a_large_eps_beside_large_variances_is_a_note() -> None:
    model = block(nn.BatchNorm1d(6, eps=0.1))
    assert found(model, "BN107")[0].severity == "warning"
    model[1].running_var.fill_(1000)
    model[1].num_batches_tracked.fill_(5)
    assert found(model, "BN107")[0].severity == "note"


def test_never_updated_needs_weights_that_are_trained() -> None:
    model = block(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6))
    assert not found(model, "BN108")
    model[1].bias.data.normal_()
    severities = {finding.layer: finding.severity for finding in found(model, "BN108")}
    assert severities == {"1": "error", "4": "note"}  # the second may be new, or unused
    bn.freeze(model)
    assert {finding.severity for finding in found(model, "BN108")} == {"note"}


def test_without_shifts_the_optimizer_tells_whether_a_layer_is_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False, momentum=0.0))
    optimizer = torch.optim.Adam(model.parameters())
    assert not found(model, "BN108", optimizer=optimizer)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert found(model, "BN108", optimizer=optimizer)[0].severity == "error"


def test_a_layer_without_weights_has_none_that_learn() -> None:
    model = block(nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model[1].eval()
    (finding,) = found(model, "BN112")
    assert (finding.severity, finding.evidence["requires_grad"]) == ("note", False)
    assert "weights" not in finding.what
    assert "the next model.train() lets its statistics move" in finding.what


def test_a_zero_variance_of_a_channel_that_is_off_is_a_note() -> None:
    model = block(nn.BatchNorm1d(6))
    model[1].running_var[2] = 0
    (finding,) = found(model, "BN109")
    assert (finding.severity, finding.evidence["first_channel"]) == ("warning", 2)
    model[1].weight.data[2] = 0
    assert found(model, "BN109")[0].severity == "note"


def test_scales_of_zero_are_a_start_until_they_are_trained() -> None:
    model = block(nn.BatchNorm1d(6))
    nn.init.zeros_(model[1].weight)
    assert found(model, "BN110")[0].severity == "note"
    model[1].bias.data.normal_()
    assert found(model, "BN110")[0].severity == "warning"


def test_shifts_that_have_moved_a_little_from_one() -> None:
    model = block(nn.BatchNorm1d(6))
    model[1].bias.data.normal_(1, 0.05)
    assert found(model, "BN116")[0].severity == "note"
    model[1].bias.data.normal_(0, 1)
    assert not found(model, "BN116")


def test_a_layer_of_a_shared_branch_is_a_note_and_of_two_places_a_warning() -> None:
    (siamese,) = found(build("siamese")[0], "BN118")
    assert siamese.evidence["calls"] == 4
    norm = nn.BatchNorm1d(4)
    assert (
        found(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm), "BN118")[0].severity == "warning"
    )
    branch = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert found(nn.Sequential(branch, branch), "BN118")[0].severity == "note"


def test_convertible_layers_are_counted() -> None:
    (finding,) = found(build("lenet")[0], "BN119")
    assert finding.evidence["convertible"] == 3
    assert not found(bn.convert(build("lenet")[0]), "BN119")


def test_an_evaluation_that_is_not_this_models() -> None:
    with pytest.raises(ValueError, match="called none of the model's batch norms"):
        bn.diagnose(block(nn.BatchNorm1d(6)), evaluate=lambda: None)


def test_an_evaluation_is_stopped_after_a_forward() -> None:
    model, calls = block(nn.BatchNorm1d(6)), []

    def evaluate() -> None:
        for _ in range(1000):
            calls.append(model(torch.randn(3, 4)))

    assert found(model, "BN117", evaluate=evaluate)[0].layer == "1"
    assert not calls
    assert model[1].num_batches_tracked == 0


def test_hand_written_layers_are_known_by_what_they_do() -> None:
    layers = nn.ModuleDict(
        {
            "conv": HandwrittenBatchNorm(5, after_convolution=True),
            "fc": HandwrittenBatchNorm(7, after_convolution=False),
        }
    )
    seen = handwritten(layers)
    assert list(seen) == ["conv", "fc"]
    for kept in seen["conv"].kept:
        assert kept.momentum == pytest.approx(0.9, abs=1e-3)
        assert kept.keeps_graph
        assert not kept.is_saved
    assert seen["conv"].graph_nodes[1] > 3 * seen["conv"].graph_nodes[0]
    assert {kept.correction for kept in seen["fc"].kept} == {None, 0}


class LayerNormWithMemory(nn.Module):
    """Normalises each sample, and keeps running tensors all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        self.var.lerp_(x.detach().var(0), 0.1)
        return nn.functional.layer_norm(x, (6,))


class BatchStatisticsAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0) * self.a + self.b


def test_what_is_no_hand_written_batch_norm() -> None:
    assert not handwritten(nn.Sequential(LayerNormWithMemory(), BatchStatisticsAlone(), nn.InstanceNorm1d(6)))
    for name in ZOO:
        assert not handwritten(ZOO[name]()[0]), name


def test_a_hand_written_layer_that_was_trained_is_left_with_its_graph() -> None:
    layer = HandwrittenBatchNorm(5, after_convolution=False)
    layer(torch.randn(8, 5, requires_grad=True))
    graph, values = layer.running_mean.grad_fn, layer.running_mean.detach().clone()
    assert handwritten(nn.Sequential(layer))
    assert layer.running_mean.grad_fn is graph
    assert torch.equal(layer.running_mean, values)
