"""What is measured, never optimised: Frechet distance in a held-out encoder, classes, many samples from a seed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_export.noise import sampler_noise
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.features import Encoder


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)); Dowson and Landau 1982, Heusel et al. 2017, eq. 6.

    Features (N, d) and (M, d), N, M >= 2; float64. With C = R^T R, R from the QR decomposition of the centred features,
    Tr (C_a C_b)^(1/2) is the sum of the singular values of R_a R_b^T: no root of a rounding error, no complex number.
    """
    a, b = (_checked(features) for features in (features_a, features_b))
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"Frechet distance: features have {a.shape[1]} and {b.shape[1]} dimensions")
    shift = a.mean(axis=0) - b.mean(axis=0)
    root_a, root_b = _root(a), _root(b)
    trace_root = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(shift @ shift + (root_a**2).sum() + (root_b**2).sum() - 2.0 * trace_root)


def _checked(features: Tensor) -> NDArray[np.float64]:
    """(N, d) in float64, N >= 2, all finite."""
    if features.dim() != 2 or len(features) < 2:
        raise UsageError(f"Frechet distance: features are {tuple(features.shape)}; (N, d) with N >= 2 is expected")
    values: NDArray[np.float64] = features.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise UsageError("Frechet distance: a feature is NaN or infinite")
    return values


def _root(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """R (min(N, d), d) with R^T R = the covariance of the features."""
    root: NDArray[np.float64] = np.linalg.qr(features - features.mean(axis=0), mode="r") / np.sqrt(len(features) - 1)
    return root


def class_histogram(encoder: Encoder, images: Tensor, batch: int = 512) -> list[float]:
    """Fraction of ``images`` (N, C, H, W) in each of the encoder's classes."""
    with torch.inference_mode():
        predicted = torch.cat([encoder.logits(part).argmax(1) for part in images.split(batch)])
    counts = torch.bincount(predicted, minlength=encoder.classes or 0)
    return [int(count) / len(images) for count in counts]


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
) -> Tensor:
    """Samples (N, C, H, W) of the images first ... first + N - 1 of ``seed``.

    The batch changes nothing but memory and rounding.
    """
    place = device or torch.device("cpu")
    parts = [torch.empty((0, *shape), device=place)]
    with torch.inference_mode():
        for start in range(first, first + count, batch):
            size = min(batch, first + count - start)
            parts.append(sampler(**sampler_inputs(seed, size, shape, sampler.plan.noisy_steps, start, place)))
        return torch.cat(parts)
