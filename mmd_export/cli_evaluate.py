"""The command ``evaluate``: samples scored against real images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmd_export.cli_data import Crop, FeatureCacheSwitch, Flip, HoldoutFraction, Resize
from mmd_export.cli_network import Conditions, GuidanceForm, GuidanceScale, NullLabel, TextLength
from mmd_export.cli_options import (
    CheckpointOption,
    Ema,
    Eta,
    JsonFile,
    RuntimeName,
    Sampler,
    Source,
    Spacing,
    Steps,
    Timesteps,
    TorchDevice,
    can_be_written,
    listed,
    png,
    positive,
    with_ema,
)
from mmd_export.cli_output import counted, say, show_table, write_json
from mmd_export.errors import UsageError
from mmd_export.network_options import NetworkOptions

EVALUATE_EXAMPLE = "Example: mmd-export evaluate runs/digits-5 --data digits --metrics frechet,recall,memorisation"
LEAST_DRAWS = 40  # with fewer no draw lies in the last 2.5 %


def evaluate(
    source: Source,
    data: Annotated[
        str,
        typer.Option(
            help="digits, a .npz, .npy or IDX file, a folder of pictures, or hf:ID_OR_FOLDER?split=NAME of datasets"
        ),
    ] = "digits",
    resize: Resize = None,
    crop: Crop = None,
    flip: Flip = None,
    holdout_fraction: HoldoutFraction = None,
    feature_cache: FeatureCacheSwitch = None,
    features: Annotated[str, typer.Option(help="encoders, comma-separated")] = "digits-conv,digits-mlp",
    metrics: Annotated[
        str,
        typer.Option(
            help="frechet, kid, cmmd, precision, recall, density, coverage, memorisation, copying; comma-separated"
        ),
    ] = "frechet",
    count: Annotated[int, typer.Option(help="samples to draw")] = 1797,
    seed: Annotated[int, typer.Option(help="of the noise; another than that of finetune")] = 1,
    real_count: Annotated[
        int | None, typer.Option(help="real images to compare with; default: all", show_default=False)
    ] = None,
    held_out_data: Annotated[
        str | None,
        typer.Option(
            help="images outside the training set, for memorisation, copying; or --holdout-fraction", show_default=False
        ),
    ] = None,
    neighbours: Annotated[int, typer.Option(help="k of precision, recall, density, coverage")] = 5,
    bootstrap: Annotated[
        int, typer.Option(help=f"draws behind each 95 % interval, at least {LEAST_DRAWS}; 0: none")
    ] = 200,
    plot: Annotated[
        Path | None, typer.Option(help="draw the values as a PNG", show_default=False, callback=can_be_written)
    ] = None,
    runtime: RuntimeName = None,
    device: TorchDevice = None,
    checkpoint: CheckpointOption = None,
    steps: Steps = None,
    sampler: Sampler = None,
    eta: Eta = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    ema: Ema = None,
    json: JsonFile = None,
    condition: Conditions = None,
    guidance_scale: GuidanceScale = None,
    guidance_form: GuidanceForm = "auto",
    null_label: NullLabel = None,
    text_length: TextLength = None,
) -> None:
    """Score samples against real images: any metrics on any encoders, each with a bootstrap interval."""
    positive("--real-count", real_count)
    png("--plot", plot)
    if bootstrap and bootstrap < LEAST_DRAWS:
        raise UsageError(
            f"--bootstrap is {bootstrap}; give 0, or at least {LEAST_DRAWS}: an interval of 95 % leaves 2.5 % at each "
            "end"
        )
    from mmd_export.commands import evaluate as command
    from mmd_export.commands.sample import SampleOptions

    network = NetworkOptions(guidance_scale, guidance_form, null_label, text_length)
    options = SampleOptions(
        with_ema(source, ema), seed, count, runtime, checkpoint, None, network, tuple(condition or ()), device,
        steps=steps, sampler=sampler, eta=eta, spacing=spacing, timesteps=listed(timesteps),
    )  # fmt: skip
    scoring = command.Scoring(
        data, _names(features), _names(metrics), neighbours, bootstrap, real_count, held_out_data,
        command.preparation(resize, crop, flip=flip, holdout_fraction=holdout_fraction), feature_cache is not False,
    )  # fmt: skip
    with counted() as observe:
        result = command.evaluate(options, scoring, observe, say)
    if not command.is_first_process():
        return
    heads = ("encoder", "metric", "value", "95 % interval", "perfect")
    title = f"{result['source']}: {count} samples of seed {seed} against {result['real_images']} real images"
    show_table(title, heads, command.rows(result), json)
    say(f"drawn in {result['runtime']}")
    write_json(json, result)
    if plot:
        command.plot(result, plot)
        say(f"{plot}: the values as a picture")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
