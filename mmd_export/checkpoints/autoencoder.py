"""The autoencoder beside a latent model: ``vae/`` or ``vqvae/`` of a diffusers pipeline, its decoder read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mmd_export.checkpoints.agreement import require_latents
from mmd_export.checkpoints.weights import hash_weights, load_strictly, read_json, read_weights
from mmd_export.decoder import LatentDecoder
from mmd_export.errors import UsageError
from mmd_export.quiet_diffusers import import_diffusers

FOLDERS = ("vae", "vqvae")
STATISTICS = ("latents_mean", "latents_std")
CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")


@dataclass(frozen=True)
class Autoencoder:
    """A ``decoder`` and the ``sha256`` of the whole, or the ``reason`` why the latents cannot be decoded."""

    decoder: LatentDecoder | None = None
    sha256: str = ""
    reason: str = ""
    warnings: tuple[str, ...] = ()


def read_autoencoder(pipeline: Path, network: Mapping[str, Any]) -> Autoencoder | None:
    """The autoencoder of the folder ``pipeline``, None if it has none; ``network`` is the config of the denoiser.

    Raises UsageError where the two contradict each other or the weights do not fit.
    """
    found = [pipeline / part for part in FOLDERS if (pipeline / part / "config.json").is_file()]
    if not found:
        return None
    folder, where = found[0], str(found[0] / "config.json")
    config = read_json(folder / "config.json")
    require_latents(network, config, str(pipeline))
    if config.get("_class_name") not in CLASSES:
        reason = f"{where}: autoencoder class {config.get('_class_name')!r} cannot be decoded here"
        return Autoencoder(reason=f"{reason}; supported: {', '.join(CLASSES)}")
    if not any(folder.glob("diffusion_pytorch_model*")):
        return Autoencoder(reason=f"{folder} holds no weights; copy or download them too")
    autoencoder = new_autoencoder(config, where)
    settings = autoencoder.config
    require_latents(network, settings, str(pipeline))  # again, with what the class fills in
    scale, shift = _number(settings, "scaling_factor", 1.0, where), _number(settings, "shift_factor", 0.0, where)
    if scale <= 0.0:
        raise UsageError(f"{where}: scaling_factor is {scale:g}; latents are divided by it, so it must be positive")
    mean, std = (_channels(settings, name, network.get("in_channels"), where) for name in STATISTICS)
    if 0.0 in std:
        raise UsageError(f"{where}: latents_std is {list(std)}; a channel times 0 is none")
    if bool(mean) != bool(std) or (mean and shift != 0.0):
        return Autoencoder(reason=_half_stated(settings, where))
    weights, warnings = read_weights(folder)
    load_strictly(autoencoder, weights, str(folder))
    decoder = LatentDecoder(autoencoder.eval(), scale, shift, mean, std).requires_grad_(False)
    return Autoencoder(decoder, hash_weights(weights, config), "", warnings)


def new_autoencoder(config: dict[str, Any], where: str) -> Any:
    """An untrained autoencoder of one of ``CLASSES``; raises UsageError for a config that diffusers refuses."""
    diffusers = import_diffusers()
    try:
        autoencoder: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise UsageError(f"{where}: diffusers refuses it: {error}") from error
    return autoencoder


def _channels(settings: Mapping[str, Any], name: str, count: Any, where: str) -> tuple[float, ...]:
    """One finite number a channel of the latent; empty where the config has none."""
    values = settings.get(name)
    if values is None:
        return ()
    if not isinstance(values, list | tuple) or len(values) != count or None in values:
        raise UsageError(f"{where}: {name} is {values!r}; a list of {count} numbers is expected, one a latent channel")
    return tuple(_number({name: value}, name, 0.0, where) for value in values)


def _half_stated(settings: Mapping[str, Any], where: str) -> str:
    """Why statistics of the channels cannot be undone: one of the two is missing, or there is a shift as well."""
    stated = [name for name in STATISTICS if settings.get(name) is not None]
    if len(stated) == 1:
        (other,) = set(STATISTICS) - set(stated)
        return f"{where}: {stated[0]} is stated and {other} is not; state both or none"
    return f"{where}: latents_mean and shift_factor {settings['shift_factor']!r} are both stated; keep one"


def _number(settings: Mapping[str, Any], name: str, default: float, where: str) -> float:
    """A finite number of the config, ``default`` where it is absent or null."""
    value = settings.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise UsageError(f"{where}: {name} is {value!r}; a number is expected")
    return float(value)
