"""Gaussian data has a closed-form sampler: exact gains, and the order of accuracy of each solver."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmd_export.ladder import GAUSSIAN_STD, GaussianDenoiser, exact_rung, gaussian_gains, scheduler_rung
from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan
from mmd_export.unroll import UnrolledSampler

# As good as continuous: 100,000 timesteps to alpha_bar = e^-10, as the usual 1,000 from 1e-4 to 0.02.
FINE: dict[str, Any] = {"num_train_timesteps": 100_000, "beta_start": 1e-6, "beta_end": 2e-4, "clip_sample": False}
STEPS = (25, 50, 100, 200, 400)


def config_of(**settings: Any) -> SchedulerConfig:
    return SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", **settings})


def response(plan: StepPlan, std: float = GAUSSIAN_STD) -> np.ndarray[Any, Any]:
    """What unit noise and every unit step noise contribute to the sample."""
    inputs = 1 + plan.noisy_steps
    basis = torch.eye(inputs, dtype=torch.float64).reshape(inputs, inputs, 1, 1, 1)  # input, image, C, H, W
    sampler = UnrolledSampler(GaussianDenoiser(plan, std), replace(plan, clamp_output=False))
    result: np.ndarray[Any, Any] = sampler(basis[0], basis[1:] if plan.noisy_steps else None).flatten().numpy()
    return result


def assert_first_order(errors: list[float]) -> None:
    """Halving the step halves the error, the better the finer; a wrong limit gives order 0."""
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders == sorted(orders), (errors, orders)
    assert 0.89 < orders[-1] < 1.05, (errors, orders)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("std", [0.25, 0.5, 2.0])
def test_ddim_is_of_first_order(spacing: str, prediction: str, std: float) -> None:
    """x_0 = x_T s / sqrt(alpha_T^2 s^2 + sigma_T^2), the probability-flow map of N(0, s^2)."""
    errors = []
    for steps in STEPS:
        plan = make_plan(config_of(**FINE, timestep_spacing=spacing, prediction_type=prediction), steps)
        alpha, sigma = plan.steps[0].alpha, plan.steps[0].sigma
        exact = std / math.sqrt(alpha**2 * std**2 + sigma**2)
        errors.append(abs(float(response(plan, std)[0]) / exact - 1))
    assert errors[-1] < 0.015
    assert_first_order(errors)


@pytest.mark.parametrize(("solver", "eta"), [("ddpm", None), ("ddim", 1.0), ("ddim", 0.5)])
def test_the_variance_of_stochastic_samples_converges(solver: str, eta: float | None) -> None:
    """Independent unit noises: the variance of the sample is the sum of the squared gains, and tends to s^2."""
    errors = []
    for steps in STEPS:
        plan = make_plan(config_of(**FINE), steps, sampler=solver, eta=eta)
        errors.append(abs(float((response(plan) ** 2).sum()) / GAUSSIAN_STD**2 - 1))
    assert errors[-1] < 0.04
    assert_first_order(errors)


def test_one_step_of_ddpm_is_the_posterior_mean() -> None:
    """From alpha_T to clean data in one step: E[x0 | x_T] = alpha s^2 / (alpha^2 s^2 + sigma^2) x_T, no noise."""
    plan = make_plan(config_of(timestep_spacing="trailing", clip_sample=False), 1, sampler="ddpm")
    alpha, sigma = plan.steps[0].alpha, plan.steps[0].sigma
    expected = alpha * GAUSSIAN_STD**2 / (alpha**2 * GAUSSIAN_STD**2 + sigma**2)
    assert response(plan) == pytest.approx([expected], rel=1e-12)


def test_ddim_with_eta_1_is_ddpm() -> None:
    """Song et al. 2021, section 4.1; the small posterior variance."""
    config = config_of(clip_sample=False)
    as_ddim, as_ddpm = (make_plan(config, 10, sampler="ddim", eta=1.0), make_plan(config, 10, sampler="ddpm"))
    np.testing.assert_allclose(response(as_ddim), response(as_ddpm), rtol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddim", {"eta": 0.0}),
        ("ddim", {"eta": 0.7}),
        ("ddim", {"eta": 1.0}),
        ("ddim", {"eta": 0.0, "set_alpha_to_one": False}),
        ("ddpm", {"variance_type": "fixed_small"}),
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddpm", {"variance_type": "fixed_small", "steps_offset": 1}),
    ],
    ids=str,
)
def test_rungs_1_and_2_of_every_plan(
    solver: str, options: dict[str, Any], steps: int, spacing: str, prediction: str
) -> None:
    settings = dict(options)
    eta = settings.pop("eta", None)
    config = config_of(**settings, prediction_type=prediction, timestep_spacing=spacing)
    plan = make_plan(config, steps, sampler=solver, eta=eta)
    exact, scheduler = exact_rung(plan, config), scheduler_rung(plan, config)
    assert exact.passed
    assert exact.worst <= 1e-11
    assert scheduler.passed
    assert scheduler.worst <= (5e-10 if solver == "ddpm" else 1e-12)  # DDPMScheduler clamps variances to 1e-20
    assert len(scheduler.comparisons) == steps
    assert len(gaussian_gains(plan, config)) == 1 + plan.noisy_steps


def test_rungs_1_and_2_from_pure_noise() -> None:
    """Zero terminal SNR at eta 1: 1 - alpha_bar - std^2 is 0 up to rounding, of either sign."""
    config = config_of(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    for steps in range(1, 40):
        plan = make_plan(config, steps, eta=1.0)
        assert exact_rung(plan, config).passed


def test_rung_2_of_a_schedule_that_diffusers_ddim_does_not_know() -> None:
    config = config_of(beta_schedule="sigmoid", prediction_type="v_prediction")
    assert scheduler_rung(make_plan(config, 5, sampler="ddim"), config).passed


def changed(plan: StepPlan, k: int, term: int, factor: float) -> StepPlan:
    """The plan with one weight multiplied."""
    step = plan.steps[k]
    update = list(step.update)
    update[term] = replace(update[term], weight=update[term].weight * factor)
    steps = (*plan.steps[:k], replace(step, update=tuple(update)), *plan.steps[k + 1 :])
    return replace(plan, steps=steps)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_rungs_1_and_2_find_any_wrong_weight(eta: float) -> None:
    config = config_of()
    plan = make_plan(config, 4, eta=eta)
    for k, step in enumerate(plan.steps):
        for term in range(len(step.update)):
            wrong = changed(plan, k, term, 1.001)
            assert not exact_rung(wrong, config).passed, (k, term)
            assert not scheduler_rung(wrong, config).passed, (k, term)
            first = scheduler_rung(wrong, config).failures[0]
            assert first.name == f"state.{k + 1}"


def test_rungs_1_and_2_find_a_wrong_eta_spacing_or_schedule() -> None:
    config = config_of(prediction_type="v_prediction")
    stochastic = make_plan(config, 5, eta=1.0)
    for label, wrong in {
        "eta": replace(make_plan(config, 5, eta=0.9), settings=stochastic.settings),
        "final level": make_plan(replace(config, set_alpha_to_one=False), 5, eta=0.0),
        "schedule": make_plan(replace(config, beta_end=0.021), 5, eta=0.0),
    }.items():
        assert not exact_rung(wrong, config).passed, label
        assert not scheduler_rung(wrong, config).passed, label


def test_rung_1_finds_the_wrong_variance_type() -> None:
    config = config_of(variance_type="fixed_large")
    small = make_plan(replace(config, variance_type="fixed_small"), 5, sampler="ddpm")
    lying = replace(small, settings=make_plan(config, 5, sampler="ddpm").settings)
    assert not exact_rung(lying, config).passed
    assert not scheduler_rung(lying, config).passed
