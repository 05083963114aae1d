"""Kernels against values worked out by hand, and the bandwidth heuristic."""

from __future__ import annotations

import math

import pytest
import torch

from mmd_export.errors import UsageError
from mmd_finetune.kernels import (
    BANDWIDTH_FACTORS,
    KERNELS,
    Cubic,
    Gaussian,
    Linear,
    make_kernel,
    median_squared_distance,
    squared_distances,
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


def test_median_of_four_points_on_a_line() -> None:
    # Distances 1, 2, 3, 1, 2, 1, squared 1, 4, 9, 1, 4, 1; torch takes the lower middle.
    assert median_squared_distance(torch.tensor([[0.0], [1.0], [2.0], [3.0]])) == 1.0


def test_median_of_a_large_set_uses_evenly_spaced_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 8, generator=generator)
    # |x - y|^2 of unit normals is 2 chi^2 with 8 degrees of freedom: median 2 * 7.344.
    assert median_squared_distance(features) == pytest.approx(14.688, rel=0.02)


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


def test_kernel_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Gaussian((1.0,)).squared_bandwidths = (2.0,)  # type: ignore[misc]


def test_unknown_kernel_lists_the_known() -> None:
    with pytest.raises(UsageError, match="--kernel 'rbf' is unknown; known: cubic, gaussian, linear"):
        make_kernel("rbf", X)


def test_equal_real_images_have_no_bandwidth() -> None:
    with pytest.raises(UsageError, match=r"median squared distance of the real features is 0\.0"):
        make_kernel("gaussian", torch.ones(10, 3))
