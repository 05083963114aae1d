"""Solvers in x = x0 + sigma * eps: Euler, Euler ancestral, Heun and DPM-Solver-SDE of k-diffusion."""

from __future__ import annotations

import math

from mmd_export.errors import UsageError
from mmd_export.plan import Scalar, StepPlan
from mmd_export.schedule import SchedulerConfig, linspace
from mmd_export.solvers.grids import initial_sigma, require_free_sigmas, sigma_grid, sigma_table, sigma_to_t
from mmd_export.solvers.table import Form, Table


def call(table: Table, timestep: float, sigma: float) -> tuple[Form, Form]:
    """A network call on x / sqrt(sigma^2 + 1), which has the variance that the network was trained with."""
    scale = 1.0 / math.sqrt(sigma**2 + 1.0)
    return table.call(timestep, scale, sigma * scale, scale)


def clean(config: SchedulerConfig, x: Form, output: Form, sigma: float) -> Form:
    """x0 from (x, output): x - sigma eps, x / (sigma^2 + 1) - sigma / sqrt(sigma^2 + 1) v, or the output itself."""
    if config.prediction_type == "sample":
        return output
    if config.prediction_type == "v_prediction":
        return x / (sigma**2 + 1.0) - (sigma / math.sqrt(sigma**2 + 1.0)) * output
    return x - sigma * output


def euler(config: SchedulerConfig, steps: int) -> StepPlan:
    """Euler on dx / dsigma = (x - x0) / sigma; Karras et al. 2022, algorithm 2 without churn."""
    times, sigmas = sigma_grid(config, steps, bounds=True)
    reverse = sigma_table(config)
    if config["interpolation_type"] == "log_linear" and not _spaced(config):
        require_free_sigmas(config, "interpolation_type log_linear")
        sigmas = [math.exp(x) for x in linspace(math.log(reverse[-1]), math.log(reverse[0]), len(times) + 1)]
    sigmas = [*sigmas, reverse[0] if config["final_sigmas_type"] == "sigma_min" else 0.0]
    if config["timestep_type"] == "continuous" and config.prediction_type == "v_prediction":
        require_free_sigmas(config, "timestep_type continuous")
        times = [0.25 * math.log(sigma) for sigma in sigmas[: len(times)]]
    table = Table()
    for k, (timestep, sigma) in enumerate(zip(times, sigmas, strict=False)):
        x, output = call(table, timestep, sigma)
        x0 = clean(config, x, output, sigma)
        table.advance(x + (sigmas[k + 1] - sigma) * ((x - x0) / sigma))
    return table.plan(
        "euler", config, steps, initial_scale=initial_sigma(config, sigmas), settings=_sigma_settings(config)
    )


def euler_ancestral(config: SchedulerConfig, steps: int) -> StepPlan:
    """Euler down to sigma_down, then noise back up, sigma_down^2 + sigma_up^2 = sigma'^2; k-diffusion."""
    times, sigmas = sigma_grid(config, steps)
    table = Table()
    for timestep, sigma, after in zip(times, sigmas, [*sigmas[1:], 0.0], strict=True):
        x, output = call(table, timestep, sigma)
        x0 = clean(config, x, output, sigma)
        up, down = _ancestral(sigma, after)
        table.advance(x + (down - sigma) * ((x - x0) / sigma) + table.noise(up))
    return table.plan("euler-ancestral", config, steps, initial_scale=initial_sigma(config, sigmas))


def _ancestral(sigma: float, after: float) -> tuple[float, float]:
    """(sigma_up, sigma_down) of a step from ``sigma`` to ``after``; raises UsageError where the noise would grow."""
    if after > sigma:
        raise UsageError(
            f"scheduler: the noise level rises from {sigma:g} to {after:g}, which no ancestral step does; choose "
            "another step count or spacing"
        )
    up = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
    return up, math.sqrt(after**2 - up**2)


def heun(config: SchedulerConfig, steps: int) -> StepPlan:
    """x' = x + (d_1 + d_2) / 2 dsigma with d_2 at the Euler proposal, the last step Euler; Karras et al. 2022, alg. 1.

    2 K - 1 network calls for K steps.
    """
    times, sigmas = sigma_grid(config, steps)
    table = Table(config.clip_sample_range if config.clip_sample else None)
    for k, (timestep, sigma) in enumerate(zip(times, sigmas, strict=True)):
        after = sigmas[k + 1] if k + 1 < len(sigmas) else 0.0
        x, output = call(table, timestep, sigma)
        slope = (x - table.clean(clean(config, x, output, sigma))) / sigma
        table.advance(x + (after - sigma) * slope)
        if after == 0.0:
            continue
        proposal, output = call(table, times[k + 1], after)
        second = (proposal - table.clean(clean(config, proposal, output, after))) / after
        table.advance(x + (after - sigma) * (0.5 * (slope + second)))
    return table.plan(
        "heun", config, steps, initial_scale=initial_sigma(config, sigmas), settings=_sigma_settings(config)
    )


def dpmsolver_sde(config: SchedulerConfig, steps: int) -> StepPlan:
    """DPM-Solver++ (SDE), midpoint in log sigma; Lu et al. 2022, k-diffusion's sample_dpmpp_sde. 2 K - 1 network calls.

    Its two noises of a step are increments of one Brownian motion in sigma: the noise of the whole step is the
    sqrt(length)-weighted sum of the noise of the first half and of a fresh one.
    """
    times, sigmas = sigma_grid(config, steps)
    logs = [math.log(sigma) for sigma in sigma_table(config)]
    table = Table()
    for k, (timestep, sigma) in enumerate(zip(times, sigmas, strict=True)):
        x, output = call(table, timestep, sigma)
        x0 = clean(config, x, output, sigma)
        if k + 1 == len(sigmas):
            table.advance(x0)
            continue
        after = sigmas[k + 1]
        middle = math.sqrt(sigma * after)
        first = table.noise(1.0)
        table.advance(_sde_step(x, x0, sigma, middle, first))
        proposal, output = call(table, sigma_to_t(middle, logs), middle)
        whole = math.sqrt(sigma - middle) * first + math.sqrt(middle - after) * table.noise(1.0)
        x0 = clean(config, proposal, output, middle)
        table.advance(_sde_step(x, x0, sigma, after, whole / math.sqrt(sigma - after)))
    return table.plan(
        "dpmsolver-sde", config, steps, initial_scale=initial_sigma(config, sigmas), settings=_sigma_settings(config)
    )


def _sde_step(x: Form, x0: Form, sigma: float, after: float, noise: Form) -> Form:
    """(sigma_down / sigma) x + (1 - sigma_down / sigma) x0 + sigma_up z."""
    up, down = _ancestral(sigma, after)
    return (down / sigma) * x + (1.0 - down / sigma) * x0 + up * noise


def _spaced(config: SchedulerConfig) -> str | None:
    keys = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    return next((key.split("_")[1] for key in keys if config[key]), None)


def _sigma_settings(config: SchedulerConfig) -> dict[str, Scalar]:
    name = _spaced(config)
    return {} if name is None else {"sigmas": name}
