"""Models of ultralytics, built from the configurations in its package."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from types import ModuleType

from torch import nn

from benchmarks.zoo.libraries import torchvision_operators
from benchmarks.zoo.libraries.entry import Entry, images

MODELS = {  # a configuration, and its class in ultralytics.nn.tasks
    "yolov3-tiny": "DetectionModel",
    "yolov5n": "DetectionModel",
    "yolov6n": "DetectionModel",
    "yolov8n": "DetectionModel",
    "yolov8n-ghost": "DetectionModel",
    "yolov8n-p2": "DetectionModel",
    "yolov8n-seg": "SegmentationModel",
    "yolov8n-pose": "PoseModel",
    "yolov8n-obb": "OBBModel",
    "yolov8n-cls": "ClassificationModel",
    "yolov8n-rtdetr": "RTDETRDetectionModel",
    "yolov9t": "DetectionModel",
    "yolov9c-seg": "SegmentationModel",
    "yolov10n": "DetectionModel",
    "yolo11n": "DetectionModel",
    "yolo11n-seg": "SegmentationModel",
    "yolo12n": "DetectionModel",
    "yolo12n-cls": "ClassificationModel",
    "yolo26n": "DetectionModel",
    "yolo26n-seg": "SegmentationModel",
    "yolo26n-sem": "SemanticSegmentationModel",
    "yolo26n-pose": "PoseModel",
    "yolo26n-obb": "OBBModel",
    "yolo26n-depth": "DepthModel",
    "rtdetr-l": "RTDETRDetectionModel",
    "rtdetr-resnet50": "RTDETRDetectionModel",
}
SILENT = {
    "YOLO_OFFLINE": "true",
    "YOLO_VERBOSE": "false",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_CONFIG_DIR": os.path.join(tempfile.gettempdir(), "ultralytics"),  # its settings, else in the home
}


def entries() -> dict[str, Entry]:
    return {
        name: Entry(name, _family(name), partial(_build, name, kind), images(3, 64, 64))
        for name, kind in MODELS.items()
    }


def _family(name: str) -> str:
    return name.partition("-")[0].rstrip("ntc")  # without the letter of its scale


def _build(name: str, kind: str) -> nn.Module:
    return getattr(_tasks(), kind)(cfg=f"{name}.yaml", verbose=False)


def _tasks() -> ModuleType:
    torchvision_operators.define()
    for variable, value in SILENT.items():
        os.environ.setdefault(variable, value)
    from ultralytics.nn import tasks

    return tasks
