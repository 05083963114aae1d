"""Kernels on encoder features: a frozen dataclass each, called as ``kernel(x (N, d), y (M, d)) -> (N, M)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmd_export.errors import UsageError

BANDWIDTH_FACTORS = (0.1, 0.3, 1.0)
LAPLACE_FACTORS = (0.5, 1.0, 2.0)
MIXTURE_EXPONENTS = (0.2, 0.5, 1.0, 2.0, 5.0)  # Binkowski et al. 2018, section 4
SHOWN_ROWS = 2000  # features that stand for all where a median or a level is measured
ROUNDING = 32.0  # epsilons by which |x|^2 - 2 <x, x> + |x|^2 may miss 0, relative to 2 |x|^2


class Kernel(Protocol):
    """A positive definite function of two feature vectors."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """All pairs: (N, d) and (M, d) to (N, M)."""
        ...


@dataclass(frozen=True)
class Linear:
    """k(x, y) = <x, y>: MMD is the distance of the means."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.T


@dataclass(frozen=True)
class Polynomial:
    """k(x, y) = (<x, y> / d + 1)^p, p >= 1 whole: it compares the moments up to order p."""

    degree: int

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1.0) ** self.degree


@dataclass(frozen=True)
class Cubic(Polynomial):
    """k(x, y) = (<x, y> / d + 1)^3; Binkowski et al. 2018 (KID), and what MMD-DDM tunes with."""

    degree: int = 3


@dataclass(frozen=True)
class Gaussian:
    """k(x, y) = sum_b exp(-|x - y|^2 / (2 s_b^2)); Li et al. 2015 (GMMN). ``squared_bandwidths`` are the s_b^2."""

    squared_bandwidths: tuple[float, ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squared = squared_distances(x, y)
        total = torch.zeros_like(squared)
        for s2 in self.squared_bandwidths:
            total = total + torch.exp(squared / (-2.0 * s2))
        return total


@dataclass(frozen=True)
class Laplace:
    """k(x, y) = sum_b exp(-|x - y| / s_b), Euclidean: the Matern kernel of order 1/2; Rasmussen and Williams, eq. 4.14.

    Its spectrum falls slowest of all kernels here, so it sees the finest detail. ``bandwidths`` are the s_b.
    """

    bandwidths: tuple[float, ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        apart = distances(x, y)
        total = torch.zeros_like(apart)
        for s in self.bandwidths:
            total = total + torch.exp(apart / -s)
        return total


@dataclass(frozen=True)
class RationalQuadratic:
    """k(x, y) = sum_a (1 + |x - y|^2 / (2 a s^2))^-a; Binkowski et al. 2018, eq. 8, with a scale s^2 of the data.

    A Gaussian kernel mixed over its bandwidths, heavy-tailed: far features still pull. ``exponents`` are the a.
    """

    squared_scale: float
    exponents: tuple[float, ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squared = squared_distances(x, y)
        total = torch.zeros_like(squared)
        for a in self.exponents:
            total = total + (1.0 + squared / (2.0 * a * self.squared_scale)) ** -a
        return total


@dataclass(frozen=True)
class Energy:
    """k(x, y) = |x| + |y| - |x - y|; its MMD^2 is the energy distance 2 E|x - y| - E|x - x'| - E|y - y'|.

    Sejdinovic et al. 2013, eq. 2.5 with the origin 0, times 2. What depends on one point only cancels in the MMD^2 and
    makes the kernel positive definite, as Nystrom landmarks need it. No bandwidth.
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return _norms(x)[:, None] + _norms(y)[None] - distances(x, y)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 = |x_i|^2 - 2 <x_i, y_j> + |y_j|^2, not below 0; (N, d) and (M, d) to (N, M)."""
    return ((x * x).sum(1)[:, None] - 2.0 * x @ y.T + (y * y).sum(1)[None]).clamp_min(0.0)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|; (N, d) and (M, d) to (N, M). Equal points are 0 apart, and the gradient that they lack is 0.

    Equal is what rounding cannot tell from equal: the root would make 1e-8 of an error of 1e-16.
    """
    norms = (x * x).sum(1)[:, None] + (y * y).sum(1)[None]
    return _root(squared_distances(x, y), ROUNDING * torch.finfo(x.dtype).eps * norms.detach())


def _norms(x: Tensor) -> Tensor:
    squared = (x * x).sum(1)
    return _root(squared, torch.zeros_like(squared))


def _root(squared: Tensor, zero: Tensor) -> Tensor:
    """Square root of what is above ``zero``; 0, with derivative 0, elsewhere."""
    above = squared > zero
    return torch.where(above, torch.where(above, squared, 1.0).sqrt(), 0.0)


def subsample(features: Tensor) -> Tensor:
    """At most ``SHOWN_ROWS`` rows of ``features`` (N, d), each as likely as any other, in their order.

    Drawn by a fixed seed, so always the same: rows at even distances would all be of one kind where data repeat in
    turns, as classes do in a file that takes one of each after the other.
    """
    if len(features) <= SHOWN_ROWS:
        return features
    drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:SHOWN_ROWS]
    return features[drawn.sort().values.to(features.device)]


def median_squared_distance(features: Tensor) -> float:
    """Median of |x_i - x_j|^2 over i < j; Gretton et al. 2012, section 8. Of many rows, a ``subsample``."""
    rows = subsample(features).double()
    above = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    return float(squared_distances(rows, rows)[above[0], above[1]].median())


def _scale(name: str, features: Tensor) -> float:
    median = median_squared_distance(features)
    if not median > 0.0:
        raise UsageError(
            f"kernel {name}: the median squared distance of the real features is {median}, so more than half of the "
            "real images are equal to the encoder; use other data, or --kernel cubic"
        )
    return median


def _gaussian(features: Tensor, factors: tuple[float, ...]) -> Kernel:
    median = _scale("gaussian", features)
    return Gaussian(tuple(factor * median for factor in factors or BANDWIDTH_FACTORS))


def _laplace(features: Tensor, factors: tuple[float, ...]) -> Kernel:
    median = math.sqrt(_scale("laplace", features))
    return Laplace(tuple(factor * median for factor in factors or LAPLACE_FACTORS))


def _rational_quadratic(features: Tensor, exponents: tuple[float, ...]) -> Kernel:
    return RationalQuadratic(_scale("rational-quadratic", features), exponents or MIXTURE_EXPONENTS)


def _polynomial(_: Tensor, degree: tuple[float, ...]) -> Kernel:
    return Polynomial(int(degree[0]) if degree else 3)


KernelMaker = Callable[[Tensor, tuple[float, ...]], Kernel]

KERNELS: dict[str, KernelMaker] = {
    "linear": lambda *_: Linear(),
    "cubic": lambda *_: Cubic(),
    "polynomial": _polynomial,
    "gaussian": _gaussian,
    "laplace": _laplace,
    "rational-quadratic": _rational_quadratic,
    "energy": lambda *_: Energy(),
}
WITHOUT_NUMBERS = ("linear", "cubic", "energy")


def make_kernel(spec: str, reference_features: Tensor) -> Kernel:
    """The kernel of that name, its bandwidths set once from the real features (M, d).

    ``NAME`` or ``NAME:NUMBERS``. The numbers are multiples of the median squared distance for ``gaussian``, of its root
    for ``laplace``, exponents for ``rational-quadratic``, the degree for ``polynomial``.
    Raises UsageError that lists the names, or says which number is wrong.
    """
    name, numbers = parse_kernel(spec)
    return KERNELS[name](reference_features, numbers)


def parse_kernel(spec: str) -> tuple[str, tuple[float, ...]]:
    """``gaussian:0.1,1`` as ``("gaussian", (0.1, 1.0))``; raises UsageError before any feature is computed."""
    name, _, listed = spec.partition(":")
    if name not in KERNELS:
        raise UsageError(f"--kernel {name!r} is unknown; known: {', '.join(sorted(KERNELS))}")
    if ":" not in spec:
        return name, ()
    if name in WITHOUT_NUMBERS:
        raise UsageError(f"--kernel {spec}: {name} takes no numbers; say --kernel {name}")
    try:
        numbers = tuple(float(number) for number in listed.split(","))
    except ValueError:
        raise UsageError(f"--kernel {spec}: {listed!r} is not a list of numbers such as {name}:0.5,1") from None
    if bad := [number for number in numbers if not (math.isfinite(number) and number > 0.0)]:
        raise UsageError(f"--kernel {spec}: {bad[0]:g} is not a positive number")
    if name == "polynomial" and (len(numbers) != 1 or numbers[0] != int(numbers[0])):
        raise UsageError(f"--kernel {spec}: one whole degree is expected, such as polynomial:2")
    return name, numbers
