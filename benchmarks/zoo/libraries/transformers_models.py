"""Models of transformers that contain batch norm, built from configurations of few layers and channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.zoo.libraries import torchvision_operators
from benchmarks.zoo.libraries.entry import Entry, Example

Options = dict[str, Any]


class Tokens(NamedTuple):
    """Token numbers in place of numbers: so many, all below the limit."""

    length: int
    below: int = 50


class Ones(NamedTuple):
    """Ones in place of random numbers, as in a mask that leaves everything in."""

    shape: tuple[int, ...]


Inputs = dict[str, tuple[int, ...] | Tokens | Ones]


class Model(NamedTuple):
    """A class of transformers, the options of its configuration and the keyword arguments of a call."""

    class_name: str
    options: Options
    inputs: Inputs
    trains: bool = True


def _stages(*numbers: int) -> Options:
    return {"out_features": [f"stage{number}" for number in numbers]}


PIXELS: Inputs = {"pixel_values": (3, 64, 64)}
SPECTRUM: Inputs = {"input_features": (64, 16)}
WAVE: Inputs = {"input_values": (800,)}

WIDE: Options = {"initializer_range": 0.2}  # where the usual 0.02 lets a signal vanish in so few channels
RESNET: Options = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
BOTTLENECK: Options = {**RESNET, "layer_type": "bottleneck"}
HGNET: Options = {
    **WIDE,
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 24],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 16, 24, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
}
EFFICIENTNET: Options = {
    "width_coefficient": 0.25,
    "depth_coefficient": 0.3,
    "hidden_dim": 320,
    "image_size": 64,
    **WIDE,
}

RESNET_LAST: Options = {"model_type": "resnet", **RESNET, **_stages(4)}
RESNET_3: Options = {"model_type": "resnet", **RESNET, **_stages(2, 3, 4)}
RESNET_4: Options = {"model_type": "resnet", **RESNET, **_stages(1, 2, 3, 4)}
HGNET_3: Options = {"model_type": "hgnet_v2", **HGNET, **_stages(2, 3, 4)}
RT_RESNET_3: Options = {"model_type": "rt_detr_resnet", **RESNET, **_stages(2, 3, 4)}
CONVNEXT_4: Options = {
    "model_type": "convnext",
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1] * 4,
    **_stages(1, 2, 3, 4),
}
LCNET_V3_4: Options = {
    "model_type": "pp_lcnet_v3",
    "scale": 0.5,
    "initializer_range": 0.08,
    **_stages(2, 3, 4, 5),
}
TIMM_RESNET: Options = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}

TRANSFORMER: Options = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TEXT: Options = {**TRANSFORMER, "vocab_size": 50, "max_position_embeddings": 64}
VIT_4: Options = {**TRANSFORMER, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16}

CODERS: Options = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
}
DETR: Options = {"backbone_config": RESNET_LAST, "d_model": 16, "num_queries": 5, **CODERS}
DEFORMABLE: Options = {**DETR, "d_model": 64, "backbone_config": RESNET_3, "disable_custom_kernels": True}
RT_DETR: Options = {
    **CODERS,
    "backbone_config": RT_RESNET_3,
    "d_model": 16,
    "num_queries": 5,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [16, 16, 16],
}
D_FINE: Options = {**RT_DETR, "backbone_config": HGNET_3, "lqe_hidden_dim": 8, "max_num_bins": 8}
GROUNDING: Options = {**DEFORMABLE, "text_config": {"model_type": "bert", **TEXT}, "max_text_len": 8}
PHRASE: Inputs = {"input_ids": Tokens(8), "attention_mask": Ones((8,)), "token_type_ids": Tokens(8, 1)}
MASKS: Options = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 32,
    "num_queries": 5,
}
PYRAMID: Options = {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2]}
DEPTH: Options = {
    **WIDE,
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "use_batch_norm_in_fusion_residual": True,
}
SPEECH: Options = {
    **TRANSFORMER,
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "layerdrop": 0.0,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
CONFORMER: Options = {**TRANSFORMER, "num_mel_bins": 16, "subsampling_conv_channels": 8, "layerdrop": 0.0}
SERIES: Options = {"context_length": 32, "num_input_channels": 2, "prediction_length": 4, "d_model": 16}
PAST: Inputs = {"past_values": (32, 2)}

MODELS: dict[str, Model] = {
    "mobilenet_v1": Model("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, **WIDE}, PIXELS),
    "mobilenet_v2": Model("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, **WIDE}, PIXELS),
    "mobilenet_v2-segmentation": Model(
        "MobileNetV2ForSemanticSegmentation", {"depth_multiplier": 0.25, "output_stride": 16, **WIDE}, PIXELS
    ),
    "efficientnet": Model("EfficientNetForImageClassification", EFFICIENTNET, PIXELS),
    "resnet": Model("ResNetForImageClassification", RESNET, PIXELS),
    "resnet-bottleneck": Model("ResNetForImageClassification", BOTTLENECK, PIXELS),
    "resnet-backbone": Model("ResNetBackbone", {**RESNET, **_stages(1, 2, 3, 4)}, PIXELS),
    "rt_detr_resnet": Model("RTDetrResNetBackbone", {**BOTTLENECK, **_stages(2, 3, 4)}, PIXELS),
    "regnet": Model("RegNetForImageClassification", {**RESNET, "layer_type": "y", "groups_width": 8}, PIXELS),
    "hgnet_v2": Model("HGNetV2ForImageClassification", HGNET, PIXELS),
    "hgnet_v2-backbone": Model("HGNetV2Backbone", {**HGNET, **_stages(1, 2, 3, 4)}, PIXELS),
    "textnet": Model(
        "TextNetForImageClassification",
        {"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 24, 32], **WIDE},
        PIXELS,
    ),
    "swiftformer": Model(
        "SwiftFormerForImageClassification", {"depths": [1] * 4, "embed_dims": [8, 16, 24, 32]}, PIXELS
    ),
    "pp_lcnet": Model("PPLCNetForImageClassification", {"scale": 0.25, "class_expand": 64, **WIDE}, PIXELS),
    "timm_wrapper": Model("TimmWrapperForImageClassification", {"architecture": "resnet18"}, PIXELS),
    "levit": Model(
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2] * 3,
            "depths": [1] * 3,
            "key_dim": [4] * 3,
            **WIDE,
        },
        PIXELS,
    ),
    "levit-distilled": Model(
        "LevitForImageClassificationWithTeacher",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2] * 3,
            "depths": [1] * 3,
            "key_dim": [4] * 3,
            **WIDE,
        },
        PIXELS,
    ),
    "mobilevit": Model("MobileViTForImageClassification", WIDE, PIXELS),
    "mobilevit-segmentation": Model("MobileViTForSemanticSegmentation", WIDE, PIXELS),
    "mobilevitv2": Model("MobileViTV2ForImageClassification", WIDE, PIXELS),
    "cvt": Model(
        "CvtForImageClassification",
        {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        PIXELS,
    ),
    "segformer": Model("SegformerForSemanticSegmentation", {**PYRAMID, "decoder_hidden_size": 16}, PIXELS),
    "glpn": Model("GLPNForDepthEstimation", {**PYRAMID, "decoder_hidden_size": 16}, PIXELS),
    "beit": Model("BeitForSemanticSegmentation", {**VIT_4, "out_indices": [1, 2, 3, 4]}, PIXELS),
    "data2vec_vision": Model(
        "Data2VecVisionForSemanticSegmentation", {**VIT_4, "out_indices": [0, 1, 2, 3]}, PIXELS
    ),
    "upernet-resnet": Model(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": RESNET_4,
            "hidden_size": 16,
            "auxiliary_channels": 8,
            "auxiliary_in_channels": 24,
        },
        PIXELS,
    ),
    "upernet-convnext": Model(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": CONVNEXT_4,
            "hidden_size": 16,
            "auxiliary_channels": 8,
            "auxiliary_in_channels": 24,
        },
        PIXELS,
    ),
    "dpt-depth": Model(
        "DPTForDepthEstimation", {**VIT_4, **DEPTH, "backbone_out_indices": [0, 1, 2, 3]}, PIXELS
    ),
    "dpt-segmentation": Model(
        "DPTForSemanticSegmentation", {**VIT_4, **DEPTH, "backbone_out_indices": [0, 1, 2, 3]}, PIXELS
    ),
    "zoedepth": Model(
        "ZoeDepthForDepthEstimation",
        {
            **DEPTH,
            "backbone_config": {
                "model_type": "beit",
                **VIT_4,
                **_stages(1, 2, 3, 4),
                "reshape_hidden_states": False,
            },
            "bottleneck_features": 8,
            "num_relative_features": 8,
            "bin_embedding_dim": 8,
        },
        PIXELS,
    ),
    "vitmatte": Model(
        "VitMatteForImageMatting",
        {
            "backbone_config": {"model_type": "vitdet", **VIT_4, "num_channels": 4, **_stages(4)},
            "hidden_size": 16,
            **WIDE,
            "convstream_hidden_sizes": [8, 8, 8],
            "fusion_hidden_sizes": [16, 8, 8, 8],
        },
        {"pixel_values": (4, 64, 64)},
    ),
    "vitpose": Model(
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **VIT_4,
                "image_size": [64, 64],
                "patch_size": [16, 16],
                **_stages(4),
            },
            "use_simple_decoder": False,
        },
        PIXELS,
    ),
    "detr": Model("DetrForObjectDetection", DETR, PIXELS),
    "detr-timm": Model("DetrForObjectDetection", {**DETR, "backbone_config": TIMM_RESNET}, PIXELS),
    "detr-segmentation": Model(
        "DetrForSegmentation",
        {**DETR, "backbone_config": RESNET_4, "d_model": 64, "encoder_attention_heads": 8},
        PIXELS,
    ),
    "conditional_detr": Model("ConditionalDetrForObjectDetection", DETR, PIXELS),
    "table_transformer": Model("TableTransformerForObjectDetection", DETR, PIXELS),
    "dab_detr": Model("DabDetrForObjectDetection", {**DETR, "hidden_size": 16}, PIXELS),
    "deformable_detr": Model("DeformableDetrForObjectDetection", DEFORMABLE, PIXELS),
    "rt_detr": Model("RTDetrForObjectDetection", RT_DETR, PIXELS),
    "rt_detr_v2": Model(
        "RTDetrV2ForObjectDetection", {**RT_DETR, "freeze_backbone_batch_norms": False}, PIXELS
    ),
    "d_fine": Model("DFineForObjectDetection", D_FINE, PIXELS),
    "deimv2": Model("Deimv2ForObjectDetection", D_FINE, PIXELS),
    "lw_detr": Model(
        "LwDetrForObjectDetection",
        {
            "backbone_config": {"model_type": "lw_detr_vit", **VIT_4, "num_windows": 4, **_stages(2, 4)},
            "projector_scale_factors": [1.0],
            "d_model": 16,
            "decoder_layers": 2,
            "decoder_ffn_dim": 16,
            "decoder_self_attention_heads": 2,
            "decoder_cross_attention_heads": 2,
            "num_queries": 5,
            "group_detr": 1,
        },
        PIXELS,
    ),
    "grounding_dino": Model("GroundingDinoForObjectDetection", GROUNDING, PIXELS | PHRASE),
    "mm_grounding_dino": Model("MMGroundingDinoForObjectDetection", GROUNDING, PIXELS | PHRASE),
    "pp_doclayout_v2": Model(
        "PPDocLayoutV2ForObjectDetection",
        {
            **RT_DETR,
            "backbone_config": HGNET_3,
            "reading_order_config": {**TRANSFORMER, "coordinate_size": 3, "shape_size": 2},
            "num_labels": 4,
            "class_thresholds": [0.5] * 4,
            "class_order": [0, 1, 2, 3],
        },
        PIXELS,
    ),
    "pp_doclayout_v3": Model(
        "PPDocLayoutV3ForObjectDetection",
        {
            **RT_DETR,
            "backbone_config": {**HGNET_3, **_stages(1, 2, 3, 4)},
            "x4_feat_dim": 8,
            "mask_feature_channels": [8, 8],
            "num_prototypes": 4,
        },
        PIXELS,
    ),
    "pp_ocrv5_mobile_det": Model(
        "PPOCRV5MobileDetForObjectDetection",
        {"backbone_config": LCNET_V3_4, "initializer_range": 0.05},
        PIXELS,
    ),
    "pp_ocrv5_mobile_rec": Model(
        "PPOCRV5MobileRecForTextRecognition",
        {"head_out_channels": 20, "backbone_config": LCNET_V3_4},
        {"pixel_values": (3, 96, 96)},
    ),
    "pp_lcnet_v3": Model("PPLCNetV3Backbone", {"scale": 0.5, "initializer_range": 0.08}, PIXELS),
    "slanet": Model("SLANetForTableRecognition", {"max_text_length": 20, **WIDE}, PIXELS),
    "uvdoc": Model(
        "UVDocModel",
        {"backbone_config": {"model_type": "uvdoc_backbone", **_stages(1, 2, 3, 4, 5, 6)}},
        PIXELS,
    ),
    "mask2former": Model(
        "Mask2FormerForUniversalSegmentation", {"backbone_config": RESNET_4, **MASKS}, PIXELS
    ),
    "maskformer": Model(
        "MaskFormerForInstanceSegmentation",
        {
            "backbone_config": RESNET_4,
            "decoder_config": {"model_type": "detr", **DETR, "d_model": 32},
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
        },
        PIXELS,
    ),
    "oneformer": Model(
        "OneFormerForUniversalSegmentation",
        {
            "backbone_config": RESNET_4,
            **MASKS,
            "conv_dim": 32,
            "mask_dim": 32,
            "text_encoder_width": 16,
            "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 50,
            "query_dec_layers": 1,
        },
        PIXELS | {"task_inputs": Tokens(77)},
    ),
    "efficientloftr": Model(
        "EfficientLoFTRModel",
        {
            "stage_num_blocks": [1, 1, 1, 1],
            "out_features": [8, 8, 16, 32],
            "hidden_size": 32,
            "num_attention_layers": 1,
            "num_attention_heads": 8,
        },
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "superglue": Model(
        "SuperGlueForKeypointMatching",
        {
            "keypoint_detector_config": {
                "model_type": "superpoint",
                "encoder_hidden_sizes": [8, 8, 8, 8],
                "decoder_hidden_size": 16,
                "descriptor_decoder_dim": 16,
                "keypoint_threshold": 0.0,
                "max_keypoints": 8,
            },
            "hidden_size": 16,
            "keypoint_encoder_sizes": [8, 16],
            "gnn_layers_types": ["self", "cross"],
            "num_attention_heads": 2,
            "sinkhorn_iterations": 5,
        },
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "align": Model(
        "AlignModel",
        {
            "text_config": TEXT,
            "vision_config": EFFICIENTNET,
            "projection_dim": 80,
        },
        PIXELS | {"input_ids": Tokens(8)},
    ),
    "groupvit": Model(
        "GroupViTModel",
        {
            "text_config": {**TEXT, "bos_token_id": 48, "eos_token_id": 49},
            "vision_config": {
                **VIT_4,
                "depths": [2, 1, 1],
                "num_group_tokens": [4, 2, 0],
                "num_output_groups": [4, 2, 2],
            },
            "projection_dim": 16,
            "projection_intermediate_dim": 32,
        },
        PIXELS | {"input_ids": Tokens(8)},
    ),
    "clap": Model(
        "ClapAudioModel",
        {
            "window_size": 4,
            "num_mel_bins": 16,
            "spec_size": 64,
            "patch_size": 2,
            "patch_stride": [2, 2],
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "patch_embeds_hidden_size": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
        },
        {"input_features": (1, 32, 16)},
    ),
    "perceiver": Model(
        "PerceiverForImageClassificationConvProcessing",
        {
            "num_latents": 8,
            "d_latents": 16,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 1,
        },
        {"inputs": (3, 224, 224)},
    ),
    "speecht5": Model(
        "SpeechT5ForTextToSpeech",
        {
            **CODERS,
            "hidden_size": 16,
            "vocab_size": 50,
            "num_mel_bins": 8,
            "speaker_embedding_dim": 4,
            "speech_decoder_prenet_dropout": 0.0,
            "speech_decoder_prenet_units": 16,
            "speech_decoder_postnet_units": 8,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
            "max_text_positions": 64,
        },
        {"input_ids": Tokens(8), "decoder_input_values": (6, 8), "speaker_embeddings": (4,)},
    ),
    "fastspeech2_conformer": Model(
        "FastSpeech2ConformerModel",
        {
            "hidden_size": 16,
            "vocab_size": 50,
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_linear_units": 16,
            "decoder_linear_units": 16,
            "speech_decoder_postnet_units": 8,
            "duration_predictor_channels": 8,
            "energy_predictor_channels": 8,
            "pitch_predictor_channels": 8,
        },
        {"input_ids": Tokens(8), "attention_mask": Ones((8,))},
        trains=False,
    ),
    "wav2vec2_conformer": Model(
        "Wav2Vec2ConformerModel",
        {**SPEECH, "conv_depthwise_kernel_size": 3, "position_embeddings_type": "relative"},
        WAVE,
    ),
    "hubert": Model("HubertModel", {**SPEECH, "conv_pos_batch_norm": True}, WAVE),
    "seamless_m4t": Model(
        "SeamlessM4TForSpeechToText",
        {
            **CODERS,
            "hidden_size": 16,
            "vocab_size": 50,
            "feature_projection_input_dim": 16,
            "speech_encoder_layers": 1,
            "speech_encoder_attention_heads": 2,
            "speech_encoder_layerdrop": 0.0,
            "speech_encoder_intermediate_size": 16,
            "conv_depthwise_kernel_size": 3,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
        },
        SPECTRUM | {"decoder_input_ids": Tokens(4)},
    ),
    "parakeet": Model(
        "ParakeetForCTC", {"encoder_config": CONFORMER, "vocab_size": 20, "pad_token_id": 19}, SPECTRUM
    ),
    "lasr": Model(
        "LasrForCTC", {"encoder_config": {**CONFORMER, "conv_kernel_size": 9}, "vocab_size": 20}, SPECTRUM
    ),
    "granite_speech5": Model(
        "GraniteSpeech5ForCTC",
        {
            "encoder_config": {**TRANSFORMER, "num_mel_bins": 4, "vocab_size": 20, "context_size": 16},
            "vocab_size": 20,
        },
        SPECTRUM,
    ),
    "patchtst": Model(
        "PatchTSTForPrediction",
        {**SERIES, "patch_length": 8, "patch_stride": 8, "norm_type": "batchnorm"},
        PAST,
    ),
    "patchtsmixer": Model("PatchTSMixerForPrediction", {**SERIES, "norm_mlp": "BatchNorm"}, PAST),
    "informer": Model(
        "InformerModel",
        {
            **CODERS,
            "d_model": 16,
            "prediction_length": 4,
            "context_length": 16,
            "lags_sequence": [1, 2],
            "num_time_features": 1,
            "encoder_layers": 2,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
        },
        {
            "past_values": (18,),
            "past_time_features": (18, 1),
            "past_observed_mask": Ones((18,)),
            "future_values": (4,),
            "future_time_features": (4, 1),
        },
    ),
}


def entries() -> dict[str, Entry]:
    return {name: _entry(name, model) for name, model in MODELS.items()}


def _entry(name: str, model: Model) -> Entry:
    build = partial(_build, model.class_name, model.options)
    return Entry(name, name.partition("-")[0], build, _example(model.inputs), model.trains)


def _build(class_name: str, options: Options) -> nn.Module:
    torchvision_operators.define()
    import transformers

    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**options))


def _example(inputs: Inputs) -> Callable[[nn.Module, int], Example]:
    def example(model: nn.Module, batch: int) -> Example:
        return {name: _input(batch, kind) for name, kind in inputs.items()}

    return example


def _input(batch: int, kind: tuple[int, ...] | Tokens | Ones) -> torch.Tensor:
    if isinstance(kind, Tokens):
        return torch.randint(kind.below, (batch, kind.length))
    if isinstance(kind, Ones):
        return torch.ones(batch, *kind.shape, dtype=torch.long)
    return torch.randn(batch, *kind)
