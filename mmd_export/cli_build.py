"""The commands that compile, ``build`` and ``finalize``, which have the most options; registered in ``cli``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmd_export.cli_network import Conditions, GuidanceForm, GuidanceScale, NullLabel, TextLength
from mmd_export.cli_options import (
    BundleFolder,
    Ema,
    Eta,
    Model,
    Overwrite,
    Sampler,
    SkipVerify,
    Spacing,
    Steps,
    Timesteps,
    listed,
    with_ema,
)
from mmd_export.cli_output import built, say, show
from mmd_export.cli_targets import (
    CacheFolder,
    Calibration,
    Compress,
    ComputeCapability,
    ComputeUnits,
    DeploymentTarget,
    Device,
    HardwareCompat,
    MemoryLimit,
    Refit,
    StripWeights,
    VersionCompat,
    Workspace,
)
from mmd_export.network_options import NetworkOptions
from mmd_export.target_options import TargetOptions

BUILD_EXAMPLES = (
    "Example: mmd-export build runs/digits-5 --target onnx --out digits-5.bundle\n\n"
    "With guidance: mmd-export build ./pixart --target onnx --steps 8 --guidance-scale 4.5 --out pixart-8.bundle"
)
ALIASES = {"float": "float32"}  # of --output
FINALIZE_EXAMPLES = "Example: mmd-export finalize digits-5.bundle --out digits-5.engine"


def build(
    model: Model,
    target: Annotated[str, typer.Option(help="what to compile for; see mmd-export doctor", show_default=False)],
    out: Annotated[Path, typer.Option(help="bundle folder to make", show_default=False)],
    steps: Steps = None,
    sampler: Sampler = None,
    eta: Eta = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    ema: Ema = None,
    precision: Annotated[str, typer.Option(help="fp32, or what else the target has; see mmd-export doctor")] = "fp32",
    batch: Annotated[str, typer.Option(help="a size (1), a list (1,4,8) or a range (1..8)")] = "1",
    output: Annotated[str, typer.Option(help="float32 (B,C,H,W) in [-1,1] or uint8 (B,H,W,C)")] = "float32",
    form: Annotated[
        str, typer.Option(help="unrolled, loop (large K: small file, quick to load, slower a run) or auto")
    ] = "auto",
    decode: Annotated[
        bool,
        typer.Option(
            "--decode", help="latent models: put the autoencoder's decoder into the graph; else it gives latents"
        ),
    ] = False,
    defer: Annotated[
        bool, typer.Option("--defer", help="TensorRT: pack the graph; finalize compiles it where it will run")
    ] = False,
    auto_promote: Annotated[
        bool,
        typer.Option("--auto-promote", help="onnx, below fp32: keep the operators that break parity in float32"),
    ] = False,
    overwrite: Overwrite = False,
    skip_verify: SkipVerify = False,
    guidance_scale: GuidanceScale = None,
    guidance_form: GuidanceForm = "auto",
    null_label: NullLabel = None,
    text_length: TextLength = None,
    condition: Conditions = None,
    workspace: Workspace = None,
    memory_limit: MemoryLimit = None,
    hardware_compat: HardwareCompat = None,
    version_compat: VersionCompat = None,
    refit: Refit = None,
    strip_weights: StripWeights = None,
    compress: Compress = None,
    compute_capability: ComputeCapability = None,
    cache: CacheFolder = None,
    deployment_target: DeploymentTarget = None,
    compute_units: ComputeUnits = None,
    calibration: Calibration = None,
    device: Device = None,
) -> None:
    """Unroll the sampler into one graph, compile it, and pack a verified bundle."""
    from mmd_export.build import BuildOptions
    from mmd_export.build import build as make

    of_target = TargetOptions(
        workspace, memory_limit, hardware_compat, version_compat, refit, strip_weights, compress,
        compute_capability, cache, deployment_target, compute_units, calibration, device,
    )  # fmt: skip
    options = BuildOptions(
        with_ema(model, ema), target, out, precision, batch, ALIASES.get(output, output), overwrite,
        not skip_verify, form, decode, NetworkOptions(guidance_scale, guidance_form, null_label, text_length),
        of_target, defer, auto_promote, tuple(condition or ()), steps=steps, sampler=sampler, eta=eta, spacing=spacing,
        timesteps=listed(timesteps),
    )  # fmt: skip
    show(built(out, make(options, say)))


def finalize(
    bundle: BundleFolder,
    out: Annotated[
        Path | None, typer.Option(help="bundle folder to make; default: in the place of BUNDLE", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    skip_verify: SkipVerify = False,
    memory_limit: MemoryLimit = None,
    cache: CacheFolder = None,
) -> None:
    """Compile a bundle built with --defer, on the machine where it will run, and verify it there."""
    from mmd_export.commands.finalize import FinalizeOptions
    from mmd_export.commands.finalize import finalize as make

    options = FinalizeOptions(bundle, out, overwrite, not skip_verify, memory_limit, cache)
    show(built(out or bundle, make(options, say)))
