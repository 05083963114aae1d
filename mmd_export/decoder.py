"""Latents to images: an autoencoder's decoder behind one signature, so that it can stand in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class LatentDecoder(nn.Module):
    """image = D(z / scale + shift) or D(z std / scale + mean); Rombach et al. 2022, section 3.1, as diffusers calls it.

    Shapes: z (B, C, H, W), image (B, 3, fH, fW).

    Args:
        autoencoder: diffusers' AutoencoderKL, AutoencoderTiny, AutoencoderDC or VQModel; only its decoder is kept.
        scale: ``scaling_factor`` of its config: the network's latents have about unit variance, the decoder's this.
        shift: ``shift_factor``, 0 where there is none.
        mean, std: ``latents_mean`` and ``latents_std``, one number a channel; empty where there are none.
    """

    # Whatever the precision of the network: several published decoders overflow in fp16, which is what diffusers'
    # `force_upcast` is about (diffusers/models/autoencoders/autoencoder_kl.py, 0.42).
    precision: ClassVar[str] = "fp32"

    def __init__(
        self,
        autoencoder: nn.Module,
        scale: float,
        shift: float = 0.0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.scale, self.shift = scale, shift
        self.mean, self.std = tuple(mean), tuple(std)
        for part in ("encoder", "quant_conv"):
            if part in dict(autoencoder.named_children()):
                setattr(autoencoder, part, None)

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it."""
        name = type(self.autoencoder).__name__
        channels = {"mean": self.mean, "std": self.std} if self.std else {}
        return {"autoencoder": name, "scale": self.scale, "shift": self.shift, **channels, "precision": self.precision}

    def forward(self, latent: Tensor) -> Tensor:
        """Image (B, 3, fH, fW), not clamped, for ``latent`` (B, C, H, W)."""
        image: Tensor = self.autoencoder.decode(self._unscaled(latent), return_dict=False)[0]  # type: ignore[operator]
        return image

    def _unscaled(self, latent: Tensor) -> Tensor:
        """What the autoencoder was trained with."""
        if self.std:
            factors, means = (
                torch.tensor(numbers, dtype=latent.dtype, device=latent.device).reshape(1, -1, 1, 1)
                for numbers in ([std / self.scale for std in self.std], self.mean)
            )
            return latent * factors + means
        z = latent if self.scale == 1.0 else latent / self.scale
        return z if self.shift == 0.0 else z + self.shift


def decoded_shape(decoder: LatentDecoder, latent: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, H, W) of the image of a latent (C, H, W); one is decoded for it."""
    like = next(decoder.parameters())
    with torch.inference_mode():
        image = decoder(torch.zeros(1, *latent, dtype=like.dtype, device=like.device))
    return (int(image.shape[1]), int(image.shape[2]), int(image.shape[3]))
