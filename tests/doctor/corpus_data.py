"""Sick and healthy models for the checks with data: one planted fault each, on real images.

`SICK` is (name, make, code, layer), `HEALTHY` is (name, make); `make()` gives the model, its batches and
what else a `Subject` takes.
"""

from __future__ import annotations

import batchnorm as bn
from tests.doctor.data.digits import Make
from tests.doctor.data.faults import (
    CentresTheBatch,
    Collects,
    MovesInEval,
    Raises,
    checkpointed,
    dead,
    evaluates_in_training_mode,
    far_bias,
    forgotten,
    half_zero,
    handwritten,
    images_changed,
    not_a_number,
    ordered,
    padded,
    real_and_generated,
    replaced,
    scaled,
    small_batches,
    spoiled,
    statistics,
    two_forwards,
    unlabelled,
    with_an_inf,
    with_data,
    without_running_statistics,
)
from tests.doctor.data.well import (
    after_training,
    converted,
    fine_tuned,
    recalibrated,
    untrained,
    without_dropout,
)

HEALTHY: list[tuple[str, Make]] = [
    *[
        (f"untrained {name}, batch {size}", untrained(name, size, count))
        for name, size, count in [
            ("lab/torch/relu", 32, 8),
            ("lab/batchnorm/sigmoid", 64, 4),
            ("vgg", 16, 8),
            ("resnet basic", 8, 8),
            ("resnet bottleneck", 32, 8),
            ("mobilenet v2", 64, 4),
            ("densenet", 128, 4),
            ("googlenet", 256, 4),
            ("u-net", 8, 8),
            ("resnet preactivation", 512, 2),
            ("conv 1d", 32, 8),
            ("synchronised", 32, 8),
        ]
    ],
    *[
        (f"trained {name}, batch {size}", after_training(name, size, count))
        for name, size, count in [
            ("lab/torch/sigmoid", 32, 8),
            ("lab/torch/relu", 64, 4),
            ("lab/batchnorm/relu", 128, 4),
            ("vgg", 32, 8),
            ("resnet basic", 16, 8),
            ("resnet bottleneck", 32, 8),
            ("resnext", 32, 8),
            ("resnet preactivation", 32, 8),
            ("resnet functional", 64, 4),
            ("mobilenet v2", 64, 4),
            ("mobilenet v3", 64, 4),
            ("shufflenet", 64, 4),
            ("squeezenet", 256, 4),
            ("regnet", 64, 4),
            ("densenet", 64, 4),
            ("googlenet", 512, 2),
            ("mobilenet v1", 64, 4),
            ("temporal conv net", 64, 4),
            ("u-net", 2, 8),
            ("autoencoder", 4, 8),
            ("mlp", 64, 4),
            ("lazy", 128, 4),
        ]
    ],
    ("trained vgg, in eval mode", after_training("vgg", 32, 8, lambda model: model.eval())),
    ("trained vgg, test images", after_training("vgg", 32, 8, lambda model: model.eval(), split="test")),
    ("trained resnet, test images", after_training("resnet basic", 16, 8, lambda m: m.eval(), split="test")),
    ("trained lenet, one batch", after_training("lab/torch/relu", 64, 1)),
    ("trained resnet, frozen", after_training("resnet basic", 16, 8, bn.freeze)),
    ("fine-tuned resnet, batch 8", after_training("resnet basic", 8, 8, fine_tuned)),
    ("trained wide resnet, without dropout", without_dropout("wide resnet")),
    ("recalibrated resnet", recalibrated("resnet bottleneck")),
    ("converted vgg", converted("vgg", True)),
    ("converted resnet", converted("resnet bottleneck", True)),
    ("converted mobilenet, untrained", converted("mobilenet v2", False)),
]

SICK: list[tuple[str, Make, str, str | None]] = [
    ("a module raises", replaced("vgg", "features.5", lambda _: Raises()), "BN200", "features.5"),
    (
        "a running variance is a tenth",
        spoiled("resnet basic", statistics("layer2.0.bn1", factor=0.1)),
        "BN202",
        "layer2.0.bn1",
    ),
    ("running means are off", spoiled("vgg", statistics("features.5", mean=1.0)), "BN202", "features.5"),
    (
        "one channel's mean is off",
        spoiled("mobilenet v2", statistics("features.0.1", mean=4.0, channels=slice(1))),
        "BN202",
        "features.0.1",
    ),
    ("a convolution was rescaled", spoiled("resnet bottleneck", scaled("conv1", 5.0)), "BN202", "bn1"),
    ("statistics were not loaded", spoiled("lab/torch/relu", forgotten), "BN202", "conv.1"),
    (
        "outputs by a wrong variance",
        spoiled("lab/torch/sigmoid", statistics("fc.1", factor=0.01)),
        "BN201",
        "fc.1",
    ),
    (
        "outputs by a wrong mean",
        spoiled("shufflenet", statistics("1.branch2.1", mean=3.0)),
        "BN201",
        "1.branch2.1",
    ),
    ("dropout shifts the variance", after_training("wide resnet"), "BN201", "layer2.bn2"),
    ("batches of 2 before a linear layer", small_batches("lab/torch/relu", 2), "BN203", "fc.1"),
    ("batches of 3 features", small_batches("mlp", 3), "BN203", "bn1"),
    ("half of the filters are zero", spoiled("lab/torch/relu", half_zero("conv.0")), "BN204", "conv.1"),
    (
        "zero filters in a residual branch",
        spoiled("resnet basic", half_zero("layer1.0.conv1")),
        "BN204",
        "layer1.0.bn1",
    ),
    ("dead ReLUs", spoiled("vgg", dead("features.1")), "BN205", "features.1"),
    ("dead ReLUs of functions", spoiled("googlenet", dead("1.branch1.bn")), "BN205", "1.branch1.bn"),
    (
        "weights far too small",
        spoiled("resnet basic", scaled("layer2.0.conv1", 1e-4)),
        "BN206",
        "layer2.0.bn1",
    ),
    (
        "images of thousandths",
        with_data("lab/torch/relu", images_changed(lambda x: x * 1e-4)),
        "BN206",
        "conv.1",
    ),
    ("a bias of ten thousand", spoiled("lab/torch/relu", far_bias("conv.0")), "BN207", "conv.1"),
    ("padded sequences", padded, "BN208", "1"),
    ("NaN weights", spoiled("densenet", not_a_number("features.2.2")), "BN209", "features.2.2"),
    ("inf in an image", with_data("vgg", with_an_inf), "BN209", None),
    (
        "a hand-written layer moves in eval mode",
        replaced("vgg", "features.1", lambda n: MovesInEval(n.num_features)),
        "BN210",
        "features.1",
    ),
    (
        "evaluated in training mode",
        spoiled("lab/torch/relu", lambda m: None, forward=evaluates_in_training_mode),
        "BN210",
        "conv.1",
    ),
    ("a checkpoint moves twice", checkpointed("resnet basic", False), "BN211", "body.bn1"),
    ("a reentrant checkpoint moves twice", checkpointed("vgg", True), "BN211", "body.features.1"),
    (
        "a second forward of the batch",
        spoiled("vgg", lambda m: None, forward=two_forwards),
        "BN212",
        "features.1",
    ),
    (
        "real and generated images",
        spoiled("regnet", lambda m: None, forward=real_and_generated),
        "BN212",
        "0.1",
    ),
    ("the tutorial's layer", handwritten, "BN213", "conv.1"),
    ("features are collected", replaced("vgg", "features.2", lambda _: Collects()), "BN214", "features.2"),
    (
        "test images inverted",
        with_data("lab/torch/relu", images_changed(lambda x: 1 - x), mode=False),
        "BN215",
        "conv.1",
    ),
    (
        "test images brighter",
        with_data("resnet basic", images_changed(lambda x: 3 * x + 1), mode=False),
        "BN215",
        "bn1",
    ),
    (
        "no running statistics",
        replaced("resnet bottleneck", "layer1.0.bn1", without_running_statistics),
        "BN216",
        "layer1.0.bn1",
    ),
    (
        "features centred over the batch",
        replaced("vgg", "features.2", lambda _: CentresTheBatch()),
        "BN216",
        "features.2",
    ),
    ("sorted by class", with_data("lab/torch/relu", ordered), "BN217", None),
    (
        "sorted, without labels",
        with_data("resnet basic", lambda data: unlabelled(ordered(data))),
        "BN217",
        None,
    ),
]
