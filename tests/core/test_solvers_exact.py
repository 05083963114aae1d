"""Gaussian data, where the probability-flow map is known: the order of accuracy of each solver, and rungs 1 and 2."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmd_export.errors import UsageError
from mmd_export.ladder import GAUSSIAN_STD, GaussianDenoiser, exact_rung, scheduler_rung
from mmd_export.plan import StepPlan
from mmd_export.plans import choose_plan
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import SOLVERS, make_plan
from mmd_export.unroll import UnrolledSampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# As good as continuous: 100,000 timesteps to alpha_bar = e^-10, as the usual 1,000 from 1e-4 to 0.02.
FINE: dict[str, Any] = {"num_train_timesteps": 100_000, "beta_start": 1e-6, "beta_end": 2e-4}
TO_MIN = {"final_sigmas_type": "sigma_min"}
THIRD = {"solver_order": 3, "euler_at_final": True}
EXPONENTIAL = {"sigma_schedule": "exponential"}
LU, KARRAS, EDM = {"use_lu_lambdas": True, **TO_MIN}, {"use_karras_sigmas": True}, {"sigma_data": 1.0, **TO_MIN}
S = GAUSSIAN_STD


def gain(plan: StepPlan) -> float:
    """What unit noise contributes to the sample."""
    sampler = UnrolledSampler(GaussianDenoiser(plan), replace(plan, clamp_output=False))
    return float(sampler(torch.ones(1, 1, 1, 1, dtype=torch.float64)))


def sigma_of(plan: StepPlan, k: int) -> float:
    """sigma / alpha at call k."""
    return plan.steps[k].sigma / plan.steps[k].alpha


def ve_gain(plan: StepPlan, last: float) -> float:
    """x = x0 + sigma eps: the map sqrt((s^2 + last^2) / (s^2 + first^2)) of the scaled noise."""
    return plan.initial_scale * math.hypot(S, last) / math.hypot(S, sigma_of(plan, 0))


def vp_gain(plan: StepPlan, last: float) -> float:
    """x = alpha x0 + sigma eps: the same map between the standard deviations of x."""
    first = math.hypot(plan.steps[0].alpha * S, plan.steps[0].sigma)
    return math.hypot(S, last) / math.hypot(1.0, last) / first


def flow_gain(plan: StepPlan, _last: float) -> float:
    """x = (1 - sigma) x0 + sigma eps, from the first level to data."""
    return S / math.hypot(plan.steps[0].alpha * S, plan.steps[0].sigma)


SIGMA_MIN = math.sqrt(1e-6 / (1 - 1e-6))
Gain = Callable[[StepPlan, float], float]
ORDERS: dict[str, tuple[str, dict[str, Any], int, Gain, float]] = {
    "euler": ("EulerDiscreteScheduler", {**FINE, **KARRAS, **TO_MIN}, 1, ve_gain, SIGMA_MIN),
    "heun": ("HeunDiscreteScheduler", {**FINE, **KARRAS}, 2, ve_gain, 0.0),
    "dpm 1": ("DPMSolverMultistepScheduler", {**FINE, **LU, "solver_order": 1}, 1, vp_gain, SIGMA_MIN),
    "dpm++ 2M": ("DPMSolverMultistepScheduler", {**FINE, **LU}, 2, vp_gain, SIGMA_MIN),
    "dpm 2M": ("DPMSolverMultistepScheduler", {**FINE, **LU, "algorithm_type": "dpmsolver"}, 2, vp_gain, SIGMA_MIN),
    # Its first step is of first order, whose error h^2 stays.
    "dpm++ 3M": ("DPMSolverMultistepScheduler", {**FINE, **LU, **THIRD}, 2, vp_gain, SIGMA_MIN),
    "dpm++ 2S": ("DPMSolverSinglestepScheduler", {**FINE, **KARRAS, **TO_MIN}, 2, vp_gain, SIGMA_MIN),
    "deis 2": ("DEISMultistepScheduler", {**FINE, **KARRAS}, 2, vp_gain, SIGMA_MIN),
    "unipc 2": ("UniPCMultistepScheduler", {**FINE, **KARRAS, **TO_MIN}, 3, vp_gain, SIGMA_MIN),  # its corrector adds 1
    "pndm": ("PNDMScheduler", {**FINE, "skip_prk_steps": True}, 1, vp_gain, 0.0),  # that of its start
    "edm euler": ("EDMEulerScheduler", EDM, 1, ve_gain, 0.002),
    "edm dpm++ 2M": ("EDMDPMSolverMultistepScheduler", {**EDM, **EXPONENTIAL}, 2, ve_gain, 0.002),
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 10**6}, 1, flow_gain, 0.0),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {"num_train_timesteps": 10**6}, 2, flow_gain, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_accuracy(name: str) -> None:
    """Twice the steps, 2^-p of the error."""
    class_name, settings, order, exact, last = ORDERS[name]
    config = SchedulerConfig.from_dict({"_class_name": class_name, **settings})
    errors = []
    for steps in (50, 100, 200, 400):
        plan = make_plan(config, steps)
        errors.append(abs(gain(plan) / exact(plan, last) - 1.0))
    found = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert abs(found[-1] - order) < 0.25, (errors, found)


@pytest.mark.parametrize("sampler", ["euler-ancestral", "dpmsolver-sde", "tcd"])
def test_the_variance_of_stochastic_samples_converges(sampler: str) -> None:
    """Independent unit noises: the variance of the sample is the sum of the squared gains, and tends to s^2."""
    config = SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", **FINE, "timestep_spacing": "linspace"})
    errors = []
    for steps in (12, 24, 48):
        plan = make_plan(config, steps, sampler=sampler, eta=0.0 if sampler == "tcd" else None)
        errors.append(abs(variance(plan) / S**2 - 1.0))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.7 * errors[0], errors


def test_lcm_jumps_to_the_posterior_mean_and_back() -> None:
    """Its variance, too small by design: of E[x0 | x], which takes a step's x up to the next level's noise."""
    config = SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", **FINE})
    plan = make_plan(config, 6, sampler="lcm")
    assert plan.noisy_steps == 5
    expected = 0.0
    for k, step in enumerate(plan.steps):
        level = step.alpha**2 * expected + step.sigma**2 if k else 1.0
        expected = (step.alpha * S**2 / (step.alpha**2 * S**2 + step.sigma**2)) ** 2 * level
    assert variance(plan) == pytest.approx(expected, rel=1e-6)


def test_consistency_jumps_to_its_guess_and_back() -> None:
    """Song et al. 2023, algorithm 1: the noise that it adds is that of the next level less the least.

    The guess is the posterior mean but for that least level, which takes the place of 0 in the two factors (eq. 5).
    """
    unit, least = 0.5, 0.002
    settings = {"_class_name": "CMStochasticIterativeScheduler", "sigma_data": unit, "sigma_min": least}
    plan = make_plan(SchedulerConfig.from_dict(settings), 4)
    expected, std = 0.0, unit * S
    for k in range(4):
        sigma = unit * sigma_of(plan, k)
        level = expected + sigma**2 - least**2 if k else sigma**2
        mean, skip = std**2 / (std**2 + sigma**2), unit**2 / (unit**2 + sigma**2)
        network = (mean - skip) / sigma  # that of EDM
        guess = unit**2 / (unit**2 + (sigma - least) ** 2) + (sigma - least) * network
        expected = guess**2 * level
    assert variance(plan) == pytest.approx(expected, rel=1e-6)


def variance(plan: StepPlan) -> float:
    """Of a sample of unit noises, which are independent: the sum of the squared gains."""
    inputs = 1 + plan.noisy_steps
    basis = torch.eye(inputs, dtype=torch.float64).reshape(inputs, inputs, 1, 1, 1)
    unrolled = UnrolledSampler(GaussianDenoiser(plan), replace(plan, clamp_output=False))
    gains = unrolled(basis[0], basis[1:] if plan.noisy_steps else None).flatten().numpy()
    return float(np.square(gains).sum())


def test_one_step_of_every_sampler_is_the_posterior_mean() -> None:
    """From the noisiest level to data in one step: E[x0 | x], whatever the order of the solver."""
    for sampler in ("euler", "heun", "dpmsolver", "dpmsolver-singlestep", "unipc", "euler-ancestral", "dpmsolver-sde"):
        plan = make_plan(SchedulerConfig(), 1, sampler=sampler, spacing=None if "single" in sampler else "trailing")
        alpha, sigma, scale = plan.steps[0].alpha, plan.steps[0].sigma, plan.steps[0].scale
        expected = plan.initial_scale * scale * alpha * S**2 / (alpha**2 * S**2 + sigma**2)
        assert gain(plan) == pytest.approx(expected, rel=1e-9), sampler


def test_the_denoiser_knows_flow_and_edm() -> None:
    flow = make_plan(SchedulerConfig.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler"}), 2)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    alpha, sigma = flow.steps[1].alpha, flow.steps[1].sigma
    variance = alpha**2 * S**2 + sigma**2
    assert float(GaussianDenoiser(flow)(x, 1)) == pytest.approx((sigma - alpha * S**2) / variance)
    edm = make_plan(SchedulerConfig.from_dict({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}), 3)
    v = replace(edm, prediction_type="v_prediction")
    assert float(GaussianDenoiser(edm)(x, 1)) == -float(GaussianDenoiser(v)(x, 1))
    with pytest.raises(UsageError, match="trigflow"):
        GaussianDenoiser(replace(edm, prediction_type="trigflow"))(x, 0)


# --- rungs 1 and 2


@pytest.mark.parametrize("sampler", [*SOLVERS, "lms", "kdpm2-ancestral"])
def test_rung_2_of_every_sampler(sampler: str) -> None:
    config = SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"})
    plan = choose_plan(config, 5, sampler=sampler)
    rung = scheduler_rung(plan, config)
    assert rung.passed, rung
    assert rung.worst <= 1e-12
    assert len(rung.comparisons) == plan.step_count
    first = exact_rung(plan, config)
    assert first.passed if sampler in ("ddim", "ddpm") else sampler in first.skipped


@pytest.mark.parametrize("sampler", ["heun", "dpmsolver", "unipc", "lcm", "flow-heun"])
def test_rung_2_finds_any_wrong_weight(sampler: str) -> None:
    config = SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"})
    plan = choose_plan(config, 4, sampler=sampler)
    for k, step in enumerate(plan.steps):
        for i, term in enumerate(step.update):
            if abs(term.weight) < 1e-6:  # LCM's c_skip
                continue
            update = (*step.update[:i], replace(term, weight=1.001 * term.weight), *step.update[i + 1 :])
            steps = (*plan.steps[:k], replace(step, update=update), *plan.steps[k + 1 :])
            rung = scheduler_rung(replace(plan, steps=steps), config)
            assert rung.failures[0].name == f"state.{k + 1}", (k, term)


def test_rung_2_says_when_diffusers_cannot_run_the_grid() -> None:
    config = SchedulerConfig()
    rung = scheduler_rung(choose_plan(config, None, timesteps=(900, 30)), config)
    assert rung.skipped == "--timesteps lists timesteps; diffusers' DDIMScheduler takes none of its own"
    assert exact_rung(choose_plan(config, None, timesteps=(900, 30)), config).passed
    assert exact_rung(choose_plan(config, 15, spacing="mmd-ddm"), config).passed
    assert scheduler_rung(choose_plan(config, 15, spacing="mmd-ddm"), config).passed
