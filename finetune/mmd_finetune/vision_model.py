"""Vision backbones of transformers as encoders: weights, features and preprocessing from a folder or a hub id."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmd_export.checkpoints.weights import hash_weights, pickle_warning, read_json
from mmd_export.errors import NotAvailableError, UsageError, one_line
from mmd_finetune.encoder import Encoder, frozen
from mmd_finetune.encoder_source import Source
from mmd_finetune.preprocess import OPTIONS, Preprocess, Recipe, read_recipe
from mmd_finetune.torchscript import require_finite

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WHOLE_PROCESSOR, IMAGE_PART = "processor_config.json", "image_processor"  # all that transformers 5 saves of CLIP's
MASKED = "vit_mae"
SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FETCHED = [CONFIG, PROCESSOR, WHOLE_PROCESSOR, *SAFE, "model-*.safetensors"]
_FETCHED_PICKLES = [CONFIG, PROCESSOR, WHOLE_PROCESSOR, *PICKLES, "pytorch_model-*.bin"]


class VisionFeatures(nn.Module):
    """Images (N, 1 or 3, H, W) in [-1, 1] to features (N, d).

    They are the model's projected image embedding where it has one, else its pooled output, else (``token``) its first
    token, else the mean over tokens or positions.
    """

    def __init__(self, preprocess: Preprocess, model: nn.Module, *, token: bool) -> None:
        super().__init__()
        self.preprocess, self.model, self.token = preprocess, model, token

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=self.preprocess(images))
        if self.token:
            first: Tensor = output.last_hidden_state[:, 0]
            return first
        for key in ("image_embeds", "pooler_output"):
            if (pooled := getattr(output, key, None)) is not None:
                features: Tensor = pooled.flatten(1)
                return features
        hidden: Tensor = output.last_hidden_state
        return hidden.mean(1) if hidden.dim() == 3 else hidden.mean((2, 3))


Usual = Callable[[Mapping[str, Any]], Recipe]


def image_side(config: Mapping[str, Any]) -> int:
    """``image_size`` of the vision part of a model's config; 224 where it is left out, as the classes have it."""
    return int(config.get("vision_config", config).get("image_size") or 224)


def load_vision(source: Source, types: tuple[str, ...], usual: Usual | None, class_name: str = "AutoModel") -> Encoder:
    """The encoder in a folder or under a hub id.

    Args:
        source: what the user named.
        types: the ``model_type`` that may stand in the config; empty for any.
        usual: the published preprocessing by the model's config, for a folder that says none.
        class_name: the class of transformers that is loaded.

    Raises UsageError that names what does not fit, NotAvailableError without transformers or network.
    """
    source.require_options(*OPTIONS)
    transformers = _import_transformers(source)
    folder = _locate(source)
    where = f"encoder {source.name}"
    config = read_json(folder / CONFIG)
    if types and config.get("model_type") not in types:
        found = config.get("model_type")
        raise UsageError(f"{where}: its model_type is {found!r}, {source.kind}: takes {', '.join(types)}; use hf:")
    recipe = _recipe(source, folder, usual and usual(config))
    model, token, warnings = _load_model(transformers, folder, where, class_name)
    require_finite(model.state_dict(), where)
    if config.get("model_type") == MASKED:
        config = {**config, "mask_ratio": 0.0}
        _unmask(model)
    network = frozen(VisionFeatures(Preprocess(recipe), model, token=token))
    facts = {"config": config, "preprocessing": asdict(recipe), "class": type(model).__name__, "token": token}
    sha256 = hash_weights(model.state_dict(), facts)
    return Encoder(source.name, network, channels=(1, 3), sha256=sha256, warnings=warnings)


def _unmask(model: Any) -> None:
    """Let ViT-MAE see all patches, in their order: as published it drops and shuffles them at random, at rest too."""
    model.config.mask_ratio = 0.0
    order = torch.arange(model.embeddings.patch_embeddings.num_patches)

    def keep_order(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        pixels = given["pixel_values"]
        return args, {**given, "noise": order.to(pixels.device).expand(len(pixels), -1)}

    model.register_forward_pre_hook(keep_order, with_kwargs=True)


def _import_transformers(source: Source) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise NotAvailableError(
            f"encoder {source.name}: transformers is not installed; pip install 'mmd-export[finetune]'"
        ) from error
    return transformers


def _locate(source: Source) -> Path:
    """The folder, or what the hub has under that id."""
    folder = Path(source.place)
    if folder.is_dir():
        return folder
    if folder.exists() or not source.is_hub_id:
        found = "is a file" if folder.exists() else "does not exist"
        raise UsageError(
            f"encoder {source.kind}:{source.place} {found}; a folder that save_pretrained wrote, or a hub id "
            "owner/name, is expected"
        )
    from huggingface_hub import snapshot_download

    try:
        place = Path(snapshot_download(source.place, allow_patterns=_FETCHED))
        if not any((place / name).is_file() for name in SAFE):
            place = Path(snapshot_download(source.place, allow_patterns=_FETCHED_PICKLES))
    except Exception as error:  # the hub client raises many unrelated types; each becomes one line
        raise NotAvailableError(
            f"encoder {source.name} is no local folder and could not be downloaded: {one_line(error)}"
        ) from error
    return place


def _recipe(source: Source, folder: Path, usual: Recipe | None) -> Recipe:
    """The processor's own, or the usual one; options on top."""
    where = f"encoder {source.name}"
    if (found := _processor(folder)) is not None:
        name, config = found
        recipe = read_recipe(config, source.options, f"{where}: {name}")
    elif usual is not None:
        recipe = usual.changed(source.options, where)
    else:
        raise UsageError(
            f"{where}: {folder / PROCESSOR} does not exist; copy it there, or use clip:, dino: or siglip: for such a "
            "model"
        )
    return recipe


def _processor(folder: Path) -> tuple[str, Mapping[str, Any]] | None:
    """The file that says how images are prepared, and what it says."""
    if (folder / PROCESSOR).is_file():
        return PROCESSOR, read_json(folder / PROCESSOR)
    whole = read_json(folder / WHOLE_PROCESSOR) if (folder / WHOLE_PROCESSOR).is_file() else {}
    part = whole.get(IMAGE_PART)
    return (WHOLE_PROCESSOR, part) if isinstance(part, dict) else None


def _load_model(
    transformers: Any, folder: Path, where: str, class_name: str
) -> tuple[nn.Module, bool, tuple[str, ...]]:
    """The vision tower, whether its pooler has no weights, and warnings. No code of the folder is run."""
    safe = any((folder / name).is_file() for name in SAFE)
    pickled = next((folder / name for name in PICKLES if (folder / name).is_file()), None)
    if not safe and pickled is None:
        raise UsageError(f"{where}: {folder / SAFE[0]} does not exist; a folder that save_pretrained wrote is expected")
    try:
        with _quiet(transformers):
            config = _vision_config(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
            model, told = getattr(transformers, class_name).from_pretrained(
                folder,
                config=config,
                dtype="float32",
                local_files_only=True,
                use_safetensors=safe,
                weights_only=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except ImportError as error:
        raise NotAvailableError(f"{where}: transformers needs another package for it: {one_line(error)}") from error
    except Exception as error:  # safetensors, pickle, config and shape errors of many types; each becomes one line
        raise UsageError(f"{where}: transformers cannot load {folder}: {one_line(error)}") from error
    token = _require_whole(told, type(model).__name__, where)
    return model, token, () if safe or pickled is None else (pickle_warning(pickled),)


def _vision_config(config: Any) -> Any:
    """That of the vision tower; CLIP's full model keeps the width of the projection outside it."""
    vision = getattr(config, "vision_config", config)
    if vision is not config and hasattr(vision, "projection_dim") and hasattr(config, "projection_dim"):
        vision.projection_dim = config.projection_dim
    return vision


def _require_whole(told: Any, model: str, where: str) -> bool:
    """Raise UsageError for a tensor of another shape or none; True if only those of the pooler are missing."""
    for key, found, wanted in sorted(told["mismatched_keys"]):
        raise UsageError(f"{where}: {key} is {tuple(found)}, the config says {tuple(wanted)}; copy the folder again")
    missing = sorted(told["missing_keys"])
    token = bool(missing) and all("pooler" in key.split(".") for key in missing)
    if missing and not token:
        raise UsageError(f"{where}: {len(missing)} tensors of {model} are missing, first {missing[0]!r}")
    return token


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the report of keys that belong to a text tower or a classifier, and without a bar for a local file."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
