"""Small digit classifiers of different families: two for the loss, one that the loss never sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

FEATURES = 64


class ConvDigits(nn.Module):
    """Convolutional: images (N, 1, 8, 8) in [-1, 1] -> features (N, 64). SiLU, so that its gradient is smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.Conv2d(64, 96, 3, padding=1, stride=2), nn.GroupNorm(8, 96), nn.SiLU(),
            nn.Flatten(), nn.Linear(96 * 4, FEATURES), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        return features


class ResidualDigits(nn.Module):
    """Residual at full resolution, He et al. 2016: images (N, 1, 8, 8) in [-1, 1] -> features (N, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(1, 48, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, 48), nn.SiLU(), nn.Conv2d(48, 48, 3, padding=1),
                nn.SiLU(), nn.Conv2d(48, 48, 3, padding=1),
            )
            for _ in range(2)
        )  # fmt: skip
        self.outward = nn.Sequential(
            nn.GroupNorm(8, 48), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48 * 16, FEATURES), nn.GELU()
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.inward(images)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        features: Tensor = self.outward(hidden)
        return features


class MlpDigits(nn.Module):
    """Fully connected, residual: images (N, 1, 8, 8) in [-1, 1] -> features (N, 64). No convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.Flatten(), nn.Linear(64, 192), nn.GELU())
        self.middle = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 192), nn.GELU(), nn.Linear(192, 192))
        self.outward = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, FEATURES), nn.GELU())
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.inward(images)
        features: Tensor = self.outward(hidden + self.middle(hidden))
        return features


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "digits-conv": ConvDigits, "digits-residual": ResidualDigits, "digits-mlp": MlpDigits,
}  # fmt: skip


def class_logits(encoder: nn.Module, images: Tensor) -> Tensor:
    """Class scores (N, 10) of a digits encoder."""
    logits: Tensor = encoder.get_submodule("head")(encoder(images))
    return logits


def accuracy(encoder: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of ``images`` that ``encoder`` classifies as ``labels``."""
    with torch.inference_mode():
        return float((class_logits(encoder, images).argmax(1) == labels).double().mean())
