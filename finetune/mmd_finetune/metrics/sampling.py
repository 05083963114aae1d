"""Many samples from a seed, and the classes they fall into."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmd_export.noise import sampler_noise
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.features import Encoder


def class_histogram(encoder: Encoder, images: Tensor, batch: int = 512) -> list[float]:
    """Fraction of ``images`` (N, C, H, W) in each of the encoder's classes."""
    shares: list[float] = (class_counts(encoder, images, images.device, batch) / len(images)).tolist()
    return shares


def class_counts(encoder: Encoder, images: Tensor, device: torch.device, batch: int = 512) -> Tensor:
    """How many ``images`` (N, C, H, W) are in each of the encoder's classes, float64 on its ``device``."""
    with torch.inference_mode():
        predicted = torch.cat([encoder.logits(part.to(device)).argmax(1) for part in images.split(batch)])
    return torch.bincount(predicted, minlength=encoder.classes or 0).double()


def sampler_inputs(
    seed: int, count: int, shape: tuple[int, int, int], noisy_steps: int, first: int, device: torch.device
) -> dict[str, Tensor]:
    """``noise`` (N, C, H, W) and, if stochastic, ``step_noise`` (S, N, C, H, W): images first ... first + N - 1."""
    arrays = sampler_noise(seed, count, shape, noisy_steps, first=first)
    return {name: torch.from_numpy(array).clone().to(device) for name, array in arrays.items()}


def sample_many(
    sampler: UnrolledSampler,
    shape: tuple[int, int, int],
    count: int,
    seed: int,
    *,
    batch: int = 256,
    device: torch.device | None = None,
    first: int = 0,
    give_way: Callable[[], None] = lambda: None,
) -> Tensor:
    """Samples (N, C, H, W) of the images first ... first + N - 1 of ``seed``.

    The batch changes nothing but memory and rounding. ``give_way`` is called before each.
    """
    place = device or torch.device("cpu")
    parts = [torch.empty((0, *shape), device=place)]
    with torch.inference_mode():
        for start in range(first, first + count, batch):
            give_way()
            size = min(batch, first + count - start)
            parts.append(sampler(**sampler_inputs(seed, size, shape, sampler.plan.noisy_steps, start, place)))
        return torch.cat(parts)
