"""Tiny models of the transformers library, made from their configurations; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo import floats, images, tokens

CLASSES = 5
WORDS: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 32}
LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PATCHES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_labels": CLASSES}


def made(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """How to make the model class ``name`` with the configuration class ``config``."""

    def build() -> nn.Module:
        import transformers as hf

        return getattr(hf, name)(getattr(hf, f"{config}Config")(**options))

    return build


def detr() -> nn.Module:
    """The detector with a ResNet of two stages in front instead of a downloaded one."""
    import transformers as hf

    stages: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "out_features": ["stage2"]}
    layers: dict[str, Any] = {
        f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
    }
    layers |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32}
    config = hf.DetrConfig(backbone_config=hf.ResNetConfig(**stages), **layers)
    config.num_queries, config.num_labels = 6, CLASSES
    return hf.DetrForObjectDetection(config)


def text(batch: int) -> dict[str, Tensor]:
    """Token numbers, and a mask that hides the end of the last text."""
    ids = tokens()(batch)
    mask = torch.ones_like(ids)
    mask[-1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def two_texts(batch: int) -> dict[str, Tensor]:
    return {"input_ids": tokens()(batch), "decoder_input_ids": tokens(length=5)(batch)}


def pixels(size: int = 16) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {"pixel_values": images(size=size)(batch)}


CONVOLUTIONAL: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": CLASSES}
SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4}
SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [32, 64],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [4, 8],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 24,
    "num_labels": CLASSES,
}
EFFICIENTNET: dict[str, Any] = {
    "width_coefficient": 0.05,
    "depth_coefficient": 1.0,
    "in_channels": [160, 320, 480],
    "out_channels": [320, 480, 640],
    "kernel_sizes": [3, 5, 3],
    "strides": [1, 2, 1],
    "expand_ratios": [1, 6, 6],
    "num_block_repeats": [1, 2, 1],
    "depthwise_padding": [],
    "hidden_dim": 64,
    "image_size": 32,
    "num_labels": CLASSES,
}
WAV2VEC2: dict[str, Any] = {
    "vocab_size": 20,
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "classifier_proj_size": 16,
    "num_labels": CLASSES,
    **{f"{what}_token_id": 0 for what in ("pad", "bos", "eos", "decoder_start")},
}
GPT2: dict[str, Any] = {"vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
T5: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
DISTILBERT: dict[str, Any] = {**WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_labels": CLASSES}
GROUPED: dict[str, Any] = {**WORDS, **LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}

Case = tuple[Callable[[], nn.Module], Callable[[int], Any]]
TRANSFORMERS: dict[str, Case] = {
    "resnet_basic": (made("ResNetForImageClassification", "ResNet", layer_type="basic", **CONVOLUTIONAL), pixels()),
    "resnet_bottleneck": (
        made("ResNetForImageClassification", "ResNet", layer_type="bottleneck", **{**CONVOLUTIONAL, "hidden_sizes": [32, 64]}),
        pixels(),
    ),
    "regnet": (made("RegNetForImageClassification", "RegNet", groups_width=8, layer_type="y", **CONVOLUTIONAL), pixels()),
    "efficientnet": (made("EfficientNetForImageClassification", "EfficientNet", **EFFICIENTNET), pixels(32)),
    "convnext": (
        made("ConvNextForImageClassification", "ConvNext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2, num_labels=CLASSES),
        pixels(),
    ),
    "vit": (made("ViTForImageClassification", "ViT", **LAYERS, **PATCHES), pixels()),
    "swin": (made("SwinForImageClassification", "Swin", **SWIN, num_labels=CLASSES), pixels(32)),
    "segformer": (made("SegformerForSemanticSegmentation", "Segformer", **SEGFORMER), pixels(32)),
    "yolos": (
        made("YolosForObjectDetection", "Yolos", **LAYERS, image_size=[16, 16], patch_size=4, num_detection_tokens=6, num_labels=CLASSES),
        pixels(),
    ),
    "detr": (detr, pixels(32)),
    "bert": (made("BertForSequenceClassification", "Bert", **WORDS, **LAYERS, num_labels=CLASSES), text),
    "distilbert": (made("DistilBertForSequenceClassification", "DistilBert", **DISTILBERT), text),
    "gpt2": (made("GPT2LMHeadModel", "GPT2", **GPT2), lambda batch: {"input_ids": tokens()(batch)}),
    "llama": (made("LlamaForCausalLM", "Llama", **GROUPED), text),
    "qwen3": (made("Qwen3ForCausalLM", "Qwen3", **GROUPED), text),
    "t5": (made("T5ForConditionalGeneration", "T5", **T5), two_texts),
    "wav2vec2": (made("Wav2Vec2ForCTC", "Wav2Vec2", **LAYERS, **WAV2VEC2), lambda batch: {"input_values": floats(200)(batch)}),
    "whisper_encoder": (made("WhisperForAudioClassification", "Whisper", **WHISPER), lambda batch: {"input_features": floats(8, 20)(batch)}),
}
