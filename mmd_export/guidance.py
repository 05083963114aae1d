"""Guidance inside the network: classifier-free guidance, and the embedded guidance scale of distilled models."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

DOUBLED, TWO_CALLS = "doubled", "two-calls"


class GuidedDenoiser(nn.Module):
    """eps = eps_u + S (eps_c - eps_u), eps_u without the condition; Ho and Salimans 2022, eq. 6 with S = w + 1.

    Args:
        denoiser: the conditional network.
        scale: S.
        unconditional: how each condition is taken away: a number that stands for no class, or the name of the input
            that takes its place. A condition that is not named is the same on both sides.
        form: ``doubled`` runs one batch (unconditional, conditional), ``two-calls`` one after the other.
    """

    def __init__(
        self, denoiser: nn.Module, scale: float, unconditional: Mapping[str, int | str], form: str = DOUBLED
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.scale = scale
        self.unconditional = dict(unconditional)
        self.form = form

    def forward(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """The guided output (B, C, H, W)."""
        negatives = {name for name in self.unconditional.values() if isinstance(name, str)}
        told = {name: value for name, value in conditions.items() if name not in negatives}
        untold = {name: self._without(name, value, conditions) for name, value in told.items()}
        if self.form == TWO_CALLS:
            uncond, cond = self.denoiser(x, timestep, **untold), self.denoiser(x, timestep, **told)
        else:
            both = {name: torch.cat([untold[name], told[name]]) for name in told}
            output, rows = self.denoiser(torch.cat([x, x]), timestep, **both), x.shape[0]
            uncond, cond = output[:rows], output[rows:]  # torch.onnx 2.13 fails on chunk where the batch is free
        guided: Tensor = uncond + self.scale * (cond - uncond)
        return guided

    def _without(self, name: str, value: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The unconditional side of one condition."""
        instead = self.unconditional.get(name)
        if instead is None:
            return value
        return conditions[instead] if isinstance(instead, str) else torch.full_like(value, instead)


def guidance_embedding(scale: float, width: int) -> tuple[float, ...]:
    """(sin, cos)(1000 w f_i) with f_i = 10000^(-i / (width/2 - 1)), w = S - 1; Luo et al. 2023 (LCM), float64."""
    half = width // 2
    angles = [1000.0 * (scale - 1.0) * 10000.0 ** (-i / (half - 1)) for i in range(half)]
    return (*map(math.sin, angles), *map(math.cos, angles), *([0.0] * (width % 2)))
