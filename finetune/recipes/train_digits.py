"""Train everything the built-in ``digits`` model ships: the base denoiser and the encoders (``make digits``).

Writes the diffusers folder ``mmd_export/models/digits``, the encoders under ``finetune/mmd_finetune/encoders``, and the
log with the loss curve to ``benchmarks/results/digits_training.json``. At most 20 minutes on 2 cores. With ``--scale``
other than 1 all goes to ``runs/digits-trial``: what is shipped and its published accuracies stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

SCRIPT = "finetune/recipes/train_digits.py"
ENCODER_STEPS = 1500
DENOISER_STEPS = 6000
BATCH = 128
PEAK_LEARNING_RATE = 1e-3
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Places:
    """Where what is trained goes: the folders of the encoders and of the denoiser, and the log."""

    encoders: Path
    model: Path
    log: Path


SHIPPED = Places(ROOT / "finetune/mmd_finetune/encoders", MODEL_FOLDER, RESULT_FILE)
_TRIAL = ROOT / "runs/digits-trial"
TRIAL = Places(_TRIAL / "encoders", _TRIAL / "model", _TRIAL / "training.json")


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


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def train_encoders(names: Iterable[str], data: DigitsSplit, scale: float, folder: Path) -> dict[str, float]:
    """Their weights into ``folder``; the held-out accuracy of each."""
    accuracies = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        encoder, accuracies[name] = train_encoder(name, data, int(ENCODER_STEPS * scale))
        save_file(encoder.state_dict(), folder / f"{name}.safetensors")
        print(name, accuracies[name], flush=True)
    return accuracies


def with_encoders(log: dict[str, Any], accuracies: dict[str, float]) -> dict[str, Any]:
    """``log`` with encoders that were trained here and now, beside others that keep the environment they had."""
    known: dict[str, float] = log.get("held_out_accuracy", {})
    trained = ["denoiser", *known] if "curve" in log else list(known)
    environments = log.get("environments", dict.fromkeys(trained, log.get("environment")))
    here = dict.fromkeys(accuracies, environment())
    return log | {"held_out_accuracy": known | accuracies, "environments": environments | here}


def train_all(data: DigitsSplit, scale: float, places: Places) -> dict[str, Any]:
    """Encoders and denoiser into ``places``; the log."""
    start = time.perf_counter()
    accuracies = train_encoders(ARCHITECTURES, data, scale, places.encoders)
    denoiser, scheduler, curve = train_denoiser(data, int(DENOISER_STEPS * scale))
    denoiser.save_pretrained(places.model / "unet")
    scheduler.save_pretrained(places.model / "scheduler")
    log = {
        "script": SCRIPT,
        "environment": environment(),
        "environments": {"denoiser": environment()},
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "curve": curve,
    }
    return with_encoders(log, accuracies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="fraction of the optimiser steps, to try the recipe out"
    )
    parser.add_argument(
        "--encoders", nargs="+", choices=tuple(ARCHITECTURES), help="train these alone; all else stays as it is"
    )
    arguments = parser.parse_args()
    places = SHIPPED if arguments.scale == 1.0 else TRIAL
    data = load_digits_split()
    if arguments.encoders:
        accuracies = train_encoders(arguments.encoders, data, arguments.scale, places.encoders)
        log = json.loads(places.log.read_text(encoding="utf-8")) if places.log.exists() else {"script": SCRIPT}
        log = with_encoders(log, accuracies)
    else:
        log = train_all(data, arguments.scale, places)
    places.log.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    if places is SHIPPED:
        write_card()


if __name__ == "__main__":
    main()
