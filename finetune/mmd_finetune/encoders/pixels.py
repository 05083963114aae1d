"""The pixels themselves, for small images."""

from __future__ import annotations

from torch import nn

from mmd_export.checkpoints.weights import hash_weights
from mmd_finetune.encoder import Encoder, Family, frozen
from mmd_finetune.encoder_source import Source


def _load(source: Source) -> Encoder:
    return Encoder(source.kind, frozen(nn.Flatten()), sha256=hash_weights({}, {"architecture": source.kind}))


FAMILY = Family(("pixels",), "", _load)
