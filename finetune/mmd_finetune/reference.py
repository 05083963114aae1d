"""The real side of the loss in one encoder: features of the whole training set, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.embedding import Embedding, embed_all, embed_landmarks, find_landmarks
from mmd_finetune.features import Encoder
from mmd_finetune.kernels import Kernel, make_kernel, subsample
from mmd_finetune.settings import ENCODED_AT_ONCE
from mmd_finetune.statistic import mmd2
from mmd_finetune.world import World

ReferenceKind = Literal["bank", "batch", "nystrom"]
LANDMARKS = 1024


@dataclass(frozen=True)
class Reference:
    """One encoder on the real images.

    ``features`` float64 (M, d) are all of them; with landmarks some that stand for all. ``embedding`` is their mean in
    the kernel's space; None with the reference ``batch``, which takes other rows of ``features`` every iteration.
    """

    encoder: Encoder
    kernel: Kernel
    features: Tensor
    embedding: Embedding | None
    biased: bool = False

    def mmd2(self, features: Tensor, rows: Tensor | None = None, world: World | None = None) -> Tensor:
        """MMD^2 of generated ``features`` (n, d) of all processes and the real images; float64 scalar with gradient.

        ``rows`` are the real images of this iteration, for the reference ``batch``.
        """
        embedding = self.embedding
        if embedding is None:
            assert rows is not None
            embedding = embed_all(self.kernel, self.features[rows.to(self.features.device)], biased=self.biased)
        return mmd2(features, self.kernel, embedding, biased=self.biased, world=world or World())


def make_reference(
    encoder: Encoder,
    kernel: str,
    features: Tensor,
    *,
    kind: ReferenceKind = "bank",
    biased: bool = False,
    landmarks: int = LANDMARKS,
    seed: int = 0,
) -> Reference:
    """Set the kernel's bandwidths from the ``features`` (M, d) of all real images, and embed them.

    Args:
        encoder: frozen; it gave the features.
        kernel: what ``make_kernel`` takes.
        features: of all real images.
        kind: what the loss compares with: all images, a new batch of them every iteration, or fixed landmarks.
        biased: of the two estimates of ``mmd_finetune.mmd``.
        landmarks: how many, for the kind ``nystrom``.
        seed: of the k-means that finds them.
    """
    features = features.double()
    if not bool(torch.isfinite(features).all()):
        raise UsageError(f"encoder {encoder.name} gives NaN or infinity for a real image; use another --features")
    made = make_kernel(kernel, features)
    if kind == "batch":
        return Reference(encoder, made, features, None, biased)
    if kind == "nystrom":
        centres = find_landmarks(features, landmarks, seed)
        shown = subsample(features)
        return Reference(encoder, made, shown, embed_landmarks(made, features, centres), biased)
    return Reference(encoder, made, features, embed_all(made, features, biased=biased), biased)


def encode_in_batches(
    encoder: Encoder, images: Tensor, batch: int = ENCODED_AT_ONCE, *, device: torch.device | None = None
) -> Tensor:
    """Features (N, d) of ``images`` (N, C, H, W), bytes or floats in [-1, 1], without gradient.

    ``device`` is where the encoder is, if the images are elsewhere: they are brought there batch by batch.
    """
    with torch.no_grad():
        return torch.cat([encoder(_as_floats(part, device or images.device)) for part in images.split(batch)])


def _as_floats(part: Tensor, device: torch.device) -> Tensor:
    if part.dtype != torch.uint8:
        return part.to(device)
    return part.to(device).float() / 127.5 - 1.0
