"""The scheduler classes of diffusers 0.42, their settings and defaults, as data. Standard library only.

``KEYS[class]`` maps each setting to its default; ``CLASSES[class]`` is the solver's name on the command line. A new
scheduler with a table of its own is one entry here and one function in ``mmd_export.solvers``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmd_export.plan import PredictionType

DYNAMIC = "use_dynamic_shifting"
_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon",
}  # fmt: skip
TRAINED = tuple(_BETAS)  # of the network, whatever sampler runs it
LEVELS = ("rescale_betas_zero_snr", "invert_sigmas")  # the same, where they are on; not every class has them
_LATENT = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_GRID = {"timestep_spacing": "linspace", "steps_offset": 0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = {
    "use_flow_sigmas": False, "flow_shift": 1.0, DYNAMIC: False, "time_shift_type": "exponential",
}  # fmt: skip
_DDIM = {**_BETAS, **_CLIP, **_GRID, "timestep_spacing": "leading", "set_alpha_to_one": True,
         "rescale_betas_zero_snr": False, "variance_type": "fixed_small"}  # fmt: skip
_DPM = {
    **_BETAS, **_GRID, **_SIGMAS, **_FLOW, "solver_order": 2, "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint", "lower_order_final": True, "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf,
}  # fmt: skip
_DISTILLED = {
    **_LATENT, **_CLIP, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True,
    "steps_offset": 0, "timestep_spacing": "leading", "rescale_betas_zero_snr": False,
    "original_inference_steps": 50, "timestep_scaling": 10.0,
}  # fmt: skip
_EDM = {
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sigma_min": 0.002, "sigma_max": 80.0,
    "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0, "final_sigmas_type": "zero",
}  # fmt: skip


def _without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}


KEYS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDPMScheduler": _DDIM,
    "EulerDiscreteScheduler": {
        **_BETAS, **_GRID, **_SIGMAS, "interpolation_type": "linear", "sigma_min": None, "sigma_max": None,
        "timestep_type": "discrete", "rescale_betas_zero_snr": False, "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**_BETAS, **_GRID, "rescale_betas_zero_snr": False},
    "HeunDiscreteScheduler": {**_LATENT, **_GRID, **_SIGMAS, **_CLIP, "clip_sample": False},
    "DPMSolverMultistepScheduler": {
        **_DPM, "euler_at_final": False, "use_lu_lambdas": False, "rescale_betas_zero_snr": False,
    },
    "DPMSolverSinglestepScheduler": {**_without(_DPM, *_GRID), "lower_order_final": False},
    "DPMSolverSDEScheduler": {**_LATENT, **_GRID, **_SIGMAS, "noise_sampler_seed": None},
    "DEISMultistepScheduler": {
        **_without(_DPM, "final_sigmas_type", "lambda_min_clipped"), "algorithm_type": "deis", "solver_type": "logrho",
    },
    "UniPCMultistepScheduler": {
        **_without(_DPM, "algorithm_type", "lambda_min_clipped"), "solver_type": "bh2", "predict_x0": True,
        "disable_corrector": (), "solver_p": None, "rescale_betas_zero_snr": False, "sigma_min": None,
        "sigma_max": None, "shift_terminal": None,
    },
    "PNDMScheduler": {
        **_BETAS, "skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading", "steps_offset": 0,
    },
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {
        **_EDM, "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
        "lower_order_final": True, "euler_at_final": False,
    },
    "FlowMatchEulerDiscreteScheduler": {
        **_SIGMAS, "num_train_timesteps": 1000, "shift": 1.0, DYNAMIC: False, "base_shift": 0.5,
        "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False,
        "shift_terminal": None, "time_shift_type": "exponential", "stochastic_sampling": False,
    },
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "CMStochasticIterativeScheduler": {
        "num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "s_noise": 1.0,
        "rho": 7.0, "clip_denoised": True,
    },
    "KDPM2DiscreteScheduler": {**_LATENT, **_GRID, **_SIGMAS},
    "KDPM2AncestralDiscreteScheduler": {**_LATENT, **_GRID, **_SIGMAS},
    "LMSDiscreteScheduler": {**_BETAS, **_GRID, **_SIGMAS},
    "IPNDMScheduler": {"num_train_timesteps": 1000, "trained_betas": None},
    "SASolverScheduler": {
        **_BETAS, **_GRID, **_SIGMAS, "predictor_order": 2, "corrector_order": 2, "tau_func": None,
        "algorithm_type": "data_prediction", "lower_order_final": True, "use_flow_sigmas": False, "flow_shift": 1.0,
        "lambda_min_clipped": -math.inf,
    },
    "SCMScheduler": {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5},
}  # fmt: skip

CLASSES: dict[str, str] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmsolver",
    "DPMSolverSinglestepScheduler": "dpmsolver-singlestep",
    "DPMSolverSDEScheduler": "dpmsolver-sde",
    "DEISMultistepScheduler": "deis",
    "UniPCMultistepScheduler": "unipc",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "EDMEulerScheduler": "edm-euler",
    "EDMDPMSolverMultistepScheduler": "edm-dpmsolver",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
    "FlowMatchHeunDiscreteScheduler": "flow-heun",
    "CMStochasticIterativeScheduler": "consistency",
    # No table of their own: mmd_export.probe reads the numbers off the class, which needs torch and diffusers.
    "KDPM2DiscreteScheduler": "kdpm2",
    "KDPM2AncestralDiscreteScheduler": "kdpm2-ancestral",
    "LMSDiscreteScheduler": "lms",
    "IPNDMScheduler": "ipndm",
    "SASolverScheduler": "sa-solver",
    "SCMScheduler": "scm",
}
# What a solver takes the network's output for, where its class has no prediction_type that says so.
FIXED_PREDICTION: dict[str, PredictionType] = {
    "edm-euler": "edm",
    "edm-dpmsolver": "edm",
    "flow-euler": "flow_prediction",
    "flow-heun": "flow_prediction",
    "consistency": "edm",
    "ipndm": "v_prediction",  # eps = sigma x + alpha v
    "scm": "trigflow",
}
# What a network of flow predicts that is told times up to 1, as Sana Sprint's, not up to num_train_timesteps.
UNIT_FLOW = "flow_prediction of times in [0, 1]"
# What a dynamic shift follows from, with the pipeline's defaults where the scheduler does not say; in the order of
# `calculate_shift` in diffusers/pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py, 0.42.
PIPELINE_SHIFT: dict[str, float] = {
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.16,
}  # fmt: skip
LINEAR_SHIFT = (
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)  # others assert time_shift_type exponential
# Let through at any value by a class that does not read them: every Stable Diffusion config carries them along.
INERT = frozenset(
    {"dynamic_thresholding_ratio", "sample_max_value", "thresholding", "skip_prk_steps", "clip_sample",
     "clip_sample_range", "set_alpha_to_one", "variance_type", "timestep_spacing", "steps_offset"}
)  # fmt: skip
FOREIGN: dict[str, list[Any]] = {}
for _settings in KEYS.values():
    for _key, _default in _settings.items():
        FOREIGN.setdefault(_key, []).append(_default)
FOREIGN["disable_corrector"] = [[], ()]
for _key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end"):
    del FOREIGN[_key]  # they decide the levels; a class that does not read them should not be given them

_EPS_V = ("epsilon", "v_prediction")
_EPS_V_X0 = (*_EPS_V, "sample")
_ANY = (*_EPS_V_X0, "flow_prediction")
LEARNED_VARIANCE = ("learned", "learned_range")  # half of the network's output; only DDPM would use it
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", *LEARNED_VARIANCE)
_DDIM_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "beta_schedule": {
        "": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "DDIMScheduler": _DDIM_BETAS,
        "DDPMScheduler": _DDIM_BETAS,
        "HeunDiscreteScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2", "exp"),
    },
    "prediction_type": {
        "": _EPS_V_X0,
        "DPMSolverMultistepScheduler": _ANY,
        "DPMSolverSinglestepScheduler": _ANY,
        "DEISMultistepScheduler": _ANY,
        "UniPCMultistepScheduler": _ANY,
        "EulerAncestralDiscreteScheduler": _EPS_V,
        "DPMSolverSDEScheduler": _EPS_V,
        "KDPM2DiscreteScheduler": _EPS_V,
        "KDPM2AncestralDiscreteScheduler": _EPS_V,
        "SASolverScheduler": _ANY,
        "PNDMScheduler": _EPS_V,
        "EDMEulerScheduler": _EPS_V,
        "EDMDPMSolverMultistepScheduler": _EPS_V,
        "SCMScheduler": ("trigflow",),
    },
    "variance_type": {"": (), "DDIMScheduler": _VARIANCES, "DDPMScheduler": _VARIANCES},
    "interpolation_type": {"": ("linear", "log_linear")},
    "timestep_type": {"": ("discrete", "continuous")},
    "final_sigmas_type": {"": ("zero", "sigma_min")},
    "time_shift_type": {"": ("exponential", "linear")},
    "sigma_schedule": {"": ("karras", "exponential")},
    "solver_order": {"": (1, 2, 3), "UniPCMultistepScheduler": (1, 2, 3, 4)},
    "algorithm_type": {
        "DPMSolverMultistepScheduler": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        "DPMSolverSinglestepScheduler": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
        "EDMDPMSolverMultistepScheduler": ("dpmsolver++", "sde-dpmsolver++"),
        "DEISMultistepScheduler": ("deis",),
        "SASolverScheduler": ("data_prediction", "noise_prediction"),
    },
    "solver_type": {
        "DPMSolverMultistepScheduler": ("midpoint", "heun"),
        "DPMSolverSinglestepScheduler": ("midpoint", "heun"),
        "EDMDPMSolverMultistepScheduler": ("midpoint", "heun"),
        "DEISMultistepScheduler": ("logrho",),
        "UniPCMultistepScheduler": ("bh1", "bh2"),
    },
    "solver_p": {"": ()},
    "tau_func": {"": ()},
}  # fmt: skip


def choices_of(class_name: str, key: str) -> tuple[Any, ...] | None:
    """The values that a class takes for a setting of names, or None if it takes any of its type."""
    table = _CHOICES.get(key, {})
    return table.get(class_name, table.get(""))
