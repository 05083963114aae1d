"""Any network that its owner saved with ``torch.jit.save``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmd_export.errors import UsageError
from mmd_export.trt.cache import key_of, sha256_of
from mmd_finetune.encoder import Encoder, Family
from mmd_finetune.encoder_source import Source
from mmd_finetune.preprocess import OPTIONS, Preprocess, Recipe
from mmd_finetune.torchscript import load_torchscript

# The range of pixel values that the network was trained on: mean, std and scale of a recipe.
_RANGES = {"-1..1": (0.5, 0.5, 1.0), "0..1": (0.0, 1.0, 1.0), "0..255": (0.0, 1.0, 255.0)}


class Scripted(nn.Module):
    """Preprocessing and the script; a feature map (N, d, h, w) is averaged over its positions."""

    def __init__(self, recipe: Recipe | None, network: nn.Module) -> None:
        super().__init__()
        self.preprocess = Preprocess(recipe) if recipe else nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Any = self.network(self.preprocess(images))  # a script may give anything
        pooled: Tensor = features.mean((2, 3)) if isinstance(features, Tensor) and features.dim() == 4 else features
        return pooled


def _load(source: Source) -> Encoder:
    source.require_options(*OPTIONS, "range")
    path = source.file()
    recipe = _recipe(source)
    network = load_torchscript(path, source.name)
    channels = (1, 3) if recipe else None
    sha256 = key_of({"file": sha256_of([path]), "preprocessing": str(recipe)})
    return Encoder(source.name, Scripted(recipe, network).eval(), channels=channels, sha256=sha256)


def _recipe(source: Source) -> Recipe | None:
    """What the options say; without any the script gets the images as they are."""
    if not source.options:
        return None
    where = f"encoder {source.name}"
    range_name = source.options.get("range", "0..1" if {"mean", "std"} & set(source.options) else "-1..1")
    if range_name not in _RANGES:
        raise UsageError(f"{where}: range is {range_name!r}; known: {', '.join(_RANGES)}")
    mean, std, scale = _RANGES[range_name]
    plain = Recipe(None, None, "bilinear", (mean,) * 3, (std,) * 3, scale)
    return plain.changed(source.options, where)


FAMILY = Family(("torchscript",), "FILE", _load)
