"""Everything that decides a finetuning run, in one frozen model; a TOML file and the command line fill it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mmd_export.errors import UsageError
from mmd_export.plan_options import PlanOptions, parse_timesteps
from mmd_export.target_options import MOST_CALIBRATION
from mmd_finetune.data import DataOptions, parse_crop
from mmd_finetune.encoder_source import Source
from mmd_finetune.setting_names import first_problem, flag_of

PLAN_RATE = 2e-3
ENCODED_AT_ONCE, ENCODED_PER_TUNED = 512, 8
SEED_LIMIT = 2**63  # the upper half of the generator's seeds is kept for measuring, see mmd_finetune.task


class FinetuneSettings(BaseModel):
    """One run. The defaults are those of ``finetune/configs/digits.toml``.

    Attributes:
        model: what ``load_checkpoint`` takes.
        steps: K, the network calls of the sampler that is tuned; ``timesteps`` lists them instead, descending. A run
            folder knows its own plan and needs neither.
        out: the run folder.
        sampler: a solver's name; None runs the one of the model's scheduler. ``eta`` and ``spacing`` go with it.
        data: what ``load_images`` takes; ``resize``, ``crop`` and ``flip`` as in ``DataOptions``.
        holdout_fraction: share of the images that the loss never sees and the held-out encoders measure against; each
            image's content decides. 0 uses all for both.
        features: encoders of the loss, which is the weighted sum of their MMD^2; see ``docs/encoders.md``.
        balance: weights from the untuned model's MMD^2 (``mmd_finetune.balance``), or equal ones; auto is equal for the
            encoders that ship with this package, whose MMD^2 is of like scale unless the kernel is a polynomial, and
            untuned for all others.
        holdout: encoders of the held-out metric, which the loss never sees; the first one decides the best weights.
        feature_cache: keep the features of real images on disk; it changes no number.
        kernel: see ``mmd_finetune.kernels``; ``NAME`` or ``NAME:NUMBERS``.
        estimator: of the MMD^2.
        reference: the real side of the loss: all real images (bank), as many as the batch anew every iteration (batch),
            or ``landmarks`` that stand for all (nystrom); 1024 of them if not said.
        batch_size: images of one MMD estimate, over all processes.
        micro_batch_size: images in memory at once, in one process, in the network and in encoders; None is the whole
            batch, and 512 where encoders keep no gradient. It changes rounding only.
        learning_rate: of Adam; ``rate_decay`` cosine lets it fall to zero over the iterations.
        ema_decay: average <- ema_decay * average + (1 - ema_decay) * weights after every iteration.
        clip_gradient: largest norm of the gradient of the weights, and of that of the plan's numbers.
        evaluate_every: iterations between two held-out evaluations, each of ``evaluate_count`` samples of the average.
        metrics: further metrics of those samples for the log, and with intervals for the result, in every held-out
            encoder, see ``mmd_finetune.metrics.suite``; they decide nothing.
        patience: stop after so many evaluations without a new best; None never stops early.
        tune: which weights: ``all``, ``lora`` (merged into the weights at the end), ``norm-bias`` or ``none``.
        lora_rank: of the adapters, 8 by default; ``lora_alpha`` scales them by alpha / rank, the rank by default;
            ``lora_targets`` are the ends of layers' names, by default every linear and convolutional layer.
        learn: ``weights`` alone, with the sampler's ``coefficients``, or with its whole ``plan``, timesteps too.
        plan_learning_rate: of the plan's numbers; it decays as ``learning_rate`` does.
        precision: the arithmetic that is tuned, one of target onnx; ``calibration`` images set its ranges.
        checkpoint_calls: recompute network calls in the backward pass: less memory, a third more time.
        autocast: bf16 runs the network's calls in bfloat16; encoders and statistic stay as they are.
        channels_last: memory format of the network's convolutions.
        compile: run the network through torch.compile.
        device: auto takes CUDA where there is one. Only runs on the CPU repeat bit for bit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    steps: int | None = Field(default=None, ge=1)
    out: Path
    sampler: str | None = None
    eta: float | None = Field(default=None, ge=0.0)
    spacing: str | None = None
    timesteps: tuple[int | float, ...] | None = None
    data: str = "digits"
    resize: Literal["crop", "stretch"] | None = None
    crop: tuple[int, int, int, int] | None = None
    flip: bool = False
    holdout_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    features: tuple[str, ...] = Field(default=("digits-conv", "pixels"), min_length=1)
    balance: Literal["auto", "untuned", "equal"] = "auto"
    holdout: tuple[str, ...] = Field(default=("digits-mlp",), min_length=1)
    feature_cache: bool = True
    kernel: str = "gaussian"
    estimator: Literal["unbiased", "biased"] = "unbiased"
    reference: Literal["bank", "batch", "nystrom"] = "bank"
    landmarks: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=256, ge=2)
    micro_batch_size: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0.0, allow_inf_nan=False)
    rate_decay: Literal["constant", "cosine"] = "cosine"
    iterations: int = Field(default=200, ge=1)
    seed: int = Field(default=0, ge=0, lt=SEED_LIMIT)
    ema_decay: float = Field(default=0.97, ge=0.0, lt=1.0)
    clip_gradient: float = Field(default=1.0, gt=0.0)
    evaluate_every: int = Field(default=20, ge=1)
    evaluate_count: int = Field(default=2048, ge=2)
    metrics: tuple[str, ...] = ()
    patience: int | None = Field(default=None, ge=1)
    tune: Literal["all", "lora", "norm-bias", "none"] = "all"
    lora_rank: int | None = Field(default=None, ge=1)
    lora_alpha: int | None = Field(default=None, ge=1)
    lora_targets: tuple[str, ...] = ()
    learn: Literal["weights", "coefficients", "plan"] = "weights"
    plan_learning_rate: float = Field(default=PLAN_RATE, gt=0.0, allow_inf_nan=False)
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8", "w8", "w4"] = "fp32"
    calibration: int | None = Field(default=None, ge=1, le=MOST_CALIBRATION)
    checkpoint_calls: bool = False
    autocast: Literal["off", "bf16"] = "off"
    channels_last: bool = True
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("features", "holdout", "lora_targets", "metrics", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """``a,b`` as the command line gives it."""
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value

    @field_validator("crop", mode="before")
    @classmethod
    def _box(cls, value: Any) -> Any:
        """``left,top,width,height`` as the command line gives it."""
        return parse_crop(value) if isinstance(value, str) else value

    @field_validator("metrics")
    @classmethod
    def _measurable(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Known names, each once; those that need images outside the training set only where some are held out."""
        from mmd_finetune.metrics.suite import require_while_tuning

        require_while_tuning(value, split=bool(info.data.get("holdout_fraction")))
        return value

    @field_validator("timesteps", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """``999,749`` as the command line gives it."""
        return parse_timesteps(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _separate(self) -> Self:
        for key in ("features", "holdout"):
            names = getattr(self, key)
            if len(set(names)) != len(names):
                raise ValueError(f"{flag_of(key)} {','.join(names)} names an encoder twice; leave one out")
        for name in self.holdout:
            if name in self.features:
                raise ValueError(
                    f"--holdout {name} is also in --features; the loss must not see it, name another in one of them"
                )
        if self.landmarks is not None and self.reference != "nystrom":
            raise ValueError(
                f"--landmarks is {self.landmarks}, but --reference is {self.reference}; leave it out, or give "
                "--reference nystrom"
            )
        return self

    @model_validator(mode="after")
    def _together(self) -> Self:
        """What is tuned, and that each option has something to act on."""
        if self.tune == "none" and self.learn == "weights":
            raise ValueError(
                "--tune none with --learn weights leaves nothing to tune; add --learn plan, or give --tune all"
            )
        given = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha, "lora_targets": self.lora_targets or None}
        for name, value in given.items():
            if value is not None and self.tune != "lora":
                told = ",".join(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"{flag_of(name)} is {told}, but --tune is {self.tune}; leave it out, or give --tune lora"
                )
        if self.learn == "weights" and self.plan_learning_rate != PLAN_RATE:
            raise ValueError(
                f"--plan-lr is {self.plan_learning_rate:g}, but --learn is weights; leave it out, or give --learn plan"
            )
        if self.calibration is not None and self.precision not in ("int8", "fp8"):
            raise ValueError(
                f"--calibration is {self.calibration}, but --precision {self.precision} has no ranges to set; "
                "leave it out"
            )
        if self.autocast != "off" and self.precision != "fp32":
            raise ValueError(
                f"--autocast is {self.autocast}, but --precision {self.precision} sets the arithmetic; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _enough_neighbours(self) -> Self:
        from mmd_finetune.metrics.suite import NEIGHBOUR_METRICS, MetricOptions

        k, asked = MetricOptions().neighbours, [name for name in self.metrics if name in NEIGHBOUR_METRICS]
        if asked and self.evaluate_count <= k:
            raise ValueError(
                f"--metrics {','.join(asked)} needs more than {k} samples, evaluate_count is {self.evaluate_count}"
            )
        return self

    def plan_options(self) -> PlanOptions:
        """The part that chooses the sampler."""
        return PlanOptions(**{entry.name: getattr(self, entry.name) for entry in fields(PlanOptions)})

    @property
    def balanced(self) -> bool:
        """Whether the encoders are weighed by the untuned model's MMD^2."""
        shipped = all(not Source.parse(spec).place for spec in self.features)
        return self.balance == "untuned" or (self.balance == "auto" and not shipped)

    @property
    def encoded_at_once(self) -> int:
        """Images that an encoder takes at once where no gradient is kept: far less memory an image than the chain's."""
        return min(ENCODED_AT_ONCE, ENCODED_PER_TUNED * (self.micro_batch_size or ENCODED_AT_ONCE))

    def data_options(self) -> DataOptions:
        """The part that prepares the images."""
        return DataOptions(**{entry.name: getattr(self, entry.name) for entry in fields(DataOptions)})

    def public(self) -> dict[str, Any]:
        """JSON-ready, without the places of this machine: ``out`` and caches are left out, paths become names."""
        values = self.model_dump(mode="json", exclude={"out", "feature_cache"})
        encoders = {key: [Source.parse(spec).name for spec in values[key]] for key in ("features", "holdout")}
        data = values["data"]
        named = {"model": Path(values["model"]).name, "data": data if Source.parse(data).is_hub_id else Path(data).name}
        return values | encoders | named


def make_settings(
    given: Mapping[str, Any], config: Path | None = None, earlier: FinetuneSettings | None = None
) -> FinetuneSettings:
    """Settings from a TOML file and from ``given``, which wins; a value None in ``given`` counts as not given.

    ``earlier`` are those of the run that goes on, which hold where neither says another.
    Raises UsageError that names the setting, its value and what is allowed; for settings that differ from ``earlier``
    and make no sense beside the others, both values.
    """
    new = ({} if config is None else _read_toml(config)) | {k: v for k, v in given.items() if v is not None}
    old = {} if earlier is None else earlier.model_dump(mode="json")
    try:
        return FinetuneSettings(**(old | new))
    except ValidationError as error:
        changed = [name for name in sorted(new) if name in old and name != "out" and str(new[name]) != str(old[name])]
        if earlier is not None and changed and not error.errors()[0]["loc"]:
            told = "; ".join(f"{flag_of(name)} was {old[name]!r}, is now {new[name]!r}" for name in changed)
            raise UsageError(f"--resume {earlier.out}: {told}; leave them out, or choose another --out") from error
        raise UsageError(first_problem(error, FinetuneSettings.model_fields, given, config)) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {path} is not TOML: {error}") from error
