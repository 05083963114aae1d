"""An encoder's own preprocessing in torch, so that gradients flow through it; read from a processor's config.

    y = (resize(c (x + 1) / 2) - mean) / std,    x in [-1, 1], c = 1 for pixel values up to 1 and 255 for bytes

What it leaves out of the published pipelines is the rounding of the resized image to bytes, which has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmd_export.errors import UsageError

# Pillow's numbers, which the configs use. Its LANCZOS, BOX and HAMMING have no counterpart in torch.
RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
OPTIONS = ("size", "resample", "mean", "std")
# Steps of some processors that are not made here: a config that asks for one is refused. Those that only decide the
# size do not matter once the user states one.
_SIZING = ("do_pad", "do_thumbnail", "do_align_long_axis", "do_crop_margin", "do_image_splitting", "size_divisor")
_FOREIGN = (*_SIZING, "do_flip_channel_order", "rescale_offset", "do_color_quantize")
_OVERRULED = (*_SIZING, "do_resize", "do_center_crop", "crop_size", "crop_pct")
_WARPED_FROM = 384  # ConvNeXT's processor: smaller sizes are cut out of an image resized to size / crop_pct
# Processors to which a bare number is a square even before a cut.
_SQUARED = ("Beit", "DeiT", "EfficientNet", "Flava", "OwlViT")


@dataclass(frozen=True)
class Recipe:
    """Numbers of one preprocessing; see the module.

    Attributes:
        size: the shorter edge, or (height, width), that images are resized to; None leaves them as they are.
        crop: (height, width) of the cut from the middle after that.
        resample: bilinear, bicubic or nearest-exact; all but the last average over pixels when they shrink (antialias).
        mean: of each channel, after ``scale``; ``std`` alike.
        scale: c above.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0

    def changed(self, options: Mapping[str, str], where: str) -> Recipe:
        """The recipe with what the user said in ``?size=N&resample=bicubic&mean=A/B/C&std=A/B/C``."""
        recipe = self
        if "size" in options:
            side = _whole(options["size"], f"{where}: size")
            recipe = replace(recipe, size=(side, side), crop=None)
        if "resample" in options:
            if options["resample"] not in RESAMPLE.values():
                known = ", ".join(RESAMPLE.values())
                raise UsageError(f"{where}: resample is {options['resample']!r}; known: {known}")
            recipe = replace(recipe, resample=options["resample"])
        if "mean" in options:
            recipe = replace(recipe, mean=_numbers(options["mean"].split("/"), f"{where}: mean"))
        if "std" in options:
            recipe = replace(recipe, std=_numbers(options["std"].split("/"), f"{where}: std"))
        return recipe


class Preprocess(nn.Module):
    """Images (N, 1 or 3, H, W) in [-1, 1] to what the network takes; grey becomes as many channels as ``mean`` has."""

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.register_buffer("mean", torch.tensor(recipe.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(recipe.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        recipe = self.recipe
        values = (images + 1.0) * 0.5
        if recipe.size is not None:
            values = _resized(values, recipe.size, recipe.resample)
        if recipe.crop is not None:
            values = _cut(values, recipe.crop)
        return (recipe.scale * values - self.mean) / self.std


def _resized(values: Tensor, size: int | tuple[int, int], resample: str) -> Tensor:
    """As Pillow resizes: antialiased, and bicubic overshoot is cut off."""
    height, width = values.shape[2:]
    if isinstance(size, int):  # the longer edge is rounded down, as torchvision and Pillow's processors do
        short = min(height, width)
        size = (size * height // short, size * width // short)
    if size == (height, width):
        return values
    if resample == "nearest-exact":
        return F.interpolate(values, size, mode=resample)
    return F.interpolate(values, size, mode=resample, align_corners=False, antialias=True).clamp(0.0, 1.0)


def _cut(values: Tensor, crop: tuple[int, int]) -> Tensor:
    """(height, width) from the middle."""
    height, width = values.shape[2:]
    if height < crop[0] or width < crop[1]:
        raise UsageError(f"preprocessing: the image is {(height, width)}, a cut of {crop} is larger; say ?size=N")
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    return values[:, :, top : top + crop[0], left : left + crop[1]]


def read_recipe(config: Mapping[str, Any], options: Mapping[str, str], where: str) -> Recipe:
    """The recipe in a ``preprocessor_config.json`` of transformers, and what the user's ``options`` change in it.

    Raises UsageError for what cannot be followed.
    """
    if "size" in options:
        config = {key: value for key, value in config.items() if key not in _OVERRULED} | {"size": options["size"]}
    if "resample" in options:
        config = {**config, "resample": 2}
    return _followed(config, where).changed(options, where)


def _followed(config: Mapping[str, Any], where: str) -> Recipe:
    for key in _FOREIGN:
        if config.get(key):
            raise UsageError(f"{where}: {key} is {config[key]!r}, a step that is not supported; state ?size=N")
    size = _size(config, where) if config.get("do_resize", True) else None
    crop: tuple[int, int] | None = None
    if config.get("do_center_crop"):
        crop = _pair(config.get("crop_size", config.get("size")), f"{where}: crop_size")
    if "crop_pct" in config and isinstance(size, int):
        size, crop = _convnext(size, config["crop_pct"] or 224 / 256)
    if _is_of(config, "Levit") and isinstance(size, int):
        size = int(256 / 224 * size)  # its processor states the edge of the cut
    scale = 255.0 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    if config.get("do_normalize", True):
        mean, std = (_statistic(config, key, where) for key in ("image_mean", "image_std"))
    if config.get("include_top", _is_of(config, "EfficientNet")):  # divides by the deviation once more
        std = tuple(a * b for a, b in zip(std, _statistic(config, "image_std", where), strict=True))
    resample = config.get("resample", 2)
    if resample not in RESAMPLE:
        raise UsageError(f"{where}: resample is {resample!r}, not of {sorted(RESAMPLE)}; state ?resample=bicubic")
    return Recipe(size, crop, RESAMPLE[resample], mean, std, scale)


def _size(config: Mapping[str, Any], where: str) -> int | tuple[int, int]:
    """The shorter edge, or height and width. A bare number is an edge where a cut follows, else a square."""
    size = config.get("size")
    cut = config.get("do_center_crop") or "crop_pct" in config
    if isinstance(size, int) and cut and not _is_of(config, *_SQUARED):
        return size
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return _whole(size["shortest_edge"], f"{where}: size")
    return _pair(size, f"{where}: size")


def _is_of(config: Mapping[str, Any], *models: str) -> bool:
    """Whether the config is of the processor of one of these models, under its name of today or the old one."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    return kind.startswith(
        tuple(f"{model}{what}" for model in models for what in ("ImageProcessor", "FeatureExtractor"))
    )


def _convnext(size: int, crop_pct: float) -> tuple[int | tuple[int, int], tuple[int, int] | None]:
    if size >= _WARPED_FROM:
        return (size, size), None
    return int(size / crop_pct), (size, size)


def _pair(value: Any, where: str) -> tuple[int, int]:
    """(height, width) of a number or of a mapping with both."""
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        return _whole(value["height"], where), _whole(value["width"], where)
    side = _whole(value, where)
    return side, side


def _whole(value: Any, where: str) -> int:
    text = str(value)
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{where} is {value!r}; a whole number of pixels is expected, as in ?size=224")
    return int(text)


def _statistic(config: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    value = config.get(key)
    return _numbers(value if isinstance(value, list | tuple) else [value], f"{where}: {key}")


def _numbers(values: list[Any] | tuple[Any, ...], where: str) -> tuple[float, ...]:
    """1 or 3 numbers, as 3."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) not in (1, 3) or (where.endswith("std") and min(numbers, default=0.0) <= 0.0):
        raise UsageError(f"{where} is {values!r}; 1 or 3 numbers are expected, as in ?mean=0.5/0.5/0.5&std=0.5/0.5/0.5")
    return numbers * 3 if len(numbers) == 1 else numbers
