"""LeNet: shapes, where the norms stand, and that all norms start from the same weights."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.lab.handwritten import HandwrittenBatchNorm
from batchnorm.lab.nets import NORMS, LeNet

KINDS = {
    "none": (),
    "handwritten": (HandwrittenBatchNorm,) * 4,
    "torch": (nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm1d),
    "batchnorm": (bn.BatchNorm2d, bn.BatchNorm2d, bn.BatchNorm1d, bn.BatchNorm1d),
}


@pytest.mark.parametrize("norm", NORMS)
def test_logits_and_places_of_the_norms(norm: str) -> None:
    model = LeNet(norm)
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    layers = [*model.conv, *model.fc]
    found = [(before, layer) for before, layer in pairwise(layers) if type(layer) in KINDS[norm]]
    assert tuple(type(layer) for _, layer in found) == KINDS[norm]
    kinds = [type(before) for before, _ in found]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.Linear, nn.Linear][: len(found)]


def test_all_norms_start_from_the_same_weights() -> None:
    firsts = []
    for norm in NORMS:
        torch.manual_seed(3)
        model = LeNet(norm)
        firsts.append(
            [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        )
    for others in firsts[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(firsts[0], others, strict=True))


def test_torch_and_batchnorm_share_a_state_dict() -> None:
    theirs, ours = LeNet("torch"), LeNet("batchnorm")
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"), [({"norm": "layer"}, "none, handwritten"), ({"activation": "x"}, "relu")]
)
def test_unknown_names_list_the_known(options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LeNet(**options)


def test_identity_recovery() -> None:
    """With gamma = sqrt(var + eps) and beta = mean, batch norm is the identity (the tutorial's remark)."""
    x = torch.randn(64, 5, 7, 7, dtype=torch.float64) * 3 + 2
    layer = bn.BatchNorm2d(5, dtype=torch.float64)
    moments = bn.Moments.from_tensor(x)
    with torch.no_grad():
        layer.weight.copy_((moments.var() + layer.eps).sqrt())
        layer.bias.copy_(moments.mean)
    torch.testing.assert_close(layer(x), x, rtol=1e-12, atol=1e-12)
