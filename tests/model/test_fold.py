"""Tests of fold: deployment copies without batch norm."""

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval, parametrizations
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.lab.nets import LeNet
from batchnorm.model import FoldReport, fold
from batchnorm.model.folding.arithmetic import MultiplyAdd, ResidualActivation
from batchnorm.model.folding.check import runnable_copy
from batchnorm.model.nested import tensors_in
from tests.model.zoo import ZOO, build


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def seasoned(model: nn.Module) -> nn.Module:
    """Batch norms far from the identity, as after training; in training mode."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            for parameter in layer.parameters():
                parameter.normal_(0.5, 1)
            if layer.running_mean is not None:
                layer.running_mean.normal_(0, 2)
                layer.running_var.uniform_(0.3, 3)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def checked(model: nn.Module, example: Any) -> nn.Module:
    """The folded copy, once its output is seen to be that of the model, which is as it was."""
    before, training = state(model), [module.training for module in model.modules()]
    modules = list(model.modules())
    folded = fold(model, example)
    assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)
    assert [module.training for module in model.modules()] == training
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not any(module.training for module in folded.modules())
    args = example if isinstance(example, tuple) else (example,)
    runs_anywhere = runnable_copy(folded), runnable_copy(model).eval()
    got, wanted = ([*tensors_in(runnable(*args))] for runnable in runs_anywhere)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert folded.fold_report.error <= 1e-5
    assert folded.fold_report.error_float64 <= 1e-12
    return folded


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def multiply_adds(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, MultiplyAdd)]


def into(folded: nn.Module) -> list[tuple[str, str]]:
    """The names in the report without classes: what was folded, and into what."""
    return [(entry.layer.split("'")[1], entry.into.split("'")[1]) for entry in folded.fold_report.folded]


def reasons(folded: nn.Module) -> str:
    report = folded.fold_report
    return "\n".join(str(entry) for entry in (*report.multiply_adds, *report.left_alone, *report.untraced))


# The zoo.


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str) -> None:
    model, inputs = build(name)
    folded = checked(model, inputs)
    report = folded.fold_report
    assert report.error <= 1e-5
    assert report.error <= 10 * report.error_unfolded + 1e-6
    left = {entry.layer for entry in report.left_alone}
    assert len(norms(folded)) == len(left)
    assert report.parameters_saved > 0


def test_most_of_the_zoo_is_folded_into_weights() -> None:
    counts = {"folded": 0, "others": 0}
    for name in ("resnet basic", "vgg", "mobilenet v2", "u-net", "efficientnet", "dcgan generator", "lenet"):
        report = fold(*build(name)).fold_report
        counts["folded"] += len(report.folded)
        counts["others"] += len(report.multiply_adds) + len(report.left_alone)
    assert counts["others"] == 0
    assert counts["folded"] > 40


# A layer, then batch norm.

WEIGHTED: dict[str, tuple[Callable[..., nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "linear": (lambda **o: nn.Linear(4, 8, **o), nn.BatchNorm1d, (5, 4)),
    "conv 1d": (lambda **o: nn.Conv1d(4, 8, 3, padding=1, **o), nn.BatchNorm1d, (2, 4, 9)),
    "conv 2d": (lambda **o: nn.Conv2d(4, 8, 3, padding=1, **o), nn.BatchNorm2d, (2, 4, 6, 5)),
    "conv 3d": (lambda **o: nn.Conv3d(4, 8, 2, **o), nn.BatchNorm3d, (2, 4, 4, 3, 5)),
    "grouped": (lambda **o: nn.Conv2d(4, 8, 3, groups=2, **o), nn.BatchNorm2d, (2, 4, 6, 6)),
    "depthwise": (lambda **o: nn.Conv2d(4, 8, 3, groups=4, **o), nn.BatchNorm2d, (2, 4, 6, 6)),
    "dilated": (lambda **o: nn.Conv2d(4, 8, 3, dilation=2, stride=2, **o), nn.BatchNorm2d, (2, 4, 9, 9)),
    "same": (lambda **o: nn.Conv1d(4, 8, 5, padding="same", **o), nn.BatchNorm1d, (2, 4, 9)),
    "reflect": (
        lambda **o: nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect", **o), nn.BatchNorm2d, (2, 4, 6, 6)
    ),
    "circular": (
        lambda **o: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", **o), nn.BatchNorm2d, (2, 4, 6, 6)
    ),
    "transposed 1d": (lambda **o: nn.ConvTranspose1d(4, 8, 3, stride=2, **o), nn.BatchNorm1d, (2, 4, 5)),
    "transposed 2d": (
        lambda **o: nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1, **o),
        nn.BatchNorm2d, (2, 4, 5, 5),
    ),
    "transposed 3d": (lambda **o: nn.ConvTranspose3d(4, 8, 2, **o), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    # torch's fuse_conv_bn_eval: RuntimeError
    "transposed, 2 groups": (
        lambda **o: nn.ConvTranspose2d(4, 8, 3, groups=2, **o), nn.BatchNorm2d, (2, 4, 5, 5)
    ),
    # torch's: a weight of the wrong shape
    "transposed, groups = inputs": (
        lambda **o: nn.ConvTranspose2d(4, 8, 3, groups=4, dilation=2, **o), nn.BatchNorm2d, (2, 4, 5, 5)
    ),
}  # fmt: skip

NORM_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "affine=False": {"affine": False},
    "eps": {"eps": 0.1},
    "bias=False": {"bias": False},
}


@pytest.mark.parametrize("options", NORM_OPTIONS.values(), ids=NORM_OPTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_into_the_layer_before(name: str, bias: bool, options: dict[str, Any]) -> None:
    make, norm, shape = WEIGHTED[name]
    try:
        layer = norm(8, **options)
    except TypeError:
        pytest.skip("this torch's batch norm has no bias=")
    model = seasoned(nn.Sequential(make(bias=bias), layer, nn.ReLU()))
    folded = checked(model, torch.randn(shape))
    assert into(folded) == [("1", "0")]
    assert type(folded[1]) is nn.Identity
    assert folded[0].bias.shape == (8,)


def test_torchs_own_still_fails_where_this_does_not() -> None:
    """If one of these passes, torch has been repaired and docs can say so."""
    linear = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)).eval()
    with pytest.raises(TypeError):
        fuse_linear_bn_eval(linear[0], linear[1])
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)).eval()
    with pytest.raises(RuntimeError):
        fuse_conv_bn_eval(transposed[0], transposed[1], transpose=True)(torch.randn(1, 4, 5, 5))


def test_the_weights_are_rounded_once() -> None:
    model = seasoned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folded = fold(model, torch.randn(1, 3, 5, 5))
    norm = model[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    wanted = (model[0].weight.double() * scale[:, None, None, None]).float()
    assert_close(folded[0].weight, wanted, rtol=1.2e-7, atol=0)
    assert (folded[0].weight == wanted).float().mean() > 0.99
    bias = (model[0].bias - norm.running_mean.double()) * scale + norm.bias.double()
    assert_close(folded[0].bias, bias.float(), rtol=1.2e-7, atol=0)


def test_a_linear_layer_over_a_sequence_is_not_what_batch_norm_normalises() -> None:
    # BatchNorm1d takes (N, L, F) as L channels: torch's fuse_linear_bn_eval gives another function.
    model = seasoned(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    folded = checked(model, torch.randn(2, 6, 4))
    assert len(multiply_adds(folded)) == 1
    assert "Linear '0' has its channels in another dimension" in reasons(folded)


def test_channels_last_in_our_layers() -> None:
    model = seasoned(nn.Sequential(nn.Linear(4, 6), bn.BatchNorm1d(6, channel_dim=-1, activation="relu")))
    assert into(checked(model, torch.randn(2, 7, 4))) == [("1", "0")]
    model = seasoned(nn.Sequential(nn.ReLU(), bn.BatchNorm1d(6, channel_dim=-1)))
    folded = checked(model, torch.randn(2, 7, 6))
    assert folded[1].channel_dim == -1


def test_memory_format_of_weights_is_kept() -> None:
    model = seasoned(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).to(
        memory_format=torch.channels_last
    )
    folded = checked(model, torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5)], ids=str)
def test_past_what_does_nothing_in_eval_mode(between: nn.Module) -> None:
    model = seasoned(nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4)))
    assert into(checked(model, torch.randn(2, 3, 5, 5))) == [("2", "0")]


def test_past_functional_dropout() -> None:
    class Net(nn.Module):
        def __init__(self, always: bool) -> None:
            super().__init__()
            self.fc, self.norm, self.always = nn.Linear(3, 4), nn.BatchNorm1d(4), always

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.dropout(self.fc(x), 0.5, self.training or self.always).contiguous())

    assert "dropout() " not in reasons(fold(seasoned(Net(False)), torch.randn(2, 3)))
    folded = fold(seasoned(Net(True)), torch.randn(2, 3))  # the same random numbers in both
    assert "it follows dropout()" in reasons(folded)


# Batch norm, then a layer.

BEFORE: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "linear": (nn.BatchNorm1d(4), nn.Linear(4, 6), (5, 4)),
    "linear without bias": (nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False), (5, 4)),
    "conv 1d": (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "conv 2d": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2, padding="valid"), (2, 4, 8, 7)),
    "conv 3d": (nn.BatchNorm3d(4), nn.Conv3d(4, 6, 2), (2, 4, 4, 4, 4)),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 8, 7)),
    "depthwise": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 8, 7)),
    "1 by 1, same": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, padding="same"), (2, 4, 8, 7)),
    "replicate": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1, padding_mode="replicate"), (2, 4, 8, 7)),
    "reflect": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 7)),
    "circular": (nn.BatchNorm1d(4), nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 8)),
    "transposed 1 by 1": (nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2), (2, 4, 5, 5)),
    "channels last": (bn.BatchNorm1d(4, channel_dim=-1), nn.Linear(4, 6), (2, 7, 4)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_into_the_layer_after(name: str) -> None:
    norm, layer, shape = BEFORE[name]
    model = seasoned(nn.Sequential(nn.ReLU(), norm, nn.Dropout(0.5), layer))
    folded = checked(model, torch.randn(shape))
    assert into(folded) == [("1", "3")]
    assert type(folded[1]) is nn.Identity


PADDED: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "zeros": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 7)),
    "zeros on one side": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=(0, 1)), (2, 4, 8, 7)),
    "same": (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 8)),
    "transposed": (nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "transposed with a stride": (
        nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 6, 2, stride=3, groups=2), (2, 4, 5)
    ),
    "transposed with output padding": (
        nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, stride=2, output_padding=1), (2, 4, 5, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_a_shift_does_not_go_through_zero_padding(name: str) -> None:
    norm, layer, shape = copy.deepcopy(PADDED[name])
    folded = checked(seasoned(nn.Sequential(nn.ReLU(), norm, layer)), torch.randn(shape))
    assert len(multiply_adds(folded)) == 1
    assert "its shift does not go through the zero padding" in reasons(folded)


@pytest.mark.parametrize("name", PADDED)
def test_a_scale_does(name: str) -> None:
    norm, layer, shape = copy.deepcopy(PADDED[name])
    model = seasoned(nn.Sequential(nn.ReLU(), norm, layer))
    nn.init.zeros_(norm.running_mean)
    nn.init.zeros_(norm.bias)
    assert into(checked(model, torch.randn(shape))) == [("1", "2")]


class Flattening(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.how(self.norm(F.relu(x))))


@pytest.mark.parametrize("how", [nn.Flatten(), lambda x: x.flatten(1), lambda x: torch.flatten(x, 1)])
def test_through_a_flatten_into_a_linear_layer(how: Any) -> None:
    assert into(checked(seasoned(Flattening(how)), torch.randn(4, 3, 2, 2))) == [("norm", "fc")]


def test_not_through_other_flattens() -> None:
    folded = checked(seasoned(Flattening(lambda x: x.movedim(1, -1).flatten(1))), torch.randn(4, 3, 2, 2))
    assert "movedim() follows" in reasons(folded)
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(2), nn.Linear(4, 5))
    assert "Flatten '2' follows" in reasons(checked(seasoned(model), torch.randn(4, 3, 2, 2)))
    model = nn.Sequential(nn.ReLU(), bn.BatchNorm1d(3, channel_dim=-1), nn.Flatten(), nn.Linear(6, 5))
    assert "channels in another dimension" in reasons(checked(seasoned(model), torch.randn(4, 2, 3)))


class Reordering(nn.Module):
    """Batch norm over the features of a sequence (N, L, F), between transposes."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.fc, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.activation = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.after(self.norm(self.before(self.activation(self.fc(x))))))


REORDERINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, 2),
    "negative": lambda x: x.transpose(-1, -2),
    "function": lambda x: torch.transpose(x, 1, 2),
    "permute": lambda x: x.permute(0, 2, 1),
    "three": lambda x: x.transpose(0, 1).permute(1, 2, 0).contiguous(),
}


@pytest.mark.parametrize("how", REORDERINGS.values(), ids=REORDERINGS)
def test_through_a_reordering_of_dimensions(how: Callable[[Tensor], Tensor]) -> None:
    model = seasoned(Reordering(how, lambda x: x.transpose(1, 2)))
    assert into(checked(model, torch.randn(2, 5, 4))) == [("norm", "fc")]
    model.activation = nn.ReLU()
    assert into(checked(model, torch.randn(2, 5, 4))) == [("norm", "last")]
    model = seasoned(Reordering(lambda x: x.transpose(1, 2), how))
    model.activation = nn.ReLU()
    assert into(checked(model, torch.randn(2, 5, 4))) == [("norm", "last")]


@pytest.mark.parametrize(
    "how", [lambda x: x, lambda x: x.transpose(1, 2).transpose(1, 2), lambda x: x.permute(2, 1, 0)]
)
def test_a_reordering_that_moves_channels_away(how: Callable[[Tensor], Tensor]) -> None:
    folded = checked(seasoned(Reordering(how, lambda x: x)), torch.randn(6, 6, 4))
    assert "Linear 'fc' has its channels in another dimension" in reasons(folded)
    assert "Linear 'last' has its channels in another dimension" in reasons(folded)


@settings(max_examples=30, deadline=None)
@given(before=st.permutations(range(4)), after=st.permutations(range(4)), relu=st.booleans())
def test_any_reordering(before: list[int], after: list[int], relu: bool) -> None:
    """All sizes are the same, so that only the check could tell a wrong dimension."""
    torch.manual_seed(0)
    model = Reordering(lambda x: x.permute(*before), lambda x: x.permute(*after))
    model.fc, model.norm, model.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 3)
    model.activation = nn.ReLU() if relu else nn.Identity()
    folded = checked(seasoned(model), torch.randn(3, 3, 3, 3))
    wanted = "fc" if not relu and before[1] == 1 else "last" if after[3] == 1 else ""
    assert [target for _, target in into(folded)] == ([wanted] if wanted else [])


class Branches(nn.Module):
    """A batch norm that several layers read, as queries and keys do."""

    def __init__(self, second: nn.Module, add_input: bool = False) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm1d(4), nn.Linear(4, 4), second
        self.add_input = add_input

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.relu())
        y = self.first(x) * self.second(x)
        return y + x if self.add_input else y


def test_into_all_layers_after() -> None:
    folded = checked(seasoned(Branches(nn.Linear(4, 4))), torch.randn(3, 4))
    assert into(folded) == [("norm", "first"), ("norm", "second")]


def test_not_where_something_else_reads_it_too() -> None:
    folded = checked(seasoned(Branches(nn.Linear(4, 4), add_input=True)), torch.randn(3, 4))
    assert "add() follows" in reasons(folded)
    folded = checked(seasoned(Branches(nn.Sigmoid())), torch.randn(3, 4))
    assert "Sigmoid 'second' follows" in reasons(folded)
    assert len(multiply_adds(folded)) == 1


# Batch norm and batch norm.


def test_into_the_batch_norm_after() -> None:
    model = seasoned(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3, eps=0.1), nn.ReLU()))
    folded = checked(model, torch.randn(2, 3, 4, 4))
    assert into(folded) == [("1", "2")]
    assert [type(layer) for layer in folded] == [nn.ReLU, nn.Identity, MultiplyAdd, nn.ReLU]


def test_a_chain_ends_in_one_layer() -> None:
    chain = [nn.BatchNorm2d(3) for _ in range(3)]
    model = seasoned(nn.Sequential(nn.Conv2d(3, 3, 1), *chain, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folded = checked(model, torch.randn(2, 3, 5, 5))
    assert into(folded) == [("1", "0"), ("2", "0"), ("3", "0"), ("5", "4")]
    model = seasoned(nn.Sequential(nn.ReLU(), *chain, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folded = checked(model, torch.randn(2, 3, 5, 5))
    assert into(folded) == [("1", "2"), ("2", "3"), ("3", "4"), ("5", "4")]
    assert not multiply_adds(folded)


def test_batch_norm_alone() -> None:
    model = seasoned(bn.BatchNorm2d(3, activation="silu"))
    folded = checked(model, torch.randn(2, 3, 4, 4))
    assert isinstance(folded, MultiplyAdd)
    assert folded.fold_report.operations_saved == 0


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5)])
def test_a_multiply_add_of_any_rank(shape: tuple[int, ...]) -> None:
    model = seasoned(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.ReLU()))
    folded = checked(model, torch.randn(shape))
    assert repr(folded[1]) == "MultiplyAdd(3, channel_dim=1)"
    assert list(folded.state_dict()) == ["1.weight", "1.bias"]


# This package's layers.


class Residual(nn.Module):
    def __init__(self, activation: str | None = "relu", twice: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3, activation=activation)
        self.twice = twice

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.norm(y, residual=y if self.twice else x, mask=mask)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_residual_and_activation_stay(activation: str | None) -> None:
    folded = checked(seasoned(Residual(activation)), torch.randn(2, 3, 4, 4))
    assert into(folded) == [("norm", "conv")]
    assert isinstance(folded.norm, ResidualActivation)
    assert repr(activation) in repr(folded.norm)


def test_a_mask_changes_nothing_in_eval_mode() -> None:
    checked(seasoned(Residual()), (torch.randn(2, 3, 4, 4), torch.rand(2, 1, 4, 4) > 0.5))


def test_a_residual_that_is_the_layers_input() -> None:
    folded = checked(seasoned(Residual(twice=True)), torch.randn(2, 3, 4, 4))
    assert "its input is its residual too" in reasons(folded)
    assert len(multiply_adds(folded)) == 1


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_an_activation_stops_what_would_go_further(activation: str) -> None:
    model = seasoned(nn.Sequential(nn.ReLU(), bn.BatchNorm1d(3, activation=activation), nn.Linear(3, 2)))
    folded = checked(model, torch.randn(4, 3))
    assert "an activation or a residual follows" in reasons(folded)
    model = seasoned(
        nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, activation=activation), bn.BatchNorm1d(3))
    )
    assert into(checked(model, torch.randn(4, 3))) == [("1", "0")]


def test_training_options_do_not_matter() -> None:
    norm = bn.BatchNorm1d(
        4, ghost_batch_size=4, renorm=True, momentum=None, skip_nonfinite=True, correction=0
    )
    assert into(checked(seasoned(nn.Sequential(nn.Linear(3, 4), norm)), torch.randn(8, 3))) == [("1", "0")]


def test_memory_efficient_models() -> None:
    model = bn.memory_efficient(seasoned(LeNet()))
    assert len(checked(model, torch.randn(2, 1, 28, 28)).fold_report.folded) == 4


# Sharing.


class Shared(nn.Module):
    """One convolution called twice, with a batch norm each or the same."""

    def __init__(self, same_norm: bool) -> None:
        super().__init__()
        self.conv, self.norm1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm2 = self.norm1 if same_norm else nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv(self.norm1(self.conv(x)).relu()))


def test_a_convolution_before_two_batch_norms() -> None:
    folded = checked(seasoned(Shared(same_norm=False)), torch.randn(2, 3, 4, 4))
    assert len(multiply_adds(folded)) == 2
    assert "Conv2d 'conv' is used elsewhere too" in reasons(folded)


def test_a_pair_that_is_shared_as_a_whole() -> None:
    folded = checked(seasoned(Shared(same_norm=True)), torch.randn(2, 3, 4, 4))
    assert into(folded) == [("norm1", "conv")]
    assert folded.norm1 is folded.norm2
    assert type(folded.norm1) is nn.Identity


def test_a_batch_norm_after_two_convolutions() -> None:
    norm = nn.BatchNorm1d(3)
    model = seasoned(nn.Sequential(nn.Linear(2, 3), norm, nn.ReLU(), nn.Linear(3, 3), norm))
    assert into(checked(model, torch.randn(4, 2))) == [("1", "0"), ("1", "3")]


def test_a_batch_norm_after_a_convolution_and_something_else() -> None:
    norm = nn.BatchNorm1d(3)
    model = seasoned(nn.Sequential(nn.Linear(3, 3), norm, nn.ReLU(), norm))
    assert len(multiply_adds(checked(model, torch.randn(4, 3)))) == 1
    model = seasoned(nn.Sequential(nn.Linear(3, 3), norm, norm))
    assert len(multiply_adds(checked(model, torch.randn(4, 3)))) == 1


class OutputUsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_an_output_used_twice() -> None:
    folded = checked(seasoned(OutputUsedTwice()), torch.randn(2, 3, 4, 4))
    assert "the output of Conv2d 'conv' is used elsewhere too" in reasons(folded)


def test_tied_weights() -> None:
    model = seasoned(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)))
    model[3].weight = model[0].weight
    folded = checked(model, torch.randn(4, 3))
    assert into(folded) == [("1", "0")]
    assert folded[3].weight is not folded[0].weight
    assert_close(folded[3].weight, model[3].weight, rtol=0, atol=0)


class UsesTheWeight(nn.Module):
    """A forward that reads a layer's weight itself."""

    def __init__(self, function: bool, norms: bool = False) -> None:
        super().__init__()
        self.fc, self.norm, self.function, self.norms = nn.Linear(3, 3), nn.BatchNorm1d(3), function, norms

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.fc(x))
        if self.norms:
            return y * self.norm.weight
        if self.function:
            return F.linear(y, self.fc.weight)
        return y * next(self.fc.parameters()).norm()


def test_weights_used_elsewhere() -> None:
    folded = checked(seasoned(UsesTheWeight(function=True)), torch.randn(4, 3))
    assert "the weights of Linear 'fc' are used elsewhere in the forward too" in reasons(folded)
    folded = checked(seasoned(UsesTheWeight(function=True, norms=True)), torch.randn(4, 3))
    assert "its parameters or statistics are used elsewhere" in reasons(folded)
    assert len(norms(folded)) == 1


def test_what_tracing_cannot_see_is_found_by_running() -> None:
    model = seasoned(UsesTheWeight(function=False))
    before = state(model)
    with pytest.raises(ValueError, match=r"differ by .* in float64.*Every folded layer gives the same"):
        fold(model, torch.randn(4, 3))
    assert_close(state(model), before, rtol=0, atol=0)


class HiddenAlias(nn.Module):
    """Its forward calls the batch norm past nn.Module's own registers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.steps = [self.fc, self.norm]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.last(x)


def test_culprits_are_named() -> None:
    with pytest.raises(ValueError, match=r"The folded layers whose outputs differ: BatchNorm1d 'norm'"):
        fold(seasoned(HiddenAlias()), torch.randn(4, 3))


# Hooks and parametrizations.


def test_layers_with_hooks_are_left_alone() -> None:
    model = seasoned(
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3))
    )
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append("norm"))
    model[3].register_forward_pre_hook(lambda *_: seen.append("linear"))
    model[4].register_forward_hook(lambda *_: None).remove()
    folded = checked(model, torch.randn(4, 3))
    assert not folded.fold_report.folded
    assert "BatchNorm1d '1': it has hooks" in reasons(folded)
    assert "Linear '3' has hooks" in reasons(folded)
    seen.clear()
    folded(torch.randn(4, 3))
    assert seen == ["norm", "linear"]


def test_hooks_between_containers() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)), nn.BatchNorm1d(3)
    )
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    folded = checked(seasoned(model), torch.randn(4, 3))
    assert into(folded) == [("0.1", "0.0")]
    assert len(multiply_adds(folded)) == 1


def test_hooks_of_the_model_itself() -> None:
    model = seasoned(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    model.register_forward_hook(lambda module, args, output: output * 2)
    assert into(checked(model, torch.randn(4, 3))) == [("1", "0")]


def test_parametrizations_become_weights() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4),
    )  # fmt: skip
    folded = checked(seasoned(model), torch.randn(2, 3, 8, 8))
    assert into(folded) == [("1", "0"), ("4", "3")]
    assert set(folded.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert "0.parametrizations.weight.original0" in model.state_dict()
    assert_close(model.eval()(torch.ones(2, 3, 8, 8)), folded(torch.ones(2, 3, 8, 8)), rtol=1e-4, atol=1e-4)


def test_weight_norm_by_hooks_is_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(3, 4))
    folded = checked(seasoned(nn.Sequential(layer, nn.BatchNorm1d(4))), torch.randn(2, 3))
    assert "Linear '0' has hooks" in reasons(folded)


# Models in wrappers.


def small() -> nn.Module:
    return seasoned(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))


def test_a_graph_module() -> None:
    assert into(checked(torch.fx.symbolic_trace(small()), torch.randn(5, 3))) == [("1", "0")]


def test_a_compiled_model() -> None:
    model = small()
    folded = fold(torch.compile(model), torch.randn(5, 3))
    assert type(folded) is nn.Sequential
    assert into(folded) == [("1", "0")]


def test_data_parallel() -> None:
    assert into(fold(nn.DataParallel(small()), torch.randn(5, 3))) == [("module.1", "module.0")]


def test_a_part_compiled_by_torch_jit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.ones(2, 4))
    model = nn.Sequential(small(), scripted, nn.Linear(4, 2), nn.BatchNorm1d(2))
    assert into(checked(seasoned(model), torch.randn(5, 3))) == [("0.1", "0.0"), ("3", "2")]


class UnderAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


def test_autocast_in_the_forward() -> None:
    folded = fold(UnderAutocast(), torch.randn(5, 3))
    assert into(folded) == [("inner.1", "inner.0")]
    assert folded.fold_report.error_float64 < 1e-13


def test_a_frozen_layer() -> None:
    model = small()
    model[1].eval().requires_grad_(False)
    folded = checked(model, torch.randn(5, 3))
    assert into(folded) == [("1", "0")]
    model = seasoned(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3).requires_grad_(False)))
    assert not any(parameter.requires_grad for parameter in fold(model, torch.randn(5, 3)).parameters())


# Any order of layers.

PIECES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 4, 3),
    "padded": lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
    "grouped": lambda: nn.Conv2d(4, 4, 1, groups=2),
    "reflected": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, groups=2, stride=2),
    "norm": lambda: nn.BatchNorm2d(4),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "by the batch": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "fused": lambda: bn.BatchNorm2d(4, activation="leaky_relu"),
    "channels last": lambda: bn.BatchNorm2d(8, channel_dim=3),
    "dropout": lambda: nn.Dropout2d(0.5),
    "relu": lambda: nn.ReLU(inplace=True),
    "nested": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
}


class Skipping(nn.Module):
    """Layers in a row, some of which add their input to their output."""

    def __init__(self, pieces: list[str], skips: list[bool], shared: bool) -> None:
        super().__init__()
        made = {name: make() for name, make in PIECES.items()}
        self.pieces = nn.ModuleList(made[name] if shared else PIECES[name]() for name in pieces)
        self.skips = skips
        self.pooled = [name == "channels last" for name in pieces]

    def forward(self, x: Tensor) -> Tensor:
        for piece, skip, pooled in zip(self.pieces, self.skips, self.pooled, strict=True):
            x = F.adaptive_avg_pool2d(x, 8) if pooled else x
            x = piece(x) + F.adaptive_avg_pool2d(x, 1) if skip else piece(x)
        return x


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.sampled_from(list(PIECES)), st.sampled_from([False] * 4 + [True])),
        min_size=1,
        max_size=6,
    ),
    shared=st.booleans(),
)
def test_any_order_of_layers(pieces: list[tuple[str, bool]], shared: bool) -> None:
    names, skips = [name for name, _ in pieces], [skip for _, skip in pieces]
    assume(any(isinstance(layer, _BatchNorm) for name in names for layer in PIECES[name]().modules()))
    torch.manual_seed(0)
    model = seasoned(Skipping(names, skips, shared))
    x = torch.randn(2, 4, 16, 16)
    try:
        copy.deepcopy(model).eval()(x)
    except RuntimeError:
        assume(False)  # an image smaller than the kernel
    folded = fold(model, x)
    report = folded.fold_report
    assert report.error <= 1e-5 + 20 * report.error_unfolded
    left = sum(isinstance(layer, _BatchNorm) and layer.running_mean is None for layer in model.modules())
    assert len(norms(folded)) == left == len(report.left_alone)


# What is left alone.


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_no_running_statistics(norm: type[_BatchNorm]) -> None:
    model = seasoned(nn.Sequential(nn.Linear(3, 4), norm(4, track_running_stats=False)))
    folded = checked(model, torch.randn(5, 3))
    assert "normalises by the batch in eval mode too" in reasons(folded)
    assert len(norms(folded)) == 1


def test_statistics_held_are_used() -> None:
    model = seasoned(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with bn.hold(model):
        assert into(checked(model, torch.randn(5, 3))) == [("1", "0")]


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SameLinear(nn.Linear):
    pass


class StaysInTraining(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> "StaysInTraining":
        return super().train(True)


def test_subclasses() -> None:
    folded = checked(seasoned(nn.Sequential(nn.Linear(3, 4), OwnNorm(4))), torch.randn(5, 3))
    assert "OwnNorm has a forward of its own" in reasons(folded)
    folded = checked(seasoned(nn.Sequential(OwnLinear(3, 4), nn.BatchNorm1d(4))), torch.randn(5, 3))
    assert len(multiply_adds(folded)) == 1
    folded = checked(seasoned(nn.Sequential(SameLinear(3, 4), nn.BatchNorm1d(4))), torch.randn(5, 3))
    assert into(folded) == [("1", "0")]


def test_a_layer_that_stays_in_training_mode() -> None:
    folded = fold(seasoned(nn.Sequential(nn.Linear(3, 4), StaysInTraining(4))), torch.randn(5, 3))
    assert "it stays in training mode after model.eval()" in reasons(folded)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.fc2 = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("var", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.fc2(self.norm(self.fc(x))), self.mean, self.var)


def test_functional_batch_norm_is_folded() -> None:
    folded = checked(seasoned(Functional()), torch.randn(4, 3))
    assert [str(entry) for entry in folded.fold_report.folded] == [
        "BatchNorm1d 'norm' -> Linear 'fc'",
        "batch_norm() in Functional -> Linear 'fc2'",
    ]
    assert {"mean", "var"}.isdisjoint(folded.state_dict())
    assert "batch_norm" not in folded.code


# Models that cannot be traced.


class Branching(nn.Module):
    """Control flow by values around parts without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()) for _ in range(2)]
        )
        self.norm, self.never = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if x.abs().sum() > 0 else self.never(x)
        return self.norm(x)


def test_parts_of_what_cannot_be_traced() -> None:
    folded = checked(seasoned(Branching()), torch.randn(4, 3))
    assert into(folded) == [("stem.1", "stem.0"), ("blocks.0.1", "blocks.0.0"), ("blocks.1.1", "blocks.1.0")]
    report = folded.fold_report
    assert [entry.layer for entry in report.multiply_adds] == ["BatchNorm1d 'norm'"]
    assert [entry.layer for entry in report.left_alone] == ["BatchNorm1d 'never'"]
    assert [entry.layer for entry in report.untraced] == ["Branching"]
    assert "control flow" in report.untraced[0].reason


def test_neighbours_of_what_cannot_be_traced() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Branching(), nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert len(checked(seasoned(model), torch.randn(4, 3)).fold_report.folded) == 5


class CallsAPartOfItsPart(nn.Module):
    """The linear layer is called once more than the Sequential that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return y + self.part[0](y) if x.sum() != 0 else y


def test_a_layer_called_outside_of_its_traced_part() -> None:
    folded = checked(seasoned(CallsAPartOfItsPart()), torch.randn(4, 3))
    assert "Linear 'part.0' is called outside of the traced graph too" in reasons(folded)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, raw: bool = False, scale: Tensor | None = None) -> Tensor:
        y = self.fc(x)
        if raw:
            return y
        return self.norm(y) if scale is None else self.norm(y) * scale


def test_arguments_that_choose_a_path_are_listed() -> None:
    folded = checked(seasoned(Optional()), torch.randn(4, 3))
    assert into(folded) == [("norm", "fc")]
    assert folded.fold_report.assumed == ("Optional: raw=False, scale=None",)
    assert "for these arguments only" in str(folded.fold_report)


class Masked(nn.Module):
    """Without a mask, the second branch reads what is between the linear layer and its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.fc(x)
        if mask is None:
            return self.norm(y) + y
        return self.norm(y) * mask


def test_the_path_of_an_argument_that_is_none() -> None:
    folded = checked(seasoned(Masked()), torch.randn(4, 3))
    assert "the output of Linear 'fc' is used elsewhere too" in reasons(folded)
    assert folded.fold_report.assumed == ("Masked: mask=None",)
    folded = checked(seasoned(Masked()), (torch.randn(4, 3), torch.rand(3)))
    assert into(folded) == [("norm", "fc")]
    assert folded.fold_report.assumed == ()


def test_an_argument_that_decides_nothing_is_not_listed() -> None:
    assert checked(seasoned(Residual()), torch.randn(2, 3, 4, 4)).fold_report.assumed == ()


class ReadsStatistics(nn.Module):
    """A forward with control flow by values that reads a batch norm's buffers, which tracing cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if x.sum() == 0 else self.norm(x) - self.norm.running_mean


def test_a_forward_that_reads_statistics_past_what_can_be_traced() -> None:
    folded = checked(seasoned(ReadsStatistics()), torch.randn(4, 3))
    assert "BatchNorm1d 'norm': its parameters or statistics are used elsewhere" in reasons(folded)
    assert len(norms(folded)) == 1


# Inputs and outputs.


@dataclasses.dataclass
class Output:
    logits: Tensor
    extras: dict[str, Any]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, batch: dict[str, Tensor], *, offset: Tensor) -> Output:
        y = self.norm(self.fc(batch["x"])) + offset
        return Output(
            y, {"classes": y.argmax(1), "pair": [y.exp(), (y * 0 - torch.inf).exp()], "name": "out"}
        )


def test_dicts_in_and_dataclasses_out() -> None:
    model = seasoned(Structured())
    example = {"batch": {"x": torch.randn(4, 3)}, "offset": torch.randn(3)}
    folded = fold(model, example)
    assert into(folded) == [("norm", "fc")]
    assert_close(folded(**example).logits, model.eval()(**example).logits)


def test_a_tuple_is_positional_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.norm(self.fc(a + b))

    assert into(checked(seasoned(Two()), (torch.randn(4, 3), torch.randn(3)))) == [("norm", "fc")]


class Casting(nn.Module):
    """Rounds to float32 and creates tensors of the default dtype on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.norm = nn.Embedding(9, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.offset = torch.randn(3)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index).float() + torch.ones(3) + self.offset
        y = self.norm(self.fc(x)).to(torch.float32)
        return (
            (y @ torch.ones(3, 3)).to(dtype=torch.float32)
            + torch.rand(3)
            + torch.zeros(3, dtype=torch.float32)
        )


def test_casts_and_random_numbers_do_not_disturb_the_check() -> None:
    model, random = seasoned(Casting()), torch.get_rng_state()
    folded = fold(model, torch.arange(5))
    assert folded.fold_report.error_float64 < 1e-13
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_default_dtype() is torch.float32


def test_the_example_is_left_as_it_is() -> None:
    class InPlace(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(1))

    example = torch.randn(4, 3)
    before = example.clone()
    fold(seasoned(InPlace(nn.Linear(3, 3), nn.BatchNorm1d(3))), example)
    assert torch.equal(example, before)


def test_complex_parts_of_a_model() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))
            self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(torch.fft.irfft(torch.fft.rfft(x) * self.filter)))

    assert into(checked(seasoned(Spectral()), torch.randn(4, 8))) == [("norm", "fc")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = seasoned(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    )
    model.to(dtype)
    folded = fold(model, torch.randn(2, 3, 6, 6, dtype=dtype))
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {dtype}
    assert folded.fold_report.error_float64 < 1e-13
    assert folded.fold_report.error <= max(5 * folded.fold_report.error_unfolded, 1e-12)


def test_mixed_dtypes() -> None:
    # Half precision weights and float32 batch norms, as for mixed precision inference.
    model = seasoned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    model[0].bfloat16()
    folded = fold(model, torch.randn(2, 3, 6, 6).bfloat16())
    assert folded[0].weight.dtype is torch.bfloat16
    assert folded[0].bias.dtype is torch.bfloat16
    assert folded[3].weight.dtype is torch.float32
    assert folded(torch.randn(2, 3, 6, 6).bfloat16()).dtype is torch.bfloat16


# The copy.


@pytest.fixture(scope="module")
def lenet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return seasoned(LeNet()), torch.randn(2, 1, 28, 28)


def test_the_copy_keeps_class_names_and_trainability() -> None:
    model = seasoned(LeNet())
    model.conv[0].weight.requires_grad_(False)
    model.fc[0].weight.grad = torch.zeros_like(model.fc[0].weight)
    folded = fold(model, torch.randn(2, 1, 28, 28))
    assert type(folded) is LeNet
    assert [name for name, _ in folded.named_children()] == [name for name, _ in model.named_children()]
    assert not folded.conv[0].weight.requires_grad
    assert folded.fc[0].weight.requires_grad
    assert folded.fc[0].weight.grad is None
    assert model.fc[0].weight.grad is not None
    shared = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not shared & {tensor.data_ptr() for tensor in folded.state_dict().values()}


def test_the_copy_can_be_saved_pickled_and_copied(lenet: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    model, x = lenet
    folded = fold(model, x)
    torch.save(folded.state_dict(), tmp_path / "folded.pt")
    other = fold(seasoned(copy.deepcopy(model)), x)
    other.load_state_dict(torch.load(tmp_path / "folded.pt", weights_only=True))
    for again in (other, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert_close(again(x), folded(x), rtol=0, atol=0)
    for again in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert again.fold_report == folded.fold_report


class Everything(nn.Module):
    """Every kind of what is left: an identity, a residual activation and multiply-adds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), bn.BatchNorm2d(4, activation="relu")
        self.norm3, self.norm4 = bn.BatchNorm2d(4, activation="silu"), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x), x)
        return self.norm4(self.norm3(x, x).relu()).mean((2, 3))


@pytest.fixture(scope="module")
def everything() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    folded = checked(seasoned(Everything()), x)
    assert len(folded.fold_report.multiply_adds) == 2
    assert len(folded.fold_report.folded) == 2
    return folded, x


def test_export(everything: tuple[nn.Module, Tensor]) -> None:
    folded, x = everything
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(folded, (x,), dynamic_shapes={"x": {0: batch}})
    assert not any("norm" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert_close(program.module()(x), folded(x))
    assert program.module()(torch.randn(5, 3, 6, 6)).shape == (5, 4)


@pytest.mark.parametrize("name", ["resnet basic", "u-net", "shared conv"])
def test_export_of_the_zoo(name: str) -> None:
    model, inputs = build(name)
    folded = fold(model, inputs)
    got = torch.export.export(folded, inputs).module()(*inputs)
    assert_close([*tensors_in(got)], [*tensors_in(folded(*inputs))])


def test_compile(everything: tuple[nn.Module, Tensor]) -> None:
    folded, x = everything
    compiled = torch.compile(folded, backend="eager", fullgraph=True)
    assert_close(compiled(x), folded(x))


def test_symbolic_trace(everything: tuple[nn.Module, Tensor]) -> None:
    folded, x = everything
    assert_close(torch.fx.symbolic_trace(folded)(x), folded(x))


def test_trace(everything: tuple[nn.Module, Tensor]) -> None:
    folded, x = everything
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(torch.jit.trace(folded, x)(x), folded(x))


def test_onnx_export(everything: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    folded, x = everything
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(folded, (x,), tmp_path / "folded.onnx", dynamo=True, verbose=False)
    written = onnx.load(tmp_path / "folded.onnx")
    operators = {node.op_type for node in written.graph.node}
    assert "Conv" in operators
    assert "BatchNormalization" not in operators
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(written)
    (output,) = evaluator.run(None, {written.graph.input[0].name: x.numpy()})
    assert_close(torch.from_numpy(output), folded(x), rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_copy(everything: tuple[nn.Module, Tensor]) -> None:
    folded, x = everything
    folded(x).sum().backward()
    assert all(parameter.grad is not None for parameter in folded.parameters())


def test_folding_again_is_an_error_that_says_why(lenet: tuple[nn.Module, Tensor]) -> None:
    model, x = lenet
    with pytest.raises(ValueError, match="no batch norm in LeNet"):
        fold(fold(model, x), x)


# The report.


def test_the_report(lenet: tuple[nn.Module, Tensor]) -> None:
    model, x = lenet
    report = fold(model, x).fold_report
    assert isinstance(report, FoldReport)
    assert into(fold(model, x)) == [
        ("conv.1", "conv.0"),
        ("conv.5", "conv.4"),
        ("fc.1", "fc.0"),
        ("fc.4", "fc.3"),
    ]
    channels = 6 + 16 + 120 + 84
    assert report.parameters_saved == channels * 4 + 4
    assert report.operations_saved == 2 * 2 * (6 * 24 * 24 + 16 * 8 * 8 + 120 + 84)
    assert 0 < report.error < 1e-5
    assert report.tolerance == 1e-9
    text = str(report)
    assert text.startswith("folded (4)\n  BatchNorm2d 'conv.1' -> Conv2d 'conv.0'\n")
    assert "908 of 45,334 parameters and buffers and 18,736 operations per forward saved" in text
    assert "left alone" not in text


def test_the_report_of_what_is_not_folded() -> None:
    model = nn.Sequential(
        nn.ReLU(), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3, track_running_stats=False)
    )
    text = str(fold(seasoned(model), torch.randn(4, 3)).fold_report)
    assert "now a multiply-add (1)\n  BatchNorm1d '1': it follows ReLU '0'; ReLU '2' follows" in text
    assert "left alone (1)\n  BatchNorm1d '3': without running statistics" in text


# Bad input.


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"fold: expected a model .*got function"):
        fold(lambda x: x, torch.randn(2, 3))


def test_no_batch_norm() -> None:
    with pytest.raises(ValueError, match="no batch norm in Sequential"):
        fold(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3))


@pytest.mark.parametrize("tolerance", [0, -1, float("nan")])
def test_a_tolerance_that_is_none(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be above 0, got"):
        fold(nn.BatchNorm1d(3), torch.randn(2, 3), tolerance=tolerance)


def test_a_tolerance_below_rounding() -> None:
    model = seasoned(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"differ by .*where 1e-30 is allowed \(tolerance\)"):
        fold(model, torch.randn(20, 3), tolerance=1e-30)


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm1d(), bn.LazyBatchNorm1d(), nn.LazyLinear(3)], ids=str)
def test_lazy_layers_without_input_yet(layer: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(layer))
    with pytest.raises(ValueError, match=r"Lazy\w+ '1\.0' has not seen its first input yet: run one batch"):
        fold(model, torch.randn(2, 3))


def test_lazy_layers_with_input() -> None:
    model = nn.Sequential(nn.LazyLinear(3), bn.LazyBatchNorm1d(activation="relu"))
    model(torch.randn(4, 5))
    assert into(checked(seasoned(model), torch.randn(4, 5))) == [("1", "0")]


def test_an_example_of_the_wrong_shape(lenet: tuple[nn.Module, Tensor]) -> None:
    model, _ = lenet
    with pytest.raises(
        ValueError, match=r"float32 tensor of shape \(2, 1, 20, 20\)\); it failed in Linear 'fc\.0'"
    ):
        fold(model, torch.randn(2, 1, 20, 20))
    with pytest.raises(ValueError, match=r"failed in BatchNorm2d '1'"):
        fold(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"\(image=float32 tensor of .* in LeNet: TypeError"):
        fold(model, {"image": torch.randn(2, 1, 28, 28)})


@pytest.mark.parametrize(
    ("name", "value"),
    [("running_mean", torch.nan), ("running_var", torch.inf), ("running_var", -1.0), ("weight", torch.inf),
     ("bias", torch.nan)],
)  # fmt: skip
def test_statistics_that_are_not_finite(name: str, value: float) -> None:
    model = seasoned(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4))))
    with torch.no_grad():
        getattr(model[1][0], name)[2] = value
    before = state(model)
    with pytest.raises(ValueError, match=rf"BatchNorm1d '1\.0' is not finite: look at its {name}\. "):
        fold(model, torch.randn(2, 3))
    assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)


def test_statistics_that_leave_no_finite_output() -> None:
    model = seasoned(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model[1].running_var.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"BatchNorm1d '1' is not finite: look at its running_var\. "):
        fold(model, torch.randn(2, 3))


def test_weights_too_large_for_their_dtype() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)).half()
    nn.init.constant_(model[1].running_var, 0)
    nn.init.constant_(model[1].weight, 6e4)
    with pytest.raises(ValueError, match=r"folded weights of Linear '0' are too large for their dtype"):
        fold(model, torch.zeros(2, 3).half())


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.numbers = (number for number in range(3))
    with pytest.raises(ValueError, match=r"Sequential cannot be copied by copy\.deepcopy: .*generator"):
        fold(model, torch.randn(2, 3))


def test_a_model_without_tensors_to_compare() -> None:
    class Silent(nn.Sequential):
        def forward(self, x: Tensor) -> str:
            super().forward(x)
            return "done"

    with pytest.raises(ValueError, match="Silent returned no tensor with a finite value"):
        fold(Silent(nn.BatchNorm1d(3)), torch.randn(2, 3))
    with pytest.raises(ValueError, match="Sequential returned no tensor with a finite value"):
        fold(nn.Sequential(nn.BatchNorm1d(3)), torch.full((2, 3), torch.nan))


def test_a_forward_that_keeps_what_it_saw() -> None:
    class Keeps(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last * 1

    model = seasoned(Keeps(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    folded = fold(model, torch.randn(2, 3))
    assert not hasattr(model, "last")
    assert not hasattr(folded, "last")
    model(torch.randn(2, 3))  # now it holds a tensor with a graph
    assert into(fold(model, torch.randn(2, 3))) == [("1", "0")]


def test_a_converted_model_folds_as_the_model_before() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(16, 3, 6, 6)
    model(x)
    bn.convert(model)
    folded = bn.fold(model, x)
    assert [step.layer for step in folded.fold_report.folded] == ["BatchNorm2d '1'"]
    torch.testing.assert_close(folded(x), model.eval()(x))
    assert isinstance(model[1], bn.BatchNorm2d)
