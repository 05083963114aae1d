"""The model classes of diffusers that can be read: how each is called and which conditions its config implies.

One table, ``FAMILIES``. Configs are those of an instance, so what a file leaves out has the class's own default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmd_export.checkpoints.autoencoder import FOLDERS as AUTOENCODERS
from mmd_export.checkpoints.weights import read_json
from mmd_export.conditions import CLASS_LABELS, Condition, class_condition
from mmd_export.errors import UsageError

Config = Mapping[str, Any]
TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
POOLED, TEXT_EMBEDS = "pooled_projections", "text_embeds"
LONGEST = 1024  # tokens; tokenizers without a limit state 1e30
SDXL_IDS = 6  # original size, crop, target size
AESTHETIC = 6.0  # the score that the refiner's pipeline tells in place of the target size
LATENT_SIDE = 8  # pixels, as diffusers' pipelines reckon where there is no autoencoder
# What takes a condition's place on the unconditional side of guidance, under the names of diffusers' pipelines.
NEGATIVE = {
    TEXT: "negative_prompt_embeds",
    MASK: "negative_prompt_attention_mask",
    POOLED: "negative_pooled_prompt_embeds",
    TEXT_EMBEDS: "negative_pooled_prompt_embeds",
}


@dataclass(frozen=True)
class Facts:
    """What the conditions follow from.

    ``pooled``: width of the pipeline's pooled text, if its encoder is there; ``size``: (H, W) of the image, in pixels.
    """

    config: Config
    text_length: int
    pooled: int | None
    size: tuple[int, int]
    where: str


@dataclass(frozen=True)
class Family:
    """One model class.

    Args:
        conditions: what the network is told, as its config implies.
        folder: its place in a pipeline.
        text_length: tokens when nothing else says; 0 for no text.
        tokenizer: whether the pipeline's tokenizer may say.
        encoders: the text encoders of a pipeline whose widths add up to the text width.
        prediction: what the network predicts, where the class fixes it.
        latent: whether its states are latents whatever the pipeline holds; None if only 1 or 3 channels are pixels.
        halves: whether a learned variance may follow the output.
        null_class: whether the label behind the last class stands for no class.
        tokens: whether its pipeline derives a dynamic shift from the number of patches.
        sprint: whether ``guidance_embeds`` of its config makes it Sana Sprint's, which has the guidance scale embedded.
    """

    conditions: Callable[[Facts], tuple[Condition, ...]]
    folder: str = "transformer"
    text_length: int = 0
    tokenizer: bool = False
    encoders: tuple[str, ...] = ()
    prediction: str | None = None
    latent: bool | None = True
    halves: bool = False
    null_class: bool = False
    tokens: bool = False
    sprint: bool = False

    def is_sprint(self, config: Config) -> bool:
        """Whether this network of the class is Sana Sprint's."""
        return self.sprint and bool(config.get("guidance_embeds"))


def _text(facts: Facts, width: int) -> Condition:
    return Condition(TEXT, "float32", (facts.text_length, width))


def _mask(facts: Facts) -> Condition:
    return Condition(MASK, "int64", (facts.text_length,), 2)


def _unet(facts: Facts) -> tuple[Condition, ...]:
    if (kind := facts.config["class_embed_type"]) is not None:
        raise UsageError(f"{facts.where}: class_embed_type is {kind!r}, which is not supported; num_class_embeds is")
    return class_condition(facts.config["num_class_embeds"])


def _conditional_unet(facts: Facts) -> tuple[Condition, ...]:
    """Text; class labels, as numbers or as vectors; SDXL's pooled text and time ids."""
    config = facts.config
    _require_supported(config, facts.where)
    found = [_text(facts, _unet_text_width(config, facts.where))]
    if config["class_embed_type"] is not None:
        found.append(Condition(CLASS_LABELS, "float32", (config["projection_class_embeddings_input_dim"],)))
    else:
        found += class_condition(config["num_class_embeds"])
    if config["addition_embed_type"] == "text_time":
        found += _sdxl(facts)
    return tuple(found)


def _sdxl(facts: Facts) -> list[Condition]:
    """Both in one vector whose width the config states: pooled text, then so many numbers a time id."""
    total, each = facts.config["projection_class_embeddings_input_dim"], facts.config["addition_time_embed_dim"]
    ids = SDXL_IDS if facts.pooled is None else (total - facts.pooled) // each
    pooled = total - ids * each
    if ids < 1 or pooled < 1 or facts.pooled not in (None, pooled):
        raise UsageError(
            f"{facts.where}: projection_class_embeddings_input_dim is {total}; that is no pooled text of "
            f"{facts.pooled or 'any width'} and time ids of {each} numbers each"
        )
    return [Condition(TEXT_EMBEDS, "float32", (pooled,)), _time_ids(ids, facts.size)]


def _time_ids(ids: int, size: tuple[int, int]) -> Condition:
    """In pixels: of an image as it was, and of one cropped from twice the size."""
    height, width = size
    rows: Any = ((height, width, 0, 0), (2 * height, 2 * width, height // 4, width // 8))
    last = {SDXL_IDS: size, SDXL_IDS - 1: (AESTHETIC,)}.get(ids)
    values = None if last is None else np.array([(*row, *last) for row in rows], np.float32)
    return Condition("time_ids", "float32", (ids,), values=values)


def _require_supported(config: Config, where: str) -> None:
    """Raise UsageError for an embedding that needs inputs of another kind."""
    for key, known in (
        ("class_embed_type", (None, "projection", "simple_projection")),
        ("addition_embed_type", (None, "text_time")),
        ("encoder_hid_dim_type", (None, "text_proj")),
        ("class_embeddings_concat", (False,)),
        ("attention_type", ("default",)),
    ):
        if config[key] not in known:
            listed = ", ".join(map(str, known))
            raise UsageError(f"{where}: {key} is {config[key]!r}, which is not supported; supported: {listed}")


def _unet_text_width(config: Config, where: str) -> int:
    if config["encoder_hid_dim"] is not None:
        return int(config["encoder_hid_dim"])
    widths = config["cross_attention_dim"]
    distinct = {widths} if isinstance(widths, int) else set(widths)
    if len(distinct) != 1:
        raise UsageError(f"{where}: cross_attention_dim is {list(widths)}; one width of the text is expected")
    return int(distinct.pop())


def _dit(facts: Facts) -> tuple[Condition, ...]:
    return class_condition(facts.config["num_embeds_ada_norm"])


def _pixart(facts: Facts) -> tuple[Condition, ...]:
    """Text and its mask; at 1024 pixels also the size of the image."""
    config = facts.config
    text = _text(facts, config["caption_channels"] or config["cross_attention_dim"])
    sized = config["use_additional_conditions"]
    if sized is None:  # diffusers' own rule for configs that do not say
        sized = config["sample_size"] == 128
    return text, _mask(facts), *(_sizes(facts.size) if sized else ())


def _sizes(size: tuple[int, int]) -> tuple[Condition, Condition]:
    """(H, W) in pixels and H / W, of the image and of one four times as wide as high that is as large."""
    height, width = size
    sizes = np.array([(height, width), (height // 2, 2 * width)], np.float32)
    return (
        Condition("resolution", "float32", (2,), values=sizes),
        Condition("aspect_ratio", "float32", (1,), values=sizes[:, :1] / sizes[:, 1:]),
    )


def _sana(facts: Facts) -> tuple[Condition, ...]:
    return _text(facts, facts.config["caption_channels"]), _mask(facts)


def _sd3(facts: Facts) -> tuple[Condition, ...]:
    pooled = Condition(POOLED, "float32", (facts.config["pooled_projection_dim"],))
    return _text(facts, facts.config["joint_attention_dim"]), pooled


FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(_unet, "unet", latent=False, halves=True),
    "UNet2DConditionModel": Family(
        _conditional_unet, "unet", 77, tokenizer=True, encoders=("text_encoder", "text_encoder_2"), latent=None,
        halves=True,
    ),
    "DiTTransformer2DModel": Family(_dit, halves=True, null_class=True),
    "PixArtTransformer2DModel": Family(
        _pixart, text_length=300, tokenizer=True, encoders=("text_encoder",), halves=True
    ),
    "SanaTransformer2DModel": Family(
        _sana, text_length=300, tokenizer=True, encoders=("text_encoder",), prediction="flow_prediction", sprint=True
    ),
    # 77 tokens of CLIP and 256 of T5, one behind the other, as diffusers' pipeline makes them.
    "SD3Transformer2DModel": Family(
        _sd3, text_length=333, encoders=("text_encoder_3",), prediction="flow_prediction", tokens=True
    ),
}  # fmt: skip


def family_of(class_name: Any, where: str) -> Family:
    """The entry of a class; raises UsageError that lists the known ones."""
    if class_name not in FAMILIES:
        raise UsageError(f"{where}: model class {class_name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[class_name]


def text_length(family: Family, pipeline: Path, asked: int | None) -> tuple[int, str]:
    """Tokens of the text, and where the number is from: the user, the tokenizer, or the class."""
    if asked is not None:
        return asked, ""
    file = pipeline / "tokenizer" / "tokenizer_config.json"
    if family.tokenizer and file.is_file():
        longest = read_json(file).get("model_max_length")
        if isinstance(longest, int) and 1 <= longest <= LONGEST:
            return longest, f"text of {longest} tokens, as the tokenizer says; --text-length N changes it"
    return family.text_length, f"text of {family.text_length} tokens is assumed; --text-length N changes it"


def encoder_width(pipeline: Path, names: tuple[str, ...]) -> int | None:
    """The widths of those text encoders that the pipeline holds, added up; None if it holds none."""
    files = [file for name in names if (file := pipeline / name / "config.json").is_file()]
    widths = [next((c[key] for key in ("d_model", "hidden_size") if key in c), None) for c in map(read_json, files)]
    known = [width for width in widths if isinstance(width, int)]
    return sum(known) if known and len(known) == len(files) else None


def pooled_width(pipeline: Path) -> int | None:
    """The projection of SDXL's second text encoder; None without it."""
    file = pipeline / "text_encoder_2" / "config.json"
    width = read_json(file).get("projection_dim") if file.is_file() else None
    return width if isinstance(width, int) else None


def image_size(shape: tuple[int, int, int], pipeline: Path, *, latent: bool) -> tuple[int, int]:
    """(H, W) in pixels of what a state (C, H, W) becomes, by the levels of the pipeline's autoencoder."""
    files = [file for part in AUTOENCODERS if (file := pipeline / part / "config.json").is_file()]
    levels = read_json(files[0]).get("block_out_channels") if files else None
    side = 2 ** (len(levels) - 1) if levels else LATENT_SIDE if files or latent else 1
    return side * shape[1], side * shape[2]


def require_text(conditions: tuple[Condition, ...], family: Family, pipeline: Path, where: str) -> None:
    """Raise UsageError if the network's text is not as wide as what the pipeline's encoders give."""
    width = encoder_width(pipeline, family.encoders)
    text = next((each for each in conditions if each.name == TEXT), None)
    if text is not None and width is not None and width != text.shape[1]:
        raise UsageError(
            f"{where}: the model takes text of width {text.shape[1]}, {' and '.join(family.encoders)} give {width}; "
            "they belong to different pipelines"
        )
