"""Features on disk, by the SHA-256 of all that they depend on: they are computed once for a data set and an encoder."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmd_export.trt.cache import cache_folder, key_of
from mmd_finetune.encoder import Encoder
from mmd_finetune.files import write_atomically
from mmd_finetune.reference import encode_in_batches
from mmd_finetune.settings import ENCODED_AT_ONCE

CPU = torch.device("cpu")
LOG = logging.getLogger(__name__)
FORMAT = 1  # of the files, and of how features are computed where the encoder's hash does not tell


def feature_folder() -> Path:
    """``features`` in the folder of this program's caches."""
    return cache_folder(None, "features")


class FeatureCache:
    """``cache(encoder, images)``: features (N, d) float32 of images (N, C, H, W) as ``encode_in_batches`` takes them.

    A file that is damaged is computed again, with a warning; so is one that cannot be written kept in memory only.

    Args:
        folder: where the files lie; None computes always.
        device: where encoders are and features will be.
        batch: images in an encoder at once.
    """

    def __init__(self, folder: Path | None, device: torch.device = CPU, batch: int = ENCODED_AT_ONCE) -> None:
        self.folder, self.device, self.batch = folder, device, batch

    def __call__(self, encoder: Encoder, images: Tensor) -> Tensor:
        if self.folder is None or not encoder.sha256:
            return self._computed(encoder, images)
        path = self.folder / f"{_key(encoder, images, self.device, self.batch)}.safetensors"
        features = _read(path, len(images)) if path.is_file() else None
        if features is None:
            features = self._computed(encoder, images)
            _write(path, features)
        return features.to(self.device)

    def _computed(self, encoder: Encoder, images: Tensor) -> Tensor:
        return encode_in_batches(encoder, images, self.batch, device=self.device)


def _key(encoder: Encoder, images: Tensor, device: torch.device, batch: int) -> str:
    """Kind of device, version of torch and batch decide the rounding; a run repeats bit by bit on one of each."""
    return key_of(
        {
            "format": FORMAT,
            "encoder": encoder.sha256,
            "data": hash_images(images),
            "device": device.type,
            "batch": batch,
            "torch": torch.__version__,
        }
    )


def hash_images(images: Tensor) -> str:
    """SHA-256 of type, shape and values."""
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    for part in images.split(4096):
        digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _read(path: Path, count: int) -> Tensor | None:
    """The features, None with a warning if the file is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            features: Tensor = file.get_tensor("features")
            whole = (file.metadata() or {}).get("sha256") == hash_images(features)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        LOG.warning("feature cache %s cannot be read (%s); computing the features again", path, error)
        return None
    if not whole or features.dim() != 2 or len(features) != count:
        LOG.warning("feature cache %s is damaged; computing the features again", path)
        return None
    return features


def _write(path: Path, features: Tensor) -> None:
    """Keep them; a disk that refuses costs time on the next run, nothing else."""
    kept = features.cpu().contiguous()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"features": kept}, {"sha256": hash_images(kept)}))
    except OSError as error:
        LOG.warning("feature cache %s cannot be written (%s); going on without it", path, error.strerror or error)
