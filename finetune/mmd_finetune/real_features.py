"""Features of the real images in every encoder of a run: the first process reads and encodes, the others receive."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.array_files import Pixels
from mmd_finetune.data import RealImages, load_real, require_images
from mmd_finetune.encoder import Encoder
from mmd_finetune.feature_cache import FeatureCache, feature_folder
from mmd_finetune.metrics.memorisation import require_split
from mmd_finetune.metrics.suite import NEIGHBOUR_METRICS, MetricOptions, needs_split
from mmd_finetune.settings import FinetuneSettings
from mmd_finetune.world import World

Form = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class RealFeatures:
    """One tensor an encoder: ``train`` (M, d) in those of the loss, ``held_out`` (H, d) in those that score.

    ``training`` are those of the loss's images in the encoders that score, empty if no metric needs them.
    """

    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    training: tuple[Tensor, ...]
    data_sha256: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (*self.train, *self.held_out, *self.training)


def features_of_first(
    settings: FinetuneSettings,
    shape: tuple[int, int, int],
    encoders: Sequence[Encoder],
    holdouts: Sequence[Encoder],
    device: torch.device,
    world: World,
) -> RealFeatures:
    """Those of the data that the first process sees, on the ``device`` of every process.

    ``encoders`` are those of the loss, ``holdouts`` only score; images have the model's ``shape`` (C, H, W). Raises
    UsageError for images that cannot be used, and in every process if one has other encoders than the first.
    """
    found: list[RealFeatures] = []
    own = [[each.name for each in part] for part in (encoders, holdouts)]

    def describe() -> tuple[list[list[str]], list[list[Form]], str]:
        real = _encoded(settings, shape, encoders, holdouts, device)
        found.append(real)
        parts = (real.train, real.held_out, real.training)
        return own, [[(each.shape, each.dtype) for each in part] for part in parts], real.data_sha256

    names, forms, sha256 = world.first_does(describe)

    def receive() -> RealFeatures:
        if own != names:
            raise UsageError(
                f"--features and --holdout name {own} in process {world.rank}, {names} in process 0; give both the same"
            )
        if found:
            return found[0]
        train, held_out, training = (
            tuple(torch.empty(size, dtype=dtype, device=device) for size, dtype in part) for part in forms
        )
        return RealFeatures(train, held_out, training, sha256)

    real = world.together(receive)
    world.copy_first(real.tensors)
    return real


def _encoded(
    settings: FinetuneSettings,
    shape: tuple[int, int, int],
    encoders: Sequence[Encoder],
    holdouts: Sequence[Encoder],
    device: torch.device,
) -> RealFeatures:
    """Read, check and encode the images. They stay on the CPU: the device holds their features."""
    images = load_real(settings.data, settings.data_options(), shape)
    require_images(images.train, settings.data, shape, settings.batch_size, mirrored=settings.flip)
    _require_measurable(settings, images)
    real, held_out = (torch.from_numpy(part) for part in (images.train, images.held_out))
    cache = FeatureCache(feature_folder() if settings.feature_cache else None, device, settings.encoded_at_once)
    compared = holdouts if needs_split(settings.metrics) else ()
    return RealFeatures(
        train=tuple(cache(encoder, real) for encoder in encoders),
        held_out=tuple(cache(encoder, held_out) for encoder in holdouts),
        training=tuple(cache(encoder, real) for encoder in compared),
        data_sha256=_sha256(images.train, images.held_out),
    )


def _require_measurable(settings: FinetuneSettings, images: RealImages) -> None:
    """Raise UsageError for metrics that so few images leave undefined."""
    training, held_out, k = len(images.train), len(images.held_out), MetricOptions().neighbours
    if held_out <= k and (asked := [name for name in settings.metrics if name in NEIGHBOUR_METRICS]):
        raise UsageError(f"--metrics {', '.join(asked)} needs more than {k} held-out images, there are {held_out}")
    if "memorisation" in settings.metrics:
        require_split(training, held_out, "lower --holdout-fraction to at most 0.5")


def _sha256(train: Pixels, held_out: Pixels) -> str:
    """Of the images of the loss and, where they are others, of those that only score."""
    digest = hashlib.sha256()
    for images in (train,) if held_out is train else (train, held_out):
        digest.update(f"{images.dtype} {images.shape}".encode())
        digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()
