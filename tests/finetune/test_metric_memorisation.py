"""The memorisation checks on copies, on fresh draws and on sets counted by hand; Z against scipy."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from mmd_export.errors import UndefinedError, UsageError
from mmd_finetune.metrics.memorisation import copying, memorisation, nearest, z_score
from mmd_finetune.metrics.real import Real


def points(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_fresh_draws_prefer_neither_side() -> None:
    values = [
        memorisation(
            Real(points(300, 4, 3 * i)), Real(points(100, 4, 3 * i + 1)), points(200, 4, 3 * i + 2), 0, 0
        ).value
        for i in range(8)
    ]
    assert sum(values) / 8 == pytest.approx(0.5, abs=0.03)


def test_copies_are_found_out() -> None:
    training, held_out = points(300, 4, 0), points(100, 4, 1)
    found = memorisation(Real(training), Real(held_out), training + 1e-3 * points(300, 4, 2), 50, 0)
    # A copy's original is in a subset of 100 of 300 in one of three cases, its neighbours in some of the others.
    assert found.value > 0.6
    assert found.low is not None
    assert found.low > 0.5
    assert memorisation(Real(training[:100]), Real(held_out), training[:100] + 1e-3, 0, 0).value == 1.0


def test_the_chance_is_that_of_drawing_subsets() -> None:
    training = torch.tensor([[1.0], [2.0], [5.0], [6.0], [7.0]])
    held_out, generated = torch.tensor([[3.0], [30.0]]), torch.tensor([[0.0]])
    # two of five are nearer than 3; of C(5, 2) = 10 subsets C(3, 2) = 3 hold neither
    assert memorisation(Real(training), Real(held_out), generated, 0, 0).value == pytest.approx(0.7)


def test_certain_where_the_rest_is_too_small() -> None:
    training, held_out = torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([[3.0], [30.0]])
    assert memorisation(Real(training), Real(held_out), torch.tensor([[0.0]]), 0, 0).value == 1.0


def test_a_larger_held_out_set_is_refused() -> None:
    with pytest.raises(UsageError, match="5 held-out images, 4 training images"):
        memorisation(Real(points(4, 2, 0)), Real(points(5, 2, 1)), points(3, 2, 2), 0, 0)


def test_z_is_that_of_mann_whitney() -> None:
    a, b = points(40, 1, 3)[:, 0], points(55, 1, 4)[:, 0] + 0.3
    u = scipy.stats.mannwhitneyu(b.numpy(), a.numpy()).statistic
    n, m = len(a), len(b)
    assert z_score(a, b) == pytest.approx((u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12), rel=1e-12)
    tied = torch.tensor([1.0, 1.0, 2.0])
    assert z_score(tied, tied) == 0.0


def test_copying_is_near_zero_for_fresh_draws_and_far_below_for_copies() -> None:
    rows = points(1000, 3, 5)
    training, held_out = Real(rows), Real(points(500, 3, 6))
    fresh = copying(training, held_out, points(500, 3, 7), 20, 0)
    copied = copying(training, held_out, rows[:500] + 0.01 * points(500, 3, 8), 20, 0)
    far = copying(training, held_out, 3.0 * points(500, 3, 9), 20, 0)
    assert abs(fresh.value) < 2.0
    assert copied.value < -5.0
    assert far.value > 2.0
    assert copied.high is not None
    assert copied.high < -3.0


def test_too_few_for_any_cell_is_refused() -> None:
    with pytest.raises(UndefinedError, match="15 held-out and 30 generated images leave no cell"):
        copying(Real(points(100, 2, 0)), Real(points(15, 2, 1)), points(30, 2, 2), 0, 0)


def test_fewer_training_images_than_cells_are_refused() -> None:
    with pytest.raises(UndefinedError, match="9 training images are too few for 10 cells"):
        copying(Real(points(9, 2, 0)), Real(points(60, 2, 1)), points(60, 2, 2), 0, 0)


def test_nearest() -> None:
    assert nearest(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [10.0]])).tolist() == [1.0, 3.0]
