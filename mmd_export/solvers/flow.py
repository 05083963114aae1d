"""Solvers of rectified flow, x = (1 - sigma) x0 + sigma eps with a network that predicts eps - x0; Liu et al. 2023."""

from __future__ import annotations

from mmd_export.dynamic_shift import shift_of
from mmd_export.plan import Scalar, StepPlan
from mmd_export.schedule import SchedulerConfig, check_steps, linspace
from mmd_export.scheduler_keys import DYNAMIC
from mmd_export.solvers.grids import shifted, sigma_spacing, stretched
from mmd_export.solvers.table import Table


def _sigmas(config: SchedulerConfig, steps: int) -> list[float]:
    """diffusers shifts the end points by a fixed shift, and the grid between them by it or a dynamic one."""
    check_steps(config, steps)
    total, shift = config.num_train_timesteps, shift_of(config)
    if config.custom_timesteps:
        return [shifted(t / total, shift) for t in config.custom_timesteps]
    at_ends = 1.0 if config.get(DYNAMIC) else shift
    low, high = shifted(1.0 / total, at_ends) * total, shifted(1.0, at_ends) * total
    return [shifted(t / total, shift) for t in linspace(high, low, steps)]


def _settings(config: SchedulerConfig) -> dict[str, Scalar]:
    """The shift, and the mu that a dynamic one is of."""
    return {"shift": shift_of(config)} | ({"mu": config["mu"]} if config.get(DYNAMIC) else {})


def flow_euler(config: SchedulerConfig, steps: int) -> StepPlan:
    """x' = x + (sigma' - sigma) u; Esser et al. 2024. ``stochastic_sampling`` draws a fresh eps at every level."""
    total = config.num_train_timesteps
    sigmas = stretched(_sigmas(config, steps), config["shift_terminal"])
    if (spacing := sigma_spacing(config)) is not None:
        sigmas = spacing(sigmas[0], sigmas[-1], len(sigmas))
    times = list(config.custom_timesteps) or [sigma * total for sigma in sigmas]
    if config["invert_sigmas"]:
        sigmas = [1.0 - sigma for sigma in sigmas]
        times = [sigma * total for sigma in sigmas]
    table = Table()
    final = 1.0 if config["invert_sigmas"] else 0.0
    for timestep, sigma, after in zip(times, sigmas, [*sigmas[1:], final], strict=True):
        x, output = table.call(timestep, 1.0 - sigma, sigma)
        if config["stochastic_sampling"]:
            table.advance((1.0 - after) * (x - sigma * output) + table.noise(after))
        else:
            table.advance(x + (after - sigma) * output)
    return table.plan("flow-euler", config, steps, prediction="flow_prediction", settings=_settings(config))


def flow_heun(config: SchedulerConfig, steps: int) -> StepPlan:
    """x' = x + (sigma' - sigma) (u_1 + u_2) / 2 with u_2 at the Euler proposal, the last step Euler. 2 K - 1 calls."""
    sigmas, total = _sigmas(config, steps), config.num_train_timesteps
    table = Table()
    for k, sigma in enumerate(sigmas):
        after = sigmas[k + 1] if k + 1 < len(sigmas) else 0.0
        x, output = table.call(sigma * total, 1.0 - sigma, sigma)
        table.advance(x + (after - sigma) * output)
        if after == 0.0:
            continue
        _, second = table.call(after * total, 1.0 - after, after)
        table.advance(x + (after - sigma) * (0.5 * (output + second)))
    return table.plan("flow-heun", config, steps, prediction="flow_prediction", settings=_settings(config))
