"""Kernels on encoder features: a frozen dataclass each, called as ``kernel(x (N, d), y (M, d)) -> (N, M)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmd_export.errors import UsageError

BANDWIDTH_FACTORS = (0.1, 0.3, 1.0)
MEDIAN_ROWS = 2000


class Kernel(Protocol):
    """A positive definite function of two feature vectors."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """All pairs: (N, d) and (M, d) to (N, M)."""
        ...


@dataclass(frozen=True)
class Linear:
    """k(x, y) = <x, y>: MMD is the distance of the means."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.T


@dataclass(frozen=True)
class Cubic:
    """k(x, y) = (<x, y> / d + 1)^3; Binkowski et al. 2018 (KID), and what MMD-DDM tunes with."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1.0) ** 3


@dataclass(frozen=True)
class Gaussian:
    """k(x, y) = sum_b exp(-|x - y|^2 / (2 s_b^2)); Li et al. 2015 (GMMN). ``squared_bandwidths`` are the s_b^2."""

    squared_bandwidths: tuple[float, ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        distances = squared_distances(x, y)
        total = torch.zeros_like(distances)
        for s2 in self.squared_bandwidths:
            total = total + torch.exp(distances / (-2.0 * s2))
        return total


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 = |x_i|^2 - 2 <x_i, y_j> + |y_j|^2, not below 0; (N, d) and (M, d) to (N, M)."""
    return ((x * x).sum(1)[:, None] - 2.0 * x @ y.T + (y * y).sum(1)[None]).clamp_min(0.0)


def median_squared_distance(features: Tensor) -> float:
    """Median of |x_i - x_j|^2 over i < j; Gretton et al. 2012, section 8. Of many rows evenly spaced ones are used."""
    rows = features[:: -(-len(features) // MEDIAN_ROWS)].double()
    above = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    return float(squared_distances(rows, rows)[above[0], above[1]].median())


def _gaussian(reference_features: Tensor) -> Gaussian:
    median = median_squared_distance(reference_features)
    if not median > 0.0:
        raise UsageError(
            f"kernel gaussian: the median squared distance of the real features is {median}, so more than half of the "
            "real images are equal to the encoder; use other data, or --kernel cubic"
        )
    return Gaussian(tuple(factor * median for factor in BANDWIDTH_FACTORS))


KERNELS: dict[str, Callable[[Tensor], Kernel]] = {
    "linear": lambda _: Linear(),
    "cubic": lambda _: Cubic(),
    "gaussian": _gaussian,
}


def make_kernel(name: str, reference_features: Tensor) -> Kernel:
    """The kernel of that name, its bandwidths set once from the real features (M, d).

    Raises UsageError that lists the names.
    """
    if name not in KERNELS:
        raise UsageError(f"--kernel {name!r} is unknown; known: {', '.join(sorted(KERNELS))}")
    return KERNELS[name](reference_features)
