"""Every table against diffusers' own scheduler and loop in float64, and against the prober: two independent sources."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from mmd_export.diffusers_loop import DiffusersLoop
from mmd_export.dynamic_shift import with_tokens
from mmd_export.plan import StepPlan
from mmd_export.plans import choose_plan, plan_again
from mmd_export.probe import largest_error, probe
from mmd_export.schedule import SchedulerConfig
from mmd_export.scheduler_keys import CLASSES
from mmd_export.solvers import SOLVERS, make_plan, resolve

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers 0.42 under numpy 2.4

STEPS = (1, 2, 3, 5, 10, 25)
ROUNDING = 1e-12
EPS_V, PREDICTIONS = ("epsilon", "v_prediction"), ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
SIGMAS: tuple[dict[str, Any], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)
ORDERS = (1, 2, 3)
Settings = dict[str, Any]


def crossed(**choices: tuple[Any, ...]) -> list[Settings]:
    """Every combination; a choice that is a dict is merged."""
    found: list[Settings] = []
    for values in itertools.product(*choices.values()):
        settings: Settings = {}
        for key, value in zip(choices, values, strict=True):
            settings |= value if isinstance(value, dict) else {key: value}
        found.append(settings)
    return found


LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DYNAMIC = {"use_dynamic_shifting": True, "max_shift": 1.3}
TOKENS = 900  # of the image that a dynamic shift is derived from
FINAL = ("zero", "sigma_min")
PLUS = ("dpmsolver++", "sde-dpmsolver++")
CASES: dict[str, list[Settings]] = {
    "EulerDiscreteScheduler": [
        *crossed(prediction_type=PREDICTIONS, timestep_spacing=SPACINGS, sigmas=SIGMAS),
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20},
        {"interpolation_type": "log_linear", "final_sigmas_type": "sigma_min"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "final_sigmas_type": "sigma_min"},
        {**LATENT, "timestep_spacing": "leading"},
    ],
    "EulerAncestralDiscreteScheduler": [
        *crossed(prediction_type=EPS_V, timestep_spacing=SPACINGS, rescale_betas_zero_snr=(False, True)),
        {**LATENT, "timestep_spacing": "leading"},
    ],
    "HeunDiscreteScheduler": [
        *crossed(prediction_type=PREDICTIONS, timestep_spacing=SPACINGS, sigmas=SIGMAS),
        *crossed(prediction_type=PREDICTIONS, sigmas=SIGMAS[:2], clip_sample=(True,)),
        {"beta_schedule": "exp"},
        {"clip_sample": True, "clip_sample_range": 2},
    ],
    "DPMSolverSDEScheduler": crossed(prediction_type=EPS_V, timestep_spacing=SPACINGS, sigmas=SIGMAS),
    "DPMSolverMultistepScheduler": [
        *crossed(
            prediction_type=PREDICTIONS, solver_order=ORDERS, algorithm_type=PLUS, solver_type=("midpoint", "heun")
        ),
        *crossed(
            prediction_type=PREDICTIONS, solver_order=ORDERS, algorithm_type=("dpmsolver",),
            solver_type=("midpoint", "heun"), final_sigmas_type=("sigma_min",),
        ),
        *crossed(
            prediction_type=PREDICTIONS, solver_order=(1, 2), algorithm_type=("sde-dpmsolver",),
            solver_type=("midpoint", "heun"), final_sigmas_type=("sigma_min",),
        ),
        *crossed(sigmas=(*SIGMAS, {"use_lu_lambdas": True}), timestep_spacing=SPACINGS, solver_order=(2, 3)),
        *crossed(lower_order_final=(True, False), euler_at_final=(True, False), final_sigmas_type=FINAL),
        *crossed(flow=(FLOW,), flow_shift=(1, 3), solver_order=(2, 3)),
        {**FLOW, **DYNAMIC},
        {"lambda_min_clipped": -5.1},
        {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {**LATENT, "timestep_spacing": "leading"},
    ],
    "DPMSolverSinglestepScheduler": [
        *crossed(
            prediction_type=PREDICTIONS, solver_order=ORDERS, algorithm_type=PLUS, solver_type=("midpoint", "heun"),
            lower_order_final=(True, False),
        ),
        *crossed(
            prediction_type=PREDICTIONS, solver_order=ORDERS, algorithm_type=("dpmsolver",),
            solver_type=("midpoint", "heun"), final_sigmas_type=("sigma_min",), lower_order_final=(True, False),
        ),
        *crossed(sigmas=SIGMAS, solver_order=(2, 3)),
        {**FLOW, "flow_shift": 3, "lower_order_final": True},
        {**FLOW, **DYNAMIC, "lower_order_final": True},
        {"lambda_min_clipped": -5.1},
    ],
    "DEISMultistepScheduler": [
        *crossed(prediction_type=PREDICTIONS, solver_order=ORDERS, lower_order_final=(True, False)),
        *crossed(sigmas=SIGMAS, timestep_spacing=SPACINGS, solver_order=(2, 3)),
        {**FLOW, "flow_shift": 3},
        {**FLOW, **DYNAMIC},
    ],
    "UniPCMultistepScheduler": [
        *crossed(
            prediction_type=PREDICTIONS, solver_order=ORDERS, solver_type=("bh1", "bh2"), predict_x0=(True, False),
            final_sigmas_type=("sigma_min",),
        ),
        *crossed(sigmas=SIGMAS, timestep_spacing=SPACINGS, solver_order=ORDERS),
        {"disable_corrector": [0, 2]},
        {**FLOW, "flow_shift": 3},
        {**FLOW, "use_karras_sigmas": True},
        {**FLOW, "shift_terminal": 0.1},
        *crossed(flow=({**FLOW, **DYNAMIC},), time_shift_type=("exponential", "linear"), shift_terminal=(None, 0.1)),
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"solver_order": 4, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20},
    ],
    "PNDMScheduler": [
        *crossed(prediction_type=EPS_V, skip_prk_steps=(True, False), set_alpha_to_one=(True, False)),
        *crossed(timestep_spacing=SPACINGS, skip_prk_steps=(True, False), steps_offset=(0, 1)),
    ],
    "LCMScheduler": [
        *crossed(prediction_type=PREDICTIONS, clip_sample=(False, True)),
        {"original_inference_steps": 100, "timestep_scaling": 5.0},
    ],
    "TCDScheduler": crossed(prediction_type=PREDICTIONS),
    "EDMEulerScheduler": crossed(
        prediction_type=EPS_V, sigma_schedule=("karras", "exponential"), final_sigmas_type=("zero", "sigma_min"),
        sigma_data=(0.5, 1),
    ),
    "EDMDPMSolverMultistepScheduler": [
        *crossed(
            prediction_type=EPS_V, sigma_schedule=("karras", "exponential"), solver_order=ORDERS,
            solver_type=("midpoint", "heun"),
        ),
        *crossed(final_sigmas_type=("zero", "sigma_min"), algorithm_type=PLUS, solver_order=(1, 2)),
        {"lower_order_final": False},
        {"euler_at_final": True},
    ],
    "FlowMatchEulerDiscreteScheduler": [
        *crossed(
            sigmas=SIGMAS, shift=(1, 3), stochastic_sampling=(False, True), invert_sigmas=(False, True),
            shift_terminal=(None, 0.1),
        ),
        *crossed(
            sigmas=SIGMAS, dynamic=(DYNAMIC,), shift=(1, 3), time_shift_type=("exponential", "linear"),
            shift_terminal=(None, 0.1),
        ),
        {**DYNAMIC, "stochastic_sampling": True, "invert_sigmas": True},
    ],
    "FlowMatchHeunDiscreteScheduler": [{}, {"shift": 3.0}],
    "CMStochasticIterativeScheduler": [{}, {"clip_denoised": False, "s_noise": 0.9}, {"sigma_data": 1, "rho": 5}],
    "DDIMScheduler": crossed(prediction_type=PREDICTIONS, clip_sample=(True, False), timestep_spacing=SPACINGS),
    "DDPMScheduler": crossed(prediction_type=PREDICTIONS, clip_sample=(True, False), timestep_spacing=SPACINGS),
}  # fmt: skip

TABLE = 1e-11  # some formulas lose a digit or two that diffusers' order of operations keeps; such tables are not chosen
# Its weights are up to 81 there, so that diffusers' own last state moves by as much when its noise changes by one bit.
STEEP = {"solver_order": 3, "algorithm_type": "dpmsolver", "lower_order_final": False}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # singlestep changes its own config and says so
    yield
    logging.disable(logging.NOTSET)


def config_of(class_name: str, settings: Settings) -> SchedulerConfig:
    return with_tokens(SchedulerConfig.from_dict({"_class_name": class_name, **settings}), TOKENS)


def plan_or_none(config: SchedulerConfig, steps: int) -> StepPlan | None:
    """None where the step count itself is refused: PNDM's start, a single flow level that is stretched."""
    if config.sampler == "pndm" and steps < 4 and not config["skip_prk_steps"]:
        return None
    if steps == 1 and config.settings().get("shift_terminal"):
        return None
    return make_plan(config, steps)


def test_every_class_with_a_table_is_tested() -> None:
    assert {CLASSES[name] for name in CASES} == set(SOLVERS)


@pytest.mark.parametrize("class_name", CASES)
def test_the_table_is_diffusers_own_loop(class_name: str) -> None:
    """Each setting at two of the step counts in turn; ``test_every_step_count`` has them all."""
    checked = 0
    for i, settings in enumerate(CASES[class_name]):
        config = config_of(class_name, settings)
        for steps in (STEPS[i % 6], STEPS[(i + 3) % 6]):
            if (plan := plan_or_none(config, steps)) is None:
                continue
            eta = plan.settings.get("eta")
            error = largest_error(plan, config, steps, eta)  # type: ignore[arg-type]
            assert error <= TABLE, (settings, steps)
            if error > ROUNDING:
                error = largest_error(choose_plan(config, steps), config, steps, eta)  # type: ignore[arg-type]
            assert error <= (3e-12 if steps == 3 and settings.items() >= STEEP.items() else ROUNDING), (settings, steps)
            loop = DiffusersLoop(config, steps, lambda like: like)
            assert plan.timesteps == pytest.approx(loop.timesteps, abs=1e-6), (settings, steps)
            checked += 1
    assert checked >= len(CASES[class_name])


@pytest.mark.parametrize("class_name", CASES)
def test_every_step_count(class_name: str) -> None:
    config = config_of(class_name, {"skip_prk_steps": True} if class_name == "PNDMScheduler" else {})
    for steps in STEPS:
        plan = make_plan(config, steps)
        eta = plan.settings.get("eta")
        assert largest_error(plan, config, steps, eta) <= ROUNDING, steps  # type: ignore[arg-type]
        calls = {"heun": 2 * steps - 1, "flow-heun": 2 * steps - 1, "dpmsolver-sde": 2 * steps - 1}
        calls["pndm"] = 1 if steps == 1 else steps + 1
        assert plan.step_count == calls.get(plan.solver, steps)
        assert plan.settings.get("calls", steps) == plan.step_count
        assert plan.settings.get("num_inference_steps", steps) == steps


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_with_every_gamma(eta: float) -> None:
    config = config_of("TCDScheduler", {})
    for steps in STEPS:
        plan = make_plan(config, steps, eta=eta)
        assert largest_error(plan, config, steps, eta) <= ROUNDING, steps
        assert plan.noisy_steps == (steps - 1 if eta else 0)


# --- the prober, the second source


def each_setting_once(cases: list[Settings]) -> list[Settings]:
    """The fewest first cases in which every setting of ``cases`` has each of its values."""
    seen: set[tuple[str, str]] = set()
    found = []
    for settings in cases:
        new = {(key, repr(value)) for key, value in settings.items()} - seen
        seen |= new
        found += [settings] if new else []
    return found


@pytest.mark.parametrize("class_name", CASES)
def test_the_prober_finds_the_same_sampler(class_name: str) -> None:
    """The weights themselves, where no state is a function of others; UniPC's can be written in two ways."""
    checked = 0
    for settings in ({}, *each_setting_once(CASES[class_name])):
        config = config_of(class_name, settings)
        for steps in (1, 3, 5) if not settings else (5,):
            if (plan := plan_or_none(config, steps)) is None:
                continue
            eta = plan.settings.get("eta")
            found = probe(config, steps, eta)  # type: ignore[arg-type]
            assert found.settings["source"] == "probed"
            assert largest_error(found, config, steps, eta) <= ROUNDING, (settings, steps)  # type: ignore[arg-type]
            if plan.solver not in ("unipc",):
                same_numbers(found, plan)
            checked += 1
    assert checked > len(each_setting_once(CASES[class_name]))


def same_numbers(found: StepPlan, plan: StepPlan) -> None:
    assert found.initial_scale == pytest.approx(plan.initial_scale, rel=1e-12)
    assert found.noisy_steps == plan.noisy_steps
    if any(step.clean for step in found.steps):
        assert found.clip == plan.clip
    for ours, theirs in zip(plan.steps, found.steps, strict=True):
        assert theirs.timestep == pytest.approx(ours.timestep, abs=1e-6)
        assert theirs.scale == pytest.approx(ours.scale, rel=1e-12)
        weights = [{(t.source, t.index): t.weight for t in step.update} for step in (ours, theirs)]
        largest = max(map(abs, weights[0].values()))
        for symbol in weights[0].keys() | weights[1].keys():
            both = [known.get(symbol, 0.0) for known in weights]
            assert both[0] == pytest.approx(both[1], abs=1e-11 * max(largest, 1.0)), symbol
        if theirs.clean is not None:
            assert ours.clean == pytest.approx(theirs.clean, rel=1e-11)


# --- grids that are listed


@pytest.mark.parametrize(
    "class_name",
    [
        "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler", "LCMScheduler", "TCDScheduler",
    ],
)  # fmt: skip
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_listed_timesteps(class_name: str, spacing: str) -> None:
    config = config_of(class_name, {"timestep_spacing": spacing, "prediction_type": "v_prediction"})
    for listed in ((999,), (999, 500), (981, 700, 300, 20, 3)):
        plan = make_plan(config, None, timesteps=listed)
        assert tuple(dict.fromkeys(plan.timesteps)) == listed
        chosen, steps = resolve(config, None, timesteps=listed)
        assert largest_error(plan, chosen, steps, plan.settings.get("eta")) <= ROUNDING  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("class_name", "settings", "grids"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, ((1000,), (1000, 500), (937.5, 700, 0.25))),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}, ((1000, 750, 62.5),)),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1, "invert_sigmas": True}, ((1000, 400, 3),)),
        ("FlowMatchEulerDiscreteScheduler", DYNAMIC, ((1000, 750, 62.5),)),
        ("CMStochasticIterativeScheduler", {}, ((39,), (22, 0), (39, 17, 5, 0))),
        ("CMStochasticIterativeScheduler", {"clip_denoised": False, "rho": 5.0}, ((38, 22, 1),)),
    ],
)
def test_listed_timesteps_of_flows_and_consistency_models(
    class_name: str, settings: Settings, grids: tuple[tuple[float, ...], ...]
) -> None:
    """From pure noise and between whole timesteps; consistency models are told logarithms of their noise levels."""
    config = config_of(class_name, settings)
    for listed in grids:
        plan = make_plan(config, None, timesteps=listed)
        chosen, steps = resolve(config, None, timesteps=listed)
        assert largest_error(plan, chosen, steps) <= ROUNDING
        loop = DiffusersLoop(chosen, steps, lambda like: like)
        assert plan.timesteps == pytest.approx(loop.timesteps, abs=1e-6)
        if config.sampler == "flow-euler" and not settings.get("invert_sigmas"):
            assert plan.timesteps == listed
        assert plan_again(plan, config).digest() == plan.digest()


@pytest.mark.parametrize(
    "sampler", ["ddim", "ddpm", "euler", "heun", "dpmsolver", "dpmsolver-singlestep", "lcm", "tcd"]
)
def test_mmd_ddms_grid(sampler: str) -> None:
    for steps in (1, 3, 5, 10, 15):
        grid = tuple(reversed(range(0, 1000, 1000 // steps)))
        config = config_of("DDIMScheduler", {"set_alpha_to_one": False})
        plan = make_plan(config, steps, sampler=sampler, spacing="mmd-ddm")
        assert tuple(dict.fromkeys(plan.timesteps)) == grid
        chosen, _ = resolve(config, steps, sampler=sampler, spacing="mmd-ddm")
        assert largest_error(plan, chosen, steps, plan.settings.get("eta")) <= ROUNDING  # type: ignore[arg-type]


def test_mmd_ddms_grid_says_how_many_calls_it_makes() -> None:
    plan = make_plan(SchedulerConfig(), 15, spacing="mmd-ddm")
    assert plan.step_count == 16
    assert (plan.settings["num_inference_steps"], plan.settings["calls"]) == (15, 16)
    assert plan.steps[-1].timestep == 0.0
    assert make_plan(SchedulerConfig(), 5, spacing="mmd-ddm").digest() == make_plan(SchedulerConfig(), 5).digest()


def test_a_listed_grid_equals_the_named_one() -> None:
    config = config_of("DDIMScheduler", {"timestep_spacing": "leading"})
    for sampler in ("ddim", "ddpm", "euler", "euler-ancestral", "dpmsolver", "deis", "unipc"):
        named = make_plan(config, 5, sampler=sampler)
        listed = make_plan(config, None, sampler=sampler, timesteps=[int(t) for t in named.timesteps])
        assert listed.digest() == named.digest(), sampler
