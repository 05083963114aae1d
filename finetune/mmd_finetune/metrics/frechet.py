"""The Frechet distance of two sets of features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmd_export.distribution import frechet_distance as of_arrays
from mmd_export.errors import UsageError
from mmd_finetune.metrics.bootstrap import Measured, centred_interval, resampled_rows


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)); Dowson and Landau 1982, Heusel et al. 2017, eq. 6.

    Features (N, d) and (M, d), N, M >= 2; float64.
    """
    a, b = (_checked(features) for features in (features_a, features_b))
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"Frechet distance: features have {a.shape[1]} and {b.shape[1]} dimensions")
    return of_arrays(a, b)


def _checked(features: Tensor) -> NDArray[np.float64]:
    """(N, d) in float64, N >= 2, all finite."""
    if features.dim() != 2 or len(features) < 2:
        raise UsageError(f"Frechet distance: features are {tuple(features.shape)}; (N, d) with N >= 2 is expected")
    values: NDArray[np.float64] = features.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise UsageError("Frechet distance: a feature is NaN or infinite")
    return values


def frechet(
    real: Tensor, generated: Tensor, resamples: int, seed: int, drawn: Callable[[int], None] = lambda _: None
) -> Measured:
    """``frechet_distance`` of ``real`` (M, d) and ``generated`` (N, d), both sides drawn again for the interval.

    A draw costs what the value costs, O((M + N) d^2 + d^3); ``drawn`` is told how many are done.
    """
    value = frechet_distance(real, generated)
    sides = (resampled_rows(len(each), resamples, seed + i) for i, each in enumerate((real, generated)))
    draws = []
    for rows, others in zip(*sides, strict=True):
        draws.append(frechet_distance(real[rows], generated[others]))
        drawn(len(draws))
    return centred_interval(value, torch.tensor(draws, dtype=torch.float64))
