"""Settings that two configs of one pipeline both state: refused where they differ, both values in the message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmd_export.errors import UsageError
from mmd_export.schedule import SchedulerConfig
from mmd_export.scheduler_keys import FIXED_PREDICTION, KEYS, UNIT_FLOW
from mmd_export.solvers import of_sampler

_LATENT_SCALE = ("scaling_factor", "latent_scale")


def require_channels(config: Mapping[str, Any], where: str) -> int:
    """The channels of the state; the network must give back as many as it takes."""
    taken, given = config.get("in_channels", 3), config.get("out_channels", 3)
    if not isinstance(taken, int) or not isinstance(given, int):
        raise UsageError(f"{where}: in_channels is {taken!r}, out_channels {given!r}; whole numbers are expected")
    if given == 2 * taken:
        raise UsageError(
            f"{where}: in_channels {taken} and out_channels {given} differ: the model learned its variance; "
            "the samplers here have a fixed one, so keep its first half of channels only"
        )
    if taken > given:
        raise UsageError(
            f"{where}: in_channels {taken} and out_channels {given} differ: the model takes more than the state, "
            "as an inpainting model does mask and image, which no sampler here gives it; choose one that takes no more"
        )
    if taken != given:
        raise UsageError(f"{where}: in_channels {taken} and out_channels {given} differ")
    return taken


def require_agreement(
    config: Mapping[str, Any], scheduler: SchedulerConfig, where: str, prediction: str | None = None
) -> None:
    """The network's config against the scheduler's: prediction type and number of training timesteps.

    ``prediction``: what the network predicts, where its class fixes it.
    """
    expected = scheduler.predicts
    if prediction not in (None, expected):
        fitting = (
            "a flow-matching model goes with FlowMatchEulerDiscreteScheduler or with prediction_type flow_prediction"
        )
        if prediction == UNIT_FLOW:
            fitting = "Sana Sprint (guidance_embeds) goes with SCMScheduler"
        raise UsageError(
            f"{where}: the model predicts {prediction!r}, {scheduler.class_name} expects {expected!r}; {fitting}"
        )
    own, total = config.get("num_train_timesteps"), scheduler.num_train_timesteps
    if own is not None and own != total:
        raise UsageError(
            f"{where}: the model says num_train_timesteps {own!r}, the scheduler {total!r}; correct the wrong config"
        )
    require_stated_prediction(config.get("prediction_type"), scheduler, where)


def require_stated_prediction(stated: Any, scheduler: SchedulerConfig, where: str) -> None:
    """The prediction type that the network states, if any, against what the scheduler's class takes its output for."""
    known = {scheduler.predicts, FIXED_PREDICTION.get(scheduler.sampler)}
    if "prediction_type" in KEYS[scheduler.class_name]:  # EDM's classes have the key, and another name for its default
        known.add(scheduler.prediction_type)
    if stated is not None and stated not in known:
        raise UsageError(
            f"{where}: the model says prediction_type {stated!r}, the scheduler {scheduler.predicts!r}; "
            "correct the wrong config"
        )


def require_same_prediction(scheduler: SchedulerConfig, sampler: str, where: str) -> None:
    """``--sampler`` of another class than the model's must take the network's output for the same."""
    expected = of_sampler(scheduler, sampler).predicts
    if expected != scheduler.predicts:
        stated = "prediction_type" in KEYS[scheduler.class_name]
        correct = f", or correct prediction_type in its scheduler config ({scheduler.class_name})" if stated else ""
        raise UsageError(
            f"{where}: the model predicts {scheduler.predicts}, --sampler {sampler} expects {expected}; "
            f"leave --sampler out{correct}"
        )


def require_latents(config: Mapping[str, Any], autoencoder: Mapping[str, Any], where: str) -> None:
    """The network's config against its autoencoder's: latent channels (of a VQModel its codes') and scale."""
    channels, latent = config.get("in_channels", 3), _first(autoencoder, ("vq_embed_dim", "latent_channels"))
    if latent is not None and latent != channels:
        raise UsageError(
            f"{where}: the model takes {channels} channels, the autoencoder makes latents of {latent}; "
            "they belong to different pipelines"
        )
    own, other = _first(config, _LATENT_SCALE), _first(autoencoder, _LATENT_SCALE)
    if own is not None and other is not None and own != other:
        raise UsageError(
            f"{where}: the model says latent scale {own!r}, the autoencoder {other!r}; correct the wrong config"
        )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of ``names`` that ``config`` states, or None."""
    return next((config[name] for name in names if config.get(name) is not None), None)
