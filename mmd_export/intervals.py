"""Intervals of percentiles and of ratios of times. Seeded, so that the same numbers give the same interval."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
LEAST_ROUNDS = 6  # the range of 6 draws covers the median with 1 - 2 / 2**6 = 97 %, that of 5 with 94 %


def rounds_for(percent: float) -> int:
    """The fewest rounds of which one is expected to lie beyond the percentile: 2, 10, 100 for p50, p90, p99."""
    return max(1, math.ceil(round(100.0 / (100.0 - percent), 6)))


def percentile_interval(
    values: NDArray[np.float64], percent: float, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of a percentile; Efron 1979."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    found = np.percentile(values[drawn], percent, axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(found, [tail, 100 - tail])
    return float(low), float(high)


# Quantiles of Student's t for two-sided intervals of 95 % and 99.5 %, for 1 to 30 degrees of freedom.
_T = {
    0.95: (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
           2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
    0.995: (127.32, 14.089, 7.453, 5.598, 4.773, 4.317, 4.029, 3.833, 3.690, 3.581, 3.497, 3.428, 3.372, 3.326, 3.286,
            3.252, 3.222, 3.197, 3.174, 3.153, 3.135, 3.119, 3.104, 3.091, 3.078, 3.067, 3.057, 3.047, 3.038, 3.030),
}  # fmt: skip


def mean_interval(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """``mean +- t s / sqrt(n)``; of the means of independent blocks, as Kalibera and Jones 2013 set them up.

    ``confidence``: 0.95 or 0.995. Beyond 31 values the quantile of 31 is used, which is the wider one.
    """
    count = len(values)
    quantile = _T[confidence][min(count - 1, 30) - 1]
    half = quantile * float(values.std(ddof=1)) / math.sqrt(count)
    centre = float(values.mean())
    return centre - half, centre + half
