"""The shift of a flow's noise levels that follows from the image's size, which a graph fixes. Standard library only.

diffusers' pipelines hand it to the scheduler as ``mu`` where its ``use_dynamic_shifting`` is on.
"""

from __future__ import annotations

import math

from mmd_export.errors import UsageError
from mmd_export.scheduler_config import SchedulerConfig
from mmd_export.scheduler_keys import DYNAMIC, KEYS, PIPELINE_SHIFT


def with_tokens(config: SchedulerConfig, tokens: int) -> SchedulerConfig:
    """The config with the ``mu`` of an image of so many tokens; as it is where its shift is fixed.

    mu = base_shift + (tokens - base_image_seq_len) (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len),
    ``calculate_shift`` of diffusers' Stable Diffusion 3 and Flux pipelines, in their order of operations.
    """
    if not config.get(DYNAMIC):
        return config
    stated = {key: config.get(key) for key in PIPELINE_SHIFT}
    known = {**PIPELINE_SHIFT, **{key: value for key, value in stated.items() if value is not None}}
    low, high, base, largest = known.values()
    if low == high:
        raise UsageError(f"scheduler: base_image_seq_len and max_image_seq_len are both {low}; they must differ")
    slope = (largest - base) / (high - low)
    return config.told(mu=tokens * slope + (base - slope * low))


def shift_of(config: SchedulerConfig) -> float:
    """``shift`` or ``flow_shift``; of a dynamic shift e^mu, or mu where ``time_shift_type`` is linear."""
    if config.get(DYNAMIC):
        mu = float(config["mu"])
        return mu if config["time_shift_type"] == "linear" else math.exp(mu)
    return float(config["shift" if "shift" in config.settings() else "flow_shift"])


def require_shift(model: SchedulerConfig, chosen: SchedulerConfig) -> None:
    """Raise UsageError where the dynamic shift of ``model`` is none for the class of ``chosen``, or is not known."""
    if not model.get(DYNAMIC):
        return
    if DYNAMIC not in KEYS[chosen.class_name]:
        raise UsageError(
            f"--sampler {chosen.sampler}: {model.class_name} has {DYNAMIC} True, {chosen.class_name} has a fixed shift "
            f"only; leave --sampler out, or set {DYNAMIC} false"
        )
    mu = chosen.get("mu")
    if mu is None:
        raise UsageError(
            f"scheduler {chosen.class_name}: {DYNAMIC} is True, and the model's class has no pipeline that derives the "
            f"shift from the image's size (SD3Transformer2DModel has); set {DYNAMIC} false and shift or flow_shift"
        )
    if chosen["time_shift_type"] == "linear" and mu <= 0.0:
        raise UsageError(f"scheduler: time_shift_type is linear, the shift of this image {mu:g}; it must be above 0")
