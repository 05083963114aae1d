"""Train what the Fashion-MNIST study tunes and is judged by: a base denoiser and two encoders, at 32x32.

``--data`` is an .npz with ``x_train``, ``y_train``, ``x_test``, ``y_test`` (uint8; N, 28, 28); two pixels of
background are put around the images, so that they can be halved three times. Into ``--out`` go ``base/`` (a diffusers
folder), ``train.npz`` and ``test.npz``, ``fashion-conv.pt`` for the loss and ``fashion-residual.pt`` to judge
(TorchScript), and ``training.json`` with the curve. Some hours on 2 cores; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from mmd_export.errors import UsageError
from mmd_finetune.files import write_json
from recipes.classifier import accuracy, train_classifier
from recipes.training import Training, save_script, train_denoiser

ENCODER_STEPS = 2000
SIDE, BORDER = 32, 2


def new_denoiser() -> UNet2DModel:
    """UNet of 2.7 M parameters, most of them where there are few pixels: 32, 16, 8 and 4, attention at 4."""
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=32,
    )


class Conv(nn.Module):
    """Plain convolutions with striding; 128 features before the head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(((1, 32), (32, 64), (64, 64), (64, 128))):
            layers += [nn.Conv2d(inner, outer, 3, stride=1 + i % 2, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class Block(nn.Module):
    """x + conv(relu(conv(x))), batch-normalised; He et al. 2016."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


class Residual(nn.Module):
    """A small residual network, of another kind than ``Conv``; 96 features before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), Block(24), nn.Conv2d(24, 48, 2, stride=2), Block(48),
            nn.Conv2d(48, 96, 2, stride=2), Block(96), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


ENCODERS: dict[str, type[Conv | Residual]] = {"fashion-conv": Conv, "fashion-residual": Residual}


def load(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The four arrays: images uint8 (N, 1, 32, 32) with their border, labels int64 (N,)."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: torch.from_numpy(stored[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    border = (BORDER,) * 4
    return {
        name: (F.pad(tensor[:, None], border) if name.startswith("x") else tensor.long()).to(device)
        for name, tensor in arrays.items()
    }


def train_encoders(data: dict[str, Tensor], device: torch.device, out: Path, steps: int) -> dict[str, float]:
    """Those that are not there yet; how many of the test images each knows."""
    known, accuracies = out / "encoders.json", dict[str, float]()
    if known.exists():
        before = json.loads(known.read_text(encoding="utf-8"))
        if before["steps"] != steps:
            raise UsageError(f"{known}: trained for {before['steps']} steps, asked for {steps}; choose another --out")
        accuracies = before["accuracy"]
    for name, make in ENCODERS.items():
        torch.manual_seed(0)
        if name in accuracies:
            continue
        state = out / f"{name}-state.pt"
        network = train_classifier(make().to(device), data["x_train"], data["y_train"], steps, state)
        accuracies[name] = accuracy(network, data["x_test"], data["y_test"])
        print(name, accuracies[name], flush=True)
        save_script(network.get_submodule("features"), torch.zeros(2, 1, SIDE, SIDE), str(out / f"{name}.pt"))
        write_json(known, {"steps": steps, "accuracy": accuracies})
        state.unlink(missing_ok=True)
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of training the denoiser at most")
    parser.add_argument("--encoder-steps", type=int, default=ENCODER_STEPS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    if (arguments.out / "training.json").exists():
        raise UsageError(f"{arguments.out} holds a finished training; choose another --out")
    gpu = arguments.device != "cpu" and torch.cuda.is_available()
    device, out = torch.device("cuda" if gpu else "cpu"), arguments.out
    data = load(arguments.data, device)
    out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        np.savez(out / f"{part}.npz", images=data[f"x_{part}"].cpu().numpy())
    accuracies = train_encoders(data, device, out, arguments.encoder_steps)
    torch.manual_seed(1)
    model, scheduler = new_denoiser().to(device), DDIMScheduler()
    state = out / "denoiser-state.pt"
    training = Training(
        arguments.steps, arguments.batch, peak_rate=arguments.lr, seconds=arguments.seconds, state=state
    )
    average, curve = train_denoiser(model, scheduler, data["x_train"], data["x_test"], training)
    average.cpu().save_pretrained(out / "base/unet")
    scheduler.save_pretrained(out / "base/scheduler")
    facts = {"parameters": sum(p.numel() for p in average.parameters()), "accuracy": accuracies, "curve": curve}
    write_json(out / "training.json", facts)
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
