"""Faults of settings: weight decay, momentum, eps and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.doctor.data.digits import Make
from tests.doctor.heldout import nets
from tests.doctor.heldout.cases import Change, judged, new_with_optimizer, untrained
from tests.doctor.heldout.changes import in_layer, setting


def in_dtype(layer: str, dtype: torch.dtype) -> Change:
    return in_layer(layer, lambda norm: norm.to(dtype))


def with_decay(build: Callable[[], nn.Module], kind: Any, lr: float, decay: float) -> Make:
    return new_with_optimizer(
        build, "digits", 32, lambda model: kind(model.parameters(), lr=lr, weight_decay=decay)
    )


SICK: list[tuple[str, Make, str, str | None]] = [
    ("weight decay 0.2 by AdamW", with_decay(nets.ConvViT, torch.optim.AdamW, 1e-3, 0.2), "BN102", "stem.1"),
    (
        "weight decay 0.05 by SGD at 0.1",
        with_decay(nets.DenseNet, torch.optim.SGD, 0.1, 0.05),
        "BN102",
        "features.1.norm",
    ),
    (
        "weight decay 1e-3 by SGD at 1",
        with_decay(nets.MobileNetV3, torch.optim.SGD, 1.0, 1e-3),
        "BN102",
        "stem.1",
    ),
    (
        "momentum 0.9",
        judged("unet", training=True, optimizer=True, change=setting("merge2.1", momentum=0.9)),
        "BN106",
        "merge2.1",
    ),
    (
        "momentum 0.5",
        judged("audio", training=True, data=False, change=setting("5", momentum=0.5)),
        "BN106",
        "5",
    ),
    (
        "momentum 0.999",
        judged("recurrent", training=True, optimizer=True, change=setting("after", momentum=0.999)),
        "BN106",
        "after",
    ),
    (
        "momentum 0.0005",
        untrained(nets.rep_vgg, "digits", 32, change=setting("3.identity", momentum=0.0005)),
        "BN106",
        "3.identity",
    ),
    (
        "momentum 1.5",
        judged("video", training=True, data=False, change=setting("1", momentum=1.5)),
        "BN106",
        "1",
    ),
    ("eps 0.1", judged("conv vit", data=False, change=setting("out_bn", eps=0.1)), "BN107", "out_bn"),
    ("eps 1e-12", judged("point net", data=False, change=setting("bn2", eps=1e-12)), "BN107", "bn2"),
    ("eps 0", judged("autoencoder", data=False, change=setting("decoder.1", eps=0.0)), "BN107", "decoder.1"),
    (
        "one layer in half precision",
        judged("densenet", training=True, data=False, change=in_dtype("features.2.norm", torch.float16)),
        "BN113",
        "features.2.norm",
    ),
    (
        "statistics in bfloat16",
        judged("wine", training=True, change=in_dtype("1", torch.bfloat16), data=False),
        "BN113",
        "1",
    ),
]
