"""DPM-Solver and DPM-Solver++, multistep and singlestep, ODE and SDE; Lu et al. 2022 (arXiv 2206.00927, 2211.01095).

Formulas as in diffusers' DPMSolverMultistepScheduler, with h = lambda_t - lambda_s, lambda = log(alpha / sigma).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmd_export.dynamic_shift import shift_of
from mmd_export.errors import UsageError
from mmd_export.plan import Scalar, StepPlan
from mmd_export.schedule import SchedulerConfig, linspace
from mmd_export.solvers.grids import (
    exponential,
    interpolate,
    require_free_sigmas,
    require_one_spacing,
    shifted,
    sigma_spacing,
    sigma_table,
    sigma_to_t,
    truncated,
    vp_grid,
)
from mmd_export.solvers.table import Form, Table

FEW = 15  # diffusers lowers the order of the last steps only below so many


@dataclass(frozen=True)
class Node:
    """x = alpha x0 + sigma eps at one point of the grid; ``listed``: the sigma by which diffusers lists the point."""

    alpha: float
    sigma: float
    listed: float

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the log of the signal-to-noise ratio."""
        return math.inf if self.sigma == 0.0 else math.log(self.alpha / self.sigma)

    @classmethod
    def of_sigma(cls, sigma: float, *, flow: bool = False) -> Node:
        """sigma / alpha of the variance-preserving process, or the sigma of a flow."""
        if flow:
            return cls(1.0 - sigma, sigma, sigma)
        alpha = 1.0 / math.sqrt(sigma**2 + 1.0)
        return cls(alpha, sigma * alpha, sigma)


def clean_of(prediction: str, node: Node, x: Form, output: Form) -> Form:
    """x0 from (x, output)."""
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return node.alpha * x - node.sigma * output
    if prediction == "flow_prediction":
        return x - node.listed * output
    return (x - node.sigma * output) / node.alpha


def noise_of(prediction: str, node: Node, x: Form, output: Form) -> Form:
    """Eps from (x, output)."""
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return node.alpha * output + node.sigma * x
    return (x - node.alpha * clean_of(prediction, node, x, output)) / node.sigma


@dataclass(frozen=True)
class Update:
    """x_t = x * state + d0 D0 + d1 D1 + d2 D2 + std z from node ``s`` to node ``t``; D_i are divided differences."""

    algorithm: str
    s: Node
    t: Node

    @property
    def h(self) -> float:
        return self.t.lam - self.s.lam

    @property
    def shrink(self) -> float:
        """exp(-h), 0 where t is clean data."""
        return (self.t.sigma * self.s.alpha) / (self.t.alpha * self.s.sigma)

    def first(self) -> tuple[float, float, float]:
        """(x, d0, std); D0 is x0 for the ++ forms and eps for the others."""
        s, t, e = self.s, self.t, self.shrink
        if self.algorithm == "dpmsolver++":
            return t.sigma / s.sigma, t.alpha * (1.0 - e), 0.0
        if self.algorithm == "sde-dpmsolver++":
            return t.sigma / s.sigma * e, t.alpha * (1.0 - e**2), t.sigma * math.sqrt(max(1.0 - e**2, 0.0))
        if self.algorithm == "dpmsolver":
            return t.alpha / s.alpha, -t.sigma * (1.0 / e - 1.0), 0.0
        return t.alpha / s.alpha, -2.0 * t.sigma * (1.0 / e - 1.0), t.sigma * math.sqrt(max(1.0 / e**2 - 1.0, 0.0))

    def second(self, solver_type: str) -> float:
        """d1: half of d0 for the midpoint, the exact integral for heun."""
        if solver_type == "midpoint":
            return 0.5 * self.first()[1]
        t, h, e = self.t, self.h, self.shrink
        if self.algorithm == "dpmsolver++":
            return t.alpha * ((e - 1.0) / h + 1.0)
        if self.algorithm == "sde-dpmsolver++":
            return t.alpha * ((1.0 - e**2) / (-2.0 * h) + 1.0)
        return (1.0 if self.algorithm == "dpmsolver" else 2.0) * -t.sigma * ((1.0 / e - 1.0) / h - 1.0)

    def third(self) -> float:
        """d2."""
        t, h, e = self.t, self.h, self.shrink
        if self.algorithm == "dpmsolver++":
            return -t.alpha * ((e - 1.0 + h) / h**2 - 0.5)
        if self.algorithm == "sde-dpmsolver++":
            return t.alpha * ((1.0 - e**2 - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
        return -t.sigma * ((1.0 / e - 1.0 - h) / h**2 - 0.5)


def multistep(update: Update, x: Form, models: Sequence[Form], nodes: Sequence[Node], solver_type: str) -> Form:
    """The next state from as many of the latest ``models`` at ``nodes`` as are given, the newest first."""
    scale, d0, _ = update.first()
    state, h = scale * x + d0 * models[0], update.h
    if len(models) == 1:
        return state
    back = nodes[0].lam - nodes[1].lam
    recent = (h / back) * (models[0] - models[1])
    if len(models) == 2:
        return state + update.second(solver_type) * recent
    r0, r1 = back / h, (nodes[1].lam - nodes[2].lam) / h
    older = (1.0 / r1) * (models[1] - models[2])
    slope = recent + (r0 / (r0 + r1)) * (recent - older)
    bend = (1.0 / (r0 + r1)) * (recent - older)
    return state + update.second("heun") * slope + update.third() * bend


def multistep_order(k: int, calls: int, config: SchedulerConfig, *, first_at_final: bool) -> int:
    """The order of call ``k``: no more than the outputs at hand, and lower at the end of a short chain."""
    lower, most = config["lower_order_final"] and calls < FEW, int(config["solver_order"])
    if k == calls - 1 and (lower or first_at_final):
        return 1
    if k == calls - 2 and lower:
        return min(2, k + 1, most)
    return min(k + 1, most)


def require_third_order(config: SchedulerConfig, *, with_noise: bool) -> None:
    """diffusers has no third order of some stochastic forms; raises UsageError for those."""
    algorithm = config["algorithm_type"]
    if config["solver_order"] == 3 and (algorithm == "sde-dpmsolver" or (with_noise and algorithm.startswith("sde"))):
        raise UsageError(f"scheduler: solver_order 3 is not defined for algorithm_type {algorithm!r}; use 1 or 2")


def _grid(config: SchedulerConfig, steps: int) -> tuple[list[int], list[float]]:
    """Timesteps, and the sigmas with the final one."""
    require_one_spacing(config)
    table, total = sigma_table(config), config.num_train_timesteps
    logs = [math.log(sigma) for sigma in table]
    last = table[0] if config["final_sigmas_type"] == "sigma_min" else 0.0
    if config["algorithm_type"] in ("dpmsolver", "sde-dpmsolver") and last == 0.0:
        raise UsageError(
            f"scheduler: algorithm_type {config['algorithm_type']!r} needs final_sigmas_type 'sigma_min', it is 'zero'"
        )
    grid = vp_grid(config, steps)
    if config.settings().get("use_lu_lambdas"):
        require_free_sigmas(config, "use_lu_lambdas")
        sigmas = exponential(table[-1], table[0], steps)
        times = [sigma_to_t(sigma, logs) for sigma in sigmas]
        return truncated(times if config.beta_schedule == "squaredcos_cap_v2" else map_round(times)), [*sigmas, last]
    if (spacing := sigma_spacing(config)) is not None:
        sigmas = spacing(table[-1], table[0], steps)
        times = [sigma_to_t(sigma, logs) for sigma in sigmas]
        exact = config["use_karras_sigmas"] and not (
            "use_lu_lambdas" in config.settings() and config.beta_schedule == "squaredcos_cap_v2"
        )
        return truncated(map_round(times) if exact else times), [*sigmas, last]
    if config["use_flow_sigmas"]:
        sigmas = [shifted(1.0 - a, shift_of(config)) for a in linspace(1.0, 1.0 / total, steps + 1)][:0:-1]
        return [int(sigma * total) for sigma in sigmas], [*sigmas, last]
    return grid, [*(interpolate(t, table) for t in grid), last]


def map_round(values: Sequence[float]) -> list[float]:
    """Each to the nearest whole number."""
    return [float(round(value)) for value in values]


def dpmsolver(config: SchedulerConfig, steps: int) -> StepPlan:
    """DPM-Solver(++) of order 1 to 3 from earlier outputs (2M, 3M); one network call a step."""
    require_third_order(config, with_noise=False)
    times, sigmas = _grid(config, steps)
    nodes = [Node.of_sigma(sigma, flow=config["use_flow_sigmas"]) for sigma in sigmas]
    first_at_final = config["euler_at_final"] or config["final_sigmas_type"] == "zero"
    table, models = Table(), list[Form]()
    for k, timestep in enumerate(times):
        x, output = table.call(timestep, nodes[k].alpha, nodes[k].sigma)
        models.insert(0, _model(config, nodes[k], x, output))
        order = multistep_order(k, len(times), config, first_at_final=first_at_final)
        update = Update(config["algorithm_type"], nodes[k], nodes[k + 1])
        past = nodes[k::-1]
        state = multistep(update, x, models[:order], past, config["solver_type"])
        table.advance(state + table.noise(update.first()[2]))
    return table.plan("dpmsolver", config, steps, settings=_settings(config))


def _model(config: SchedulerConfig, node: Node, x: Form, output: Form) -> Form:
    """What the solver extrapolates: x0 for the ++ forms, eps for the others."""
    kind = clean_of if config["algorithm_type"].endswith("++") else noise_of
    return kind(config.prediction_type, node, x, output)


def _settings(config: SchedulerConfig) -> dict[str, Scalar]:
    names = ("algorithm_type", "solver_order", "solver_type", "final_sigmas_type")
    return {name: config[name] for name in names}


def dpmsolver_singlestep(config: SchedulerConfig, steps: int) -> StepPlan:
    """DPM-Solver(++) in blocks of ``solver_order`` calls that each restart from the block's first state."""
    times, sigmas = _grid(config, steps)
    nodes = [Node.of_sigma(sigma, flow=config["use_flow_sigmas"]) for sigma in sigmas]
    table, models, start = Table(), list[Form](), 0
    states: list[Form] = []
    for k, (timestep, order) in enumerate(zip(times, _orders(config, len(times)), strict=True)):
        x, output = table.call(timestep, nodes[k].alpha, nodes[k].sigma)
        models.insert(0, _model(config, nodes[k], x, output))
        states.append(x)
        used = min(order, k + 1)
        start = k if used == 1 else start
        update = Update(config["algorithm_type"], nodes[k - used + 1], nodes[k + 1])
        base = [nodes[k - i] for i in range(used)]
        state = singlestep(update, states[start], models[:used], base, config["solver_type"])
        table.advance(state + table.noise(update.first()[2]))
    return table.plan("dpmsolver-singlestep", config, steps, settings=_settings(config))


def singlestep(update: Update, x: Form, models: Sequence[Form], nodes: Sequence[Node], solver_type: str) -> Form:
    """The state after a block so far: differences are taken from its first output, the last of ``models``."""
    scale, d0, _ = update.first()
    state, h = scale * x + d0 * models[-1], update.h
    if len(models) == 1:
        return state
    r0 = (nodes[0].lam - nodes[-1].lam) / h
    whole = (models[0] - models[-1]) / r0
    if len(models) == 2:
        return state + update.second(solver_type) * whole
    if solver_type == "midpoint":
        return state + update.second("heun") * whole
    r1 = (nodes[1].lam - nodes[-1].lam) / h
    part = (models[1] - models[-1]) / r1
    slope = (r0 * part - r1 * whole) / (r0 - r1)
    bend = (2.0 / (r0 - r1)) * (whole - part)
    return state + update.second("heun") * slope + update.third() * bend


def _orders(config: SchedulerConfig, steps: int) -> list[int]:
    """The order of every call, as diffusers' get_order_list: blocks 1, 2, 3, cut at the end."""
    order, final_zero = int(config["solver_order"]), config["final_sigmas_type"] == "zero"
    block = list(range(1, order + 1))
    whole = block * (steps // order)
    if not (config["lower_order_final"] or steps % order or final_zero) or order == 1:
        orders = whole
    elif order == 2:
        orders = [1, 2] * (steps // 2 - 1) + [1, 1] if steps % 2 == 0 else [*whole, 1]
    elif steps % 3 == 0:
        orders = block * (steps // 3 - 1) + [1, 2, 1]
    else:
        orders = [*whole, 1] if steps % 3 == 1 else [*whole, 1, 2]
    return [*orders[:-1], 1] if final_zero else orders
