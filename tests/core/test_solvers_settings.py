"""Scheduler configs of every class: what is read, what is let through, and what is refused by name."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmd_export.checkpoints.agreement import require_agreement, require_same_prediction
from mmd_export.diffusers_loop import scheduler_class
from mmd_export.errors import UsageError
from mmd_export.plans import choose_plan, plan_again
from mmd_export.probe import largest_error
from mmd_export.schedule import SchedulerConfig
from mmd_export.scheduler_keys import CLASSES, FIXED_PREDICTION, KEYS
from mmd_export.solvers import SOLVERS, make_plan, resolve
from mmd_export.solvers.beta_quantile import beta_quantile

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROUNDING = 1e-12
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
THRESHOLDING = {"thresholding", "dynamic_thresholding_ratio", "sample_max_value"}


def config_of(class_name: str, **settings: Any) -> SchedulerConfig:
    return SchedulerConfig.from_dict({"_class_name": class_name, **settings})


def refused(class_name: str, settings: dict[str, Any], *words: str, steps: int | None = 5, **options: Any) -> None:
    with pytest.raises(UsageError) as error:
        make_plan(config_of(class_name, **settings), steps, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("class_name", KEYS)
def test_settings_and_defaults_are_those_of_diffusers(class_name: str) -> None:
    """One table, checked against the signature of the class that is installed."""
    parameters = inspect.signature(scheduler_class(class_name).__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name not in {"self", *THRESHOLDING}}
    ours = dict(KEYS[class_name])
    if class_name in ("DDIMScheduler", "DDPMScheduler"):  # one table for both
        ours = {key: value for key, value in ours.items() if key in theirs}
    if class_name != "DDPMScheduler":
        theirs.pop("variance_type", None)
    assert ours.pop("disable_corrector", ()) == ()
    theirs.pop("disable_corrector", None)
    assert ours == theirs


@pytest.mark.parametrize("class_name", KEYS)
def test_what_diffusers_writes_is_read(class_name: str, tmp_path: Path) -> None:
    scheduler_class(class_name)().save_pretrained(tmp_path)
    config = SchedulerConfig.from_file(tmp_path / "scheduler_config.json")
    assert config == config_of(class_name)
    assert config.sampler == CLASSES[class_name]
    settings = json.loads(json.dumps(config.settings()))
    assert SchedulerConfig.from_dict({"_class_name": class_name, **settings}) == config


STABLE_DIFFUSION_XL: dict[str, Any] = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading",
    "trained_betas": None, "use_karras_sigmas": False, "_diffusers_version": "0.19.0.dev0",
}  # fmt: skip


@pytest.mark.parametrize(
    "class_name",
    [
        "EulerDiscreteScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_settings_that_schedulers_leave_in_each_others_configs(class_name: str) -> None:
    """diffusers keeps them when one scheduler is made from another's config; Stable Diffusion XL's is such a file."""
    assert make_plan(config_of(class_name, **STABLE_DIFFUSION_XL), 4).step_count >= 4


# Schedulers of Stable Diffusion 1.5 and XL and of google/ddpm-cifar10-32, as published; the last is a part of PixArt's.
_SD = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": {**_SD, "_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True,
             "steps_offset": 1, "trained_betas": None, "clip_sample": False},
    "sdxl": {**STABLE_DIFFUSION_XL, "_class_name": "EulerDiscreteScheduler"},
    "cifar10": {"_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
                "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
                "variance_type": "fixed_large"},
    "pixart": {"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.02, "beta_schedule": "linear",
               "beta_start": 0.0001, "num_train_timesteps": 1000, "solver_order": 2, "variance_type": None},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_another_class_gets_what_from_config_gives_it(name: str) -> None:
    """What the file says goes over, for whatever class it is; what it leaves to its own class' default does not."""
    data = PUBLISHED[name]
    own = scheduler_class(data["_class_name"]).from_config(data)
    config, checked = SchedulerConfig.from_dict(data), 0
    for class_name in KEYS:
        if class_name in ("DPMSolverSDEScheduler", "SCMScheduler"):  # needs torchsde; predicts another thing
            continue
        theirs = scheduler_class(class_name).from_config(own.config).config
        ours = config.as_class(class_name).settings()
        ours.pop("disable_corrector", None)
        for key in ours.keys() & theirs.keys():
            expected = "fixed_small" if key == "variance_type" and theirs[key] is None else theirs[key]
            assert ours[key] == expected, (class_name, key)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "DDPMScheduler"])
def test_no_variance_type_is_the_small_one(class_name: str, tmp_path: Path) -> None:
    """diffusers writes null, DPM-Solver's own default, into the config of a scheduler that is made from its file."""
    scheduler_class("DPMSolverMultistepScheduler")().save_pretrained(tmp_path)
    scheduler_class(class_name).from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["variance_type"] is None
    config = SchedulerConfig.from_file(tmp_path / "scheduler_config.json")
    assert config["variance_type"] == config.as_class("DDPMScheduler")["variance_type"] == "fixed_small"
    theirs = scheduler_class("DDPMScheduler").from_pretrained(tmp_path)
    small = scheduler_class("DDPMScheduler")(variance_type="fixed_small")
    for t in (999, 400, 1):
        assert float(theirs._get_variance(t)) == float(small._get_variance(t)) > 0.0


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True, "shift": 3.0}),
    ],
)
def test_the_levels_that_a_network_was_trained_on_stay(class_name: str, settings: dict[str, Any]) -> None:
    """A sampler whose class has no setting for them is refused, with those that have."""
    config, key = config_of(class_name, **settings), next(iter(settings))
    with_it = [CLASSES[name] for name in KEYS if key in KEYS[name]]
    assert 0 < len(with_it) < len(CLASSES)
    for sampler in CLASSES.values():
        if sampler in with_it:
            assert resolve(config, 5, sampler=sampler)[0][key] is True
            continue
        with pytest.raises(UsageError) as error:
            resolve(config, 5, sampler=sampler)
        assert f"--sampler {sampler}: {class_name} has {key} True" in str(error.value)
        assert ", ".join(with_it) in str(error.value)
    off = config_of(class_name, **{**settings, key: False})
    assert all(not resolve(off, 5, sampler=sampler)[0].get(key) for sampler in CLASSES.values())


@pytest.mark.parametrize("sampler", ["flow-euler", "flow-heun"])
@pytest.mark.parametrize("class_name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_the_shift_of_a_flow_is_kept_under_either_name(class_name: str, sampler: str) -> None:
    """flow_shift is shift: Sana was trained on levels s sigma / (1 + (s - 1) sigma), whatever sampler runs it."""
    of_flow = config_of("FlowMatchEulerDiscreteScheduler", shift=3.0)
    for more in ({}, {"shift": 1.0}):  # which a config may carry along
        plan = choose_plan(config_of(class_name, **FLOW, flow_shift=3.0, **more), 4, sampler=sampler)
        assert plan.digest() == choose_plan(of_flow, 4, sampler=sampler).digest()
    without = config_of(class_name, flow_shift=3.0)  # says nothing without use_flow_sigmas
    assert resolve(without, 4, sampler=sampler)[0]["shift"] == 1.0


def test_a_config_that_was_changed_goes_over_as_it_is() -> None:
    config = SchedulerConfig.from_dict(PUBLISHED["cifar10"])
    changed = replace(config, variance_type="fixed_small").as_class("DDIMScheduler").as_class("DDPMScheduler")
    assert changed["variance_type"] == "fixed_small"
    silent = SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", "clip_sample": False})
    for sampler in ("LCMScheduler", "HeunDiscreteScheduler"):  # whose own defaults are other levels
        assert silent.as_class(sampler)["beta_end"] == SchedulerConfig().as_class(sampler)["beta_end"] == 0.02
    assert SchedulerConfig(clip_sample=False).stated()["beta_end"] == 0.02  # for those who read what is written of it


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver", "pndm", "euler", "ddpm"])
def test_another_sampler_of_stable_diffusion_is_diffusers_own_loop(sampler: str) -> None:
    config = SchedulerConfig.from_dict(PUBLISHED["sdxl"])
    plan = choose_plan(config, 5, sampler=sampler)
    assert plan.clip is None
    chosen, count = resolve(config, 5, sampler=sampler)
    eta = plan.settings.get("eta")
    theirs = scheduler_class(chosen.class_name).from_config(PUBLISHED["sdxl"])
    theirs.set_timesteps(count)
    assert [round(float(t), 3) for t in theirs.timesteps] == [round(t, 3) for t in plan.timesteps]
    assert largest_error(plan, chosen, count, None if eta is None else float(eta)) <= ROUNDING


@pytest.mark.parametrize("sampler", SOLVERS)
def test_another_sampler_for_the_same_model(sampler: str) -> None:
    """The schedule is carried over, the rest is the class's own default."""
    config = config_of("DDIMScheduler", beta_schedule="scaled_linear", prediction_type="v_prediction", beta_end=0.012)
    plan = make_plan(config, 4, sampler=sampler)
    assert plan.solver == sampler
    assert plan_again(plan, config).digest() == plan.digest()
    if sampler in FIXED_PREDICTION:
        with pytest.raises(UsageError, match=f"m: the model predicts v_prediction, --sampler {sampler} expects "):
            require_same_prediction(config, sampler, "m")
        return
    require_same_prediction(config, sampler, "m")
    assert plan.prediction_type == "v_prediction"
    assert plan.settings["beta_schedule"] == "scaled_linear"


@pytest.mark.parametrize(
    ("class_name", "settings", "fits", "differs"),
    [
        ("DDIMScheduler", {}, ("ddpm", "lcm", "sa-solver"), ("flow-euler", "consistency", "edm-euler", "scm", "ipndm")),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, ("euler",), ("edm-euler", "ipndm", "flow-heun")),
        ("FlowMatchEulerDiscreteScheduler", {}, ("flow-heun",), ("ddim", "dpmsolver", "edm-euler")),
        ("UniPCMultistepScheduler", FLOW, ("flow-euler", "dpmsolver"), ("consistency",)),
        ("EDMEulerScheduler", {}, ("edm-dpmsolver",), ("ddim", "euler", "flow-euler", "consistency")),
        ("CMStochasticIterativeScheduler", {}, ("consistency",), ("edm-euler", "ddim")),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, ("edm-dpmsolver",), ("consistency", "ddim")),
        ("SCMScheduler", {}, ("scm",), ("consistency",)),
    ],
)  # fmt: skip
def test_a_sampler_of_another_kind(
    class_name: str, settings: dict[str, Any], fits: tuple[str, ...], differs: tuple[str, ...]
) -> None:
    """Flow, EDM and trigonometric networks say what they predict by the class of their scheduler alone."""
    config = config_of(class_name, **settings)
    for sampler in fits:
        require_same_prediction(config, sampler, "m")
    for sampler in differs:
        with pytest.raises(UsageError, match=rf"predicts {config.predicts}, --sampler {sampler} expects [a-z]"):
            require_same_prediction(config, sampler, "m")


@pytest.mark.parametrize(
    ("class_name", "settings", "stated", "other"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, ("flow_prediction",), "epsilon"),
        ("UniPCMultistepScheduler", FLOW, ("flow_prediction",), "epsilon"),
        ("EDMEulerScheduler", {}, ("epsilon", "edm"), "v_prediction"),
        ("CMStochasticIterativeScheduler", {}, ("edm", "consistency_function"), "sample"),
        ("DDIMScheduler", {}, ("epsilon",), "v_prediction"),
    ],
)
def test_the_prediction_that_a_network_states(
    class_name: str, settings: dict[str, Any], stated: tuple[str, ...], other: str
) -> None:
    config = config_of(class_name, **settings)
    for kind in (None, *stated):
        require_agreement({"prediction_type": kind}, config, "config.json")
    with pytest.raises(UsageError, match=f"says prediction_type '{other}', the scheduler '{config.predicts}'"):
        require_agreement({"prediction_type": other}, config, "config.json")


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"steps": 15, "spacing": "mmd-ddm"}, {"steps": 5}),
        ({"steps": None, "timesteps": (900, 400, 3)}, {"steps": 4}),
        ({"steps": 4, "sampler": "heun"}, {"sampler": "euler"}),
        ({"steps": 4, "eta": 0.5}, {"eta": 0.0}),
        ({"steps": 4, "sampler": "pndm"}, {"spacing": "linspace"}),
    ],
)
def test_a_plan_is_made_again_from_its_settings(options: dict[str, Any], changed: dict[str, Any]) -> None:
    config = config_of("DDIMScheduler", clip_sample=False)
    plan = choose_plan(config, options.pop("steps"), **options)
    assert plan_again(plan, config).digest() == plan.digest()
    assert plan_again(plan, config, **changed).digest() != plan.digest()


@pytest.mark.parametrize(
    ("class_name", "settings", "words"),
    [
        ("EulerDiscreteScheduler", {"sigma_data": 1}, ("'sigma_data' is unknown to EulerDiscreteScheduler",)),
        ("EulerDiscreteScheduler", {"use_karras_sigmsa": True}, ("'use_karras_sigmsa' is unknown",)),
        ("EulerAncestralDiscreteScheduler", {"use_karras_sigmas": True}, ("'use_karras_sigmas' is unknown",)),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, ("'sample'", "epsilon, v_prediction")),
        ("EulerDiscreteScheduler", {"timestep_type": "log"}, ("timestep_type 'log'", "discrete, continuous")),
        ("EulerDiscreteScheduler", {"beta_schedule": "sigmoid"}, ("'sigmoid'", "squaredcos_cap_v2")),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "one"}, ("final_sigmas_type 'one'", "zero, sigma_min")),
        ("EulerDiscreteScheduler", {"sigma_min": "0.1"}, ("sigma_min", "'0.1'")),
        (
            "EulerDiscreteScheduler",
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            ("use_karras_sigmas and use_beta_sigmas are both on",),
        ),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, ("solver_order 4", "1, 2, 3")),
        ("DPMSolverMultistepScheduler", {"solver_order": "2"}, ("solver_order is '2'", "str", "int")),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "deis"}, ("algorithm_type 'deis'", "dpmsolver++")),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, ("needs final_sigmas_type 'sigma_min'",)),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
            ("solver_order 3", "'sde-dpmsolver'"),
        ),
        ("DPMSolverMultistepScheduler", {"solver_type": "bh2"}, ("solver_type 'bh2'", "midpoint, heun")),
        ("DDPMScheduler", {"variance_type": "learned"}, ("variance_type 'learned'", "not affine", "--sampler ddim")),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, ("thresholding", "not affine")),
        ("UniPCMultistepScheduler", {"thresholding": True}, ("thresholding", "not affine")),
        ("UniPCMultistepScheduler", {"solver_p": {"a": 1}}, ("solver_p",)),
        ("UniPCMultistepScheduler", {"use_dynamic_shifting": True}, ("use_dynamic_shifting is True", "flow_shift")),
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True, "use_beta_sigmas": True},
            ("use_flow_sigmas and use_beta_sigmas are both on",),
        ),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"use_dynamic_shifting": True},
            ("use_dynamic_shifting is True", "SD3Transformer2DModel has", "shift"),
        ),
        ("FlowMatchHeunDiscreteScheduler", {"use_dynamic_shifting": True}, ("'use_dynamic_shifting' is unknown",)),
        ("FlowMatchEulerDiscreteScheduler", {"beta_start": 0.1}, ("'beta_start' is unknown",)),
        ("EDMDPMSolverMultistepScheduler", {"prediction_type": "sample"}, ("'sample'",)),
        (
            "EDMDPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            ("solver_order 3", "'sde-dpmsolver++'"),
        ),
        ("EDMEulerScheduler", {"sigma_schedule": "linear"}, ("'linear'", "karras, exponential")),
        ("PNDMScheduler", {"prediction_type": "sample"}, ("'sample'", "epsilon, v_prediction")),
        ("PNDMScheduler", {"skip_prk_steps": "yes"}, ("skip_prk_steps", "'yes'", "bool")),
        ("LCMScheduler", {"original_inference_steps": 4}, ("--steps is 5, original_inference_steps 4",)),
        ("LCMScheduler", {"original_inference_steps": 2000}, ("original_inference_steps 2000", "1000")),
        ("DDIMScheduler", {"use_karras_sigmas": True}, ("'use_karras_sigmas' is unknown to DDIMScheduler",)),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_serve(class_name: str, settings: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(class_name, settings, *words)


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        ((100, 200), ("from 100 up to 200",)),
        ((200, 200), ("200 twice",)),
        ((1000, 3), ("1000", "0 ... 999")),
        ((3, -1), ("-1", "0 ... 999")),
        ((), ("empty",)),
    ],
)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver", "lcm"])
def test_timesteps_that_are_no_grid(sampler: str, timesteps: tuple[int, ...], words: tuple[str, ...]) -> None:
    refused("DDIMScheduler", {}, *words, steps=None, sampler=sampler, timesteps=timesteps)


@pytest.mark.parametrize("timesteps", [(1001, 3), (500, 0), (500, -1.5)])
def test_timesteps_that_no_flow_visits(timesteps: tuple[float, ...]) -> None:
    words = f"holds {next(t for t in timesteps if not 0 < t <= 1000)}; ", "up to 1000, noise"
    refused("FlowMatchEulerDiscreteScheduler", {}, *words, steps=None, timesteps=timesteps)


@pytest.mark.parametrize(
    ("class_name", "settings", "options", "words"),
    [
        ("DDIMScheduler", {}, {"steps": 5, "timesteps": (9, 3)}, ("--steps is 5, --timesteps lists 2",)),
        ("DDIMScheduler", {}, {"steps": None}, ("--steps is missing",)),
        ("DDIMScheduler", {}, {"steps": None, "timesteps": (9,), "spacing": "trailing"}, ("trailing", "choose")),
        ("DDIMScheduler", {}, {"steps": 5, "sampler": "edm-euler", "spacing": "mmd-ddm"}, ("grid of its own",)),
        ("FlowMatchEulerDiscreteScheduler", {}, {"steps": 5, "spacing": "mmd-ddm"}, ("mmd-ddm", "flow-euler", "list")),
        ("CMStochasticIterativeScheduler", {}, {"steps": 5, "spacing": "mmd-ddm"}, ("mmd-ddm", "consistency", "list")),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"steps": 5, "spacing": "mmd-ddm"},
         ("--spacing mmd-ddm", "use_karras_sigmas")),
        ("UniPCMultistepScheduler", FLOW, {"steps": 5, "spacing": "mmd-ddm"},
         ("--spacing mmd-ddm", "use_flow_sigmas")),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {"steps": None, "timesteps": (9, 3)},
         ("--timesteps", "use_lu_lambdas")),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {"steps": 5, "spacing": "mmd-ddm"},
         ("--spacing mmd-ddm", "use_lu_lambdas")),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, {"steps": None, "timesteps": (9, 3)},
         ("--timesteps", "log_linear")),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"},
         {"steps": None, "timesteps": (9, 3)}, ("--timesteps", "continuous")),
        ("PNDMScheduler", {}, {"steps": None, "timesteps": (9, 3)}, ("pndm", "grid of its own")),
        ("SCMScheduler", {}, {"steps": None, "timesteps": (2, 1)}, ("scm", "grid of its own")),
        ("DDIMScheduler", {}, {"steps": None, "timesteps": (9.5, 3)}, ("9.5", "ddim takes whole numbers")),
        ("PNDMScheduler", {}, {"steps": 3}, ("--steps is 3", "4 or more", "skip_prk_steps")),
        ("LCMScheduler", {}, {"steps": 4, "spacing": "trailing"}, ("--spacing trailing", "lcm")),
        ("FlowMatchEulerDiscreteScheduler", {}, {"steps": 4, "spacing": "linspace"}, ("linspace", "flow-euler")),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"steps": None, "timesteps": (9, 3)},
         ("--timesteps", "use_karras_sigmas")),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
         {"steps": None, "timesteps": (9, 3)}, ("--timesteps", "use_flow_sigmas")),
        ("EulerDiscreteScheduler", {}, {"steps": 4, "eta": 0.5}, ("--eta 0.5", "ddim or tcd")),
        ("TCDScheduler", {}, {"steps": 4, "eta": 1.5}, ("--eta is 1.5", "0 ... 1")),
        ("DPMSolverMultistepScheduler", {}, {"steps": 1000}, ("--steps is 1000", "twice", "fewer")),
        ("EulerDiscreteScheduler", {}, {"steps": 4, "sampler": "eulr"}, ("'eulr'", "euler-ancestral")),
        ("EulerDiscreteScheduler", {}, {"steps": 4, "sampler": "lms"}, ("'lms'", "mmd_export.plans")),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, {"steps": 1}, ("not finite", "step count")),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(
    class_name: str, settings: dict[str, Any], options: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(class_name, settings, *words, **options)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_the_beta_quantile_is_scipys(p: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for a, b in ((0.6, 0.6), (2.0, 5.0), (1.0, 1.0)):
        assert beta_quantile(p, a, b) == pytest.approx(stats.beta.ppf(p, a, b), rel=1e-12, abs=1e-300)
