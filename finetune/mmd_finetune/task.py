"""What a run works on, made once from its settings: network, plan, real images, references. Checks everything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.denoiser import AtTimesteps
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.plan import StepPlan
from mmd_export.plans import choose_plan
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.array_files import Pixels
from mmd_finetune.balance import BATCHES, balanced_weights, equal_weights
from mmd_finetune.data import load_real, require_images
from mmd_finetune.feature_cache import FeatureCache, feature_folder
from mmd_finetune.features import Encoder, load_encoders, require_names
from mmd_finetune.metrics import frechet_distance, sample_many, sampler_inputs
from mmd_finetune.reference import Reference, encode_in_batches, make_reference
from mmd_finetune.settings import SEED_LIMIT, FinetuneSettings

# Noise that no seed of a run can draw: for choosing the best weights, and for the numbers that are reported.
SELECTION_SEED = SEED_LIMIT + 1
REPORT_SEED = SEED_LIMIT + 2


@dataclass(frozen=True)
class HeldOut:
    """An encoder that only scores, and its ``features`` float32 (M, d) of real images."""

    encoder: Encoder
    features: Tensor


@dataclass(frozen=True)
class Task:
    """The fixed side of a run.

    ``loss_weights``: what the MMD^2 of each encoder is multiplied with before they are summed. ``holdouts``: the first
    one decides which weights are best.
    """

    settings: FinetuneSettings
    base: Checkpoint
    plan: StepPlan
    data_sha256: str
    references: tuple[Reference, ...]
    loss_weights: Mapping[str, float]
    holdouts: tuple[HeldOut, ...]
    device: torch.device

    @property
    def holdout(self) -> Encoder:
        """The held-out encoder that decides."""
        return self.holdouts[0].encoder

    @property
    def held_out_features(self) -> Tensor:
        """The real images in it."""
        return self.holdouts[0].features

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        """Those of the loss, then the held-out ones."""
        of_loss = (reference.encoder for reference in self.references)
        return (*of_loss, *(holdout.encoder for holdout in self.holdouts))

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
        return _distance(self.holdouts[0], images)

    def held_out_distances(self, images: Tensor) -> dict[str, float]:
        """The same in every held-out encoder, by name; the one that decides comes first."""
        return {holdout.encoder.name: _distance(holdout, images) for holdout in self.holdouts}

    def record(self) -> dict[str, Any]:
        """What makes the run what it is; resuming compares it. No path of this machine."""
        return {
            "settings": self.settings.public(),
            "base_sha256": self.base.sha256,
            "data_sha256": self.data_sha256,
            "plan_sha256": self.plan.digest(),
            **{f"sha256 of encoder {encoder.name}": encoder.sha256 for encoder in self.encoders},
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
    encoders = load_encoders(settings.features, base.shape, device)
    holdouts = load_encoders(settings.holdout, base.shape, device, gradient=False)
    require_names((*encoders, *holdouts))
    images = load_real(settings.data, settings.data_options(), base.shape)
    require_images(images.train, settings.data, base.shape, settings.batch_size)
    base.denoiser.to(device)
    # On the CPU: the device holds their features, not the images.
    real, held_out = (torch.from_numpy(part) for part in (images.train, images.held_out))
    cache = FeatureCache(feature_folder() if settings.feature_cache else None, device)
    task = Task(
        settings=settings,
        base=base,
        plan=plan,
        data_sha256=_sha256(images.train, images.held_out),
        references=tuple(make_reference(encoder, settings.kernel, real, encode=cache) for encoder in encoders),
        loss_weights={},
        holdouts=tuple(HeldOut(encoder, cache(encoder, held_out)) for encoder in holdouts),
        device=device,
    )
    return replace(task, loss_weights=_loss_weights(task))


def _loss_weights(task: Task) -> dict[str, float]:
    """By the settings; the untuned model is sampled only where there is something to balance."""
    settings = task.settings
    if settings.balance == "equal" or len(task.references) == 1:
        return equal_weights(task.references)
    count = min(settings.evaluate_count, BATCHES * settings.batch_size)
    images = task.samples(task.base.denoiser, SELECTION_SEED, count)
    return balanced_weights(task.references, images, settings.batch_size)


def _distance(holdout: HeldOut, images: Tensor) -> float:
    """Frechet distance; inf if an image is not finite."""
    features = encode_in_batches(holdout.encoder, images)
    if not bool(torch.isfinite(features).all()):
        return float("inf")
    return frechet_distance(features, holdout.features)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise NotAvailableError("device cuda: no NVIDIA GPU is visible to torch; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _sha256(train: Pixels, held_out: Pixels) -> str:
    """Of the images of the loss and, where they are others, of those that only score."""
    digest = hashlib.sha256()
    for images in (train,) if held_out is train else (train, held_out):
        digest.update(f"{images.dtype} {images.shape}".encode())
        digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()
