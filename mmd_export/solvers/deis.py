"""DEIS in log rho, multistep of order 1 to 3; Zhang and Chen 2023 (arXiv 2204.13902), as diffusers has it."""

from __future__ import annotations

import math

from mmd_export.dynamic_shift import shift_of
from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig, linspace
from mmd_export.solvers.dpm import Node, map_round, multistep_order, noise_of
from mmd_export.solvers.grids import (
    interpolate,
    require_one_spacing,
    shifted,
    sigma_spacing,
    sigma_table,
    sigma_to_t,
    truncated,
    vp_grid,
)
from mmd_export.solvers.table import Form, Table


def _grid(config: SchedulerConfig, steps: int) -> tuple[list[int], list[float]]:
    """Timesteps, and the sigmas with the final one, which repeats the last where a spacing of sigmas is on."""
    require_one_spacing(config)
    table, total = sigma_table(config), config.num_train_timesteps
    logs = [math.log(sigma) for sigma in table]
    grid = vp_grid(config, steps)
    if (spacing := sigma_spacing(config)) is not None:
        sigmas = spacing(table[-1], table[0], steps)
        times = [sigma_to_t(sigma, logs) for sigma in sigmas]
        return truncated(map_round(times) if config["use_karras_sigmas"] else times), [*sigmas, sigmas[-1]]
    if config["use_flow_sigmas"]:
        sigmas = [shifted(1.0 - a, shift_of(config)) for a in linspace(1.0, 1.0 / total, steps + 1)][:0:-1]
        return [int(sigma * total) for sigma in sigmas], [*sigmas, sigmas[-1]]
    return grid, [*(interpolate(t, table) for t in grid), table[0]]


def deis(config: SchedulerConfig, steps: int) -> StepPlan:
    """x' / alpha' = x / alpha + sum of C_j eps_j; C_j integrates a Lagrange polynomial in log(sigma / alpha)."""
    times, sigmas = _grid(config, steps)
    nodes = [Node.of_sigma(sigma, flow=config["use_flow_sigmas"]) for sigma in sigmas]
    rho = [node.sigma / node.alpha for node in nodes]
    table, models = Table(), list[Form]()
    for k, timestep in enumerate(times):
        node, goal = nodes[k], nodes[k + 1]
        x, output = table.call(timestep, node.alpha, node.sigma)
        models.insert(0, noise_of(config.prediction_type, node, x, output))
        order = multistep_order(k, len(times), config, first_at_final=False)
        state = (goal.alpha / node.alpha) * x
        for weight, model in zip(_weights(rho[k + 1], rho[k::-1][:order]), models, strict=False):
            state = state + (goal.alpha * weight) * model
        table.advance(state)
    return table.plan("deis", config, steps, settings={"solver_order": config["solver_order"]})


def _weights(end: float, past: list[float]) -> list[float]:
    """Integrals from past[0] to ``end`` of the Lagrange polynomials through the logs of ``past``, the newest first."""
    if len(past) == 1:
        return [end - past[0]]
    logs = [math.log(rho) for rho in past]
    integral = _first_degree if len(past) == 2 else _second_degree
    others = [[logs[(j + i) % len(past)] for i in range(1, len(past))] for j in range(len(past))]
    return [integral(end, logs[j], *rest) - integral(past[0], logs[j], *rest) for j, rest in enumerate(others)]


def _first_degree(t: float, b: float, c: float) -> float:
    """Antiderivative of (log t - c) / (b - c)."""
    return t * (math.log(t) - c - 1.0) / (b - c)


def _second_degree(t: float, b: float, c: float, d: float) -> float:
    """Antiderivative of (log t - c)(log t - d) / ((b - c)(b - d))."""
    u = math.log(t)
    return t * (c * (d - u + 1.0) - d * u + d + u**2 - 2.0 * u + 2.0) / ((b - c) * (b - d))
