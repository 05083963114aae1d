"""What the recipes for base models share: noise prediction with an average of the weights, on the CPU or a GPU."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Training:
    """``steps`` of AdamW on batches of ``batch``, or fewer once ``seconds`` are over; the rate falls by a half cosine.

    ``flip`` mirrors half of the images. On a GPU the network runs under bfloat16 autocast and in channels-last layout.
    """

    steps: int
    batch: int
    peak_rate: float = 2e-4
    warm_up: int = 500
    decay: float = 0.999
    seconds: float = math.inf
    flip: bool = False


def train_denoiser(
    model: UNet2DModel, scheduler: DDIMScheduler, images: Tensor, held_out: Tensor, training: Training
) -> tuple[UNet2DModel, list[dict[str, float]]]:
    """The average of the weights and the curve of training and held-out loss.

    ``images`` and ``held_out`` uint8 (N, C, H, W), on the device of ``model``. The rate follows the larger share of
    steps and of seconds, so it has fallen to the end either way.
    """
    device = images.device
    generator = torch.Generator(device).manual_seed(0)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=training.peak_rate, weight_decay=0.0, fused=device.type == "cuda"
    )
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    curve: list[dict[str, float]] = []
    start, recent = time.perf_counter(), []
    for step in track(range(1, training.steps + 1), description="denoiser"):
        share = max(step / training.steps, (time.perf_counter() - start) / training.seconds)
        rate = (
            training.peak_rate * min(step / training.warm_up, 1.0) * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)))
        )
        optimiser.param_groups[0]["lr"] = rate
        rows = torch.randint(len(images), (training.batch,), generator=generator, device=device)
        loss = denoising_loss(model.train(), scheduler, pixels(images[rows], flip=training.flip), generator)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        update_average(average, model, min(training.decay, step / (step + 10)))
        recent.append(loss.detach())
        if step % max(1, training.steps // 20) == 0 or share >= 1.0:
            probe = torch.Generator(device).manual_seed(1)
            with torch.inference_mode():
                after = float(denoising_loss(average, scheduler, pixels(held_out[:2048], flip=False), probe))
            seconds = round(time.perf_counter() - start, 1)
            curve.append(
                {"step": step, "loss": float(torch.stack(recent).mean()), "held_out": after, "seconds": seconds}
            )
            recent.clear()
            print(curve[-1], flush=True)
        if share >= 1.0:
            break
    return average, curve


def denoising_loss(model: Any, scheduler: DDIMScheduler, images: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted noise; Ho et al. 2020, eq. 14. Images float32 (N, C, H, W) in [-1, 1]."""
    device = images.device
    noise = torch.randn(images.shape, generator=generator, device=device)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(images),), generator=generator, device=device)
    noisy = scheduler.add_noise(images, noise, timesteps)
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        predicted = model(noisy, timesteps).sample
    return F.mse_loss(predicted.float(), noise)


def pixels(images: Tensor, *, flip: bool) -> Tensor:
    """uint8 (N, C, H, W) to float32 in [-1, 1], the first half mirrored if ``flip``."""
    values = images.float() / 127.5 - 1.0
    half = len(values) // 2 if flip else 0
    return torch.cat([values[:half].flip(3), values[half:]])


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights."""
    kept, new = ([parameter.detach() for parameter in net.parameters()] for net in (average, model))
    torch._foreach_lerp_(kept, new, 1.0 - decay)


def train_classifier(
    network: nn.Module, images: Tensor, labels: Tensor, steps: int, *, batch: int = 256, peak_rate: float = 2e-3
) -> nn.Module:
    """Cross-entropy with label smoothing on slightly noisy images; uint8 (N, C, H, W) and int64 (N,), one device."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=peak_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=peak_rate, total_steps=steps)
    for _ in track(range(steps), description="classifier"):
        rows = torch.randint(len(images), (batch,), device=images.device)
        values = pixels(images[rows], flip=False)
        loss = F.cross_entropy(network(values + 0.05 * torch.randn_like(values)), labels[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers; uint8 (N, C, H, W) and int64 (N,)."""
    with torch.inference_mode():
        right = [
            int((network(pixels(part, flip=False)).argmax(1) == truth).sum())
            for part, truth in zip(images.split(1000), labels.split(1000), strict=True)
        ]
    return sum(right) / len(images)


def save_script(features: nn.Module, images: Tensor, path: str) -> None:
    """Freeze ``features`` (images in [-1, 1] to (N, d)) into a TorchScript file, traced on ``images``."""
    with torch.no_grad():
        traced = torch.jit.trace(features.cpu().eval().requires_grad_(False), images.cpu())
    torch.jit.save(traced, path)
