"""Solvers of networks with EDM's preconditioning: D(x) = c_skip x + c_out F(c_in x); Karras et al. 2022, table 1."""

from __future__ import annotations

import math

from mmd_export.plan import PredictionType, StepPlan
from mmd_export.schedule import SchedulerConfig, linspace
from mmd_export.solvers.dpm import Node, Update, multistep, multistep_order, require_third_order
from mmd_export.solvers.grids import karras
from mmd_export.solvers.table import Form, Table

SAME_LEVEL = 1e-12  # relative; a karras grid ends on sigma_min but for rounding, which is no step


def edm_sigmas(config: SchedulerConfig, steps: int) -> list[float]:
    """The sigmas with the final one."""
    high, low = config["sigma_max"], config["sigma_min"]
    if config["sigma_schedule"] == "karras":
        sigmas = karras(high, low, steps, config["rho"])
    else:
        sigmas = [math.exp(x) for x in linspace(math.log(low), math.log(high), steps)][::-1]
    return sigmas


def call(table: Table, config: SchedulerConfig, sigma: float) -> tuple[Form, Form]:
    """F at c_in x and c_noise = log(sigma) / 4; of data of unit variance, x / sigma_data has the level below."""
    c_in = 1.0 / math.sqrt(sigma**2 + config["sigma_data"] ** 2)
    return table.call(0.25 * math.log(sigma), config["sigma_data"] * c_in, sigma * c_in, c_in)


def clean(config: SchedulerConfig, x: Form, output: Form, sigma: float) -> Form:
    """D = c_skip x + c_out F; diffusers' prediction_type v_prediction turns the sign of F."""
    data, total = config["sigma_data"], sigma**2 + config["sigma_data"] ** 2
    c_out = sigma * data / math.sqrt(total)
    guess: Form = (data**2 / total) * x + (-c_out if config.prediction_type == "v_prediction" else c_out) * output
    return guess


def _prediction(config: SchedulerConfig) -> PredictionType:
    """F is -v of the data scaled to unit variance."""
    return "v_prediction" if config.prediction_type == "v_prediction" else "edm"


def edm_euler(config: SchedulerConfig, steps: int) -> StepPlan:
    """Euler on dx / dsigma = (x - D) / sigma; Karras et al. 2022, algorithm 2 without churn."""
    sigmas = edm_sigmas(config, steps)
    final = sigmas[-1] if config["final_sigmas_type"] == "sigma_min" else 0.0
    table = Table()
    for sigma, after in zip(sigmas, [*sigmas[1:], final], strict=True):
        x, output = call(table, config, sigma)
        x0 = clean(config, x, output, sigma)
        table.advance(x + (after - sigma) * ((x - x0) / sigma))
    return _plan(table, "edm-euler", config, steps)


def edm_dpmsolver(config: SchedulerConfig, steps: int) -> StepPlan:
    """DPM-Solver++ of order 1 to 3 in x = x0 + sigma eps."""
    require_third_order(config, with_noise=True)
    sigmas = edm_sigmas(config, steps)
    final = config["sigma_min"] if config["final_sigmas_type"] == "sigma_min" else 0.0
    if math.isclose(final, sigmas[-1], rel_tol=SAME_LEVEL):
        final = sigmas[-1]
    nodes = [Node(1.0, sigma, sigma) for sigma in [*sigmas, final]]
    first_at_final = config["euler_at_final"] or final == 0.0
    table, models = Table(), list[Form]()
    for k, sigma in enumerate(sigmas):
        x, output = call(table, config, sigma)
        models.insert(0, clean(config, x, output, sigma))
        update = Update(config["algorithm_type"], nodes[k], nodes[k + 1])
        order = multistep_order(k, steps, config, first_at_final=first_at_final) if update.h else 1
        state = multistep(update, x, models[:order], nodes[k::-1], config["solver_type"])
        table.advance(state + table.noise(update.first()[2]))
    return _plan(table, "edm-dpmsolver", config, steps)


def _plan(table: Table, solver: str, config: SchedulerConfig, steps: int) -> StepPlan:
    initial = math.sqrt(config["sigma_max"] ** 2 + 1.0)
    settings = {"sigmas": config["sigma_schedule"], "final_sigmas_type": config["final_sigmas_type"]}
    return table.plan(solver, config, steps, prediction=_prediction(config), initial_scale=initial, settings=settings)
