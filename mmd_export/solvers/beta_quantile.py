"""The quantile function of the Beta distribution, which diffusers takes from scipy."""

from __future__ import annotations

import math

_TINY = 1e-300
_TERMS = 400
_HALVINGS = 200


def beta_quantile(p: float, a: float, b: float) -> float:
    """x with I_x(a, b) = p, by bisection: I is monotone and costs microseconds."""
    if p <= 0.0 or p >= 1.0:
        return min(max(p, 0.0), 1.0)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if regularised_beta(middle, a, b) < p else (low, middle)
    return 0.5 * (low + high)


def regularised_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), by the continued fraction of DLMF 8.17.22 where it converges fast, else 1 - I_{1-x}(b, a)."""
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - regularised_beta(1.0 - x, b, a)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(max(x, _TINY)) + b * math.log1p(-x) - log_beta) / a
    return front * _continued_fraction(x, a, b)


def _continued_fraction(x: float, a: float, b: float) -> float:
    """1 / (1 + d_1 / (1 + d_2 / ...)) by Lentz's method."""
    value, c, d = 1.0, 1.0, 0.0
    for i in range(_TERMS):
        m = i // 2
        if i == 0:
            numerator = 1.0
        elif i % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / (1.0 + numerator * d or _TINY)
        c = (1.0 + numerator / c) or _TINY
        value *= c * d
        if i > 1 and abs(1.0 - c * d) < 1e-17:
            break
    return value - 1.0
