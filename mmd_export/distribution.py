"""Rung 7 of the ladder in numpy: are two sets of samples draws from one distribution? No torch.

Encoders are functions images (N, C, H, W) -> features (N, d); those of this file need numpy alone, others come from the
caller. Two tests: the artefact against the reference on the *same* noises, whose samples come in pairs, and against the
reference on *fresh* noises, whose samples are independent. Each is made at half the level, so that an honest artefact
fails with at most the whole of it (Bonferroni).

On the same noises hardly anything but the artefact's own error is left, so that a difference of any size is significant
there. It counts only beyond the MMD^2 that the pixels' tolerance explains, which is that of the reference's samples
with every pixel moved by the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmd_export.errors import UsageError
from mmd_export.noise import normal

Features: TypeAlias = NDArray[np.float64]
Encode: TypeAlias = Callable[[NDArray[np.float32]], Features]

SAME, FRESH = "same", "fresh"  # noises
LEVEL = 0.01  # of the whole rung: one honest release in a hundred at most
PERMUTATIONS = 999
LEAST_COUNT = 100  # fewer samples find nothing but a broken sampler
_PROJECTED = 64
_PROJECTION_SEED = 20240229
_MEDIAN_ROWS = 2000
_BLOCK = 1024


@dataclass(frozen=True)
class TwoSampleTest:
    """Samples of the artefact against samples of the reference.

    Args:
        noise: ``same`` noises on both sides or ``fresh`` ones.
        features: the encoder.
        count: samples on each side.
        mmd2: unbiased MMD^2 with a Gaussian kernel; may be negative.
        squared_bandwidth: median squared distance of the pooled features.
        p_value: share of the permutations, the identity among them, whose MMD^2 is at least as large.
        frechet: Frechet distance of the features.
        level: fails at ``p_value`` <= ``level``, if ``mmd2`` is above ``tolerated``.
        tolerated: MMD^2 that the tolerance of the pixels explains; None on fresh noises.
    """

    noise: str
    features: str
    count: int
    mmd2: float
    squared_bandwidth: float
    p_value: float
    permutations: int
    frechet: float
    level: float
    tolerated: float | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against one distribution at this level, beyond what is tolerated."""
        return self.p_value > self.level or (self.tolerated is not None and self.mmd2 <= self.tolerated)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in asdict(self).items()
        }
        return {**values, "passed": self.passed}


def same_noise_test(
    features: str,
    artefact: Features,
    reference: Features,
    moved: Sequence[Features],
    level: float,
    permutations: int = PERMUTATIONS,
) -> TwoSampleTest:
    """Pairs of features (N, d); ``moved``: the reference's, of pixels moved by the tolerance, at least one."""
    count = len(artefact)
    if not np.isfinite(artefact).all():
        return TwoSampleTest(SAME, features, count, np.inf, np.inf, 0.0, permutations, np.inf, level, 0.0)
    mmd2, bandwidth, p_value = paired_test(artefact, reference, permutations)
    tolerated = max(0.0, *(paired_mmd2(each, reference, bandwidth) for each in moved))
    distance = frechet_distance(artefact, reference)
    return TwoSampleTest(SAME, features, count, mmd2, bandwidth, p_value, permutations, distance, level, tolerated)


def fresh_noise_test(
    features: str, artefact: Features, reference: Features, level: float, permutations: int = PERMUTATIONS
) -> TwoSampleTest:
    """Independent features (N, d) of the artefact, which fails if one is not finite, and (M, d) of the reference."""
    count = len(artefact)
    if not np.isfinite(artefact).all():
        return TwoSampleTest(FRESH, features, count, np.inf, np.inf, 0.0, permutations, np.inf, level)
    mmd2, bandwidth, p_value = permutation_test(artefact, reference, permutations)
    distance = frechet_distance(artefact, reference)
    return TwoSampleTest(FRESH, features, count, mmd2, bandwidth, p_value, permutations, distance, level)


def paired_test(
    x: Features, y: Features, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, float, float]:
    """Unbiased MMD^2 of pairs ``x``, ``y`` (n, d), its squared bandwidth, and the p-value.

    MMD^2_u = sum_{i != j} h_ij / (n (n-1)), h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i); Gretton et
    al. 2012, eq. 4. Where nothing tells the members of a pair apart they may be swapped, which turns the sign of its
    h_ij; the p-value is as in ``permutation_test``. H is never whole in memory.
    """
    if len(x) < 2 or x.shape != y.shape:
        raise UsageError(f"MMD^2 of pairs {x.shape} and {y.shape}: give (N, d) twice with N >= 2")
    bandwidth = median_squared_distance(_finite(x, y))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(len(x), permutations + 1))
    signs[:, 0] = 1.0
    found = _paired_mmd2(x, y, bandwidth, signs)
    return float(found[0]), bandwidth, _p_value(found)


def paired_mmd2(x: Features, y: Features, squared_bandwidth: float) -> float:
    """The MMD^2 of ``paired_test``, which may be negative, with a kernel that is given."""
    return float(_paired_mmd2(x, y, squared_bandwidth, np.ones((len(x), 1)))[0])


def _paired_mmd2(x: Features, y: Features, squared_bandwidth: float, signs: Features) -> Features:
    """s'Hs / (n (n-1)) without the diagonal of H, for every column s of ``signs`` (n, p); (p,)."""
    n, total = len(x), np.zeros(signs.shape[1])
    for start in range(0, n, _BLOCK):
        part = slice(start, min(start + _BLOCK, n))
        pairs = ((x, x, 1.0), (y, y, 1.0), (x, y, -1.0), (y, x, -1.0))
        h = np.zeros((part.stop - start, n))
        for a, b, sign in pairs:
            h += sign * np.exp(squared_distances(a[part], b) / (-2.0 * squared_bandwidth))
        h[np.arange(part.stop - start), np.arange(start, part.stop)] = 0.0
        total += np.einsum("ip,ip->p", signs[part], h @ signs)
    found: Features = total / (n * (n - 1))
    return found


def _finite(x: Features, y: Features) -> Features:
    """Both, one after the other."""
    pooled = np.concatenate([x, y]).astype(np.float64)
    if not np.isfinite(pooled).all():
        raise UsageError("MMD^2: a feature is NaN or infinite; look at the samples")
    return pooled


def _p_value(found: Features) -> float:
    """Of the first of ``found`` among all; what is equal up to the order of summation counts as equal."""
    slack = 1e-12 * max(1.0, abs(float(found[0])))
    return (1 + int((found[1:] >= found[0] - slack).sum())) / len(found)


def permutation_test(
    x: Features, y: Features, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, float, float]:
    """Unbiased MMD^2 of ``x`` (n, d) and ``y`` (m, d), its squared bandwidth, and the p-value.

    MMD^2_u = (z'Kz - n) / (n (n-1)) + (w'Kw - m) / (m (m-1)) - 2 z'Kw / (n m), w = 1 - z, for the indicator z of the
    first sample; Gretton et al. 2012, eq. 3. Its p-value is (1 + #{permuted >= observed}) / (1 + permutations);
    Phipson and Smyth 2010. K is never whole in memory.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2 or x.shape[1:] != y.shape[1:]:
        raise UsageError(f"MMD^2 of features {x.shape} and {y.shape}: give (N, d) and (M, d) with N, M >= 2")
    pooled = _finite(x, y)
    bandwidth = median_squared_distance(pooled)
    z = np.zeros((n + m, permutations + 1))
    z[:n, 0] = 1.0
    draw = np.random.default_rng(seed)
    for column in range(1, permutations + 1):
        z[draw.permutation(n + m)[:n], column] = 1.0
    own, rows, total = np.zeros(permutations + 1), np.zeros(n + m), 0.0
    for start in range(0, n + m, _BLOCK):
        part = slice(start, start + _BLOCK)
        kernel = np.exp(squared_distances(pooled[part], pooled) / (-2.0 * bandwidth))
        own += np.einsum("ip,ip->p", z[part], kernel @ z)
        rows[part] = kernel.sum(axis=1)
    total = float(rows.sum())
    mixed = rows @ z  # z'K1
    cross, others = mixed - own, total - 2.0 * mixed + own
    found = (own - n) / (n * (n - 1)) + (others - m) / (m * (m - 1)) - 2.0 * cross / (n * m)
    return float(found[0]), bandwidth, _p_value(found)


def squared_distances(x: Features, y: Features) -> Features:
    """|x_i - y_j|^2, not below 0; (N, d) and (M, d) to (N, M)."""
    distances: Features = (x**2).sum(1)[:, None] - 2.0 * (x @ y.T) + (y**2).sum(1)[None]
    return np.maximum(distances, 0.0, out=distances)


def median_squared_distance(features: Features) -> float:
    """Median of |x_i - x_j|^2 over i < j; Gretton et al. 2012, section 8. Of many rows evenly spaced ones are used."""
    rows = features[:: -(-len(features) // _MEDIAN_ROWS)]
    median = float(np.median(squared_distances(rows, rows)[np.triu_indices(len(rows), k=1)]))
    if not median > 0.0:
        raise UsageError(
            "more than half of the samples have equal features; look at the samples, or use other features"
        )
    return median


def frechet_distance(a: Features, b: Features) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)); Dowson and Landau 1982.

    With C = R'R, R from the QR decomposition of the centred features, Tr (C_a C_b)^(1/2) is the sum of the singular
    values of R_a R_b'. Features (N, d) and (M, d), N, M >= 2.
    """
    shift = a.mean(axis=0) - b.mean(axis=0)
    root_a, root_b = (np.linalg.qr(each - each.mean(axis=0), mode="r") / np.sqrt(len(each) - 1) for each in (a, b))
    trace_root = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(shift @ shift + (root_a**2).sum() + (root_b**2).sum() - 2.0 * trace_root)


def pixels(images: NDArray[np.float32]) -> Features:
    """(N, C, H, W) to (N, C H W)."""
    return images.reshape(len(images), -1).astype(np.float64)


def projection(images: NDArray[np.float32]) -> Features:
    """Fixed random directions of the pixels, (N, 64), from noise of one seed; fewer pixels stay as they are."""
    flat = pixels(images)
    if flat.shape[1] <= _PROJECTED:
        return flat
    channels, height, width = images.shape[1:]
    directions = normal(_PROJECTION_SEED, (channels, height, width), _PROJECTED)
    projected: Features = flat @ pixels(directions).T / np.sqrt(flat.shape[1])
    return projected


NUMPY_ENCODERS: dict[str, Encode] = {"pixels": pixels, "projection": projection}
