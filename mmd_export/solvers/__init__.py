"""Samplers as tables: each function returns the numbers of one ``StepPlan``. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmd_export.dynamic_shift import require_shift
from mmd_export.errors import UsageError
from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig
from mmd_export.scheduler_config import SPACINGS
from mmd_export.scheduler_keys import CLASSES, KEYS, LEVELS
from mmd_export.solvers.consistency import consistency, lcm, tcd
from mmd_export.solvers.ddim import ddim, ddpm
from mmd_export.solvers.deis import deis
from mmd_export.solvers.dpm import dpmsolver, dpmsolver_singlestep
from mmd_export.solvers.edm import edm_dpmsolver, edm_euler
from mmd_export.solvers.flow import flow_euler, flow_heun
from mmd_export.solvers.pndm import pndm
from mmd_export.solvers.sigma_space import dpmsolver_sde, euler, euler_ancestral, heun
from mmd_export.solvers.unipc import unipc

__all__ = ["SOLVERS", "ddim", "ddpm", "make_plan", "resolve"]

SOLVERS: dict[str, Callable[..., StepPlan]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler-ancestral": euler_ancestral,
    "heun": heun,
    "dpmsolver": dpmsolver,
    "dpmsolver-singlestep": dpmsolver_singlestep,
    "dpmsolver-sde": dpmsolver_sde,
    "deis": deis,
    "unipc": unipc,
    "pndm": pndm,
    "lcm": lcm,
    "tcd": tcd,
    "edm-euler": edm_euler,
    "edm-dpmsolver": edm_dpmsolver,
    "flow-euler": flow_euler,
    "flow-heun": flow_heun,
    "consistency": consistency,
}
WITH_ETA = {"ddim": "ddim", "tcd": "tcd"}
_CLASS_OF = {solver: name for name, solver in CLASSES.items()}


def make_plan(
    config: SchedulerConfig,
    steps: int | None,
    *,
    sampler: str | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
) -> StepPlan:
    """The plan of ``steps`` network calls; ``sampler`` None runs the solver of the config's own scheduler class.

    ``steps`` is diffusers' num_inference_steps; a solver that calls the network twice a step makes more calls, and the
    plan's settings say so. ``timesteps`` lists them instead, descending.
    """
    chosen, steps = resolve(config, steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=timesteps)
    name = chosen.sampler if sampler is None else sampler
    if name not in SOLVERS:
        raise UsageError(f"--sampler {name!r} has no table of its own; mmd_export.plans reads it off diffusers' class")
    options = {} if eta is None else {"eta": eta}
    try:
        return SOLVERS[name](chosen, steps, **options)
    except (ZeroDivisionError, OverflowError) as error:
        raise UsageError(
            f"--sampler {name} with {steps} steps: a coefficient is not finite ({error}); two levels of the grid are "
            "equal or a level is 0; choose another step count or spacing"
        ) from error


def resolve(
    config: SchedulerConfig,
    steps: int | None,
    *,
    sampler: str | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
) -> tuple[SchedulerConfig, int]:
    """The config of the sampler's class on the grid that is asked for, and the step count."""
    name = sampler or config.sampler
    chosen = of_sampler(config, name)
    require_shift(config, chosen)
    _require_levels(config, chosen)
    if eta is not None and name not in WITH_ETA:
        raise UsageError(f"--eta {eta} belongs to --sampler ddim or tcd; the sampler is {name}")
    if timesteps is not None:
        if not timesteps:
            raise UsageError("--timesteps is empty; list at least one")
        if spacing is not None:
            raise UsageError(f"--timesteps and --spacing {spacing} are both given; choose one")
        spacing = ",".join(str(int(t) if float(t).is_integer() else t) for t in timesteps)
    if timesteps is not None:
        spacing = f"{chosen.named_spacing}:{spacing}"
    _check_spacing(chosen, spacing)
    chosen = chosen.with_spacing(spacing)
    count = steps if steps is not None else len(chosen.custom_timesteps)
    if steps is None and not count:
        raise UsageError("--steps is missing; say how many network calls the sampler makes")
    return chosen, count


def of_sampler(config: SchedulerConfig, sampler: str) -> SchedulerConfig:
    """The config of the class that runs ``sampler``, as ``SchedulerConfig.as_class`` makes it."""
    if sampler not in _CLASS_OF:
        raise UsageError(f"--sampler {sampler!r} is unknown; known: {', '.join(sorted(_CLASS_OF))}")
    return config.as_class(_CLASS_OF[sampler])


def _require_levels(model: SchedulerConfig, chosen: SchedulerConfig) -> None:
    """Raise UsageError where the class of ``chosen`` cannot run the levels of noise that the network was trained on."""
    for key in LEVELS:
        if model.get(key) and key not in KEYS[chosen.class_name]:
            known = ", ".join(CLASSES[name] for name, settings in KEYS.items() if key in settings)
            raise UsageError(
                f"--sampler {chosen.sampler}: {model.class_name} has {key} True, {chosen.class_name} has none: "
                f"other levels of noise than the network was trained on; samplers that have it: {known}"
            )


OWN_GRID = ("pndm", "edm-euler", "edm-dpmsolver", "flow-heun", "scm")
LISTED_ONLY = ("flow-euler", "consistency")  # a grid of their own too, but a list may take its place


def _check_spacing(config: SchedulerConfig, spacing: str | None) -> None:
    """Raises UsageError if the class cannot visit the grid that is asked for."""
    if spacing is None or spacing == config.timestep_spacing:
        return
    listed = "," in spacing or ":" in spacing or spacing == "mmd-ddm"
    if not listed and spacing not in SPACINGS and not spacing[:1].isdigit():
        raise UsageError(f"--spacing {spacing!r} is unknown; known: {', '.join(SPACINGS)}")
    if listed and config.sampler in OWN_GRID:
        raise UsageError(
            f"--timesteps and --spacing mmd-ddm do not fit --sampler {config.sampler}, which has a grid of its own"
        )
    if spacing == "mmd-ddm" and config.sampler in LISTED_ONLY:
        raise UsageError(
            f"--spacing mmd-ddm does not fit --sampler {config.sampler}, which has a grid of its own; "
            "leave it out, or list the timesteps: --timesteps"
        )
    named_by_class = "timestep_spacing" in KEYS[config.class_name] and config.sampler not in ("lcm", "tcd")
    if not listed and not named_by_class:
        raise UsageError(
            f"--spacing {spacing} has no meaning for --sampler {config.sampler}, which has one grid; leave it out"
        )
