"""Intervals by resampling the rows that a metric was measured on; Efron 1979."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Measured:
    """A value with the bounds of its 95 % interval; both bounds are None where nothing was resampled."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def told(self, form: str) -> str:
        """As 2.55 (2.31 to 2.79), each number in ``form``."""
        return f"{self.value:{form}}" + ("" if self.low is None else f" ({self.low:{form}} to {self.high:{form}})")


def resampled_rows(count: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """``resamples`` times ``count`` row numbers drawn with replacement, int64 (count,) each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        yield torch.randint(count, (count,), generator=generator)


def multiplicities(count: int, resamples: int, seed: int) -> Tensor:
    """How often each row was drawn: float64 (1 + resamples, count), the first line all ones: the rows as they are."""
    weights = torch.ones(1 + resamples, count, dtype=torch.float64)
    for line, rows in enumerate(resampled_rows(count, resamples, seed), start=1):
        weights[line] = torch.bincount(rows, minlength=count).double()
    return weights


def centred_interval(value: float, draws: Tensor) -> Measured:
    """value + (quantiles of the draws - their mean).

    Rows drawn twice raise a distance, so the draws lie above the value; only their spread is used. ``draws`` float64
    (R,); those that are not finite, as where all rows are one, do not count, and without any there is no interval.
    """
    draws = draws[torch.isfinite(draws)]
    if not len(draws):
        return Measured(value)
    tail = (1.0 - LEVEL) / 2.0
    low, high = (torch.quantile(draws, part) - draws.mean() for part in (tail, 1.0 - tail))
    return Measured(value, value + float(low), value + float(high))


def resampled_means(values: Tensor, resamples: int, seed: int) -> Tensor:
    """Mean of ``values`` (N,), one a row, in each draw: float64 (resamples,)."""
    values = values.double().cpu()
    means = [float(values[rows].mean()) for rows in resampled_rows(len(values), resamples, seed)]
    return torch.tensor(means, dtype=torch.float64)


def mean_with_interval(values: Tensor, resamples: int, seed: int) -> Measured:
    """Mean of ``values`` (N,), one a row, and the interval of the mean."""
    return centred_interval(float(values.double().mean()), resampled_means(values, resamples, seed))
