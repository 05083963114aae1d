"""The plan that is chosen is the loop of diffusers' own class, whatever the settings."""

from __future__ import annotations

from typing import Any

import pytest

from mmd_export.errors import UsageError
from mmd_export.plans import choose_plan
from mmd_export.probe import largest_error
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan, resolve

STEPS, ROUNDING = 5, 1e-12
ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def config_of(name: str, **settings: Any) -> SchedulerConfig:
    return SchedulerConfig.from_dict({"_class_name": f"{name}Scheduler", **settings})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DEISMultistep", {"prediction_type": "flow_prediction"}),
        ("DEISMultistep", {"use_flow_sigmas": True, "prediction_type": "v_prediction"}),
        ("DPMSolverMultistep", {"use_karras_sigmas": True, "use_lu_lambdas": True}),
    ],
)  # fmt: skip
def test_settings_that_a_table_reads_otherwise_are_read_off_diffusers(name: str, settings: dict[str, Any]) -> None:
    config = config_of(name, **settings)
    chosen, _ = resolve(config, STEPS)
    assert largest_error(make_plan(config, STEPS), chosen, STEPS) > 0.1
    assert largest_error(choose_plan(config, STEPS), chosen, STEPS) <= ROUNDING


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"])
def test_a_flow_on_a_grid_of_betas_takes_the_levels_that_diffusers_lists(name: str) -> None:
    config = config_of(name, prediction_type="flow_prediction")
    chosen, _ = resolve(config, STEPS)
    assert largest_error(make_plan(config, STEPS), chosen, STEPS) <= ROUNDING


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("EulerDiscrete", "use_karras_sigmas"), ("EulerDiscrete", "use_exponential_sigmas"),
        ("EulerDiscrete", "use_beta_sigmas"), ("DPMSolverMultistep", "use_karras_sigmas"),
        ("DPMSolverMultistep", "use_lu_lambdas"), ("UniPCMultistep", "use_karras_sigmas"),
    ],
)  # fmt: skip
def test_levels_that_fall_at_the_end_have_the_timesteps_of_diffusers(name: str, spacing: str) -> None:
    """With zero terminal SNR on linear betas the last but one level is above the last, which diffusers caps."""
    config = config_of(name, **ZERO_SNR, **{spacing: True})
    chosen, _ = resolve(config, STEPS)
    assert largest_error(make_plan(config, STEPS), chosen, STEPS) < 1e-10
    assert largest_error(choose_plan(config, STEPS), chosen, STEPS) <= ROUNDING


def test_what_diffusers_refuses_is_refused() -> None:
    with pytest.raises(UsageError, match=r"shift_terminal is 0\.1 and use_flow_sigmas off; it needs flow sigmas"):
        choose_plan(config_of("UniPCMultistep", shift_terminal=0.1), STEPS)


def test_a_noise_level_that_rises_is_said_in_words() -> None:
    config = config_of(
        "EulerAncestralDiscrete", timestep_spacing="trailing", beta_schedule="scaled_linear", num_train_timesteps=4000,
        **ZERO_SNR,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"the noise level rises from .* to .*; choose another step count or spacing"):
        choose_plan(config, 13)
