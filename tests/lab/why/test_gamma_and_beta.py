"""Which parameters of a random network are trained."""

import torch
from torch import nn

from batchnorm.lab.why.batch_size import relaxed
from batchnorm.lab.why.classifiers import ConvNet, fit
from batchnorm.lab.why.gamma_and_beta import ResNet, gammas_and_betas, two_weights_per_channel
from batchnorm.lab.why.images import load_images
from batchnorm.renorm import Renorm


def trained(model: nn.Module, parameters: list[nn.Parameter]) -> dict[str, torch.Tensor]:
    """Which entries of which parameters a few steps have changed."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    data = load_images("digits").head(64, 10)
    fit(model, data, epochs=2, batch_size=32, lr=0.1, seed=0, on_steps=lambda _: None, parameters=parameters)
    changed = {name: value.detach() != before[name] for name, value in model.named_parameters()}
    return {name: entries for name, entries in changed.items() if bool(entries.any())}


def test_only_gammas_and_betas_change() -> None:
    torch.manual_seed(0)
    model = ResNet(1, 4)
    parameters = gammas_and_betas(model)
    assert sum(parameter.numel() for parameter in parameters) == 2 * (4 + 2 * (4 + 8 + 16))
    names = set(trained(model, parameters))
    assert len(names) == len(parameters)
    assert all("bn" in name or name.startswith("stem.1") for name in names)


def test_two_weights_of_each_output_channel_change() -> None:
    torch.manual_seed(0)
    model = ResNet(1, 4)
    changed = trained(model, two_weights_per_channel(model, torch.Generator().manual_seed(0)))
    assert all("conv" in name or name == "stem.0.weight" for name in changed)
    assert all(int(entries.flatten(1).sum(1).max()) <= 2 for entries in changed.values())
    assert sum(int(entries.sum()) for entries in changed.values()) > 0.9 * 2 * (4 + 2 * (4 + 8 + 16))


def test_depth_counts_two_layers_a_block_and_two_more() -> None:
    layers = [layer for layer in ResNet(2, 4).modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 14


def test_renorm_relaxes_from_plain_batch_norm() -> None:
    assert relaxed(0) == relaxed(0.03) == Renorm(1, 0)
    assert relaxed(0.25).r_max == relaxed(1).r_max == 3
    assert relaxed(0.16).d_max == relaxed(1).d_max == 5
    assert 1 < relaxed(0.1).r_max < 3


def test_equal_seeds_train_equally() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = ConvNet(nn.BatchNorm2d, 4, dropout_before=0.5, dropout_behind=0.5)
        changed = trained(model, list(model.parameters()))
        assert len(changed) == len(list(model.parameters()))
        weights.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
    assert torch.equal(*weights)
