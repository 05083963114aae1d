"""Kernels against values worked out by hand, and the bandwidth heuristic."""

from __future__ import annotations

import math

import pytest
import torch

from mmd_export.errors import UsageError
from mmd_finetune.kernels import (
    BANDWIDTH_FACTORS,
    KERNELS,
    LAPLACE_FACTORS,
    MIXTURE_EXPONENTS,
    SHOWN_ROWS,
    Cubic,
    Energy,
    Gaussian,
    Laplace,
    Linear,
    Polynomial,
    RationalQuadratic,
    distances,
    make_kernel,
    median_squared_distance,
    squared_distances,
    subsample,
)

X = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
Y = torch.tensor([[3.0, 1.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def test_linear_by_hand() -> None:
    assert Linear()(X, Y).tolist() == [[5.0, 0.0, 3.0], [-1.0, 0.0, -1.0]]


def test_cubic_by_hand() -> None:
    assert Cubic()(X, Y).tolist() == [[3.5**3, 1.0, 2.5**3], [0.5**3, 1.0, 0.5**3]]


def test_squared_distances_by_hand() -> None:
    assert squared_distances(X, Y).tolist() == [[5.0, 5.0, 1.0], [13.0, 1.0, 5.0]]


def test_gaussian_by_hand() -> None:
    values = Gaussian((0.5, 2.0))(X, Y)
    assert float(values[0, 2]) == pytest.approx(math.exp(-1.0) + math.exp(-0.25), rel=1e-14)
    assert float(values[1, 0]) == pytest.approx(math.exp(-13.0) + math.exp(-13.0 / 4.0), rel=1e-14)


def test_polynomial_by_hand() -> None:
    assert Polynomial(2)(X, Y).tolist() == [[3.5**2, 1.0, 2.5**2], [0.5**2, 1.0, 0.5**2]]
    assert torch.equal(Polynomial(3)(X, Y), Cubic()(X, Y))


def test_laplace_by_hand() -> None:
    values = Laplace((1.0, 0.5))(X, Y)
    assert float(values[0, 2]) == pytest.approx(math.exp(-1.0) + math.exp(-2.0), rel=1e-14)
    assert float(values[1, 0]) == pytest.approx(
        math.exp(-math.sqrt(13.0)) + math.exp(-2.0 * math.sqrt(13.0)), rel=1e-14
    )


def test_rational_quadratic_by_hand() -> None:
    values = RationalQuadratic(2.0, (1.0, 0.5))(X, Y)
    # |x - y|^2 = 5, s^2 = 2: (1 + 5/4)^-1 + (1 + 5/2)^-1/2
    assert float(values[0, 0]) == pytest.approx(1.0 / 2.25 + 3.5**-0.5, rel=1e-14)


def test_energy_by_hand() -> None:
    values = Energy()(X, Y)
    assert float(values[0, 0]) == pytest.approx(math.sqrt(5.0) + math.sqrt(10.0) - math.sqrt(5.0), rel=1e-14)
    assert float(values[1, 1]) == pytest.approx(0.0, abs=1e-14)  # y is the origin


def test_distances_of_equal_points_have_no_gradient() -> None:
    x = X.clone().requires_grad_(True)
    together = torch.cat([x, x])
    distances(together, together).sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    # Two copies of each: 8 of the 16 pairs are a distance |x_0 - x_1| apart, the others 0.
    torch.testing.assert_close(x.grad, 8.0 * (X - X.flip(0)) / (X[0] - X[1]).norm())


def test_median_of_four_points_on_a_line() -> None:
    # Distances 1, 2, 3, 1, 2, 1, squared 1, 4, 9, 1, 4, 1; torch takes the lower middle.
    assert median_squared_distance(torch.tensor([[0.0], [1.0], [2.0], [3.0]])) == 1.0


def test_median_of_a_large_set_is_that_of_some_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 8, generator=generator)
    # |x - y|^2 of unit normals is 2 chi^2 with 8 degrees of freedom: median 2 * 7.344.
    assert median_squared_distance(features) == pytest.approx(14.688, rel=0.02)


@pytest.mark.parametrize("turns", [10, 25])
def test_data_that_repeat_in_turns_have_the_median_of_their_mixture(turns: int) -> None:
    """Classes one after the other, far apart: the median of all pairs is a distance between two of them."""
    count = 50_000
    features = 10.0 * torch.eye(turns)[torch.arange(count) % turns]
    features += torch.randn(count, turns, generator=torch.Generator().manual_seed(0))
    mixed = features[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    assert median_squared_distance(features) == pytest.approx(median_squared_distance(mixed), rel=0.1)
    shown = subsample(features)
    assert shown.shape == (SHOWN_ROWS, turns)
    assert shown.argmax(1).bincount(minlength=turns).tolist() == pytest.approx([SHOWN_ROWS / turns] * turns, rel=0.35)


def test_rows_that_stand_for_all_are_the_same_every_time_and_all_of_a_few() -> None:
    rows = torch.arange(2 * SHOWN_ROWS).double()[:, None]
    shown = subsample(rows)
    assert torch.equal(shown, subsample(rows))
    assert bool((shown.diff(dim=0) > 0).all())
    assert torch.equal(subsample(shown), shown)
    assert torch.equal(subsample(rows[: SHOWN_ROWS - 1]), rows[: SHOWN_ROWS - 1])


def test_gaussian_bandwidths_are_multiples_of_the_median() -> None:
    kernel = make_kernel("gaussian", Y)
    assert isinstance(kernel, Gaussian)
    median = median_squared_distance(Y)
    assert kernel.squared_bandwidths == tuple(factor * median for factor in BANDWIDTH_FACTORS)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_are_symmetric_and_positive_semidefinite(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    values = make_kernel(name, x)(x, x)
    torch.testing.assert_close(values, values.T, rtol=1e-13, atol=1e-13)
    assert float(torch.linalg.eigvalsh(values).min()) > -1e-9


def test_bandwidths_of_the_others_are_multiples_of_the_median_too() -> None:
    median = median_squared_distance(Y)
    assert make_kernel("laplace", Y) == Laplace(tuple(factor * math.sqrt(median) for factor in LAPLACE_FACTORS))
    assert make_kernel("rational-quadratic", Y) == RationalQuadratic(median, MIXTURE_EXPONENTS)


def test_numbers_behind_the_name() -> None:
    median = median_squared_distance(Y)
    assert make_kernel("gaussian:0.5,2", Y) == Gaussian((0.5 * median, 2.0 * median))
    assert make_kernel("laplace:3", Y) == Laplace((3.0 * math.sqrt(median),))
    assert make_kernel("rational-quadratic:1", Y) == RationalQuadratic(median, (1.0,))
    assert make_kernel("polynomial:2", Y) == Polynomial(2)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gaussian:", "'' is not a list of numbers such as gaussian:0.5,1"),
        ("gaussian:0.5;1", "'0.5;1' is not a list of numbers"),
        ("laplace:1,-2", "-2 is not a positive number"),
        ("laplace:nan", "nan is not a positive number"),
        ("polynomial:2.5", "one whole degree is expected"),
        ("polynomial:2,3", "one whole degree is expected"),
        ("cubic:2", "cubic takes no numbers; say --kernel cubic"),
    ],
)
def test_wrong_numbers_are_said(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_kernel(spec, Y)


def test_kernel_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Gaussian((1.0,)).squared_bandwidths = (2.0,)  # type: ignore[misc]


def test_unknown_kernel_lists_the_known() -> None:
    known = "cubic, energy, gaussian, laplace, linear, polynomial, rational-quadratic"
    with pytest.raises(UsageError, match=f"--kernel 'rbf' is unknown; known: {known}"):
        make_kernel("rbf", X)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "rational-quadratic"])
def test_equal_real_images_have_no_bandwidth(name: str) -> None:
    with pytest.raises(UsageError, match=rf"kernel {name}: the median squared distance of the real features is 0\.0"):
        make_kernel(name, torch.ones(10, 3))
