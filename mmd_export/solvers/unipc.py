"""UniPC: a multistep predictor, corrected when the next output is known; Zhao et al. 2023 (arXiv 2302.04867)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmd_export.dynamic_shift import shift_of
from mmd_export.errors import UsageError
from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig, linspace
from mmd_export.solvers.dpm import Node, clean_of, map_round, noise_of
from mmd_export.solvers.grids import (
    interpolate,
    require_one_spacing,
    shifted,
    sigma_spacing,
    sigma_table,
    sigma_to_t,
    stretched,
    truncated,
    vp_grid,
)
from mmd_export.solvers.table import Form, Table

FLOW_GAP = 1e-6  # diffusers moves a first flow sigma of 1 down by this


def _grid(config: SchedulerConfig, steps: int) -> tuple[list[int], list[float]]:
    """Timesteps, and the sigmas with the final one."""
    require_one_spacing(config, karras_too=True)
    if config["shift_terminal"] and not config["use_flow_sigmas"]:
        raise UsageError(
            f"scheduler: shift_terminal is {config['shift_terminal']} and use_flow_sigmas off; it needs flow sigmas"
        )
    table, total = sigma_table(config), config.num_train_timesteps
    logs = [math.log(sigma) for sigma in table]
    grid, to_min = vp_grid(config, steps), config["final_sigmas_type"] == "sigma_min"
    if (spacing := sigma_spacing(config)) is not None:
        high = table[-1] if config["sigma_max"] is None else config["sigma_max"]
        low = table[0] if config["sigma_min"] is None else config["sigma_min"]
        sigmas = spacing(high, low, steps)
        if config["use_flow_sigmas"]:
            sigmas = [sigma / (sigma + 1.0) for sigma in sigmas]
            times = truncated([sigma * total for sigma in sigmas])
        else:
            found = [sigma_to_t(sigma, logs) for sigma in sigmas]
            times = truncated(map_round(found) if config["use_karras_sigmas"] else found)
        return times, [*sigmas, sigmas[-1] if to_min else 0.0]
    if config["use_flow_sigmas"]:
        sigmas = [shifted(s, shift_of(config)) for s in linspace(1.0, 1.0 / total, steps + 1)[:-1]]
        sigmas = stretched(sigmas, config["shift_terminal"])
        sigmas[0] -= FLOW_GAP if abs(sigmas[0] - 1.0) < FLOW_GAP else 0.0
        return [int(sigma * total) for sigma in sigmas], [*sigmas, sigmas[-1] if to_min else 0.0]
    return grid, [*(interpolate(t, table) for t in grid), table[0] if to_min else 0.0]


def unipc(config: SchedulerConfig, steps: int) -> StepPlan:
    """UniPC-p with B(h) = h (bh1) or e^h - 1 (bh2): predictor eq. 9, corrector eq. 8; one network call a step.

    The corrected state differs from the predicted one by network outputs only, so no older state is ever needed.
    """
    times, sigmas = _grid(config, steps)
    nodes = [Node.of_sigma(sigma, flow=config["use_flow_sigmas"]) for sigma in sigmas]
    kind = clean_of if config["predict_x0"] else noise_of
    table, models, predicted, order = Table(), list[Form](), Form(), 0
    for k, timestep in enumerate(times):
        x, output = table.call(timestep, nodes[k].alpha, nodes[k].sigma)
        model = kind(config.prediction_type, nodes[k], x, output)
        if k > 0 and k - 1 not in config["disable_corrector"]:
            weights = _weights(config, nodes, k - 1, order, corrector=True)
            x = x - predicted + _residual(weights, [*models[1:order], model], models[0])
        models.insert(0, model)
        left = len(times) - k if config["lower_order_final"] else int(config["solver_order"])
        order = min(int(config["solver_order"]), left, k + 1)
        weights = _weights(config, nodes, k, order, corrector=False)
        predicted = _residual(weights, models[1:order], models[0])
        table.advance(_base(config, nodes[k], nodes[k + 1], x, models[0]) + predicted)
    settings = {key: config[key] for key in ("solver_order", "solver_type", "predict_x0", "final_sigmas_type")}
    return table.plan("unipc", config, steps, settings=settings)


def _base(config: SchedulerConfig, s: Node, t: Node, x: Form, model: Form) -> Form:
    """The first-order (DDIM) step from s to t."""
    if config["predict_x0"]:
        return (t.sigma / s.sigma) * x + t.alpha * (1.0 - t.sigma * s.alpha / (t.alpha * s.sigma)) * model
    return (t.alpha / s.alpha) * x - t.sigma * (t.alpha * s.sigma / (t.sigma * s.alpha) - 1.0) * model


def _residual(weights: Sequence[float], models: Sequence[Form], newest: Form) -> Form:
    total = Form()
    for weight, model in zip(weights, models, strict=True):
        total = total + weight * (model - newest)
    return total


def _weights(config: SchedulerConfig, nodes: Sequence[Node], k: int, order: int, *, corrector: bool) -> list[float]:
    """-alpha_t B(h) rho_m / r_m of the differences that the step from node k uses; the corrector adds one at r = 1."""
    s, t = nodes[k], nodes[k + 1]
    ratios = [(nodes[k - i].lam - s.lam) / (t.lam - s.lam) for i in range(1, order)]
    if not ratios and not corrector:
        return []
    h = t.lam - s.lam
    hh = -h if config["predict_x0"] else h
    scale = hh if config["solver_type"] == "bh1" else math.expm1(hh)
    outer = -(t.alpha if config["predict_x0"] else t.sigma) * scale
    points = [*ratios, 1.0] if corrector else ratios
    if len(points) == 1:
        rhos = [0.5]  # exact for bh2 in the limit, and diffusers' choice for both
    else:
        rhos = _solve([[r**i for r in points] for i in range(len(points))], _moments(hh, scale, len(points)))
    return [outer * rho / r for rho, r in zip(rhos, points, strict=True)]


def _moments(hh: float, scale: float, count: int) -> list[float]:
    """b_i = i! phi_{i+1}(hh) / B(h) hh, by phi_{i+1} = (phi_i - 1/i!) / hh."""
    values, factorial = [], 1.0
    phi = math.expm1(hh) / hh - 1.0
    for i in range(1, count + 1):
        values.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / hh - 1.0 / factorial
    return values


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with pivoting; at most 4 by 4."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(rows[i][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for i in range(size):
            if i != column:
                factor = rows[i][column] / rows[column][column]
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[column], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]
