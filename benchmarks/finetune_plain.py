"""The loop of the paper's released code, plainly: what ``benchmarks.finetune_speed`` compares with.

float32; diffusers' DDIMScheduler between the calls; every network call recomputed in the backward pass; a batch of real
images encoded anew in every step; unbiased MMD^2 with the cubic kernel, in one piece; Adam with torch's defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class PlainLoop:
    """``step()`` is one iteration: ``batch`` images, ``steps`` network calls each.

    Args:
        unet: diffusers' UNet2DModel; it is tuned in place.
        scheduler: diffusers' DDIMScheduler.
        encoder: images (N, C, H, W) to features (N, d), frozen.
        real: all real images, (M, C, H, W).
        batch: images of a step.
        steps: network calls of the sampler.
    """

    def __init__(
        self, unet: nn.Module, scheduler: object, encoder: nn.Module, real: Tensor, batch: int, steps: int
    ) -> None:
        self.unet = unet.requires_grad_(True)
        self.scheduler, self.encoder, self.real, self.batch, self.steps = scheduler, encoder, real, batch, steps
        self.optimiser = torch.optim.Adam(unet.parameters(), lr=5e-6)
        scheduler.set_timesteps(steps)  # type: ignore[attr-defined]  # diffusers is Any here

    def step(self) -> float:
        """One iteration; its loss."""
        x = torch.randn(self.batch, *self.real.shape[1:], device=self.real.device)
        for t in self.scheduler.timesteps:  # type: ignore[attr-defined]
            output = checkpoint(lambda x, t: self.unet(x, t).sample, x, t, use_reentrant=False)
            x = self.scheduler.step(output, t, x).prev_sample  # type: ignore[attr-defined]
        real = self.real[torch.randint(len(self.real), (self.batch,), device=self.real.device)]
        with torch.no_grad():
            real_features = self.encoder(real)
        loss = cubic_mmd2(self.encoder(x), real_features)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())


def cubic_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD^2 with (<x, y> / d + 1)^3; features (n, d) each."""
    n, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1.0) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
    return within - 2.0 * xy.mean()
