"""The real side of the MMD, computed once: features of the whole training set and their mean kernel value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.features import Encoder
from mmd_finetune.kernels import Kernel, make_kernel
from mmd_finetune.mmd import mean_of_pairs_in_blocks, unbiased_mmd2

Encode = Callable[[Encoder, Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """One encoder on the real images: float64 ``features`` (M, d), ``mean_kernel`` = mean_{i != j} k(y_i, y_j)."""

    encoder: Encoder
    kernel: Kernel
    features: Tensor
    mean_kernel: Tensor

    def mmd2(self, images: Tensor) -> Tensor:
        """Unbiased MMD^2 of generated ``images`` (N, C, H, W) and all real images; float64 scalar with gradient."""
        return unbiased_mmd2(self.kernel, self.encoder(images).double(), self.features, self.mean_kernel)


def make_reference(encoder: Encoder, kernel_name: str, images: Tensor, *, encode: Encode | None = None) -> Reference:
    """Encode ``images`` (M, C, H, W) once, set the kernel's bandwidths from them, and sum their pairs.

    ``encode`` gives the features, from a cache for instance; by default they are computed.
    """
    features = (encode or encode_in_batches)(encoder, images).double()
    if not bool(torch.isfinite(features).all()):
        raise UsageError(f"encoder {encoder.name} gives NaN or infinity for a real image; use another --features")
    kernel = make_kernel(kernel_name, features)
    return Reference(encoder, kernel, features, mean_of_pairs_in_blocks(kernel, features))


def encode_in_batches(
    encoder: Encoder, images: Tensor, batch: int = 512, *, device: torch.device | None = None
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
