"""The Frechet distance of two sets of features."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmd_export.distribution import frechet_distance as of_arrays
from mmd_export.errors import UsageError
from mmd_finetune.metrics.bootstrap import Measured, centred_interval, resampled_means


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


def frechet(real: Tensor, generated: Tensor, resamples: int, seed: int) -> Measured:
    """``frechet_distance`` of ``real`` (M, d) and ``generated`` (N, d), and an interval for the rows of both.

    What is drawn again is the distance's first-order expansion, a mean over ``influences`` of each side: a draw costs
    O(M + N) where the distance costs O((M + N) d^2 + d^3).
    """
    value = frechet_distance(real, generated)
    if not resamples:
        return Measured(value)
    sides = influences(_checked(real), _checked(generated))
    draws = (resampled_means(torch.from_numpy(each), resamples, seed + i) for i, each in enumerate(sides))
    return centred_interval(value, sum(draws, torch.zeros(resamples, dtype=torch.float64)))


def influences(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How the Frechet distance changes with the weight of each row of ``a`` (N, d) and of ``b`` (M, d): (N,), (M,).

    The influence function of Hampel 1974; its mean square over N is the variance of the infinitesimal jackknife (Efron
    1982, ch. 6). Of a row x of ``a``: 2 (m_a - m_b)'c + c'c - c'Tc with c = x - m_a, less the mean over the rows, where
    T C_a T = C_b. With c = Q R, Q'Q = 1, and R_a R_b' / sqrt((N - 1)(M - 1)) = U S V', c'Tc is (N - 1) |S^(1/2) U'q|^2,
    which needs no inverse.
    """
    shift = a.mean(axis=0) - b.mean(axis=0)
    centred = [each - each.mean(axis=0) for each in (a, b)]
    (q_a, r_a), (q_b, r_b) = (np.linalg.qr(each) for each in centred)
    n, m = (len(each) - 1 for each in (a, b))
    u, s, v = np.linalg.svd(r_a @ r_b.T / np.sqrt(n * m), full_matrices=False)
    parts = ((2.0, centred[0], n * ((q_a @ u) ** 2 @ s)), (-2.0, centred[1], m * ((q_b @ v.T) ** 2 @ s)))
    own, other = (sign * (c @ shift) + (c**2).sum(axis=1) - moved for sign, c, moved in parts)
    return own - own.mean(), other - other.mean()
