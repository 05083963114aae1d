"""Frozen encoders: images in, feature vectors out, gradients pass through to the images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmd_export.errors import UsageError
from mmd_finetune.digits_encoders import ARCHITECTURES, class_logits

FOLDER = Path(__file__).parent / "encoders"
PIXELS = "pixels"
ENCODERS = (*ARCHITECTURES, PIXELS)


@dataclass(frozen=True)
class Encoder:
    """Images (N, C, H, W) in [-1, 1] to features (N, d).

    ``shape`` is the (C, H, W) that the network takes, None for any; ``classes`` the number of classes that its head
    tells apart, None without a head.
    """

    name: str
    network: nn.Module
    shape: tuple[int, int, int] | None = None
    classes: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (N, classes)."""
        if self.classes is None:
            raise UsageError(f"encoder {self.name} has no classifier head; with one: {', '.join(ARCHITECTURES)}")
        return class_logits(self.network, images)

    def to(self, device: torch.device) -> Encoder:
        """The same encoder on ``device``."""
        return replace(self, network=self.network.to(device))


def load_encoder(name: str) -> Encoder:
    """The encoder of that name: frozen, eval mode, float32. Raises UsageError that lists the names."""
    if name == PIXELS:
        return Encoder(PIXELS, nn.Flatten().eval())
    if name not in ARCHITECTURES:
        raise UsageError(f"encoder {name!r} is unknown; known: {', '.join(ENCODERS)}")
    network = ARCHITECTURES[name]()
    _load_strictly(network, FOLDER / f"{name}.safetensors")
    return Encoder(name, network.float().eval().requires_grad_(False), shape=(1, 8, 8), classes=10)


def require_fit(encoder: Encoder, shape: tuple[int, int, int]) -> None:
    """Raise UsageError unless the encoder takes images (C, H, W)."""
    if encoder.shape is not None and encoder.shape != shape:
        raise UsageError(
            f"encoder {encoder.name} takes images {encoder.shape}, the model makes {shape}; use --features {PIXELS} "
            "or an encoder of that size"
        )


def _load_strictly(network: nn.Module, path: Path) -> None:
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"encoder weights {path} cannot be read ({error}); install again or run make digits"
        ) from error
    for key, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"encoder weights {path}: {key} holds NaN or infinity; install again or run make digits")
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"encoder weights {path} do not fit: {reason}; run make digits") from error
