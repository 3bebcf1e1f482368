"""Networks of monai with batch norm, in two and three dimensions."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.libraries import torchvision_operators
from benchmarks.zoo.libraries.entry import Entry, images

IN_2D = {"spatial_dims": 2, "in_channels": 1}
IN_3D = {"spatial_dims": 3, "in_channels": 1}
LEVELS = {"channels": (8, 16, 32), "strides": (2, 2)}
HALVED = {"channels": (8, 16), "strides": (2, 2), "norm": "batch"}
DYNAMIC = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
SMALL_RESNET = {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 16, 32, 64]}
SMALL_DENSENET = {"init_features": 16, "growth_rate": 8, "block_config": (2, 2, 2)}
FEATURES = {"features": (8, 8, 16, 32, 64, 8), "norm": "batch"}
SQUEEZED = {"layers": (1, 1, 1, 1), "inplanes": 64}

MODELS: tuple[tuple[str, str, dict[str, Any], tuple[int, ...]], ...] = (  # name, class, options, input
    ("ahnet_2d", "AHNet", {**IN_2D, "layers": (1, 1, 1, 1), "psp_block_num": 1}, (1, 64, 64)),
    ("ahnet_3d", "AHNet", {**IN_3D, "layers": (1, 1, 1, 1), "psp_block_num": 1}, (1, 64, 64, 32)),
    ("attention_unet_2d", "AttentionUnet", {**IN_2D, **LEVELS, "out_channels": 2}, (1, 32, 32)),
    ("attention_unet_3d", "AttentionUnet", {**IN_3D, **LEVELS, "out_channels": 2}, (1, 16, 16, 16)),
    ("autoencoder_2d", "AutoEncoder", {**IN_2D, **HALVED, "out_channels": 1}, (1, 32, 32)),
    ("basic_unet_2d", "BasicUNet", {**IN_2D, **FEATURES}, (1, 32, 32)),
    ("basic_unet_3d", "BasicUNet", {**IN_3D, **FEATURES}, (1, 16, 16, 16)),
    ("basic_unetplusplus_2d", "BasicUNetPlusPlus", {**IN_2D, **FEATURES}, (1, 32, 32)),
    (
        "classifier",
        "Classifier",
        {**LEVELS, "in_shape": (1, 32, 32), "classes": 3, "norm": "batch"},
        (1, 32, 32),
    ),
    ("discriminator", "Discriminator", {**LEVELS, "in_shape": (1, 32, 32), "norm": "batch"}, (1, 32, 32)),
    ("densenet_2d", "DenseNet", {**IN_2D, **SMALL_DENSENET, "out_channels": 3}, (1, 32, 32)),
    ("densenet_3d", "DenseNet", {**IN_3D, **SMALL_DENSENET, "out_channels": 3}, (1, 32, 32, 32)),
    ("densenet121_2d", "DenseNet121", {**IN_2D, "out_channels": 3}, (1, 64, 64)),
    ("dynunet_2d", "DynUNet", {**IN_2D, **DYNAMIC, "out_channels": 2, "norm_name": "batch"}, (1, 32, 32)),
    (
        "dynunet_3d",
        "DynUNet",
        {**IN_3D, **DYNAMIC, "out_channels": 2, "norm_name": "batch", "res_block": True},
        (1, 16, 16, 16),
    ),
    (
        "efficientnet_b0_2d",
        "EfficientNetBN",
        {"model_name": "efficientnet-b0", "pretrained": False},
        (3, 64, 64),
    ),
    (
        "efficientnet_b0_3d",
        "EfficientNetBN",
        {**IN_3D, "model_name": "efficientnet-b0", "pretrained": False},
        (1, 32, 32, 32),
    ),
    (
        "flexible_unet_efficientnet_b0",
        "FlexibleUNet",
        {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"},
        (3, 64, 64),
    ),
    (
        "flexible_unet_resnet18_3d",
        "FlexibleUNet",
        {**IN_3D, "out_channels": 2, "backbone": "resnet18", "decoder_channels": (32, 16, 16, 8, 8)},
        (1, 32, 32, 32),
    ),
    (
        "generator",
        "Generator",
        {
            "latent_shape": (16,),
            "start_shape": (16, 4, 4),
            "channels": (16, 8, 1),
            "strides": (2, 2, 1),
            "norm": "batch",
        },
        (16,),
    ),
    ("highresnet_2d", "HighResNet", {**IN_2D, "out_channels": 2}, (1, 32, 32)),
    ("highresnet_3d", "HighResNet", {**IN_3D, "out_channels": 2}, (1, 16, 16, 16)),
    ("patch_discriminator_2d", "PatchDiscriminator", {**IN_2D, "channels": 8}, (1, 32, 32)),
    ("patch_discriminator_3d", "PatchDiscriminator", {**IN_3D, "channels": 8}, (1, 32, 32, 32)),
    (
        "regressor",
        "Regressor",
        {**LEVELS, "in_shape": (1, 32, 32), "out_shape": (2,), "norm": "batch"},
        (1, 32, 32),
    ),
    ("regunet_2d", "RegUNet", {**IN_2D, "num_channel_initial": 8, "depth": 2}, (1, 32, 32)),
    ("regunet_3d", "RegUNet", {**IN_3D, "num_channel_initial": 8, "depth": 2}, (1, 16, 16, 16)),
    (
        "localnet_3d",
        "LocalNet",
        {**IN_3D, "num_channel_initial": 8, "extract_levels": (0, 1, 2)},
        (1, 16, 16, 16),
    ),
    (
        "resnet_2d",
        "ResNet",
        {**SMALL_RESNET, "spatial_dims": 2, "n_input_channels": 1, "num_classes": 3},
        (1, 64, 64),
    ),
    (
        "resnet_3d",
        "ResNet",
        {**SMALL_RESNET, "spatial_dims": 3, "n_input_channels": 1, "num_classes": 3, "shortcut_type": "A"},
        (1, 32, 32, 32),
    ),
    ("resnet18_3d", "resnet18", {"n_input_channels": 1, "num_classes": 3}, (1, 32, 32, 32)),
    ("segresnet_2d", "SegResNet", {**IN_2D, "norm": "batch"}, (1, 32, 32)),
    ("segresnet_3d", "SegResNet", {**IN_3D, "norm": "batch"}, (1, 16, 16, 16)),
    ("segresnet_ds_3d", "SegResNetDS", {**IN_3D, "init_filters": 8, "dsdepth": 2}, (1, 16, 16, 16)),
    (
        "segresnet_vae_2d",
        "SegResNetVAE",
        {**IN_2D, "input_image_size": (32, 32), "norm": "batch"},
        (1, 32, 32),
    ),
    ("seresnet_2d", "SEResNet50", {**IN_2D, **SQUEEZED, "num_classes": 3}, (1, 64, 64)),
    ("seresnext_3d", "SEResNext50", {**IN_3D, **SQUEEZED, "num_classes": 3}, (1, 32, 32, 32)),
    (
        "unet_2d",
        "UNet",
        {**IN_2D, **LEVELS, "out_channels": 2, "num_res_units": 2, "norm": "batch"},
        (1, 32, 32),
    ),
    ("unet_3d", "UNet", {**IN_3D, **LEVELS, "out_channels": 2, "norm": "batch"}, (1, 16, 16, 16)),
    (
        "varautoencoder_2d",
        "VarAutoEncoder",
        {
            **HALVED,
            "spatial_dims": 2,
            "in_shape": (1, 32, 32),
            "out_channels": 1,
            "latent_size": 4,
        },
        (1, 32, 32),
    ),
    ("vnet_2d", "VNet", {**IN_2D, "out_channels": 2, "dropout_dim": 2}, (1, 32, 32)),
    ("vnet_3d", "VNet", {**IN_3D, "out_channels": 2}, (1, 16, 16, 16)),
)


def entries() -> dict[str, Entry]:
    return {
        name: Entry(name, network.lower(), partial(_build, network, options), images(*shape))
        for name, network, options, shape in MODELS
    }


def _build(network: str, options: dict[str, Any]) -> nn.Module:
    torchvision_operators.define()
    from monai.networks import nets

    return getattr(nets, network)(**options)
