"""DDIM and DDPM as tables."""

from __future__ import annotations

import math

from mmd_export.errors import UsageError
from mmd_export.plan import Scalar, Step, StepPlan, Term
from mmd_export.schedule import SchedulerConfig, alphas_cumprod, timestep_grid
from mmd_export.scheduler_keys import LEARNED_VARIANCE
from mmd_export.solvers.levels import Affine, Level, clean_guess, noise_guess
from mmd_export.solvers.table import NEGLIGIBLE_STD

ROUNDING = 1e-12  # at eta 1 from pure noise, std^2 equals the variance of the level up to a rounding


def _step(
    k: int, timestep: int, level: Level, guess: Affine, weights: tuple[float, Affine, float, int], clip: bool
) -> Step:
    """next = clean_weight * clamp(guess) + rest(x, output) + std * noise; without clamping the guess is folded in."""
    clean_weight, rest, std, noise_index = weights
    state, output = rest.state, rest.output
    if not clip:
        state, output = state + clean_weight * guess.state, output + clean_weight * guess.output
    terms = [Term("state", k, state), Term("output", k, output)]
    terms += [Term("clean", k, clean_weight)] if clip else []
    terms += [Term("noise", noise_index, std)] if std > NEGLIGIBLE_STD else []
    kept = tuple(term for term in terms if term.weight != 0.0)
    return Step(
        timestep=float(timestep),
        alpha=level.alpha,
        sigma=level.sigma,
        update=kept or (Term("state", k, 0.0),),
        clean=(guess.state, guess.output) if clip else None,
    )


def ddim(config: SchedulerConfig, steps: int, eta: float = 0.0) -> StepPlan:
    """DDIM, deterministic at ``eta`` 0, as stochastic as DDPM at 1; Song et al. 2021, eq. 12 and 16.

    As in diffusers' DDIMScheduler, the previous timestep is ``t - T // K`` for every spacing, the clean guess is
    clamped if ``clip_sample``, and the direction that points to x_t keeps the raw noise guess. On listed timesteps and
    on MMD-DDM's grid the previous timestep is the next on the grid; MMD-DDM's own last level is always 1.
    """
    if not (math.isfinite(eta) and eta >= 0):
        raise UsageError(f"--eta is {eta}; it must be 0 or more")
    alpha_bar, prediction = alphas_cumprod(config), config.prediction_type
    grid = timestep_grid(config, steps)
    final = 1.0 if config.set_alpha_to_one or config.timestep_spacing == "mmd-ddm" else alpha_bar[0]
    table: list[Step] = []
    noisy = 0
    for k, (timestep, earlier) in enumerate(zip(grid, _earlier(config, grid, steps), strict=True)):
        level, goal = Level(alpha_bar[timestep]), Level(alpha_bar[earlier] if earlier >= 0 else final)
        std = eta * math.sqrt(max(goal.variance / level.variance * (1.0 - level.alpha_bar / goal.alpha_bar), 0.0))
        if std**2 > goal.variance * (1.0 + ROUNDING):
            raise UsageError(f"--eta is {eta}: at timestep {timestep} its noise exceeds the level's own; use 1 or less")
        guess, eps = clean_guess(level, prediction, timestep), noise_guess(level, prediction, timestep)
        direction = math.sqrt(max(goal.variance - std**2, 0.0))
        rest = Affine(direction * eps.state, direction * eps.output)
        table.append(_step(k, timestep, level, guess, (goal.alpha, rest, std, noisy), config.clip_sample))
        noisy += std > NEGLIGIBLE_STD
    return _plan("ddim", config, steps, table, eta=eta)


def _earlier(config: SchedulerConfig, grid: tuple[int, ...], steps: int) -> list[int]:
    """The timestep that each step goes to; negative for clean data."""
    if config.is_given_grid:
        return [*grid[1:], -1]
    return [timestep - config.num_train_timesteps // steps for timestep in grid]


def ddpm(config: SchedulerConfig, steps: int) -> StepPlan:
    """Ancestral sampling from the posterior q(x_s | x_t, x0); Ho et al. 2020, eq. 7, over diffusers' own grid."""
    if config.variance_type in LEARNED_VARIANCE:
        raise UsageError(
            f"scheduler: variance_type {config.variance_type!r} makes DDPM's noise depend on the network's output, "
            "which is not affine; use --sampler ddim, or dpmsolver"
        )
    alpha_bar, prediction = alphas_cumprod(config), config.prediction_type
    grid = timestep_grid(config, steps)
    table: list[Step] = []
    noisy = 0
    for k, timestep in enumerate(grid):
        level = Level(alpha_bar[timestep])
        goal = Level(alpha_bar[grid[k + 1]] if k + 1 < len(grid) else 1.0)
        ratio = level.alpha_bar / goal.alpha_bar
        clean_weight = goal.alpha * (1.0 - ratio) / level.variance
        rest = Affine(math.sqrt(ratio) * goal.variance / level.variance, 0.0)
        variance = (
            1.0 - ratio if config.variance_type == "fixed_large" else goal.variance / level.variance * (1.0 - ratio)
        )
        std = math.sqrt(max(variance, 0.0)) if timestep > 0 else 0.0
        guess = clean_guess(level, prediction, timestep)
        table.append(_step(k, timestep, level, guess, (clean_weight, rest, std, noisy), config.clip_sample))
        noisy += std > NEGLIGIBLE_STD
    return _plan("ddpm", config, steps, table, variance_type=config.variance_type)


def _plan(solver: str, config: SchedulerConfig, steps: int, table: list[Step], **settings: str | float) -> StepPlan:
    counts: dict[str, Scalar] = {} if steps == len(table) else {"num_inference_steps": steps, "calls": len(table)}
    return StepPlan(
        solver=solver,
        prediction_type=config.prediction_type,
        steps=tuple(table),
        clip=config.clip_sample_range if config.clip_sample else None,
        settings={
            "timestep_spacing": config.timestep_spacing,
            "beta_schedule": config.beta_schedule,
            **settings,
            **counts,
        },
    )
