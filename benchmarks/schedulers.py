"""Largest error of every sampler's table against diffusers' own loop, scheduler x prediction type; about a minute.

The loop runs over a cheap nonlinear stand-in for a network. ``float64``: diffusers with its tables and states in
float64. ``float32``: diffusers as it is, for the deterministic schedulers; what it loses there, it loses itself.
"""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import torch

from benchmarks.common import RESULTS, write_result
from mmd_export.diffusers_loop import scheduler_class
from mmd_export.errors import MmdExportError
from mmd_export.plan import StepPlan
from mmd_export.plans import choose_plan
from mmd_export.probe import bent, largest_error
from mmd_export.schedule import SchedulerConfig
from mmd_export.scheduler_keys import CLASSES, FIXED_PREDICTION, KEYS, choices_of
from mmd_export.solvers import SOLVERS
from mmd_export.unroll import UnrolledSampler

STEPS = (1, 2, 3, 5, 10, 25)


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, Any]] = {}
    for class_name, sampler in CLASSES.items():
        kinds = choices_of(class_name, "prediction_type") if "prediction_type" in KEYS[class_name] else None
        errors = {}
        for kind in kinds or (FIXED_PREDICTION[sampler],):
            settings = {"prediction_type": kind} if kinds else {}
            settings |= {"use_flow_sigmas": True} if kind == "flow_prediction" and kinds else {}
            errors[kind] = measured(class_name, settings)
        table = "analytic" if sampler in SOLVERS else "probed"
        rows[class_name] = {"sampler": sampler, "table": table, "largest_relative_error": errors}
        print(class_name, errors, flush=True)
    write_result(RESULTS / "schedulers.json", "benchmarks.schedulers", {"steps": list(STEPS), "schedulers": rows})


def measured(class_name: str, settings: dict[str, Any]) -> dict[str, float | None]:
    """The worst of all step counts; a float32 loop that draws its own noise is not compared."""
    config = SchedulerConfig.from_dict({"_class_name": class_name, **settings})
    double, single = 0.0, 0.0
    noisy = choose_plan(config, max(STEPS)).noisy_steps > 0
    for steps in STEPS:
        try:
            plan = choose_plan(config, steps)
        except MmdExportError:  # PNDM's Runge-Kutta start needs four
            continue
        eta = plan.settings.get("eta")
        double = max(double, largest_error(plan, config, steps, None if eta is None else float(eta)))
        single = max(single, 0.0 if noisy else float32_error(plan, config, steps))
    return {"float64": rounded(double), "float32": None if noisy else rounded(single)}


def float32_error(plan: StepPlan, config: SchedulerConfig, steps: int) -> float:
    """The last state of the unpatched scheduler's loop against the plan's, relative to its largest value."""
    scheduler = scheduler_class(config.class_name)(**{k: v for k, v in config.settings().items() if k in own(config)})
    scheduler.set_timesteps(steps)
    noise = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for k, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(bent(seen, plan.timesteps[k]), t, x).prev_sample
    network = UnrolledSampler(_Bent(plan), plan)
    ours = list(network.chain(noise.double()))[-1]
    return float((ours - x).abs().max() / ours.abs().max().clamp(min=1e-300))


def own(config: SchedulerConfig) -> set[str]:
    """The settings that the class itself takes."""
    import inspect

    return set(inspect.signature(scheduler_class(config.class_name).__init__).parameters)


class _Bent(torch.nn.Module):
    def __init__(self, plan: StepPlan) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, x: torch.Tensor, k: int, _labels: torch.Tensor | None = None) -> torch.Tensor:
        return bent(x, self.plan.timesteps[k])


def rounded(error: float) -> float:
    """One significant digit, upwards."""
    if error == 0.0 or not math.isfinite(error):
        return error
    exponent = math.floor(math.log10(error))
    return float(f"{math.ceil(error / 10.0**exponent)}e{exponent}")


if __name__ == "__main__":
    main()
