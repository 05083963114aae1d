"""The options of ``finetune`` that say what is compared: which images, in which encoders."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Data and encoders"

Resize = Annotated[
    str | None,
    typer.Option(
        help="images to the model's size: crop the middle, or stretch", show_default=False, rich_help_panel=_PANEL
    ),
]
Crop = Annotated[
    str | None,
    typer.Option(
        help="LEFT,TOP,WIDTH,HEIGHT to cut out of every image first", show_default=False, rich_help_panel=_PANEL
    ),
]
Flip = Annotated[
    bool | None,
    typer.Option(
        "--flip/--no-flip", help="also take every image's mirror image", show_default=False, rich_help_panel=_PANEL
    ),
]
HoldoutFraction = Annotated[
    float | None,
    typer.Option(
        help="share of the images that only scores; each image's hash decides",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Features = Annotated[
    str | None,
    typer.Option(
        help="encoders of the loss, comma-separated: digits-conv, digits-residual, digits-mlp, pixels, random-conv, "
        "inception:FILE, torchscript:FILE, clip:ID_OR_FOLDER, dino:..., siglip:... or hf:...; docs/encoders.md",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Holdout = Annotated[
    str | None,
    typer.Option(
        help="encoders that only score, comma-separated; the first one decides which weights are best",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Balance = Annotated[
    str | None,
    typer.Option(
        help="weights of the encoders in the loss: untuned, by the untuned model's MMD, or equal; default: equal for "
        "shipped encoders, else untuned",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
FeatureCacheSwitch = Annotated[
    bool | None,
    typer.Option(
        "--feature-cache/--no-feature-cache",
        help="keep the features of real images in the cache folder (default)",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
