"""observe: the model is left exactly as it was, and what was seen before a failure is there."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.doctor.data import observe, total_steps
from batchnorm.doctor.subject import Subject
from batchnorm.lab.nets import LeNet
from tests.doctor.data.digits import batches, trained
from tests.doctor.data.faults import Collects, MovesInEval, Raises, handwritten


def subject(model: nn.Module, loader: list[Any], **options: Any) -> Subject:
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return Subject(model, norms, batches=loader, **options)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything in a model that a run could change, tensors by their bytes and identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = {key: value for key, value in module.__dict__.items() if not isinstance(value, dict)}
        found[f"{name} hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        for key, value in (module._buffers | module._parameters | module.__dict__).items():
            if isinstance(value, Tensor):
                found[f"{name}.{key}"] = (id(value), value.detach().numpy().tobytes(), value.requires_grad)
            if isinstance(value, list):
                found[f"{name}.{key}"] = list(map(id, value))
    found["gradients"] = [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()]
    found["random"] = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    return found


def seeded(model: nn.Module) -> dict[str, Any]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    return state(model)


def assert_left_alone(model: nn.Module, run: Any) -> None:
    before = seeded(model)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    run()
    after = state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert str(after[name]) == str(value), name


class RaisesInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise KeyError("only in training")
        return x


def with_module(module: nn.Module) -> nn.Module:
    model, _, _ = trained("vgg")
    model.features[5] = module
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: trained("resnet basic")[0],
        lambda: trained("vgg")[0].eval(),
        lambda: bn.convert(trained("vgg")[0]),
        lambda: bn.freeze(trained("vgg")[0]),
        lambda: with_module(Raises()),
        lambda: with_module(RaisesInTraining()),
        lambda: with_module(Collects()),
        lambda: with_module(MovesInEval(8)),
        lambda: with_module(nn.Dropout(0.5)),
    ],
)
def test_the_model_is_left_alone(make: Any) -> None:
    model = make()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter)
    data = batches((3, 16, 16), 8, 3)
    assert_left_alone(model, lambda: observe(subject(model, data), lambda steps: None))


def test_the_tutorials_layer_is_left_alone() -> None:
    model, data, _ = handwritten()
    assert_left_alone(model, lambda: observe(subject(model, data), lambda steps: None))


def test_an_interruption_leaves_the_model_alone() -> None:
    model, _, _ = trained("vgg")
    calls = []

    def interrupted(steps: int) -> None:
        calls.append(steps)
        if len(calls) == 5:
            raise KeyboardInterrupt

    def run() -> None:
        with pytest.raises(KeyboardInterrupt):
            observe(subject(model, batches((3, 16, 16), 8, 3)), interrupted)

    assert_left_alone(model, run)


def test_steps_add_up_to_the_total() -> None:
    one = subject(trained("vgg")[0], batches((3, 16, 16), 8, 3))
    steps: list[int] = []
    observe(one, steps.append)
    assert sum(steps) == total_steps(one)


def test_a_failure_names_the_layer_and_what_came_before_is_observed() -> None:
    observed = observe(subject(with_module(Raises()), batches((3, 16, 16), 8, 3)), lambda steps: None)
    assert observed.failure is not None
    assert observed.failure.layer == "features.5"
    assert "IndexError" in observed.failure.what
    assert list(observed.populations) == ["features.1"]


def test_a_failure_in_training_alone_is_found() -> None:
    observed = observe(
        subject(with_module(RaisesInTraining()), batches((3, 16, 16), 8, 3)), lambda steps: None
    )
    failure = observed.steps.failure
    assert failure is not None
    assert failure.layer == "features.5"
    assert "a training step raises KeyError" in failure.what
    assert observed.recalibrated is not None


def test_a_loss_that_raises_is_a_failure() -> None:
    def loss(output: Tensor, batch: Any) -> Tensor:
        raise ValueError("no such class")

    observed = observe(subject(trained("vgg")[0], batches((3, 16, 16), 8, 2), loss=loss), lambda steps: None)
    assert observed.failure is not None
    assert "the loss raises ValueError" in observed.failure.what


def test_pictures_are_the_running_and_the_recalibrated_statistics() -> None:
    model, _, _ = trained("resnet basic")
    data = batches((3, 16, 16), 32, 4)
    pictures = observe(subject(model, data), lambda steps: None).pictures()
    exact = copy.deepcopy(model)
    bn.recalibrate(exact, data)
    assert len(pictures) == len(subject(model, data).batch_norms)
    for picture in pictures:
        layer, wanted = model.get_submodule(picture.layer), exact.get_submodule(picture.layer)
        assert_close(picture.running_mean, layer.running_mean.double())
        count = 32 * 4  # the unbiased variance of recalibrate against the population's
        assert_close(picture.population_mean, wanted.running_mean.double(), rtol=1e-4, atol=1e-5)
        assert_close(picture.population_var, wanted.running_var.double(), rtol=1.5 / count, atol=1e-6)


def test_mappings_and_other_batches_are_taken() -> None:
    class TakesNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = LeNet("torch", "relu")

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(images)}

    data = [{"images": x} for x, _ in batches((1, 28, 28), 16, 2)]
    observed = observe(subject(TakesNames(), data), lambda steps: None)
    assert observed.failure is None
    assert observed.mates is not None
    assert observed.mates.effect < 1e-5


def test_hooks_on_parameters_do_not_run_in_training_steps() -> None:
    """They may wait for other processes, or take an optimizer's step."""
    model = nn.Sequential(
        nn.LSTM(4, 6, batch_first=True), First(), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(30, 3)
    )
    called: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_hook(called.append)
        parameter.register_post_accumulate_grad_hook(called.append)
    data = [torch.randn(8, 5, 4) for _ in range(3)]
    observed = observe(subject(model, data), lambda steps: None)
    assert observed.failure is None
    assert observed.steps.steps == 3
    assert not called
    model(data[0]).sum().backward()
    assert len(called) == 2 * len(list(model.parameters()))  # those that are there are its own again


class First(nn.Module):
    def forward(self, outputs: Any) -> Tensor:
        return outputs[0]


class HandMade(nn.Module):
    """A batch norm of one's own that holds what it likes: an `eps` of its own, say."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(var.detach(), 0.1)
        return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize(
    "held",
    [
        {"eps": torch.full((4,), 1e-3)},
        {"eps": torch.empty(0)},
        {"eps": None},
        {"num_batches_tracked": torch.zeros(4)},
        {"num_batches_tracked": "none"},
    ],
)
def test_a_hand_made_layer_may_hold_anything(held: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), HandMade(**held), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    observed = observe(subject(model, [torch.randn(8, 3) for _ in range(3)]), lambda steps: None)
    assert observed.failure is observed.steps.failure is None
    assert list(observed.populations) == ["1", "4"]


class Forgets(HandMade):
    """Takes its running tensors for a cache, which eval mode empties."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        mean, var = self._buffers.values()
        self.running_mean = self.running_var = None
        return x if mean is None or var is None else (x - mean) / (var + 1e-5).sqrt()


def test_a_hand_made_layer_may_lose_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Forgets(), nn.BatchNorm1d(4))
    one = subject(model, [torch.randn(8, 3) for _ in range(3)])
    assert list(one.handwritten) == ["1"]
    observed = observe(one, lambda steps: None)
    assert observed.failure is None
    assert "2" in observed.populations
    assert isinstance(model[1].running_mean, Tensor)


class WithoutEps(nn.Module):
    """Two running tensors, and an attribute that raises when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.var = torch.zeros(4), torch.ones(4)

    def __getattribute__(self, name: str) -> Any:
        if name == "eps":
            raise RuntimeError("eps is known only after the first epoch")
        return super().__getattribute__(name)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_a_hand_made_layer_raises_when_it_is_looked_at_is_no_failure_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), WithoutEps(), nn.BatchNorm1d(4))
    observed = observe(subject(model, [torch.randn(8, 3) for _ in range(3)]), lambda steps: None)
    assert observed.failure is observed.steps.failure is None
    assert list(observed.populations) == ["2"]


class OnNothing(nn.Module):
    """Its batch norm is called on an empty batch too, as where an image has no regions of interest."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        if not self.training:
            self.norm(x[:0])
        return y


def test_an_empty_call_of_a_layer_is_no_failure() -> None:
    observed = observe(subject(OnNothing(), [torch.randn(8, 4) for _ in range(3)]), lambda steps: None)
    assert observed.failure is None
    assert list(observed.populations) == ["norm"]
