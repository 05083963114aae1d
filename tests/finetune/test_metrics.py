"""Frechet distance against closed forms, classes, and samples that depend on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from mmd_export.denoiser import AtTimesteps
from mmd_export.errors import UsageError
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan
from mmd_export.unroll import UnrolledSampler
from mmd_finetune.digits import load_digits_split
from mmd_finetune.features import load_encoder
from mmd_finetune.metrics import class_histogram, frechet_distance, sample_many

SHAPE = (1, 2, 3)


def points(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whitened(count: int, dimensions: int, seed: int) -> Tensor:
    """Points whose sample mean is 0 and whose sample covariance is exactly I."""
    x = points(count, dimensions, seed).numpy()
    return torch.from_numpy(np.linalg.solve(np.linalg.cholesky(np.cov(x, rowvar=False)), (x - x.mean(0)).T).T)


def test_equal_sets_have_no_distance() -> None:
    x = points(50, 4, seed=0)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-10)


def test_a_shift_adds_its_square() -> None:
    x = points(50, 4, seed=0)
    assert frechet_distance(x, x + torch.tensor([1.0, 2.0, 0.0, -2.0])) == pytest.approx(9.0, rel=1e-10)


def test_axis_aligned_gaussians() -> None:
    # |m|^2 + sum_i (a_i - b_i)^2 for standard deviations a and b
    z, a, b = whitened(60, 3, seed=1), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 7.0])
    shift = torch.tensor([0.0, 3.0, 0.0])
    assert frechet_distance(z * a, z * b + shift) == pytest.approx(9.0 + 0.25 + 0.0 + 16.0, rel=1e-10)


def test_covariances_that_do_not_commute_agree_with_the_matrix_root() -> None:
    a, b = points(40, 5, seed=2) @ points(5, 5, seed=3), points(70, 5, seed=4) @ points(5, 5, seed=5) + 1.0
    ca, cb = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb)
    expected = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + float(np.trace(ca + cb - 2.0 * root.real))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_fewer_points_than_dimensions() -> None:
    a, b = points(5, 20, seed=6), points(7, 20, seed=7)
    assert np.isfinite(frechet_distance(a, b))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_one_dimension() -> None:
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # mean 0, variance 2
    assert frechet_distance(x, 3.0 * x + 1.0) == pytest.approx(1.0 + 2.0 * 4.0, rel=1e-12)


@pytest.mark.parametrize("bad", [torch.full((4, 2), float("nan")), torch.full((4, 2), float("inf"))])
def test_nan_is_refused(bad: Tensor) -> None:
    with pytest.raises(UsageError, match="NaN or infinite"):
        frechet_distance(bad, torch.ones(4, 2))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="2 and 3 dimensions"):
        frechet_distance(points(4, 2, seed=0), points(4, 3, seed=0))
    with pytest.raises(UsageError, match=r"\(1, 2\); \(N, d\) with N >= 2"):
        frechet_distance(points(1, 2, seed=0), points(4, 2, seed=0))


def test_class_histogram_of_the_scans() -> None:
    split = load_digits_split()
    images = torch.from_numpy(split.held_out_images)
    counted = np.bincount(split.held_out_labels, minlength=10) / len(split.held_out_labels)
    histogram = class_histogram(load_encoder("digits-mlp"), images, batch=100)
    assert sum(histogram) == pytest.approx(1.0)
    np.testing.assert_allclose(histogram, counted, atol=0.01)


class Half(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        del timestep, class_labels
        return 0.5 * x


def half_sampler(eta: float) -> UnrolledSampler:
    plan = make_plan(SchedulerConfig(), 3, eta=eta)
    return UnrolledSampler(AtTimesteps(Half(), plan.timesteps), plan)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_depend_on_the_seed_and_not_on_the_batch(eta: float) -> None:
    sampler = half_sampler(eta)
    whole = sample_many(sampler, SHAPE, 7, seed=3, batch=7)
    assert whole.shape == (7, *SHAPE)
    assert torch.equal(whole, sample_many(sampler, SHAPE, 7, seed=3, batch=2))
    assert torch.equal(whole[:4], sample_many(sampler, SHAPE, 4, seed=3))
    assert not torch.equal(whole, sample_many(sampler, SHAPE, 7, seed=4))
