"""What the network's output means at a noise level: the clean guess and the noise guess as linear forms."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmd_export.errors import UsageError
from mmd_export.plan import PredictionType


@dataclass(frozen=True)
class Level:
    """x = alpha * x0 + sigma * eps with alpha^2 + sigma^2 = 1; ``alpha_bar`` = alpha^2."""

    alpha_bar: float

    @property
    def alpha(self) -> float:
        return math.sqrt(self.alpha_bar)

    @property
    def variance(self) -> float:
        return 1.0 - self.alpha_bar

    @property
    def sigma(self) -> float:
        return math.sqrt(self.variance)


@dataclass(frozen=True)
class Affine:
    """``state * x + output * y``: x the state, y the raw network output."""

    state: float
    output: float


def clean_guess(level: Level, prediction: PredictionType, timestep: float) -> Affine:
    """x0 from (x, output): (x - sigma eps) / alpha, alpha x - sigma v, or the output itself; Salimans and Ho 2022."""
    alpha, sigma = level.alpha, level.sigma
    if prediction == "sample":
        return Affine(0.0, 1.0)
    if prediction == "v_prediction":
        return Affine(alpha, -sigma)
    if alpha == 0.0:
        raise UsageError(
            f"epsilon prediction at timestep {timestep}, where alpha is 0 (rescale_betas_zero_snr): the clean image is "
            "undefined there; use --spacing leading or a v-prediction model"
        )
    return Affine(1.0 / alpha, -sigma / alpha)


def noise_guess(level: Level, prediction: PredictionType, timestep: float) -> Affine:
    """Eps from (x, output): the output itself, sigma x + alpha v, or (x - alpha x0) / sigma."""
    alpha, sigma = level.alpha, level.sigma
    if prediction == "epsilon":
        return Affine(0.0, 1.0)
    if prediction == "v_prediction":
        return Affine(sigma, alpha)
    if sigma == 0.0:
        raise UsageError(f"sample prediction at timestep {timestep}, where sigma is 0: the noise is undefined there")
    return Affine(1.0 / sigma, -alpha / sigma)
