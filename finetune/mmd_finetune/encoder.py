"""What an encoder is, and what a family of them is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmd_export.checkpoints.weights import hash_weights, load_strictly, read_safetensors
from mmd_export.errors import UsageError
from mmd_finetune.digits_encoders import ARCHITECTURES, class_logits
from mmd_finetune.encoder_source import Source


@dataclass(frozen=True)
class Encoder:
    """Images (N, C, H, W) in [-1, 1] to features (N, d) in float32; gradients pass through.

    Attributes:
        name: as messages, logs and the record of a run have it; no path of the machine.
        network: preprocessing and network, frozen.
        shape: the (C, H, W) that it takes, None for any.
        classes: how many its head tells apart, None without a head.
        channels: how many colour channels it takes, None for any.
        sha256: of weights, architecture and preprocessing; empty for one whose features are never cached.
        warnings: what the user should hear.
    """

    name: str
    network: nn.Module
    shape: tuple[int, int, int] | None = None
    classes: int | None = None
    channels: tuple[int, ...] | None = None
    sha256: str = ""
    warnings: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        # In half precision the small differences that the MMD is made of drown, and Inception overflows.
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self.network(images if images.dtype == torch.float64 else images.float())
        return features

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (N, classes)."""
        if self.classes is None:
            raise UsageError(f"encoder {self.name} has no classifier head; with one: {', '.join(ARCHITECTURES)}")
        return class_logits(self.network, images)

    def to(self, device: torch.device) -> Encoder:
        """The same encoder on ``device``."""
        return replace(self, network=self.network.to(device))


@dataclass(frozen=True)
class Family:
    """Encoders that are loaded alike.

    ``kinds`` are the words before the colon, ``place`` says what stands behind it (empty: nothing), ``load`` gives the
    encoder, frozen, in eval mode and float32, or raises UsageError.
    """

    kinds: tuple[str, ...]
    place: str
    load: Callable[[Source], Encoder]

    @property
    def forms(self) -> tuple[str, ...]:
        """How the user writes them."""
        return tuple(f"{kind}:{self.place}" if self.place else kind for kind in self.kinds)


def shipped(kind: str, network: nn.Module, weights: Path, advice: str, **facts: Any) -> Encoder:
    """``network`` with the ``weights`` that are installed with it; ``facts``: further attributes of the encoder.

    Raises UsageError that ends in ``advice`` for a damaged file.
    """
    try:
        tensors = read_safetensors(weights)
        load_strictly(network, tensors, str(weights))
    except UsageError as error:
        raise UsageError(f"encoder {kind}: {error}; {advice}") from error
    return Encoder(kind, frozen(network), sha256=hash_weights(tensors, {"architecture": kind}), **facts)


def frozen(network: nn.Module) -> nn.Module:
    """``network`` in float32 and eval mode; its weights take no gradient."""
    for parameter in network.float().eval().parameters():  # a ScriptModule has no requires_grad_ of its own
        parameter.requires_grad_(False)
    return network
