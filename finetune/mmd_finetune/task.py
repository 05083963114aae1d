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
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.compute import tuning_form
from mmd_finetune.data import load_images, require_images
from mmd_finetune.embedding import batch_rows
from mmd_finetune.features import Encoder, load_encoder, require_fit
from mmd_finetune.kernels import parse_kernel
from mmd_finetune.metrics import frechet_distance, sample_many, sampler_inputs
from mmd_finetune.reference import LANDMARKS, Reference, encode_in_batches, make_reference
from mmd_finetune.settings import SEED_LIMIT, FinetuneSettings
from mmd_finetune.world import World

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
    real_count: int
    device: torch.device
    world: World

    @property
    def loss_weights(self) -> dict[str, float]:
        """What the MMD^2 of each encoder counts in the loss: their mean."""
        return {reference.encoder.name: 1.0 / len(self.references) for reference in self.references}

    def sampler(self, denoiser: nn.Module) -> UnrolledSampler:
        """The plan over ``denoiser``: what is measured and shipped."""
        return UnrolledSampler(AtTimesteps(denoiser, self.plan.timesteps), self.plan)

    def tuning_sampler(self, denoiser: nn.Module) -> UnrolledSampler:
        """The same numbers over the same weights, run in the memory and the arithmetic that the settings ask for."""
        settings = self.settings
        form = tuning_form(
            denoiser, autocast=settings.autocast, channels_last=settings.channels_last, compiled=settings.compile
        )
        return UnrolledSampler(
            AtTimesteps(form, self.plan.timesteps), self.plan, checkpoint_calls=settings.checkpoint_calls
        )

    def noise_of(self, iteration: int) -> dict[str, Tensor]:
        """The sampler's inputs for this process's share of an iteration's batch, in the memory of the host.

        A function of (seed, iteration), so no generator state is kept; all processes together draw what one would.
        """
        share = self.world.share(self.settings.batch_size)
        first = iteration * self.settings.batch_size + share.start
        host = torch.device("cpu")
        inputs = sampler_inputs(self.settings.seed, len(share), self.base.shape, self.plan.noisy_steps, first, host)
        if self.device.type == "cpu":
            return inputs
        return {name: tensor.pin_memory() for name, tensor in inputs.items()}

    def real_rows(self, iteration: int) -> Tensor:
        """Which real images the reference ``batch`` compares with: of the whole batch, the same in every process."""
        settings = self.settings
        return batch_rows(settings.seed, iteration, settings.batch_size, self.real_count)

    def generator_seed(self, iteration: int, part: int) -> int:
        """For torch's own generator, which an encoder may draw from: another one for every micro-batch."""
        drawn = f"{self.settings.seed} {iteration} {self.world.rank} {part}".encode()
        return int.from_bytes(hashlib.sha256(drawn).digest()[:7], "big")

    def samples(self, denoiser: nn.Module, seed: int, count: int | None = None) -> Tensor:
        """Samples (N, C, H, W) of the images 0 ... N - 1 of ``seed``; by default ``evaluate_count`` of them.

        Each process draws its share, all receive all.
        """
        settings = self.settings
        share = self.world.share(count or settings.evaluate_count)
        own = sample_many(
            self.sampler(denoiser),
            self.base.shape,
            len(share),
            seed,
            batch=settings.micro_batch_size or settings.batch_size,
            device=self.device,
            first=share.start,
        )
        return self.world.gather(own)[0]

    def held_out_distance(self, images: Tensor) -> float:
        """Frechet distance of ``images`` and the real images in the held-out encoder; inf if an image is not finite."""
        features = encode_in_batches(self.holdout, images)
        if not bool(torch.isfinite(features).all()):
            return float("inf")
        return frechet_distance(features, self.held_out_features)

    def record(self) -> dict[str, Any]:
        """What makes the run what it is; resuming compares it. No path of this machine."""
        return {
            "settings": self.settings.public(),
            "base_sha256": self.base.sha256,
            "data_sha256": self.data_sha256,
            "plan_sha256": self.plan.digest(),
        }


def prepare(settings: FinetuneSettings, world: World | None = None) -> Task:
    """Load and check all that ``settings`` name; raises UsageError before any work is done.

    ``world`` are the processes that share the work; None is this one alone.
    """
    world = world or World()
    if world.size > settings.batch_size:
        raise UsageError(
            f"{world.size} processes for a batch of {settings.batch_size}; start fewer or raise --batch-size"
        )
    parse_kernel(settings.kernel)
    device = _device(settings.device, world)
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
    plan = base.plan_for(**settings.plan_options().wanted)
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
        references=tuple(_reference(encoder, settings, real) for encoder in encoders),
        holdout=holdout,
        held_out_features=encode_in_batches(holdout, real),
        real_count=len(real),
        device=device,
        world=world,
    )


def _reference(encoder: Encoder, settings: FinetuneSettings, real: Tensor) -> Reference:
    return make_reference(
        encoder,
        settings.kernel,
        real,
        kind=settings.reference,
        biased=settings.estimator == "biased",
        landmarks=settings.landmarks or LANDMARKS,
        seed=settings.seed,
    )


def _device(name: str, world: World) -> torch.device:
    if world.size > 1:
        return world.device
    if name == "cuda" and not torch.cuda.is_available():
        raise NotAvailableError("device cuda: no NVIDIA GPU is visible to torch; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _sha256(images: NDArray[np.float32]) -> str:
    digest = hashlib.sha256(f"{images.dtype} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()
