"""The Frechet distance of two sets of features."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.metrics.bootstrap import Measured, centred_interval, resampled_rows


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


def frechet(real: Tensor, generated: Tensor, resamples: int, seed: int) -> Measured:
    """``frechet_distance`` of ``real`` (M, d) and ``generated`` (N, d), both sides drawn again for the interval."""
    value = frechet_distance(real, generated)
    draws = [
        frechet_distance(real[rows], generated[others])
        for rows, others in zip(
            resampled_rows(len(real), resamples, seed), resampled_rows(len(generated), resamples, seed + 1), strict=True
        )
    ]
    return centred_interval(value, torch.tensor(draws, dtype=torch.float64))
