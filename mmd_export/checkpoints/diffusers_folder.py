"""A diffusers folder, pipeline or bare UNet2DModel, a run folder, or a hub id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mmd_export.checkpoints.agreement import require_agreement, require_channels
from mmd_export.checkpoints.autoencoder import read_autoencoder
from mmd_export.checkpoints.base import Checkpoint
from mmd_export.checkpoints.weights import (
    HALF,
    SAFETENSORS,
    hash_weights,
    load_strictly,
    read_json,
    read_weights,
)
from mmd_export.conditions import class_condition
from mmd_export.denoiser import DiffusersUNet
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.plan import StepPlan
from mmd_export.schedule import SchedulerConfig

PLAN_FILE = "plan.json"
PICTURES = (1, 3)  # channels
_SHARDS = "diffusion_pytorch_model-?????-of-?????.safetensors"


def read_folder(folder: Path, name: str, licence: str | None = None) -> Checkpoint:
    """The network in ``folder`` or in its ``unet/``; raises UsageError that names the file and what is wrong."""
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config_file, scheduler_file = unet_folder / "config.json", scheduler_folder / "scheduler_config.json"
    config = read_json(config_file)
    scheduler = SchedulerConfig.from_file(scheduler_file)
    unet = new_unet(config, str(config_file))
    require_agreement(config, scheduler, str(config_file))
    autoencoder = read_autoencoder(folder, config)
    shape = sample_shape(config, str(config_file))
    weights, warnings = read_weights(unet_folder)
    load_strictly(unet, weights, str(unet_folder))
    files = {"unet/config.json": config_file, "scheduler/scheduler_config.json": scheduler_file}
    if (index := folder / "model_index.json").is_file():
        files[index.name] = index
    plan_file = folder / PLAN_FILE
    checkpoint = Checkpoint(
        name=name,
        folder=folder,
        denoiser=DiffusersUNet(unet.eval()).requires_grad_(False),
        scheduler=scheduler,
        shape=shape,
        sha256=hash_weights(weights, config, scheduler),
        conditions=class_condition(config.get("num_class_embeds")),
        plan=StepPlan.from_dict(read_json(plan_file)) if plan_file.is_file() else None,
        licence=licence,
        warnings=warnings,
        configs={path: file.read_bytes() for path, file in files.items()},
    )
    if autoencoder is not None:
        return checkpoint.of_latents(autoencoder)
    if shape[0] in PICTURES:
        return checkpoint
    told = f"{shape[0]} channels and no vae/ beside them: taken for pixels in [-1, 1] and clamped, not for latents"
    return replace(checkpoint, warnings=(*warnings, told))


def download(hub_id: str) -> Path:
    """Fetch a diffusers repository, safetensors and configs only: whole weights, else shards, else the fp16 variant."""
    from huggingface_hub import snapshot_download

    try:
        for weights in (SAFETENSORS, _SHARDS, HALF):
            folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", f"*{weights}"]))
            if any(folder.rglob("*.safetensors")):
                break
    except Exception as error:  # the hub client raises many unrelated types; each becomes one line
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotAvailableError(f"model {hub_id} is no local folder and could not be downloaded: {reason}") from error
    return folder


def new_unet(config: dict[str, Any], where: str) -> nn.Module:
    """An untrained UNet2DModel; raises UsageError for another class or a config that diffusers refuses."""
    from diffusers import UNet2DModel

    class_name = config.get("_class_name")
    if class_name != "UNet2DModel":
        raise UsageError(f"{where}: model class {class_name!r} is not supported; supported: UNet2DModel")
    try:
        unet: nn.Module = UNet2DModel.from_config(config)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UsageError(f"{where}: diffusers refuses it: {error}") from error
    return unet


def sample_shape(config: dict[str, Any], where: str) -> tuple[int, int, int]:
    """(C, H, W) of the state."""
    size, channels = config.get("sample_size"), require_channels(config, where)
    if isinstance(size, int):
        return channels, size, size
    if isinstance(size, list) and len(size) == 2:
        return channels, int(size[0]), int(size[1])
    raise UsageError(f"{where}: sample_size is {size!r}; an integer or two are expected")
