"""Unbiased MMD^2 against a sum by hand, closed forms for Gaussians, and its own definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.kernels import Cubic, Gaussian, Kernel, Linear
from mmd_finetune.mmd import mean_of_pairs, mean_of_pairs_in_blocks, unbiased_mmd2

KERNELS: list[Kernel] = [Linear(), Cubic(), Gaussian((0.5, 3.0))]


def draws(count: int, rows: int, dimensions: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, dimensions, dtype=torch.float64, generator=generator)


def by_definition(kernel: Kernel, x: Tensor, y: Tensor) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        return float(kernel(a[None], b[None]))

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2.0 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_two_and_two_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [4.0]], dtype=torch.float64)
    # linear: 2 + 0 - 2 * (0 + 4 + 0 + 8) / 4 = -4; the biased estimate would be (1.5 - 2)^2 = 0.25
    assert float(unbiased_mmd2(Linear(), x, y)) == -4.0
    # cubic, d = 1: 3^3 + 1^3 - 2 * (1 + 5^3 + 1 + 9^3) / 4
    assert float(unbiased_mmd2(Cubic(), x, y)) == 27.0 + 1.0 - 428.0


@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_definition(kernel: Kernel) -> None:
    x, y = draws(1, 5, 3, seed=0)[0], draws(1, 7, 3, seed=1)[0]
    assert float(unbiased_mmd2(kernel, x, y)) == pytest.approx(by_definition(kernel, x, y), rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_symmetric(kernel: Kernel) -> None:
    x, y = draws(1, 6, 3, seed=2)[0], draws(1, 9, 3, seed=3)[0]
    assert float(unbiased_mmd2(kernel, x, y)) == pytest.approx(float(unbiased_mmd2(kernel, y, x)), rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_known_real_mean_changes_nothing(kernel: Kernel) -> None:
    x, y = draws(1, 6, 3, seed=2)[0], draws(1, 9, 3, seed=3)[0]
    known = mean_of_pairs(kernel, y)
    assert torch.equal(unbiased_mmd2(kernel, x, y, known), unbiased_mmd2(kernel, x, y))


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_sum_to_the_same(kernel: Kernel, rows: int) -> None:
    y = draws(1, 11, 3, seed=4)[0]
    torch.testing.assert_close(mean_of_pairs_in_blocks(kernel, y, rows), mean_of_pairs(kernel, y), rtol=1e-13, atol=0)


def closed_form(s2: float, squared_shift: float, dimensions: int, v: float, w: float) -> float:
    """E k(x, y), x ~ N(m, v I), y ~ N(m + shift, w I): (s2 / t)^(d/2) exp(-|shift|^2 / (2 t)), t = s2 + v + w."""
    t = s2 + v + w
    return float((s2 / t) ** (dimensions / 2) * math.exp(-squared_shift / (2.0 * t)))


def mean_and_error(kernel: Kernel, x: Tensor, y: Tensor) -> tuple[float, float]:
    values = torch.stack([unbiased_mmd2(kernel, a, b) for a, b in zip(x, y, strict=True)])
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.7, 1.0), (0.3, 2.0)])
def test_gaussian_kernel_is_unbiased_for_the_closed_form(shift: float, scale: float) -> None:
    d, s2 = 3, 1.5
    x, y = draws(1500, 8, d, seed=5), scale * draws(1500, 8, d, seed=6) + shift
    within = closed_form(s2, 0.0, d, 1.0, 1.0) + closed_form(s2, 0.0, d, scale**2, scale**2)
    expected = within - 2.0 * closed_form(s2, d * shift**2, d, 1.0, scale**2)
    mean, error = mean_and_error(Gaussian((s2,)), x, y)
    assert error < 0.005
    assert abs(mean - expected) < 4.0 * error


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_linear_kernel_expects_the_squared_difference_of_means(shift: float) -> None:
    d = 4
    mean, error = mean_and_error(Linear(), draws(2000, 6, d, seed=7), draws(2000, 6, d, seed=8) + shift)
    assert error < 0.05
    assert abs(mean - d * shift**2) < 4.0 * error


def test_the_biased_estimate_would_be_seen() -> None:
    x, y = draws(1500, 8, 3, seed=5), draws(1500, 8, 3, seed=6)
    kernel = Gaussian((1.5,))
    biased = torch.stack(
        [kernel(a, a).mean() + kernel(b, b).mean() - 2.0 * kernel(a, b).mean() for a, b in zip(x, y, strict=True)]
    )
    assert float(biased.mean()) > 20.0 * float(biased.std()) / math.sqrt(len(biased))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient(kernel: Kernel) -> None:
    x, y = draws(1, 4, 3, seed=9)[0].requires_grad_(True), draws(1, 5, 3, seed=10)[0]
    assert torch.autograd.gradcheck(lambda generated: unbiased_mmd2(kernel, generated, y), (x,))


@pytest.mark.parametrize(("n", "m"), [(1, 5), (5, 1)])
def test_one_image_has_no_pair(n: int, m: int) -> None:
    with pytest.raises(UsageError, match="at least 2 feature vectors on each side, not 1"):
        unbiased_mmd2(Linear(), torch.ones(n, 2), torch.ones(m, 2))
