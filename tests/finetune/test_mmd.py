"""Unbiased MMD^2 against a sum by hand, closed forms for Gaussians, and its own definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.kernels import Cubic, Energy, Gaussian, Kernel, Laplace, Linear, RationalQuadratic
from mmd_finetune.mmd import biased_mmd2, mean_of_pairs, mean_of_pairs_in_blocks, unbiased_mmd2

KERNELS: list[Kernel] = [
    Linear(), Cubic(), Gaussian((0.5, 3.0)), Laplace((0.7, 2.0)), RationalQuadratic(1.5, (0.5, 2.0)), Energy(),
]  # fmt: skip


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
    torch.testing.assert_close(mean_of_pairs_in_blocks(kernel, y, rows), mean_of_pairs(kernel, y), rtol=1e-12, atol=0)
    biased = mean_of_pairs_in_blocks(kernel, y, rows, biased=True)
    torch.testing.assert_close(biased, kernel(y, y).mean(), rtol=1e-12, atol=0)


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


def test_cubic_kernel_compares_variances() -> None:
    # x ~ N(0, v I), y ~ N(0, w I): E <x, y>^2 = v w d and odd moments vanish, so MMD^2 = 3 (v - w)^2 / d.
    d, v, w = 4, 1.0, 2.25
    mean, error = mean_and_error(Cubic(), draws(2000, 8, d, seed=11), math.sqrt(w) * draws(2000, 8, d, seed=12))
    assert error < 0.1
    assert abs(mean - 3.0 * (v - w) ** 2 / d) < 4.0 * error


def test_energy_distance_of_two_normals() -> None:
    # |x - y| is sqrt(v + w) times a chi variable, whose mean is sqrt(2) Gamma((d + 1) / 2) / Gamma(d / 2).
    d, w = 3, 4.0
    chi = math.sqrt(2.0) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
    expected = chi * (2.0 * math.sqrt(1.0 + w) - math.sqrt(2.0) - math.sqrt(2.0 * w))
    mean, error = mean_and_error(Energy(), draws(1500, 8, d, seed=13), math.sqrt(w) * draws(1500, 8, d, seed=14))
    assert error < 0.02
    assert abs(mean - expected) < 4.0 * error


def test_laplace_kernel_in_one_dimension() -> None:
    # E exp(-|z| / s), z ~ N(0, t): 2 exp(t / (2 s^2)) Phi(-sqrt(t) / s).
    def closed(t: float, s: float) -> float:
        return 2.0 * math.exp(t / (2.0 * s * s)) * 0.5 * math.erfc(math.sqrt(t) / s / math.sqrt(2.0))

    s, w = 0.8, 4.0
    expected = closed(2.0, s) + closed(2.0 * w, s) - 2.0 * closed(1.0 + w, s)
    mean, error = mean_and_error(Laplace((s,)), draws(1500, 10, 1, seed=15), math.sqrt(w) * draws(1500, 10, 1, seed=16))
    assert error < 0.005
    assert abs(mean - expected) < 4.0 * error


def test_rational_quadratic_kernel_is_a_mixture_of_gaussians() -> None:
    # (1 + q / (2 a s2))^-a is the mean of exp(-g q / (2 a s2)) over g ~ Gamma(a, 1); each has the closed form above.
    from scipy.integrate import quad

    d, a, s2, w = 2, 1.5, 1.2, 4.0

    def closed(v: float, w: float) -> float:
        def density(g: float) -> float:
            return float(g ** (a - 1) * math.exp(-g) / math.gamma(a) * closed_form(a * s2 / g, 0.0, d, v, w))

        return float(quad(density, 0.0, math.inf)[0])

    expected = closed(1.0, 1.0) + closed(w, w) - 2.0 * closed(1.0, w)
    kernel = RationalQuadratic(s2, (a,))
    mean, error = mean_and_error(kernel, draws(1500, 8, d, seed=17), math.sqrt(w) * draws(1500, 8, d, seed=18))
    assert error < 0.005
    assert abs(mean - expected) < 4.0 * error


@pytest.mark.parametrize("kernel", KERNELS)
def test_biased_is_the_definition_with_the_diagonal(kernel: Kernel) -> None:
    x, y = draws(1, 5, 3, seed=0)[0], draws(1, 7, 3, seed=1)[0]
    expected = sum(
        sign * float(sum(kernel(a[None], b[None]) for a in left for b in right)) / (len(left) * len(right))
        for sign, left, right in ((1, x, x), (1, y, y), (-2, x, y))
    )
    assert float(biased_mmd2(kernel, x, y)) == pytest.approx(expected, rel=1e-10)
    assert float(biased_mmd2(kernel, x, x)) == pytest.approx(0.0, abs=1e-12)


def test_biased_is_too_large_by_what_the_diagonals_add() -> None:
    # E = MMD^2 + (1/n + 1/m) (k(x, x) - E k(x, x')), here with MMD^2 = 0 and k(x, x) = 1.
    n, m, d, s2 = 8, 5, 3, 1.5
    x, y, kernel = draws(2000, n, d, seed=19), draws(2000, m, d, seed=20), Gaussian((s2,))
    values = torch.stack([biased_mmd2(kernel, a, b) for a, b in zip(x, y, strict=True)])
    expected = (1 / n + 1 / m) * (1.0 - closed_form(s2, 0.0, d, 1.0, 1.0))
    assert abs(float(values.mean()) - expected) < 4.0 * float(values.std()) / math.sqrt(len(values))


def test_the_biased_estimate_would_be_seen() -> None:
    x, y = draws(1500, 8, 3, seed=5), draws(1500, 8, 3, seed=6)
    kernel = Gaussian((1.5,))
    biased = torch.stack([biased_mmd2(kernel, a, b) for a, b in zip(x, y, strict=True)])
    assert float(biased.mean()) > 20.0 * float(biased.std()) / math.sqrt(len(biased))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient(kernel: Kernel) -> None:
    x, y = draws(1, 4, 3, seed=9)[0].requires_grad_(True), draws(1, 5, 3, seed=10)[0]
    assert torch.autograd.gradcheck(lambda generated: unbiased_mmd2(kernel, generated, y), (x,))


@pytest.mark.parametrize(("n", "m"), [(1, 5), (5, 1)])
def test_one_image_has_no_pair(n: int, m: int) -> None:
    with pytest.raises(UsageError, match="at least 2 feature vectors on each side, not 1"):
        unbiased_mmd2(Linear(), torch.ones(n, 2), torch.ones(m, 2))
