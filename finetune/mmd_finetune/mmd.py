"""Estimates of the squared Maximum Mean Discrepancy; Gretton et al. 2012.

    unbiased (eq. 3)  1/(n (n-1)) sum_{i != j} k(x_i, x_j) + 1/(m (m-1)) sum_{i != j} k(y_i, y_j)
                      - 2/(n m) sum_{i, j} k(x_i, y_j)
    biased (eq. 5)    1/n^2 sum_{i, j} k(x_i, x_j) + 1/m^2 sum_{i, j} k(y_i, y_j) - 2/(n m) sum_{i, j} k(x_i, y_j)

with n generated features x and m real features y. It is a small difference of large means: bring float64.
"""

from __future__ import annotations

from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.kernels import Kernel


def unbiased_mmd2(kernel: Kernel, generated: Tensor, real: Tensor, real_mean: Tensor | float | None = None) -> Tensor:
    """MMD^2_u of ``generated`` (n, d) and ``real`` (m, d), a scalar; it may be negative.

    Args:
        kernel: called on pairs of feature blocks.
        generated: features that carry the gradient.
        real: features of the real images, all of them if they fit.
        real_mean: ``mean_of_pairs(kernel, real)`` if it is known already; it does not depend on ``generated``.
    """
    if real_mean is None:
        real_mean = mean_of_pairs(kernel, real)
    return mean_of_pairs(kernel, generated) + real_mean - 2.0 * kernel(generated, real).mean()


def biased_mmd2(kernel: Kernel, generated: Tensor, real: Tensor) -> Tensor:
    """MMD^2_b of ``generated`` (n, d) and ``real`` (m, d), a scalar, never negative: a distance of two embeddings."""
    return kernel(generated, generated).mean() + kernel(real, real).mean() - 2.0 * kernel(generated, real).mean()


def mean_of_pairs(kernel: Kernel, x: Tensor) -> Tensor:
    """1/(n (n-1)) sum_{i != j} k(x_i, x_j) of ``x`` (n, d), a scalar."""
    require_two(x)
    values = kernel(x, x)
    return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))


def mean_of_pairs_in_blocks(kernel: Kernel, x: Tensor, rows: int = 2048, *, biased: bool = False) -> Tensor:
    """``mean_of_pairs`` with at most (rows, rows) kernel values in memory, for a whole training set.

    With ``biased`` the pairs (i, i) count too: 1/n^2 sum_{i, j} k(x_i, x_j).
    """
    require_two(x)
    total = x.new_zeros(())
    for i, left in enumerate(blocks := x.split(rows)):
        values = kernel(left, left)
        total = total + values.sum() - (0.0 if biased else values.diagonal().sum())
        for right in blocks[i + 1 :]:
            total = total + 2.0 * kernel(left, right).sum()
    return total / (len(x) * (len(x) if biased else len(x) - 1))


def require_two(x: Tensor) -> None:
    """Raise UsageError unless ``x`` holds a pair."""
    if len(x) < 2:
        raise UsageError(f"the unbiased MMD^2 needs at least 2 feature vectors on each side, not {len(x)}")
