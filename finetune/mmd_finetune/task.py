"""What a run works on, made once from its settings: network, plan, real images, references. Checks everything."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.denoiser import AtTimesteps
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.plan import StepPlan
from mmd_export.plans import choose_plan
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.data import load_images, require_images
from mmd_finetune.features import Encoder, load_encoder, require_fit
from mmd_finetune.metrics import frechet_distance, sample_many, sampler_inputs
from mmd_finetune.metrics.suite import Features, MetricOptions, measure
from mmd_finetune.reference import Reference, encode_in_batches, make_reference
from mmd_finetune.settings import SEED_LIMIT, FinetuneSettings

# Noise that no seed of a run can draw: for choosing the best weights, and for the numbers that are reported.
SELECTION_SEED = SEED_LIMIT + 1
REPORT_SEED = SEED_LIMIT + 2


@dataclass(frozen=True)
class Task:
    """The fixed side of a run. ``held_out_features`` float32 (M, d) are the real images in the held-out encoder."""

    settings: FinetuneSettings
    base: Checkpoint
    plan: StepPlan
    data_sha256: str
    references: tuple[Reference, ...]
    holdout: Encoder
    held_out_features: Tensor
    device: torch.device

    def sampler(self, denoiser: nn.Module) -> UnrolledSampler:
        """The plan over ``denoiser``: what is tuned, measured and shipped."""
        settings = self.settings
        return UnrolledSampler(
            AtTimesteps(denoiser, self.plan.timesteps), self.plan, checkpoint_calls=settings.checkpoint_calls
        )

    def noise_of(self, iteration: int) -> dict[str, Tensor]:
        """The sampler's inputs at one iteration: a function of (seed, iteration), so no generator state is kept."""
        size = self.settings.batch_size
        return sampler_inputs(
            self.settings.seed, size, self.base.shape, self.plan.noisy_steps, iteration * size, self.device
        )

    def samples(self, denoiser: nn.Module, seed: int, count: int | None = None) -> Tensor:
        """Samples (N, C, H, W) of the images 0 ... N - 1 of ``seed``; by default ``evaluate_count`` of them."""
        settings = self.settings
        count, batch = count or settings.evaluate_count, settings.batch_size
        return sample_many(self.sampler(denoiser), self.base.shape, count, seed, batch=batch, device=self.device)

    def held_out_distance(self, images: Tensor) -> float:
        """Frechet distance of ``images`` and the real images in the held-out encoder; inf if an image is not finite."""
        features = encode_in_batches(self.holdout, images)
        if not bool(torch.isfinite(features).all()):
            return float("inf")
        return frechet_distance(features, self.held_out_features)

    def further_metrics(self, images: Tensor) -> dict[str, Any]:
        """``metrics``: name -> value in the held-out encoder, for the log; empty if the settings name none."""
        if not self.settings.metrics:
            return {}
        features = encode_in_batches(self.holdout, images)
        sets = Features(self.holdout.name, self.held_out_features, features, MetricOptions(resamples=0))
        return {"metrics": {name: found.value for name, found in measure(self.settings.metrics, sets).items()}}

    def record(self) -> dict[str, Any]:
        """What makes the run what it is; resuming compares it. No path of this machine."""
        return {
            "settings": self.settings.public(),
            "base_sha256": self.base.sha256,
            "data_sha256": self.data_sha256,
            "plan_sha256": self.plan.digest(),
        }


def prepare(settings: FinetuneSettings) -> Task:
    """Load and check all that ``settings`` name; raises UsageError before any work is done."""
    device = _device(settings.device)
    base = load_checkpoint(settings.model)
    if base.classes is not None:
        raise UsageError(
            f"model {base.name} is conditional on {base.classes} classes; only unconditional ones are tuned"
        )
    if base.latent:
        raise UsageError(f"model {base.name} makes latents; only models of pixels are tuned")
    if base.conditions:
        told = ", ".join(each.name for each in base.conditions)
        raise UsageError(f"model {base.name} is conditional on {told}; only unconditional ones are tuned")
    if not base.configs:
        raise UsageError(
            f"model {settings.model} has no diffusers config, so no run folder can hold it tuned; build it"
        )
    plan = choose_plan(base.scheduler, **settings.plan_options().wanted)
    encoders = [load_encoder(name).to(device) for name in settings.features]
    holdout = load_encoder(settings.holdout).to(device)
    for encoder in (*encoders, holdout):
        require_fit(encoder, base.shape)
    images = load_images(settings.data)
    require_images(images, settings.data, base.shape, settings.batch_size)
    base.denoiser.to(device)
    real = torch.from_numpy(images).clone().to(device)
    return Task(
        settings=settings,
        base=base,
        plan=plan,
        data_sha256=_sha256(images),
        references=tuple(make_reference(encoder, settings.kernel, real) for encoder in encoders),
        holdout=holdout,
        held_out_features=encode_in_batches(holdout, real),
        device=device,
    )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise NotAvailableError("device cuda: no NVIDIA GPU is visible to torch; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _sha256(images: NDArray[np.float32]) -> str:
    digest = hashlib.sha256(f"{images.dtype} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()
