"""Noise schedules and timestep grids in float64. Standard library only."""

from __future__ import annotations

import math

from mmd_export.errors import UsageError
from mmd_export.scheduler_config import SchedulerConfig, SolverConfig

__all__ = ["SchedulerConfig", "SolverConfig", "alphas_cumprod", "betas", "linspace", "timestep_grid"]


def alphas_cumprod(config: SchedulerConfig) -> tuple[float, ...]:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s) for t = 0 ... T-1; Ho et al. 2020, eq. 4."""
    products, product = [], 1.0
    for t, beta in enumerate(betas(config)):
        last = t == config.num_train_timesteps - 1  # beta 1 there is a schedule of zero terminal SNR
        if not (0.0 < beta < 1.0 or (last and beta == 1.0)) or product == 0.0:
            found = f"beta {beta:g}, with alpha_bar {product:g} before it"
            raise UsageError(f"scheduler: timestep {t} has {found}; betas lie in (0, 1)")
        product *= 1.0 - beta
        products.append(product)
    return _zero_terminal_snr(products) if config.rescale_betas_zero_snr else tuple(products)


def betas(config: SchedulerConfig) -> list[float]:
    """beta_t for t = 0 ... T-1, before a rescaling to zero terminal SNR."""
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return list(config.trained_betas)
    if config.beta_schedule not in ("squaredcos_cap_v2", "exp") and not (0.0 < start < 1.0 and 0.0 < end < 1.0):
        raise UsageError(f"scheduler: beta_start is {start:g}, beta_end {end:g}; both lie in (0, 1)")
    if config.beta_schedule == "linear":
        return linspace(start, end, count)
    if config.beta_schedule == "scaled_linear":
        return [root**2 for root in linspace(math.sqrt(start), math.sqrt(end), count)]
    if config.beta_schedule == "sigmoid":
        return [(end - start) / (1.0 + math.exp(-x)) + start for x in linspace(-6.0, 6.0, count)]
    level = _exponential_alpha_bar if config.beta_schedule == "exp" else _cosine_alpha_bar
    return [min(1.0 - level((i + 1) / count) / level(i / count), 0.999) for i in range(count)]


def _cosine_alpha_bar(t: float) -> float:
    """Nichol and Dhariwal 2021, eq. 17, unnormalised."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _exponential_alpha_bar(t: float) -> float:
    """diffusers' ``exp`` schedule."""
    return math.exp(-12.0 * t)


def linspace(start: float, end: float, count: int) -> list[float]:
    """``count`` equally spaced numbers, both ends included; numpy's rounding."""
    if count == 1:
        return [start]
    gap = (end - start) / (count - 1)
    return [start + i * gap for i in range(count - 1)] + [end]


def _zero_terminal_snr(products: list[float]) -> tuple[float, ...]:
    """Shift and scale sqrt(alpha_bar) so that the last is 0; Lin et al. 2023 (arXiv 2305.08891), algorithm 1."""
    roots = [math.sqrt(product) for product in products]
    first, last = roots[0], roots[-1]
    return tuple(((root - last) * first / (first - last)) ** 2 for root in roots)


def timestep_grid(config: SchedulerConfig, steps: int) -> tuple[int, ...]:
    """The timesteps of ``steps`` network calls, descending, as diffusers' ``set_timesteps`` gives them.

    Exactly ``steps`` calls for every count: where diffusers' trailing grid gains one more by rounding, it is left out.
    ``mmd-ddm`` is MMD-DDM's own ``range(0, T, T // steps)``, backwards: 16 calls for 15 steps of 1000.
    """
    total = config.num_train_timesteps
    check_steps(config, steps)
    if config.custom_timesteps:
        return tuple(map(int, config.custom_timesteps))
    if config.timestep_spacing == "mmd-ddm":
        grid = [*range(0, total, total // steps)][::-1]
    elif config.timestep_spacing == "leading":
        grid = [i * (total // steps) + config.steps_offset for i in reversed(range(steps))]
    elif config.timestep_spacing == "trailing":
        grid = trailing_grid(total, total, steps)
    else:
        grid = [round(t) for t in reversed(linspace(0.0, total - 1.0, steps))]
    return tuple(require_inside(config, grid))


def trailing_grid(last: int, total: int, steps: int) -> list[int]:
    """``round(arange(last, 0, -total / steps)) - 1``; numpy's own increment, so that ties round alike."""
    gap = (last - total / steps) - last
    return [round(last + i * gap) - 1 for i in range(steps)]


def check_steps(config: SchedulerConfig, steps: int) -> None:
    """Raises UsageError unless the model's timesteps hold ``steps`` calls, or exactly those that are listed."""
    total, listed = config.num_train_timesteps, len(config.custom_timesteps)
    if not 1 <= steps <= total:
        raise UsageError(
            f"--steps is {steps}; the model was trained with {total} timesteps, so 1 to {total} are possible"
        )
    if listed not in (0, steps):
        raise UsageError(f"--steps is {steps}, --timesteps lists {listed}; leave --steps out")


def require_inside(config: SchedulerConfig, grid: list[int]) -> list[int]:
    """The grid; raises UsageError that names a timestep outside the schedule."""
    total = config.num_train_timesteps
    if outside := [t for t in grid if not 0 <= t < total]:
        raise UsageError(f"timestep {outside[0]} lies outside 0 ... {total - 1}; steps_offset is {config.steps_offset}")
    return grid
