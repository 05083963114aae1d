"""What ``guided:`` files do not hold, by the names of the original commands: the schedule, flags and counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmd_export.errors import UsageError
from mmd_export.schedule import SchedulerConfig

FIRST_BETA, LAST_BETA, BETAS_OF = 0.0001, 0.02, 1000  # of the linear schedule; other lengths are scaled
TOLD_OF = 1000  # what rescaled timesteps are out of, whatever the schedule's length
UNSET = -1  # of num_head_channels in the original's commands
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def scheduler_of(
    file: str | None, trained: Mapping[str, Any], path: Path, *, learned: bool
) -> tuple[SchedulerConfig, tuple[str, ...]]:
    """Of a scheduler_config.json, or of the options that the model was trained with, what is assumed said aloud.

    Linear betas go from 0.1 / T to 20 / T, as in the original's get_named_beta_schedule; a variance that was not
    ``learned`` is the large one, as in its create_gaussian_diffusion.
    """
    if file is not None:
        if trained:
            name, value = next(iter(trained.items()))
            raise UsageError(f"weights {path}: scheduler={file} and {name}={value} are both given; choose one")
        return SchedulerConfig.from_file(Path(file)), ()
    name, total = trained.get("noise_schedule", "linear"), trained.get("diffusion_steps", BETAS_OF)
    if name not in SCHEDULES:
        raise UsageError(f"weights {path}: noise_schedule is {name!r}; known: {', '.join(SCHEDULES)}")
    if not isinstance(total, int) or total <= LAST_BETA * BETAS_OF:
        raise UsageError(f"weights {path}: diffusion_steps is {total!r}; a whole number above 20 is expected")
    clean = flag("predict_xstart", trained.get("predict_xstart", False), str(path))
    scheduler = SchedulerConfig(
        num_train_timesteps=total,
        beta_start=FIRST_BETA * BETAS_OF / total,
        beta_end=LAST_BETA * BETAS_OF / total,
        beta_schedule=SCHEDULES[name],
        prediction_type="sample" if clean else "epsilon",
        variance_type="learned_range" if learned else "fixed_large",
    )
    assumed = (
        f"{path.name} holds no scheduler; taken as trained with the {name} schedule of {total} timesteps, "
        f"{scheduler.prediction_type} prediction, {scheduler.variance_type} variance"
    )
    return scheduler, (assumed,)


def timestep_scale(rescale: bool | None, total: int, where: str) -> float:
    """What a timestep is multiplied by: 1000 / T if it is rescaled (``_WrappedModel`` of the originals' respace.py).

    Raises UsageError where the answer matters and is not given: the two repositories' defaults differ.
    """
    if rescale is None and total != TOLD_OF:
        raise UsageError(
            f"weights {where}: nothing in them tells whether the network is told the timestep t or t * {TOLD_OF} / "
            f"{total}; say ?rescale_timesteps=true, the default of improved-diffusion, or ?rescale_timesteps=false, "
            "that of guided-diffusion"
        )
    return TOLD_OF / total if rescale is not None and flag("rescale_timesteps", rescale, where) else 1.0


def flag(name: str, value: Any, where: str) -> bool:
    """An option that is on or off; any other text would be on in Python."""
    if value not in (True, False):
        raise UsageError(f"weights {where}: {name} is {value!r}; true or false is expected")
    return bool(value)


def head_counts(num_heads: int | None, num_head_channels: int | None, where: str) -> tuple[int | None, int | None]:
    """Both as whole numbers, None for what is not given."""
    heads, channels = _whole("num_heads", num_heads, where), _whole("num_head_channels", num_head_channels, where)
    return heads, None if channels == UNSET else channels


def _whole(name: str, value: Any, where: str) -> int | None:
    """An option that counts."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UsageError(f"weights {where}: {name} is {value!r}; a whole number is expected")
    return value
