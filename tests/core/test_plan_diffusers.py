"""Plans against diffusers' own schedulers, the settings of a schedule one by one and together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig, alphas_cumprod, timestep_grid
from mmd_export.solvers import make_plan
from mmd_export.unroll import UnrolledSampler
from tests.models import Bent, bent

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
T = 1000
TRAINED = np.geomspace(1e-4, 3e-2, T).tolist()
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "trained_betas": {"trained_betas": TRAINED},
    "short": {"num_train_timesteps": 77, "beta_end": 0.2},
}
CLASSES = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}
OWN = {"ddim": ("set_alpha_to_one",), "ddpm": ("variance_type",)}


def config_of(**settings: Any) -> SchedulerConfig:
    return SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", **settings})


def numpy_table(config: SchedulerConfig) -> NDArray[np.float64]:
    """alpha_bar once more, in numpy: this file trusts nothing of mmd_export.schedule."""
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas)
    elif config.beta_schedule == "linear":
        betas = np.linspace(start, end, count)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    elif config.beta_schedule == "sigmoid":
        betas = start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, count)))
    else:
        level = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    table = np.cumprod(1 - betas)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(table)
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return table


def diffusers_scheduler(config: SchedulerConfig, plan: StepPlan, *, float64: bool = True) -> Any:
    """diffusers' scheduler of the same settings on the plan's grid; its tables in float64 unless asked otherwise."""
    others = {key for solver, keys in OWN.items() if solver != plan.solver for key in keys}
    settings = {key: value for key, value in config.settings().items() if key not in others}
    if config.trained_betas is not None:
        settings["trained_betas"] = list(config.trained_betas)
    scheduler = getattr(diffusers, CLASSES[plan.solver])(**settings)
    if float64:
        scheduler.alphas_cumprod = torch.from_numpy(numpy_table(config))
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
        if plan.solver == "ddim":
            first = scheduler.alphas_cumprod[0]
            scheduler.final_alpha_cumprod = scheduler.one if config.set_alpha_to_one else first
    scheduler.set_timesteps(plan.step_count)
    scheduler.timesteps = torch.tensor([int(t) for t in plan.timesteps])
    return scheduler


def diffusers_states(
    scheduler: Any, plan: StepPlan, noise: Tensor, step_noise: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """diffusers' loop. Its DDPM draws its own noise, so what draws is replaced."""
    given: list[Tensor] = []
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: given[0])
    x, states, drawn = noise * scheduler.init_noise_sigma, [], iter(() if step_noise is None else step_noise)
    for k, t in enumerate(scheduler.timesteps):
        noisy = any(term.source == "noise" for term in plan.steps[k].update)
        given[:] = [next(drawn) if noisy else torch.zeros_like(x)]
        output = bent(scheduler.scale_model_input(x, t), float(t))
        if plan.solver == "ddim":
            eta = float(plan.settings["eta"] or 0.0)
            x = scheduler.step(output, int(t), x, eta=eta, variance_noise=given[0] if eta else None).prev_sample
        else:
            x = scheduler.step(output, int(t), x).prev_sample
        states.append(x)
    assert next(drawn, None) is None
    return states


def inputs_of(plan: StepPlan) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(plan.step_count)
    noise = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=generator)
    if not plan.noisy_steps:
        return noise, None
    return noise, torch.randn(plan.noisy_steps, *noise.shape, dtype=torch.float64, generator=generator)


def relative_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest error of a state relative to that state's largest value."""
    assert len(ours) == len(theirs) > 0
    assert all(bool(torch.isfinite(b).all()) for b in theirs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def error_of(
    config: SchedulerConfig, plan: StepPlan, monkeypatch: pytest.MonkeyPatch, *, float64: bool = True
) -> float:
    noise, step_noise = inputs_of(plan)
    ours = list(UnrolledSampler(Bent(plan), plan).chain(noise, step_noise))
    scheduler = diffusers_scheduler(config, plan, float64=float64)
    return relative_error(ours, diffusers_states(scheduler, plan, noise, step_noise, monkeypatch))


# --- the same chain


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_is_diffusers_ddim(
    prediction: str, spacing: str, clip: bool, to_one: bool, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(prediction_type=prediction, timestep_spacing=spacing, clip_sample=clip, set_alpha_to_one=to_one)
    for steps in (1, 2, 7):
        plan = make_plan(config, steps, sampler="ddim", eta=eta)
        assert error_of(config, plan, monkeypatch) <= 1e-12, steps


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_is_diffusers_ddpm(
    prediction: str, spacing: str, clip: bool, variance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(prediction_type=prediction, timestep_spacing=spacing, clip_sample=clip, variance_type=variance)
    for steps in (1, 2, 7):
        plan = make_plan(config, steps, sampler="ddpm")
        assert error_of(config, plan, monkeypatch) <= 1e-12, steps


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_beta_schedule(schedule: str, solver: str, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if (schedule, solver) == ("sigmoid", "ddim"):
        schedule = "linear"  # diffusers' DDIMScheduler has no sigmoid; ours is the same table whatever the solver
    config = config_of(**SCHEDULES[schedule], steps_offset=offset, prediction_type="v_prediction")
    for steps in (5, 16):
        plan = make_plan(config, steps, sampler=solver, eta=0.5 if solver == "ddim" else None)
        assert plan.timesteps[-1] == offset
        assert error_of(config, plan, monkeypatch) <= 1e-12, steps


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("clip_range", [0.3, 1, 4.5])
def test_the_clip_range(clip_range: float, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(clip_sample_range=clip_range)
    plan = make_plan(config, 5, sampler=solver)
    assert error_of(config, plan, monkeypatch) <= 1e-12
    wider = make_plan(config_of(clip_sample_range=2 * clip_range), 5, sampler=solver)
    assert error_of(config, wider, monkeypatch) > 1e-3  # the range matters for these inputs


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr(schedule: str, spacing: str, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(
        **SCHEDULES[schedule], rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing=spacing
    )
    assert alphas_cumprod(config)[-1] == 0.0
    for steps in (1, 2, 3, 4, 5, 10, 12, 13):
        plan = make_plan(config, steps, sampler="ddim", eta=eta)
        expected = 0.0 if spacing == "trailing" or (spacing == "linspace" and steps > 1) else None
        assert expected is None or plan.steps[0].alpha == expected
        noise, step_noise = inputs_of(plan)
        ours = list(UnrolledSampler(Bent(plan), plan).chain(noise, step_noise))
        theirs = diffusers_states(diffusers_scheduler(config, plan), plan, noise, step_noise, monkeypatch)
        if eta < 1.0 or bool(torch.isfinite(theirs[0]).all()):  # at eta 1 diffusers' own root may be of -1e-17
            assert relative_error(ours, theirs) <= 1e-12, steps
        else:
            assert all(bool(torch.isfinite(state).all()) for state in ours)


@pytest.mark.parametrize("steps", [1, 7, 50, 333, 1000])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_long_chains(solver: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    plan = make_plan(config, steps, sampler=solver, eta=0.5 if solver == "ddim" else None)
    assert error_of(config, plan, monkeypatch) <= 1e-12


def test_the_dropped_noise_of_ddpm_is_negligible(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps_offset 1 diffusers still adds 1e-10 z at the last step, a variance clamped to 1e-20."""
    config = config_of(steps_offset=1, clip_sample=False)
    plan = make_plan(config, 5, sampler="ddpm")
    assert plan.noisy_steps == 4
    scheduler = diffusers_scheduler(config, plan)
    noise, x = torch.full((1, 1, 2, 2), 3.0, dtype=torch.float64), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    theirs = scheduler.step(0.2 * x, 1, x).prev_sample
    update = {term.source: term.weight for term in plan.steps[-1].update}
    ours = update["state"] * x + update["output"] * 0.2 * x
    assert 0 < float((ours - theirs).abs().max()) <= 1e-9


# --- the unpatched scheduler, so that the patch cannot hide an error of the schedule


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_the_float32_scheduler(solver: str, prediction: str, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(prediction_type=prediction, timestep_spacing=spacing)
    for steps in (2, 5, 10):
        plan = make_plan(config, steps, sampler=solver, eta=0.5 if solver == "ddim" else None)
        assert error_of(config, plan, monkeypatch, float64=False) <= 1e-5, steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_float32_table(schedule: str) -> None:
    config = config_of(**SCHEDULES[schedule])
    scheduler = diffusers_scheduler(config, make_plan(config, 2, sampler="ddpm"), float64=False)
    theirs = scheduler.alphas_cumprod.double().numpy()
    capped = 1 - np.array(alphas_cumprod(config)[1:]) / alphas_cumprod(config)[:-1] > 0.99  # 1 - beta has 4 digits left
    ours = np.array(alphas_cumprod(config))
    np.testing.assert_allclose(ours[1:][~capped], theirs[1:][~capped], rtol=1e-5, atol=0)
    np.testing.assert_allclose(ours, theirs, rtol=3e-5, atol=0)
    np.testing.assert_allclose(ours, numpy_table(config), rtol=1e-13, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_the_float32_table_of_zero_terminal_snr(schedule: str) -> None:
    config = config_of(**SCHEDULES[schedule], rescale_betas_zero_snr=True)
    scheduler = diffusers_scheduler(config, make_plan(config, 2, sampler="ddpm"), float64=False)
    theirs = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(alphas_cumprod(config), theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(alphas_cumprod(config), numpy_table(config), rtol=1e-12, atol=0)


# --- the grid


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_gives_that_many_calls(spacing: str, offset: int) -> None:
    config = config_of(timestep_spacing=spacing, steps_offset=offset)
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    equal = 0
    for steps in range(1, T + 1):
        if offset and spacing == "leading" and T // steps * (steps - 1) + offset >= T:
            continue  # the grid would leave the schedule: refused, see test_schedule
        grid = timestep_grid(config, steps)
        assert len(grid) == steps
        assert all(later < earlier for earlier, later in itertools.pairwise(grid))
        assert 0 <= grid[-1] <= grid[0] < T
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()
        if len(theirs) == steps:
            assert list(grid) == theirs
            equal += 1
        else:
            assert list(grid) == theirs[:steps]
    assert equal > 900


def test_mmd_ddms_own_grid() -> None:
    """Its code visits range(0, 1000, 1000 // K) backwards, K calls where K divides 1000."""
    for steps in (5, 10, 20, 25, 50):
        assert timestep_grid(config_of(), steps) == tuple(reversed(range(0, T, T // steps)))


def test_by_hand_one_step() -> None:
    """K = 1, leading: the network sees t = 0 and x0 = (x - sigma eps) / alpha is the sample."""
    plan = make_plan(config_of(clip_sample=False), 1)
    alpha = math.sqrt(1 - 1e-4)
    assert plan.timesteps == (0.0,)
    weights = {term.source: term.weight for term in plan.steps[0].update}
    assert weights == pytest.approx({"state": 1 / alpha, "output": -math.sqrt(1e-4) / alpha}, rel=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_the_measure_notices_small_errors(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    for name, value in (("beta_end", 0.0200001), ("beta_start", 0.00010001)):
        wrong = make_plan(config_of(**{name: value}), 5, sampler=solver)
        assert error_of(config, wrong, monkeypatch) > 1e-12
