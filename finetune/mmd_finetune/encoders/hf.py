"""Any vision backbone that transformers knows."""

from __future__ import annotations

from mmd_finetune.encoder import Encoder, Family
from mmd_finetune.encoder_source import Source
from mmd_finetune.vision_model import load_vision


def _load(source: Source) -> Encoder:
    return load_vision(source, (), None)


FAMILY = Family(("hf",), "ID_OR_FOLDER", _load)
