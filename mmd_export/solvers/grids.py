"""The noise levels that a solver visits, as diffusers' ``set_timesteps`` gives them, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from mmd_export.errors import UsageError
from mmd_export.schedule import (
    SchedulerConfig,
    alphas_cumprod,
    check_steps,
    linspace,
    require_inside,
    timestep_grid,
    trailing_grid,
)
from mmd_export.solvers.beta_quantile import beta_quantile

KARRAS_RHO = 7.0
SMALLEST_ALPHA_BAR = 2.0**-24  # diffusers' stand-in for the 0 of zero terminal SNR where sigma / alpha is needed
SNAP = 1e-4  # diffusers truncates timesteps that it found by a logarithm; 998.99999 is 999


def alpha_bar_table(config: SchedulerConfig) -> list[float]:
    """alpha_bar, with a last value above 0."""
    table = list(alphas_cumprod(config))
    if config.rescale_betas_zero_snr:
        table[-1] = SMALLEST_ALPHA_BAR
    return table


def sigma_table(config: SchedulerConfig) -> list[float]:
    """sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t): the noise of x_t / alpha_t; Karras et al. 2022, table 1."""
    return [math.sqrt((1.0 - a) / a) for a in alpha_bar_table(config)]


def interpolate(t: float, table: Sequence[float]) -> float:
    """``table`` at a fractional index, as numpy.interp."""
    low = max(0, min(int(t), len(table) - 2))
    if len(table) == 1 or t <= 0.0:
        return table[0]
    return table[-1] if t >= len(table) - 1 else (table[low + 1] - table[low]) * (t - low) + table[low]


def sigma_to_t(sigma: float, log_table: Sequence[float]) -> float:
    """The fractional timestep of a sigma, by interpolation of its logarithm."""
    log_sigma = math.log(max(sigma, 1e-10))
    below = (t for t in range(len(log_table) - 1, -1, -1) if log_table[t] <= log_sigma)  # it may fall at the end
    low = min(next(below, 0), len(log_table) - 2)
    w = (log_table[low] - log_sigma) / (log_table[low] - log_table[low + 1])
    w = min(max(w, 0.0), 1.0)
    return (1.0 - w) * low + w * (low + 1)


def karras(high: float, low: float, count: int, rho: float = KARRAS_RHO) -> list[float]:
    """sigma_i = (high^(1/rho) + i / (n - 1) (low^(1/rho) - high^(1/rho)))^rho; Karras et al. 2022, eq. 5."""
    a, b = high ** (1.0 / rho), low ** (1.0 / rho)
    return [(a + ramp * (b - a)) ** rho for ramp in linspace(0.0, 1.0, count)]


def exponential(high: float, low: float, count: int) -> list[float]:
    """Equal ratios."""
    return [math.exp(x) for x in linspace(math.log(high), math.log(low), count)]


def beta_spaced(high: float, low: float, count: int) -> list[float]:
    """Quantiles of Beta(0.6, 0.6) between low and high; Lee et al. 2024 (arXiv 2407.12173)."""
    return [low + beta_quantile(1.0 - ramp, 0.6, 0.6) * (high - low) for ramp in linspace(0.0, 1.0, count)]


_SPACED: dict[str, Callable[[float, float, int], list[float]]] = {
    "use_karras_sigmas": karras,
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta_spaced,
}


def sigma_spacing(config: SchedulerConfig) -> Callable[[float, float, int], list[float]] | None:
    """The spacing of sigmas that the config switches on; refused together with a grid of timesteps that is given."""
    for key, spacing in _SPACED.items():
        if config[key]:
            require_free_sigmas(config, key)
            return spacing
    return None


def require_free_sigmas(config: SchedulerConfig, key: str) -> None:
    """Raises UsageError if timesteps are given although ``key``, which is on, makes the sigmas decide."""
    if config.is_given_grid:
        option = "--timesteps" if config.custom_timesteps else f"--spacing {config.timestep_spacing}"
        raise UsageError(f"{option} is given and {key} is on; the sigmas then decide, so choose one")


def sigma_grid(config: SchedulerConfig, steps: int, *, bounds: bool = False) -> tuple[list[float], list[float]]:
    """Timesteps and sigmas of k-diffusion's solvers (Euler, Heun, ...), both descending, without the final sigma.

    ``bounds``: whether the class has ``sigma_min`` and ``sigma_max``.
    """
    table = sigma_table(config)
    if config.timestep_spacing == "linspace":
        check_steps(config, steps)
        times = linspace(0.0, config.num_train_timesteps - 1.0, steps)[::-1]
    else:
        times = [float(t) for t in timestep_grid(config, steps)]
    sigmas = [interpolate(t, table) for t in times]
    if "use_karras_sigmas" not in config.settings() or (spacing := sigma_spacing(config)) is None:
        return times, sigmas
    high = config["sigma_max"] if bounds and config["sigma_max"] is not None else sigmas[0]
    low = config["sigma_min"] if bounds and config["sigma_min"] is not None else sigmas[-1]
    sigmas = spacing(high, low, len(times))
    logs = [math.log(sigma) for sigma in table]
    return [sigma_to_t(sigma, logs) for sigma in sigmas], sigmas


def initial_sigma(config: SchedulerConfig, sigmas: Sequence[float]) -> float:
    """diffusers' init_noise_sigma: sigma_max, or sqrt(sigma_max^2 + 1) for the leading grid."""
    largest = max(sigmas)
    return largest if config.named_spacing in ("linspace", "trailing") else math.sqrt(largest**2 + 1.0)


def vp_grid(config: SchedulerConfig, steps: int) -> list[int]:
    """The timesteps of the DPM-Solver family: of ``steps + 1`` points without the last, where the final sigma is."""
    check_steps(config, steps)
    settings, total = config.settings(), config.num_train_timesteps
    spacing = config.timestep_spacing if "timestep_spacing" in settings else config.named_spacing or "linspace"
    if config.is_given_grid:
        return list(timestep_grid(config, steps))
    last = total - _clipped(config, settings.get("lambda_min_clipped", -math.inf))
    if spacing == "leading" and "timestep_spacing" in settings:
        grid = [i * (last // (steps + 1)) + config.steps_offset for i in range(steps, 0, -1)]
    elif spacing == "trailing" and "timestep_spacing" in settings:
        grid = trailing_grid(last, total, steps)
    else:
        grid = [round(t) for t in linspace(0.0, last - 1.0, steps + 1)][:0:-1]
    for earlier, later in itertools.pairwise(grid):
        if earlier == later:
            raise UsageError(f"--steps is {steps}: timestep {later} comes up twice on this grid; ask for fewer steps")
    return require_inside(config, grid)


def _clipped(config: SchedulerConfig, lowest: float) -> int:
    """How many timesteps have log(alpha / sigma) below ``lambda_min_clipped``."""
    if lowest == -math.inf:
        return 0
    return sum(0.5 * math.log(a / (1.0 - a)) < lowest for a in alpha_bar_table(config))


def truncated(timesteps: Sequence[float]) -> list[int]:
    """Whole timesteps; what rounding of a logarithm moved just below one is that one."""
    return [int(t + SNAP) for t in timesteps]


def shifted(sigma: float, shift: float) -> float:
    """shift * sigma / (1 + (shift - 1) sigma); Esser et al. 2024, eq. 23."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def stretched(sigmas: Sequence[float], terminal: float | None) -> list[float]:
    """Scaled so that the last is ``terminal``."""
    if not terminal:
        return list(sigmas)
    factor = (1.0 - sigmas[-1]) / (1.0 - terminal)
    return [1.0 - (1.0 - sigma) / factor for sigma in sigmas]


def require_one_spacing(config: SchedulerConfig, *, karras_too: bool = False) -> None:
    """Flow sigmas lie in (0, 1); raises UsageError where another spacing of sigmas is on as well."""
    for key in _SPACED:
        if config["use_flow_sigmas"] and config[key] and not (karras_too and key == "use_karras_sigmas"):
            raise UsageError(f"scheduler: use_flow_sigmas and {key} are both on; choose one")
    if config["use_flow_sigmas"]:
        require_free_sigmas(config, "use_flow_sigmas")
