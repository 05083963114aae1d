"""CIFAR-10 by step budget on a GPU: a base model is trained, then tuned for 5, 10, 15 and 20 steps.

``make gpu PART=cifar10 DATA=folder`` runs it. The folder holds ``cifar10_train_filtered.npz`` (or
``cifar10_train.npz`` with ``images``, uint8 (50000, 32, 32, 3), in the official order) and ``weights/`` as
``cifar10_encoders.py`` reads them. The model trains and is tuned on the first 40,000 images; the last 10,000 are held
out, and samples are compared with them. ResNet-20 and SqueezeNet features serve the loss, ResNet-56's judge.
ResNet-56 saw all 50,000 images when it was trained: it scores samples against images, and no classifier. Every cell
is written at once; a second run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "finetune"), str(ROOT / "runtimes/python")]

import numpy as np  # noqa: E402 - the source tree has to be on the path first
import torch  # noqa: E402
from diffusers import DDIMScheduler, UNet2DModel  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.budget_tables import reaches  # noqa: E402
from benchmarks.budgets import PAPER, Recipe, Ruler, arguments_of, study  # noqa: E402
from benchmarks.cells import CellFile  # noqa: E402
from benchmarks.cifar10_encoders import ENCODERS, load  # noqa: E402
from benchmarks.common import RESULTS  # noqa: E402
from mmd_finetune.compute import full_float32  # noqa: E402
from mmd_finetune.features import load_encoder  # noqa: E402
from recipes.training import Training, save_script, train_denoiser  # noqa: E402

CONFIGS = {"paper": ROOT / "finetune/configs/cifar10-paper.toml", "ours": ROOT / "finetune/configs/cifar10.toml"}
FEATURES = {"paper": ("resnet20",), "ours": ("resnet20", "squeezenet")}
JUDGE = "resnet56"
BUDGETS = (5, 10, 15, 20)
TRAINING_IMAGES = 40_000

# Sized for a data-centre GPU, by operations alone: some minutes for the base, and for each budget.
BASE = Training(steps=40_000, batch=512, peak_rate=4e-4, decay=0.9995, seconds=240.0, flip=True)
OURS: dict[str, Any] = {
    "iterations": 200, "batch_size": 512, "learning_rate": 1e-4, "ema_decay": 0.97, "evaluate_every": 40,
    "evaluate_count": 2000, "autocast": "bf16",
}  # fmt: skip
SMOKE: dict[str, Any] = {"iterations": 1, "batch_size": 4, "evaluate_every": 1, "evaluate_count": 8, "metrics": ()}

SMOKE_IMAGES = 200


def new_denoiser(widths: tuple[int, ...] = (64, 128, 256, 256)) -> UNet2DModel:
    """UNet of 25 M parameters: 32, 16, 8 and 4 pixels, attention at 8."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )


def read(folder: Path) -> NDArray[np.uint8]:
    """uint8 (50000, 3, 32, 32).

    ``cifar10_train_filtered.npz`` holds ``g``, channels first: red and blue as differences to green, then differences
    along rows and columns, all modulo 256, so that they compress.
    """
    if (plain := folder / "cifar10_train.npz").is_file():
        return np.ascontiguousarray(np.load(plain)["images"].transpose(0, 3, 1, 2))
    stored = np.load(folder / "cifar10_train_filtered.npz")["g"]
    channels = np.cumsum(np.cumsum(stored, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    channels[0] += channels[1]
    channels[2] += channels[1]
    return np.ascontiguousarray(channels.transpose(1, 0, 2, 3))


def prepare(folder: Path, data: Path, device: torch.device, *, smoke: bool) -> Path:
    """Encoders as scripts, the two parts as arrays and the trained base in ``folder``; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    images = read(data)
    training, held_out = images[:TRAINING_IMAGES], images[TRAINING_IMAGES:]
    if smoke:
        training, held_out = training[:SMOKE_IMAGES], held_out[:SMOKE_IMAGES]
    for name, part in (("train", training), ("test", held_out)):
        np.savez(folder / f"{name}.npz", images=part)
    for name in ENCODERS:
        save_script(load(name, data / "weights"), torch.zeros(2, 3, 32, 32), str(folder / f"{name}.pt"))
    if not (folder / "training.json").is_file():
        sides = (torch.from_numpy(part).to(device) for part in (training, held_out))
        train_base(folder, *sides, smoke=smoke)
    return folder


def train_base(folder: Path, training: Tensor, held_out: Tensor, *, smoke: bool) -> None:
    """``base/`` and ``training.json``."""
    torch.manual_seed(0)
    model, scheduler = (new_denoiser((32, 32, 32, 32)) if smoke else new_denoiser()), DDIMScheduler()
    plan = Training(steps=2, batch=4) if smoke else BASE
    start = time.perf_counter()
    average, curve = train_denoiser(model.to(training.device), scheduler, training, held_out, plan)
    average.cpu().save_pretrained(folder / "base/unet")
    scheduler.save_pretrained(folder / "base/scheduler")
    seconds = round(time.perf_counter() - start, 1)
    facts = {"parameters": sum(p.numel() for p in average.parameters()), "seconds": seconds, "curve": curve}
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def recipes_of(folder: Path, *, smoke: bool) -> dict[str, Recipe]:
    """Both configs with the encoders that can be had here, and ours sized for a short run."""
    made = {}
    for name, config in CONFIGS.items():
        given = {
            "model": str(folder / "base"), "data": str(folder / "train.npz"),
            "features": tuple(f"torchscript:{folder / encoder}.pt" for encoder in FEATURES[name]),
            "holdout": f"torchscript:{folder / JUDGE}.pt",
        } | (OURS if name == "ours" else PAPER)  # fmt: skip
        made[name] = Recipe(config, given | (SMOKE if smoke else {}))
    return made


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, tune and measure what is missing in ``arguments.out``; the facts and all cells."""
    gpu = arguments.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    folder = prepare(arguments.runs, arguments.data, device, smoke=arguments.smoke)
    training, held_out = (torch.from_numpy(np.load(folder / f"{name}.npz")["images"]) for name in ("train", "test"))
    training, held_out = (part.float() / 127.5 - 1.0 for part in (training, held_out))
    made = recipes_of(folder, smoke=arguments.smoke)
    mine, judge = (load_encoder(f"torchscript:{folder / name}.pt") for name in ("resnet20", JUDGE))
    count = min(10_000, len(held_out))
    ruler = Ruler(held_out, training, held_out, mine, judge, draws=1, count=count, batch=500, device=device)
    trained = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    facts = {"base": {name: trained[name] for name in ("parameters", "seconds")} | trained["curve"][-1],
             "samples": count, "smoke": arguments.smoke}  # fmt: skip
    file = CellFile(arguments.out, "benchmarks/cifar10.py", facts)
    with full_float32():  # scores as `evaluate` gives them
        study(file, ruler, made, arguments, () if arguments.smoke else (50,))
    return {**facts, "cells": file.cells, "tuned_5_at_least_untuned_20": reaches(file.cells, 5, 20)}


def main() -> None:
    parser = arguments_of(str(__doc__), BUDGETS, ROOT / "runs/cifar10", RESULTS / "cifar10.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with the images and weights/")
    parser.add_argument("--smoke", action="store_true", help="tiny, to try the script out")
    parser.set_defaults(seeds=[0], methods=["untuned", "ours"])
    found = run(parser.parse_args())
    print({name: value for name, value in found.items() if name != "cells"})


if __name__ == "__main__":
    main()
