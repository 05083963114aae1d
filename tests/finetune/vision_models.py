"""Small randomly initialised vision models, saved as their owners publish them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIDE = 32  # pixels that they take, in patches of 8
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PROCESSOR: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "do_convert_rgb": True,
}


def vision_model(kind: str) -> Any:
    """A random model of the kind, as transformers makes it."""
    t: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    text = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
            "vocab_size": 9}  # fmt: skip
    wide = {**_SMALL, "intermediate_size": 24}
    make: dict[str, Callable[[], Any]] = {
        "clip": lambda: t.CLIPModel(t.CLIPConfig(vision_config=wide, text_config=text, projection_dim=12)),
        "clip_vision": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**wide, projection_dim=12)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(vision_config=wide, text_config=text)),
        "siglip_vision": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**wide)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**_SMALL, mlp_ratio=2)),
        "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**wide, num_register_tokens=2)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**wide)),
        "vit_classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**wide)),  # published without a pooler
        "vit_mae": lambda: t.ViTMAEForPreTraining(
            t.ViTMAEConfig(**wide, decoder_hidden_size=8, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
        ),
        "resnet": lambda: t.ResNetModel(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
    }
    return make[kind]()


def save_vision_model(kind: str, folder: Path, processor: dict[str, Any] | None = PROCESSOR) -> Any:
    """The model, in eval mode; ``folder`` holds it."""
    model = vision_model(kind).eval()
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model
