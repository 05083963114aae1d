"""What the recipes for base models share: noise prediction with an average of the weights, on the CPU or a GPU."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.state import State

PROBED = 2048  # held-out images of a point of the curve


@dataclass(frozen=True)
class Training:
    """``steps`` of AdamW on batches of ``batch``, or fewer once ``seconds`` are over; the rate falls by a half cosine.

    ``flip`` mirrors half of the images. On a GPU the network runs under bfloat16 autocast and in channels-last layout.
    What a training that was stopped goes on from lies in the file ``state``, if given, every two minutes.
    """

    steps: int
    batch: int
    peak_rate: float = 2e-4
    warm_up: int = 500
    decay: float = 0.999
    seconds: float = math.inf
    flip: bool = False
    state: Path | None = None


@dataclass
class _Run:
    """Everything that changes while a denoiser is trained."""

    training: Training
    model: UNet2DModel
    average: UNet2DModel
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    recent: list[Tensor] = field(default_factory=list)  # losses since the last point of the curve

    def tell(self, scheduler: DDIMScheduler, held_out: Tensor) -> None:
        """A point of the curve, and its line."""
        probe = torch.Generator(held_out.device).manual_seed(1)
        with torch.inference_mode():
            probed = [
                denoising_loss(self.average, scheduler, pixels(part, flip=False), probe)
                for part in held_out[:PROBED].split(PROBED // 8)
            ]
        recent, after = (float(torch.stack(losses).mean()) for losses in (self.recent, probed))
        point = {"step": self.step, "loss": recent, "held_out": after, "seconds": round(self.seconds, 1)}
        self.curve.append(point)
        self.recent.clear()
        print(point, flush=True)


def train_denoiser(
    model: UNet2DModel, scheduler: DDIMScheduler, images: Tensor, held_out: Tensor, training: Training
) -> tuple[UNet2DModel, list[dict[str, float]]]:
    """The average of the weights and the curve of training and held-out loss.

    ``images`` and ``held_out`` uint8 (N, C, H, W), on the device of ``model``. The rate follows the larger share of
    steps and of seconds, so it has fallen to the end either way.
    """
    gpu = images.device.type == "cuda"
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=training.peak_rate, weight_decay=0.0, fused=gpu)
    if gpu:
        model.to(memory_format=torch.channels_last)
    run = _Run(training, model, average, optimiser, torch.Generator(images.device).manual_seed(0))
    parts = {"model": model, "average": average, "optimiser": optimiser}
    settings = {name: value for name, value in vars(training).items() if name != "state"}
    state = State(training.state, parts, run.generator, settings)
    for name, value in state.load().items():
        setattr(run, name, value)
    start = time.perf_counter() - run.seconds
    done, remaining = run.step, range(run.step + 1, training.steps + 1)
    for step in track(remaining, description="denoiser", total=training.steps, completed=done):
        run.step, run.seconds = step, time.perf_counter() - start
        share = max(step / training.steps, run.seconds / training.seconds)
        _advance(run, scheduler, images, share)
        if step % max(1, training.steps // 20) == 0 or share >= 1.0:
            run.tell(scheduler, held_out)
        state.save_sometimes(step=step, seconds=run.seconds, curve=run.curve, recent=run.recent)
        if share >= 1.0:
            break
    return average, run.curve


def _advance(run: _Run, scheduler: DDIMScheduler, images: Tensor, share: float) -> None:
    """One step of the optimiser and of the average; ``share`` of the training is over."""
    training = run.training
    rise, fall = min(run.step / training.warm_up, 1.0), 0.5 + 0.5 * math.cos(math.pi * min(share, 1.0))
    run.optimiser.param_groups[0]["lr"] = training.peak_rate * rise * fall
    rows = torch.randint(len(images), (training.batch,), generator=run.generator, device=images.device)
    loss = denoising_loss(run.model.train(), scheduler, pixels(images[rows], flip=training.flip), run.generator)
    run.optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimiser.step()
    update_average(run.average, run.model, min(training.decay, run.step / (run.step + 10)))
    run.recent.append(loss.detach().clone())  # mse_loss leaves the storage of all its terms behind the number


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


def save_script(features: nn.Module, images: Tensor, path: str) -> None:
    """Freeze ``features`` (images in [-1, 1] to (N, d)) into a TorchScript file, traced on ``images``."""
    with torch.no_grad():
        traced = torch.jit.trace(features.cpu().eval().requires_grad_(False), images.cpu())
    torch.jit.save(traced, path)
