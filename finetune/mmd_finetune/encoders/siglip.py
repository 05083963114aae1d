"""SigLIP: the output of its attention pooling; Zhai et al. 2023, arXiv 2303.15343. SigLIP 2 at fixed sizes is alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmd_finetune.encoder import Encoder, Family
from mmd_finetune.encoder_source import Source
from mmd_finetune.preprocess import Recipe
from mmd_finetune.vision_model import image_side, load_vision

TYPES = ("siglip", "siglip_vision_model")


def _usual(config: Mapping[str, Any]) -> Recipe:
    side = image_side(config)
    return Recipe((side, side), None, "bicubic", (0.5,) * 3, (0.5,) * 3)


def _load(source: Source) -> Encoder:
    return load_vision(source, TYPES, _usual)


FAMILY = Family(("siglip",), "ID_OR_FOLDER", _load)
