"""A diffusers folder, pipeline or bare model, a run folder, or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from mmd_export.checkpoints.agreement import require_agreement, require_channels
from mmd_export.checkpoints.autoencoder import FOLDERS as AUTOENCODERS
from mmd_export.checkpoints.autoencoder import read_autoencoder
from mmd_export.checkpoints.base import Checkpoint
from mmd_export.checkpoints.families import (
    NEGATIVE,
    Facts,
    Family,
    family_of,
    image_size,
    pooled_width,
    require_text,
    text_length,
)
from mmd_export.checkpoints.folder_card import CARD, stated_licence, stated_lineage
from mmd_export.checkpoints.weights import (
    HALF,
    HALF_INDEX,
    INDEX,
    SAFETENSORS,
    hash_weights,
    load_strictly,
    read_json,
    read_weights,
)
from mmd_export.conditions import CLASS_LABELS, Condition
from mmd_export.denoiser import DiffusersNetwork, DiffusersUNet
from mmd_export.dynamic_shift import with_tokens
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.guidance import guidance_embedding
from mmd_export.network_options import AS_IT_IS, Choice, NetworkOptions
from mmd_export.plan import StepPlan
from mmd_export.quiet_diffusers import import_diffusers
from mmd_export.schedule import SchedulerConfig
from mmd_export.scheduler_keys import UNIT_FLOW
from mmd_export.tuned_precision import QUANTISATION_FILE, TunedPrecision

PLAN_FILE = "plan.json"
PICTURES = (1, 3)  # channels
NETWORKS = ("unet", "transformer")  # where a pipeline holds its network
_SHARDS = "diffusion_pytorch_model-?????-of-?????.safetensors"
_HALF_SHARDS = "diffusion_pytorch_model.fp16-?????-of-?????.safetensors"
TIMESTEP_SCALE = "timestep_scale"  # Sana's key
_OURS = {"UNet2DModel": (TIMESTEP_SCALE,)}  # keys that diffusers does not read; it would warn of them
LCM_SCALE = 8.5  # default of diffusers' LatentConsistencyModelPipeline
SPRINT_SCALE = 4.5  # of its SanaSprintPipeline


def read_folder(folder: Path, name: str, licence: str | None = None, options: NetworkOptions = AS_IT_IS) -> Checkpoint:
    """The network in ``folder``, its ``unet/`` or ``transformer/``; raises UsageError that names the file at fault.

    ``licence`` None: what the folder's model card states.
    """
    found = _read_configs(folder)
    family, whole, where = found.family, found.whole, str(found.config_file)
    mean, notes = _learned_variance(whole, family)
    shape = sample_shape(whole, where, mean)
    autoencoder = read_autoencoder(folder, whole)
    scheduler = with_tokens(found.scheduler, _patches(whole, shape)) if family.tokens else found.scheduler
    if options.text_length is not None and not family.text_length:
        raise UsageError(f"model {name} takes no text, --text-length is {options.text_length}; leave it out")
    size = image_size(shape, folder, latent=_makes_latents(family, whole))
    told = _told(family, whole, size, (folder, where), options)
    weights, warnings = read_weights(found.config_file.parent)
    load_strictly(found.network, weights, str(found.config_file.parent))
    denoiser, chosen = _denoiser(family, found.network.eval(), whole, (shape[0], mean), options)
    checkpoint = Checkpoint(
        name=name,
        folder=folder,
        denoiser=denoiser.requires_grad_(False),
        scheduler=scheduler,
        shape=shape,
        sha256=hash_weights(weights, found.config, scheduler),
        conditions=told.conditions,
        unconditional=_unconditional(family, told.conditions),
        options={**told.options, **chosen.options},
        latent=_makes_latents(family, whole),
        prediction=family.prediction,
        plan=_plan(folder / PLAN_FILE),
        tuned_precision=_tuned_precision(folder / QUANTISATION_FILE),
        licence=licence or stated_licence(folder),
        lineage=stated_lineage(folder),
        warnings=(*warnings, *notes, *told.warnings, *chosen.warnings),
        configs={path: file.read_bytes() for path, file in found.files.items()},
    )
    return _pixels(checkpoint) if autoencoder is None else checkpoint.of_latents(autoencoder)


@dataclass(frozen=True)
class _Configs:
    """What the configs of a folder tell.

    Attributes:
        config_file: the network's; its weights lie beside it.
        config: what it holds; ``whole`` has the class's own defaults too.
        network: untrained.
        scheduler: as the pipeline makes it.
        files: by the name that each has in a run folder.
    """

    config_file: Path
    config: dict[str, Any]
    whole: dict[str, Any]
    family: Family
    network: nn.Module
    scheduler: SchedulerConfig
    files: Mapping[str, Path]


def _read_configs(folder: Path) -> _Configs:
    """Network and scheduler, which agree."""
    place = next((folder / part for part in NETWORKS if (folder / part).is_dir()), folder)
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config_file, scheduler_file = place / "config.json", scheduler_folder / "scheduler_config.json"
    config, where = read_json(config_file), str(config_file)
    family = family_of(config.get("_class_name"), where)
    if not scheduler_file.is_file():
        raise UsageError(_without_scheduler(scheduler_file, place))
    scheduler = SchedulerConfig.from_file(scheduler_file)
    network = new_network(config, where)
    whole = _whole_config(network)
    scheduler, predicts = _in_pipeline(scheduler, whole, family)
    require_agreement(config, scheduler, where, predicts)
    files = {f"{family.folder}/config.json": config_file, "scheduler/scheduler_config.json": scheduler_file}
    if (index := folder / "model_index.json").is_file():
        files[index.name] = index
    return _Configs(config_file, config, whole, family, network, scheduler, files)


def _without_scheduler(file: Path, network: Path) -> str:
    """The message, with the pipeline that a bare model may be a part of."""
    pipeline = network.parent
    part_of_one = (pipeline / "scheduler" / file.name).is_file()
    advice = f"give the pipeline folder {pipeline}, or copy" if part_of_one else "copy"
    return f"scheduler config {file} does not exist; {advice} the scheduler_config.json of its pipeline there"


def _plan(file: Path) -> StepPlan | None:
    """What the model was tuned for, if it was."""
    return StepPlan.from_dict(read_json(file)) if file.is_file() else None


def _tuned_precision(file: Path) -> TunedPrecision | None:
    """The arithmetic that it was tuned in, if that was not float32."""
    return TunedPrecision.from_dict(read_json(file), str(file)) if file.is_file() else None


def _pixels(checkpoint: Checkpoint) -> Checkpoint:
    """A model without an autoencoder; a number of channels that no picture has is a warning."""
    channels = checkpoint.shape[0]
    if checkpoint.latent or channels in PICTURES:
        return checkpoint
    assumed = f"{channels} channels and no vae/ beside them: taken for pixels in [-1, 1] and clamped, not for latents"
    return replace(checkpoint, warnings=(*checkpoint.warnings, assumed))


@dataclass(frozen=True)
class _Chosen:
    """What was decided about a network, with what the user should hear."""

    conditions: tuple[Condition, ...] = ()
    options: Mapping[str, Choice] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def _told(
    family: Family, config: dict[str, Any], size: tuple[int, int], place: tuple[Path, str], options: NetworkOptions
) -> _Chosen:
    """The conditions, held against the pipeline's text encoders; ``place``: the folder, and where its config is."""
    folder, where = place
    if not family.text_length:
        return _Chosen(family.conditions(Facts(config, 0, None, size, where)))
    length, note = text_length(family, folder, options.text_length)
    conditions = family.conditions(Facts(config, length, pooled_width(folder), size, where))
    require_text(conditions, family, folder, where)
    return _Chosen(conditions, {"text_length": length}, (note,) if note else ())


def _unconditional(family: Family, conditions: tuple[Condition, ...]) -> dict[str, int | str]:
    """What takes each condition's place in guidance."""
    found: dict[str, int | str] = {each.name: NEGATIVE[each.name] for each in conditions if each.name in NEGATIVE}
    for each in conditions:
        if family.null_class and each.name == CLASS_LABELS and each.below is not None:
            found[each.name] = each.below
    return found


def _in_pipeline(
    scheduler: SchedulerConfig, config: Mapping[str, Any], family: Family
) -> tuple[SchedulerConfig, str | None]:
    """What the pipeline makes of the scheduler, and what the network predicts: Sana Sprint makes trigflow of a flow."""
    if not family.is_sprint(config):
        return scheduler, family.prediction
    return scheduler.told(of_flow=True) if scheduler.sampler == "scm" else scheduler, UNIT_FLOW


def _denoiser(
    family: Family,
    network: nn.Module,
    config: dict[str, Any],
    sizes: tuple[int, int | None],
    options: NetworkOptions,
) -> tuple[nn.Module, _Chosen]:
    """The network behind the one signature; a distilled one has its guidance scale embedded.

    ``sizes``: the channels of the state, and those again if a learned variance follows them.
    """
    channels, mean = sizes
    if type(network).__name__ == "UNet2DModel":
        return DiffusersUNet(network, mean, config.get(TIMESTEP_SCALE, 1.0)), _Chosen()
    if width := config.get("time_cond_proj_dim"):
        scale, chosen = _embedded(options, LCM_SCALE, "LCM's")
        return DiffusersNetwork(network, channels, 1.0, {"timestep_cond": (guidance_embedding(scale, width),)}), chosen
    if family.is_sprint(config):  # its pipeline leaves timestep_scale out
        scale, chosen = _embedded(options, SPRINT_SCALE, "Sana Sprint's")
        return DiffusersNetwork(
            network, channels, 1.0, {"guidance": (scale * config["guidance_embeds_scale"],)}
        ), chosen
    return DiffusersNetwork(network, channels, config.get(TIMESTEP_SCALE, 1.0)), _Chosen()


def _embedded(options: NetworkOptions, usual: float, whose: str) -> tuple[float, _Chosen]:
    """The guidance scale that the network is told."""
    if options.guidance_scale is not None:
        return options.guidance_scale, _Chosen((), {"guidance_scale": options.guidance_scale})
    note = f"guidance scale {usual} is embedded, as {whose}; --guidance-scale S changes it"
    return usual, _Chosen((), {"guidance_scale": usual}, (note,))


def _makes_latents(family: Family, config: dict[str, Any]) -> bool:
    """What the class tells where there is no autoencoder."""
    return config.get("in_channels") not in PICTURES if family.latent is None else family.latent


def _whole_config(network: Any) -> dict[str, Any]:
    """The config with the class's own defaults for what the file leaves out."""
    whole: dict[str, Any] = {**network.config}
    if whole.get("out_channels", 0) is None:  # as many as come in
        whole["out_channels"] = whole["in_channels"]
    return whole


def download(hub_id: str) -> Path:
    """Fetch a diffusers repository, safetensors, configs and card only.

    Whole weights, else shards, else the fp16 variant, of each part by itself: a whole autoencoder may stand beside a
    transformer in shards.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", CARD, f"*{SAFETENSORS}"]))
        for weights in (_SHARDS, HALF, _HALF_SHARDS):
            if not (parts := _without_weights(folder)):
                break
            wanted = [str(PurePosixPath(part) / weights) for part in parts]
            folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", *wanted]))
    except Exception as error:  # the hub client raises many unrelated types; each becomes one line
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotAvailableError(f"model {hub_id} is no local folder and could not be downloaded: {reason}") from error
    return folder


def _without_weights(folder: Path) -> list[str]:
    """The parts of a pipeline, or the bare model, of which there is a config and not all weights."""
    return [
        part
        for part in (".", *NETWORKS, *AUTOENCODERS)
        if (folder / part / "config.json").is_file() and not _is_whole(folder / part)
    ]


def _is_whole(part: Path) -> bool:
    """One file of weights, or every file that an index names; without an index, any shard."""
    if any((part / name).is_file() for name in (SAFETENSORS, HALF)):
        return True
    indices = [part / name for name in (INDEX, HALF_INDEX) if (part / name).is_file()]
    if not indices:
        return any(part.glob("*.safetensors"))
    named = [read_json(index).get("weight_map", {}) for index in indices]
    return any(shards and all((part / str(name)).is_file() for name in shards.values()) for shards in named)


def new_unet(config: dict[str, Any], where: str) -> nn.Module:
    """An untrained UNet2DModel; raises UsageError for another class or a config that diffusers refuses."""
    class_name = config.get("_class_name")
    if class_name != "UNet2DModel":
        raise UsageError(f"{where}: model class {class_name!r} is not supported; supported: UNet2DModel")
    unet: nn.Module = new_network(config, where)
    return unet


def new_network(config: dict[str, Any], where: str) -> Any:
    """An untrained network of the config's class; raises UsageError for a config that diffusers refuses."""
    diffusers = import_diffusers()
    ours = {name: config[name] for name in _OURS.get(config["_class_name"], ()) if name in config}
    try:
        network = getattr(diffusers, config["_class_name"]).from_config(
            {name: value for name, value in config.items() if name not in ours}
        )
    except (TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        raise UsageError(f"{where}: diffusers refuses it: {error}") from error
    network.register_to_config(**ours)
    return network


def sample_shape(config: dict[str, Any], where: str, channels: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the state."""
    size, channels = config.get("sample_size"), channels or require_channels(config, where)
    if isinstance(size, int):
        return channels, size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return channels, int(size[0]), int(size[1])
    raise UsageError(f"{where}: sample_size is {size!r}; an integer or two are expected")


def _patches(config: dict[str, Any], shape: tuple[int, int, int]) -> int:
    """The number of tokens that a transformer makes of an image (C, H, W)."""
    side = int(config["patch_size"])
    return (shape[1] // side) * (shape[2] // side)


def _learned_variance(config: dict[str, Any], family: Family) -> tuple[int | None, tuple[str, ...]]:
    """The channels without those of the variance, and what the user should hear; None where nothing was learned."""
    channels = config.get("in_channels")
    if not family.halves or not isinstance(channels, int) or config.get("out_channels") != 2 * channels:
        return None, ()
    return channels, (f"the model learned its variance: the last {channels} of {2 * channels} channels are left out",)
