"""CLIP: the projected image embedding, as MMD-DDM and CMMD use it; Radford et al. 2021, arXiv 2103.00020."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmd_finetune.encoder import Encoder, Family
from mmd_finetune.encoder_source import Source
from mmd_finetune.preprocess import Recipe
from mmd_finetune.vision_model import image_side, load_vision

TYPES = ("clip", "clip_vision_model")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _usual(config: Mapping[str, Any]) -> Recipe:
    side = image_side(config)
    return Recipe(side, (side, side), "bicubic", MEAN, STD)


def _load(source: Source) -> Encoder:
    return load_vision(source, TYPES, _usual, "CLIPVisionModelWithProjection")


FAMILY = Family(("clip",), "ID_OR_FOLDER", _load)
