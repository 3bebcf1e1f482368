"""Tests of adapt: batch norms fitted to unlabelled data of another kind."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.model import adapt, freeze, recalibrate

C = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network() -> nn.Sequential:
    """Two batch norms deep, with statistics of a source, with dropout that must stay off."""
    model = nn.Sequential(
        nn.Conv2d(1, C, 3), bn.BatchNorm2d(C), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16 * C, C)
    )
    model.extend([nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 3)])
    for _ in range(20):
        model(torch.randn(16, 1, 6, 6))
    return model


@pytest.fixture
def model() -> nn.Sequential:
    return network()


def target(samples: int = 40) -> Tensor:
    return 3 * torch.randn(samples, 1, 6, 6) + 2


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def norms(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def mean_entropy(model: nn.Module, x: Tensor) -> float:
    log_p = model.eval()(x).log_softmax(1)
    return float(-(log_p.exp() * log_p).sum(1).mean())


def test_without_a_prior_the_statistics_are_those_of_sequential_recalibration(model: nn.Module) -> None:
    batches = list(target().split(7))
    expected = recalibrate(copy.deepcopy(model), batches, sequential=True)
    assert adapt(model, batches) is model
    assert_close(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 30, 7]])
def test_the_prior_counts_as_so_many_samples_in_every_layer_as_eval_mode_runs_it(
    model: nn.Module, sizes: list[int]
) -> None:
    x, prior = target(), 16
    source = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in norms(model)]
    adapt(model, x.split(sizes), prior=prior)
    model.eval()
    inputs: dict[nn.Module, Tensor] = {}
    for layer in norms(model):
        layer.register_forward_pre_hook(lambda layer, args: inputs.update({layer: args[0]}))
    model(x)
    share = prior / (prior + len(x))
    for layer, (mean, var) in zip(norms(model), source, strict=True):
        values = inputs[layer].detach().movedim(1, 0).flatten(1)
        assert_close(layer.running_mean, share * mean + (1 - share) * values.mean(1), rtol=1e-4, atol=1e-5)
        assert_close(layer.running_var, share * var + (1 - share) * values.var(1), rtol=1e-4, atol=1e-5)


def test_a_large_prior_changes_next_to_nothing(model: nn.Module) -> None:
    before = [layer.running_mean.clone() for layer in norms(model)]
    adapt(model, [target()], prior=1e12)
    assert_close([layer.running_mean for layer in norms(model)], before)


def test_source_statistics_that_are_nan_do_not_matter_without_a_prior(model: nn.Module) -> None:
    norms(model)[0].running_mean.fill_(torch.nan)
    adapt(model, [target()])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_it_helps_a_classifier_whose_input_was_shifted() -> None:
    x, labels = torch.randn(400, 2), torch.arange(400) % 2
    x[:, 0] += 4 * labels
    model = nn.Sequential(bn.BatchNorm1d(2), nn.Linear(2, 8), bn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    def right(inputs: Tensor) -> float:
        return float((model.eval()(inputs).argmax(1) == labels).double().mean())

    shifted = x * 0.3 + 5
    assert right(x) > 0.95
    assert right(shifted) < 0.7
    adapt(model, list(shifted.split(50)))
    assert right(shifted) > 0.95


def test_entropy_becomes_less_and_only_batch_norms_are_trained(model: nn.Module) -> None:
    batches = list(target().split(20))
    before, plain = state(model), adapt(copy.deepcopy(model), batches)
    adapt(model, batches, entropy_epochs=5, lr=0.02)
    assert mean_entropy(model, target()) < mean_entropy(plain, target())
    trained = {"1.weight", "1.bias", "6.weight", "6.bias"}
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (name not in trained), name


def test_a_step_of_entropy_is_one_of_adam_on_what_normalises_by_the_batch(model: nn.Module) -> None:
    x, expected = target(), copy.deepcopy(model)
    expected.train()
    expected[3].eval()
    trained = [parameter for layer in norms(expected) for parameter in layer.parameters()]
    optimizer = torch.optim.Adam(trained, 0.01)
    log_p = expected(x).log_softmax(1)
    (-(log_p.exp() * log_p).sum(1).mean()).backward()
    optimizer.step()
    adapt(model, [x], entropy_epochs=1, lr=0.01)
    assert_close(dict(model.named_parameters()), dict(expected.named_parameters()))


def test_flags_gradients_hooks_and_parameters_stay(model: nn.Module) -> None:
    model[1].eval()
    model[1].weight.grad = torch.ones(C)
    parameters, flags = list(model.parameters()), [module.training for module in model.modules()]
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        adapt(model, [target()], entropy_epochs=1, prior=4)
    assert [module.training for module in model.modules()] == flags
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model[1].weight.grad, torch.ones(C))
    assert all(p.grad is None for p in parameters if p is not model[1].weight)
    assert all(layer.track_running_stats for layer in norms(model))
    assert len(calls) == 3  # a step of entropy, and a pass for each of two layers
    assert len(model[1]._forward_pre_hooks) == 0


def test_frozen_layers_and_what_requires_no_gradient_are_left_alone(model: nn.Module) -> None:
    freeze(model[1])
    model[6].bias.requires_grad_(False)
    before = state(model)
    adapt(model, [target()], entropy_epochs=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"6.weight", "6.running_mean", "6.running_var", "6.num_batches_tracked"}
    assert not model[6].bias.requires_grad


def test_batches_with_labels_max_batches_and_forward(model: nn.Module) -> None:
    x = target()
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=10)
    expected = adapt(copy.deepcopy(model), [x[:10], x[10:20]], entropy_epochs=1)
    by_loader = adapt(copy.deepcopy(model), loader, max_batches=2, entropy_epochs=1)
    assert_close(by_loader.state_dict(), expected.state_dict())
    batches = [{"pixels": part} for part in x[:20].split(10)]
    adapt(model, batches, entropy_epochs=1, forward=lambda model, batch: model(batch["pixels"]))
    assert_close(model.state_dict(), expected.state_dict())


def test_progress(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    adapt(model, [target()], progress=True)
    assert "adapt" in capsys.readouterr().err


class FailsLater:
    """Batches that end in an error from the k-th time on that they are asked for."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[Tensor]:
        yield target(20)
        self.passes -= 1
        if self.passes < 0:
            raise RuntimeError("the disk is gone")


class TestWhatFailsLeavesTheModelAsItWas:
    def fails(
        self, model: nn.Module, loader: Any, error: type[Exception], message: str, **options: Any
    ) -> None:
        before, flags = state(model), [module.training for module in model.modules()]
        with pytest.raises(error, match=message):
            adapt(model, loader, **options)
        assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert [module.training for module in model.modules()] == flags
        assert all(layer.track_running_stats and not layer._forward_pre_hooks for layer in norms(model))
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("passes", [0, 1, 2])
    def test_a_loader_that_raises_while_entropy_or_statistics_are_taken(
        self, model: nn.Module, passes: int
    ) -> None:
        self.fails(model, FailsLater(passes), RuntimeError, "the disk is gone", entropy_epochs=1, prior=2)

    def test_an_empty_loader(self, model: nn.Module) -> None:
        self.fails(model, [], ValueError, "^adapt: the loader is empty", entropy_epochs=1)

    def test_a_loader_for_one_pass(self, model: nn.Module) -> None:
        self.fails(model, iter([target()]), TypeError, "^adapt: .* more than once")

    def test_a_single_batch(self, model: nn.Module) -> None:
        self.fails(model, target(), TypeError, r"^adapt: .*\[batch\]")

    def test_data_that_are_not_finite(self, model: nn.Module) -> None:
        x = target()
        x[3, 0, 2, 2] = torch.nan
        self.fails(model, [target(), x], ValueError, "^adapt: the mean .*BatchNorm2d '1'")
        self.fails(model, [target(), x], ValueError, "^adapt: the entropy .*batch 2", entropy_epochs=1)

    def test_an_output_without_logits(self, model: nn.Module) -> None:
        def forward(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
            return {"logits": model(batch)}

        self.fails(model, [target()], TypeError, "logits .*dict", entropy_epochs=1, forward=forward)

    def test_an_output_without_gradient(self, model: nn.Module) -> None:
        def forward(model: nn.Module, batch: Tensor) -> Tensor:
            return model(batch).detach()

        self.fails(model, [target()], ValueError, "does not depend", entropy_epochs=1, forward=forward)

    def test_a_wrong_shape(self, model: nn.Module) -> None:
        self.fails(model, [torch.randn(4, 2, 6, 6)], RuntimeError, "^adapt: Conv2d '0' failed on batch 1")

    def test_nothing_to_train(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        self.fails(model, [target()], ValueError, "none requires a gradient", entropy_epochs=1)

    @pytest.mark.parametrize(
        "options",
        [
            {"prior": -1},
            {"prior": float("nan")},
            {"prior": "16"},
            {"prior": True},
            {"lr": float("inf")},
            {"entropy_epochs": -1},
            {"entropy_epochs": 1.0},
            {"entropy_epochs": True},
            {"max_batches": 0},
        ],
        ids=repr,
    )
    def test_options(self, model: nn.Module, options: dict[str, Any]) -> None:
        name = next(iter(options))
        self.fails(model, [target()], ValueError, f"^adapt: {re.escape(name)}=", **options)

    def test_no_batch_norm_and_no_model(self) -> None:
        with pytest.raises(ValueError, match=r"^adapt: no batch norm in Linear"):
            adapt(nn.Linear(2, 2), [target()])
        with pytest.raises(TypeError, match=r"^adapt: expected a model"):
            adapt("model", [target()])  # type: ignore[arg-type]
