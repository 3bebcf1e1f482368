"""Models of segmentation_models_pytorch: a decoder on an encoder."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.zoo.libraries import torchvision_operators
from benchmarks.zoo.libraries.entry import Entry, images

MODELS = (  # the class of the decoder, the name of the encoder
    ("Unet", "resnet18"),
    ("Unet", "efficientnet-b0"),
    ("Unet", "mobilenet_v2"),
    ("Unet", "densenet121"),
    ("Unet", "vgg11_bn"),
    ("Unet", "mobileone_s0"),
    ("Unet", "mit_b0"),
    ("Unet", "se_resnet50"),
    ("Unet", "dpn68"),
    ("Unet", "xception"),
    ("Unet", "inceptionv4"),
    ("Unet", "inceptionresnetv2"),
    ("Unet", "timm-skresnet18"),
    ("Unet", "tu-resnet10t"),
    ("Unet", "tu-regnetx_002"),
    ("UnetPlusPlus", "resnet18"),
    ("UnetPlusPlus", "timm-tf_efficientnet_lite0"),
    ("MAnet", "resnet18"),
    ("MAnet", "mobilenet_v2"),
    ("Linknet", "resnet18"),
    ("Linknet", "efficientnet-b0"),
    ("FPN", "resnext50_32x4d"),
    ("FPN", "tu-mobilenetv3_large_100"),
    ("PSPNet", "resnet18"),
    ("PSPNet", "vgg11_bn"),
    ("PAN", "resnet18"),
    ("PAN", "mobilenet_v2"),
    ("DeepLabV3", "resnet18"),
    ("DeepLabV3", "mobilenet_v2"),
    ("DeepLabV3Plus", "resnet18"),
    ("DeepLabV3Plus", "mobileone_s0"),
    ("UPerNet", "resnet18"),
    ("UPerNet", "mit_b0"),
    ("Segformer", "mit_b0"),
    ("Segformer", "resnet18"),
)


def entries() -> dict[str, Entry]:
    return {entry.name: entry for entry in (_entry(decoder, encoder) for decoder, encoder in MODELS)}


def _entry(decoder: str, encoder: str) -> Entry:
    family = decoder.lower()
    example = images(3, 128, 128) if decoder == "PAN" else images(3, 64, 64)
    return Entry(f"{family}_{encoder}", family, partial(_build, decoder, encoder), example)


def _build(decoder: str, encoder: str) -> nn.Module:
    torchvision_operators.define()
    import segmentation_models_pytorch

    model_class = getattr(segmentation_models_pytorch, decoder)
    return model_class(encoder_name=encoder, encoder_weights=None, classes=3)
