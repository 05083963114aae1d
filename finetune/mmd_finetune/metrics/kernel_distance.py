"""Metrics that are a squared Maximum Mean Discrepancy: KID and CMMD, over all pairs of rows.

    MMD^2_u = 1/(n (n-1)) sum_{i != j} k(x_i, x_j) + 1/(m (m-1)) sum_{i != j} k(y_i, y_j)
              - 2/(n m) sum_{i, j} k(x_i, y_j)                                      Gretton et al. 2012, eq. 3

For the interval every sum takes the rows' multiplicities w_i of a bootstrap draw: sum_{i != j} w_i w_j k(x_i, x_j) over
sum_{i != j} w_i w_j. A row drawn twice never meets itself, so the draws are as unbiased as the estimate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmd_finetune.kernels import Cubic, Gaussian, Kernel
from mmd_finetune.metrics.bootstrap import Measured, centred_interval, multiplicities
from mmd_finetune.metrics.real import Real

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ROWS = 2048

Form = Callable[[Tensor], Tensor]
"""Features in float64, in the form that the kernel takes."""


def kid(real: Real, generated: Tensor, resamples: int, seed: int) -> Measured:
    """Kernel Inception Distance, k(x, y) = (<x, y> / d + 1)^3; Binkowski et al. 2018, section 4.

    Features (M, d) and (N, d). The paper averages MMD^2_u over random subsets; this is what that average tends to with
    the number of subsets, whatever their size.
    """
    return _mmd2(Cubic(), _as_they_are, real, generated, resamples, seed)


def cmmd(real: Real, generated: Tensor, resamples: int, seed: int) -> Measured:
    """1000 MMD^2_u with exp(-|x - y|^2 / (2 * 10^2)) on features of length 1; Jayasumana et al. 2024, section 4.

    Features (M, d) and (N, d). Meant for CLIP's. The released code takes the biased estimate, which is larger by
    about 1000 (1 - mean k) (1/N + 1/M).
    """
    found = _mmd2(Gaussian((CMMD_SIGMA**2,)), _of_length_1, real, generated, resamples, seed)
    low, high = (None if bound is None else CMMD_SCALE * bound for bound in (found.low, found.high))
    return Measured(CMMD_SCALE * found.value, low, high)


def _mmd2(kernel: Kernel, form: Form, real: Real, generated: Tensor, resamples: int, seed: int) -> Measured:
    x, y = form(generated), form(real.features)
    w_x, within_x = _one_side(generated, kernel, form, resamples, seed)
    w_y, within_y = real.once(_one_side, kernel, form, resamples, seed + 1)
    draws = within_x + within_y - 2.0 * _across(kernel, x, w_x, y, w_y)
    return centred_interval(float(draws[0]), draws[1:].cpu())


def _as_they_are(features: Tensor) -> Tensor:
    return features.double()


def _of_length_1(features: Tensor) -> Tensor:
    return F.normalize(features.double(), dim=1)


def _one_side(features: Tensor, kernel: Kernel, form: Form, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """The multiplicities (1 + R, n) of all draws, and the mean of the kernel over pairs in each; (1 + R,)."""
    weights = multiplicities(len(features), resamples, seed).to(features.device)
    return weights, _within(kernel, form(features), weights)


def _within(kernel: Kernel, x: Tensor, weights: Tensor) -> Tensor:
    """sum_{i != j} w_i w_j k(x_i, x_j) / sum_{i != j} w_i w_j for each line of ``weights`` (R, n); (R,)."""
    total = weights.new_zeros(len(weights))
    for first in range(0, len(x), ROWS):
        rows = torch.arange(first, min(first + ROWS, len(x)), device=x.device)
        values = kernel(x[rows], x)
        values[rows - first, rows] = 0.0
        total += ((weights[:, rows] @ values) * weights).sum(1)
    return total / (weights.sum(1) ** 2 - (weights**2).sum(1))


def _across(kernel: Kernel, x: Tensor, w_x: Tensor, y: Tensor, w_y: Tensor) -> Tensor:
    """sum_{i, j} w_i v_j k(x_i, y_j) / sum_{i, j} w_i v_j for each line of both weights; (R,)."""
    total = w_x.new_zeros(len(w_x))
    for rows, weights in zip(x.split(ROWS), w_x.split(ROWS, dim=1), strict=True):
        total += ((weights @ kernel(rows, y)) * w_y).sum(1)
    return total / (w_x.sum(1) * w_y.sum(1))
