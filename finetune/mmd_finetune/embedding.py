"""The real side of the MMD as one element of the kernel's space, mu = sum_j w_j k(z_j, .), and its squared norm.

The MMD^2 of generated features x is then ``within(x) - 2/n sum_i sum_j w_j k(x_i, z_j) + |mu|^2``, whatever mu is made
of: every real image, a batch of them, or landmarks that stand for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune.kernels import Kernel
from mmd_finetune.mmd import mean_of_pairs_in_blocks

ROWS = 4096
RELATIVE_CUT = 1e-10  # of the largest eigenvalue: smaller ones of the landmarks' kernel matrix are rounding
BATCHES_OF_KMEANS = 1024


@dataclass(frozen=True)
class Embedding:
    """``points`` z (L, d), ``weights`` w (L,), both float64, and ``squared_norm``, the estimate of |mu|^2."""

    points: Tensor
    weights: Tensor
    squared_norm: Tensor


def embed_all(kernel: Kernel, features: Tensor, *, biased: bool) -> Embedding:
    """The mean of all ``features`` (M, d): w = 1/M; |mu|^2 over pairs i != j, or over all if ``biased``."""
    weights = features.new_full((len(features),), 1.0 / len(features))
    return Embedding(features, weights, mean_of_pairs_in_blocks(kernel, features, biased=biased))


def embed_landmarks(kernel: Kernel, features: Tensor, landmarks: Tensor) -> Embedding:
    """The mean of all ``features`` (M, d) projected on the span of the ``landmarks`` z (L, d).

    w = K_zz^+ K_zy 1/M and |mu|^2 = w^T K_zz w; Chatalic et al. 2022 (arXiv 2201.13055), Nystrom mean embedding. It is
    exact where the landmarks span what the kernel sees. A fixed element has no diagonal, so biased or not is the same.
    """
    mean = torch.stack([kernel(landmarks, rows).sum(1) for rows in features.split(ROWS)]).sum(0) / len(features)
    values = kernel(landmarks, landmarks)
    weights = torch.linalg.pinv(values, rtol=RELATIVE_CUT, hermitian=True) @ mean
    return Embedding(landmarks, weights, weights @ values @ weights)


def find_landmarks(features: Tensor, count: int, seed: int) -> Tensor:
    """``count`` centres (L, d) of k-means over all ``features`` (M, d); Sculley 2010, mini-batch k-means.

    One thread, so that a run that goes on finds the same landmarks bit for bit. Raises UsageError for too few images.
    """
    if count > len(features):
        raise UsageError(
            f"--landmarks {count}: there are only {len(features)} real images; lower it, or --reference bank"
        )
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    means = MiniBatchKMeans(count, batch_size=max(BATCHES_OF_KMEANS, count), n_init=1, random_state=seed % 2**32)
    with threadpool_limits(limits=1):
        means.fit(features.cpu().numpy())
    return torch.from_numpy(means.cluster_centers_).to(features)


def batch_rows(seed: int, iteration: int, batch: int, total: int) -> Tensor:
    """Which ``batch`` of ``total`` real images one iteration sees, int64: each once an epoch, then shuffled anew.

    A function of (seed, iteration), so the data position needs no state. The rest of an epoch is left out.
    """
    epoch, turn = divmod(iteration, total // batch)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(total, generator=generator)[turn * batch : (turn + 1) * batch]
