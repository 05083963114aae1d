"""The plan that a model and the options ask for: a table of its own if there is one, else read off diffusers' class."""

from __future__ import annotations

from collections.abc import Sequence

from mmd_export.errors import UsageError
from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import SOLVERS, make_plan, resolve

ROUNDING = 1e-12  # relative to a state, in float64; where a table loses more, diffusers' own numbers are taken


def choose_plan(
    config: SchedulerConfig,
    steps: int | None,
    *,
    sampler: str | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
) -> StepPlan:
    """``mmd_export.solvers.make_plan`` for every sampler that has a table; the prober for the others.

    And for settings that a table reads otherwise than diffusers' own class does, such as two that exclude each other,
    and where a formula loses digits that diffusers' order of operations keeps.
    """
    from mmd_export.diffusers_loop import TakesNoListError
    from mmd_export.probe import VERIFIED, largest_error, probe

    chosen, count = resolve(config, steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=timesteps)
    if (sampler or chosen.sampler) not in SOLVERS:
        return probe(chosen, count)
    plan = make_plan(config, steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=timesteps)
    told = plan.settings.get("eta")
    used = None if told is None else float(str(told))
    try:
        error = largest_error(plan, chosen, count, used)
    except TakesNoListError:
        return plan
    if error <= ROUNDING:
        return plan
    try:
        probed = probe(chosen, count, used)
    except UsageError:
        if error > VERIFIED:
            raise
        return plan
    return probed if largest_error(probed, chosen, count, used) < error else plan


def plan_again(
    plan: StepPlan,
    config: SchedulerConfig,
    steps: int | None = None,
    *,
    sampler: str | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
) -> StepPlan:
    """What ``choose_plan`` makes of the settings of ``plan`` and the options; UsageError if it does not tell them."""
    settings = plan.settings
    known_eta, known_steps = settings.get("eta"), settings.get("num_inference_steps", plan.step_count)
    same = sampler in (None, plan.solver)
    if timesteps is None and spacing is None and same and (steps is None or steps == known_steps):
        if "timestep_spacing" not in settings:
            raise UsageError(f"plan {plan.solver}: it does not say how it was made; leave the sampler options out")
        spacing = str(settings["timestep_spacing"])
    if timesteps is None and steps is None:
        steps = int(str(known_steps))
    return choose_plan(
        config,
        steps,
        sampler=sampler or plan.solver,
        eta=float(str(known_eta)) if eta is None and known_eta is not None and same else eta,
        spacing=spacing,
        timesteps=timesteps,
    )
