"""The models of torchvision that contain batch norm: classification, segmentation, detection and video."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.libraries import torchvision_operators
from benchmarks.zoo.libraries.entry import Entry, Example, images

WITHOUT_BATCH_NORM = (  # the module of a builder in torchvision.models, or the builder's name
    "alexnet",
    "convnext",
    "detection.ssd",
    "raft_small",
    "squeezenet",
    "swin_transformer",
    "video.mvit",
    "video.swin_transformer",
    "vision_transformer",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
)
SHAPES: dict[str, tuple[int, ...]] = {
    "inception_v3": (3, 299, 299),  # the head beside the main one, in train mode, takes no less
    "maxvit_t": (3, 224, 224),
    "s3d": (3, 13, 209, 209),  # the least that leaves the 2 by 7 by 7 that it pools over
}
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}
SSDLITE = "ssdlite320_mobilenet_v3_large"  # resizes to 320 by 320, and takes no other size
SMALL_IMAGES: dict[str, Any] = {"min_size": 96, "max_size": 96}  # what a detector resizes its images to
FEW_BOXES: dict[str, Any] = {
    "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_test": 10,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
}
FROZEN = "fasterrcnn_resnet18_fpn_frozen"


def entries() -> dict[str, Entry]:
    torchvision_operators.define()
    from torchvision import models

    found = {}
    for name in models.list_models():
        family = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if not family.startswith("quantization.") and not {family, name} & {*WITHOUT_BATCH_NORM}:
            found[name] = _entry(name, family)
    found[FROZEN] = Entry(FROZEN, "detection.faster_rcnn", _frozen_faster_rcnn, _list_of_images, trains=False)
    return found


def _entry(name: str, family: str) -> Entry:
    build = partial(_build, name, _options(name, family))
    return Entry(name, family, build, _example(name, family), trains=not family.startswith("detection."))


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, **options)


def _options(name: str, family: str) -> dict[str, Any]:
    if family.startswith("segmentation."):
        return {"weights_backbone": None}
    if family.startswith("detection."):
        size = {} if name == SSDLITE else SMALL_IMAGES
        boxes = FEW_BOXES if "rcnn" in name else {"score_thresh": 0.0, "detections_per_img": 5}
        return {"weights_backbone": None, **size, **boxes}
    return OPTIONS.get(name, {})


def _example(name: str, family: str) -> Callable[[nn.Module, int], Example]:
    if family.startswith("detection."):
        return _list_of_images
    if family.startswith("optical_flow."):
        return _pair_of_images
    return images(*SHAPES.get(name, (3, 8, 64, 64) if family.startswith("video.") else (3, 64, 64)))


def _list_of_images(model: nn.Module, batch: int) -> Example:
    return ([torch.rand(3, 96, 96) for _ in range(batch)],)


def _pair_of_images(model: nn.Module, batch: int) -> Example:
    return (torch.rand(batch, 3, 128, 128), torch.rand(batch, 3, 128, 128))


def _frozen_faster_rcnn() -> nn.Module:
    """A detector as its pretrained weights are fine-tuned: the batch norms of its backbone are frozen."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
    return FasterRCNN(backbone, num_classes=91, **SMALL_IMAGES, **FEW_BOXES)
