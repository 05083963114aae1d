"""What every source becomes: ``Checkpoint``, a network with all that a plan and a graph need to know of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from mmd_export.conditions import CLASS_LABELS, Condition
from mmd_export.errors import UsageError
from mmd_export.plan import StepPlan
from mmd_export.plans import choose_plan, plan_again
from mmd_export.schedule import SchedulerConfig


@dataclass(frozen=True)
class Checkpoint:
    """A network with everything that a plan and a graph need to know of it.

    ``shape`` is (C, H, W) of one sample; ``conditions`` what the network is told besides; ``plan`` the plan that a run
    folder was tuned for; ``warnings`` what the user should hear. ``folder`` is where the source lies. ``configs`` are
    the files, by relative POSIX path, that make a diffusers folder of the denoiser's weights: those of the source byte
    for byte, or those that its conversion amounts to; empty if diffusers has no class for the network.
    """

    name: str
    folder: Path
    denoiser: nn.Module
    scheduler: SchedulerConfig
    shape: tuple[int, int, int]
    sha256: str
    conditions: tuple[Condition, ...] = ()
    plan: StepPlan | None = None
    licence: str | None = None
    warnings: tuple[str, ...] = ()
    configs: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def classes(self) -> int | None:
        """The number of class labels; None if the network takes none."""
        return next((each.below for each in self.conditions if each.name == CLASS_LABELS), None)

    def plan_for(
        self,
        steps: int | None = None,
        *,
        sampler: str | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> StepPlan:
        """The plan of a run folder, or the one that the options ask for.

        Raises UsageError if no step count is known, or if a run folder was tuned for another plan.
        """
        if self.plan is None:
            if steps is None and timesteps is None:
                raise UsageError(f"{self.name}: --steps is missing; say how many network calls the sampler makes")
            return choose_plan(self.scheduler, steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=timesteps)
        wanted = plan_again(
            self.plan, self.scheduler, steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=timesteps
        )
        if wanted.digest() != self.plan.digest():
            raise UsageError(
                f"{self.name}: tuned for {describe(self.plan)}, asked for {describe(wanted)}; "
                "leave the sampler options out, or tune for that plan"
            )
        return self.plan

    def as_double(self) -> Checkpoint:
        """The same network in float64, on its own copy of the weights."""
        return replace(self, denoiser=copy.deepcopy(self.denoiser).double())


def describe(plan: StepPlan) -> str:
    """One phrase: solver, step count, settings that matter."""
    eta = plan.settings.get("eta")
    extra = f", eta {eta:g}" if isinstance(eta, float | int) and eta else ""
    return f"{plan.solver} with {plan.step_count} steps ({plan.settings.get('timestep_spacing')}{extra})"


def diffusers_configs(config: Mapping[str, Any], scheduler: SchedulerConfig) -> dict[str, bytes]:
    """``unet/config.json`` and ``scheduler/scheduler_config.json`` of a converted network."""
    return {
        "unet/config.json": _json(config),
        "scheduler/scheduler_config.json": _json({"_class_name": scheduler.class_name, **scheduler.settings()}),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
