"""What a diffusers scheduler_config.json says: the class and its settings, each checked. Standard library only."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from mmd_export.errors import UsageError
from mmd_export.plan import PredictionType
from mmd_export.scheduler_keys import (
    CLASSES,
    DYNAMIC,
    FIXED_PREDICTION,
    FOREIGN,
    INERT,
    KEYS,
    LINEAR_SHIFT,
    PIPELINE_SHIFT,
    TRAINED,
    UNIT_FLOW,
    choices_of,
)

_NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
SPACINGS = ("leading", "trailing", "linspace", "mmd-ddm")

_OWN_KIND = {"consistency": "consistency_function", "ipndm": "v_prediction of times in [0, 1]"}


@dataclass(frozen=True)
class SchedulerConfig:
    """The settings of diffusers' DDIMScheduler and DDPMScheduler that decide the numbers; same names, same defaults.

    ``timestep_spacing`` may also be ``mmd-ddm`` or list the timesteps, ``"leading:999,749,499,249"``. ``written``: what
    ``from_dict`` was given, settings of other classes among it; None for a config that was made otherwise.
    """

    CLASSES: ClassVar[dict[str, str]] = CLASSES

    class_name: str = "DDIMScheduler"
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False
    variance_type: str = "fixed_small"
    written: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.class_name not in self.CLASSES:
            raise UsageError(f"scheduler {self.class_name!r} is not supported; supported: {', '.join(self.CLASSES)}")
        for key in ("beta_schedule", "prediction_type", "variance_type"):
            if (known := choices_of(self.class_name, key)) and getattr(self, key) not in known:
                raise UsageError(
                    f"scheduler: {key} {getattr(self, key)!r} is not supported; supported: {', '.join(known)}"
                )
        if not self.custom_timesteps and self.timestep_spacing not in SPACINGS:
            known_text = ", ".join(SPACINGS)
            raise UsageError(
                f"scheduler: timestep_spacing {self.timestep_spacing!r} is not supported; supported: {known_text}"
            )
        if self.rescale_betas_zero_snr and self.num_train_timesteps == 1:
            raise UsageError("scheduler: rescale_betas_zero_snr needs more than the 1 of num_train_timesteps")
        if self.num_train_timesteps < 1:
            raise UsageError(f"scheduler: num_train_timesteps is {self.num_train_timesteps}; it must be at least 1")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UsageError(
                f"scheduler: {len(self.trained_betas)} trained_betas for {self.num_train_timesteps} num_train_timesteps"
            )
        if not (math.isfinite(self.clip_sample_range) and self.clip_sample_range > 0):
            raise UsageError(f"scheduler: clip_sample_range is {self.clip_sample_range}; it must be positive")
        self._check_custom_timesteps()

    def _check_custom_timesteps(self) -> None:
        """Descending, in range, none twice; raises UsageError with the two values that disagree."""
        grid, total = self.custom_timesteps, self.num_train_timesteps
        flow = FIXED_PREDICTION.get(self.sampler) == "flow_prediction"
        for t in grid:
            if flow and not 0 < t <= total:
                raise UsageError(f"--timesteps holds {t}; of a flow they are above 0, clean data, up to {total}, noise")
            if not flow and t != int(t):
                raise UsageError(f"--timesteps holds {t}, --sampler {self.sampler} takes whole numbers")
            if not flow and not 0 <= t < total:
                raise UsageError(f"--timesteps holds {t}, the model was trained with {total}: 0 ... {total - 1}")
        for earlier, later in itertools.pairwise(grid):
            if later == earlier:
                raise UsageError(f"--timesteps holds {earlier} twice; every network call has a timestep of its own")
            if later > earlier:
                raise UsageError(f"--timesteps go from {earlier} up to {later}; sampling runs down, so sort them")

    def __getitem__(self, key: str) -> Any:
        """The setting under diffusers' name."""
        return getattr(self, key)

    def get(self, key: str) -> Any:
        """The setting, or None where the class has none of that name."""
        return getattr(self, key, None)

    def told(self, **facts: Any) -> SchedulerConfig:
        """With what diffusers' pipelines do beside the scheduler: ``mu`` of a dynamic shift, ``of_flow`` of SCM."""
        raise UsageError(f"scheduler {self.class_name} takes no {', '.join(facts)} from a pipeline")

    @property
    def sampler(self) -> str:
        """The solver that the scheduler class itself runs."""
        return self.CLASSES[self.class_name]

    @property
    def predicts(self) -> str:
        """What the class takes the network's output for.

        EDM's v_prediction is F with its sign turned, not DDIM's v; a consistency function has other c_skip and c_out
        than EDM's F and is told 1000 times its c_noise; IPNDM's v is that of a network that is told times up to 1.
        SCM's may be made by the pipeline, of a flow.
        """
        if self.get("of_flow"):
            return UNIT_FLOW
        fixed = FIXED_PREDICTION.get(self.sampler)
        if fixed == "edm" and self.prediction_type == "v_prediction":
            return "edm v_prediction"
        return _OWN_KIND.get(self.sampler) or fixed or self.prediction_type

    @property
    def custom_timesteps(self) -> tuple[float, ...]:
        """The timesteps that the spacing lists; empty for a spacing with a name."""
        parts = str(self.timestep_spacing).rpartition(":")[2].split(",")
        if not all(_NUMBER.fullmatch(part.strip()) for part in parts):
            return ()
        return tuple(float(part) if "." in part or "e" in part else int(part) for part in parts)

    @property
    def is_given_grid(self) -> bool:
        """Whether the timesteps are listed or MMD-DDM's, not those of the class."""
        return bool(self.custom_timesteps) or self.timestep_spacing == "mmd-ddm"

    @property
    def named_spacing(self) -> str:
        """The spacing without a list of timesteps: the scale of a starting state may depend on it."""
        return str(self.timestep_spacing).rpartition(":")[0] if self.custom_timesteps else self.timestep_spacing

    @classmethod
    def from_file(cls, path: Path) -> SchedulerConfig:
        """Read a scheduler_config.json; raises UsageError naming the setting that is unknown or unsupported."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"scheduler config {path} does not exist") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UsageError(f"scheduler config {path} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise UsageError(f"scheduler config {path} holds {type(data).__name__}, not a JSON object")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SchedulerConfig:
        """Settings under diffusers' names; ``_class_name`` is required, other names that start with _ are ignored.

        diffusers keeps the settings of other schedulers when one is made from another's config. One that this class
        does not read is let through at its owner's default, where it says nothing, and refused at any other value.
        """
        if "_class_name" not in data:
            raise UsageError("scheduler config: _class_name is missing")
        name = str(data["_class_name"])
        if name not in CLASSES:
            return SchedulerConfig(class_name=name)  # raises: known classes come before the settings of another
        settings = {key: value for key, value in data.items() if not key.startswith("_")}
        if settings.pop("thresholding", False):
            raise UsageError("scheduler: thresholding (dynamic) is not affine and not supported; clip_sample is")
        own = {key: value for key, value in settings.items() if key in KEYS[name]}
        if own.get("variance_type", "") is None:  # DPM-Solver's own default, written into the config of another class
            del own["variance_type"]
        if settings.get(DYNAMIC) and DYNAMIC in KEYS[name]:
            own |= {key: settings[key] for key in PIPELINE_SHIFT if key in settings}
        for key, value in settings.items():
            if key not in own and key not in INERT and not (key in FOREIGN and value in FOREIGN[key]):
                known = ", ".join(sorted(KEYS[name]))
                raise UsageError(f"scheduler: setting {key!r} is unknown to {name}; known: {known}")
        checked = {key: _checked(name, key, value) for key, value in own.items()}
        return replace(_config(name, {**KEYS[name], **checked}), written=settings)

    def settings(self) -> dict[str, Any]:
        """The settings of this class under diffusers' names, as its own ``__init__`` takes them."""
        return {key: self[key] for key in KEYS[self.class_name]}

    def stated(self) -> dict[str, Any]:
        """What the file says, of any class, and what else differs from the defaults of its own.

        Without a file, the levels that the network was trained on are stated too.
        """
        own = self.settings()
        said = {key: own[key] for key in TRAINED if key in own} if self.written is None else self.written
        changed = {key: value for key, value in own.items() if value != KEYS[self.class_name][key]}
        return {key: own.get(key, value) for key, value in said.items()} | changed

    def as_class(self, class_name: str) -> SchedulerConfig:
        """The config of another class, as diffusers' ``from_config`` makes it of the same file.

        What the file says, for whatever class, goes over; what it leaves to the default of its own class does not, but
        for the levels of noise that the network was trained on; diffusers loses ``flow_shift`` where it is ``shift``.
        """
        if class_name == self.class_name:
            return self
        known = {key: value for key, value in self.stated().items() if key in KEYS[class_name]}
        known |= {key: self[key] for key in TRAINED if key in KEYS[class_name] and key in KEYS[self.class_name]}
        kept = {key: value for key, value in known.items() if _carries_over(class_name, key, value)}
        if FIXED_PREDICTION.get(self.sampler) != FIXED_PREDICTION.get(CLASSES[class_name]):
            kept.pop("prediction_type", None)  # EDM's v_prediction is not DDIM's
        if self.get("use_flow_sigmas") and "shift" in KEYS[class_name]:
            kept["shift"] = self["flow_shift"]
        made = SchedulerConfig.from_dict({"_class_name": class_name, **kept})
        return made.told(mu=self["mu"]) if self.get("mu") is not None and made.get(DYNAMIC) else made

    def with_spacing(self, spacing: str | None) -> SchedulerConfig:
        """The same config with another ``timestep_spacing``."""
        return self if spacing is None else replace(self, timestep_spacing=spacing)


@dataclass(frozen=True)
class SolverConfig(SchedulerConfig):
    """The settings of any other class: what it shares with DDIM in the fields, the rest in ``options``."""

    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.options[key] if key in self.options else getattr(self, key)

    def get(self, key: str) -> Any:
        return self.options[key] if key in self.options else getattr(self, key, None)

    def told(self, **facts: Any) -> SchedulerConfig:
        return replace(self, options={**self.options, **facts})


_FIELDS = {entry.name for entry in fields(SchedulerConfig)} - {"class_name", "written"}


def _config(name: str, settings: Mapping[str, Any]) -> SchedulerConfig:
    shared = {key: value for key, value in settings.items() if key in _FIELDS}
    if CLASSES[name] in ("ddim", "ddpm"):
        return SchedulerConfig(class_name=name, **shared)
    options = {key: value for key, value in settings.items() if key not in _FIELDS}
    if options.get(DYNAMIC) and options["time_shift_type"] == "linear" and name not in LINEAR_SHIFT:
        raise UsageError(f"scheduler: time_shift_type 'linear' is not supported by {name}; supported: exponential")
    spacings = [key for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if options.get(key)]
    if len(spacings) > 1:
        raise UsageError(f"scheduler: {spacings[0]} and {spacings[1]} are both on; choose one")
    return SolverConfig(class_name=name, **shared, options=options)


def _carries_over(class_name: str, key: str, value: Any) -> bool:
    """Whether a setting means something to another class: grids and schedules do, names of its variants may not."""
    if value is None:
        return KEYS[class_name][key] is None
    if key in ("solver_type", "algorithm_type", "variance_type"):
        return value in (choices_of(class_name, key) or ())
    ours = class_name in ("DDIMScheduler", "DDPMScheduler")  # whose spacing may also be one of ours, or a list
    return key != "timestep_spacing" or ours or value in ("leading", "trailing", "linspace")


def _checked(name: str, key: str, value: Any) -> Any:
    """``value`` in the type of the setting's default and among its choices; raises UsageError otherwise."""
    if key == "trained_betas":
        return None if value is None else _checked_betas(value)
    default = KEYS[name][key] if key in KEYS[name] else PIPELINE_SHIFT[key]
    if key == "disable_corrector" and isinstance(value, list | tuple):
        return tuple(value)
    known = choices_of(name, key)
    if value is None and default is None:
        return None
    wanted: Any = (int, float) if default is None or isinstance(default, float) else type(default)
    wanted = str if default is None and known is not None else wanted
    if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
        expected = "number" if default is None else type(default).__name__
        raise UsageError(f"scheduler: {key} is {value!r}, a {type(value).__name__}, not a {expected}")
    if key not in _FIELDS and known is not None and value not in known:
        raise UsageError(
            f"scheduler: {key} {value!r} is not supported; supported: {', '.join(map(str, known)) or 'none'}"
        )
    return float(value) if isinstance(default, float) else value


def _checked_betas(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"scheduler: trained_betas is {value!r}, a {type(value).__name__}, not a list of numbers")
    for beta in value:
        if not isinstance(beta, int | float) or isinstance(beta, bool):
            raise UsageError(f"scheduler: trained_betas holds {beta!r}, a {type(beta).__name__}, not a number")
    return tuple(float(beta) for beta in value)
