"""KID, CMMD and the Frechet distance with intervals, against torchmetrics, closed forms and their own sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from mmd_export.distribution import frechet_distance as of_arrays
from mmd_finetune.kernels import Cubic, Gaussian
from mmd_finetune.metrics import kernel_distance
from mmd_finetune.metrics.bootstrap import Measured, centred_interval, multiplicities
from mmd_finetune.metrics.frechet import decomposed, expansion, frechet
from mmd_finetune.metrics.kernel_distance import CMMD_SCALE, cmmd, kid
from mmd_finetune.metrics.real import Real
from mmd_finetune.mmd import unbiased_mmd2


def points(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Flat(nn.Module):
    """Images (N, 3, 1, 2) to features (N, 6), as torchmetrics takes an extractor."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def as_images(features: Tensor) -> Tensor:
    return features.reshape(-1, 3, 1, 2)


def test_kid_is_that_of_torchmetrics_on_one_subset_of_all() -> None:
    real, generated = points(60, 6, seed=0), points(60, 6, seed=1) + 0.3
    library = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=60, normalize=True).double()
    library.update(as_images(real), real=True)
    library.update(as_images(generated), real=False)
    expected, _ = library.compute()
    assert kid(Real(real), generated, 0, 0).value == pytest.approx(float(expected), rel=1e-6)


def test_the_mean_over_subsets_tends_to_kid() -> None:
    real, generated = points(40, 6, seed=2), points(40, 6, seed=3) * 1.5
    generator = torch.Generator().manual_seed(0)
    values = [
        float(
            unbiased_mmd2(Cubic(), *(side[torch.randperm(40, generator=generator)[:20]] for side in (generated, real)))
        )
        for _ in range(2000)
    ]
    spread = float(torch.tensor(values).std()) / math.sqrt(len(values))
    assert sum(values) / len(values) == pytest.approx(kid(Real(real), generated, 0, 0).value, abs=4 * spread)


def test_frechet_is_that_of_torchmetrics() -> None:
    real, generated = points(80, 6, seed=4), points(90, 6, seed=5) * 2.0 + 1.0
    library = FrechetInceptionDistance(feature=Flat(), normalize=True).double()
    library.set_dtype(torch.float64)
    library.update(as_images(real), real=True)
    library.update(as_images(generated), real=False)
    assert frechet(Real(real), generated, 0, 0).value == pytest.approx(float(library.compute()), rel=1e-6)


def weighted(sides: list[NDArray[np.float64]], side: int, row: int, weight: float) -> float:
    """The distance where a row of one side weighs 1/N + ``weight``, the others of it less; they sum to 1."""
    moments = []
    for k, rows in enumerate(sides):
        weights = np.full(len(rows), 1.0 / len(rows))
        if k == side:
            weights *= 1.0 - weight
            weights[row] += weight
        centred = rows - weights @ rows
        moments.append((weights @ rows, centred.T * weights @ centred * len(rows) / (len(rows) - 1)))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0.0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * root)


@pytest.mark.parametrize("side", [0, 1])
def test_the_expansion_has_the_derivatives_by_the_weights_of_rows(side: int) -> None:
    sides = [points(30, 4, seed=14).numpy() * 1.4 + 0.2, points(25, 4, seed=15).numpy()]
    value, *derivatives = expansion(*(decomposed(torch.from_numpy(side)) for side in sides))
    assert value == pytest.approx(of_arrays(sides[0], sides[1]), rel=1e-12)
    assert derivatives[side].mean() == pytest.approx(0.0, abs=1e-12)
    for row in range(5):
        slope = (weighted(sides, side, row, 1e-5) - weighted(sides, side, row, -1e-5)) / 2e-5
        assert slope == pytest.approx(derivatives[side][row], rel=1e-5, abs=1e-5)


def test_the_expansion_of_fewer_rows_than_features() -> None:
    def expanded(few: NDArray[np.float64], many: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, derivatives, _ = expansion(decomposed(torch.from_numpy(few)), decomposed(torch.from_numpy(many)))
        return value, derivatives

    few, many = points(6, 9, seed=16).numpy() * 1.2 + 0.3, points(80, 9, seed=17).numpy()
    value, derivatives = expanded(few, many)
    # In the 5 dimensions that the few rows span nothing is singular; beyond them the others only add their variance.
    span = np.linalg.qr((few - few.mean(axis=0)).T)[0][:, :5]
    inside, inside_derivatives = expanded(few @ span, many @ span)
    rest = many - many @ span @ span.T
    shift = few.mean(axis=0) - many.mean(axis=0)
    beyond = shift @ shift - ((shift @ span) ** 2).sum() + rest.var(axis=0, ddof=1).sum()
    assert value == pytest.approx(inside + beyond, rel=1e-9)
    np.testing.assert_allclose(derivatives, inside_derivatives, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "sides",
    [
        (points(500, 8, seed=18) * 1.3, points(60, 8, seed=19) + 0.4),
        (points(60, 8, seed=18) * 1.3, points(500, 8, seed=19) + 0.4),
        (points(200, 8, seed=18), points(200, 8, seed=18) + 0.4),  # draws of both alike would cancel
    ],
    ids=["few generated", "few real", "moved"],
)
def test_the_interval_of_frechet_is_that_of_the_expansion(sides: tuple[Tensor, Tensor]) -> None:
    found = frechet(Real(sides[0]), sides[1], 4000, 0)
    assert found.low is not None
    assert found.high is not None
    _, *derivatives = expansion(*(decomposed(side) for side in sides))
    expected = 2 * 1.96 * math.sqrt(sum(float((each**2).mean()) / len(each) for each in derivatives))
    assert found.high - found.low == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("generated", [400, 24], ids=["many rows", "fewer rows than features"])
def test_the_interval_of_frechet_is_as_wide_as_fresh_samples_differ(generated: int) -> None:
    widths, values = [], []
    for seed in range(100, 160, 2):
        found = frechet(Real(points(500, 32, seed)), points(generated, 32, seed + 1) * 1.2 + 0.1, 100, 0)
        assert found.low is not None
        assert found.high is not None
        widths.append(found.high - found.low)
        values.append(found.value)
    expected = 2 * 1.96 * float(torch.tensor(values).std())
    assert 0.7 * expected < sum(widths) / len(widths) < 2.0 * expected


def test_draws_that_are_undefined_do_not_count() -> None:
    # A draw of one row three times has no variance.
    found = kid(Real(points(50, 4, seed=20)), points(3, 4, seed=21), 200, 0)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert centred_interval(1.0, torch.tensor([math.nan, math.nan])) == Measured(1.0)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = points(50, 4, seed=6), points(31, 4, seed=7)
    whole = kid(Real(real), generated, 5, 0)
    monkeypatch.setattr(kernel_distance, "ROWS", 7)
    parts = kid(Real(real), generated, 5, 0)
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert parts.low == pytest.approx(whole.low, rel=1e-9)


def test_cmmd_is_the_unbiased_estimate_on_unit_features() -> None:
    real, generated = points(30, 8, seed=8), 5.0 * points(25, 8, seed=9) + 1.0
    unit = [side / side.norm(dim=1, keepdim=True) for side in (generated, real)]
    expected = CMMD_SCALE * float(unbiased_mmd2(Gaussian((100.0,)), *unit))
    assert cmmd(Real(real), generated, 0, 0).value == pytest.approx(expected, rel=1e-9)
    assert cmmd(Real(real * 7.0), generated, 0, 0).value == pytest.approx(expected, rel=1e-9)


def test_cmmd_of_two_points_by_hand() -> None:
    # all real rows are e1, all generated ones e2: MMD^2 = 2 - 2 exp(-2 / 200)
    real, generated = torch.eye(2)[[0, 0]], torch.eye(2)[[1, 1]]
    assert cmmd(Real(real), generated, 0, 0).value == pytest.approx(1000.0 * (2.0 - 2.0 * math.exp(-0.01)), rel=1e-9)


@pytest.mark.parametrize("metric", [kid, cmmd, frechet])
def test_the_interval_holds_the_value_and_shrinks_with_more_rows(metric) -> None:  # type: ignore[no-untyped-def]
    widths = []
    for count in (50, 800):
        found = metric(Real(points(count, 4, seed=10)), points(count, 4, seed=11) + 0.5, 60, 0)
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2.0


def test_a_row_drawn_twice_never_meets_itself() -> None:
    # The draws of the U-statistic are centred on the estimate: no bias from k(x, x). A V-statistic would be off by
    # (mean k(x, x) - mean k(x, y)) / n, ten times the bound here.
    x, y = points(60, 6, seed=12), points(60, 6, seed=13)
    weights = multiplicities(60, 4000, 0)
    draws = kernel_distance._within(Cubic(), x, weights)
    bias = float(draws[1:].mean() - draws[0])
    diagonal = float(Cubic()(x, x).diagonal().mean() - draws[0]) / 60.0
    assert abs(bias) < 0.2 * diagonal
    assert float(kernel_distance._across(Cubic(), x, weights, y, weights)[0]) == pytest.approx(
        float(Cubic()(x, y).mean())
    )
