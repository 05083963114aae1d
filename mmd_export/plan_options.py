"""The options that choose a plan, in one model for every command. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from mmd_export.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Names as on the command line; None leaves it to the model, its run folder or its scheduler_config.json."""

    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    spacing: str | None = None
    timesteps: tuple[float, ...] | None = None

    @property
    def wanted(self) -> dict[str, Any]:
        """The keywords of ``Checkpoint.plan_for`` and ``choose_plan``."""
        return {entry.name: getattr(self, entry.name) for entry in fields(PlanOptions)}

    def require_bundle(self, name: str, steps: int) -> None:
        """Raise UsageError unless the options ask a bundle of ``steps`` calls for nothing but what it holds."""
        if self.steps not in (None, steps):
            raise UsageError(f"bundle {name} takes {steps} steps, --steps is {self.steps}; leave it out")
        for key, value in self.wanted.items():
            if value is not None and key != "steps":
                raise UsageError(
                    f"bundle {name} was built for one plan of {steps} steps, --{key} is {_shown(value)}; leave it out"
                )


def parse_timesteps(text: str) -> tuple[float, ...]:
    """``999,749,499,249`` as numbers; order and range are checked with the schedule, by ``SchedulerConfig``."""
    numbers: list[float] = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UsageError(
                f"--timesteps is {text!r}, of which {part.strip()!r} is no number; write it like 999,749,499,249"
            )
        numbers.append(int(number) if number.is_integer() else number)
    return tuple(numbers)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
