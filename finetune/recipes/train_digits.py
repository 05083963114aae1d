"""Train everything the built-in ``digits`` model ships: the base denoiser and the encoders (``make digits``).

Writes the diffusers folder ``mmd_export/models/digits``, the encoders under ``finetune/mmd_finetune/encoders``, and the
log with the loss curve to ``benchmarks/results/digits_training.json``. At most 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmd_finetune.digits import DigitsSplit, load_digits_split
from mmd_finetune.digits_encoders import ARCHITECTURES, accuracy, class_logits
from recipes.digits_card import MODEL_FOLDER, RESULT_FILE, ROOT, write_card

ENCODER_FOLDER = ROOT / "finetune/mmd_finetune/encoders"

ENCODER_STEPS = 1500
DENOISER_STEPS = 6000
BATCH = 128
PEAK_LEARNING_RATE = 1e-3
EMA_DECAY = 0.999


def train_encoder(name: str, data: DigitsSplit, steps: int) -> tuple[nn.Module, float]:
    """Cross-entropy with label smoothing on noisy, shifted scans; returns the encoder and its held-out accuracy."""
    torch.manual_seed(0)
    encoder = ARCHITECTURES[name]()
    images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=steps)
    for _ in track(range(steps), description=name):
        rows = torch.randint(len(images), (BATCH,))
        shifted = shift(images[rows]) + 0.15 * torch.randn(BATCH, 1, 8, 8)
        loss = F.cross_entropy(class_logits(encoder, shifted), labels[rows], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    held_out = torch.from_numpy(data.held_out_images), torch.from_numpy(data.held_out_labels)
    return encoder.eval(), accuracy(encoder, *held_out)


def shift(images: Tensor) -> Tensor:
    """Move half of the batch by one pixel in a random direction, background filled in."""
    dy, dx = (int(v) for v in torch.randint(-1, 2, (2,)))
    half = len(images) // 2
    padded = F.pad(images[:half], (1, 1, 1, 1), value=-1.0)
    return torch.cat([padded[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx], images[half:]])


def new_denoiser() -> UNet2DModel:
    """UNet of 0.65 M parameters."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        dropout=0.1,
    )


def denoising_loss(model: UNet2DModel, scheduler: DDIMScheduler, images: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted noise; Ho et al. 2020, eq. 14."""
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(images),), generator=generator)
    return F.mse_loss(model(scheduler.add_noise(images, noise, timesteps), timesteps).sample, noise)


def train_denoiser(data: DigitsSplit, steps: int) -> tuple[UNet2DModel, DDIMScheduler, list[dict[str, float]]]:
    """The EMA weights, the scheduler, and the curve of training and held-out loss."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, scheduler = new_denoiser(), DDIMScheduler()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    images, held_out = torch.from_numpy(data.train_images), torch.from_numpy(data.held_out_images)
    curve, recent, start = [], [], time.perf_counter()
    for step in track(range(1, steps + 1), description="denoiser"):
        warm, decay = min(step / 200, 1.0), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = PEAK_LEARNING_RATE * warm * (0.02 + 0.98 * decay)
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        loss = denoising_loss(model.train(), scheduler, images[rows], generator)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - min(EMA_DECAY, step / (step + 10)))
        recent.append(float(loss.detach()))
        if step % 250 == 0:
            with torch.inference_mode():
                probe = torch.Generator().manual_seed(1)
                on_held_out = float(denoising_loss(average, scheduler, held_out.repeat(4, 1, 1, 1), probe))
            seconds = round(time.perf_counter() - start, 1)
            curve.append({"step": step, "loss": float(np.mean(recent)), "held_out": on_held_out, "seconds": seconds})
            recent.clear()
            print(curve[-1], flush=True)
    return average, scheduler, curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="fraction of the optimiser steps, to try the recipe out"
    )
    parser.add_argument(
        "--encoders", nargs="+", choices=tuple(ARCHITECTURES), help="train these alone; all else stays as it is"
    )
    arguments = parser.parse_args()
    scale = arguments.scale
    data, start = load_digits_split(), time.perf_counter()
    accuracies = {}
    ENCODER_FOLDER.mkdir(parents=True, exist_ok=True)
    for name in arguments.encoders or ARCHITECTURES:
        encoder, accuracies[name] = train_encoder(name, data, int(ENCODER_STEPS * scale))
        save_file(encoder.state_dict(), ENCODER_FOLDER / f"{name}.safetensors")
        print(name, accuracies[name], flush=True)
    if arguments.encoders:
        result = json.loads(RESULT_FILE.read_text(encoding="utf-8"))
        result["held_out_accuracy"] |= accuracies
        RESULT_FILE.write_text(json.dumps(result, indent=1) + "\n")
        return
    denoiser, scheduler, curve = train_denoiser(data, int(DENOISER_STEPS * scale))
    denoiser.save_pretrained(MODEL_FOLDER / "unet")
    scheduler.save_pretrained(MODEL_FOLDER / "scheduler")
    result = {
        "script": "finetune/recipes/train_digits.py",
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "held_out_accuracy": accuracies,
        "seconds": round(time.perf_counter() - start, 1),
        "curve": curve,
    }
    RESULT_FILE.write_text(json.dumps(result, indent=1) + "\n")
    write_card()


if __name__ == "__main__":
    main()
