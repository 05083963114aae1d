"""What the examples share: digits and its scans, a short training loop, and the way from a model to a checked graph."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmd_export.build import BuildOptions, build
from mmd_export.checkpoint import BUILT_IN, Checkpoint, load_checkpoint
from mmd_export.commands.sample import SampleOptions, sample
from mmd_export.commands.verify import verify
from mmd_export.denoiser import DiffusersUNet
from mmd_export.pictures import grid
from mmd_export.plan import StepPlan
from mmd_export.plan_options import PlanOptions
from mmd_export.schedule import alphas_cumprod
from mmd_finetune.digits import load_digits_split
from mmd_finetune.features import load_encoder
from mmd_finetune.metrics import frechet_distance

HELD_OUT = "digits-mlp"  # no loss of any example sees it
BATCH, SEED, SHOWN = 64, 7, 32
COUNT, QUICK_COUNT = 1797, 64
Images = NDArray[np.float32]
Loss = Callable[[nn.Module, nn.Module, torch.Generator], Tensor]


@dataclass(frozen=True)
class Sibling:
    """A model with the plan that runs it. ``before``: what the same calls gave without the training; a label each."""

    model: str
    plan: PlanOptions
    before: dict[str, Images]
    trained: str


def arguments(description: str | None) -> argparse.Namespace:
    """``--out`` and ``--quick``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs; the images are poor")
    return parser.parse_args()


def count_of(*, quick: bool) -> int:
    """How many images are drawn and scored: as many as there are scans."""
    return QUICK_COUNT if quick else COUNT


def scans() -> Tensor:
    """The training images (1437, 1, 8, 8) in [-1, 1]."""
    return torch.from_numpy(load_digits_split().train_images).clone()


def teacher() -> Checkpoint:
    """The built-in model."""
    return load_checkpoint("digits")


def student_of(checkpoint: Checkpoint) -> nn.Module:
    """A copy that can be trained; evaluation mode, so that dropout is off."""
    return copy.deepcopy(checkpoint.denoiser).requires_grad_(True)


def levels(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """(alpha_t, sigma_t) of every timestep, each (T, 1, 1, 1)."""
    alpha_bar = torch.tensor(alphas_cumprod(checkpoint.scheduler), dtype=torch.float64).reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt().float(), (1.0 - alpha_bar).sqrt().float()


def draw_batch(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Real images x0 and unit normal noise eps, each (BATCH, C, H, W)."""
    x0 = images[torch.randint(len(images), (BATCH,), generator=generator)]
    return x0, torch.randn(x0.shape, generator=generator)


def fit(network: nn.Module, loss: Loss, iterations: int, *, rate: float = 1e-3, decay: float = 0.98) -> nn.Module:
    """Adam at a rate that falls to zero; the average of the weights. ``loss(network, average, generator)``."""
    average = copy.deepcopy(network).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for step in range(iterations):
        optimiser.zero_grad()
        loss(network, average, generator).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        falling.step()
        for kept, new in zip(average.parameters(), network.parameters(), strict=True):
            kept.lerp_(new.detach(), 1.0 - min(decay, (step + 1) / (step + 10)))
    return average


def save_student(student: nn.Module, folder: Path, scheduler: dict[str, Any]) -> Path:
    """A diffusers folder: the weights, and the scheduler config that decides which plan it is."""
    assert isinstance(student, DiffusersUNet)
    student.unet.save_pretrained(folder / "unet")  # type: ignore[operator]
    own = json.loads((BUILT_IN["digits"] / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**own, **scheduler}, indent=2) + "\n")
    return folder


def draw(source: str, count: int, **plan: Any) -> Images:
    """Images (N, 1, 8, 8) of one seed, the same noise for every source."""
    images: Images = sample(SampleOptions(source, SEED, count, **plan))
    return images


def distance(images: Images) -> float:
    """Frechet distance to all scans in the held-out encoder."""
    encoder, real = load_encoder(HELD_OUT), load_digits_split().all_images
    with torch.inference_mode():
        return frechet_distance(encoder(torch.from_numpy(images)), encoder(torch.from_numpy(real)))


def finish(sibling: Sibling, out: Path, *, quick: bool, started: float) -> dict[str, Any]:
    """Build, verify, draw from the ONNX graph, score; ``out/bundle``, ``out/samples.png``, and the numbers."""
    trained_seconds = time.perf_counter() - started
    options = BuildOptions(
        sibling.model, "onnx", out / "bundle", batch="1" if quick else "1..64", **sibling.plan.wanted
    )
    bundle = build(options)
    parity = verify(bundle, checkpoint=sibling.model)
    parity.require()
    images = {**sibling.before, sibling.trained: draw(str(out / "bundle"), count_of(quick=quick))}
    distances = {name: round(distance(drawn), 4) for name, drawn in images.items()}
    draw_picture(images, distances, out / "samples.png")
    plan = StepPlan.from_dict(bundle.manifest.plan)
    return {
        "solver": plan.solver,
        "prediction_type": plan.prediction_type,
        "timesteps": list(plan.timesteps),
        "step_noises": plan.noisy_steps,
        "inputs": [spec.name for spec in bundle.manifest.inputs],
        "held_out_frechet_distance": distances,
        "trained": sibling.trained,
        "parity": [{"rung": rung.number, "worst": rung.worst, "verdict": rung.verdict} for rung in parity.rungs],
        "seconds": round(trained_seconds, 1),
    }


def draw_picture(images: dict[str, Images], distances: dict[str, float], path: Path) -> None:
    """One labelled row of images each, the same noise in all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.15 * len(images)), layout="constrained")
    for axes, (name, drawn) in zip(figure.subplots(len(images), 1, squeeze=False)[:, 0], images.items(), strict=True):
        apart = np.pad(drawn[:SHOWN], ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1.0)
        axes.imshow(grid(apart, columns=SHOWN // 2), cmap="gray", interpolation="nearest")
        axes.set_title(f"{name}: held-out Frechet distance {distances[name]:.2f}", loc="left", fontsize=10)
        axes.set_axis_off()
    figure.savefig(path, dpi=100, metadata={"Software": None})
