"""The command ``finetune``: a run folder from settings, or the rest of a run that was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmd_export.cli_data import Balance, Crop, FeatureCacheSwitch, Features, Flip, Holdout, HoldoutFraction, Resize
from mmd_export.cli_estimator import (
    Autocast,
    BatchSize,
    ChannelsLast,
    CheckpointCalls,
    Compile,
    Device,
    Estimator,
    Kernel,
    Landmarks,
    MicroBatchSize,
    Reference,
)
from mmd_export.cli_options import (
    Ema,
    Eta,
    JsonFile,
    Sampler,
    Spacing,
    Steps,
    Timesteps,
    TunedModel,
    listed,
    with_ema_if_given,
)
from mmd_export.cli_output import say, show, write_json
from mmd_export.cli_tuning import (
    Learn,
    LoraAlpha,
    LoraRank,
    LoraTargets,
    PlanRate,
    Tune,
    TunedCalibration,
    TunedIn,
)

FINETUNE_EXAMPLES = (
    "Example: mmd-export finetune digits --steps 5 --out runs/digits-5\n\n"
    "Your own: mmd-export finetune ./model --steps 5 --data ./pictures --resize crop --features dino:./dinov2 "
    "--holdout inception:fid.pth --tune lora --out runs/5\n\n"
    "To go on: mmd-export finetune --out runs/5 --resume"
)


def finetune(
    model: TunedModel = None,
    steps: Steps = None,
    out: Annotated[Path | None, typer.Option(help="run folder to make", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of these settings; options win", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, a .npz, .npy or IDX file, a folder of pictures, or hf:ID_OR_FOLDER?split=NAME of datasets",
            show_default=False,
        ),
    ] = None,
    resize: Resize = None,
    crop: Crop = None,
    flip: Flip = None,
    holdout_fraction: HoldoutFraction = None,
    features: Features = None,
    balance: Balance = None,
    holdout: Holdout = None,
    feature_cache: FeatureCacheSwitch = None,
    kernel: Kernel = None,
    estimator: Estimator = None,
    reference: Reference = None,
    landmarks: Landmarks = None,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    checkpoint_calls: CheckpointCalls = None,
    autocast: Autocast = None,
    channels_last: ChannelsLast = None,
    compile_network: Compile = None,
    device: Device = None,
    lr: Annotated[float | None, typer.Option(help="learning rate of Adam", show_default=False)] = None,
    iterations: Annotated[int | None, typer.Option(help="optimiser steps", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="of the noise", show_default=False)] = None,
    sampler: Sampler = None,
    eta: Eta = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    ema: Ema = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="further held-out metrics for log and result, as recall,kid; comma-separated", show_default=False
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="also write TensorBoard events into the run folder")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with a run that was stopped; --out alone is enough")
    ] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="with --resume: end it now, with the best weights so far")
    ] = False,
    tune_weights: Tune = None,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_targets: LoraTargets = None,
    learn: Learn = None,
    plan_lr: PlanRate = None,
    precision: TunedIn = None,
    calibration: TunedCalibration = None,
    json: JsonFile = None,
) -> None:
    """Tune a model with the MMD through the whole sampling chain, for one step budget. Writes a run folder."""
    from mmd_export.commands import finetune as command

    given = {
        "model": with_ema_if_given(model, ema), "steps": steps, "out": out, "data": data, "features": features,
        "resize": resize, "crop": crop, "flip": flip, "holdout_fraction": holdout_fraction, "balance": balance,
        "feature_cache": feature_cache,
        "holdout": holdout, "kernel": kernel, "batch_size": batch_size, "learning_rate": lr, "iterations": iterations,
        "seed": seed, "sampler": sampler, "eta": eta, "spacing": spacing, "timesteps": listed(timesteps),
        "estimator": estimator, "reference": reference, "landmarks": landmarks, "micro_batch_size": micro_batch_size,
        "checkpoint_calls": checkpoint_calls, "autocast": autocast, "channels_last": channels_last,
        "compile": compile_network, "device": device,
        "tune": tune_weights, "lora_rank": lora_rank, "lora_alpha": lora_alpha, "lora_targets": lora_targets,
        "learn": learn, "plan_learning_rate": plan_lr, "precision": precision, "calibration": calibration,
        "metrics": metrics,
    }  # fmt: skip
    found = command.finetune(given, config, resume=resume, finish=finish, tensorboard=tensorboard, notify=say)
    if found is None:
        return
    result, tuned_in = found
    write_json(json, command.facts(result))
    if json == Path("-"):
        return
    before, after = next(iter(result.told.values()))
    at = "" if tuned_in == "fp32" else f" --precision {tuned_in}"
    show(
        f"{result.folder}: held-out Frechet distance {before} -> {after}, best at iteration {result.best_iteration} of "
        f"{result.iterations}, {result.seconds:.0f} s\n"
        f"next: mmd-export build {result.folder} --target onnx{at} --out bundle"
    )
