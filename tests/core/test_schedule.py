"""Settings that no plan can be made of are refused by name, with the value that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmd_export.errors import UsageError
from mmd_export.schedule import SchedulerConfig, alphas_cumprod
from mmd_export.solvers import ddim, make_plan

DDIM = {"_class_name": "DDIMScheduler"}
DDPM = {"_class_name": "DDPMScheduler"}


def refused(data: dict[str, Any], *words: str, steps: int = 5, **options: Any) -> None:
    with pytest.raises(UsageError) as error:
        make_plan(SchedulerConfig.from_dict(data), steps, **options)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["KarrasVeScheduler", "ddim", "", None, 3, ["DDIMScheduler"], {}], ids=repr)
def test_another_class(name: Any) -> None:
    refused({"_class_name": name, "sigma_data": 1}, repr(str(name)), "DDIMScheduler, DDPMScheduler")


def test_no_class() -> None:
    refused({"num_train_timesteps": 1000}, "_class_name is missing")


@pytest.mark.parametrize("key", ["beta_strat", "solver_order", "use_karras_sigmas", "class_name", "CLASSES"])
def test_an_unknown_key(key: str) -> None:
    refused({**DDIM, key: 1}, f"setting {key!r} is unknown", "beta_start")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("beta_schedule", "laplace", ("'laplace'", "linear, scaled_linear, squaredcos_cap_v2, sigmoid")),
        ("beta_schedule", "exp", ("'exp'",)),
        ("prediction_type", "flow_prediction", ("'flow_prediction'", "epsilon, v_prediction, sample")),
        ("timestep_spacing", "karras", ("'karras'", "leading, trailing, linspace")),
        ("variance_type", "fixed_large_log", ("'fixed_large_log'", "fixed_small, fixed_small_log, fixed_large")),
        ("thresholding", True, ("clip_sample",)),
        ("num_train_timesteps", 0, ("0", "at least 1")),
        ("num_train_timesteps", -5, ("-5",)),
        ("num_train_timesteps", "1000", ("'1000'", "str", "int")),
        ("num_train_timesteps", 1000.0, ("1000.0", "float", "int")),
        ("num_train_timesteps", True, ("True", "bool", "int")),
        ("beta_start", "1e-4", ("'1e-4'", "str", "float")),
        ("beta_end", None, ("None", "NoneType", "float")),
        ("beta_start", False, ("False", "bool", "float")),
        ("beta_start", 0.0, ("beta_start", "0", "(0, 1)")),
        ("beta_start", -1e-4, ("beta_start", "-0.0001", "(0, 1)")),
        ("beta_end", 1.5, ("beta_end", "1.5", "(0, 1)")),
        ("beta_end", float("nan"), ("beta_end", "nan")),
        ("beta_end", float("inf"), ("beta_end", "inf")),
        ("clip_sample", 1, ("1", "int", "bool")),
        ("clip_sample", "true", ("'true'", "str", "bool")),
        ("set_alpha_to_one", None, ("None", "NoneType", "bool")),
        ("clip_sample_range", 0, ("0", "positive")),
        ("clip_sample_range", -1.0, ("-1.0", "positive")),
        ("clip_sample_range", float("nan"), ("nan", "positive")),
        ("steps_offset", 0.5, ("0.5", "float", "int")),
        ("prediction_type", None, ("None", "NoneType", "str")),
        ("trained_betas", 0.1, ("0.1", "float", "list of numbers")),
        ("trained_betas", "abc", ("'abc'", "str", "list of numbers")),
        ("trained_betas", [0.1, "x"], ("'x'", "str", "number")),
        ("trained_betas", [0.1, 0.2], ("2 trained_betas", "1000 num_train_timesteps")),
    ],
    ids=str,
)
def test_a_setting_that_cannot_serve(key: str, value: Any, words: tuple[str, ...]) -> None:
    refused({**DDPM, key: value}, *words, *(() if key.startswith("beta_") and "(0, 1)" in words else (key,)))


def test_settings_that_thresholding_alone_reads_are_let_through() -> None:
    inert = {
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "_diffusers_version": "1",
    }
    assert SchedulerConfig.from_dict({**DDIM, **inert}) == SchedulerConfig.from_dict(DDIM)


@pytest.mark.parametrize(
    ("betas", "timestep"),
    [
        ([0.0, 0.1, 0.2], 0),
        ([0.1, -0.1, 0.2], 1),
        ([0.1, 1.0, 0.2], 1),
        ([0.1, 0.2, 1.1], 2),
        ([0.1, float("nan"), 0.2], 1),
    ],
)
def test_betas_that_are_none(betas: list[float], timestep: int) -> None:
    data = {**DDPM, "trained_betas": betas, "num_train_timesteps": 3}
    refused(data, f"timestep {timestep} has beta {betas[timestep]:g}", steps=2)


def test_a_last_beta_of_1_is_zero_terminal_snr() -> None:
    data = {**DDIM, "trained_betas": [0.1, 0.2, 1.0], "num_train_timesteps": 3, "prediction_type": "v_prediction"}
    assert alphas_cumprod(SchedulerConfig.from_dict(data)) == pytest.approx((0.9, 0.72, 0.0))
    assert make_plan(SchedulerConfig.from_dict(data), 3).steps[0].alpha == 0.0


def test_a_schedule_that_underflows() -> None:
    refused({**DDPM, "beta_start": 0.9, "beta_end": 0.9}, "alpha_bar 0 before it")


def test_zero_terminal_snr_of_one_timestep() -> None:
    refused({**DDPM, "num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr", "1", steps=1)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9])
def test_step_counts_that_are_none(steps: int, spacing: str) -> None:
    refused(DDIM, f"--steps is {steps}", "1000 timesteps", "1 to 1000", steps=steps, spacing=spacing)


@pytest.mark.parametrize("offset", [1, 1000, -1])
def test_an_offset_that_leaves_the_schedule(offset: int) -> None:
    outside = {1: 1000, 1000: 1999, -1: -1}[offset]
    refused(
        {**DDIM, "steps_offset": offset}, f"timestep {outside}", "0 ... 999", f"steps_offset is {offset}", steps=1000
    )


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_etas_that_are_none(eta: float) -> None:
    refused(DDIM, f"--eta is {eta}", "0 or more", eta=eta)


@pytest.mark.parametrize("eta", [1.5, 2.0, 100.0])
def test_an_eta_with_more_noise_than_the_level(eta: float) -> None:
    refused({**DDIM, "set_alpha_to_one": False}, f"--eta is {eta}", "timestep", "use 1 or less", steps=3, eta=eta)


def test_an_eta_a_little_above_1_is_possible_where_the_level_allows() -> None:
    assert ddim(SchedulerConfig.from_dict(DDIM), 1000, eta=1.01).noisy_steps == 999


def test_an_eta_for_another_sampler() -> None:
    refused(DDPM, "--eta 0.0 belongs to --sampler ddim", "ddpm", eta=0.0)


def test_an_unknown_sampler_or_spacing() -> None:
    refused(DDIM, "--sampler 'magic'", "ddim, ddpm", sampler="magic")
    refused(DDIM, "'karras'", "leading, trailing, linspace", spacing="karras")


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_epsilon_where_alpha_is_0(spacing: str, solver: str) -> None:
    data = {**DDIM, "rescale_betas_zero_snr": True}
    words = ("epsilon", "timestep 999", "rescale_betas_zero_snr", "v-prediction")
    refused(data, *words, spacing=spacing, sampler=solver)
    assert make_plan(SchedulerConfig.from_dict(data), 5, sampler=solver, spacing="leading").timesteps[0] == 800.0


def test_whole_numbers_serve_as_floats() -> None:
    """The same numbers are the same config, or two copies of a checkpoint would differ in their hash."""
    assert repr(SchedulerConfig.from_dict({**DDIM, "clip_sample_range": 1})) == repr(SchedulerConfig.from_dict(DDIM))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds list, not a JSON object"),
        (b'"DDIMScheduler"', "holds str, not a JSON object"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=rf"{re.escape(str(path))} {words}"):
        SchedulerConfig.from_file(path)


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"scheduler_config\.json does not exist"):
        SchedulerConfig.from_file(tmp_path / "scheduler_config.json")


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_what_diffusers_writes_is_read(tmp_path: Path, name: str) -> None:
    import diffusers

    getattr(diffusers, name)(clip_sample_range=2.0, steps_offset=1, beta_end=0.03).save_pretrained(tmp_path)
    config = SchedulerConfig.from_file(tmp_path / "scheduler_config.json")
    assert config == SchedulerConfig(class_name=name, clip_sample_range=2.0, steps_offset=1, beta_end=0.03)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == name
