"""The two classifiers of the built-in digits, made by ``finetune/recipes/train_digits.py``."""

from __future__ import annotations

from pathlib import Path

from mmd_export.checkpoints.weights import hash_weights, load_strictly, read_safetensors
from mmd_export.errors import UsageError
from mmd_finetune.digits_encoders import ARCHITECTURES
from mmd_finetune.encoder import Encoder, Family, frozen
from mmd_finetune.encoder_source import Source

FOLDER = Path(__file__).parent


def _load(source: Source) -> Encoder:
    network = ARCHITECTURES[source.kind]()
    path = FOLDER / f"{source.kind}.safetensors"
    try:
        weights = read_safetensors(path)
        load_strictly(network, weights, str(path))
    except UsageError as error:
        raise UsageError(f"encoder {source.kind}: {error}; install again or run make digits") from error
    sha256 = hash_weights(weights, {"architecture": source.kind})
    return Encoder(source.kind, frozen(network), shape=(1, 8, 8), classes=10, sha256=sha256)


FAMILY = Family(tuple(ARCHITECTURES), "", _load)
