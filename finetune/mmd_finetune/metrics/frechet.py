"""The Frechet distance of two sets of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmd_export.distribution import frechet_distance as of_arrays
from mmd_export.errors import UsageError
from mmd_finetune.metrics.bootstrap import Measured, centred_interval, resampled_means
from mmd_finetune.metrics.real import Real

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """What the distance takes from one set (N, d) alone, float64.

    Rows less their ``mean`` (d,), ``centred`` (N, d), are ``q`` (N, n) times ``r`` (n, d), n = min(N, d); ``square``
    (N,) is the squared length of each.
    """

    mean: Array
    centred: Array
    q: Array
    r: Array
    square: Array


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)); Dowson and Landau 1982, Heusel et al. 2017, eq. 6.

    Features (N, d) and (M, d), N, M >= 2; float64.
    """
    a, b = (_finite(features) for features in (features_a, features_b))
    _require_same_width(a, b)
    return of_arrays(a, b)


def frechet(real: Real, generated: Tensor, resamples: int, seed: int) -> Measured:
    """``frechet_distance`` of ``real`` (N, d) and ``generated`` (M, d), and an interval for the rows of both.

    What is drawn again is the distance's first-order expansion, a mean over the rows of each side: a draw costs
    O(N + M) where the distance costs O((N + M) d^2 + d^3).
    """
    if not resamples:
        return Measured(frechet_distance(real.features, generated))
    value, *sides = expansion(real.once(decomposed), decomposed(generated))
    means = (resampled_means(torch.from_numpy(each), resamples, seed + i) for i, each in enumerate(sides))
    return centred_interval(value, sum(means, torch.zeros(resamples, dtype=torch.float64)))


def decomposed(features: Tensor) -> Side:
    """The side of ``features`` (N, d), N >= 2; raises UsageError for others, and where one is not finite."""
    rows = _finite(features)
    mean = rows.mean(axis=0)
    c = rows - mean
    return Side(mean, c, *np.linalg.qr(c), np.einsum("ij,ij->i", c, c))


def expansion(a: Side, b: Side) -> tuple[float, Array, Array]:
    """The Frechet distance of ``a`` (N, d) and ``b`` (M, d), and its derivatives by the weights of their rows.

    The derivatives, (N,) and (M,), are for weights that sum to 1, so their means are 0: the influence function of
    Hampel 1974. Their mean squares over N and over M add up to the variance of the infinitesimal jackknife (Efron 1982,
    ch. 6).

    For a row c of a - m_a: 2 (m_a - m_b)'c + N / (N - 1) (c'c - c'Tc), less the mean over the rows, with the T that
    makes T C_a T = C_b; for ``b`` with the sides swapped. From QR decompositions a - m_a = Q_a R_a, b - m_b = Q_b R_b
    and U S V' = R_a R_b' / sqrt((N - 1) (M - 1)) follows c'Tc = (N - 1) |S^(1/2) U'q|^2, q the row of Q_a: no inverse.
    """
    _require_same_width(a.centred, b.centred)
    shift, n, m = a.mean - b.mean, len(a.centred) - 1, len(b.centred) - 1
    u, s, v = np.linalg.svd(a.r @ b.r.T / np.sqrt(n * m), full_matrices=False)
    value = float(shift @ shift + (a.r**2).sum() / n + (b.r**2).sum() / m - 2.0 * s.sum())
    moved = n * ((a.q @ u) ** 2 @ s), m * ((b.q @ v.T) ** 2 @ s)
    own, other = (
        side.centred @ (sign * shift) + (side.square - by_map) * len(side.square) / (len(side.square) - 1)
        for side, sign, by_map in zip((a, b), (2.0, -2.0), moved, strict=True)
    )
    return value, own - own.mean(), other - other.mean()


def _finite(features: Tensor) -> Array:
    if features.dim() != 2 or len(features) < 2:
        raise UsageError(f"Frechet distance: features are {tuple(features.shape)}; (N, d) with N >= 2 is expected")
    values: Array = features.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise UsageError("Frechet distance: a feature is NaN or infinite")
    return values


def _require_same_width(a: Array, b: Array) -> None:
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"Frechet distance: features have {a.shape[1]} and {b.shape[1]} dimensions")
