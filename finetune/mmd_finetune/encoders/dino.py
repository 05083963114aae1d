"""DINOv2 and DINOv3: the class token after the last norm; arXiv 2304.07193 and 2508.10104."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmd_finetune.encoder import Encoder, Family
from mmd_finetune.encoder_source import Source
from mmd_finetune.preprocess import Recipe
from mmd_finetune.vision_model import load_vision

TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _usual(config: Mapping[str, Any]) -> Recipe:
    if str(config.get("model_type")).startswith("dinov3"):
        return Recipe((224, 224), None, "bilinear", MEAN, STD)
    return Recipe(256, (224, 224), "bicubic", MEAN, STD)


def _load(source: Source) -> Encoder:
    return load_vision(source, TYPES, _usual)


FAMILY = Family(("dino",), "ID_OR_FOLDER", _load)
