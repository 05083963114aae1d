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
    return of_arrays(*_checked(features_a, features_b))


def _checked(features_a: Tensor, features_b: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both in float64; raises UsageError unless they are (N, d) and (M, d), N, M >= 2, all finite."""
    a, b = (_finite(features) for features in (features_a, features_b))
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"Frechet distance: features have {a.shape[1]} and {b.shape[1]} dimensions")
    return a, b


def _finite(features: Tensor) -> NDArray[np.float64]:
    if features.dim() != 2 or len(features) < 2:
        raise UsageError(f"Frechet distance: features are {tuple(features.shape)}; (N, d) with N >= 2 is expected")
    values: NDArray[np.float64] = features.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise UsageError("Frechet distance: a feature is NaN or infinite")
    return values


def frechet(real: Tensor, generated: Tensor, resamples: int, seed: int) -> Measured:
    """``frechet_distance`` of ``real`` (N, d) and ``generated`` (M, d), and an interval for the rows of both.

    What is drawn again is the distance's first-order expansion, a mean over the rows of each side: a draw costs
    O(N + M) where the distance costs O((N + M) d^2 + d^3).
    """
    if not resamples:
        return Measured(frechet_distance(real, generated))
    value, *sides = expansion(*_checked(real, generated))
    means = (resampled_means(torch.from_numpy(each), resamples, seed + i) for i, each in enumerate(sides))
    return centred_interval(value, sum(means, torch.zeros(resamples, dtype=torch.float64)))


def expansion(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """The Frechet distance of ``a`` (N, d) and ``b`` (M, d), and its derivatives by the weights of their rows.

    The derivatives, (N,) and (M,), are for weights that sum to 1, so their means are 0: the influence function of
    Hampel 1974. Their mean squares over N and over M add up to the variance of the infinitesimal jackknife (Efron 1982,
    ch. 6).

    For a row c of a - m_a: 2 (m_a - m_b)'c + N / (N - 1) (c'c - c'Tc), less the mean over the rows, with the T that
    makes T C_a T = C_b; for ``b`` with the sides swapped. From QR decompositions a - m_a = Q_a R_a, b - m_b = Q_b R_b
    and U S V' = R_a R_b' / sqrt((N - 1) (M - 1)) follows c'Tc = (N - 1) |S^(1/2) U'q|^2, q the row of Q_a: no inverse.
    """
    shift = a.mean(axis=0) - b.mean(axis=0)
    parts = [_decomposed(side, sign * shift) for side, sign in ((a, 2.0), (b, -2.0))]
    (q_a, r_a, *_), (q_b, r_b, *_) = parts
    n, m = len(a) - 1, len(b) - 1
    u, s, v = np.linalg.svd(r_a @ r_b.T / np.sqrt(n * m), full_matrices=False)
    value = float(shift @ shift + (r_a**2).sum() / n + (r_b**2).sum() / m - 2.0 * s.sum())
    moved = n * ((q_a @ u) ** 2 @ s), m * ((q_b @ v.T) ** 2 @ s)
    own, other = (
        linear + (square - by_map) * len(square) / (len(square) - 1)
        for (_, _, linear, square), by_map in zip(parts, moved, strict=True)
    )
    return value, own - own.mean(), other - other.mean()


def _decomposed(side: NDArray[np.float64], direction: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Q and R of the centred rows c, their products with ``direction`` and with themselves."""
    c = side - side.mean(axis=0)
    return *np.linalg.qr(c), c @ direction, np.einsum("ij,ij->i", c, c)
