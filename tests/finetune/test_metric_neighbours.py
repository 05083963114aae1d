"""Precision, recall, density, coverage: identical, disjoint and hand-made sets, and scikit-learn's neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.metrics import neighbours
from mmd_finetune.metrics.neighbours import balls, distance_blocks, radii
from mmd_finetune.metrics.real import Real


def points(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def means(real: Tensor, generated: Tensor, k: int) -> tuple[float, float, float, float]:
    found = balls(Real(real), generated, k)
    precision, recall, density, coverage = (
        float(rows.mean()) for rows in (found.precision, found.recall, found.density, found.coverage)
    )
    return precision, recall, density, coverage


def test_equal_sets_are_perfect() -> None:
    x = points(40, 3, seed=0)
    precision, recall, density, coverage = means(x, x, 3)
    assert (precision, recall, coverage) == (1.0, 1.0, 1.0)
    # Each ball holds its own centre and its k neighbours, the k-th on the border, in or out by rounding.
    assert 1.0 <= density <= 4.0 / 3.0 + 1e-9


def test_disjoint_sets_have_nothing() -> None:
    x = points(40, 3, seed=1)
    assert means(x, x + 1000.0, 3) == (0.0, 0.0, 0.0, 0.0)


def test_one_collapsed_mode_keeps_precision_and_loses_recall() -> None:
    real = torch.cat([points(50, 2, seed=2), points(50, 2, seed=3) + 100.0])
    generated = 0.5 * points(100, 2, seed=4)
    precision, recall, _, coverage = means(real, generated, 5)
    assert precision > 0.95
    assert recall <= 0.5
    assert coverage <= 0.5


def test_by_hand_on_a_line() -> None:
    real, generated = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.5], [20.0], [21.0]])
    # k = 1: real radii 1, 1, 9; generated radii 19.5, 1, 1
    found = balls(Real(real), generated, 1)
    assert found.precision.tolist() == [1.0, 0.0, 0.0]
    assert found.density.tolist() == [2.0, 0.0, 0.0]  # in the balls of 0 and 1; |0.5 - 10| = 9.5 is outside
    assert found.recall.tolist() == [1.0, 1.0, 1.0]  # all within 19.5 of 0.5
    assert found.coverage.tolist() == [1.0, 1.0, 0.0]


def test_density_and_coverage_of_equal_laws() -> None:
    # Naeem et al. 2020, section 3.3: density tends to 1, coverage to 1 - (N-1)...(N-k) / (2N-1)...(2N-k).
    k, n = 5, 800
    densities, coverages = zip(
        *(means(points(n, 4, seed=2 * i), points(n, 4, seed=2 * i + 1), k)[2:] for i in range(10, 14)), strict=True
    )
    expected = 1.0 - np.prod([(n - i) / (2 * n - i) for i in range(1, k + 1)])
    assert np.mean(densities) == pytest.approx(1.0, abs=0.03)
    assert np.mean(coverages) == pytest.approx(expected, abs=0.01)


def test_radii_are_those_of_scikit_learn() -> None:
    x = points(60, 5, seed=5)
    found, _ = NearestNeighbors(n_neighbors=5).fit(x.numpy()).kneighbors(x.numpy())
    np.testing.assert_allclose(radii(x, 4, "real").numpy(), found[:, 4], rtol=1e-7)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = points(50, 3, seed=6), points(35, 3, seed=7)
    whole = means(real, generated, 4)
    monkeypatch.setattr(neighbours, "VALUES_AT_ONCE", 150)
    monkeypatch.setattr(neighbours, "LEAST_ROWS", 1)
    assert [len(rows) for rows, _ in distance_blocks(generated, real)] == [3] * 11 + [2]
    assert means(real, generated, 4) == whole


def test_blocks_against_many_rows_are_not_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them copies the many rows."""
    monkeypatch.setattr(neighbours, "VALUES_AT_ONCE", 1)
    assert [len(rows) for rows, _ in distance_blocks(points(300, 2, seed=8), points(9, 2, seed=9))] == [256, 44]


@pytest.mark.parametrize("k", [0, 10, 11])
def test_k_out_of_range_is_refused_with_both_values(k: int) -> None:
    with pytest.raises(UsageError, match=rf"--neighbours is {k}, the real set has 10 images; give 1 to 9"):
        balls(Real(points(10, 2, seed=0)), points(30, 2, seed=1), k)
