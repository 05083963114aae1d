"""Precision, recall, density, coverage: real and generated features by their k nearest neighbours.

With r(x) the distance from x to its k-th nearest neighbour in its own set (x itself not counted) and B(x) the closed
ball of that radius:

    precision = share of generated y in some B(real x)                    Kynkaanniemi et al. 2019, eq. 2
    recall    = share of real x in some B(generated y)                    the same, sides swapped
    density   = mean over generated y of #{real x : y in B(x)} / k        Naeem et al. 2020, eq. 4
    coverage  = share of real x whose B(x) holds some generated y         Naeem et al. 2020, eq. 6

Each is a mean over rows; the interval resamples those rows, the balls stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmd_export.errors import UndefinedError
from mmd_finetune.metrics.real import Real

VALUES_AT_ONCE = 1 << 24
LEAST_ROWS = 256  # torch.cdist copies all of y for every block of x


@dataclass(frozen=True)
class Balls:
    """What every row contributes: ``precision`` and ``density`` (N,), ``recall`` and ``coverage`` (M,)."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def balls(real: Real, generated: Tensor, k: int) -> Balls:
    """The row values of all four metrics for features (M, d) and (N, d); raises UndefinedError if k is out of range."""
    real_radii, generated_radii = real.once(radii, k, "real"), radii(generated, k, "generated")
    inside_real = torch.zeros(len(generated), dtype=torch.int64, device=generated.device)
    recall = torch.zeros(len(real_radii), dtype=torch.bool, device=generated.device)
    coverage = torch.zeros_like(recall)
    for rows, distances in distance_blocks(generated.double(), real.features.double()):
        in_real = distances <= real_radii
        inside_real[rows] = in_real.sum(1)
        coverage |= in_real.any(0)
        recall |= (distances <= generated_radii[rows, None]).any(0)
    return Balls((inside_real > 0).double(), recall.double(), inside_real.double() / k, coverage.double())


def radii(features: Tensor, k: int, side: str) -> Tensor:
    """Distance of each row of ``features`` (N, d) to its k-th nearest other row, float64 (N,)."""
    if not 1 <= k < len(features):
        raise UndefinedError(
            f"--neighbours is {k}, the {side} set has {len(features)} images; give 1 to {len(features) - 1} or more "
            "images"
        )
    found = torch.empty(len(features), dtype=torch.float64, device=features.device)
    features = features.double()
    for rows, distances in distance_blocks(features, features):
        distances[torch.arange(len(rows), device=rows.device), rows] = torch.inf  # not its own neighbour
        found[rows] = distances.kthvalue(k, dim=1).values
    return found


def distance_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers of ``x`` (N, d) and their distances to all of ``y`` (M, d), some rows at a time."""
    size = max(LEAST_ROWS, VALUES_AT_ONCE // len(y))
    for rows in torch.arange(len(x), device=x.device).split(size):
        yield rows, torch.cdist(x[rows], y)
