"""What the recipes for encoders share: a classifier whose features the studies use, on the CPU or a GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.state import Kept, State
from recipes.training import pixels


def train_classifier(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    state: Path | None = None,
    *,
    batch: int = 256,
    peak_rate: float = 2e-3,
) -> nn.Module:
    """Cross-entropy with label smoothing on slightly noisy images; uint8 (N, C, H, W) and int64 (N,), one device.

    What a training that was stopped goes on from lies in the file ``state``, if given, every two minutes.
    """
    optimiser = torch.optim.AdamW(network.parameters(), lr=peak_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=peak_rate, total_steps=steps)
    generator = torch.Generator(images.device).manual_seed(0)
    parts: dict[str, Kept] = {"network": network, "optimiser": optimiser, "schedule": schedule}
    kept = State(state, parts, generator, {"steps": steps, "batch": batch, "peak_rate": peak_rate})
    done = kept.load().get("step", 0)
    for step in track(range(done + 1, steps + 1), description="classifier", total=steps, completed=done):
        rows = torch.randint(len(images), (batch,), generator=generator, device=images.device)
        values = pixels(images[rows], flip=False)
        noise = torch.randn(values.shape, generator=generator, device=values.device)
        loss = F.cross_entropy(network(values + 0.05 * noise), labels[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        kept.save_sometimes(step=step)
    return network.eval()


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers; uint8 (N, C, H, W) and int64 (N,)."""
    with torch.inference_mode():
        right = [
            int((network(pixels(part, flip=False)).argmax(1) == truth).sum())
            for part, truth in zip(images.split(1000), labels.split(1000), strict=True)
        ]
    return sum(right) / len(images)
