"""The two classifiers of the built-in digits, made by ``finetune/recipes/train_digits.py``."""

from __future__ import annotations

from pathlib import Path

from mmd_finetune.digits_encoders import ARCHITECTURES
from mmd_finetune.encoder import Encoder, Family, shipped
from mmd_finetune.encoder_source import Source

FOLDER = Path(__file__).parent


def _load(source: Source) -> Encoder:
    network, weights = ARCHITECTURES[source.kind](), FOLDER / f"{source.kind}.safetensors"
    return shipped(source.kind, network, weights, "install again or run make digits", shape=(1, 8, 8), classes=10)


FAMILY = Family(tuple(ARCHITECTURES), "", _load)
